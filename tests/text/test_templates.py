"""Chat templates: what hostile ones cannot do, and what is said of those that fail."""

import datetime
import time

import pytest

from jlora import DataError
from jlora.text import read_tokenizer
from jlora.text._template import ChatTemplate, Conversation
from tests.text.make import turns, write_folder


def grown(value: str) -> str:
    """A template that doubles something sixty times."""
    return f"{{% set n = namespace(x='xx') %}}{{% for i in range(60) %}}{{% set n.x = {value} %}}{{% endfor %}}"


HOSTILE = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop in a condition": "{% for a in range(99999) %}{% for b in range(9999) if b < 0 %}{% endfor %}{% endfor %}",
    "a huge range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a loop that calls itself": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "a text times a number": "{{ 'x' * 10 ** 9 }}",
    "a list times a number": "{{ ([1] * 10 ** 9) | length }}",
    "powers": "{{ 10 ** (10 ** 10) }}",
    "products": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubled by +": grown("n.x + n.x"),
    "doubled by ~": grown("n.x ~ n.x"),
    "doubled by join": grown("[n.x, n.x] | join"),
    "doubled by a method": grown("''.join([n.x, n.x])"),
    "doubled by a block": "{% set n = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "doubled by replace": grown("n.x | replace('x', 'xx')"),
    "doubled by replace of a text": grown("n.x.replace('x', 'xx')"),
    "much is written": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
    "a width of a format": "{{ '%999999999d' % 1 }}",
    "a width that is given": "{{ '%*d' % (999999999, 1) }}",
    "a width of another format": "{{ '{:>999999999}'.format(1) }}",
    "a width of a filter": "{{ '%999999999d' | format(1) }}",
    "a width of a map": "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
    "center": "{{ 'x' | center(999999999) }}",
    "indent": "{{ 'x\n' | indent(999999999) }}",
    "an indent of JSON": "{{ [1] | tojson(indent=999999999) }}",
    "batch": "{{ [1] | batch(999999999, 1) | list | length }}",
    "slice": "{{ [1] | slice(999999999) | list | length }}",
    "ljust": "{{ 'x'.ljust(999999999) }}",
    "expandtabs": "{{ '\t'.expandtabs(999999999) }}",
    "lorem ipsum": "{{ lipsum(n=99999999) }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.os }}",
    "an attribute by a filter": "{{ (''|attr('__class__')).__mro__ }}",
    "an attribute by a format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "a list of the same": "{% set x = ['x' * 9999] * 99999 %}{{ x }}",
    "a list of the same as JSON": "{% set x = ['x' * 9999] * 99999 %}{{ x | tojson }}",
    "lists in lists": grown("[n.x, n.x]") + "{{ n.x }}",
    "a namespace": "{% set n = namespace(**{'__class__': 1}) %}{{ n }}",
    "a namespace that is set": "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n }}",
    "the messages changed": "{{ messages.append(1) }}",
    "another file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os }}",
}


SLOW = {"loops in loops", "a loop in a condition", "a macro that calls itself twice", "lists in lists"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in HOSTILE], ids=str
)
def test_hostile(tmp_path, name):
    template = ChatTemplate(HOSTILE[name], tmp_path / "chat_template.jinja", {}, None)
    started = time.perf_counter()
    with pytest.raises(DataError, match=r"the chat template .*chat_template.jinja failed: "):
        template.write(Conversation(turns("Hi", "Hello")))
    assert time.perf_counter() - started < 60


def test_bounded_by_time(tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.text._sandbox.MOST_SECONDS", 0.2)
    template = ChatTemplate(HOSTILE["a loop in a condition"], tmp_path / "x.jinja", {}, None)
    with pytest.raises(DataError, match="more than 0 seconds"):
        template.write(Conversation(turns("Hi")))
    monkeypatch.undo()
    monkeypatch.setattr("jlora.text._sandbox.MOST_STEPS", 50)
    template = ChatTemplate(HOSTILE["loops in loops"], tmp_path / "x.jinja", {}, None)
    with pytest.raises(DataError, match="SecurityError: 'more than 50 steps'"):
        template.write(Conversation(turns("Hi")))


def test_each_writing_has_its_own_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.text._sandbox.MOST_STEPS", 50)
    template = ChatTemplate("{% for a in range(30) %}{% endfor %}done", tmp_path / "x.jinja", {}, None)
    for _ in range(3):
        assert template.write(Conversation(turns("Hi"))) == "done"


def test_what_a_template_says_is_wrong(tmp_path):
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    tokenizer = read_tokenizer(write_folder(tmp_path, template=source))
    with pytest.raises(DataError, match="the chat template refuses: 'begin with the user'"):
        tokenizer.chat([{"role": "system", "content": "x"}])


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (
            "{% for %}",
            r"chat_template.jinja: not a chat template: line 1: TemplateSyntaxError: .*got 'end of statement",
        ),
        ("\n{% if x %}", r"not a chat template: line 2: TemplateSyntaxError: .Unexpected end of template"),
        ("{{ x | no_such_filter }}", r"not a chat template: line 1: TemplateAssertionError: .*no_such_filter"),
        ("{% generation %}", r"not a chat template: line 1: TemplateSyntaxError"),
    ],
)
def test_no_template(tmp_path, source, problem):
    with pytest.raises(DataError, match=problem):
        read_tokenizer(write_folder(tmp_path, template=source))


def test_a_template_that_fails(tmp_path):
    tokenizer = read_tokenizer(write_folder(tmp_path, template="{{ messages[5].content.text }}"))
    with pytest.raises(DataError, match=r"chat_template.jinja failed: UndefinedError: .*has no element 5"):
        tokenizer.chat(turns("Hi"))


def test_no_template_at_all(tmp_path):
    tokenizer = read_tokenizer(write_folder(tmp_path, template=None))
    with pytest.raises(DataError, match=r"has no chat template \(chat_template.jinja, or .*as strings, or add"):
        tokenizer.chat(turns("Hi"))
    assert tokenizer.template is None


def test_the_time_that_a_template_is_told(tmp_path):
    folder = write_folder(tmp_path, template="{{ strftime_now('%d %b %Y') }}")
    tokenizer = read_tokenizer(folder, now=datetime.datetime(2024, 7, 26))
    assert tokenizer.chat(turns("Hi")) == "26 Jul 2024"
    assert read_tokenizer(folder).chat(turns("Hi")) == datetime.datetime.now().strftime("%d %b %Y")


def test_marks_within_macros_and_variables(tmp_path):
    """Where a mark stands in the string is known wherever the template writes it."""
    source = (
        "{% macro say(m) %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endmacro %}"
        "{% set all %}{% for m in messages %}{{ say(m) if m.role == 'assistant' else m.content }}{% endfor %}"
        "{% endset %}<<{{ all }}>>"
    )
    template = ChatTemplate(source, tmp_path / "x", {}, None)
    text, spans = template.write_marked(Conversation(turns("Hi", "Hello", "And", "Bye")))
    assert template.marks
    assert text == "<<Hi[Hello]And[Bye]>>" == template.write(Conversation(turns("Hi", "Hello", "And", "Bye")))
    assert [text[begin:end] for begin, end in spans] == ["Hello", "Bye"]
