"""The tokenizer of a folder: which tokens end an answer, and what is said of a folder that is not as it should be."""

import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models

from jlora import DataError
from jlora.text import read_examples, read_tokenizer
from tests.text.make import CHAT, KINDS, TEXTS, turns, write_folder, write_lines


def test_tokens_that_end_an_answer(tmp_path):
    """The end of a text, those of generation_config.json, and what the template writes after an answer."""
    assert read_tokenizer(write_folder(tmp_path / "a")).stop == (2, 5)
    assert read_tokenizer(write_folder(tmp_path / "b", template=None)).stop == (2,)
    assert read_tokenizer(write_folder(tmp_path / "c", template=None, eos_token=None)).stop == ()
    folder = write_folder(tmp_path / "d", template=None)
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    assert read_tokenizer(folder).stop == (2, 7)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 3]}')
    assert read_tokenizer(folder).stop == (2, 3, 4)
    picky = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
    assert read_tokenizer(write_folder(tmp_path / "e", template=picky)).stop == (2,)


def test_what_fills_a_row(tmp_path):
    assert read_tokenizer(write_folder(tmp_path / "a", pad_token="<|end|>")).pad == 5
    assert read_tokenizer(write_folder(tmp_path / "b")).pad == 2
    assert read_tokenizer(write_folder(tmp_path / "c", template=None, eos_token=None)).pad == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_a_text(tmp_path, kind):
    """A text that goes on is written on, whatever it begins with."""
    tokenizer = read_tokenizer(write_folder(tmp_path, kind))
    for text in TEXTS:
        ids = tokenizer.encode("(") + tokenizer.encode_after(text)
        assert tokenizer.decode(ids, special=True) == tokenizer.decode(tokenizer.encode(f"({text}"), special=True)
    assert tokenizer.vocabulary_size == max(tokenizer._backend.get_vocab().values()) + 1


def test_lengths_of_the_file_are_not_kept(tmp_path):
    """A tokenizer.json may say that texts are cut or filled; here nothing is."""
    folder = write_folder(tmp_path)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>",
    }  # fmt: skip
    wanted = read_tokenizer(folder).encode("The capital of France")
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert read_tokenizer(folder).encode("The capital of France") == wanted


def test_where_a_template_may_be(tmp_path):
    inline = write_folder(tmp_path / "a", template=None, chat_template="inline {{ bos_token }}{{ pad_token }}")
    assert read_tokenizer(inline).chat(turns("Hi")) == "inline <s>"
    (inline / "chat_template.jinja").write_text("a file")
    assert read_tokenizer(inline).chat(turns("Hi")) == "a file"
    old = write_folder(tmp_path / "b", template=None)
    (old / "chat_template.json").write_text('{"chat_template": "a processor"}')
    assert read_tokenizer(old).chat(turns("Hi")) == "a processor"


REFUSED = {
    "tokenizer.json": {
        None: r"tokenizer.json: no such file: copy it from the model's folder",
        "": "tokenizer.json: not a tokenizer",
        "{}": "tokenizer.json: not a tokenizer",
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}': "not a tokenizer",
    },
    "tokenizer_config.json": {
        "[]": "tokenizer_config.json: not valid JSON: wanted an object, found list",
        '{"eos_token": 3}': "tokenizer_config.json: eos_token = 3: wanted a token's text",
        '{"eos_token": {"text": "a"}}': "eos_token = .*: wanted a token's text",
        '{"added_tokens_decoder": {"a": {"content": "b"}}}': "tokenizer_config.json: added_tokens_decoder: 'a'",
        '{"added_tokens_decoder": {"7000": {"content": "<b>"}}}': "token '<b>' is 420 by tokenizer.json, not 7000",
        '{"chat_template": 3}': "tokenizer_config.json: chat_template: 3: wanted a text, or a list of names and texts",
        '{"chat_template": [{"name": "rag", "template": "a"}]}': "chat templates rag, and none of them is the default",
        '{"chat_template": ["a"]}': "chat_template: 'a': wanted a text, or",
    },
    "generation_config.json": {
        '{"eos_token_id": "2"}': "generation_config.json: eos_token_id = '2': wanted the number of a token",
        '{"eos_token_id": [true]}': r"generation_config.json: eos_token_id = \[True\]: wanted the number of a token",
    },
    "special_tokens_map.json": {"{": "special_tokens_map.json: not valid JSON"},
    "added_tokens.json": {'{"a": "b"}': "added_tokens.json: 'a': 'b' is no number"},
    "chat_template.json": {"{}": "chat_template.json: chat_template = None: wanted a text"},
}


@pytest.mark.parametrize(
    ("name", "contents"), [(name, contents) for name, cases in REFUSED.items() for contents in cases]
)
def test_folders_that_are_refused(tmp_path, name, contents):
    folder = write_folder(tmp_path, template=None)
    (folder / name).unlink(missing_ok=True)
    if contents is not None:
        (folder / name).write_text(contents)
    with pytest.raises(DataError, match=REFUSED[name][contents]):
        read_tokenizer(folder)


def test_other_files_of_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(DataError, match=r"tokenizer.json: no such file: make one of tokenizer.model with transformers"):
        read_tokenizer(tmp_path)


def test_not_utf_8(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"chat_template.jinja: not UTF-8: unexpected end of data at byte 3"):
        read_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizers", "jinja2"])
def test_without_the_extra(tmp_path, name):
    """What is missing is told of when it is needed, and by the name that pip knows."""
    folder = write_folder(tmp_path, template=CHAT)
    script = (
        "import sys, jlora.text\n"
        "assert not {'tokenizers', 'jinja2', 'jax'} & set(sys.modules), 'imported for nothing'\n"
        f"sys.modules[{name!r}] = None\n"
        "try:\n    jlora.text.read_tokenizer(sys.argv[1])\n"
        "except jlora.JloraError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert done.stdout == f"{name} is not installed: pip install 'jlora[lm]'\n"


def test_a_tokenizer_that_fails(tmp_path):
    """A letter that is not in the vocabulary, and nothing that stands for what is not known."""
    model = models.WordPiece(vocab={letter: number for number, letter in enumerate("a0.\n")}, unk_token="?")
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path)
    path = write_lines(tmp_path / "x.jsonl", {"text": "a"}, {"text": "b"})
    with pytest.raises(DataError, match=r"tokenizer.json: it makes no tokens of a text: .*Missing"):
        read_examples(path, tokenizer, length=9)
