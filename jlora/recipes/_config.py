"""The configuration of a whole job: what a TOML file says, each section a frozen dataclass."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import optax

from jlora.config import RANDOM_INITS, LoraConfig, field_names, read_mapping, write_mapping
from jlora.disk import parse_toml
from jlora.errors import ConfigError
from jlora.fields import check_keys, choice, integer, number, refusal
from jlora.optim import lora_fa, lora_plus, riemannian

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": lambda rate, decay: optax.adamw(rate, weight_decay=decay),
    "adam": lambda rate, decay: optax.adam(rate),
    "lion": lambda rate, decay: optax.lion(rate, weight_decay=decay),
    "sgd": lambda rate, decay: optax.sgd(rate, momentum=0.9),
}
SCHEDULES = ("constant", "cosine", "linear")
PRECONDITIONERS = ("none", "riemannian")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionConfig:
    """A function as `module:name`, and its keyword arguments: the other keys of its section."""

    function: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def load(self, field: str) -> Callable[..., Any]:
        """The function, of which `field` of the file speaks.

        Raises:
          ConfigError: no such module or name, or options that the function does not take.
        """
        module_name, colon, name = self.function.partition(":") if isinstance(self.function, str) else ("", "", "")
        if not (module_name.strip(".") == module_name != "" and colon and name):
            raise refusal(field, self.function, "'module:function'")
        try:
            function = getattr(importlib.import_module(module_name), name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{field} = {self.function!r}: no module {error.name!r} can be imported") from None
        except AttributeError:
            raise ConfigError(f"{field} = {self.function!r}: {module_name} has no {name!r}") from None
        if not callable(function):
            raise ConfigError(f"{field} = {self.function!r}: is a {type(function).__name__}, wanted a function")
        parameters = inspect.signature(function).parameters
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            check_keys(self.options, tuple(parameters), f"the options of {self.function}")
        return function

    def takes(self, field: str, name: str) -> bool:
        """Whether the function has a parameter of this name."""
        return name in inspect.signature(self.load(field)).parameters

    def call(self, field: str, **offered: Any) -> Any:
        """What the function returns for the options, and those of the offered arguments that it has parameters for."""
        function = self.load(field)
        signature = inspect.signature(function)
        arguments = {name: value for name, value in offered.items() if name in signature.parameters}
        arguments |= self.options
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise ConfigError(f"{field} = {self.function!r}: {error}") from None
        return function(**arguments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optax optimizer and its learning rate over the steps, in a warm-up and a schedule.

    Attributes:
      b_ratio: the rate of B over that of A, which is `learning_rate` (LoRA+; `jlora.optim.lora_plus`).
      freeze_a: A stays as it began (LoRA-FA; `jlora.optim.lora_fa`).
      preconditioner: "none", or "riemannian" (`jlora.optim.riemannian`).
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    clip_norm: float = 1.0  # 0 for none
    b_ratio: float = 1.0
    freeze_a: bool = False
    preconditioner: str = "none"

    def __post_init__(self) -> None:
        choice("optimizer.name", self.name, tuple(OPTIMIZERS))
        choice("optimizer.schedule", self.schedule, SCHEDULES)
        number("optimizer.learning_rate", self.learning_rate, 0.0, wanted="a finite number of at least 0")
        number("optimizer.weight_decay", self.weight_decay, 0.0, wanted="a finite number of at least 0")
        number("optimizer.clip_norm", self.clip_norm, 0.0, wanted="a finite number of at least 0")
        integer("optimizer.warmup_steps", self.warmup_steps, 0)
        number("optimizer.b_ratio", self.b_ratio, 0.0, wanted="a finite number of at least 0")
        if not isinstance(self.freeze_a, bool):
            raise refusal("optimizer.freeze_a", self.freeze_a, "true or false")
        choice("optimizer.preconditioner", self.preconditioner, PRECONDITIONERS)
        if self.freeze_a and (self.b_ratio != 1 or self.preconditioner != "none"):
            raise refusal("optimizer.freeze_a", True, "false beside b_ratio or a preconditioner, which are for A and B")
        if self.weight_decay and self.name in ("adam", "sgd"):
            raise refusal("optimizer.weight_decay", self.weight_decay, f"0, as {self.name} has none; adamw and lion do")

    def make(self, steps: int, config: LoraConfig | None = None) -> optax.GradientTransformation:
        """The optimizer for a run of this many steps, of adapters with this configuration; None for full fine-tuning.

        What is for A and B does not change how a whole model is trained.
        """
        rest = max(steps - self.warmup_steps, 1)
        after = {
            "constant": lambda: optax.constant_schedule(self.learning_rate),
            "cosine": lambda: optax.cosine_decay_schedule(self.learning_rate, rest),
            "linear": lambda: optax.linear_schedule(self.learning_rate, 0.0, rest),
        }[self.schedule]()
        if self.warmup_steps:
            warmup = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
            after = optax.join_schedules([warmup, after], [self.warmup_steps])
        optimizer = OPTIMIZERS[self.name](after, self.weight_decay)
        if config is None:
            return optimizer
        if self.freeze_a:
            return lora_fa(optimizer)
        if self.b_ratio != 1:
            optimizer = lora_plus(optimizer, self.b_ratio)
        return riemannian(optimizer, config) if self.preconditioner == "riemannian" else optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which batches, and how often something is written."""

    steps: int = 500
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    loss: str = "jlora.recipes:cross_entropy"
    log_every: int = 10
    eval_every: int = 50
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every", "checkpoint_every"):
            integer(f"train.{name}", getattr(self, name), 1)
        integer("train.seed", self.seed, 0)
        if self.batch_size % self.accumulate:
            raise refusal("train.accumulate", self.accumulate, f"a divisor of batch_size = {self.batch_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Full fine-tuning to compare LoRA with, where it is asked for; the rest is as for LoRA."""

    enabled: bool = False
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.enabled, bool):
            raise refusal("full.enabled", self.enabled, "true or false")
        number("full.learning_rate", self.learning_rate, 0.0, wanted="a finite number of at least 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What a language model is asked, before, while and after it is trained; it answers greedily.

    Attributes:
      prompts: answered before the first step, at each evaluation and at the end.
      chat: whether they are what a user says, for the chat template, and not plain texts.
      max_new_tokens: of an answer.
      exact_match: how many prompts of the evaluation file are answered before and after training, to count the answers
        that are their completions exactly, but for spaces around them; 0 for none.
    """

    prompts: tuple[str, ...] = ()
    chat: bool = False
    max_new_tokens: int = 64
    exact_match: int = 0

    def __post_init__(self) -> None:
        prompts = self.prompts
        if not isinstance(prompts, list | tuple) or not all(isinstance(each, str) and each for each in prompts):
            raise refusal("generate.prompts", prompts, "a list of texts that are not empty")
        object.__setattr__(self, "prompts", tuple(prompts))
        if not isinstance(self.chat, bool):
            raise refusal("generate.chat", self.chat, "true or false")
        integer("generate.max_new_tokens", self.max_new_tokens, 1)
        integer("generate.exact_match", self.exact_match, 0)

    @property
    def is_asked(self) -> bool:
        """Whether a model has to answer anything."""
        return bool(self.prompts or self.exact_match)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where a run writes.

    Attributes:
      folder: made where there is none.
      log: a function as `module:name` that is called with each row of metrics, `{"step": 10, "loss": 0.5}`, beside what
        the folder gets; none by default.
    """

    folder: str = "runs/job"
    log: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.log, str):
            raise refusal("output.log", self.log, "'module:function'")
        if not isinstance(self.folder, str) or not self.folder:
            raise refusal("output.folder", self.folder, "the path of a folder")
        if not self.folder.isprintable():  # bytes of a path that are no UTF-8 too, which config.toml could not hold
            raise refusal("output.folder", self.folder, "a path in printable characters")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
    """A whole job: the sections of its file.

    `model` is a function that returns one of
      `(module, params)`, `(module, params, collections)`: a Linen module, its params and its other collections;
      `(function, params)`: any `function(params, inputs)`;
      `(function, params, state)`: a `function(params, state, inputs)` that returns `(outputs, state)`;
      an `nnx.Module` with its params;
      a `LanguageModel`, as `jlora.recipes.language:model` does, for which `[model] folder = "..."` is short.
    It is called with the inputs, and where it has parameters of these names with `train`, `training` or `is_training`
    (True in training), `deterministic` or `use_running_average` (False in training); a function also with `key`, the
    step's PRNG key, or `rngs`, `{'dropout': key}`, both None outside of training. A Linen module gets the rng
    `dropout` in training, an NNX model is put into its training or its evaluation mode.

    `data` is a function that returns `(train, test)`: two mappings of arrays with `inputs` and what the loss needs,
    such as `labels`; `inputs` may be a mapping of arrays, and `train` a sequence of such datasets, of examples of one
    length each. It may return `(train, test, questions)` for a language model, `Question`s for an exact match.
    `[data] train = "x.jsonl"` is short for `jlora.recipes.language:data`.

    A parameter `console` of both functions is given the console of the run; parameters `language` and `batch_size` of
    the data function the `LanguageModel` and `train.batch_size`.
    """

    model: FunctionConfig
    data: FunctionConfig
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    full: FullConfig = dataclasses.field(default_factory=FullConfig)
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    output: OutputConfig = dataclasses.field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        found = self.optimizer
        is_for_parts = found.freeze_a or found.b_ratio != 1 or found.preconditioner != "none"
        if is_for_parts and self.lora.kind in ("vera", "xs"):
            raise ConfigError(
                f"lora.kind = {self.lora.kind!r}: trains neither A nor B, for which optimizer.freeze_a, b_ratio and "
                "preconditioner are: leave them out"
            )
        if self.lora.init not in RANDOM_INITS:
            raise refusal(
                "lora.init",
                self.lora.init,
                f"one of {', '.join(map(repr, RANDOM_INITS))} in a job; in Python jlora.start begins at the weights",
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The job of a mapping of sections.

        Raises:
          ConfigError: an unknown section or key, a missing function, or a value that is not allowed.
        """
        check_keys(data, field_names(cls), "the job")
        for name, section in data.items():
            if not isinstance(section, Mapping):
                raise refusal(name, section, f"a section, [{name}]")
        data = _written_out(data)
        for name, short in _SHORT.items():
            if "function" not in data.get(name, {}):
                raise ConfigError(
                    f"{name}.function is missing: wanted [{name}] with function = 'module:function', or {short}"
                )
        sections: dict[str, Any] = {}
        for name, section in data.items():
            if name in ("model", "data"):
                options = {key: value for key, value in section.items() if key != "function"}
                if empty := [key for key, value in options.items() if value is None]:
                    raise ConfigError(f"{name}.{empty[0]} is null: leave the key out")
                sections[name] = FunctionConfig(function=section["function"], options=options)
            elif name == "lora":
                try:
                    sections[name] = LoraConfig.from_dict(section)
                except ConfigError as error:
                    raise ConfigError(f"[lora]: {error}") from None
            else:
                kind = _SECTIONS[name]
                check_keys(section, field_names(kind), f"[{name}]")
                sections[name] = kind(**section)
        return cls(**sections)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every value written out."""
        data: dict[str, Any] = {name: dataclasses.asdict(getattr(self, name)) for name in _SECTIONS}
        functions = {name: getattr(self, name) for name in ("model", "data")}
        called = {name: {"function": found.function, **found.options} for name, found in functions.items()}
        return {**called, "lora": self.lora.to_dict(), **data}

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a `.toml` or `.json` file, and puts `section.key=value` overrides over it."""
        data = read_mapping(path)
        for override in overrides:
            _override(data, override)
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def write(self, path: str | Path) -> None:
        """Writes a `.toml` or `.json` file."""
        write_mapping(path, self.to_dict())


_SECTIONS: dict[str, Any] = {
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "full": FullConfig,
    "generate": GenerateConfig,
    "output": OutputConfig,
}
_SHORT = {
    "model": "folder = 'the folder of a language model'",
    "data": "train and eval = 'files of JSON lines'",
}
LINEAR = ("model/layers/**/*_proj",)  # every linear layer of a language model, and experts


def _written_out(data: Mapping[str, Any]) -> dict[str, Any]:
    """The sections with what `[model] folder` and `[data] train` are short for."""
    sections: dict[str, dict[str, Any]] = {name: dict(section) for name, section in data.items()}
    model, examples = sections.get("model", {}), sections.get("data", {})
    if "folder" in model and "function" not in model:
        sections["model"] = {"function": "jlora.recipes.language:model", **model}
        sections["lora"] = {"target_modules": list(LINEAR), **sections.get("lora", {})}
        sections["train"] = {"loss": "jlora.recipes:next_token", **sections.get("train", {})}
    if isinstance(examples.get("train"), str) and "function" not in examples:
        sections["data"] = {"function": "jlora.recipes.language:data", **examples}
    return sections


def _override(data: dict[str, Any], override: str) -> None:
    """Puts one `section.key=value` into the data; the value is TOML, or else a string."""
    key, equals, text = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and section and dot and name):
        raise ConfigError(f"override {override!r}: wanted section.key=value, such as lora.rank=4")
    try:
        value = parse_toml(f"value = {text}".encode())["value"]
    except ValueError:
        value = text
    table = data.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"override {override!r}: {section} is no section")
    table[name] = value
