"""Messages: of bounded length, and nothing in them that a terminal would obey."""

import pickle
import warnings

import pytest

from jlora import AdapterError, ConfigError, DataError, JloraError, JloraWarning, TargetError
from jlora.errors import listed, plain, printable, shortened, together
from jlora.tables import html_table, text_table

ESCAPE = "\x1b[2J\x1b]0;title\x07\r\u202e"
ESCAPED = r"\x1b[2J\x1b]0;title\x07\r\u202e"


@pytest.mark.parametrize("kind", [JloraError, ConfigError, TargetError, AdapterError, DataError, JloraWarning])
def test_a_message_is_bounded_and_prints(kind):
    text = str(kind(f"{ESCAPE}{'x' * 2_000_000}end\n  next\nfake: {ESCAPE}" + "\n  more" * 100))
    first, second, *rest = text.split("\n")
    assert first.startswith(f"{ESCAPED}xxx")
    assert first.endswith("xend")
    assert len(first) < 1100
    assert second == rf"  next\nfake: {ESCAPED}"  # a line break out of a name begins no line
    assert len(rest) == 59
    assert rest[-1] == "  and 42 more lines"
    assert str(kind(text)).count("\n") == 60
    assert str(pickle.loads(pickle.dumps(kind(text)))) == str(kind(text))


def test_warnings_are_made_by_their_class():
    with pytest.warns(JloraWarning, match=r"^a\\x1b$"):
        warnings.warn("a\x1b", JloraWarning, stacklevel=1)


def test_lists_of_names():
    assert listed([]) == ""
    assert listed("abc") == "a, b, c"
    assert listed(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7 and 4 more"
    assert listed((name for name in "abcd"), 3) == "a, b, c and 1 more"
    assert listed([ESCAPE, "\n  b"]) == rf"{ESCAPED}, \n  b"
    assert len(listed(["x" * 100_000] * 10_000)) < 10_000


def test_several_problems_are_one_message():
    assert together(["a"]) == "a"
    assert together(["a"], "file") == "file: a"
    assert together(["a", "b"]) == "2 problems:\n  a\n  b"
    assert together(["a"] * 1002, "file", 2) == "file: 1,002 problems:\n  a\n  a\n  and 1,000 more"


def test_what_is_quoted_is_short():
    assert shortened("a\nb") == r"'a\nb'"
    assert len(shortened("é" * 10**6)) == 103
    assert shortened(10**5000) == "int"
    assert len(shortened({"a": ["b" * 300]}, 50)) == 53


def test_plain_text_stays():
    text = "path: é ─ wanted\n  a\n    b"
    assert plain(text) == text
    assert printable("\t\ud800") == r"\t\ud800"


def test_tables_of_names():
    rows = [(ESCAPE, "<b>"), ("x" * 5000, "1")]
    text, page = text_table(("name", "n"), rows), html_table(("name", "n"), rows)
    for found in (text, page):
        assert ESCAPED in found
        assert all(line.isprintable() for line in found.split("\n"))
        assert len(found) < 10_000
    assert "&lt;b&gt;" in page
