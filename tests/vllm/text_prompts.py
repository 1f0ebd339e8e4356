"""Prompts as text, for tests that use a tokenizer."""

from pathlib import Path

# The lengths differ much, so that each rank has another number of tokens. The tokenizer of the tiny models works on bytes and
# pairs of letters. On the tiny Qwen3-MoE no prompt comes near a tie, and the vanilla_tokens fixture checks that.
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
