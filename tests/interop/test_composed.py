"""Adapters that PEFT wrote, resized and combined by the functions on files: what PEFT's live model says of the result.

The wanted logits are those of the plain model whose weights are summed here in float64 from PEFT's own merges.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import DataError, JloraWarning, merge_params
from jlora.checkpoints import combine, resize
from jlora.interop.peft import read_peft
from jlora.paths import leaves_by_path, nest
from jlora.storage import load_adapters
from tests.interop.models import (
    ATTENTION,
    BIASED,
    EMBEDDINGS,
    Case,
    adapted,
    base_of,
    llama,
    logits_of,
    merged_by_peft,
    peft,
    quiet,
    save,
    torch,
)

State = Mapping[str, np.ndarray]
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ATTENTION},
    "mlp": {"target_modules": ["up_proj", "down_proj"], "r": 3},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"], "use_rslora": True},
    "bias": {"target_modules": ATTENTION, "lora_bias": True},
    "dora": {"target_modules": ["k_proj", "o_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
BOTH_BIASED = BIASED | {"mlp_bias": True}  # PEFT has a bias of B beside a bias of the layer
VALUES = ("lm_head", "layernorm")


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Writes adapters by name with PEFT; gives the folder, and the weights of the model that PEFT merged it into."""

    def write(name: str, seed: int = 1, **changes: Any) -> tuple[Path, State]:
        case = Case(llama, {**FIELDS[name], **changes}, BOTH_BIASED, save=EMBEDDINGS if name == "embedding" else {})
        _, live = adapted(case)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
        folder = save(case, live, tmp_path / f"{name} {seed}")
        return folder, merged_by_peft(live)

    return write


def base_state() -> State:
    return {name: value.double().numpy() for name, value in plain_model().state_dict().items()}


def plain_model() -> Any:
    return base_of(Case(llama, {}, BOTH_BIASED))


def logits_of_state(state: State) -> np.ndarray:
    model = plain_model()
    model.load_state_dict({name: torch.from_numpy(value.astype(np.float32)) for name, value in state.items()})
    return logits_of(model)


def logits_in_peft(folder: Path) -> np.ndarray:
    """PEFT warns of missing keys, and warnings are errors; biases of a B that are not in the file are zeros."""
    with quiet():
        warnings.filterwarnings(
            "ignore", r"Found missing adapter keys .*: \['[^']*lora_B.default.bias'(, '[^']*bias')*\]"
        )
        return logits_of(peft.PeftModel.from_pretrained(plain_model(), str(folder)).eval())


def assert_says(folder: Path, state: State) -> None:
    wanted, base = logits_of_state(state), logits_of(plain_model())
    assert np.abs(wanted - base).max() > 0.03 * np.abs(base).max()
    np.testing.assert_allclose(logits_in_peft(folder), wanted, rtol=0, atol=2e-5 * max(1, np.abs(wanted).max()))


def summed(parts: list[tuple[State, float]]) -> State:
    """base + sum w (merged - base), but for what is taken as a whole."""
    base = base_state()
    total = dict(base)
    for state, weight in parts:
        for name, value in state.items():
            share = 1.0 if any(part in name for part in VALUES) else weight
            total[name] = total[name] + share * (value - base[name])
    return total


@pytest.mark.parametrize(
    "names",
    [
        ("plain", "mlp"),
        ("plain", "head"),
        ("bias", "mlp"),
        ("plain", "bias"),
        ("norms", "head"),
        ("plain", "embedding"),
    ],
    ids="+".join,
)
@pytest.mark.filterwarnings("ignore:.*(no weight in common|values take the place):jlora.JloraWarning")
def test_combined(names: tuple[str, str], written: Any, tmp_path: Path) -> None:
    found = [written(name, seed) for seed, name in enumerate(names)]
    weights = [0.7, -0.4]
    combine([folder for folder, _ in found], tmp_path / "out", weights, method="cat")
    assert_says(tmp_path / "out", summed([(state, w) for (_, state), w in zip(found, weights, strict=True)]))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("rank", [2, 5])
def test_resized_to_a_rank_that_it_fits_in(name: str, rank: int, written: Any, tmp_path: Path) -> None:
    folder, state = written(name, r=2)
    resize(folder, tmp_path / "out", rank)
    assert_says(tmp_path / "out", state)


def test_a_bias_of_b_keeps_its_update_whatever_the_pattern_of_ranks_reaches(written: Any, tmp_path: Path) -> None:
    folder, state = written("bias", r=2)
    resize(folder, tmp_path / "out", 3, rank_pattern={"**/q_proj/weight": 4, "**/layers/1/**/v_proj": 5})
    assert_says(tmp_path / "out", state)


def test_dora_resized_is_dora_of_the_best_a_and_b(written: Any, tmp_path: Path) -> None:
    folder, _ = written("dora", r=3)
    resize(folder, tmp_path / "out", 1)
    (before, config), base, wanted = read_peft(folder), base_state(), dict(base_state())
    for name, entry in before.items():
        a, b, magnitude = (np.asarray(entry[part], np.float64) for part in ("A", "B", "magnitude"))
        u, s, vh = np.linalg.svd(config.scaling_of(name) * a @ b)
        direction = base[name] + (s[0] * np.outer(u[:, 0], vh[0])).T
        wanted[name] = magnitude[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    assert_says(tmp_path / "out", wanted)


def test_dora_alone_goes_through_combine(written: Any, tmp_path: Path) -> None:
    folder, state = written("dora")
    combine([folder, folder], tmp_path / "out", [0.25, 0.75], method="cat")
    assert_says(tmp_path / "out", state)


@pytest.mark.filterwarnings("ignore:.*values take the place:jlora.JloraWarning")
@pytest.mark.parametrize(("values", "shares"), [("first", (1, 0)), ("last", (0, 1)), ("mean", (0.75, 0.25))])
def test_heads_that_differ(values: str, shares: tuple[float, float], written: Any, tmp_path: Path) -> None:
    found = [written("head", seed) for seed in range(2)]
    combine([folder for folder, _ in found], tmp_path / "out", [0.6, 0.2], method="cat", values=values)
    wanted = dict(summed([(state, weight) for (_, state), weight in zip(found, (0.6, 0.2), strict=True)]))
    heads = [state["lm_head.weight"] for _, state in found]
    wanted["lm_head.weight"] = shares[0] * heads[0] + shares[1] * heads[1]
    assert_says(tmp_path / "out", wanted)


def test_disjoint_adapters_are_named(written: Any, tmp_path: Path) -> None:
    folders = [written(name)[0] for name in ("plain", "mlp")]
    with pytest.warns(
        JloraWarning, match=r"plain 1: no weight in common with the others: .*q_proj.*, but .*down_proj.* there"
    ):
        combine(folders, tmp_path / "out", method="cat")


@pytest.mark.filterwarnings("ignore:.*no weight in common:jlora.JloraWarning")
def test_dora_beside_plain_adapters_has_a_place_in_jloras_format_alone(written: Any, tmp_path: Path) -> None:
    found = [written(name) for name in ("mlp", "dora")]
    folders = [folder for folder, _ in found]
    message = r"k_proj.weight has a magnitude \(DoRA\) and .*down_proj.weight has none: .*in jlora's own format"
    with pytest.raises(DataError, match=message):
        combine(folders, tmp_path / "out", method="cat")
    combine(folders, tmp_path / "out", method="cat", form="own")
    params = {name.replace(".", "/"): np.float32(value) for name, value in base_state().items()}
    merged = merge_params(nest(params), *load_adapters(tmp_path / "out"))
    wanted = summed([(state, 1.0) for _, state in found])
    for path, weight in leaves_by_path(merged).items():
        np.testing.assert_allclose(weight, wanted[path.replace("/", ".")], rtol=0, atol=2e-5)
