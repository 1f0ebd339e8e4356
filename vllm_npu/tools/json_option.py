"""A JSON object in an option of the command line, as vLLM's own options have it."""

import json
from typing import Any

from vllm_npu.errors import InvalidInputError


def read_object(option: str, text: str) -> dict[str, Any]:
    """The object in the text. Raises InvalidInputError, which names the option and the text, for anything else."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InvalidInputError(f"{option} {text[:80]} is no JSON ({error}); write it as for vllm serve") from error
    if not isinstance(content, dict):
        raise InvalidInputError(f"{option} {text[:80]} is no JSON object; write it as for vllm serve")
    return content
