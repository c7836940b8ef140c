"""`from_gemma` and `from_qwix` under the older name of their module: `jlora.interop.gemma` and `jlora.interop.qwix`."""

from jlora.interop._beside import nest
from jlora.interop.gemma import from_gemma
from jlora.interop.qwix import from_qwix

__all__ = ["from_gemma", "from_qwix", "nest"]
