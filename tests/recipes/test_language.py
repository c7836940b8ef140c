"""A job on a language model of a folder: what it trains, reports and writes, how it goes on, and what it refuses."""

import io
import json
import os
import re
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from jlora import ConfigError, DataError, JloraError, TargetError, load_adapters
from jlora.models import decoder, read_adapter, read_config, read_params
from jlora.recipes import JobConfig, load_run, run_job
from jlora.recipes._config import LINEAR
from jlora.storage import read_metadata
from jlora.text import read_examples, read_tokenizer
from jlora.train import DivergedError, Interrupted, MetricsLog
from tests.recipes.tiny_language import SPECIAL, sections, write_examples, write_model, write_tokenizer

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and files of examples."""
    folder = tmp_path_factory.mktemp("language")
    write_model(folder / "model")
    write_examples(folder / "train.jsonl", 41)
    write_examples(folder / "eval.jsonl", 7, first=41)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    """A run that was not stopped: its folder, its results and what it printed."""
    text = io.StringIO()
    job = JobConfig.from_dict(sections(folder / "model", folder, folder / "whole"))
    results = run_job(job, console=Console(file=text, width=120))
    return folder / "whole", job, results, text.getvalue()


def run(folder, output, resume=False, **changes):
    job = JobConfig.from_dict(sections(folder / "model", folder, output, **changes))
    return run_job(job, resume=resume, console=QUIET)


def reference(folder, params=None):
    """Loss and accuracy on the evaluation file, one example at a time, in float64 from the logits on."""
    model = folder / "model"
    config, tokenizer = read_config(model), read_tokenizer(model)
    params = read_params(model) if params is None else params
    fn = jax.jit(decoder(config))
    losses, right = [], []
    for tokens, counts in read_examples(folder / "eval.jsonl", tokenizer, length=24)[0]:
        logits = np.asarray(fn(params, tokens[None])[0], np.float64)[:-1]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        wanted = counts[1:]
        losses += list(-logs[np.arange(len(logs)), tokens[1:]][wanted])
        right += list((logits.argmax(-1) == tokens[1:])[wanted])
    return np.mean(losses), np.mean(right)


class TestRun:
    def test_the_folder_holds_what_it_says(self, whole):
        written, job, _, _ = whole
        wanted = {"adapter", "adapters", "answers.jsonl", "checkpoints", "config.toml", "curve.png", "metrics.jsonl"}
        assert {path.name for path in written.iterdir()} == wanted | {"results.json", "tensorboard"}
        assert JobConfig.read(written / "config.toml") == job

    def test_folder_and_train_are_short_for_functions_linear_layers_and_the_loss(self, whole):
        _, job, _, printed = whole
        assert (job.model.function, job.data.function) == (
            "jlora.recipes.language:model",
            "jlora.recipes.language:data",
        )
        assert job.lora.target_modules == LINEAR
        assert job.train.loss == "jlora.recipes:next_token"
        kinds = [f"self_attn/{name}_proj" for name in "qkvo"] + [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
        adapted = set(re.findall(r"^(model/\S+)", printed, re.M))
        assert adapted == {f"model/layers/{kind}/weight" for kind in kinds}

    def test_the_frozen_base_is_measured_as_one_example_at_a_time(self, folder, whole):
        _, _, (base, _), _ = whole
        loss, accuracy = reference(folder)
        assert base.metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert base.metrics["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
        assert base.metrics["token_accuracy"] == pytest.approx(accuracy)

    def test_it_learns_and_says_so(self, whole):
        written, _, (base, adapted), printed = whole
        assert adapted.metrics["loss"] < base.metrics["loss"]
        rows = MetricsLog.read_file(written / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert rows[-1]["test_loss"] == adapted.metrics["loss"]
        assert json.loads((written / "results.json").read_text())[1]["metrics"] == adapted.metrics
        wanted = [
            r"train\.jsonl: 41 examples, [\d,]+ tokens, of which",
            "the step of training is compiled once\n",
            r"LoRA .* 6/6 +loss \d+\.\d{3} +token accuracy \d\.\d{3} +[\d,]+ tokens/s",
            r"on the test set +perplexity +token accuracy +exact match +trained parameters",
            r"peak memory: \d+\.\d\d GB",
        ]
        assert [line for line in wanted if not re.search(line, printed)] == []

    def test_prompts_are_answered_before_while_and_after(self, folder, whole):
        written, _, _, printed = whole
        rows = [json.loads(line) for line in (written / "answers.jsonl").read_text().splitlines()]
        assert [(row["step"], row["prompt"]) for row in rows] == [(step, "one two:") for step in (0, 3, 6)]
        assert all(f"answers at step {step}\n  'one two:' -> " in printed for step in (0, 3, 6))
        model = folder / "model"
        config, tokenizer, params = read_config(model), read_tokenizer(model), read_params(model)
        tokens = tokenizer.prompt("one two:")
        for _ in range(3):
            tokens.append(int(decoder(config)(params, np.array([tokens]))[0, -1].argmax()))
        assert rows[0]["answer"] == tokenizer.decode(tokens[-3:])

    def test_both_forms_of_the_adapters_are_the_same_and_name_the_base(self, folder, whole):
        written, _, _, _ = whole
        model = read_config(folder / "model")
        own, config = load_adapters(written / "adapters")
        theirs, _ = read_adapter(written / "adapter", model)
        assert config.rank == 2
        leaves = [dict(jax.tree_util.tree_flatten_with_path(tree)[0]) for tree in (own, theirs)]
        assert leaves[0].keys() == leaves[1].keys()
        for path, array in leaves[0].items():
            np.testing.assert_array_equal(array, leaves[1][path])
        told = json.loads((written / "adapter" / "adapter_config.json").read_text())
        assert told["base_model_name_or_path"] == str(folder / "model") == read_metadata(written / "adapters")["base"]
        assert told["task_type"] == "CAUSAL_LM"

    def test_the_card_says_what_was_trained_on_what(self, folder, whole):
        written, _, (_, adapted), _ = whole
        card = (written / "adapter" / "README.md").read_text()
        wanted = [
            f'base_model: "{folder / "model"}"',
            "rank 2, alpha 4",
            f"train = `{folder / 'train.jsonl'}`",
            "6 steps of 4 rows",
            f"| LoRA | {adapted.metrics['loss']:.4g} |",
        ]
        assert [text for text in wanted if text not in card] == []

    def test_load_run_gives_the_trained_model(self, folder, whole):
        written, _, (_, adapted), _ = whole
        trained = load_run(written)
        from jlora import merge_params

        merged = merge_params(trained.params, trained.adapters, trained.config)
        loss, _ = reference(folder, merged)
        assert adapted.metrics["loss"] == pytest.approx(loss, rel=1e-4)
        tokens = np.array([[3, 5, 7]])
        np.testing.assert_allclose(
            trained.model({"tokens": tokens}),
            decoder(read_config(folder / "model"))(merged, tokens),
            rtol=1e-4,
            atol=1e-4,
        )


class TestWays:
    def test_unpacked_rows_of_a_few_lengths_a_template_parts_and_remat(self, folder, tmp_path):
        results = run(
            folder,
            tmp_path / "run",
            model={"remat": "layer", "dtype": "bfloat16"},
            data={"packed": False, "template": True, "length": 40},
            lora={"target_modules": [*LINEAR, "model/embed_tokens"]},
            train={"accumulate": 2, "steps": 4, "eval_every": 4},
            generate={"chat": True},
        )
        assert results[1].metrics["loss"] < results[0].metrics["loss"]
        assert results[1].parameters > 2 * 280
        assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


class TestStops:
    @pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_an_interrupted_run_goes_on_bitwise(self, folder, whole, tmp_path, monkeypatch, packed):
        wanted = whole[0]
        if not packed:
            wanted = tmp_path / "wanted"
            run(folder, wanted, data={"packed": False})
        write = MetricsLog.write

        def write_and_stop(log, row):
            write(log, row)
            if row["step"] == 4:
                os.kill(os.getpid(), signal.SIGINT)

        out = tmp_path / "run"
        monkeypatch.setattr(MetricsLog, "write", write_and_stop)
        with pytest.raises(Interrupted, match="interrupted after step 4"):
            run(folder, out, data={"packed": packed})
        monkeypatch.setattr(MetricsLog, "write", write)
        run(folder, out, resume=True, data={"packed": packed})
        names = ("metrics.jsonl", "answers.jsonl", "adapters/adapter_model.safetensors")
        for name in (*names, "adapter/adapter_model.safetensors"):
            assert (out / name).read_bytes() == (wanted / name).read_bytes(), name

    def test_a_run_that_diverges_names_the_batch_and_keeps_what_was_good(self, folder, tmp_path):
        rate = {"learning_rate": 1e38, "clip_norm": 0, "warmup_steps": 3, "schedule": "constant"}
        with pytest.raises(DivergedError, match=r"step \d, on batch \d: .* nothing of it is saved"):
            run(folder, tmp_path / "run", optimizer=rate, train={"checkpoint_every": 1})
        assert list((tmp_path / "run" / "checkpoints").iterdir())
        assert not (tmp_path / "run" / "adapter").exists()


class TestBadInput:
    def damaged(self, folder, tmp_path, what):
        model = shutil.copytree(folder / "model", tmp_path / "model")
        if what == "no config":
            (model / "config.json").unlink()
        elif what == "cut":
            tensors = model / "model.safetensors"
            tensors.write_bytes(tensors.read_bytes()[:-100])
        elif what == "vocabulary":
            write_tokenizer(model, 290)
        elif what == "architecture":
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
        elif what == "no tokenizer":
            (model / "tokenizer.json").unlink()
        elif what == "no template":
            (model / "chat_template.jinja").unlink()
        return model

    @pytest.mark.parametrize(
        ("what", "changes", "error", "message"),
        [
            ("no config", {}, DataError, "config.json"),
            ("cut", {}, DataError, "model.safetensors"),
            ("vocabulary", {}, DataError, "the tokenizer has 281 tokens, and the model's embedding has 280"),
            ("architecture", {}, ConfigError, "mamba"),
            ("no tokenizer", {}, DataError, "tokenizer.json"),
            ("no template", {"data": {"template": True}}, DataError, "has no chat template"),
            ("", {"model": {"folder": "nowhere"}}, DataError, "nowhere"),
            ("", {"model": {"folder": 3}}, ConfigError, "model.folder = 3: wanted the path of a folder"),
            ("", {"model": {"dtype": "int8"}}, ConfigError, "model.dtype = 'int8': wanted one of 'float32'"),
            ("", {"model": {"remat": "all"}}, ConfigError, "model.remat = 'all': wanted one of 'layer'"),
            ("", {"data": {"length": 65}}, ConfigError, "data.length = 65: wanted at most 64, the positions"),
            ("", {"data": {"train": "nowhere.jsonl"}}, DataError, "nowhere.jsonl: cannot be read"),
            ("", {"data": {"eval": "{tmp}/bad.jsonl"}}, DataError, "bad.jsonl: line 1: wanted"),
            ("", {"data": {"eval": "{tmp}/empty.jsonl"}}, DataError, "empty.jsonl: no examples in it"),
            ("", {"data": {"length": 4}}, DataError, "no example is left"),
            ("", {"data": {"packed": 1}}, ConfigError, "data.packed = 1: wanted true or false"),
            ("", {"data": {"lenght": 4}}, ConfigError, "unknown key 'lenght' (did you mean 'length'?)"),
            ("", {"train": {"batch_size": 400}}, DataError, "examples are fewer than a batch of 400"),
            ("", {"lora": {"target_modules": ["model/layers/*/qq"]}}, TargetError, "matches nothing"),
            (
                "",
                {"generate": {"max_new_tokens": 64}},
                DataError,
                "and the model 64 positions: wanted max_new_tokens <= ",
            ),
            ("", {"generate": {"prompts": "hi"}}, ConfigError, "generate.prompts = 'hi': wanted a list of texts"),
            ("", {"data": {"eval": "{tmp}/texts.jsonl"}}, ConfigError, "have no prompts with completions"),
            ("", {"data": {"function": "jlora.recipes.digits:data"}}, ConfigError, "the options of"),
        ],
    )
    def test_it_is_refused_before_anything_is_written(self, folder, tmp_path, what, changes, error, message):
        (tmp_path / "bad.jsonl").write_text('{"promt": "one"}\n')
        (tmp_path / "empty.jsonl").write_text("")
        (tmp_path / "texts.jsonl").write_text('{"text": "one two three"}\n')
        filled = {
            name: {key: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value}
            for name, section in changes.items()
            for key, value in section.items()
        }
        model = self.damaged(folder, tmp_path, what)
        with pytest.raises(error) as caught:
            run_job(
                JobConfig.from_dict(sections(model, folder, tmp_path / "out", **filled)),
                console=QUIET,
            )
        assert message in str(caught.value)
        assert isinstance(caught.value, JloraError)
        assert not (tmp_path / "out").exists()

    def test_a_disk_that_is_too_small(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
        with pytest.raises(DataError, match=r"GB are to be written, most of it checkpoints, and 0\.00 GB are free"):
            run(folder, tmp_path / "run")
        assert not (tmp_path / "run" / "config.toml").exists()

    def test_a_model_that_is_none_of_language_is_told_how(self, folder, tmp_path):
        changes = {"model": {"function": "jlora.recipes.digits:model"}, "generate": {}}
        plan = sections(folder / "model", folder, tmp_path / "run", **changes)
        del plan["model"]["folder"]
        small = {"width": 6, "depth": 1, "heads": 2, "hidden": 5, "patch": 4, "steps": 1, "cache": str(tmp_path)}
        plan["model"] |= small
        with pytest.raises(ConfigError, match=r"is for a language model, and model\.function = .*digits:model"):
            run_job(JobConfig.from_dict(plan), console=QUIET)
        plan["data"] = {"function": "jlora.recipes.digits:data"}
        with pytest.raises(ConfigError, match=r"\[generate\]: .* is no language model"):
            run_job(JobConfig.from_dict(plan), console=QUIET)


def test_a_folder_without_the_packages_for_texts_is_told_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="tokenizers"):
        run(folder, tmp_path / "run")


def test_the_special_tokens_of_the_tests_end_answers(folder):
    tokenizer = read_tokenizer(folder / "model")
    assert [tokenizer.decode([token], special=True) for token in tokenizer.stop] == [SPECIAL[0], SPECIAL[2]]
