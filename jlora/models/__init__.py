"""Language models: a Hugging Face folder read as a configuration, params and a pure function of them."""

from typing import TYPE_CHECKING

from jlora.faces import lazy_face
from jlora.models._config import DecoderConfig, parse_config, read_config
from jlora.models._families import FAMILIES
from jlora.models._rope import Rope

if TYPE_CHECKING:
    from jlora.models._adapter import adapter_tensors, read_adapter, write_adapter
    from jlora.models._cache import Cache, init_cache
    from jlora.models._decoder import decoder
    from jlora.models._filters import filtered
    from jlora.models._generate import Answer, generate
    from jlora.models._names import factorizations, mapping
    from jlora.models._read import read_params
    from jlora.models._shapes import init_params, param_shapes
    from jlora.models._write import write_model

__all__ = [
    "FAMILIES",
    "Answer",
    "Cache",
    "DecoderConfig",
    "Rope",
    "adapter_tensors",
    "decoder",
    "factorizations",
    "filtered",
    "generate",
    "init_cache",
    "init_params",
    "mapping",
    "param_shapes",
    "parse_config",
    "read_adapter",
    "read_config",
    "read_params",
    "write_adapter",
    "write_model",
]

# config.json is read without JAX.
__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "jlora.models._adapter": ("adapter_tensors", "read_adapter", "write_adapter"),
        "jlora.models._cache": ("Cache", "init_cache"),
        "jlora.models._decoder": ("decoder",),
        "jlora.models._filters": ("filtered",),
        "jlora.models._generate": ("Answer", "generate"),
        "jlora.models._names": ("factorizations", "mapping"),
        "jlora.models._read": ("read_params",),
        "jlora.models._shapes": ("init_params", "param_shapes"),
        "jlora.models._write": ("write_model",),
    },
)
