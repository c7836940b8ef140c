"""Adapters on the disk: read, written, resized, combined, converted."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora import compose
from jlora.adapter import is_entry
from jlora.checkpoints._forms import form_of, read_entries, shapes_of
from jlora.checkpoints._params import read_params
from jlora.config import LoraConfig
from jlora.disk import Checkpoint, there_already
from jlora.errors import DataError, JloraWarning
from jlora.fields import choice
from jlora.interop.diffusion import is_flat, lora_file, write_diffusers, write_kohya
from jlora.interop.gguf import gguf_file, write_gguf
from jlora.interop.mlx import write_mlx
from jlora.interop.peft import FLAT, NESTED, is_vera_folder, with_kinds_of, write_peft
from jlora.interop.peft import Mapping as Table
from jlora.paths import leaves_by_path, nest
from jlora.storage import load_on_host, save_adapters

FORMATS = ("own", "peft", "mlx")
_OF_DIFFUSION = ("kohya", "diffusers")
WRITTEN = (*FORMATS, "gguf", *_OF_DIFFUSION)


def read_adapters(
    path: str | Path,
    mapping: Table = NESTED,
    *,
    to: str | None = "peft",
    transposed_experts: bool | None = None,
    base: Checkpoint | None = None,
) -> tuple[Any, LoraConfig, str]:
    """The adapters of a folder or a file, their configuration, and the format to write them in, one of `FORMATS`.

    What is written `to` PEFT again may leave open how square experts lie; other formats say it. None is the format that
    was found. Flattened names are found again among those of the tensors of `base`.
    """
    form = form_of(path)
    if form == "own":
        return *load_on_host(path), form
    entries, config = read_entries(
        path,
        mapping,
        settled_experts=(to or form) != "peft",
        transposed_experts=transposed_experts,
        shapes=None if base is None else shapes_of(base),
    )
    return nest(entries), config, "own" if form in ("file", "variant") else form


def write_adapters(
    out: str | Path, adapters: Any, config: LoraConfig, form: str, *, mapping: Table | None = None, force: bool = False
) -> None:
    """Writes a folder of adapters; one that holds something is replaced with `force` alone."""
    choice("format", form, FORMATS)
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise there_already(folder)
    if form == "own":
        save_adapters(folder, adapters, config)
    else:
        if flat := [path for path in leaves_by_path(adapters, is_leaf=is_entry) if is_flat(path)]:
            raise DataError(
                f"{flat[0]}: {len(flat)} names have underscores for dots, which the format {form} has no place for: "
                "give the base, or a mapping, with which they are renamed"
            )
        write = {"peft": write_peft, "mlx": write_mlx}[form]
        write(folder, adapters, config, _table(adapters) if mapping is None else mapping)


def resize(
    adapters: str | Path,
    out: str | Path,
    rank: int,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    form: str | None = None,
    force: bool = False,
) -> LoraConfig:
    """Adapters of another rank, optimal in the Frobenius norm, written to a folder; see `jlora.compose.resize`.

    Weights that are saved as a whole, biases and the magnitudes of DoRA go into the new folder too.
    """
    tree, config, found = read_adapters(adapters, to=form)
    resized, config = compose.resize(tree, config, rank, rank_pattern=rank_pattern or ())
    write_adapters(out, resized, config, form or found, force=force)
    return config


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    *,
    method: str = "linear",
    form: str | None = None,
    force: bool = False,
    **options: Any,
) -> LoraConfig:
    """Several adapters as one, written to a folder; methods and options of `jlora.compose.combine`.

    Adapters with no weight in common are put together, as PEFT does it, with a warning that names the first paths: they
    may be meant for one model, or named for two.
    """
    read = [read_adapters(path, to=form) for path in adapters]
    _warn_of_disjoint(adapters, [set(leaves_by_path(tree, is_leaf=is_entry)) for tree, _, _ in read])
    combined, config = compose.combine([(tree, config) for tree, config, _ in read], weights, method=method, **options)
    config = with_kinds_of(config, [own for _, own, _ in read])
    write_adapters(out, combined, config, form or read[0][2], force=force)
    return config


def _warn_of_disjoint(adapters: Sequence[str | Path], paths: Sequence[set[str]]) -> None:
    for path, own in zip(adapters, paths, strict=True):
        others = set().union(*(found for found in paths if found is not own))
        if own and others and not own & others:
            text = f"no weight in common with the others: {min(own)}, but {min(others)} there; the result has all"
            warnings.warn(f"{path}: {text}", JloraWarning, stacklevel=3)
            return  # of two, the other one has none in common either


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    mapping: Table | None = None,
    transposed_experts: bool | None = None,
    names: str | None = None,
    alpha: float | None = None,
    base: str | Path | None = None,
    component: str | None = None,
    force: bool = False,
) -> LoraConfig:
    """Adapters in another format, written to a folder.

    Args:
      source: a folder of adapters, jlora's own, PEFT's or mlx-lm's, or a LoRA file of a diffusion model; with `names`,
        a checkpoint of params that hold adapters, safetensors or Orbax's.
      out: the folder to write.
      to: "own", "peft" or "mlx"; "gguf" (`jlora.interop.gguf`), which wants `base`, "kohya" or "diffusers"
        (`jlora.interop.diffusion`), of which `out` may be the file.
      mapping: how the names in the files of PEFT and mlx-lm meet the paths (`jlora.interop.peft`); by default paths are
        the names with slashes for dots.
      transposed_experts: as for `jlora.interop.peft.read_peft`.
      names: "gemma" (`lora/a`, `lora/b` beside a weight), "qwix" (`kernel_lora_a`, `kernel_lora_b` beside a weight),
        "openpi" (`lora_a`, `lora_b` beside `w`) or "maxtext" (`lora_a.kernel`, or `kernel_lora_a` without weights).
      alpha: that qwix, openpi or MaxText was given; it is not in the params. Of openpi by default the rank, of MaxText
        what lies beside them.
      base: the checkpoint that the adapters are for: flattened names of sd-scripts are found among its own, the sizes
        of its weights are those that a VeRA of PEFT's does not say, and its config.json gives GGUF names and the order
        of rows. What is written as "kohya" has to be found there again. With `names`, the weights that are not among
        the params, for their shapes; it may be Orbax's.
      component: of a diffusion model, as for `jlora.interop.diffusion.write_kohya`.
      force: whether to replace `out` where it is there.
    """
    choice("to", to, WRITTEN)
    if component is not None and to not in _OF_DIFFUSION:
        raise DataError(f"component {component!r} is of the formats {' and '.join(_OF_DIFFUSION)}, not of {to}")
    is_file = names is None and form_of(source) == "file"
    if names is None:
        table = NESTED if mapping is None else mapping
        checkpoint = Checkpoint(base) if base and (is_file or is_vera_folder(source)) else None
        adapters, config, _ = read_adapters(
            source, table, to=to, transposed_experts=transposed_experts, base=checkpoint
        )
    else:
        adapters, config = read_params(source, names, alpha, base)
    if is_file:
        mapping = None  # which has renamed what such a file names in its own way
    if to == "gguf":
        _write_gguf(out, adapters, config, mapping, base, force=force)
    elif to in _OF_DIFFUSION:
        _write_lora_file(out, adapters, config, mapping, to, base, component, force=force)
    else:
        write_adapters(out, adapters, config, to, mapping=mapping, force=force)
    return config


def _write_gguf(
    out: str | Path, adapters: Any, config: LoraConfig, mapping: Table | None, base: str | Path | None, *, force: bool
) -> None:
    if base is None:
        raise DataError(
            "gguf has the names and the order of rows that llama.cpp gives a model: give its folder as base (--base)"
        )
    if gguf_file(out).exists() and not force:
        raise there_already(gguf_file(out))
    write_gguf(out, adapters, config, _table(adapters) if mapping is None else mapping, base=base)


def _write_lora_file(
    out: str | Path,
    adapters: Any,
    config: LoraConfig,
    mapping: Table | None,
    to: str,
    base: str | Path | None,
    component: str | None,
    *,
    force: bool,
) -> None:
    if lora_file(out).exists() and not force:
        raise there_already(lora_file(out))
    table = _table(adapters) if mapping is None else mapping
    if to == "diffusers":
        write_diffusers(out, adapters, config, table, component=component)
    else:
        shapes = None if base is None else shapes_of(Checkpoint(base))
        write_kohya(out, adapters, config, table, component=component, shapes=shapes)


def _table(adapters: Any) -> Table:
    """The mapping for paths that are the names, with or without slashes for dots."""
    return NESTED if any("/" in path for path in leaves_by_path(adapters, is_leaf=is_entry)) else FLAT
