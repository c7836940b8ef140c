"""Texts as arrays of tokens: tokenizers, chat templates, files of examples, packing."""

from jlora.text._examples import Example, Examples, ReadReport, read_examples
from jlora.text._folder import read_tokenizer
from jlora.text._pack import PackReport, bucket, pack
from jlora.text._questions import Question, read_questions
from jlora.text._tokenizer import Tokenizer

__all__ = [
    "Example",
    "Examples",
    "PackReport",
    "Question",
    "ReadReport",
    "Tokenizer",
    "bucket",
    "pack",
    "read_examples",
    "read_questions",
    "read_tokenizer",
]
