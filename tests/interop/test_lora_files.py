"""LoRA files of diffusion models that jlora writes: read by diffusers itself, and read back, against float64."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import JloraWarning, LoraConfig, checkpoints, cli
from jlora.disk import Checkpoint, TensorFile, dry_run
from jlora.errors import DataError
from jlora.interop.diffusion import is_lora_file, read_lora_file, write_diffusers, write_kohya
from jlora.interop.peft import NESTED
from jlora.paths import literal_pattern, nest
from tests.faults import SOME_KINDS, at_every_call
from tests.interop import real_diffusers
from tests.interop.files import Rng
from tests.interop.test_diffusion import normal, write_file

SHAPES = {
    "unet.down_blocks.0.attn1.to_q": (11, 7),
    "unet.down_blocks.0.attn1.to_out.0": (7, 11),
    "unet.resnets.0.conv1": (5, 3, 2, 3),
    "text_encoder.text_model.layers.0.q_proj": (13, 5),
}


def made(rng: Rng, shapes: dict[str, tuple[int, ...]], scaling: str = "standard", one: bool = False) -> Any:
    """Entries by path of several ranks and alphas, their configuration, and the updates by module in float64."""
    entries, updates = {}, {}
    ranks, alphas, roles = {}, {}, {}
    for number, (name, (out, *ins)) in enumerate(shapes.items()):
        path = f"{name}.weight".replace(".", "/")
        rank, alpha = 2 + number % 3, 1.5 + number % 4
        a, b = normal(rng, *ins, rank), normal(rng, rank, out)
        entries[path] = {"A": a, "B": b}
        ranks[literal_pattern(path)], roles[literal_pattern(path)] = rank, "o" + "i" * len(ins)
        alphas[literal_pattern(path)] = rank if one else alpha
        factor = 1.0 if one else alpha / rank if scaling == "standard" else alpha / np.sqrt(rank)
        wide = np.tensordot(a.astype(np.float64), b.astype(np.float64), 1)
        updates[name] = factor * np.moveaxis(wide, -1, 0)
    config = LoraConfig(rank=2, scaling=scaling, rank_pattern=ranks, alpha_pattern=alphas, factorizations=roles)
    return entries, config, updates


def updates_of(file: Path, **how: Any) -> dict[str, Any]:
    """The updates by module that jlora reads in a file, in float64."""
    entries, config = read_lora_file(file, **how)
    found = {}
    for name, entry in entries.items():
        a, b = (np.asarray(entry[part], np.float64) for part in "AB")
        found[name.removesuffix(".weight")] = config.scaling_of(name) * np.moveaxis(np.tensordot(a, b, 1), -1, 0)
    return found


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_what_is_written_is_read_back(to: str, scaling: str, tmp_path: Path, rng: Rng) -> None:
    entries, config, updates = made(rng, SHAPES, scaling)
    checkpoints.write_adapters(tmp_path / "own", nest(entries), config, "own")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if to == "diffusers" else "error", JloraWarning)
        checkpoints.convert(tmp_path / "own", tmp_path / "out", to)
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert is_lora_file(file)
    bases = {component: {} for component in ("unet", "text_encoder")}
    for name, shape in SHAPES.items():
        component, _, module = name.partition(".")
        bases[component][f"{module}.weight"] = shape
    for component, shapes in bases.items():
        with pytest.warns(JloraWarning, match="left out, as the checkpoint has no tensor for them"):
            found = updates_of(file, shapes=shapes)
        wanted = {name: update for name, update in updates.items() if name.startswith(f"{component}.")}
        assert {f"{component}.{name}" for name in found} == wanted.keys()
        for name, update in wanted.items():
            np.testing.assert_allclose(found[name.removeprefix(f"{component}.")], update, rtol=0, atol=2e-5)


def test_kohya_has_underscores_and_one_alpha(tmp_path: Path, rng: Rng) -> None:
    entries, config, _ = made(rng, SHAPES)
    write_kohya(tmp_path / "x.safetensors", nest(entries), config, NESTED)
    with TensorFile(tmp_path / "x.safetensors") as file:
        shapes = {name: entry.shape for name, entry in file.entries.items()}
        alphas = {float(file.read(name)) for name in shapes if name.endswith(".alpha")}
    assert alphas == {4.5}
    assert shapes["lora_unet_down_blocks_0_attn1_to_out_0.lora_down.weight"] == (3, 11)
    assert shapes["lora_unet_down_blocks_0_attn1_to_out_0.lora_up.weight"] == (7, 3)
    assert shapes["lora_unet_resnets_0_conv1.lora_down.weight"] == (4, 3, 2, 3)
    assert shapes["lora_unet_resnets_0_conv1.lora_up.weight"] == (5, 4, 1, 1)
    assert shapes["lora_te_text_model_layers_0_q_proj.alpha"] == ()


def test_diffusers_keeps_ranks_and_alphas_in_the_metadata(tmp_path: Path, rng: Rng) -> None:
    entries, config, _ = made(rng, SHAPES)
    with pytest.warns(JloraWarning, match=r"scaling of 4 modules is not 1, such as 2\.25 of text_encoder/"):
        write_diffusers(tmp_path / "x.safetensors", nest(entries), config, NESTED)
    with TensorFile(tmp_path / "x.safetensors") as file:
        data = json.loads(file.metadata["lora_adapter_metadata"])
        assert "unet.down_blocks.0.attn1.to_out.0.lora_A.weight" in file.entries
    assert data["unet.target_modules"] == sorted(
        name.removeprefix("unet.") for name in SHAPES if name.startswith("unet.")
    )
    assert data["unet.rank_pattern"] == {"down_blocks.0.attn1.to_out.0": 3, "resnets.0.conv1": 4}
    assert data["text_encoder.alpha_pattern"] == {"text_model.layers.0.q_proj": 4.5}
    assert not any(key.startswith("unet.use_") and value for key, value in data.items())


def test_no_alpha_is_zero(tmp_path: Path, rng: Rng) -> None:
    """sd-scripts takes an alpha of 0 for the rank."""
    entry = {"A": normal(rng, 7, 2), "B": normal(rng, 2, 5)}
    config = LoraConfig(rank=2, alpha=0.0, factorizations={"**": "oi"})
    write_kohya(tmp_path / "x.safetensors", {"unet.q.weight": entry}, config)
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert file.read("lora_unet_q.alpha") == 1
        assert not file.read("lora_unet_q.lora_up.weight").any()


def test_components_are_said_where_the_names_do_not(
    tmp_path: Path, rng: Rng, capsys: pytest.CaptureFixture[str]
) -> None:
    entries, config, _ = made(rng, {"blocks.0.to_q": (11, 7), "text_encoder.q": (5, 7)}, one=True)
    checkpoints.write_adapters(tmp_path / "own", nest(entries), config, "own")
    for to, keys in (
        ("kohya", {"lora_transformer_blocks_0_to_q.lora_up.weight", "lora_te_q.lora_up.weight"}),
        ("diffusers", {"transformer.blocks.0.to_q.lora_B.weight", "text_encoder.q.lora_B.weight"}),
    ):
        out = tmp_path / f"{to}.safetensors"
        arguments = ["convert", tmp_path / "own", "--to", to, "--out", out]
        assert cli.main([*map(str, arguments)]) == 2
        assert "begins with none of unet" in capsys.readouterr().err
        assert cli.main([*map(str, arguments), "--component", "transformer"]) == 0
        with TensorFile(out) as file:
            assert keys < file.entries.keys()
        assert cli.main([*map(str, arguments), "--component", "transformer"]) == 2
        assert "is there already" in capsys.readouterr().err
        assert cli.main([*map(str, arguments), "--component", "transformer", "--force"]) == 0
    with pytest.raises(DataError, match="component 'unet' is of the formats kohya and diffusers, not of peft"):
        checkpoints.convert(tmp_path / "own", tmp_path / "peft", "peft", component="unet")
    with pytest.raises(DataError, match="component 'vae': wanted one of unet"):
        checkpoints.convert(tmp_path / "own", tmp_path / "x.safetensors", "kohya", component="vae")


def test_the_first_of_several_text_encoders_has_its_number(tmp_path: Path, rng: Rng) -> None:
    entries, config, _ = made(rng, {"text_encoder.q": (5, 7), "text_encoder_2.q": (5, 7)}, one=True)
    write_kohya(tmp_path / "x.safetensors", nest(entries), config, NESTED)
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert {"lora_te1_q.alpha", "lora_te2_q.alpha"} < file.entries.keys()


def test_flattened_names_stay_without_a_base_and_dots_come_with_one(tmp_path: Path, rng: Rng) -> None:
    down, up = normal(rng, 2, 7), normal(rng, 5, 2)
    tensors = {"lora_unet_m_to_q.lora_down.weight": down, "lora_unet_m_to_q.lora_up.weight": up}
    source = write_file(tmp_path / "x.safetensors", tensors)
    with pytest.warns(JloraWarning, match="underscores for dots"):
        checkpoints.convert(source, tmp_path / "y.safetensors", "kohya")
    with TensorFile(tmp_path / "y.safetensors") as file:
        np.testing.assert_array_equal(file.read("lora_unet_m_to_q.lora_up.weight"), up)
    with (
        pytest.warns(JloraWarning),
        pytest.raises(DataError, match=r"q/weight: has underscores for dots: give the base"),
    ):
        checkpoints.convert(source, tmp_path / "z.safetensors", "diffusers")
    write_file(tmp_path / "base" / "model.safetensors", {"m.to_q.weight": normal(rng, 5, 7)})
    checkpoints.convert(source, tmp_path / "z.safetensors", "diffusers", base=tmp_path / "base", component="unet")
    with TensorFile(tmp_path / "z.safetensors") as file:
        np.testing.assert_array_equal(file.read("unet.m.to_q.lora_B.weight"), up)


def test_names_that_cannot_be_read_back_are_refused(tmp_path: Path, rng: Rng) -> None:
    entries, config, _ = made(rng, {"unet.a.b_c": (5, 7), "unet.a_b.c": (5, 7)}, one=True)
    with pytest.raises(DataError, match=r"unet\.a\.b_c and unet\.a_b\.c: both lora_unet_a_b_c with underscores"):
        write_kohya(tmp_path / "x.safetensors", nest(entries), config, NESTED)
    write_diffusers(tmp_path / "x.safetensors", nest(entries), config, NESTED)
    entries, config, _ = made(rng, {"unet.a.b_c": (5, 7)}, one=True)
    checkpoints.write_adapters(tmp_path / "own", nest(entries), config, "own")
    for names, message in (
        (("a.b_c", "a_b.c"), r"lora_unet_a_b_c may be any of a\.b_c, a_b\.c"),
        (("a_b.c",), r"unet\.a\.b_c: lora_unet_a_b_c is a_b\.c in the checkpoint"),
    ):
        folder = tmp_path / names[0]
        write_file(folder / "model.safetensors", {f"{name}.weight": normal(rng, 5, 7) for name in names})
        with pytest.raises(DataError, match=message):
            checkpoints.convert(tmp_path / "own", tmp_path / "y.safetensors", "kohya", base=folder)
    write_file(tmp_path / "right" / "model.safetensors", {"a.b_c.weight": normal(rng, 5, 7)})
    checkpoints.convert(tmp_path / "own", tmp_path / "y.safetensors", "kohya", base=tmp_path / "right")


def test_dora_and_the_bias_of_a_b(tmp_path: Path, rng: Rng) -> None:
    entry = {"A": normal(rng, 7, 2), "B": normal(rng, 2, 5), "magnitude": normal(rng, 5) ** 2}
    adapters = {"unet.q.weight": entry, "unet.q.bias": {"offset": normal(rng, 5)}}
    config = LoraConfig(rank=2, alpha=2.0, target_modules=("unet.q.weight",), factorizations={"unet.q.weight": "oi"})
    write_diffusers(tmp_path / "x.safetensors", adapters, config)
    entries, found = read_lora_file(tmp_path / "x.safetensors")
    assert entries.keys() == adapters.keys()
    for path, parts in adapters.items():
        for part, value in parts.items():
            np.testing.assert_array_equal(entries[path][part], value)
    assert found.scaling_of("unet.q.weight") == 1
    with pytest.raises(
        DataError, match=r"(?s)q\.bias: a part offset.*q\.weight: a magnitude \(DoRA\), which diffusers leaves"
    ):
        write_kohya(tmp_path / "y.safetensors", adapters, config)
    del adapters["unet.q.weight"]["magnitude"]
    adapters["unet.k.weight"] = entry | {"magnitude": normal(rng, 5)}
    config = config.replace(target_modules=("unet.*.weight",), factorizations={"unet.*.weight": "oi"})
    with pytest.raises(DataError, match=r"unet\.q\.weight has no magnitude, others of unet have one"):
        write_diffusers(tmp_path / "y.safetensors", adapters, config)


REFUSED = {
    "whole": ({"value": (5, 7)}, "oi", "unet.q.weight", "unet.q.weight: a part value"),
    "embedding": ({"A": (7, 2), "B": (2, 5)}, "io", "unet.emb.weight", "unet.emb.weight: embedding of unet.emb.weight"),
    "conv1d": ({"A": (7, 2), "B": (2, 5)}, "io", "unet.q.weight", "conv1d of unet.q.weight; wanted the weight of a"),
    "experts": ({"A": (3, 7, 2), "B": (3, 2, 5)}, "boi", "unet.experts", "unet.experts: experts of unet.experts"),
    "another": ({"A": (7, 2), "B": (2, 5)}, "oi", "prior.q.weight", "a module of prior, which is none of unet"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_what_has_no_place_there_is_named(to: str, case: str, tmp_path: Path, rng: Rng) -> None:
    shapes, roles, name, message = REFUSED[case]
    entry = {part: normal(rng, *shape) for part, shape in shapes.items()}
    config = LoraConfig(rank=2, factorizations={"**": roles})
    write = {"kohya": write_kohya, "diffusers": write_diffusers}[to]
    program = "sd-scripts" if to == "kohya" else to
    with pytest.raises(DataError, match=f"x.safetensors: {program} has no place for.*{message}"):
        write(tmp_path / "x.safetensors", {name: entry}, config)
    assert not list(tmp_path.iterdir())


def test_where_it_is_written(tmp_path: Path, rng: Rng) -> None:
    entries, config, _ = made(rng, {"unet.q": (5, 7)}, one=True)
    with dry_run():
        write_kohya(tmp_path / "new" / "x.safetensors", nest(entries), config, NESTED)
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(DataError, match=r"x\.safetensors: is a folder"):
        write_kohya(tmp_path / "x.safetensors", nest(entries), config, NESTED)
    checkpoints.write_adapters(tmp_path / "own", nest(entries), config, "own")
    with pytest.raises(DataError, match=r"own: holds adapter_model\.safetensors too; give the name of a file"):
        write_kohya(tmp_path / "own", nest(entries), config, NESTED)
    write_kohya(tmp_path / "new", nest(entries), config, NESTED)
    with pytest.warns(JloraWarning, match="underscores for dots"):
        assert len(checkpoints.inspect(tmp_path / "new").entries) == 1


def chosen(folder: Path, component: str) -> dict[str, tuple[int, ...]]:
    """Modules of a real model, of each kind some."""
    names = {"unet": "unet", "text_encoder": "text_encoder", "transformer": "transformer"}
    checkpoint = Checkpoint(folder / names[component])
    parts = (".to_q", ".to_v", ".to_out.0", ".conv1", ".proj_in", "ff.net.2", "q_proj", "out_proj", "mlp.fc1")
    shapes = {}
    for name, entry in checkpoint.entries.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(parts) and len(entry.shape) > 1:
            shapes[f"{component}.{module}"] = entry.shape
    return shapes


@pytest.mark.slow
def test_what_diffusers_reads(tmp_path: Path) -> None:
    """Its pipelines load the files; the weights that they merge are the base's and the float64 updates."""
    pytest.importorskip("peft")
    rng = np.random.default_rng(5)
    if not real_diffusers.install(tmp_path / "packages"):
        pytest.skip("pip cannot install diffusers here")

    def run(*arguments: Any) -> None:
        command = [sys.executable, "-W", "ignore", real_diffusers.__file__, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "packages"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]

    run("make_models", tmp_path)
    cases = [("kohya", ("unet", "text_encoder"), False), ("diffusers", ("unet", "text_encoder"), False)]
    cases += [("diffusers", ("transformer",), False), ("diffusers", ("unet",), True)]
    for number, (to, components, is_dora) in enumerate(cases):
        shapes, base = {}, {}
        for component in components:
            shapes |= chosen(tmp_path, component)
            checkpoint = Checkpoint(tmp_path / component)
            base |= {f"{component}.{name}": checkpoint.read(name) for name in checkpoint.entries}
        assert len(shapes) > 5
        entries, config, updates = made(rng, shapes, "rslora" if number == 2 else "standard")
        wanted = {f"{name}.weight": base[f"{name}.weight"] + update for name, update in updates.items()}
        if is_dora:
            for name in list(updates):
                path, key = f"{name}.weight".replace(".", "/"), f"{name}.weight"
                magnitude = rng.uniform(0.5, 2, len(wanted[key])).astype("float32")
                entries[path]["magnitude"] = magnitude
                axes = tuple(range(1, wanted[key].ndim))
                norm = np.sqrt((wanted[key] ** 2).sum(axis=axes, keepdims=True))
                wanted[key] = magnitude.reshape(norm.shape) / norm * wanted[key]
        checkpoints.write_adapters(tmp_path / f"own{number}", nest(entries), config, "own")
        file = tmp_path / f"{number}.safetensors"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", JloraWarning)
            checkpoints.convert(tmp_path / f"own{number}", file, to)
        run("merges", tmp_path, file, tmp_path / "merged.safetensors")
        found = Checkpoint(tmp_path / "merged.safetensors")
        assert {name for name in found.entries if name.endswith(".weight")} == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(found.read(name), value, rtol=0, atol=2e-5, err_msg=f"{to} {name}")


@pytest.mark.parametrize("kind", SOME_KINDS)
@pytest.mark.parametrize("write", [write_kohya, write_diffusers])
def test_a_file_is_the_old_one_or_the_new_one(
    kind: str, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    config = LoraConfig(rank=2, alpha=2.0, factorizations={"**": "oi"})

    def written(calls: int, generation: int = 2) -> None:
        entry = {"A": np.full((7, 2), generation, np.float32), "B": np.full((2, 5), generation, np.float32)}
        write(tmp_path / str(calls) / "x.safetensors", {"unet.q.weight": entry}, config)

    written(0, 1)
    for calls in at_every_call(kind, written, least=4):
        entries, _ = read_lora_file(tmp_path / str(calls) / "x.safetensors", shapes={"q.weight": (5, 7)})
        values = {number for entry in entries.values() for part in entry.values() for number in part.ravel().tolist()}
        assert values in ({1.0}, {2.0})
        written(calls + 1, 1)
