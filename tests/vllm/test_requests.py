"""What a request may ask for, over HTTP: an adapter, a form of the answer, an embedding. And new weights in a running server.

OpenAI's client asks vanilla vLLM on one rank and then this package on several. Both get the same requests at the same time.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.lora_adapter import ATTENTION, RANK, write_adapter, write_merged
from tests.vllm.text_prompts import TEXT_MAX_TOKENS, TEXTS
from vllm_npu.strategies.table import STRATEGIES
from vllm_npu.tools.demo.vanilla_demo import DP2_EP, TP2_DP2_EP
from vllm_npu.tools.engines.engine_processes import Parallelism
from vllm_npu.tools.engines.http_engine import HttpEngine
from vllm_npu.tools.engines.stop_signals import StopSignals
from vllm_npu.tools.engines.tiny_models import QWEN3_MOE, TinyModel, write_tiny_model

openai = pytest.importorskip("openai", reason="needs OpenAI's client: pip install openai")
# Size: two servers for each test and topology.
pytestmark = [pytest.mark.nightly, pytest.mark.parametrize("parallelism", [DP2_EP, TP2_DP2_EP], ids=str)]

Serve = Callable[..., AbstractContextManager[HttpEngine]]
ADAPTER = "adapter"
FORMS: list[dict[str, Any]] = [
    {"choice": ["dispatch", "combine", "prepare"]},
    {"regex": "[0-9]{3}-[a-f]{4}"},
    {"json": {"type": "object", "properties": {"rank": {"type": "boolean"}}, "required": ["rank"]}},
]
EMBEDDING_TOLERANCE = 2e-5  # of float32 sums in another order, on vectors of length 1


@pytest.fixture
def serving(tmp_path: Path, caches: Path) -> "Serve":
    """A function that starts a server and waits until it answers. parallelism=None: vanilla vLLM on one rank."""

    @contextmanager
    def serve(model: Path, parallelism: Parallelism | None, *options: str) -> Iterator[HttpEngine]:
        engine = HttpEngine(
            model,
            parallelism or Parallelism(),
            *options,
            *("--kv-cache-memory-bytes", str(64 << 20)),
            plugins="vllm_npu" if parallelism else "",
            moe_comm=next(iter(STRATEGIES)),
            dtype="float32",
            folder=tmp_path / f"{model.name} {parallelism}",
            caches=caches,
            stop_signals=StopSignals(),
            environment={},
        )
        with engine:
            engine.wait_until_ready()
            yield engine

    return serve


def at_once(engine: HttpEngine, ask: Callable[[Any, int], Any], requests: int) -> list[Any]:
    """The answers to requests 0 to `requests` - 1, which `ask` sends by OpenAI's client, all at the same time."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{engine.port}/v1", api_key="none", max_retries=0)
    with ThreadPoolExecutor(requests) as pool:
        return list(pool.map(lambda number: ask(client, number), range(requests)))


def complete(client: Any, number: int, model: str = "tiny") -> list[int]:
    """The ids of greedy tokens after TEXTS[number]."""
    answer = client.completions.create(
        model=model,
        prompt=TEXTS[number],
        max_tokens=TEXT_MAX_TOKENS[number],
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return list(answer.choices[0].token_ids)


def formed(client: Any, number: int) -> str:
    """A greedy answer in one of FORMS."""
    answer = client.completions.create(
        model="tiny",
        prompt=TEXTS[number],
        max_tokens=32,
        temperature=0,
        extra_body={"structured_outputs": FORMS[number % len(FORMS)]},
    )
    text: str = answer.choices[0].text
    return text


def test_adapters_of_attention_and_forms_of_answers(
    parallelism: Parallelism, checkpoint: Callable[[TinyModel], Path], serving: Serve, tmp_path: Path
) -> None:
    """Requests with an adapter, without one, and with a form of the answer share their steps.

    Vanilla vLLM gets a checkpoint to whose weights the adapter was added: with adapters, its MoE models end on a CPU.
    """
    model = checkpoint(QWEN3_MOE)
    adapter = write_adapter(tmp_path / "lora", QWEN3_MOE.config, on_experts=False)
    merged = write_merged(tmp_path / "merged", model, adapter)
    with serving(model, None) as vanilla:
        plain = at_once(vanilla, complete, len(TEXTS))
        forms = at_once(vanilla, formed, len(TEXTS))
    with serving(merged, None) as vanilla:
        adapted = at_once(vanilla, complete, len(TEXTS))
    assert sum(one != other for one, other in zip(plain, adapted, strict=True)) > len(TEXTS) // 2

    def ask(client: Any, number: int) -> Any:
        kind, text = divmod(number, len(TEXTS))
        return formed(client, text) if kind == 2 else complete(client, text, ("tiny", ADAPTER)[kind])

    options = ["--enable-lora", "--lora-modules", f"{ADAPTER}={adapter}", "--max-lora-rank", str(RANK)]
    with serving(model, parallelism, *options, "--lora-target-modules", *ATTENTION) as engine:
        for strategy in STRATEGIES:
            engine.set_moe_comm(strategy)
            assert at_once(engine, ask, 3 * len(TEXTS)) == plain + adapted + forms, strategy


def test_new_weights_in_a_running_server(
    parallelism: Parallelism, checkpoint: Callable[[TinyModel], Path], serving: Serve, tmp_path: Path
) -> None:
    """vLLM's reload_weights with another checkpoint: afterwards, tokens are those of a server that started with it."""
    other = write_tiny_model(replace(QWEN3_MOE, seed=QWEN3_MOE.seed + 1), tmp_path / "other")

    with serving(other, None) as vanilla:
        expected = at_once(vanilla, complete, len(TEXTS))
    with serving(checkpoint(QWEN3_MOE), parallelism) as engine:
        assert at_once(engine, complete, len(TEXTS)) != expected
        engine.rpc("reload_weights", weights_path=str(other))
        for strategy in STRATEGIES:
            engine.set_moe_comm(strategy)
            assert at_once(engine, complete, len(TEXTS)) == expected, strategy


def test_embeddings(parallelism: Parallelism, checkpoint: Callable[[TinyModel], Path], serving: Serve) -> None:
    """A pooling model of the same checkpoint: its vectors are those of one rank, but for the order of sums."""
    options = ["--runner", "pooling", "--convert", "embed"]

    def ask(client: Any, number: int) -> list[float]:
        answer = client.embeddings.create(model="tiny", input=TEXTS[number], encoding_format="float")
        return list(answer.data[0].embedding)

    with serving(checkpoint(QWEN3_MOE), None, *options) as vanilla:
        expected = at_once(vanilla, ask, len(TEXTS))
    assert max(map(math.dist, expected, expected[1:])) > 0.1, "equal vectors would show nothing"
    with serving(checkpoint(QWEN3_MOE), parallelism, *options) as engine:
        for strategy in STRATEGIES:
            engine.set_moe_comm(strategy)
            found = at_once(engine, ask, len(TEXTS))
            assert max(map(math.dist, found, expected)) < EMBEDDING_TOLERANCE, strategy
