"""The table of what transformers renames, and of modules that are no Linear, taken from transformers itself.

`python -m tests.interop.make_names` makes every model of the installed transformers on the meta device, with two layers
where its configuration has such a number, asks transformers for the names under which it would save each tensor, and
writes `jlora/interop/transformers.json`. Some minutes; a test compares a part of it, a slow one all.
"""

import collections
import contextlib
import inspect
import itertools
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from jlora.interop.peft import Row, names_embedding, paths_of_name
from tests.interop.models import torch, transformers

conversions = pytest.importorskip("transformers.conversion_mapping")
loading = pytest.importorskip("transformers.core_model_loading")
configuration_auto = pytest.importorskip("transformers.models.auto.configuration_auto")
modeling_auto = pytest.importorskip("transformers.models.auto.modeling_auto")

TABLE = Path(__file__).parents[2] / "jlora" / "interop" / "transformers.json"
_LAYERS = re.compile(r"(num|n|encoder|decoder|text|vision)?_?(hidden_)?layers?|depth")
_EXPERTS = re.compile(r"\.experts\.(\d+)\.")


def architectures() -> list[tuple[str, str, str]]:
    """Each model type, class and class of configuration that a checkpoint's config.json may name."""
    found: set[tuple[str, str, str]] = set()
    for name, mapping in vars(modeling_auto).items():
        if not name.startswith("MODEL_") or not name.endswith("MAPPING_NAMES"):
            continue
        for model_type, classes in mapping.items():
            config = configuration_auto.CONFIG_MAPPING_NAMES.get(model_type)
            if config:
                every = (classes,) if isinstance(classes, str) else classes
                found |= {(model_type, architecture, config) for architecture in every if architecture}
    return sorted(found)


def model_of(architecture: str, config: str) -> Any:
    """The model on the meta device, with few layers where its configuration allows it."""
    kind, made = getattr(transformers, architecture), getattr(transformers, config)
    problems = []
    for few in (True, False):
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(torch.device("meta"))
            try:
                return kind(_with_few_layers(made()) if few else made())
            except Exception as error:
                problems.append(error)
    raise ValueError(f"{architecture}: {problems[-1]}")


def _with_few_layers(config: Any) -> Any:
    kind = type(config)
    given = {}
    for name in inspect.signature(kind.__init__).parameters:
        value = getattr(config, name, None)
        if isinstance(value, transformers.PreTrainedConfig):
            given[name] = _with_few_layers(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 2 and _LAYERS.fullmatch(name):
            given[name] = 2
    return kind(**given) if given else config


def facts_of(model: Any) -> dict[str, Any]:
    """What a model's names and axes are, where they are not what one would expect.

    renamed: [memory, disk]; {i}, {j}, ... stand for numbers, {rest*} for the rest of a name; the first
      that matches counts.
    stacked: [memory, [disk, ...]]: experts in one array, and one by one on the disk, {e} the number; the rows of
      several follow one another.
    converted: names on the disk whose tensors are others in memory.
    tied: [memory, memory]: a weight that is that of an embedding where the configuration ties them.
    tied_beside: [memory, memory]: what else is tied then.
    keeps_tie: whether tie_word_embeddings says more, or nothing: the configuration ties them whatever a file says, or
      the model computes something else.
    parameters: the ends of the names of weights whose modules PEFT does not adapt.
    conv1d, embedding, linear: the last part of the names of modules; transposed: of parameters (experts, in, out).
    """
    state = {name: value.to("meta") for name, value in model.state_dict().items()}
    transforms = [
        t
        for t in conversions.get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(t, loading.PrefixChange)
    ]
    reverse = [t.reverse_transform() for t in transforms[::-1]]
    converters = [t for t in reverse if isinstance(t, loading.WeightConverter)]
    facts: dict[str, Any] = collections.defaultdict(list)
    renamed: dict[str, str] = {}
    for name, value in state.items():
        saved = list(loading.revert_weight_conversion(model, {name: value})) if transforms else [name]
        if loading.apply_converters(name, converters)[1] is None:
            renamed[name] = saved[0]
        elif parts := _stack(value, saved, model, name):
            facts["stacked"].append([numbered(name)[0], parts])
        else:
            facts["converted"] += [numbered(disk)[0] for disk in saved]
    facts["renamed"] = _rows(renamed)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if type(module).__name__ == "Conv1D":
            facts["conv1d"].append(last)
        elif name and not _is_adapted_by_peft(module):
            facts["parameters"].append(_end_of(model, name))
        elif isinstance(module, torch.nn.Linear) and names_embedding(last):
            facts["linear"].append(last)
        elif isinstance(module, torch.nn.Embedding) and not names_embedding(last):
            facts["embedding"].append(last)
        elif getattr(module, "is_transposed", False):
            own = module.named_parameters(recurse=False)
            facts["transposed"] += [f"{last}.{part}" for part, value in own if value.ndim == 3]
    facts["tied"] = _tied(model, embeddings=True)
    facts["tied_beside"] = _tied(model, embeddings=False) if facts["tied"] else []
    found: dict[str, Any] = {key: _unique(value) for key, value in sorted(facts.items()) if value}
    return found | ({"keeps_tie": True} if facts["tied"] and _keeps_tie(model) else {})


_ADAPTED = [getattr(torch.nn, name).forward for name in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")]


def _is_adapted_by_peft(module: Any) -> bool:
    """Whether PEFT adapts a module that has a weight, and with the right result; it knows embeddings with a scale."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim < 2 or type(module).__name__ == "Conv1D":
        return True
    is_scaled = isinstance(module, torch.nn.Embedding) and hasattr(module, "embed_scale")
    is_plain = type(module).forward in _ADAPTED
    if is_plain and weight.ndim > 2:  # of another convolution PEFT's A has another shape, or other steps
        is_plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    return is_scaled or is_plain


def _end_of(model: Any, name: str) -> str:
    """The end of the name of a module's weight: two segments without a layer's number, but that of a Sequential."""
    segments = name.split(".")
    if segments[-1].isdecimal():
        named = max((place for place, segment in enumerate(segments) if not segment.isdecimal()), default=0)
        return ".".join([*segments[named:], "weight"])
    if len(segments) > 2 and segments[-2].isdecimal():
        holder = model.get_submodule(".".join(segments[:-2]))
        kept = segments[-3:] if isinstance(holder, torch.nn.Sequential) else segments[-1:]
        return ".".join([*kept, "weight"])
    return ".".join([*segments[-2:], "weight"])


def _keeps_tie(model: Any) -> bool:
    """Whether a file cannot say tie_word_embeddings false without another effect."""
    untied = type(model.config)(tie_word_embeddings=False)
    return bool(untied.tie_word_embeddings) or "tie_word_embeddings" in inspect.getsource(type(model).forward)


def _tied(model: Any, *, embeddings: bool) -> list[list[str]]:
    """The weights that are those of embeddings, or of others, were they tied."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.config.tie_word_embeddings = True
    named = {f"{name}.weight" for name, found in model.named_modules() if isinstance(found, torch.nn.Embedding)}
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    return [[tied, source] for tied, source in pairs.items() if (source in named) == embeddings]


def _unique(rows: list[Any]) -> list[Any]:
    return [json.loads(text) for text in dict.fromkeys(map(json.dumps, rows))]


def numbered(*names: str) -> tuple[str, ...]:
    """Names with {i}, {j}, ... for their first numbers, as far as these are the same in each."""
    numbers = [[segment for segment in name.split(".") if segment.isdecimal()] for name in names]
    shared = sum(1 for _ in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*numbers, strict=False)))
    templates = []
    for name in names:
        letters = iter("ijklmnop"[:shared])
        segments = [
            f"{{{letter}}}" if segment.isdecimal() and (letter := next(letters, "")) else segment
            for segment in name.split(".")
        ]
        templates.append(".".join(segments))
    return tuple(templates)


def _stack(value: Any, saved: list[str], model: Any, name: str) -> list[str] | None:
    """The names on the disk of the experts in one array, {e} for the number; None where it is another conversion."""
    if not all(_EXPERTS.search(disk) for disk in saved):
        return None
    templates = list(dict.fromkeys(_EXPERTS.sub(".experts.{e}.", disk) for disk in saved))
    parts = len(templates)
    found = loading.revert_weight_conversion(model, {name: value})
    shapes = {tuple(part.shape) for part in found.values()}
    if len(saved) != parts * value.shape[0] or value.ndim != 3:
        return None
    wanted = (value.shape[1] // parts, value.shape[2])
    return [numbered(template)[0] for template in templates] if shapes == {wanted} else None


def _rows(renamed: dict[str, str]) -> list[list[str]]:
    """Few rows, with {rest*} for a shared end, that lead each name on the disk to the one in memory, and back."""
    pairs = _unique([list(numbered(memory, disk)) for memory, disk in renamed.items()])
    if all(memory == disk for memory, disk in pairs):
        return []
    rows = _unique([_cut(memory, disk) for memory, disk in pairs if memory != disk])
    rows.sort(key=lambda row: (-row[1].count("."), -row[0].count("."), row))
    exact = [pair for pair in pairs if not (_leads(rows, *pair, 0) and _leads(rows, *pair, 1))]
    rows = exact + rows
    wrong = [pair for pair in pairs if not (_leads(rows, *pair, 0) and _leads(rows, *pair, 1))]
    if wrong:
        raise ValueError(f"no rows lead {wrong[0]} both ways")
    return rows


def _cut(memory: str, disk: str) -> list[str]:
    """Two names without their shared end."""
    m, d, cut = memory.split("."), disk.split("."), False
    while len(m) > 1 and len(d) > 1 and m[-1] == d[-1] and not m[-1].startswith("{"):
        m, d, cut = m[:-1], d[:-1], True
    rest = [REST] * cut
    return [".".join(m + rest), ".".join(d + rest)]


REST = "{rest*}"


def _leads(rows: list[list[str]], memory: str, disk: str, side: int) -> bool:
    """Whether the first row that matches one of two names leads to the other."""
    names = [re.sub(r"\{\w\}", "7", name) for name in (memory, disk)]
    mapping = [Row(*(row if side == 0 else row[::-1])) for row in rows]
    found = paths_of_name(mapping, names[side])
    return (found[0].replace("/", ".") if found else names[side]) == names[1 - side]


def table(only: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """The facts of all classes of some model types, or of all; what cannot be made is told."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for model_type, architecture, config in architectures():
        if only and model_type not in only:
            continue
        try:
            own = facts_of(model_of(architecture, config))
        except Exception as error:
            print(f"{model_type} {architecture}: {type(error).__name__}: {str(error)[:150]}", file=sys.stderr)
            continue
        if own:
            found.setdefault(model_type, {})[architecture] = own
    return found


def main() -> None:
    """Writes the table; facts that several models share stand there once."""
    write(table(sys.argv[1:]))


def write(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    facts: list[dict[str, Any]] = []
    models: dict[str, dict[str, int]] = {}
    for model_type, classes in found.items():
        for architecture, own in classes.items():
            if own not in facts:
                facts.append(own)
            models.setdefault(model_type, {})[architecture] = facts.index(own)
    lines = [json.dumps(own) for own in facts]
    named = [f"  {json.dumps(name)}: {json.dumps(own)}" for name, own in models.items()]
    TABLE.write_text('{"facts": [\n  ' + ",\n  ".join(lines) + '\n], "models": {\n' + ",\n".join(named) + "\n}}\n")


if __name__ == "__main__":
    main()
