"""Jobs that train VeRA or LoRA-XS: the small tree is trained, and the adapters that it stands for are written too."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jlora import ConfigError, count_params, load_adapters, merge_params, variants
from jlora.recipes import JobConfig, load_run, run_job
from jlora.recipes._loaded import load_language_model
from jlora.train import Interrupted, MetricsLog
from tests.recipes.tiny_language import VOCABULARY, sections, write_examples, write_model

MINE = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(7, name="body")(x)))

def model():
    return Net(), Net().init(jax.random.key(0), jnp.zeros((1, 5)))["params"]

def data():
    x = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    examples = {"inputs": x, "labels": x[:, :3].argmax(-1).astype(np.int32)}
    return tuple({name: a[part] for name, a in examples.items()} for part in (slice(40), slice(40, None)))
"""
NAMES = {"vera": "VeRA", "xs": "LoRA-XS"}
TRAINED = {"vera": (7 + 2) + (3 + 2), "xs": 2 * 2 * 2}


@pytest.fixture(scope="module", autouse=True)
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine_of_test_variants.py").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield __import__("mine_of_test_variants")


def job_of(folder, kind, **train):
    steps = {"steps": 8, "batch_size": 8, "log_every": 2, "eval_every": 4, "checkpoint_every": 4}
    plan = {
        "model": {"function": "mine_of_test_variants:model"},
        "data": {"function": "mine_of_test_variants:data"},
        "lora": {"rank": 2, "alpha": 4.0, "kind": kind},
        "optimizer": {"learning_rate": 0.1},
        "train": steps | train,
        "output": {"folder": str(folder)},
    }
    return JobConfig.from_dict(plan)


@pytest.mark.parametrize("kind", variants.KINDS)
def test_a_job_trains_the_small_tree_and_writes_both(kind, mine, tmp_path):
    results = run_job(job_of(tmp_path, kind), console=Console(quiet=True))
    assert [(result.name, result.parameters) for result in results] == [
        ("frozen base", 0),
        (NAMES[kind], TRAINED[kind]),
    ]
    assert results[1].metrics["loss"] < results[0].metrics["loss"]

    _, params = mine.model()
    trained, frozen, config = variants.load(tmp_path / "variant")
    assert count_params(trained) == TRAINED[kind]
    adapters, plain = load_adapters(tmp_path / "adapters", params=params)
    assert (config.kind, plain.kind) == (kind, "lora")
    wanted = variants.adapters(trained, frozen, params, config)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, adapters, wanted)))

    x = jnp.asarray(mine.data()[1]["inputs"])
    merged = mine.Net().apply({"params": merge_params(params, adapters, plain)}, x)
    np.testing.assert_allclose(load_run(tmp_path).model(x), merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", variants.KINDS)
def test_a_run_that_stopped_goes_on_to_the_same_bits(kind, mine, tmp_path, monkeypatch):
    run_job(job_of(tmp_path / "whole", kind), console=Console(quiet=True))
    write, stopped = MetricsLog.write, []

    def stop_once(log, row):
        write(log, row)
        if row["step"] == 4 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsLog, "write", stop_once)
    with contextlib.suppress(Interrupted, KeyboardInterrupt):
        run_job(job_of(tmp_path / "parts", kind), console=Console(quiet=True))
    assert stopped
    assert not (tmp_path / "parts" / "adapters").exists()
    try:
        run_job(job_of(tmp_path / "parts", kind), resume=True, console=Console(quiet=True))
    finally:
        monkeypatch.undo()
    for name in ("variant", "adapters"):
        files = [(tmp_path / run / name / "adapter_model.safetensors").read_bytes() for run in ("whole", "parts")]
        assert files[0] == files[1]


@pytest.mark.parametrize("setting", [{"freeze_a": True}, {"b_ratio": 4.0}, {"preconditioner": "riemannian"}])
def test_settings_for_a_and_b_are_refused(setting, tmp_path):
    plan = job_of(tmp_path, "vera").to_dict()
    plan["optimizer"] |= setting
    with pytest.raises(ConfigError, match=r"lora.kind = 'vera': trains neither A nor B, for which optimizer.freeze_a"):
        JobConfig.from_dict(plan)


@pytest.mark.parametrize("kind", variants.KINDS)
def test_a_language_model_answers_with_either_folder(kind, tmp_path):
    model = write_model(tmp_path / "model")
    write_examples(tmp_path / "train.jsonl", 20)
    write_examples(tmp_path / "eval.jsonl", 5, first=20)
    output = tmp_path / "run"
    job = sections(model, tmp_path, output, lora={"rank": 2, "kind": kind}, optimizer={"learning_rate": 0.3})
    run_job(JobConfig.from_dict(job), console=Console(quiet=True))
    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 3, 6]

    tokens = np.random.default_rng(0).integers(3, VOCABULARY, (2, 7))
    base = load_language_model(model)(tokens)
    found = [load_language_model(model, output / name)(tokens) for name in ("adapter", "adapters", "variant")]
    assert np.abs(found[0] - base).max() > 1e-4
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-5)
