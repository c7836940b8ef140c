"""What may surprise about a merge that was done."""

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from jlora.checkpoints._forms import files_of
from jlora.checkpoints._memory import settings_of
from jlora.checkpoints._tied import EMBEDDINGS, Tie, ties_of
from jlora.disk import CONFIG, WEIGHTS, Checkpoint, parse_json, read_bytes
from jlora.errors import DataError, listed, printable

_OF_TRAINING = ("optimizer", "scheduler", "rng_state", "training_args", "scaler", "adapter_model")
_MOST = 3


def warnings_of(
    source: Checkpoint, adapters: Sequence[Path], changed: Collection[str], apart: Sequence[Tie]
) -> tuple[str, ...]:
    """What a merge of adapters from these folders into these tensors leaves out, or does beside."""
    found = [*_apart(apart), *_tied(source, changed, apart)]
    for folder in adapters:
        found += _beside(folder)
        found += _biases(folder, source, changed)
    return tuple(found)


def warnings_of_the_same(changed: Sequence[str], same: Sequence[str]) -> tuple[str, ...]:
    """A warning where an adapter changed nothing."""
    why = (
        "the updates are zero, as of a B or an alpha that is zero, or are lost to rounding: then keep the adapter "
        "beside the base, or merge it into the base in float32"
    )
    if not changed:
        return (f"nothing changed: {why}",)
    text = f"{len(same):,} of {len(changed) + len(same):,} tensors are as they were, {listed(same, _MOST)}: {why}"
    return (text,) if same else ()


def _beside(folder: Path) -> Iterator[str]:
    """Weights beside an adapter, as some trainers put them there."""
    if not folder.is_dir():
        return
    own = {path.name for path in files_of(folder)}
    names = sorted(name for name in os.listdir(folder) if name.endswith(WEIGHTS) and not name.startswith(_OF_TRAINING))
    if others := [name for name in names if name not in own]:
        yield f"{folder}: {listed(others, _MOST)} beside the adapter is not merged; jlora reads the adapter alone"


def _biases(folder: Path, source: Checkpoint, changed: Collection[str]) -> Iterator[str]:
    """Biases that PEFT's configuration says were trained, and that its file does not hold."""
    try:
        bias = parse_json(read_bytes(folder / CONFIG, 1 << 20)).get("bias")
    except (DataError, ValueError):  # it is no file of PEFT's
        return
    if bias not in ("all", "lora_only"):
        return
    of_adapted = {f"{name.removesuffix('weight')}bias" for name in changed if name.endswith(".weight")}
    wanted = [name for name in source.entries if name.endswith(".bias") and (bias == "all" or name in of_adapted)]
    if missing := [name for name in wanted if name not in changed]:
        yield f"{folder}: the configuration says bias={bias}, but the file does not hold {listed(missing, _MOST)}"


def _apart(apart: Sequence[Tie]) -> Iterator[str]:
    for tie in apart:
        names, embedding = printable(listed((*tie.others, *tie.copies))), printable(tie.embedding)
        how = "config.json says tie_word_embeddings false"
        if tie.keeps_key:
            how = "config.json stays as it is, and transformers before 5 makes them one again"
        yield (
            f"{names} was {embedding} and has a tensor of its own now, as an adapter changes one of them; {how}. "
            "--tied keeps them one"
        )


def _tied(source: Checkpoint, changed: Collection[str], apart: Sequence[Tie]) -> Iterator[str]:
    """A tensor that is several weights of the model."""
    if apart:
        return
    ties = [tie for tie in ties_of(source) if tie.others and tie.embedding in changed]
    for tie in ties:
        yield f"{printable(tie.embedding)} is {printable(listed(tie.others))} too: the adapter acts on all"
    if not ties and settings_of(source).get("tie_word_embeddings"):
        names = [name for name in changed if name.endswith(EMBEDDINGS)]
        if names and not any("lm_head" in name for name in source.entries):
            yield f"{printable(names[0])} is several weights (tie_word_embeddings): the adapter acts on all of them"
