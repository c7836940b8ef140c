"""The registry: which rule a primitive has that a weight is followed through. Those of JAX are known by name here.

`name_of_primitive` sees to it that no other library's has a name of JAX's. What is registered is known by the object.
"""

import threading
from collections.abc import Mapping

from jax.extend.core import Primitive

from jlora.errors import ConfigError
from jlora.transform import _combine as combine
from jlora.transform import _control as control
from jlora.transform import _products as products
from jlora.transform import _rules as rules
from jlora.transform import _sharded as sharded
from jlora.transform import _structure as structure
from jlora.transform._run import Registry, Rule

RULES: Mapping[str, Rule] = {
    "add": rules.joins(combine.add),
    "add_any": rules.joins(combine.add),
    "all_gather": rules.moves(sharded.all_gather),
    "all_to_all": rules.moves(sharded.all_to_all),
    "broadcast_in_dim": rules.moves(structure.broadcast_in_dim),
    "concatenate": rules.joins(combine.concatenate),
    "convert_element_type": rules.moves(structure.convert_element_type),
    "copy": rules.moves(structure.same),
    "div": rules.moves(structure.div),
    "dynamic_slice": rules.moves(structure.dynamic_slice),
    "mul": rules.moves(structure.mul, either_side=True),
    "name": rules.each,
    "neg": rules.moves(structure.neg),
    "pad": rules.moves(structure.pad),
    "ppermute": rules.moves(sharded.ppermute),
    "pvary": rules.moves(structure.same),
    "reduce_precision": rules.each,
    "reshape": rules.moves(structure.reshape),
    "mesh_cast": rules.places,  # of auto_axes, before JAX 0.8
    "reshard": rules.places,
    "rev": rules.moves(structure.rev),
    "scatter-add": rules.joins(combine.scatter_add, besides=(1,)),
    "scatter-sub": rules.joins(combine.scatter_add, besides=(1,)),
    "select_n": rules.joins(combine.select_n, besides=(0,)),
    "sharding_constraint": rules.moves(structure.same),
    "slice": rules.moves(structure.slice_),
    "split": rules.moves(structure.split, several=True),
    "squeeze": rules.moves(structure.squeeze),
    "stack": rules.joins(combine.stack),
    "stop_gradient": rules.moves(structure.stop_gradient),
    "sub": rules.joins(combine.sub),
    "tile": rules.moves(structure.tile),
    "transpose": rules.moves(structure.transpose),
    "unstack": rules.moves(structure.unstack, several=True),
    "conv_general_dilated": rules.multiplies(products.conv_general_dilated),
    "dot_general": rules.multiplies(products.dot_general),
    "gather": rules.looks_up,
    "ragged_dot_general": rules.multiplies(products.ragged_dot_general),
    "cond": control.cond,
    "custom_jvp_call": control.custom_derivative,
    "custom_vjp_call": control.custom_derivative,
    "device_put": control.side_by_side,
    "jit": control.jit,
    "optimization_barrier": control.side_by_side,
    "remat2": control.checkpoint,
    "scan": control.scan,
    "shard_map": control.shard_map,
    "while": control.while_,
}

_LOCK = threading.Lock()
_at_hand = Registry(RULES, {})


def registry() -> Registry:
    """The rules at hand: the same object until another one is registered."""
    return _at_hand


def add_rule(primitive: Primitive, rule: Rule, *, replace: bool) -> None:
    """Registers a rule; a ConfigError for a primitive that has one already, unless it may be replaced."""
    global _at_hand
    with _LOCK:
        if not replace and _at_hand.rule_of(primitive) is not None:
            raise ConfigError(
                f"register: {primitive.name} has a rule already; register(primitive, rule, replace=True) replaces it"
            )
        _at_hand = Registry(RULES, {**_at_hand.registered, primitive: rule})
