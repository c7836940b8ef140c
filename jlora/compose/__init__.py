"""The algebra of adapters in memory: resized, combined, and extracted from a base and its fine-tuned copy.

All of it is NumPy on the host, factors in float64, whatever JAX is set to; each result is rounded once.
It is an array of JAX where it was made of one, and JAX does not narrow its dtype; of NumPy's it is one of NumPy.
"""

from typing import TYPE_CHECKING

from jlora.compose._rules import MAGNITUDES, METHODS, VALUES
from jlora.faces import lazy_face

if TYPE_CHECKING:
    from jlora.compose._combine import combine
    from jlora.compose._extract import extract, extract_weight
    from jlora.compose._report import Extracted, Extraction
    from jlora.compose._resize import resize
    from jlora.compose._svd import leading_triples

__all__ = [
    "MAGNITUDES",
    "METHODS",
    "VALUES",
    "Extracted",
    "Extraction",
    "combine",
    "extract",
    "extract_weight",
    "leading_triples",
    "resize",
]

# The help of the commands names these, and needs no NumPy.
__getattr__, __dir__ = lazy_face(
    __name__,
    {
        "jlora.compose._combine": ("combine",),
        "jlora.compose._extract": ("extract", "extract_weight"),
        "jlora.compose._report": ("Extracted", "Extraction"),
        "jlora.compose._resize": ("resize",),
        "jlora.compose._svd": ("leading_triples",),
    },
)
