"""Prompts as text, for tests that go through a tokenizer."""

from pathlib import Path

# Very different lengths (the tokenizer of the tiny models works on bytes and pairs of letters), so that ranks are ragged.
TEXTS = [
    "a",
    "Experts meet at the gate.",
    "wörter, größer als ein Byte: ÄÖÜ",
    "0123456789 " * 9,
    "one token, one direction",
    "?",
    "The quick brown fox jumps over the lazy dog and then over every expert of every rank, twice.",
    "padding is not a token",
]
TEXT_MAX_TOKENS = [12, 9, 16, 5, 14, 11, 7, 13]


def text_prompts(model: Path) -> list[list[int]]:
    """TEXTS as token ids of the model's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]
