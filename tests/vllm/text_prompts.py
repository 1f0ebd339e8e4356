"""Prompts as text, for tests that go through a tokenizer."""

from pathlib import Path

# Very different lengths (the tokenizer of the tiny models works on bytes and pairs of letters), so that ranks are ragged.
# On the tiny Qwen3-MoE none of them comes near a tie; whoever generates from them checks that.
TEXTS = [
    "a",
    "Experts meet at the gate.",
    "wörter, größer als ein Byte: ÄÖÜ",
    "0123456789 " * 8,
    "tokens",
    "!",
    "the longest prompt of them all is this one, with more than a hundred bytes in it, so that one rank has far more to "
    "prefill than the other",
    "naïve",
]
TEXT_MAX_TOKENS = [12, 9, 8, 5, 14, 11, 7, 13]


def text_prompts(model: Path) -> list[list[int]]:
    """TEXTS as token ids of the model's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]
