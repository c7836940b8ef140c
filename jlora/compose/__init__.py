"""The algebra of adapters in memory: resized, combined, and extracted from a base and its fine-tuned copy.

All of it is NumPy on the host, factors in float64, whatever JAX is set to; each result is rounded once.
"""

from jlora.compose._combine import METHODS, combine
from jlora.compose._extract import extract, extract_weight
from jlora.compose._report import Extracted, Extraction
from jlora.compose._resize import resize

__all__ = ["METHODS", "Extracted", "Extraction", "combine", "extract", "extract_weight", "resize"]
