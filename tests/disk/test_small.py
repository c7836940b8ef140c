"""Small files that nobody vouches for: read, or refused in words, soon."""

import json
import os
import re
import tomllib

import hypothesis
import hypothesis.strategies as st
import pytest

from jlora import ConfigError, DataError, LoraConfig
from jlora.disk import parse_json, parse_json_value, parse_toml, read_json_lines
from jlora.fields import check_keys
from jlora.paths import nearest

DEEP = {
    "json": [b'{"a":' * 5000, b'{"a": ' + b"[" * 100_000, b'{"a": "\\\\", "b": ' + b"[" * 200],
    "toml": [b"a = " + b"[" * 5000, b"a = " + b"{a=" * 5000, b"[" * 5000, b'a = "\\"" \nb = ' + b"[" * 200],
}


@pytest.mark.parametrize(("form", "text"), [(form, text) for form, texts in DEEP.items() for text in texts])
def test_nesting_is_counted_before_it_is_read(form, text):
    with pytest.raises(ValueError, match=r"^nested too deeply: more than 100 levels$"):
        (parse_json if form == "json" else parse_toml)(text)


def test_brackets_in_strings_are_none():
    text = "[" * 200
    assert parse_json(json.dumps({"a": text, '"': f'\\"{text}'}).encode()) == {"a": text, '"': f'\\"{text}'}
    toml = f'# {text}\na = "{text}"\nb = \'{text}\'\nc = """\\"{text}\n"""\nd = \'\'\'\n{text}\'\'\'\ne = "\\"{text}"'
    assert parse_toml(toml.encode()) == tomllib.loads(toml)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a." * 20 + b"b = 1", "a dotted key of more than 20 parts"),
        (b"[" + b"a." * 20 + b"b]", "a dotted key of more than 20 parts"),
        (b"a = 0x" + b"f" * 1001, "a word or a number of more than 1,000 characters: '0xfff"),
        (b'a = "\xe9"', "'utf-8' codec can't decode byte 0xe9 in position 5"),
        (b'a = "\\ud800"', "Escaped character is not a Unicode scalar value"),
        (b'"""\n\\' * 100_000, "Expected '=' after a key"),
        (b"'''" + b"''" * 100_000, "Expected '='"),
    ],
)
def test_toml_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_toml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
        (b'{"' + b"x" * 5000 + b'": 1, "' + b"x" * 5000 + b'": 1}', r"^key 'x{99}\.\.\. stands twice$"),
        (b"[1]", "wanted an object, found list"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_with_constants_and_of_any_kind():
    assert parse_json(b'{"a": Infinity}', constants=True) == {"a": float("inf")}
    assert parse_json_value(b'["\\ud83d\\ude00", null]') == ["😀", None]
    assert parse_json_value(b"[" * 150 + b"]" * 150, levels=150)


@hypothesis.given(
    st.recursive(
        st.none() | st.text() | st.integers() | st.booleans(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_what_is_written_is_read(data):
    try:
        text = json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    assert parse_json_value(text) == data


def test_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": NaN}\n{"a": ')
    assert [list(row) for row in read_json_lines(path)] == [["a"], ["a"]]
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 2}\n')
    with pytest.raises(DataError, match=r"rows.jsonl: line 2: not valid JSON"):
        read_json_lines(path)


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_a_pipe_is_not_waited_for(tmp_path, ending):
    os.mkfifo(tmp_path / f"c.{ending}")
    with pytest.raises(ConfigError, match="cannot be read: no regular file"):
        LoraConfig.read(tmp_path / f"c.{ending}")


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "c.toml"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(ConfigError, match="larger than 16,777,216 bytes"):
        LoraConfig.read(path)


def test_many_unknown_keys(tmp_path):
    keys = [f"key{i}" for i in range(100_000)]
    with pytest.raises(
        ConfigError, match=r"key 'key0' .*'key4' \(did you mean '\w+'\?\) and 99,995 more; known keys: a$"
    ):
        check_keys(keys, ("a",), "x")
    with pytest.raises(ConfigError, match=r"unknown key 'k{99}\.\.\. ") as caught:
        check_keys(["k" * 1_000_000], ("rank",), "x")
    assert len(str(caught.value)) < 300


def test_the_nearest_of_very_many_names():
    known = [f"model.layers.{i}.{name}.weight" for i in range(5000) for name in ("q_proj", "up_proj")]
    assert nearest("model.layers.77.q_prog.weight", known, 1) == ["model.layers.77.q_proj.weight"]


def test_a_message_quotes_a_long_value_in_short():
    value = "y" * 2_000_000
    with pytest.raises(ConfigError) as caught:
        LoraConfig(scaling=value, alpha=3)
    assert len(str(caught.value)) < 400
    assert re.search("wanted one of 'standard', 'rslora'", str(caught.value))


def test_a_configuration_that_cannot_be_written(tmp_path):
    for ending in ("toml", "json"):
        with pytest.raises(ConfigError, match=f"cannot be written as {ending.upper()}"):
            LoraConfig(extras={"a": "\ud800"}).write(tmp_path / f"c.{ending}")
        assert not list(tmp_path.iterdir())
