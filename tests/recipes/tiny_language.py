"""A tiny random Llama with a tokenizer that is trained here, and files of examples, for tests of whole jobs."""

import json
from pathlib import Path
from typing import Any

from tests.models.folders import LLAMA, tensors_of, write_folder

VOCABULARY = 280
CONFIG = LLAMA | {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "tie_word_embeddings": True}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("one", "two", "three", "four", "five", "six", "seven")


def write_model(folder: Path, **changes: Any) -> Path:
    """A folder with the model and its tokenizer."""
    config = CONFIG | changes
    tensors = {name: 0.3 * array for name, array in tensors_of(config).items()}
    write_folder(folder, config, tensors)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> None:
    """Pairs of bytes that are frequent in a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_examples(path: Path, count: int, first: int = 0) -> Path:
    """Prompts and completions of several lengths."""
    rows = []
    for i in range(first, first + count):
        some = [WORDS[(i * k) % len(WORDS)] for k in range(1, 2 + i % 4)]
        rows.append({"prompt": " ".join(some) + ":", "completion": f" {WORDS[i % len(WORDS)]}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sections(model: Path, folder: Path, output: Path, /, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a job on the model, with the files of examples in a folder."""
    plain: dict[str, dict[str, Any]] = {
        "model": {"folder": str(model)},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "length": 24},
        "lora": {"rank": 2, "alpha": 4.0},
        "optimizer": {"learning_rate": 0.02},
        "train": {"steps": 6, "batch_size": 4, "log_every": 1, "eval_every": 3, "checkpoint_every": 3},
        "generate": {"prompts": ["one two:"], "max_new_tokens": 3, "exact_match": 5},
        "output": {"folder": str(output)},
    }
    return {name: {**plain.get(name, {}), **changes.get(name, {})} for name in {**plain, **changes}}
