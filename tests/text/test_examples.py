"""Files of examples: what counts, what is cut and left out, and what is said of lines that are no examples."""

import json

import numpy as np
import pytest

from jlora import ConfigError, DataError
from jlora.text import Example, Examples, read_examples, read_tokenizer
from tests.text.make import CHAT, KINDS, MARKED, turns, write_folder, write_lines


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: read_tokenizer(write_folder(folder / kind, kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["byte_level"]


def read(tmp_path, tokenizer, *rows, length=500, **options):
    return read_examples(write_lines(tmp_path / "x.jsonl", *rows), tokenizer, length=length, **options)


def learned(example):
    return example.tokens[example.counts].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The capital of France is", " Paris."),
        ("The capital of France is ", "Paris."),
        ("every 5 minutes: ", "*/5 9-17 * * 1-5"),
        ("Hel", "lo"),
        ("", "alone"),
        ("größer 🙂", "🙂 naïve\n"),
        ("a\n", "\nb"),
    ],
)
def test_what_is_given_before_a_completion(tmp_path, tokenizers, kind, prompt, completion):
    """The model is trained after the very tokens that it is given at inference, and what it is to say is the text."""
    tokenizer = tokenizers[kind]
    (example,), report = read(tmp_path, tokenizer, {"prompt": prompt, "completion": completion})
    given = tokenizer.prompt(prompt)
    assert example.tokens[: len(given)].tolist() == given
    assert example.counts[1:].tolist() == ([False] * len(given) + [True] * (len(example.tokens) - len(given)))[1:]
    assert not example.counts[0]  # before which there is nothing
    assert example.tokens[-1] == tokenizer.eos
    whole = [*tokenizer.prompt(prompt + completion), tokenizer.eos]
    assert report.joined == (example.tokens.tolist() != whole)
    if kind != "wordpiece":  # which keeps no spaces, and no case
        assert tokenizer.decode(example.tokens) == prompt + completion


def test_prompts_that_end_within_a_token(tmp_path, tokenizers):
    row = {"prompt": "The capital of France is ", "completion": "Paris."}
    for kind in ("byte_level", "sentencepiece"):
        _, report = read(tmp_path, tokenizers[kind], row)
        assert report.joined == 1
        assert "1 whose prompt ends within a token" in str(report)


@pytest.mark.parametrize("kind", KINDS)
def test_texts(tmp_path, tokenizers, kind):
    tokenizer = tokenizers[kind]
    (example,), _ = read(tmp_path, tokenizer, {"text": "Hello, hello!"})
    tokens = [*tokenizer.prompt("Hello, hello!"), tokenizer.eos]
    assert example.tokens.tolist() == tokens
    assert example.counts.tolist() == [False] + [True] * (len(tokens) - 1)


def test_bos_and_eos_stand_once(tmp_path, tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    bos, eos = tokenizer.bos, tokenizer.eos
    (text, pair), _ = read(tmp_path, tokenizer, {"text": "<s>Hi</s>"}, {"prompt": "<s>Hi", "completion": " you</s>"})
    for example in (text, pair):
        assert (example.tokens == bos).sum() == (example.tokens == eos).sum() == 1
    assert pair.tokens[: len(tokenizer.prompt("<s>Hi"))].tolist() == tokenizer.prompt("<s>Hi")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marks", [CHAT, MARKED])
def test_conversations(tmp_path, tokenizers, kind, marks):
    """The assistant's words count, to the token that ends its turn, with marks and without."""
    tokenizer = tokenizers[kind]
    if marks is MARKED:
        tokenizer = read_tokenizer(write_folder(tmp_path / "model", kind, MARKED))
    said = ["Fine, thank you.", "Of course: 3.14"]
    chat = turns("How are you?", said[0], "And a number?", said[1], "Thank you")
    (example,), report = read(tmp_path, tokenizer, {"messages": chat})
    assert example.tokens.tolist() == tokenizer.encode(tokenizer.chat(chat))
    text = tokenizer.decode(learned(example), special=True)
    wanted = tokenizer.decode(tokenizer.encode("".join(f"{each}<|end|>" for each in said)), special=True)
    assert "".join(text.split()) == "".join(wanted.split())
    assert report.joined == 0
    for number in (1, 3):
        given = tokenizer.prompt(chat[:number])
        assert example.tokens[: len(given)].tolist() == given
        assert example.counts[len(given)]
        assert not example.counts[len(given) - 1]


@pytest.mark.parametrize("marks", [CHAT, MARKED])
def test_prompts_that_are_messages(tmp_path, marks):
    """Of the prompt nothing counts, be it what the assistant said."""
    tokenizer = read_tokenizer(write_folder(tmp_path / "model", template=marks))
    chat = turns("Hi", "Hello", "How are you?", "Fine")
    whole, last, strings = (
        {"messages": chat},
        {"prompt": chat[:3], "completion": chat[3:]},
        {"prompt": "How are you?", "completion": "Fine"},
    )
    examples, _ = read(tmp_path, tokenizer, whole, last, strings, template=True)
    assert examples[0].tokens.tolist() == examples[1].tokens.tolist()
    end = len(tokenizer.prompt(chat[:3]))
    assert examples[1].counts.tolist() == [*[False] * end, *examples[0].counts[end:].tolist()]
    assert learned(examples[1]) == learned(examples[2]) == tokenizer.encode("Fine<|end|>")
    assert examples[2].tokens.tolist() == tokenizer.encode(tokenizer.chat(chat[2:]))


def test_what_a_line_tells_the_template(tmp_path):
    source = "{{ tools | tojson }}{{ documents }}{{ mood }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    tokenizer = read_tokenizer(write_folder(tmp_path / "model", template=source))
    more = {"tools": [{"name": "f"}], "documents": ["d"], "chat_template_kwargs": {"mood": "good"}, "id": 7}
    (example,), _ = read(tmp_path, tokenizer, {"messages": turns("Hi", "Hello"), **more})
    assert tokenizer.decode(example.tokens, special=True) == '[{"name": "f"}][\'d\']goodHi<|end|>Hello<|end|>'


def test_a_template_that_rewrites_earlier_turns(tmp_path):
    """As Qwen3's, which leaves out what an earlier turn thought."""
    source = (
        "{% for m in messages %}<|{{ m.role }}|>\n"
        "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = read_tokenizer(write_folder(tmp_path / "model", template=source))
    chat = turns("Hi", "Hello", "How are you?", "Fine")
    with pytest.raises(DataError, match=r"line 1: the chat template writes message 2, .* give each answer a line"):
        read(tmp_path, tokenizer, {"messages": chat})
    (example,), _ = read(tmp_path, tokenizer, {"prompt": chat[:3], "completion": chat[3:]})  # the way out
    assert tokenizer.decode(learned(example), special=True) == "<think></think>Fine<|end|>"


def test_a_template_whose_prompt_ends_within_a_token(tmp_path):
    """One answer is put together of pieces; a second would come after other tokens than the model is given."""
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = read_tokenizer(write_folder(tmp_path / "model", template=source))
    (example,), report = read(tmp_path, tokenizer, {"messages": turns("Hello", "How are you?")})
    given = tokenizer.prompt(turns("Hello"))
    assert example.tokens[: len(given)].tolist() == given
    assert tokenizer.decode(example.tokens) == "user: Hello\nassistant: How are you?\n"
    assert report.joined == 1
    with pytest.raises(DataError, match="line 1: the prompt of an answer ends within a token, and answers before it"):
        read(tmp_path, tokenizer, {"messages": turns("Hello", "How are you?", "Hello", "How are you?")})


def test_long_examples(tmp_path, tokenizer):
    rows = [{"prompt": "a" * 10, "completion": "b" * count} for count in (5, 30, 50)]
    rows.append({"prompt": "a b " * 50, "completion": "c"})
    sizes = [len(example.tokens) for example in read(tmp_path, tokenizer, *rows)[0]]
    length = sizes[1]
    examples, report = read(tmp_path, tokenizer, *rows, length=length)
    assert examples.lengths.tolist() == [sizes[0], length, length]
    assert (report.lines, report.examples, report.cut, report.dropped, report.empty) == (4, 3, 1, 0, 1)
    assert (examples[1].tokens[-1], examples[2].tokens[-1] == tokenizer.eos) == (tokenizer.eos, False)
    assert report.longest == max(sizes)
    assert report.tokens == len(examples.tokens)
    assert report.counted == examples.counts.sum()
    said = f"1 cut to {length}; 1 left out that have nothing to learn in their first {length} tokens"
    assert said in str(report)
    examples, report = read(tmp_path, tokenizer, *rows, length=length, long="drop")
    assert examples.lengths.tolist() == sizes[:2]
    assert (report.cut, report.dropped, report.empty) == (0, 2, 0)
    assert f"; 2 longer than {length} left out" in str(report)
    with pytest.raises(DataError, match=r"no example is left: .*x.jsonl: 0 examples.* a greater length, or shorter"):
        read(tmp_path, tokenizer, rows[3], length=8)
    with pytest.raises(ConfigError, match=r"long = 'crop': wanted one of 'cut', 'drop'"):
        read(tmp_path, tokenizer, *rows, long="crop")
    with pytest.raises(ConfigError, match="length = 1: wanted a whole number of at least 2"):
        read(tmp_path, tokenizer, *rows, length=1)


BAD = {
    "{": r"line 2: not valid JSON: .*'\{'",
    "[1]": "line 2: not valid JSON: wanted an object, found list",
    '{"text": 1, "text": 2}': "line 2: not valid JSON: key 'text' stands twice",
    '{"text": "\\ud800"}': "line 2: not valid JSON: half of a surrogate pair",
    '{"text": NaN}': "line 2: not valid JSON: NaN is no JSON number",
    '{"prompt": "a"}': r"line 2: wanted {\"prompt\": .*, found the keys \['prompt'\]",
    '{"prompt": "a", "completion": "b", "text": "c"}': r"line 2: wanted .*found the keys \['completion', 'prompt', 'te",
    '{"instruction": "a", "output": "b"}': r"line 2: wanted .*found the keys \['instruction', 'output'\]",
    "{}": r"line 2: wanted .*found the keys \[\]",
    '{"text": ["a"]}': r"line 2: text: wanted a string, found \['a'\]",
    '{"prompt": 1, "completion": "b"}': "line 2: prompt and completion: wanted two strings or .* found int and str",
    '{"prompt": "a", "completion": [{"role": "x", "content": "b"}]}': "line 2: prompt and .* found str and list",
    '{"prompt": "a", "completion": null}': "line 2: prompt and completion: .* found str and NoneType",
    '{"messages": []}': r"line 2: messages: wanted a list of messages, found \[\]",
    '{"messages": ["a"]}': 'line 2: messages: message 1: wanted {"role": ..., "content": ...}, found \'a\'',
    '{"messages": [{"from": "gpt", "value": "a"}]}': 'line 2: messages: message 1: wanted {"role"',
    '{"messages": [{"role": "user"}]}': "line 2: messages: message 1: content: wanted a string, found None",
    '{"messages": [{"role": "user", "content": "a"}]}': "line 2: no message of the assistant, from which to learn",
    '{"messages": [{"role": "user", "content": "a"}], "tools": 1}': "line 2: tools: wanted a list, found 1",
    '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": 1}': "line 2: chat_template_kwargs: w",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line(tmp_path, tokenizer, line):
    with pytest.raises(DataError, match=r"x\.jsonl: " + BAD[line]):
        read(tmp_path, tokenizer, {"text": "good"}, line, {"text": "good"})


def test_every_bad_line_is_told_in_order(tmp_path, tokenizer):
    good = json.dumps({"text": "good"})
    with pytest.raises(DataError) as caught:
        read(tmp_path, tokenizer, "{}", good, "", "{", good, '{"text": 1}', *["{}"] * 2000)
    lines = str(caught.value).split("\n")
    assert lines[0].endswith("x.jsonl: 1,000 problems:")
    assert [line.split(":")[0].strip() for line in lines[1:4]] == ["line 1", "line 4", "line 6"]
    assert lines[-1] == "  and 988 more"


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        (b"", r"x.jsonl: no examples in it: wanted {\"prompt\""),
        (b"\n \r\n\n", "no examples in it"),
        (b'[{"text": "a"}]', "one JSON array; wanted one object a line: jq"),
        (b'\n  [\n{"text": "a"}]', "line 2: not valid JSON"),
        ('{"text": "a"}\n'.encode("utf-16"), "in UTF-16; save it as UTF-8"),
        (
            b'{"text": "a"}\n{"text": "\xff"}',
            "line 2: not valid JSON: 'utf-8' codec can't decode byte 0xff in position 10",
        ),
        (b'{"text": "a"}\n{"text": "b', "line 2: not valid JSON: Unterminated string"),
        (b'{"text": "' + b"[" * 500 + b'"}\n' + b'{"text": ' + b"[" * 500, "line 2: not valid JSON: nested too deeply"),
    ],
)
def test_a_bad_file(tmp_path, tokenizer, contents, problem):
    (tmp_path / "x.jsonl").write_bytes(contents)
    with pytest.raises(DataError, match=problem):
        read_examples(tmp_path / "x.jsonl", tokenizer, length=50)


def test_files_that_cannot_be_read(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read: No such file"):
        read_examples(tmp_path / "none.jsonl", tokenizer, length=50)
    with pytest.raises(DataError, match=r"cannot be read: no regular file"):
        read_examples(tmp_path, tokenizer, length=50)
    monkeypatch.setattr("jlora.text._lines.MOST_LINE", 100)
    with pytest.raises(DataError, match=r"line 2: longer than 100 bytes"):
        read(tmp_path, tokenizer, {"text": "a"}, {"text": "a" * 200})


def test_ways_to_end_a_line(tmp_path, tokenizer):
    """A byte order mark, CRLF, blank lines, no end of the last line, U+2028 within a line."""
    line = json.dumps({"text": "a\u2028b"}, ensure_ascii=False).encode()
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line + b"\n\n" + line)
    examples, report = read_examples(tmp_path / "x.jsonl", tokenizer, length=50)
    assert report.lines == len(examples) == 3
    assert {tuple(example.tokens) for example in examples} == {(*tokenizer.encode("a\u2028b"), tokenizer.eos)}


def test_the_same_in_parts(tmp_path, tokenizer, monkeypatch):
    """However many lines are made tokens at once, the examples are the same."""
    rows = [{"text": "ab " * (number % 7 + 1)} for number in range(23)]
    whole, report = read(tmp_path, tokenizer, *rows)
    monkeypatch.setattr("jlora.text._examples._CHUNK_ROWS", 5)
    parts, again = read(tmp_path, tokenizer, *rows)
    assert report == again
    for name in ("tokens", "counts", "offsets"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert (whole.tokens.dtype, whole.counts.dtype) == (np.int32, np.bool_)


def test_examples_are_a_sequence():
    pieces = [Example(np.arange(size), np.ones(size, bool)) for size in (3, 0, 2)]
    examples = Examples.of(pieces)
    assert [example.tokens.tolist() for example in examples] == [[0, 1, 2], [], [0, 1]]
    assert examples[-1].counts.tolist() == [False, True]
    assert len(Examples.of([])) == 0
    with pytest.raises(IndexError):
        examples[3]


def test_messages_without_a_template(tmp_path):
    """It is told once, and not of every line."""
    tokenizer = read_tokenizer(write_folder(tmp_path / "model", template=None))
    chat = {"messages": turns("Hi", "Hello")}
    problem = r"x.jsonl: line 2: .*model has no chat template \(chat_template.jinja.*: write prompts and completions as"
    with pytest.raises(DataError, match=problem) as caught:
        read(tmp_path, tokenizer, {"text": "a"}, chat, chat)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"line 1: .* has no chat template"):
        read(tmp_path, tokenizer, {"prompt": "Hi", "completion": "Hello"}, template=True)


def test_a_conversation_without_end(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("jlora.text._written._MOST_TURNS", 3)
    with pytest.raises(DataError, match="line 1: 4 messages of the assistant: at most 3, or a template with marks"):
        read(tmp_path, tokenizer, {"messages": turns(*"abcdefgh")})
