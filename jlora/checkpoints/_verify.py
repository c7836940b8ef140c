"""`verify`: whether adapters are for a base model, whole, and such that an inference engine takes them."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.checkpoints._forms import form_of, read_entries, shapes_of
from jlora.checkpoints._locate import Located, locate
from jlora.checkpoints._memory import settings_of
from jlora.checkpoints._single_experts import Entries
from jlora.checkpoints._tied import ties_of, weight_shapes
from jlora.checkpoints._updates import changes_of
from jlora.checkpoints._verification import Check, Kind, Verification
from jlora.config import LoraConfig
from jlora.disk import Checkpoint, Pair, dump_json, parse_json, read_json, write_whole
from jlora.errors import DataError, JloraError
from jlora.interop.engines import ENGINES, Handed, Verdict, verdict
from jlora.interop.peft import Mapping as Rows
from jlora.interop.peft import Targeted, differences, kept_of, manifest_of
from jlora.interop.transformers import facts_of, is_known, names_in_memory
from jlora.paths import literal_pattern

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_ALL = (None, "all-linear")


def verify(
    base: str | Path,
    adapters: str | Path,
    *,
    mapping: Rows = (),
    transposed_experts: bool | None = None,
    manifest: str | Path | None = None,
) -> Verification:
    """Whether adapters are for a base model, by the files of both; no product is computed.

    It asks whether the adapters' files can be read as what they are (names, ranks), whether every tensor has a weight
    in the base, found as `merge` finds it, and every weight that the configuration targets an adapter; whether the
    shapes fit, the numbers are finite, and none of A and B is all zero, so that nothing changes. PEFT's files have to
    name the weights as the model of a known base does, as what serves them finds them by no other name. Whether PEFT,
    vLLM and SGLang load the adapters as what they are is told by the rules of `jlora.interop.engines`.

    Args:
      base: a folder of safetensors in the layout of Hugging Face, or one file.
      adapters: a folder of adapters, PEFT's, jlora's or mlx-lm's, or a LoRA file of a diffusion model.
      mapping, transposed_experts: as for `merge`.
      manifest: a file that `write_manifest` wrote where PEFT's tensors came from: they have to be the same.

    Raises:
      DataError: a base, adapters or a manifest that are not there, or are no such files.

    Example:
      >>> import tempfile
      >>> from jlora.disk import file_written_whole, write_tensors
      >>> from jlora.interop.peft import write_peft
      >>> folder = Path(tempfile.mkdtemp())
      >>> with file_written_whole(folder / "model.safetensors") as file:
      ...     write_tensors(file, {"up.weight": np.ones((5, 7), np.float32)})
      >>> entry = {"A": np.ones((7, 2), np.float32), "B": np.zeros((2, 5), np.float32)}
      >>> write_peft(folder / "adapter", {"up.weight": entry}, LoraConfig(rank=2, factorizations={"**": "oi"}))
      >>> found = verify(folder, folder / "adapter")
      >>> found.is_right, [check.problems for check in found.checks if check.problems]
      (False, [('up.weight: B is all zero, so that the weight stays as it is',)])
    """
    checkpoint = Checkpoint(base)
    handed, arrived = None, []
    if form_of(adapters) == "peft":
        handed = _handed(adapters, checkpoint)
        arrived = [] if manifest is None else [_as_sent(manifest, adapters)]
    elif manifest is not None:
        raise DataError(f"{adapters}: a manifest is of PEFT's format: jlora convert --to peft writes it")
    elif not Path(adapters).exists():
        raise DataError(f"{adapters}: no such file or folder")
    try:
        entries, config = read_entries(adapters, lazy=True, shapes=shapes_of(checkpoint))
    except DataError as error:
        checks = (Check("names", "cannot be read as adapters", (_without(adapters, error),)), *arrived)
        return Verification(checks, (), _verdicts(handed, {}))
    located = locate(entries, checkpoint, mapping, transposed_experts)
    shapes = weight_shapes(checkpoint, ties_of(checkpoint))
    lacking = _lacking(located, shapes, handed)
    elsewhere = _elsewhere(located, settings_of(checkpoint))
    under_others = [f"{name}: is {wanted} in the base: found by its end alone" for name, wanted in elsewhere.items()]
    misplaced = [*located.problems, *([] if handed is None or mapping else under_others)]
    checks = (
        Check("names", f"{len(entries):,} adapters, format {form_of(adapters)}"),
        Check("weights", f"{sum(path in located.pieces for path in entries):,} have one", tuple(misplaced)),
        Check("targets", f"{len(lacking):,} without an adapter", tuple(lacking.values())),
        _shapes_fit(entries, config, located, checkpoint, mapping, transposed_experts),
        _numbers(entries),
        *arrived,
    )
    return Verification(checks, _kinds(entries, located, shapes, lacking), _verdicts(handed, elsewhere))


def write_manifest(adapters: str | Path, file: str | Path) -> None:
    """Writes a hash of each tensor of a folder in PEFT's format, for `verify` where they arrive.

    Raises:
      DataError: no such folder, or a file that cannot be written.
    """
    if form_of(adapters) != "peft":
        raise DataError(f"{adapters}: a manifest is of PEFT's format: jlora convert --to peft writes it")
    write_whole(file, dump_json(_manifest(adapters)))


def _manifest(adapters: str | Path) -> dict[str, Any]:
    with Pair(adapters).opened() as (text, file):
        return manifest_of({name: file.lazy(name) for name in file.entries}, _parsed(adapters, text))


def _as_sent(manifest: str | Path, adapters: str | Path) -> Check:
    told = read_json(manifest)
    try:
        with Pair(adapters).opened() as (text, file):
            tensors = {name: file.lazy(name) for name in file.entries}
            problems = differences(told, tensors, _parsed(adapters, text))
    except DataError as error:
        raise DataError(f"{manifest}: {error}") from None
    return Check("manifest", f"{len(tensors):,} tensors arrived", tuple(problems))


def _handed(adapters: str | Path, checkpoint: Checkpoint) -> Handed:
    """What an engine would be given, by the headers of the files."""
    with Pair(adapters).opened() as (text, file):
        shapes, data = {name: entry.shape for name, entry in file.entries.items()}, _parsed(adapters, text)
    settings = settings_of(checkpoint)
    text_settings = settings.get("text_config")
    vocabulary = {**settings, **(text_settings if isinstance(text_settings, Mapping) else {})}.get("vocab_size")
    classes = settings.get("architectures")
    return Handed(
        shapes,
        data,
        str(classes[0]) if isinstance(classes, list) and classes else "",
        vocabulary if isinstance(vocabulary, int) else None,
        files=[path.name for path in Path(adapters).iterdir()],
    )


def _parsed(adapters: str | Path, text: bytes) -> dict[str, Any]:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{adapters}: the configuration is not valid JSON: {error}") from None


def _verdicts(handed: Handed | None, elsewhere: Mapping[str, str]) -> tuple[Verdict, ...]:
    if handed is None:
        return ()
    handed = dataclasses.replace(handed, elsewhere=elsewhere)
    return tuple(verdict(engine, handed) for engine in ENGINES.values())


def _elsewhere(located: Located, settings: Mapping[str, Any]) -> dict[str, str]:
    """The weights of a known model that were found under other names than those that they have in memory."""
    found: dict[str, str] = {}
    if not is_known(settings):
        return found
    for path, pieces in located.pieces.items():
        name, tensor = path.replace("/", "."), pieces[0].tensor
        if pieces[0].slot is None and name not in (tensor, *names_in_memory(settings, tensor)):
            found[name] = tensor
    return found


def _lacking(located: Located, shapes: Mapping[str, tuple[int, ...]], handed: Handed | None) -> dict[str, str]:
    """Problem by tensor, of those that have no adapter though the configuration names their modules.

    A configuration that names none, as of other formats than PEFT's or by "all-linear", means those that are called as
    one that has an adapter, but for the numbers of layers.
    """
    adapted = {piece.tensor for pieces in located.pieces.values() for piece in pieces}
    kinds = {_kind_of(tensor) for tensor in adapted}
    targeted = None
    if handed is not None and handed.data.get("target_modules") not in _ALL:
        targeted = Targeted(handed.data)
    strip, add = _prefixes(located)
    found = {}
    for tensor, shape in shapes.items():
        if tensor in adapted or len(shape) < 2 or not tensor.endswith(".weight"):
            continue
        if targeted is None:
            is_wanted = _kind_of(tensor) in kinds
        else:
            module = tensor.replace("/", ".").removesuffix(".weight")
            is_wanted = not targeted.why_not(add + module.removeprefix(strip))
        if is_wanted:
            found[tensor] = f"{tensor}: the adapters are said to change it, and do not"
    return found


def _prefixes(located: Located) -> tuple[str, str]:
    """What names of the base begin with, and what those of the adapters have in its place."""
    for path, pieces in located.pieces.items():
        name, tensor = path.replace("/", "."), pieces[0].tensor
        if name.endswith(tensor):
            return "", name.removesuffix(tensor)
        if tensor.endswith(name):
            return tensor.removesuffix(name), ""
    return "", ""


def _shapes_fit(
    entries: Entries,
    config: LoraConfig,
    located: Located,
    checkpoint: Checkpoint,
    mapping: Rows,
    transposed_experts: bool | None,
) -> Check:
    """Whether A and B make what can be added to the weights, of those entries that have one."""
    found = {path: parts for path, parts in entries.items() if path in located.pieces and path not in located.quantized}
    packed = f", {len(located.quantized):,} are packed, and were not compared" if located.quantized else ""
    if not found:
        return Check("shapes", f"there is nothing to compare{packed}", asked=False)
    turned = _turned(found, config, located, checkpoint)
    others = {literal_pattern(path) for path in entries if path not in found}
    try:
        changes_of(found, _without_patterns(config, others), 1.0, checkpoint, mapping, transposed_experts)
    except JloraError as error:
        return Check("shapes", f"of {len(found):,}{packed}", (str(error), *turned))
    return Check("shapes", f"{len(found) - len(turned):,} fit{packed}", tuple(turned))


def _turned(entries: Entries, config: LoraConfig, located: Located, checkpoint: Checkpoint) -> list[str]:
    """Updates that fit the transpose of their weight alone, which `merge` adds and a model that is loaded does not."""
    settings, kinds = settings_of(checkpoint), kept_of(config).kinds
    if not is_known(settings):
        return []
    conv1d, problems = facts_of(settings).conv1d, []
    for path, shape in located.shapes(weight_shapes(checkpoint, ties_of(checkpoint))).items():
        name = path.replace("/", ".")
        if "A" not in entries[path] or kinds.get(name, "linear") not in ("linear", "conv1d"):
            continue
        update = (entries[path]["B"].shape[-1], entries[path]["A"].shape[0])
        is_turned = name.split(".")[-2:-1] in [[last] for last in conv1d]
        if len(shape) == 2 and update != (wanted := shape[::-1] if is_turned else shape) and update[::-1] == wanted:
            problems.append(
                f"{path}: A and B make an update of (out, in) = {update}, the weight is {wanted}: transposed"
            )
    return problems


def _without_patterns(config: LoraConfig, left_out: set[str]) -> LoraConfig:
    """A configuration that does not speak of some paths by their names."""
    fields = {
        name: {pattern: value for pattern, value in getattr(config, name) if pattern not in left_out}
        for name in ("rank_pattern", "alpha_pattern", "factorizations")
    }
    targets = tuple(pattern for pattern in config.target_modules if pattern not in left_out)
    return config.replace(target_modules=targets, **fields)


def _numbers(entries: Entries) -> Check:
    """Whether the numbers are finite, and no update is zero."""
    problems = []
    for path, parts in entries.items():
        for name, part in parts.items():
            array = np.asarray(part)
            if not np.isfinite(array.astype(np.float32, copy=False)).all():
                problems.append(f"{path}: {name} holds numbers that are not finite")
            elif name in ("A", "B") and not array.any():
                problems.append(f"{path}: {name} is all zero, so that the weight stays as it is")
    found = f"{len(problems):,} that change nothing" if problems else "all finite, none of A and B zero"
    return Check("numbers", found, tuple(problems))


def _kinds(
    entries: Entries, located: Located, shapes: Mapping[str, tuple[int, ...]], lacking: Iterable[str]
) -> tuple[Kind, ...]:
    adapted: dict[str, list[tuple[str, str]]] = {}
    for path, pieces in located.pieces.items():
        for tensor in {piece.tensor for piece in pieces}:
            adapted.setdefault(_kind_of(tensor), []).append((path, tensor))
    missing: dict[str, int] = {}
    for tensor in lacking:
        missing[_kind_of(tensor)] = missing.get(_kind_of(tensor), 0) + 1
    kinds = []
    for name in [*adapted, *(name for name in missing if name not in adapted)]:
        own = adapted.get(name, [])
        tensors = {tensor for _, tensor in own}
        ranks = {entries[path]["A"].shape[-1] for path, _ in own if "A" in entries[path]}
        found = {shapes[tensor] for tensor in tensors}
        shape = found.pop() if len(found) == 1 else ()
        kinds.append(Kind(name, len(tensors), len(tensors) + missing.get(name, 0), shape, tuple(sorted(ranks))))
    return tuple(kinds)


def _kind_of(tensor: str) -> str:
    return _NUMBER.sub("*", tensor.replace("/", "."))


def _without(adapters: str | Path, error: Exception) -> str:
    """An error without the folder that it names first."""
    return str(error).removeprefix(f"{adapters}: ")
