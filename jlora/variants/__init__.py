"""Variants that train a smaller tree, of which a pure function makes ordinary adapters: VeRA and LoRA-XS.

Everything else stays as it is: `jlora.lora`, merging, saving, the commands and the files of others take the adapters.

    trained, frozen = variants.init(key, params, config)                # of config.kind, "vera" or "xs"
    model = jlora.lora(apply, config)

    def loss(trained, frozen, params, batch):
        adapters = variants.adapters(trained, frozen, params, config)
        return error(model(params, adapters, batch))

    jlora.merge_params(params, variants.adapters(trained, frozen, params, config), config)
    variants.save("folder", trained, frozen, params, config)            # the small tree; `load` reads it

It is the same in Flax: of a Linen module `apply` is `lambda params, x: module.apply({"params": params}, x)`; of an NNX
model it is `lambda params, x: nnx.merge(graph, params, rest)(x)`, with `graph, params, rest = nnx.split(model,
nnx.Param, ...)`.
"""

from jlora.variants._files import expanded_entries, is_variant_folder, load, load_expanded, save
from jlora.variants._kinds import KINDS, adapters, init

__all__ = [
    "KINDS",
    "adapters",
    "expanded_entries",
    "init",
    "is_variant_folder",
    "load",
    "load_expanded",
    "save",
]
