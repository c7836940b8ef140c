"""The table of how each adapted weight is used and computed."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora import tree
from jlora.adapter import is_entry
from jlora.config import LoraConfig
from jlora.cost import CostModel
from jlora.lazy import is_lazy
from jlora.paths import leaves_by_path
from jlora.tables import html_table, text_table
from jlora.transform._keywords import name_of
from jlora.transform._lazy import is_packed
from jlora.transform._lora import adapted_weights, tell_of_unread
from jlora.transform._program import Program
from jlora.transform._registry import registry
from jlora.transform._run import Run, Settings, Unpacked, Use
from jlora.transform._uses import check_handed_on, resolve
from jlora.tree import LeftOut, bind, left_out_html, left_out_text

_COLUMNS = ("path", "shape", "used by", "at", "axes", "computed", "FLOPs", "+ adapter", "bytes", "+ adapter")
_UNPACKED = ("dense from here on", "shape", "for", "at", "because")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a function uses its adapted weights; `str` is a table for a terminal, a notebook shows it as HTML.

    Attributes:
      config: the configuration, with every factorization written out.
      uses: of every target, in the order of the program; targets that the function does not use have none.
      base_bytes: path -> the bytes of the weight; of a lazy base, of what it packs.
      adapter_bytes: path -> the bytes of A and B.
      left_out: the weights that a pattern spans and that are not adapted, each with the reason.
      unpacked: where a lazy base, adapted or not, becomes a dense array that the program keeps. Elsewhere it is dense
        only while it is used.
    """

    config: LoraConfig
    uses: tuple[Use, ...]
    base_bytes: dict[str, int]
    adapter_bytes: dict[str, int]
    left_out: tuple[LeftOut, ...] = ()
    unpacked: tuple[Unpacked, ...] = ()

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, a last row for the sum."""
        rows: list[tuple[str, ...]] = []
        for path in self.base_bytes:
            sizes = _binary(self.base_bytes[path]), _binary(self.adapter_bytes[path])
            uses = [use for use in self.uses if use.path == path]
            if not uses:
                rows.append((path, "", "nothing", "", "", "", "", "", *sizes))
            for number, use in enumerate(uses):
                rows.append((*(self._cells(use)), *(sizes if number == 0 else ("", ""))))
        flops = (_decimal(sum(getattr(use, name) for use in self.uses)) for name in ("base_flops", "adapter_flops"))
        total = (_binary(sum(sizes.values())) for sizes in (self.base_bytes, self.adapter_bytes))
        weights = f"{len(self.base_bytes)} weight{'' if len(self.base_bytes) == 1 else 's'}"
        return [*rows, (weights, "", "", "", "", "", *flops, *total)]

    @staticmethod
    def _cells(use: Use) -> tuple[str, ...]:
        form = "factored" if use.factored else "merged"
        return (
            use.path,
            "x".join(map(str, use.shape)),
            use.primitive if use.times == 1 else f"{use.times} {use.primitive}",
            use.place,
            use.roles,
            f"{form}: {use.why}" if use.why else form,
            _decimal(use.base_flops),
            _decimal(use.adapter_flops),
        )

    def __str__(self) -> str:
        *rows, total = self.rows()
        uses = text_table(_COLUMNS, rows, total, left=_COLUMNS.index("FLOPs"))
        unpacked = text_table(_UNPACKED, self._unpacked_rows(), left=len(_UNPACKED))
        return uses + left_out_text(self.left_out) + (f"\n\n{unpacked}" if self.unpacked else "")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        *rows, total = self.rows()
        above = left_out_html(html_table(_COLUMNS, rows, total), self.left_out)
        return f"<div>{above}{html_table(_UNPACKED, self._unpacked_rows())}</div>" if self.unpacked else above

    def _unpacked_rows(self) -> list[tuple[str, ...]]:
        return [(one.path, "x".join(map(str, one.shape)), one.primitive, one.place, one.why) for one in self.unpacked]


def explain(
    fn: Callable[..., Any],
    config: LoraConfig,
    params: Any,
    /,
    *args: Any,
    cost_model: CostModel | None = None,
    entries: Any = None,
    **kwargs: Any,
) -> Explanation:
    """How `lora(fn, config)` computes each use of each adapted weight: a table, from shapes alone.

    Every row is a use: the weight's shape there, the primitive and the source line, one letter for each axis (b batch,
    i in, o out), factored or merged and why, and the FLOPs and bytes of the base and of the adapter. FLOPs are those of
    one call, forward; in a scan of all its steps, in a while loop of one. With config.dropout > 0 the call has a
    dropout key. Below stand the weights that a pattern spans and that are left out, with the reasons, and the places
    where a lazy base becomes a dense array that the program keeps.

    Args:
      fn: a function whose first argument is params.
      config: what is adapted and how.
      params: arrays or `jax.ShapeDtypeStruct`; nothing is computed, so that a model may be larger than memory.
      *args: of `fn`, arrays or shapes.
      cost_model: as in `lora`.
      entries: the adapters, arrays or shapes, where they hold more than A and B, as those of DoRA.
      **kwargs: of `fn`.

    Raises:
      TargetError: the configuration does not fit the params, or the adapters do not.
      ConfigError: `fn` has an argument `cost_model` or `entries`, which is not given by position.

    >>> shape = jax.ShapeDtypeStruct
    >>> params = {'up': shape((3, 5), 'float32')}
    >>> table = explain(lambda p, x: x @ p['up'], LoraConfig(rank=2), params, shape((2, 3), 'float32'))
    >>> [(use.path, use.primitive, use.roles, use.factored) for use in table.uses]
    [('up', 'dot_general', 'io', True)]
    """
    check_handed_on("jlora.explain", fn, ["cost_model", "entries"], args)
    resolved, left_out = resolve(fn, config, params, args, kwargs)
    adapters = entries
    if adapters is None:
        adapters = tree.adapter_shapes(params, resolved)
    settings = Settings(registry(), cost_model or CostModel(), dropout=config.dropout)
    uses, unpacked = adapted_uses(fn, resolved, params, adapters, args, kwargs, settings)
    shapes = leaves_by_path(params)
    found = leaves_by_path(adapters, is_leaf=is_entry)
    return Explanation(
        resolved,
        tuple(uses),
        {path: sum(map(_bytes, jax.tree.leaves(shapes[path]))) for path in found},
        {path: sum(map(_bytes, entry.values())) for path, entry in found.items()},
        left_out,
        tuple(dict.fromkeys(unpacked)),
    )


def adapted_uses(
    fn: Callable[..., Any], config: LoraConfig, params: Any, adapters: Any, args: Any, kwargs: Any, settings: Settings
) -> tuple[list[Use], list[Unpacked]]:
    """The uses of every adapted weight by `lora(fn, config)`, with a dropout key where there is dropout.

    Beside them stands where lazy bases become dense.
    """
    program = Program(fn, params, args, kwargs)
    if settings.strict:
        tell_of_unread(name_of(fn), program, leaves_by_path(adapters, is_leaf=is_entry), strict=True)
    uses: list[Use] = []
    unpacked: list[Unpacked] = []
    run = Run(settings, jax.random.key(0) if settings.dropout else None, uses=uses, unpacked=unpacked)

    def evaluated(arrays: Any, adapters: Any) -> Any:
        by_path = {path: array for path, array in zip(program.paths, arrays, strict=True) if path is not None}
        weights = adapted_weights(by_path, bind(by_path, leaves_by_path(adapters, is_leaf=is_entry), config))
        for path, weight in weights.items():
            if is_lazy(by_path[path]) and not is_packed(weight.value):
                why = "its entry has a value or an offset"
                unpacked.append(Unpacked(path, tuple(by_path[path].shape), "", "", why))
        return program.evaluate(run, weights, arrays)

    jax.eval_shape(evaluated, program.leaves, adapters)
    return uses, unpacked


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


def _decimal(number: float) -> str:
    return _scaled(number, 1000, ("", " k", " M", " G", " T", " P"))


def _binary(number: float) -> str:
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(number: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while number >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    return f"{number:.3g}{units[power]}" if number < 1000 else f"{number:.0f}{units[power]}"
