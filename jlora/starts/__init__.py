"""Starts of A and B that look at the weights: PiSSA, OLoRA, MiCA, orthogonal factors, or one of your own.

params, adapters, config = started = jlora.start(key, params, config)    # config.init = "pissa", "olora", ...
model = jlora.lora(apply, config)                                        # is unchanged to rounding
...                                                                      # train the adapters over these params
adapters, config = started.plain(adapters)                               # of the original params, of twice the rank
"""

from jlora.starts._matrices import Begin, MatrixStart
from jlora.starts._start import Started, start

__all__ = ["Begin", "MatrixStart", "Started", "start"]
