"""What the names and shapes of Flax's own parameters say of their factorization.

A leaf that is a weight is one of

  embedding   the last two axes are in (the vocabulary) and out
  two axes    in and out, whatever the name
  kernel      the axes are batch, in, out; how many of each is read off, in this order, until one reading is left:
              1. its bias, which has the kernel's batch and out axes
              2. Flax's automatic name of the module
                 `Dense_0`   one in, one out
                 `Conv_0`    one out, the rest in; batch axes are those of a stack: as many as its bias, or the scale
                             of a norm beside it, has beyond one
              3. the kernels beside it: `query`, `key`, `value` (in, heads, head_dim) and `out` (heads, head_dim, out)
                 of MultiHeadDotProductAttention
              Leading axes beyond these are batch: stacks made by nn.scan and nn.vmap.
              The equation of an Einsum is not in its params: by its bias, an out axis that stands before the in axes
              counts as batch. `jlora.linen.resolve_config` asks the module instead.

No weights are a bias, a scale, a vector, and what a first axis of size 1 shows to be added with broadcasting, such as
position embeddings (1, tokens, width). For anything else the configuration has to say.
"""

import re
from collections.abc import Callable, Mapping

from jlora.contraction import Factorization, canonical
from jlora.errors import TargetError

Shape = tuple[int, ...]
Test = Callable[[Factorization], bool]

_NOT_WEIGHTS = ("bias", "scale")
_ATTENTION = ("query", "key", "value", "out")
_AUTOMATIC = re.compile(r"(Dense|Conv)_\d+")


def flax_factorization(path: str, shapes: Mapping[str, Shape]) -> Factorization | None:
    """The factorization of the leaf at `path`, or None where it is no weight.

    Raises:
      TargetError: it is a weight, and the rules of this module leave none or several readings.
    """
    shape, name = shapes[path], path.rsplit("/", 1)[-1]
    ndim = len(shape)
    if name in _NOT_WEIGHTS or ndim < 2:
        return None
    if name not in ("kernel", "embedding") and (sum(size != 1 for size in shape) < 2 or (ndim > 2 and shape[0] == 1)):
        return None
    if ndim == 2 or name == "embedding":
        return canonical(ndim - 2, 1, 1)
    readings = _kernel_readings(path, shapes) if name == "kernel" else []
    if len(readings) == 1:
        return readings[0]
    could = f"can be read as {', '.join(f.roles for f in readings)}" if readings else "has no known factorization"
    raise TargetError(could)


def _kernel_readings(path: str, shapes: Mapping[str, Shape]) -> list[Factorization]:
    """The readings of a kernel of three or more axes that its surroundings leave."""
    shape = shapes[path]
    module = path.rpartition("/")[0]
    bias = shapes.get(f"{module}/bias" if module else "bias")
    ndim = len(shape)
    readings = [canonical(n, ins, ndim - n - ins) for n in range(ndim - 1) for ins in range(1, ndim - n)]
    if bias is not None:
        readings = [f for f in readings if f.sizes(shape, "b") + f.sizes(shape, "o") == bias]
    named = _by_automatic_name(module, shapes)
    if named is not None:
        readings = [f for f in readings if named(f)]
    beside = _by_attention(module, shapes)
    if beside is not None and len(readings) > 1:
        readings = [f for f in readings if beside(f)]
    return readings


def _by_automatic_name(module: str, shapes: Mapping[str, Shape]) -> Test | None:
    name = _AUTOMATIC.fullmatch(module.rsplit("/", 1)[-1])
    if name is None:
        return None
    batch = _stack_axes(module, shapes)
    tests: dict[str, Test] = {
        "Dense": lambda f: f.roles.count("i") == f.roles.count("o") == 1,
        "Conv": lambda f: f.roles.count("b") == batch and f.roles.count("o") == 1,
    }
    return tests[name[1]]


def _stack_axes(module: str, shapes: Mapping[str, Shape]) -> int:
    """How many axes of a stack the vectors of a module, or of a norm beside it, show."""
    parent = module.rpartition("/")[0]
    beside = re.compile((re.escape(parent) + "/" if parent else "") + "[^/]+/scale")
    vectors = [shapes.get(f"{module}/bias"), *(shape for path, shape in shapes.items() if beside.fullmatch(path))]
    return next((len(shape) - 1 for shape in vectors if shape is not None), 0)


def _by_attention(module: str, shapes: Mapping[str, Shape]) -> Test | None:
    parent, _, name = module.rpartition("/")
    prefix = f"{parent}/" if parent else ""
    kernels = [shapes.get(f"{prefix}{part}/kernel", ()) for part in _ATTENTION]
    if name not in _ATTENTION or any(len(kernel) < 3 for kernel in kernels):
        return None
    *inputs, output = kernels
    if any(kernel[-2:] != output[-3:-1] for kernel in inputs):
        return None
    ins, outs = (2, 1) if name == "out" else (1, 2)
    return lambda f: (f.roles.count("i"), f.roles.count("o")) == (ins, outs)
