"""What is no plain LoRA, damaged, or does not say what it must is refused with a message."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.disk import write_tensors
from jlora.interop.peft import is_peft_folder, read_peft, write_peft
from tests.fuzz import ODD, mutate
from tests.interop.files import PREFIX, embedding_pair, experts_pair, pair, write_folder

Rng = np.random.Generator
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(jlora.DataError, match=message) as caught:
        read_peft(folder, **options)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("use_qalora", True, "QALoRA"),
        ("alora_invocation_tokens", [1, 2], "aLoRA"),
        ("velora_config", {"x": 1}, "VeLoRA"),
        ("kasa_config", {"x": 1}, "KaSA"),
        ("monteclora_config", {"x": 1}, "MonteCLoRA"),
        ("arrow_config", {"top_k": 1}, "Arrow"),
        ("use_bdlora", {"x": 1}, "BD-LoRA"),
        ("layer_replication", [[0, 4], [2, 5]], "layer replication"),
        ("trainable_token_indices", [3], "trainable tokens"),
    ],
)
def test_variants(key: str, value: Any, name: str, tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "a", pair(rng, "q", 3, 5), **{key: value})
    refused(folder, rf"{key} = {re.escape(repr(value))}: {name} is a variant that A and B alone do not represent")
    for nothing in (None, False, [], {}):
        read_peft(write_folder(tmp_path / "b", pair(rng, "q", 3, 5), **{key: nothing}))


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "later", 1, 0, [], {}, 0.5]
)
def test_inits_that_change_the_base(init: Any, tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "a", pair(rng, "q", 3, 5), init_lora_weights=init)
    refused(folder, rf"init_lora_weights = {re.escape(repr(init))} changes the base.*not portable.*plain LoRA")


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "mica", "orthogonal"])
def test_inits_that_do_not(init: Any, tmp_path: Path, rng: Rng) -> None:
    read_peft(write_folder(tmp_path / "a", pair(rng, "q", 3, 5), init_lora_weights=init))


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "LOKR", "IA3", "PROMPT_TUNING", "lora", None, 3, ["LORA"], {}])
def test_other_kinds(kind: Any, tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "a", pair(rng, "q", 3, 5), peft_type=kind)
    refused(folder, rf"peft_type {re.escape(repr(kind))}: jlora reads LORA")


def test_a_grouped_convolution(tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "c", 6, (4, 3, 3), rank=4)
    tensors["c.lora_B.weight"] = rng.standard_normal((6, 2, 1, 1)).astype("float32")
    refused(write_folder(tmp_path / "a", tensors, r=4), "c.weight: .*a grouped convolution")


@pytest.mark.parametrize(("key", "missing"), [("q.lora_A.weight", "A"), ("q.lora_B.weight", "B")])
def test_a_without_b(key: str, missing: str, tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "q", 3, 5) | pair(rng, "k", 3, 5)
    alone = "B" if missing == "A" else "A"
    del tensors[key]
    refused(write_folder(tmp_path / "a", tensors), f"{alone} of q.weight stands alone")
    refused(
        write_folder(
            tmp_path / "b", {key.replace("lora_", "lora_embedding_").removesuffix(".weight"): np.ones((2, 2))}
        ),
        "stands alone",
    )


def test_a_magnitude_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {"q.lora_magnitude_vector": np.ones(3, "float32")})
    refused(folder, "of q.weight stands alone")


@pytest.mark.parametrize(
    "key",
    [
        "q.lora_C.weight",
        "q.lora_A.bias",
        "q.lora_A",
        "q.lora_vera_A",
        "q.vera_lambda_b.lora_x",
        "q.lora_embedding_A.weight",
        "embed.token_adapter.trainable_tokens_delta",
        "embed.trainable_tokens_delta",
        "lora_A.weight",
    ],
)
def test_tensors_that_are_not_known(key: str, tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "q", 3, 5) | {key: np.ones((2, 5), "float32")}
    refused(write_folder(tmp_path / "a", tensors), rf"tensors that are no part of a LoRA.*: {re.escape(PREFIX + key)}")


def test_tensors_without_the_prefix(tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "a", pair(rng, "q", 3, 5))
    with (folder / TENSORS).open("wb") as file:
        write_tensors(file, pair(rng, "q", 3, 5) | {PREFIX: np.ones(3)})
    refused(folder, "tensors that are no part of a LoRA that jlora knows: 3 problems")


def test_many_are_counted(tmp_path: Path) -> None:
    tensors = {f"q{number}.lora_x": np.ones(1) for number in range(20)}
    refused(write_folder(tmp_path / "a", tensors), r": 20 problems:(.|\n)*and 8 more$")


def test_two_tensors_in_one_place(tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "q", 3, 5) | {"q.weight": np.ones((3, 5)), "q.base_layer.weight": np.ones((3, 5))}
    refused(write_folder(tmp_path / "a", tensors), "are both the value of q.weight")
    tensors = pair(rng, "e", 3, 5) | embedding_pair(rng, "e", 5, 3)
    refused(write_folder(tmp_path / "b", tensors), "are both the A of e.weight")


def test_tensors_that_were_not_gathered(tmp_path: Path) -> None:
    tensors = {"q.lora_A.weight": np.ones((0, 5), "float32"), "q.lora_B.weight": np.ones((0,), "float32")}
    refused(write_folder(tmp_path / "a", tensors), r"lora_A \(0, 5\) and lora_B \(0,\) hold no numbers: .*ZeRO-3")


@pytest.mark.parametrize(
    ("a", "b", "fields"),
    [
        ((3, 5), (7, 2), {}),
        ((3, 5), (7, 3), {}),
        ((2, 5), (7, 3), {}),
        ((2,), (7, 2), {}),
        ((2, 5), (7,), {}),
        ((), (), {}),
        ((2, 5), (7, 2), {"rank_pattern": {"q": 3}}),
        ((2, 5, 3), (7, 2), {}),
        ((2, 5), (7, 2, 1), {}),
        ((2, 5, 3), (7, 2, 2), {}),
        ((0, 5), (7, 0), {"r": 0}),
        ((5, 2), (2, 7), {}),
    ],
)
def test_shapes_that_do_not_fit(a: Any, b: Any, fields: Any, tmp_path: Path, rng: Rng) -> None:
    tensors = {"q.lora_A.weight": np.ones(a, "float32"), "q.lora_B.weight": np.ones(b, "float32")}
    refused(write_folder(tmp_path / "a", tensors, **fields), "do not fit|wanted a whole number")


@pytest.mark.parametrize(
    ("part", "shape"),
    [("lora_magnitude_vector", (4,)), ("lora_magnitude_vector", (3, 2)), ("base_layer.weight", (5, 4))],
)
def test_other_parts_that_do_not_fit(part: str, shape: Any, tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "q", 3, 5) | {f"q.{part}": np.ones(shape, "float32")}
    refused(write_folder(tmp_path / "a", tensors), "q.weight: (magnitude|value) .* does not fit A and B")


def test_a_saved_weight_says_which_way_its_module_lies(tmp_path: Path, rng: Rng) -> None:
    """Of a GPT-2 whose head, a Linear, is adapted beside its Conv1D."""
    tensors = pair(rng, "c", 3, 5) | pair(rng, "head", 3, 5)
    tensors |= {"head.base_layer.weight": rng.standard_normal((3, 5)).astype("float32")}
    _, config = read_peft(write_folder(tmp_path / "a", tensors, fan_in_fan_out=True))
    assert dict(config.factorizations) == {"c.weight": "io", "head.weight": "oi"}


def test_experts_that_do_not_fit(tmp_path: Path, rng: Rng) -> None:
    tensors = experts_pair(rng, "m.e", 3, 7, 5, rank=3)
    refused(write_folder(tmp_path / "a", tensors, target_parameters=["e.w"]), r"m.e.w: .*wanted \(experts \* 2, in\)")
    refused(write_folder(tmp_path / "b", tensors, target_parameters=["e.w", "e.v"]), "comes first is not known")
    both = ["e.gate_up_proj", "e.down_proj"]
    refused(write_folder(tmp_path / "c", tensors, target_parameters=both), "tensors that are no part of .*: 2 problems")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", jnp.bfloat16])
def test_numbers_that_are_not_finite(value: float, dtype: Any, tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "q", 3, 5, dtype=dtype) | pair(rng, "k", 3, 5, dtype=dtype)
    tensors["q.lora_B.weight"][1, 1] = value
    refused(write_folder(tmp_path / "a", tensors), r"a: B of q.weight holds a NaN or an infinity$")


@pytest.mark.parametrize("dtype", ["complex64", "int64", "int8", "bool"])
def test_dtypes_that_are_no_adapters(dtype: str, tmp_path: Path) -> None:
    tensors = {"q.lora_A.weight": np.ones((2, 5), dtype), "q.lora_B.weight": np.ones((3, 2), dtype)}
    refused(write_folder(tmp_path / "a", tensors), f"A of q.weight has the dtype {dtype}: wanted a floating one")
    whole = write_folder(tmp_path / "b", {"n.steps": np.ones(3, dtype)})
    if dtype == "complex64":
        refused(whole, "value of n.steps has the dtype complex64")
    elif dtype != "int64":
        assert read_peft(whole)[0]["n.steps"]["value"].dtype == dtype


NUMBERS = [None, True, "8", [8], {}, 1.5, -1, 0, 1e308, 10**400, 2**70]
WRONG: list[tuple[str, Any]] = [("r", value) for value in NUMBERS]
WRONG += [("lora_alpha", value) for value in [None, True, "8", [8], {}, 10**400]]
WRONG += [("lora_dropout", value) for value in [None, True, "0", [0], 1.0, -0.1, 2]]
WRONG += [(key, value) for key in ("rank_pattern", "alpha_pattern") for value in ["q", 3, ["q"], [["q", 2]], True]]
WRONG += [
    (key, {"q": value}) for key in ("rank_pattern", "alpha_pattern") for value in [None, "2", [2], {}, True, False]
]
WRONG += [("rank_pattern", {"q": value}) for value in [0, -1, 2.0, 2**70]] + [("alpha_pattern", {"q": 10**400})]
WRONG += [("target_parameters", value) for value in ["e.w", 3, {"e": 1}, [None], [3], [["e"]], True]]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: str(value)[:30])
def test_values_of_another_type(key: str, value: Any, tmp_path: Path, rng: Rng) -> None:
    refused(write_folder(tmp_path / "a", pair(rng, "q", 3, 5), **{key: value}), "wanted|do not fit|rank|alpha|dropout")


GOLDEN = Path(__file__).parent / "golden" / "linear" / CONFIG  # with every key that PEFT writes
KEYS = [*json.loads(GOLDEN.read_text()), "later"]


@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_any_key_is_read_or_refused(key: str, tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "q", 3, 5) | {"n.weight": np.ones(3, "float32")} | embedding_pair(rng, "emb", 7, 5)
    for value in [*ODD, {"q": 1}, [1], ["q"], {"q": {"q": "q"}}]:
        folder = write_folder(tmp_path / "a", tensors, **{key: value})
        read_or_refused(folder)


def read_or_refused(folder: Path) -> str:
    """A JloraError is a refusal; what is read can be written. Every other exception is a failure."""
    try:
        adapters, config = read_peft(folder)
        write_peft(folder.parent / "again", adapters, config)
    except jlora.JloraError:
        return "refused"
    assert read_peft(folder.parent / "again")[1] == config
    return "read"


def test_damaged_files_are_read_or_refused(tmp_path: Path, rng: Rng) -> None:
    tensors = pair(rng, "m.q", 3, 5) | pair(rng, "c", 7, (3, 2), 3) | {"n.weight": np.ones(3, "float32")}
    tensors |= embedding_pair(rng, "emb", 7, 5) | experts_pair(rng, "m.e", 3, 7, 5)
    sizes = {"m.q": (3,), "c": (1, 7, 1), "emb": (5,)}
    tensors |= {f"{name}.lora_magnitude_vector": np.ones(size, "float32") for name, size in sizes.items()}
    fields = {"rank_pattern": {"c": 3}, "alpha_pattern": {r".*\.q": 1.5}, "target_parameters": ["e.w"]}
    first = write_folder(tmp_path / "first", tensors, **fields, init_lora_weights=True, use_rslora=True)
    other = write_folder(tmp_path / "other", pair(rng, "x", 3, 5))
    assert read_or_refused(first) == "read"
    counts = {"read": 0, "refused": 0}
    for case in range(300):
        folder, seeded = tmp_path / "case" / "a", np.random.default_rng((5, case))
        shutil.copytree(first, folder)
        done = [mutate(folder, other, seeded) for _ in range(seeded.integers(1, 3))]
        try:
            counts[read_or_refused(folder)] += 1
        except Exception as error:
            raise AssertionError(f"case {case}, {done}: {type(error).__name__}: {error}") from error
        shutil.rmtree(tmp_path / "case")
    assert min(counts.values()) > 5


def test_missing_files(tmp_path: Path, rng: Rng) -> None:
    refused(tmp_path / "nowhere", "adapter_config.json: cannot be read: No such file")
    folder = write_folder(tmp_path / "a", pair(rng, "q", 3, 5))
    (folder / TENSORS).unlink()
    refused(folder, "adapter_model.safetensors: cannot be read: No such file")
    assert is_peft_folder(folder)
    assert not is_peft_folder(tmp_path)
    assert not is_peft_folder(tmp_path / "nowhere")


def test_a_file_is_no_folder(tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "a", pair(rng, "q", 3, 5))
    refused(folder / TENSORS, "cannot be read: Not a directory")


def test_an_adapter_of_nothing(tmp_path: Path) -> None:
    refused(write_folder(tmp_path / "a", {}), "adapter_model.safetensors holds no tensors")


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", "{", '{"peft_type": "LORA", "r": NaN}', '{"r": 1, "r": 2}', "\udc80"]
)
def test_a_configuration_that_is_no_json(text: str, tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path / "a", pair(rng, "q", 3, 5))
    (folder / CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(folder, "adapter_config.json: not valid JSON")
    assert is_peft_folder(folder)  # so that the commands tell of this file


def test_jloras_own_folder_is_named(tmp_path: Path, rng: Rng) -> None:
    storage = pytest.importorskip("jlora.storage")
    params = {"q": {"kernel": jnp.ones((5, 3))}}
    config = jlora.LoraConfig(rank=2)
    storage.save_adapters(tmp_path / "own", jlora.init_lora(None, params, config), config)
    refused(tmp_path / "own", "has no peft_type, .*; jlora's own are read by load_adapters")


def entry(rng: Rng, a: tuple[int, ...] = (5, 2), b: tuple[int, ...] = (2, 3)) -> dict[str, Any]:
    return {"A": jnp.asarray(rng.standard_normal(a), "float32"), "B": jnp.asarray(rng.standard_normal(b), "float32")}


@pytest.mark.parametrize(
    ("adapters", "roles", "message"),
    [
        ({}, {}, "there is none to write"),
        ({"q.weight": None}, {}, "there is none to write"),
        ({"q.weight": 3}, {}, "q.weight: found no adapter"),
        ({"q.weight": "AB"}, {}, "q.weight: the axes are not known; give the configuration factorizations"),
        ({"q.w": "AB"}, {"q.w": "io"}, "a parameter with the axes 'io': PEFT has"),
        ({"q.weight": "AB3"}, {"q.weight": "bio"}, "a weight with the axes 'bio' in the Hugging Face model"),
        ({"q.weight": "A2"}, {"q.weight": "iio"}, "axes 'iio'"),
    ],
)
def test_adapters_that_peft_has_no_place_for(adapters: Any, roles: Any, message: str, tmp_path: Path, rng: Rng) -> None:
    kinds = {"AB": entry(rng), "AB3": entry(rng, (4, 5, 2), (4, 2, 3)), "A2": entry(rng, (4, 5, 2))}
    tree = {name: kinds.get(value, value) for name, value in adapters.items()}
    config = jlora.LoraConfig(rank=2, factorizations=roles)
    with pytest.raises(jlora.DataError, match=message):
        write_peft(tmp_path / "a", tree, config)
    assert not (tmp_path / "a").exists()


def test_what_is_no_configuration(tmp_path: Path, rng: Rng) -> None:
    with pytest.raises(jlora.ConfigError, match="wanted a LoraConfig"):
        write_peft(tmp_path / "a", {"q.weight": entry(rng)}, {"rank": 2})  # type: ignore[arg-type]
    config = jlora.LoraConfig(rank=2, extras={"peft": "[]"}, factorizations={"*": "oi"})
    with pytest.raises(jlora.ConfigError, match=r"extras\['peft'\] is not what jlora.interop.peft keeps there"):
        write_peft(tmp_path / "a", {"q.weight": entry(rng)}, config)


def test_a_rank_that_the_configuration_does_not_say(tmp_path: Path, rng: Rng) -> None:
    config = jlora.LoraConfig(rank=4, factorizations={"*": "oi"})
    with pytest.raises(jlora.JloraError, match=r"q.weight: A \(5, 2\) .*rank 4"):
        write_peft(tmp_path / "a", {"q.weight": entry(rng)}, config)


def test_what_peft_cannot_have_beside_parameters(tmp_path: Path, rng: Rng) -> None:
    adapters = {"m.w": entry(rng, (3, 5, 2), (3, 2, 7)), "q.weight": entry(rng)}
    config = jlora.LoraConfig(rank=2, factorizations={"m.w": "boi", "q.weight": "oi"})
    write_peft(tmp_path / "a", adapters, config)
    with pytest.raises(jlora.DataError, match=r"m.w is a parameter, beside which PEFT does not have dropout"):
        write_peft(tmp_path / "b", adapters, config.replace(dropout=0.1))
    roles = {"m.w": "boi", "q.weight": "io"}
    with pytest.raises(jlora.DataError, match=r"m.w is a parameter, beside which PEFT does not have Conv1D"):
        write_peft(tmp_path / "b", adapters, config.replace(factorizations=roles))
    assert not (tmp_path / "b").exists()


def test_a_and_b_of_two_ranks(tmp_path: Path, rng: Rng) -> None:
    config = jlora.LoraConfig(rank=2, factorizations={"*": "oi"})
    with pytest.raises(jlora.DataError, match=r"q.weight: A \(5, 2\) and B \(3, 7\) do not fit"):
        write_peft(tmp_path / "a", {"q.weight": entry(rng, (5, 2), (3, 7))}, config)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", jnp.bfloat16, jnp.float8_e5m2])
@pytest.mark.parametrize("part", ["A", "B", "magnitude", "offset", "value"])
def test_numbers_that_are_not_finite_are_not_written(
    part: str, dtype: Any, value: float, tmp_path: Path, rng: Rng
) -> None:
    entries: dict[str, Any] = {"k.weight": entry(rng), "q.weight": entry(rng)}
    path = {"offset": "q.bias", "value": "n.weight"}.get(part, "q.weight")
    array = entries["q.weight"][part] if part in "AB" else np.ones(3)
    array = np.asarray(array, np.float32).astype(dtype)
    array.flat[2] = value
    entries[path] = {**entries.get(path, {}), part: array}
    config = jlora.LoraConfig(rank=2, factorizations={"*.weight": "oi"})
    with pytest.raises(jlora.DataError, match=rf"a: {part} of {path} holds a NaN or an infinity$"):
        write_peft(tmp_path / "a", entries, config)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("part", "dtype"),
    [(part, dtype) for part in ("A", "B", "magnitude", "offset") for dtype in ("int32", "int8", "bool", "complex64")]
    + [("value", "complex64")],
)
def test_numbers_that_are_not_floating_are_not_written(part: str, dtype: str, tmp_path: Path, rng: Rng) -> None:
    entries: dict[str, Any] = {"q.weight": entry(rng)}
    path = {"offset": "q.bias", "value": "n.weight"}.get(part, "q.weight")
    array = entries["q.weight"][part] if part in "AB" else np.ones(3)
    entries[path] = {**entries.get(path, {}), part: np.asarray(array).astype(dtype)}
    config = jlora.LoraConfig(rank=2, factorizations={"*.weight": "oi"})
    with pytest.raises(jlora.DataError, match=rf"{part} of {path} has the dtype {dtype}: wanted a floating one$"):
        write_peft(tmp_path / "a", entries, config)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("others", [{}, {"k.weight"}])
def test_an_offset_of_a_module_that_has_no_a_and_b_is_not_written(others: set[str], tmp_path: Path, rng: Rng) -> None:
    """PEFT would pass it over."""
    entries: dict[str, Any] = {name: entry(rng) for name in others} | {"q.bias": {"offset": np.ones(3, np.float32)}}
    config = jlora.LoraConfig(rank=2, factorizations={"*.weight": "oi"})
    with pytest.raises(jlora.DataError, match=r"q.bias: an offset without A and B of q.weight: .*as a value$"):
        write_peft(tmp_path / "a", entries, config)
    assert not (tmp_path / "a").exists()


def test_every_array_that_is_wrong_is_named(tmp_path: Path, rng: Rng) -> None:
    entries = {f"{name}.weight": entry(rng) for name in "qkv"}
    wrong = {"q.weight": {name: part.astype(int) for name, part in entries["q.weight"].items()}}
    wrong["v.weight"] = {name: part * np.nan for name, part in entries["v.weight"].items()}
    config = jlora.LoraConfig(rank=2, factorizations={"*": "oi"})
    with pytest.raises(jlora.DataError, match=r"a: 4 problems:\n  A of q.*\n  B of q.*\n  A of v.*\n  B of v"):
        write_peft(tmp_path / "a", entries | wrong, config)


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("q", {"alpha": 1e305}, "lora_alpha = 9{16}.*wanted a number"),
        ("q", {"alpha_pattern": {"q.weight": -1e300}}, "alpha_pattern = .*wanted a mapping from patterns to numbers"),
        ("q" * 2001, {"alpha_pattern": {"*": 3}}, "a pattern of more than 2,000 characters"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(
    name: str, changes: Any, what: str, tmp_path: Path, rng: Rng
) -> None:
    config = jlora.LoraConfig(rank=2, factorizations={"*": "oi"}).replace(**changes)
    with pytest.raises(jlora.DataError, match=f"PEFT would read something else, or nothing: {what}"):
        write_peft(tmp_path / "a", {f"{name}.weight": entry(rng)}, config)
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, rng: Rng) -> None:
    (tmp_path / "file").write_text("")
    config = jlora.LoraConfig(rank=2, factorizations={"*": "oi"})
    with pytest.raises(jlora.DataError, match="file/a: is a file, or lies in one: wanted a folder"):
        write_peft(tmp_path / "file" / "a", {"q.weight": entry(rng)}, config)


def test_what_was_there_is_replaced(tmp_path: Path, rng: Rng) -> None:
    config = jlora.LoraConfig(rank=2, factorizations={"*": "oi"})
    for name in ("q.weight", "k.weight"):
        write_peft(tmp_path / "a", {name: entry(rng)}, config)
    assert set(read_peft(tmp_path / "a")[0]) == {"k.weight"}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [CONFIG, TENSORS]
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["target_modules"] == ["k"]


def test_what_a_configuration_leaves_out_is_as_in_peft(tmp_path: Path, rng: Rng) -> None:
    folder = write_folder(tmp_path, pair(rng, "up", 7, 5, rank=8))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    _, config = read_peft(folder)
    assert (config.rank, config.alpha, config.dropout, config.scaling) == (8, 8.0, 0.0, "standard")
