"""Adapters of a checkpoint and its fine-tuned copy."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora import compose
from jlora.checkpoints._adapter_files import write_adapters
from jlora.checkpoints._lazy import lazy_tree
from jlora.checkpoints._memory import in_memory, is_converted, kind_in_memory, roles_of, settings_of
from jlora.checkpoints._quantized import problems_of
from jlora.checkpoints._rewrite import Progress
from jlora.checkpoints._wholes import for_peft, tied_in
from jlora.config import LoraConfig
from jlora.disk import NOT_GATHERED, Checkpoint
from jlora.errors import DataError, raise_all
from jlora.interop.peft import of_model
from jlora.interop.transformers import Facts, facts_of, task_of
from jlora.paths import PatternIndex, literal_pattern, nest
from jlora.tree import find_targets, is_targeted

_UNFIT = "PEFT cannot adapt it, or nobody knows its axes"
_CONVERTED = "other numbers in memory, in a way that is not known here"
_REFUSING = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
# Kernels of these models take the weights without their modules: PEFT refuses two, and one adapter would do nothing.
_REFUSED = ("/conv1d/weight", "/out_proj/weight", "/dt_proj/weight")
_SAVES_THE_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int = 16,
    energy: float | None = None,
    target_modules: str | Sequence[str] = "**",
    exclude_modules: str | Sequence[str] = (),
    factorizations: Mapping[str, str] | None = None,
    form: str = "own",
    seed: int = 0,
    whole: bool = True,
    force: bool = False,
    on_progress: Progress | None = None,
) -> compose.Extraction:
    """The best adapters of the difference of two checkpoints, written to a folder; see `jlora.compose.extract`.

    One weight at a time is in memory. Paths are the tensors' names with slashes for dots. For the format "peft" they
    are the names that transformers gives them in memory, as config.json says, and so are the axes: experts that the
    disk has one by one are one array, and a head that is tied to the embedding has an adapter of its own beside it.
    What changed and has no adapter (norms, biases, buffers, tokens, an embedding with more rows) is carried whole, for
    PEFT in `modules_to_save`, as a bias, or as a tensor of the base. A model whose vocabulary grew takes it after
    `resize_token_embeddings`.

    Args:
      base, tuned: checkpoints with the same tensors, but for those that are left out; the base's folder or name is
        written down for PEFT.
      out: the folder to write.
      rank: of each adapter, at most; less where a weight has a smaller side.
      energy: where given, each weight has the smallest rank that keeps this share of its squared Frobenius norm.
      target_modules, exclude_modules: patterns on the paths; the weights that changed.
      factorizations: pattern -> letters, over what names and shapes say: "oi" for a `weight` of two axes, "io" for an
        embedding, "oi..." for a convolution, "boi" for experts in one array.
      form: "own", "peft" or "mlx", which has nothing whole.
      seed: of the random sketches.
      whole: whether to carry whole what has no adapter.
      force: whether to replace `out` where it is there.
      on_progress: called with (bytes read, bytes in all).

    Returns:
      The table of what is kept of each weight, what is carried whole, and what is left out and why.

    Raises:
      DataError, TargetError, AdapterError: checkpoints that cannot be read or do not fit each other, nothing changed.
    """
    checkpoints = Checkpoint(base), Checkpoint(tuned)
    total = 2 * sum(entry.stop - entry.start for found in checkpoints for entry in found.entries.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        if on_progress is not None:
            on_progress(done, total)

    settings = [settings_of(found) for found in checkpoints]
    facts = facts_of(settings[0])
    before, after = (lazy_tree(found, advance) for found in checkpoints)
    if form == "peft":
        before, after = in_memory(before, facts), in_memory(after, facts_of(settings[1]))
    given = dict(factorizations or {})
    raise_all(_without_numbers(before, after), DataError, "no adapter can be extracted")
    named = LoraConfig(target_modules=_listed(target_modules), exclude_modules=_listed(exclude_modules))
    converted = {path for path in before if form == "peft" and is_converted(path.replace("/", "."), facts)}
    carried = [path for path in before if path in after and is_targeted(named, path) and path not in converted]
    refused = _REFUSED if settings[0].get("model_type") in _REFUSING else ()
    unfit = _not_for_peft(before, facts, PatternIndex(given.items()), refused) if form == "peft" else ()
    reasons = {**dict.fromkeys(unfit, _UNFIT), **dict.fromkeys(converted, _CONVERTED)}
    tied = dict(tied_in(before, after, facts, named)) if form == "peft" else {}
    carried = [path for path in carried if path not in tied]
    excluded = (*named.exclude_modules, *map(literal_pattern, (*reasons, *tied)))
    config = named.replace(rank=rank, alpha=rank, exclude_modules=excluded)
    config = _with_factorizations(config, before, given, facts)
    wholes = tuple(map(literal_pattern, carried)) if whole and form != "mlx" else ()
    adapters, config, report = compose.extract(before, after, config, energy=energy, seed=seed, whole=wholes)
    entries = {path: entry for path, entry in adapters.items() if entry is not None}
    raise_all(_quantized(checkpoints, entries, facts), DataError, "no adapter can be extracted")
    if form == "peft":
        entries, of_base = for_peft(entries, after, set(tied.values()))
        entries, config = _with_tied(entries, config, tied, before, facts)
        config = _for_peft(config, entries, of_base, checkpoints[0], settings[0], facts)
    write_adapters(out, nest(entries), config, form, force=force)
    return _told(report, before, tied, reasons, named)


def _told(
    report: compose.Extraction,
    tree: Mapping[str, Any],
    tied: Mapping[str, str],
    reasons: Mapping[str, str],
    named: LoraConfig,
) -> compose.Extraction:
    """The report, with the reasons that are known here, and each weight that is another beside this."""
    weights = []
    for weight in report.weights:
        weights += [weight, *(dataclasses.replace(weight, path=path) for path, of in tied.items() if of == weight.path)]
    why = {
        path: reasons.get(path, reason) if is_targeted(named, path) else reason
        for path, reason in report.why.items()
        if path not in tied
    }
    whole = tuple(path for path in tree if tied.get(path, path) in report.whole)
    left_out = tuple(path for path in report.left_out if path in why)
    return dataclasses.replace(report, weights=tuple(weights), whole=whole, left_out=left_out, why=why)


def _with_tied(
    entries: Mapping[str, Any], config: LoraConfig, tied: Mapping[str, str], tree: Mapping[str, Any], facts: Facts
) -> tuple[dict[str, Any], LoraConfig]:
    """Also the adapter of each weight that is another one, which is that other's, and the configuration for all."""
    found, targets = dict(entries), list(config.target_modules)
    ranks: dict[str, Any] = {}
    roles: dict[str, Any] = {}
    for path, source in tied.items():
        entry = entries.get(source, {})
        if "A" not in entry:
            continue
        own, of = (roles_of(each, tree[source].ndim, facts) or "" for each in (path, source))
        found[path] = entry if own == of else {"A": entry["B"].T, "B": entry["A"].T}
        targets.append(literal_pattern(path))
        roles[literal_pattern(path)] = own
        if config.rank_of(source) != config.rank:
            ranks[literal_pattern(path)] = config.rank_of(source)
    more = {"rank_pattern": ranks, "alpha_pattern": ranks, "factorizations": roles}
    fields: dict[str, Any] = {name: {**dict(getattr(config, name)), **own} for name, own in more.items()}
    return found, config.replace(target_modules=targets, **fields)


def _quantized(checkpoints: Sequence[Checkpoint], entries: Mapping[str, Any], facts: Facts) -> Iterator[str]:
    """What stands against the difference of weights that are in other units than the model's."""
    for checkpoint in checkpoints:
        names = {}
        for name in checkpoint.entries:
            paths = (name.replace(".", "/"), facts.in_memory(name).replace(".", "/"))
            entry = next((entries[path] for path in paths if path in entries), None)
            if entry is not None:
                names[name] = checkpoint.entries[name].dtype if "value" in entry else None
        yield from (f"{checkpoint.path}: {problem}" for problem in problems_of(checkpoint, names))


def _not_for_peft(
    tree: Mapping[str, Any], facts: Facts, given: PatternIndex, refused: tuple[str, ...]
) -> Iterator[str]:
    """The paths of tensors that PEFT cannot adapt, or of which nobody knows the axes."""
    for path, leaf in tree.items():
        if path.endswith(refused):
            yield path
        elif leaf.ndim > 1 and not given.matches(path):
            is_open = roles_of(path, leaf.ndim, facts) is None
            if is_open or _holds_others(path, tree) or _is_no_plain_convolution(path, leaf.shape):
                yield path


def _is_no_plain_convolution(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a convolution is none in PEFT's hands.

    One of a channel of its own for each output is grouped, and A would have another shape. The convolutions before an
    audio encoder are asked for their stride (Whisper, Voxtral, Qwen2-Audio), which PEFT's layer does not say.
    """
    is_grouped = len(shape) > 2 and path.endswith("/weight") and shape[1] == 1 < shape[0]
    return is_grouped or (len(shape) == 3 and path.endswith(("/conv1/weight", "/conv2/weight")))


def _holds_others(path: str, tree: Mapping[str, Any]) -> bool:
    """Whether a matrix by its own name is in a module that holds others, whose names PEFT changes as it wraps it."""
    module, _, name = path.rpartition("/")
    if name == "weight" or tree[path].ndim > 2:
        return False
    return any(other.startswith(f"{module}/") and tree[other].ndim > 1 for other in tree if other != path)


def _for_peft(
    config: LoraConfig,
    paths: Iterable[str],
    of_base: Iterable[str],
    base: Checkpoint,
    settings: Mapping[str, Any],
    facts: Facts,
) -> LoraConfig:
    """The configuration, with what PEFT is told of the model."""
    kinds = {path.replace("/", "."): kind for path in paths if (kind := kind_in_memory(path, facts))}
    task = task_of(settings)
    if task in _SAVES_THE_HEAD:  # as a whole: it asks for a head that did not change, and leaves out its adapters
        task = None
    return of_model(
        config,
        base_model_name_or_path=_name_of(base.folder),
        task_type=task,
        kinds=kinds | dict.fromkeys(of_base, "base"),
        target_parameters=facts.parameters,
    )


def _name_of(folder: Path) -> str:
    """The name on the Hub of what lies in its cache, else the folder."""
    match = re.search(r"models--([^/]+)/snapshots/[^/]+/?$", folder.as_posix())
    return match[1].replace("--", "/") if match else str(folder)


def _without_numbers(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The weights that one of both checkpoints has numbers of, and the other none."""
    problems = []
    for name, tree, other in (("base", before, after), ("tuned", after, before)):
        empty = [
            path for path, leaf in tree.items() if 0 in leaf.shape and path in other and 0 not in other[path].shape
        ]
        problems += [f"{path}: holds no numbers in {name}: {NOT_GATHERED}" for path in empty]
    return problems


def _listed(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _with_factorizations(
    config: LoraConfig, tree: Mapping[str, Any], given: Mapping[str, str], facts: Facts
) -> LoraConfig:
    """The configuration with what names and shapes of Hugging Face say, and ranks that fit the smaller sides."""
    patterns = PatternIndex(given.items())
    roles = {
        literal_pattern(path): found
        for path, leaf in tree.items()
        if is_targeted(config, path) and not patterns.matches(path) and (found := roles_of(path, leaf.ndim, facts))
    }
    full = config.replace(factorizations={**given, **roles})
    targets = find_targets(tree, full.replace(rank=1)).values()
    sides = {target.path: target.factorization.max_rank(target.shape) for target in targets}
    return full.replace(rank_pattern={literal_pattern(p): side for p, side in sides.items() if side < config.rank})
