"""How answers are printed: whole characters, to pipes that close, to terminals; conversations, and how they end."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest

from jlora import cli
from jlora.cli import _generate
from jlora.cli._generate import _harmless
from jlora.recipes._replies import _Stream
from jlora.text import read_tokenizer
from tests.recipes.tiny_language import write_model
from tests.text.make import KINDS, write_folder, write_lines

PROGRAM = "import sys; from jlora import cli; sys.exit(cli.main(sys.argv[1:]))"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("called in")
    write_model(folder / "model", max_position_embeddings=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def start(*words, **streams):
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, **streams)


def until_asked(terminal):
    """Reads what a terminal is told up to where it asks for a line."""
    told = b""
    while b"> " not in told:
        told += os.read(terminal, 1000)


class TestPieces:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "text", ["größer, naïve", "日本語 🙂👩‍👩‍👧 ok", "two  spaces\n\nlines", "*/5 9-17 * * 1-5"]
    )
    def test_they_are_whole_characters_and_the_answer_together(self, tmp_path, kind, text):
        tokenizer = read_tokenizer(write_folder(tmp_path, kind))
        tokens = tokenizer.encode(text)
        said = []
        stream = _Stream(tokenizer.decode, said.append)
        for step, token in enumerate(tokens):
            stream(step, [token])
        stream(len(tokens), [-1])
        assert not any("\ufffd" in piece for piece in said)
        stream.end()
        assert "".join(said) == tokenizer.decode(tokens)
        assert len(said) > 1

    def test_half_a_character_at_the_end_is_told_as_such(self, tmp_path):
        tokenizer = read_tokenizer(write_folder(tmp_path))
        tokens = tokenizer.encode("a語")[:-1]
        said = []
        stream = _Stream(tokenizer.decode, said.append)
        for step, token in enumerate(tokens):
            stream(step, [token])
        stream.end()
        assert "".join(said) == tokenizer.decode(tokens) == "a\ufffd"

    def test_a_terminal_is_told_nothing_that_it_obeys(self):
        assert _harmless("a\n\tb\x1b[2J\r\x9b🙂👩‍👧é") == "a\n\tb\\x1b[2J\\x0d\\x9b🙂👩‍👧é"


def test_to_answer_takes_nothing_that_trains():
    """These take longer to import than a small model takes to answer."""
    heavy = ("flax", "matplotlib", "optax", "orbax", "sklearn", "torch", "transformers")
    program = (
        "import sys; from jlora import cli; cli.main(sys.argv[1:]); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    words = ("generate", "model", "--prompt", "one", "--max-new-tokens", "1", "--quiet")
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_an_answer_ends_with_who_listens(monkeypatch):
    """Nothing is printed, and no adapter or prompt asked, after the first text that nobody hears."""
    heard = []
    monkeypatch.setattr(_generate, "show", lambda text, end: bool(heard.append(text)))
    assert cli.main(["generate", "model", "--prompt", "one", "--max-new-tokens", "50"]) == 0
    assert len(heard) == 1


@pytest.mark.parametrize("several", [("--file", "many.jsonl"), [word for i in range(40) for word in ("--prompt", i)]])
def test_where_nobody_listens_no_more_is_answered(folder, several):
    """As in `| head -1`; a file that is asked for is written."""
    write_lines(folder / "many.jsonl", *({"prompt": str(i)} for i in range(600)))
    read, write = os.pipe()
    os.close(read)
    process = start("generate", "model", *several, "--max-new-tokens", 100, stdout=write)
    os.close(write)
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 0


def test_a_file_is_written_though_nobody_listens(folder):
    read, write = os.pipe()
    os.close(read)
    words = ("--prompt", "one", "--prompt", "two", "--max-new-tokens", 2, "--out", "written.jsonl")
    process = start("generate", "model", *words, stdout=write)
    os.close(write)
    assert process.communicate(timeout=60)[1] == b""
    answers = [json.loads(line) for line in (folder / "written.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["one", "two"]


class TestConversation:
    @pytest.mark.parametrize(
        ("by", "code", "written"), [(signal.SIGINT, 0, True), (signal.SIGTERM, 143, False)], ids=["Ctrl-C", "SIGTERM"]
    )
    def test_it_ends_by_a_signal(self, folder, by, code, written):
        out = folder / f"{by.name}.jsonl"
        words = ("--chat", "--max-new-tokens", 2, "--out", out)
        process = start("generate", "model", *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert process.stdout.readline().endswith(b"\n")
        process.send_signal(by)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, out.exists()) == (code, written)
        assert b"Traceback" not in said
        assert [name for name in os.listdir(folder) if name.endswith(".jlora")] == []
        if written:
            assert json.loads(out.read_text())["prompt"] == [{"role": "user", "content": "one"}]

    def test_on_a_terminal(self, folder):
        """It asks for each line; Ctrl-D ends it."""
        ours, theirs = pty.openpty()
        process = start("generate", "model", "--chat", "--max-new-tokens", 2, stdin=theirs, stdout=theirs)
        os.close(theirs)
        until_asked(ours)
        os.write(ours, b"one\n")
        until_asked(ours)
        os.write(ours, b"\x04")
        assert process.communicate(timeout=60)[1] == b"\n"
        assert process.returncode == 0
        os.close(ours)

    def test_input_that_is_no_text(self, folder):
        process = start(
            "generate", "model", "--chat", "--max-new-tokens", 2, "--out", "kept.jsonl", stdin=subprocess.PIPE
        )
        _, said = process.communicate(b"one\n\xff\xfe\n", timeout=60)
        assert process.returncode == 2
        assert said.startswith(b"jlora: the conversation ends: standard input: not UTF-8")
        assert len((folder / "kept.jsonl").read_text().splitlines()) == 1

    def test_no_input_at_all(self):
        command = ["sh", "-c", 'exec "$0" "$@" <&-', sys.executable, "-c", PROGRAM, "generate", "model", "--chat"]
        done = subprocess.run(command, capture_output=True, timeout=60)
        assert b"standard input is closed" in done.stderr
        assert done.returncode == 2

    def test_it_ends_where_the_model_has_no_room_for_more(self, folder):
        process = start("generate", "model", "--chat", "--json", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        printed, said = process.communicate(b"one two three\n" * 9, timeout=60)
        assert process.returncode == 2
        assert b"the conversation ends: the prompt [{'role': 'user'" in said
        assert b"the model 128 positions: wanted a shorter prompt" in said
        answers = json.loads(printed)["answers"]
        assert 1 <= len(answers) < 9
        assert sum(answer["tokens"] for answer in answers) < 128
