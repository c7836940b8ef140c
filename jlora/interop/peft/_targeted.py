"""Whether PEFT's configuration and its tensors speak of the same modules; PEFT leaves out what is not named, unsaid."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jlora.errors import DataError, raise_all, shortened
from jlora.interop.peft._keys import Named, ends_of
from jlora.interop.peft._regular import Automaton, Budget

_MOST_CHARACTERS, _MOST_STEPS = 20_000, 20_000_000
_FIRST_NUMBER = re.compile(r"(?<=\.)[^.]*\.(\d+)\.")  # of a list that is no list of the model itself


def check_together(data: Mapping[str, Any], entries: Sequence[Named]) -> None:
    """Raises a DataError where a configuration and the entries of its file contradict each other, all told at once."""
    raise_all(_contradictions(data, entries), DataError, "the configuration and the tensors do not go together")


def check_fields(data: Mapping[str, Any]) -> None:
    """Raises a DataError for fields that say what is adapted and that PEFT does not read."""
    for key in ("target_modules", "exclude_modules"):
        value = data.get(key)
        if not (value is None or isinstance(value, str) or _is_names(value)):
            raise DataError(f"{key} = {shortened(value)}: wanted names of modules, or a regular expression")
        if isinstance(value, str):
            _check_regular(key, value)
    if data.get("target_modules") == [] and not data.get("target_parameters"):
        raise DataError("target_modules = []: wanted names of modules, or a regular expression")
    if not (data.get("modules_to_save") is None or _is_names(data["modules_to_save"])):
        raise DataError(f"modules_to_save = {shortened(data['modules_to_save'])}: wanted names of modules")
    if not (isinstance(data.get("bias", "none"), str) and data.get("bias", "none") in ("none", "all", "lora_only")):
        raise DataError(f"bias = {shortened(data['bias'])}: wanted none, all or lora_only")
    layers, pattern = data.get("layers_to_transform"), data.get("layers_pattern")
    if not (layers is None or _is_index(layers) or (isinstance(layers, list) and all(map(_is_index, layers)))):
        raise DataError(f"layers_to_transform = {shortened(layers)}: wanted the numbers of layers")
    if not (pattern is None or isinstance(pattern, str) or _is_names(pattern)):
        raise DataError(f"layers_pattern = {shortened(pattern)}: wanted names of lists of layers")
    if data.get("lora_bias") and data.get("use_dora"):
        raise DataError("lora_bias and use_dora: PEFT has no bias of a B beside DoRA")
    if pattern and layers is None:
        raise DataError(f"layers_pattern = {shortened(pattern)}: wanted layers_to_transform beside it")
    if isinstance(data.get("target_modules"), str) and (layers is not None or pattern is not None):
        raise DataError("layers_to_transform and layers_pattern go with names as target_modules, not with a pattern")


def _contradictions(data: Mapping[str, Any], entries: Iterable[Named]) -> Iterator[str]:
    """A problem for each entry that PEFT would leave out, or read as something else."""
    targeted = Targeted(data)
    for entry in entries:
        parts, module = entry.parts, entry.matched
        if "offset" in parts and not data.get("lora_bias"):
            yield f"{parts['offset']}: lora_bias is {shortened(data.get('lora_bias', False))}"
        if "A" not in parts or entry.is_parameter:
            continue
        if "value" in parts and ".base_layer." not in parts["value"]:
            yield f"{parts['value']}: beside A and B PEFT calls it {module}.base_layer"
        if ("magnitude" in parts) != bool(data.get("use_dora")):
            found = "has a magnitude" if "magnitude" in parts else "has no magnitude"
            yield f"{module} {found}, use_dora is {shortened(data.get('use_dora', False))}"
        if entry.is_embedding and (data.get("lora_bias") or data.get("target_modules") == "all-linear"):
            yield f"{module} is an embedding, which PEFT does not adapt with lora_bias or as one of all-linear"
        is_tied = bool(data.get("ensure_weight_tying")) and not _FIRST_NUMBER.search(module)  # head or embedding
        if (why := targeted.why_not(module)) and not is_tied:
            yield f"{module} has A and B, and {why}"


class Targeted:
    """Which modules a configuration adapts."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        budget = Budget(_MOST_STEPS, lambda: DataError(f"target_modules take more than {_MOST_STEPS:,} steps to match"))
        layers = data.get("layers_to_transform")
        self._layers = None if layers in (None, []) else _frozen(layers)
        self._lists = _lists_of(data.get("layers_pattern") or ())
        self._saved = Saved(data.get("modules_to_save") or ())
        self._names, self._left_out = (_Names(data.get(key), budget) for key in ("target_modules", "exclude_modules"))

    def why_not(self, module: str) -> str:
        """Why a module is not adapted, "" where it is."""
        if self._saved.holds(module) or self._left_out.matches(module) or not self._names.matches(module, default=True):
            return "is none of the modules that the configuration adapts"
        return "" if self._is_in_layers(module) else "is in none of layers_to_transform"

    def _is_in_layers(self, module: str) -> bool:
        """Whether the layers that are adapted are all, or the module is in one of them, or is named as a whole."""
        if self._layers is None or self._lists is None or self._names.has(module):
            return True
        if self._lists:
            found = next((found for pattern in self._lists if (found := pattern.search(module))), None)
        else:
            found = _FIRST_NUMBER.search(module)
        return found is not None and int(found[1]) in self._layers


class Saved:
    """Names of modules that are saved as a whole, with all that is in them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._longest = max((name.count(".") + 1 for name in self._names), default=0)

    def holds(self, module: str) -> bool:
        """Whether segments of a module's name, one behind the other, are one of the names."""
        segments = module.split(".")
        if len(segments) * self._longest > len(self._names):
            return any(f".{name}." in f".{module}." for name in self._names)
        lengths = range(1, self._longest + 1)
        starts = range(len(segments))
        return any(".".join(segments[at : at + length]) in self._names for at in starts for length in lengths)


class _Names:
    """What names modules: their names or the ends of these, or a regular expression for the whole name."""

    def __init__(self, value: Any, budget: Budget) -> None:
        self._budget, self._automaton = budget, None
        self._names = None if value is None or isinstance(value, str) else frozenset(value)
        if isinstance(value, str) and value != "all-linear":
            try:
                self._automaton = Automaton(f"(?:{value})$")
            except ValueError:  # what is not matched here, such as a reference, is not checked
                self._automaton = None

    def matches(self, module: str, *, default: bool = False) -> bool:
        if self._automaton is not None:
            return self._automaton.matches(module, self._budget)
        if self._names is None:
            return default
        return not self._names.isdisjoint(ends_of(module))

    def has(self, module: str) -> bool:
        """Whether the whole name is one of those given."""
        return self._names is not None and module in self._names


def _lists_of(given: Any) -> list[re.Pattern[str]] | None:
    """What finds the number of a layer behind the name of its list; None for names that are patterns, not checked."""
    names = [given] if isinstance(given, str) else list(given)
    if not all(re.fullmatch(r"[\w.]+", name) for name in names):
        return None
    return [re.compile(rf"(?:^|\.){name}\.(\d+)\.") for name in names]


def _frozen(layers: Any) -> frozenset[int]:
    return frozenset(layers if isinstance(layers, list) else [layers])


def _check_regular(key: str, text: str) -> None:
    if len(text) > _MOST_CHARACTERS:
        raise DataError(f"{key}: a pattern of more than {_MOST_CHARACTERS:,} characters: {shortened(text)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a later Python may read otherwise
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise DataError(f"{key} is no regular expression: {shortened(text)}: {error}") from None


def _is_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
