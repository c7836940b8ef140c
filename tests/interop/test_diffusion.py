"""LoRA files of diffusion models, by hand against sums in float64."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import JloraWarning, checkpoints, cli
from jlora.disk import Checkpoint, write_tensors
from jlora.errors import DataError
from jlora.interop.diffusion import is_lora_file, read_lora_file
from tests.interop import real_diffusers
from tests.interop.files import Rng, write_folder

# name in the checkpoint -> shape
UNET = {
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": (11, 7),
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0": (7, 11),
    "down_blocks.0.resnets.0.conv1": (5, 3, 2, 3),
    "down_blocks.0.attentions.1.proj_in": (7, 7, 1, 1),
}
TEXT = {"text_model.encoder.layers.0.self_attn.q_proj": (13, 13), "text_model.encoder.layers.0.mlp.fc1": (17, 13)}


def normal(rng: Rng, *shape: int) -> Any:
    return rng.standard_normal(shape).astype("float32")


def write_file(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        write_tensors(file, tensors, metadata)
    return path


def base_of(rng: Rng, folder: Path, shapes: dict[str, tuple[int, ...]], prefix: str = "") -> dict[str, Any]:
    tensors = {f"{prefix}{name}.weight": normal(rng, *shape) for name, shape in shapes.items()}
    write_file(folder / "model.safetensors", tensors | {"other.bias": normal(rng, 3)})
    return tensors


def pair(rng: Rng, shape: tuple[int, ...], rank: int) -> tuple[Any, Any]:
    """Down and up of a weight."""
    out, *ins = shape
    return normal(rng, rank, *ins), normal(rng, out, rank, *(1 for _ in ins[1:]))


def delta(down: Any, up: Any, alpha: float | None) -> Any:
    """The update, in float64."""
    rank = down.shape[0]
    wide = np.einsum("or,r...->o...", up.astype(np.float64).reshape(len(up), rank), down.astype(np.float64))
    return wide * (1.0 if alpha is None else alpha / rank)


WAYS = {  # how the keys of down, up and alpha are written
    "kohya": (lambda name: "lora_unet_" + name.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"),
    "comfy": (lambda name: f"diffusion_model.{name}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": (lambda name: f"unet.{name}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers 0.20": (lambda name: f"unet.{name}", ".lora.down.weight", ".lora.up.weight"),
    "linear layer": (lambda name: name, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


@pytest.mark.parametrize("way", WAYS)
def test_merge_adds_alpha_by_rank_of_each_module(way: str, tmp_path: Path, rng: Rng) -> None:
    named, down_key, up_key = WAYS[way]
    base = base_of(rng, tmp_path / "base", UNET)
    tensors, wanted = {}, {}
    for (name, shape), rank, alpha in zip(UNET.items(), (2, 3, 2, 5), (1.0, 4.5, None, 5.0), strict=True):
        down, up = pair(rng, shape, rank)
        tensors |= {f"{named(name)}{down_key}": down, f"{named(name)}{up_key}": up}
        tensors |= {} if alpha is None else {f"{named(name)}.alpha": np.float32(alpha).reshape(())}
        wanted[f"{name}.weight"] = base[f"{name}.weight"] + delta(down, up, alpha)
    path = write_file(tmp_path / "x.safetensors", tensors, {"ss_network_dim": "4"})
    assert is_lora_file(path)
    checkpoints.merge(tmp_path / "base", path, tmp_path / "merged")
    merged = Checkpoint(tmp_path / "merged")
    for name, value in wanted.items():
        np.testing.assert_allclose(merged.read(name), value, rtol=0, atol=1e-5, err_msg=name)
    checkpoints.unmerge(tmp_path / "merged", path, tmp_path / "again")
    for name, value in base.items():
        np.testing.assert_allclose(Checkpoint(tmp_path / "again").read(name), value, rtol=0, atol=1e-5, err_msg=name)


def test_the_processors_of_old_versions(tmp_path: Path, rng: Rng) -> None:
    names = {"a.attn1.to_q": (11, 7), "a.attn1.to_out.0": (7, 11)}
    base = base_of(rng, tmp_path / "base", names)
    (down, up), (down_out, up_out) = (pair(rng, shape, 3) for shape in names.values())
    tensors = {
        "unet.a.attn1.processor.to_q_lora.down.weight": down,
        "unet.a.attn1.processor.to_q_lora.up.weight": up,
        "unet.a.attn1.processor.to_out_lora.down.weight": down_out,
        "unet.a.attn1.processor.to_out_lora.up.weight": up_out,
    }
    checkpoints.merge(tmp_path / "base", write_file(tmp_path / "x.safetensors", tensors), tmp_path / "merged")
    for name, update in zip(names, (delta(down, up, None), delta(down_out, up_out, None)), strict=True):
        found = Checkpoint(tmp_path / "merged").read(f"{name}.weight")
        np.testing.assert_allclose(found, base[f"{name}.weight"] + update, rtol=0, atol=1e-5, err_msg=name)


def test_a_middle_is_folded_into_the_first_convolution(tmp_path: Path, rng: Rng) -> None:
    base = base_of(rng, tmp_path / "base", {"m.conv": (5, 3, 2, 3)})
    down, mid, up = normal(rng, 4, 3, 1, 1), normal(rng, 4, 4, 2, 3), normal(rng, 5, 4, 1, 1)
    name = "lora_unet_m_conv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid, f"{name}.lora_up.weight": up}
    tensors[f"{name}.alpha"] = np.float32(3).reshape(())
    checkpoints.merge(tmp_path / "base", write_file(tmp_path / "x.safetensors", tensors), tmp_path / "merged")
    wide = [array.astype(np.float64) for array in (up[:, :, 0, 0], mid, down[:, :, 0, 0])]
    wanted = base["m.conv.weight"] + 3 / 4 * np.einsum("or,rskl,si->oikl", *wide)
    np.testing.assert_allclose(Checkpoint(tmp_path / "merged").read("m.conv.weight"), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["matrix for a convolution", "convolution for a matrix"])
def test_matrices_and_convolutions_of_one_element_are_the_same(way: str, tmp_path: Path, rng: Rng) -> None:
    ones = (1, 1) if way == "matrix for a convolution" else ()
    base = base_of(rng, tmp_path / "base", {"m.proj_in": (11, 7, *ones)})
    down, up = pair(rng, (11, 7), 3)
    more = () if ones else (1, 1)
    tensors = {
        "lora_unet_m_proj_in.lora_down.weight": down.reshape(3, 7, *more),
        "lora_unet_m_proj_in.lora_up.weight": up.reshape(11, 3, *more),
    }
    checkpoints.merge(tmp_path / "base", write_file(tmp_path / "x.safetensors", tensors), tmp_path / "merged")
    wanted = base["m.proj_in.weight"] + delta(down, up, None).reshape(11, 7, *ones)
    np.testing.assert_allclose(Checkpoint(tmp_path / "merged").read("m.proj_in.weight"), wanted, rtol=0, atol=1e-5)


def test_the_configuration_in_the_metadata_gives_rank_alpha_and_rslora(tmp_path: Path, rng: Rng) -> None:
    shapes = {"blocks.0.to_q": (11, 7), "blocks.1.to_q": (11, 7), "blocks.1.ff": (5, 7)}
    base = base_of(rng, tmp_path / "base", shapes)
    config = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"ff": 2}, "alpha_pattern": {"1.to_q": 9}}
    packed = {f"transformer.{key}": value for key, value in config.items()}
    tensors, updates = {}, {}
    for (name, shape), rank, alpha in zip(shapes.items(), (4, 4, 2), (6, 9, 6), strict=True):
        down, up = pair(rng, shape, rank)
        tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        updates[f"{name}.weight"] = delta(down, up, alpha * np.sqrt(rank))
    path = write_file(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": json.dumps(packed)})
    checkpoints.merge(tmp_path / "base", path, tmp_path / "merged")
    for name, update in updates.items():
        found = Checkpoint(tmp_path / "merged").read(name)
        np.testing.assert_allclose(found, base[name] + update, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("flat", [True, False])
def test_components_that_the_checkpoint_does_not_have_are_left_out_and_named(
    flat: bool, tmp_path: Path, rng: Rng
) -> None:
    tensors, deltas = {}, {}
    components = {"lora_unet_" if flat else "unet.": UNET, "lora_te_" if flat else "text_encoder.": TEXT}
    for prefix, shapes in components.items():
        for name, shape in shapes.items():
            down, up = pair(rng, shape, 2)
            module = prefix + (name.replace(".", "_") if flat else name)
            tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
            deltas[f"{name}.weight"] = delta(down, up, None)
    path = write_file(tmp_path / "x.safetensors", tensors)
    for number, (shapes, absent) in enumerate(((UNET, "2 modules of lora_te"), (TEXT, "4 modules of lora_unet"))):
        base = base_of(rng, tmp_path / f"base{number}", shapes)
        wanted = absent if flat else absent.replace("lora_te", "text_encoder").replace("lora_unet", "unet")
        with pytest.warns(JloraWarning, match=f"left out, as the checkpoint has no tensor for them: {wanted}"):
            checkpoints.merge(tmp_path / f"base{number}", path, tmp_path / f"merged{number}")
        for name, value in base.items():
            found = Checkpoint(tmp_path / f"merged{number}").read(name)
            np.testing.assert_allclose(found, value + deltas[name], rtol=0, atol=1e-5, err_msg=name)


def test_one_file_of_all_components(tmp_path: Path, rng: Rng) -> None:
    """A checkpoint of one file, whose components lie behind prefixes."""
    prefixes = {"lora_unet_": ("model.diffusion_model.", UNET), "lora_te_": ("cond_stage_model.transformer.", TEXT)}
    base: dict[str, Any] = {}
    tensors, deltas = {}, {}
    for component, (prefix, shapes) in prefixes.items():
        for name, shape in shapes.items():
            base[f"{prefix}{name}.weight"] = normal(rng, *shape)
            down, up = pair(rng, shape, 2)
            module = component + name.replace(".", "_")
            tensors |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
            deltas[f"{prefix}{name}.weight"] = delta(down, up, None)
    checkpoint = write_file(tmp_path / "base.safetensors", base)
    checkpoints.merge(checkpoint, write_file(tmp_path / "x.safetensors", tensors), tmp_path / "merged")
    for name, value in base.items():
        found = Checkpoint(tmp_path / "merged").read(name)
        np.testing.assert_allclose(found, value + deltas[name], rtol=0, atol=1e-5, err_msg=name)


def lora(rng: Rng, path: Path, module: str) -> Path:
    down, up = pair(rng, (7, 7), 2)
    return write_file(path, {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up})


AMBIGUOUS = {
    "two dots": ("lora_unet_a_b_c", ["a.b_c", "a_b.c"], r"may be any of a\.b_c(,| and) a_b\.c"),
    "two places": ("lora_unet_b_c", ["x.b.c", "y.b.c"], r"may be any of x\.b\.c(,| and) y\.b\.c"),
    "none": ("lora_unet_b_d", ["b.c"], "the checkpoint has no such tensor"),
    "the other text encoder": ("lora_te2_m_q", ["conditioner.embedders.0.m.q"], "the checkpoint has no such tensor"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_names_that_the_checkpoint_does_not_decide_are_refused(case: str, tmp_path: Path, rng: Rng) -> None:
    module, names, message = AMBIGUOUS[case]
    base_of(rng, tmp_path / "base", dict.fromkeys(names, (7, 7)))
    with pytest.raises(DataError, match=message):
        checkpoints.merge(tmp_path / "base", lora(rng, tmp_path / "x.safetensors", module), tmp_path / "merged")


def test_a_mapping_renames_flattened_names(tmp_path: Path, rng: Rng, capsys: pytest.CaptureFixture[str]) -> None:
    path = lora(rng, tmp_path / "x.safetensors", "lora_unet_double_blocks_3_img_qkv")
    rows = 'row = [{name = "lora_unet_double_blocks_{i}_img_qkv.weight", path = "double/{i}/img/qkv/weight"}]\n'
    (tmp_path / "rows.toml").write_text(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = ["convert", path, "--to", "peft", "--out", tmp_path / "out", "--mapping", tmp_path / "rows.toml"]
        assert cli.main([*map(str, arguments)]) == 0
    capsys.readouterr()
    data = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert data["target_modules"] == ["double.3.img.qkv"]


def test_convert_and_inspect_keep_flattened_names_and_say_so(
    tmp_path: Path, rng: Rng, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lora(rng, tmp_path / "x.safetensors", "lora_unet_m_q")
    for arguments in (["convert", path, "--to", "own", "--out", tmp_path / "out"], ["inspect", path]):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert cli.main([*map(str, arguments)]) == 0
        assert "1 names have underscores for dots and stay so, such as lora_unet_m_q/weight" in capsys.readouterr().err
    with pytest.warns(JloraWarning), pytest.raises(DataError, match="the format peft has no place for: give the base"):
        checkpoints.convert(path, tmp_path / "peft", "peft")
    base_of(rng, tmp_path / "base", {"m.q": (7, 7)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["inspect", str(path), "--base", str(tmp_path / "base")]) == 0
        assert "m/q/weight" in capsys.readouterr().out
        checkpoints.convert(path, tmp_path / "peft", "peft", base=tmp_path / "base")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"] == ["m.q"]


def test_a_file_is_converted_to_peft_with_its_alphas(tmp_path: Path, rng: Rng) -> None:
    tensors = {}
    for number, (rank, alpha) in enumerate(((2, 1.0), (3, 6.0), (2, 4.0))):
        down, up = pair(rng, (11, 7), rank)
        tensors |= {f"transformer.{number}.q.lora_down.weight": down, f"transformer.{number}.q.lora_up.weight": up}
        tensors[f"transformer.{number}.q.alpha"] = np.float32(alpha).reshape(1)
    checkpoints.convert(write_file(tmp_path / "x.safetensors", tensors), tmp_path / "peft", "peft")
    data = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    ranks = [data["rank_pattern"].get(f"transformer.{number}.q", data["r"]) for number in range(3)]
    alphas = [data["alpha_pattern"].get(f"transformer.{number}.q", data["lora_alpha"]) for number in range(3)]
    assert (ranks, alphas) == ([2, 3, 2], [1, 6, 4])


def test_hundreds_of_modules_with_alphas_of_their_own(tmp_path: Path, rng: Rng) -> None:
    tensors = {}
    for number in range(800):
        tensors |= {f"unet.m.{number}.lora_down.weight": normal(rng, 1, 2)}
        tensors |= {f"unet.m.{number}.lora_up.weight": normal(rng, 2, 1)}
        tensors |= {f"unet.m.{number}.alpha": np.float32(number + 1).reshape(())}
    _, config = read_lora_file(write_file(tmp_path / "x.safetensors", tensors))
    assert [config.scaling_of(f"unet.m.{number}.weight") for number in (0, 313, 799)] == [1, 314, 800]


Q = "unet.m.q"
PAIR = {f"{Q}.lora_down.weight": (2, 7), f"{Q}.lora_up.weight": (11, 2)}
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "LoHa": ({f"{Q}.hada_w1_a": (7, 2), f"{Q}.hada_w1_b": (2, 7)}, "hada_w1_a: LoHa, which is no product of two"),
    "LoKr": ({f"{Q}.lokr_w1": (7, 2)}, "lokr_w1: LoKr"),
    "dora_scale": (PAIR | {f"{Q}.dora_scale": (11, 1)}, "DoRA as LyCORIS has it, over whose norm"),
    "diff": (PAIR | {"unet.m.norm.diff_b": (7,)}, "the difference of a whole tensor"),
    "unknown": (PAIR | {f"{Q}.what": (7,)}, "what: no part of a LoRA that jlora knows"),
    "alone": ({f"{Q}.lora_up.weight": (7, 2), f"{Q}.alpha": ()}, "without a down"),
    "shapes": ({f"{Q}.lora_down.weight": (7, 2), f"{Q}.lora_up.weight": (3, 11)}, r"wanted \(r, in\.\.\.\)"),
    "mid": (PAIR | {f"{Q}.lora_mid.weight": (2, 3, 1, 1)}, r"mid \(2, 3, 1, 1\) do not fit"),
    "alpha": (PAIR | {f"{Q}.alpha": (2,)}, "alpha: wanted one finite number"),
    "twice": (PAIR | {f"{Q}.lora_A.weight": (2, 7)}, "both the down of"),
    "PEFT": (
        {"base_model.model.q.lora_A.weight": (2, 7), "base_model.model.q.lora_B.weight": (7, 2)},
        "keeps the scaling in adapter_config.json: give the folder",
    ),
    "mlx": ({"m.q.lora_a": (2, 7), "m.q.lora_b": (7, 2)}, "mlx-lm's: give the folder"),
    "nothing": (
        {"model.diffusion_model.q.weight": (2, 7)},
        "no LoRA: its tensors are those of a model, such as 'model",
    ),
    "beside a model": (PAIR | {"time_embedding.weight": (2, 7)}, "time_embedding.weight: no part of a LoRA that jlora"),
    "IA3": ({f"{Q}.weight": (7,), f"{Q}.on_input": ()}, "on_input: IA3, which scales what goes in or out"),
    "GLoRA": ({f"{Q}.a1.weight": (2, 7)}, "a1.weight: GLoRA"),
    "norm": (PAIR | {"unet.n.w_norm": (7,)}, "w_norm: a norm that was trained beside it"),
    "embedding": (PAIR | {"bundle_emb.x.string_to_param.*": (2, 7)}, "an embedding that was trained beside it"),
    "XLabs": ({"b.0.processor.qkv_lora1.down.weight": (2, 7)}, "XLabs' names, of processors"),
    "control": ({"lora_controlnet": ()}, "lora_controlnet: ControlLoRA, which has layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_read_it_names(case: str, tmp_path: Path, rng: Rng) -> None:
    shapes, message = REFUSED[case]
    path = write_file(tmp_path / "x.safetensors", {name: normal(rng, *shape) for name, shape in shapes.items()})
    with pytest.raises(DataError, match=message):
        checkpoints.read_adapters(path)


@pytest.mark.parametrize("size", [np.inf, np.nan, 1e30])
def test_numbers_that_are_not_finite_are_refused(size: float, tmp_path: Path, rng: Rng) -> None:
    """Also where only the product of two of them is not."""
    names = {f"{Q}.lora_down.weight": (2, 3, 1, 1), f"{Q}.lora_mid.weight": (2, 2, 3, 3), f"{Q}.lora_up.weight": (5, 2)}
    tensors = {name: np.full(shape, size, np.float32) for name, shape in names.items()}
    with pytest.raises(DataError, match=r"A of unet\.m\.q\.weight holds a NaN or an infinity"):
        read_lora_file(write_file(tmp_path / "x.safetensors", tensors))


def test_metadata_that_contradicts_is_refused(tmp_path: Path, rng: Rng) -> None:
    tensors = {name: normal(rng, *shape) for name, shape in PAIR.items()}
    cases = (
        (json.dumps({"unet.r": 3}), tensors, "m.q: the rank is 2, and 3 in the metadata"),
        ("{", tensors, "is not valid JSON"),
        (json.dumps({"unet.r": 2}), tensors | {f"{Q}.alpha": normal(rng)}, "an alpha, and one in the metadata"),
        (json.dumps({"unet.r": "2"}), tensors, "r = '2': wanted a whole number"),
    )
    for text, held, message in cases:
        path = write_file(tmp_path / "x.safetensors", held, {"lora_adapter_metadata": text})
        with pytest.raises(DataError, match=message):
            read_lora_file(path)


def test_checkpoints_of_one_file_are_still_compared_as_such(tmp_path: Path, rng: Rng) -> None:
    for name in ("one", "two"):
        write_file(tmp_path / f"{name}.safetensors", {"m.weight": normal(rng, 7, 2)})
    found = checkpoints.diff(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert found.counts()["changed"] == 1  # type: ignore[union-attr]
    path = lora(rng, tmp_path / "x.safetensors", "unet.m.q")
    assert checkpoints.diff(path, path).is_identical
    folder = write_folder(
        tmp_path / "peft", {"m.q.lora_A.weight": normal(rng, 2, 7), "m.q.lora_B.weight": normal(rng, 7, 2)}
    )
    assert not checkpoints.diff(path, folder).is_identical


def test_a_folder_of_one_file_is_that_file(tmp_path: Path, rng: Rng) -> None:
    base_of(rng, tmp_path / "base", {"m.q": (7, 7)})
    path = lora(rng, tmp_path / "x" / "pytorch_lora_weights.safetensors", "lora_unet_m_q")
    (tmp_path / "x" / "README.md").write_text("LoRA")
    for number, given in enumerate((path, path.parent)):
        checkpoints.merge(tmp_path / "base", given, tmp_path / str(number))
    found = [Checkpoint(tmp_path / str(number)).read("m.q.weight") for number in range(2)]
    np.testing.assert_array_equal(*found)
    assert (found[0] != Checkpoint(tmp_path / "base").read("m.q.weight")).any()
    lora(rng, tmp_path / "x" / "other.safetensors", "lora_unet_m_q")
    with pytest.raises(DataError, match=r"holds several LoRA files, other\.safetensors.*: give one of them"):
        checkpoints.inspect(path.parent)


@pytest.mark.slow
def test_what_diffusers_says(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    if not real_diffusers.install(tmp_path / "packages"):
        pytest.skip("pip cannot install diffusers here")

    def run(*arguments: Any) -> None:
        command = [sys.executable, "-W", "ignore", real_diffusers.__file__, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "packages"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]

    run("make", tmp_path)
    base = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    for name in ("kohya", "diffusers"):
        checkpoints.merge(base, tmp_path / f"{name}.safetensors", tmp_path / name)
        (merged,) = (tmp_path / name).glob("*.safetensors")
        run("says", tmp_path, merged, tmp_path / "found.npy")
        wanted = np.load(tmp_path / f"{name}.npy")
        assert np.abs(np.load(tmp_path / "plain.npy") - wanted).max() > 0.05
        np.testing.assert_allclose(np.load(tmp_path / "found.npy"), wanted, rtol=0, atol=1e-5, err_msg=name)
