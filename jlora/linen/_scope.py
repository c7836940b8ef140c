"""Modules that hold another one and stand in its place."""

from typing import ClassVar

import flax.linen as nn


class InPlace(nn.Module):
    """A module whose scope is that of the module it holds: parameter paths and PRNG keys are those of the held one.

    `nn.share_scope` alone does not do for a module that was given unbound: its own submodules keep the path and the
    keys of a child, and under a lifted transform it keeps a scope of its own.
    """

    held: ClassVar[str]

    @nn.nowrap
    def __post_init__(self) -> None:
        module = getattr(self, self.held)
        if not isinstance(module, nn.Module) or module.parent is not None:
            super().__post_init__()
            return
        object.__setattr__(self, self.held, None)
        super().__post_init__()
        bound = module if self.scope is None else module.clone(parent=self.scope, name=type(module).__name__)
        object.__setattr__(self, self.held, bound)

    def setup(self) -> None:
        module = getattr(self, self.held)
        if module.scope is not self.scope:
            nn.share_scope(self, module)
