"""The commands generate and eval: answers, how they are printed and written, metrics, and what is refused."""

import io
import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from jlora import LoraConfig, save_adapters
from jlora.cli import main
from jlora.models import decoder, param_shapes, read_config, read_params, write_adapter
from jlora.recipes import JobConfig, load_language_model, run_job
from jlora.text import read_tokenizer
from tests.recipes.tiny_language import sections, write_examples, write_model, write_tokenizer
from tests.reference import randomize
from tests.text.make import write_lines

CONFIG = LoraConfig(rank=3, alpha=30, target_modules=("model/layers/**/*_proj",))
PROMPTS = ("one two:", "seven")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The folder that the command is called in: a model, two adapters with B that is not zero, and files."""
    from jlora import adapt

    folder = tmp_path_factory.mktemp("called in")
    write_model(folder / "model")
    write_examples(folder / "eval.jsonl", 6)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    config = read_config(folder / "model")
    tokens = jax.ShapeDtypeStruct((1, 3), "int32")
    adapted = adapt(decoder(config), CONFIG, param_shapes(config), tokens)
    rng = np.random.default_rng(3)
    for name in ("adapter", "other"):
        adapters = randomize(rng, adapted.adapters, std=0.2)
        write_adapter(folder / name, adapters, adapted.config, config, base="somewhere/model")
        save_adapters(folder / f"own_{name}", adapters, adapted.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def call(*words):
    """The exit code of the command."""
    try:
        return main([str(word) for word in words])
    except SystemExit as exit:
        return exit.code


def asked(capsys, *words, model="model"):
    """The answers of `generate`, as --json gives them."""
    assert call("generate", model, *words, "--max-new-tokens", 6, "--json") == 0
    return json.loads(capsys.readouterr().out)["answers"]


def greedy(prompt, merged=None, model="model", length=32):
    """The text that the model says greedily, without a cache, with an adapter added to its weights."""
    config, tokenizer, params = read_config(model), read_tokenizer(model), read_params(model)
    if merged:
        params = load_language_model("model", merged, merged=True).params
    tokens = tokenizer.prompt(prompt)
    fn, start = jax.jit(decoder(config)), len(tokens)
    for _ in range(6):
        padded = np.array([tokens + [0] * (length - len(tokens))])
        tokens.append(int(fn(params, padded)[0, len(tokens) - 1].argmax()))
        if tokens[-1] in tokenizer.stop:
            return tokenizer.decode(tokens[start:-1])
    return tokenizer.decode(tokens[start:])


class TestGenerate:
    def test_tokens_are_printed_as_they_come(self, capsys):
        assert call("generate", "model", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-new-tokens", 6) == 0
        assert capsys.readouterr().out == "".join(f"{prompt!r}\n{greedy(prompt)}\n" for prompt in PROMPTS)
        assert call("generate", "model", "--prompt", PROMPTS[0], "--max-new-tokens", 6) == 0
        assert capsys.readouterr().out == f"{greedy(PROMPTS[0])}\n"

    def test_many_prompts_of_a_file_are_answered_as_one_is(self, capsys, tmp_path):
        out = tmp_path / "answers.jsonl"
        found = asked(capsys, "--file", "prompts.jsonl", "--out", out)
        assert [answer["answer"] for answer in found] == [greedy(prompt) for prompt in PROMPTS]
        assert [json.loads(line) for line in out.read_text().splitlines()] == found
        assert found[0].keys() == {"prompt", "answer", "tokens", "stopped", "adapter"}

    def test_adapters_of_both_formats_beside_the_weights_and_in_them_say_the_same(self, capsys):
        wanted = greedy(PROMPTS[0], "adapter")
        assert wanted != greedy(PROMPTS[0])
        ways = [("--adapter", "adapter"), ("--adapter", "own_adapter"), ("--adapter", "adapter", "--merged")]
        assert [asked(capsys, "--prompt", PROMPTS[0], *way)[0]["answer"] for way in ways] == [wanted] * 3

    def test_several_adapters_answer_in_turn(self, capsys):
        words = ("--adapter", "adapter", "--adapter", "own_other")
        for merged in ((), ("--merged",)):
            found = asked(capsys, "--prompt", PROMPTS[0], *words, *merged)
            assert [answer["adapter"] for answer in found] == ["adapter", "own_other"]
            assert [answer["answer"] for answer in found] == [greedy(PROMPTS[0], name) for name in words[1::2]]
        assert call("generate", "model", "--prompt", PROMPTS[0], *words, "--max-new-tokens", 6) == 0
        printed = capsys.readouterr().out
        assert printed == "".join(f"{name}\n{greedy(PROMPTS[0], name)}\n" for name in words[1::2])

    def test_a_model_is_a_function_of_its_tokens(self):
        loaded = load_language_model("model", "adapter")
        merged = load_language_model("model", "own_adapter", merged=True)
        base, tokens = load_language_model("model"), np.array([[3, 5, 7]])
        np.testing.assert_allclose(loaded(tokens), merged(tokens), rtol=1e-3, atol=1e-3)
        assert np.abs(loaded(tokens) - base(tokens)).max() > 1e-2

    def test_drawing_depends_on_the_seed_alone(self, capsys):
        words = ("--prompt", PROMPTS[0], "--temperature", 2, "--top-p", 0.95, "--top-k", 50, "--seed")
        found = [asked(capsys, *words, seed)[0]["answer"] for seed in (1, 1, 2)]
        assert found[0] == found[1] != found[2]

    def test_a_conversation_goes_on_with_what_was_said(self, folder, capsys, monkeypatch):
        write_model(folder / "roomy", max_position_embeddings=256)
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
        found = asked(capsys, "--chat", "--system", "seven", model="roomy")
        assert [len(answer["prompt"]) for answer in found] == [2, 4]
        said = [message["content"] for message in found[1]["prompt"]]
        assert said == ["seven", "one", found[0]["answer"], "two"]
        assert found[1]["answer"] == greedy(found[1]["prompt"], model="roomy", length=128)

    def test_a_prompt_through_the_template(self, capsys):
        (answer,) = asked(capsys, "--prompt", "one", "--template")
        assert answer["prompt"] == [{"role": "user", "content": "one"}]
        words = ("--prompt", "one", "--prompt", "two", "--template", "--max-new-tokens", 1)
        assert call("generate", "model", *words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert ("'one'" in lines, "'two'" in lines) == (True, True)
        assert answer["answer"] == greedy(answer["prompt"], length=64)


class TestEval:
    def test_base_and_adapted_are_as_a_job_reports_them(self, folder, capsys):
        write_examples(folder / "train.jsonl", 20, first=6)
        job = JobConfig.from_dict(sections(folder / "model", folder, folder / "run"))
        results = run_job(job, console=Console(quiet=True))
        words = ("--data", "eval.jsonl", "--exact-match", 5, "--max-new-tokens", 3)
        assert call("eval", "model", "--adapter", "run/adapter", *words, "--json") == 0
        found = json.loads(capsys.readouterr().out)["results"]
        assert [result.pop("adapter") for result in found] == [None, "run/adapter"]
        for metrics, result in zip(found, results, strict=True):
            assert metrics == pytest.approx(result.metrics, rel=1e-5)

    def test_it_prints_a_table(self, capsys):
        assert (
            call("eval", "model", "--data", "eval.jsonl", "--exact-match", 0, "--adapter", "own_adapter", "--merged")
            == 0
        )
        printed = capsys.readouterr().out
        assert re.search(r"eval\.jsonl: 6 examples, .*\n +loss +perplexity +token accuracy", printed)
        assert re.search(r"^base +\d.*\nown_adapter +\d", printed, re.M)


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("generate nowhere --prompt x", "nowhere"),
            ("generate model --prompt x --adapter nowhere", "nowhere: holds no adapters: found no adapter_config.json"),
            ("generate model --prompt x --adapter run_of_a_job", "give run_of_a_job/adapter"),
            ("generate model --prompt x --adapter of_another", "of_another: cannot be used with model: "),
            ("generate wider --prompt x --adapter own_adapter", "wrong shape"),
            ("generate model --prompt x --merged", "--merged adds adapters to the weights: give --adapter"),
            ("generate model --prompt x --system y", "--system is the beginning of a conversation: give --chat"),
            ("generate model --prompt x --top-p 0.5", "are for drawing tokens: give a temperature above 0"),
            (
                "generate model --prompt x --max-new-tokens 64",
                "and the model 64 positions: wanted max_new_tokens <= 63",
            ),
            ("generate model --prompt x --max-new-tokens 0", "max_new_tokens = 0: wanted"),
            ("generate model --file eval.jsonl --out prompts.jsonl", "is there already; --force replaces a file"),
            ("generate model --file empty.jsonl", "empty.jsonl: no prompts in it"),
            ("generate model --file wrong.jsonl", 'wrong.jsonl: line 1: wanted {"prompt": a text or messages} or'),
            ("eval model --data nowhere.jsonl", "nowhere.jsonl: cannot be read"),
            ("generate model --chat --adapter adapter --adapter other", "--chat is a conversation with one model"),
            ("generate model --prompt x --adapter adapter --adapter adapter", "adapter is given twice"),
            ("generate empty --prompt x", "empty: it has no config.json"),
            ("generate of_two --prompt x", "they are of two models; put the model's own tokenizer.json there"),
            ("generate model --file of_bad_lines.jsonl", "line 2: the prompt '' has no tokens"),
            ("generate model --file of_bad_lines.jsonl", "line 3: the prompt 'one one one one"),
            ("eval model --data texts.jsonl --out out.jsonl", "texts.jsonl has no prompts with completions to answer"),
            ("eval model --data eval.jsonl --merged", "--merged adds adapters to the weights: give --adapter"),
            ("eval model --data eval.jsonl --exact-match -1", "exact_match = -1: wanted"),
        ],
    )
    def test_with_the_way_out_and_nothing_lost(self, folder, capsys, words, message):
        (folder / "empty.jsonl").write_text("")
        (folder / "wrong.jsonl").write_text('{"text": "one"}\n')
        write_lines(folder / "of_bad_lines.jsonl", *({"prompt": text} for text in ("one", "", "one " * 70)))
        write_lines(folder / "texts.jsonl", {"text": "one two"})
        (folder / "run_of_a_job" / "adapter").mkdir(parents=True, exist_ok=True)
        (folder / "empty").mkdir(exist_ok=True)
        write_tokenizer(write_model(folder / "of_two"), 290)
        if not (folder / "wider").exists():
            write_model(folder / "wider", intermediate_size=22, hidden_size=12, num_hidden_layers=3)
            config = read_config(folder / "wider")
            deeper = {"model/layers/mlp/up_proj/weight": {"A": np.ones((3, 12, 3)), "B": np.ones((3, 3, 22))}}
            nested = {"model": {"layers": {"mlp": {"up_proj": {"weight": deeper.popitem()[1]}}}}}
            told = CONFIG.replace(target_modules=("model/layers/mlp/up_proj",))
            write_adapter(folder / "of_another", nested, told, config)
        before = (folder / "prompts.jsonl").read_bytes()
        assert call(*words.split()) == 2
        assert message in capsys.readouterr().err
        assert (folder / "prompts.jsonl").read_bytes() == before
        assert not (folder / "out.jsonl").exists()

    @pytest.mark.parametrize(
        ("base", "place", "is_warned"),
        [
            ("org/Model", "models/model", False),
            ("org/Model", "hub/models--org--Model/snapshots/0123abcd", False),
            ("org/Model", "models/other", True),
            ("model", "models/model", True),  # a folder of that name is here, which is another one
        ],
    )
    @pytest.mark.filterwarnings("always::jlora.JloraWarning")
    def test_a_base_is_known_by_the_last_part_of_its_name(self, folder, tmp_path, capsys, base, place, is_warned):
        shutil.copytree(folder / "model", tmp_path / place)
        shutil.copytree(folder / "adapter", tmp_path / "adapter")
        config = tmp_path / "adapter" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
        words = ("--adapter", tmp_path / "adapter", "--prompt", "x", "--max-new-tokens", 1)
        assert call("generate", tmp_path / place, *words) == 0
        assert (f"says that it is for {base}" in capsys.readouterr().err) == is_warned

    @pytest.mark.filterwarnings("always::jlora.JloraWarning")
    def test_an_adapter_that_names_another_base_is_warned_of(self, folder, capsys):
        shutil.copytree(folder / "model", folder / "elsewhere", dirs_exist_ok=True)
        assert call("generate", "elsewhere", "--adapter", "adapter", "--prompt", "x", "--max-new-tokens", 1) == 0
        assert "adapter: says that it is for somewhere/model, and is used with elsewhere" in capsys.readouterr().err
        assert call("generate", "model", "--adapter", "adapter", "--prompt", "x", "--max-new-tokens", 1) == 0
        assert capsys.readouterr().err == ""
