"""The models that a job takes: Linen modules, functions and NNX models, with state of their own and without."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from jlora import ConfigError, DataError, LoraConfig, load_adapters, merge_params, save_adapters
from jlora.paths import leaves_by_path
from jlora.recipes import JobConfig, _job, load_run, run_job
from jlora.storage import load_arrays
from jlora.train import Batches

MINE = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(7, name="body")(x)))

class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(nn.Dense(7, name="body")(x))
        x = nn.Dropout(0.25, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, name="head")(x)

class Graph(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(7, momentum=0.5, rngs=rngs), nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.body(x)))))

def init(module, **options):
    return module.init(jax.random.key(0), jnp.zeros((1, 5)), **options)

def linen():
    return Plain(), init(Plain())["params"]

def linen_with_state():
    variables = init(Normed(), train=False)
    return Normed(), variables["params"], {"batch_stats": variables["batch_stats"]}

def nnx_with_state():
    return Graph(nnx.Rngs(0))

def nnx_plain():
    return nnx.Sequential(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(7, 3, rngs=nnx.Rngs(1)))

def params():
    keys = jax.random.split(jax.random.key(0))
    return {"body": jax.random.normal(keys[0], (5, 7)) / 2, "head": jax.random.normal(keys[1], (3, 7)) / 2}

def function():
    return lambda params, x: jnp.tanh(x @ params["body"]) @ params["head"].T, params()

def function_with_state():
    def fn(params, state, x, rngs, deterministic):
        assert (rngs is None) == deterministic
        hidden = x @ params["body"]
        if not deterministic:
            hidden *= jax.random.bernoulli(rngs["dropout"], 0.75, hidden.shape)
            state = {**state, "mean": state["mean"] / 2 + hidden.mean(0) / 2, "calls": state["calls"] + 1}
        return jnp.tanh(hidden - state["mean"]) @ params["head"].T, state
    return fn, params(), {"mean": jnp.zeros(7), "calls": jnp.int32(2**24), "shift": jnp.ones(())}

def number():
    return 3

def three_of_what():
    return {}, params(), {}

def module_alone():
    return Plain()

def module_with_variables():
    return Normed(), init(Normed(), train=False)

def module_without_its_state():
    return linen_with_state()[:2]

def module_of_no_calls():
    class Silent(nnx.Module):
        pass
    return Silent()

def class_of_module():
    return Plain, {}

def no_params():
    return lambda params, x: x, {}

def state_of_text():
    return function_with_state()[0], params(), {"mean": "0"}

def state_of_keys():
    return function_with_state()[0], params(), {"mean": jax.random.key(0)}

def collections_of_none():
    return Normed(), params(), 3

def data():
    x = 1 + np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    examples = {"inputs": x, "labels": x[:, :3].argmax(-1).astype(np.int32)}
    return tuple({name: a[part] for name, a in examples.items()} for part in (slice(24), slice(24, None)))
"""
FORMS = ("linen", "linen_with_state", "nnx_plain", "nnx_with_state", "function", "function_with_state")
CHANGED = {
    "linen_with_state": ["batch_stats/norm/mean", "batch_stats/norm/var"],
    "nnx_with_state": ["norm/mean", "norm/var"],
    "function_with_state": ["calls", "mean"],
}


@pytest.fixture(scope="module", autouse=True)
def mine(tmp_path_factory):
    """The user's module, `mine_of_test_models`."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine_of_test_models.py").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield __import__("mine_of_test_models")


def job_of(form, folder):
    sections = {
        "model": {"function": f"mine_of_test_models:{form}"},
        "data": {"function": "mine_of_test_models:data"},
        "lora": {"rank": 2, "dropout": 0.1},
        "optimizer": {"learning_rate": 0.05},
        "train": {"steps": 6, "batch_size": 8, "log_every": 2, "eval_every": 3, "checkpoint_every": 2},
        "output": {"folder": str(folder)},
    }
    return JobConfig.from_dict(sections)


def run(form, folder, **options):
    return run_job(job_of(form, folder), console=Console(quiet=True), **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder and the results of a run of each form, made when it is asked for."""
    made = {}

    def of(form):
        if form not in made:
            folder = tmp_path_factory.mktemp(form) / "run"
            made[form] = folder, run(form, folder)
        return made[form]

    return of


def outputs_by_hand(mine, form, params, state, x):
    """What the user's own model gives in its evaluation mode, by the user's own library."""
    if form.startswith("linen"):
        module = getattr(mine, form)()[0]
        return module.apply({"params": params, **(state or {})}, x, **({} if state is None else {"train": False}))
    if form.startswith("nnx"):
        model = getattr(mine, form)()
        model.eval()
        nnx.update(model, params)
        nnx.update(model, state or {})
        return model(x)
    if state is None:
        return mine.function()[0](params, x)
    return mine.function_with_state()[0](params, state, x, None, True)[0]


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow if form.endswith("with_state") else ()) for form in FORMS]
)
def test_what_is_read_back_is_the_trained_model(mine, runs, form):
    folder, results = runs(form)
    trained, x = load_run(folder), mine.data()[1]["inputs"]
    found = trained.model(x)
    merged = merge_params(trained.params, trained.adapters, trained.config)
    np.testing.assert_allclose(found, outputs_by_hand(mine, form, merged, trained.state, x), rtol=1e-4, atol=1e-5)
    logits, labels = np.asarray(found, np.float64), mine.data()[1]["labels"]
    loss = np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels])
    assert results[1].metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert abs(results[0].metrics["loss"] - loss) > 1e-3
    assert [result.name for result in results] == ["frozen base", "LoRA"]


@pytest.mark.parametrize("form", FORMS)
def test_the_adapters_alone_load_onto_the_base(runs, form):
    folder, _ = runs(form)
    params = load_run(folder).params
    adapters, config = load_adapters(folder / "adapters", params=params)
    shapes = [jnp.shape(array) for array in jax.tree.leaves(adapters)]
    assert sorted(shapes) == sorted([(5, 2), (2, 7), (7, 2), (2, 3)])
    assert config.rank == 2
    assert all(jnp.any(array != 0) for array in jax.tree.leaves(adapters))


@pytest.mark.parametrize("form", FORMS)
def test_what_the_model_changed_of_its_state_is_kept_bit_by_bit(mine, runs, form):
    folder, _ = runs(form)
    state = load_run(folder).state
    if form not in CHANGED:
        assert state is None
        assert not (folder / "model_state").exists()
        return
    changed, _ = load_arrays(folder / "model_state")
    assert sorted(changed) == CHANGED[form]
    leaves = leaves_by_path(state)
    for path, entry in changed.items():
        assert leaves[path].dtype == entry["value"].dtype
        np.testing.assert_array_equal(leaves[path], np.asarray(entry["value"]))


def test_the_state_is_that_of_every_step_and_of_training_alone(mine, runs):
    folder, _ = runs("function_with_state")
    state = load_run(folder).state
    assert state["calls"] == 2**24 + 6  # float32 does not hold it
    assert state["shift"] == 1
    assert np.abs(state["mean"]).max() > 0.1


@pytest.mark.parametrize("form", CHANGED)
def test_without_the_state_the_adapters_give_something_else(mine, runs, form):
    trained, x = load_run(runs(form)[0]), mine.data()[1]["inputs"]
    merged = merge_params(trained.params, trained.adapters, trained.config)
    base = None if form.startswith("nnx") else getattr(mine, form)()[2]
    assert np.abs(trained.model(x) - outputs_by_hand(mine, form, merged, base, x)).max() > 0.05


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form == "nnx_with_state" else pytest.mark.slow) for form in CHANGED]
)
def test_a_run_that_crashed_goes_on_with_the_state_bitwise(runs, tmp_path, monkeypatch, form):
    class Broken(Batches):
        def __call__(self, step):
            if step == 5:
                raise RuntimeError("out of memory")
            return super().__call__(step)

    with monkeypatch.context() as patch:
        patch.setattr(_job, "Batches", Broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(form, tmp_path / "run")
    assert not (tmp_path / "run" / "adapters").exists()
    with pytest.raises(DataError, match="holds a run that is not done: jlora train --resume finishes it"):
        load_run(tmp_path / "run")
    run(form, tmp_path / "run", resume=True)
    for name in ("adapters/adapter_model.safetensors", "model_state/adapter_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (runs(form)[0] / name).read_bytes()


def test_a_weight_that_is_too_narrow_is_left_out_told_of_and_no_hindrance(tmp_path, capsys):
    job = job_of("function", tmp_path / "run").to_dict()
    run_job(JobConfig.from_dict({**job, "lora": {"rank": 4}}))
    assert re.search("head +3x7 +rank 4 is larger than the smaller side 3", capsys.readouterr().out)
    trained = load_run(tmp_path / "run")
    assert trained.adapters["head"] is None
    assert trained.adapters["body"]["A"].shape == (5, 4)


def test_full_fine_tuning_has_a_state_of_its_own(runs, tmp_path):
    job = job_of("linen_with_state", tmp_path / "run")
    full = JobConfig.from_dict({**job.to_dict(), "full": {"enabled": True, "learning_rate": 0.05}})
    results = run_job(full, console=Console(quiet=True))
    folder, alone = runs("linen_with_state")
    assert [result.metrics for result in results[:2]] == [result.metrics for result in alone]
    assert results[2].metrics["loss"] not in (results[0].metrics["loss"], results[1].metrics["loss"])
    name = "model_state/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("number", "found int; wanted it to return one of"),
        ("data", "found dict in the first place; wanted it to return one of"),
        ("three_of_what", "found dict in the first place"),
        ("module_alone", "found Plain; wanted it to return one of"),
        ("class_of_module", "found type in the first place"),
        (
            "module_with_variables",
            "found the variables of init in the place of the params: return (module, variables['",
        ),
        (
            "module_without_its_state",
            'return (module, params, collections), all of module.init: Tried to access "mean"',
        ),
        ("module_of_no_calls", "Silent has no __call__(inputs)"),
        ("no_params", "the params are empty; wanted it to return"),
        ("state_of_text", "the state mean is str, wanted an array of numbers"),
        ("state_of_keys", "the state mean is key<fry>, wanted an array of numbers"),
        ("collections_of_none", "found int for the collections; wanted it to return"),
    ],
)
def test_what_is_no_model_is_refused_before_anything_is_written(tmp_path, function, message):
    with pytest.raises(ConfigError, match=f"model.function = .*:{function}'.*{re.escape(message)}"):
        run(function, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_message_lists_the_forms(tmp_path):
    for form in ("(module, params)", "(module, params, collections)", "(function, params)", "nnx.Module"):
        with pytest.raises(ConfigError, match=re.escape(form)):
            run("number", tmp_path / "run")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "model_state"), "model_state: no such folder"),
        (lambda folder: (folder / "config.toml").unlink(), "holds no run: wanted the output folder of jlora train"),
        (
            lambda folder: save_state(folder, {"batch_stats": {"norm": {"mean": np.ones(7, np.float32)}}}, 5),
            "is not of the same step as the adapters: jlora train --resume writes both",
        ),
        (
            lambda folder: save_state(folder, {"batch_stats": {"norm": {"mean": np.ones(3, np.float32)}}}, 6),
            r"batch_stats/norm/mean: found float32\[3\], the model keeps float32\[7\] there",
        ),
        (
            lambda folder: save_state(folder, {"stats": np.ones(7, np.float32)}, 6),
            r"stats: found float32\[7\], the model keeps no such array",
        ),
    ],
)
def test_a_folder_that_does_not_fit_itself_is_refused(runs, tmp_path, spoil, message):
    folder = shutil.copytree(runs("linen_with_state")[0], tmp_path / "run")
    spoil(folder)
    with pytest.raises(DataError, match=message):
        load_run(folder)


def save_state(folder, state, steps):
    values = jax.tree.map(lambda leaf: {"value": leaf}, state)
    save_adapters(folder / "model_state", values, LoraConfig(), metadata={"steps": steps})


def test_the_state_is_told_of_in_the_results(tmp_path, capsys):
    folder = tmp_path / "run"
    run_job(job_of("linen_with_state", folder))
    printed = capsys.readouterr().out
    assert f"the model changed 2 arrays of its own, {', '.join(CHANGED['linen_with_state'])}: they are in" in printed
    assert json.loads((folder / "adapters" / "adapter_config.json").read_text())["metadata"]["model_state"] == 2
