"""Texts as arrays of tokens: tokenizers, chat templates, files of examples, packing."""
