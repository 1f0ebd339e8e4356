"""A program that runs one vLLM engine: it reads JSON lines from stdin, answers with JSON lines on stdout, and logs on stderr.

    python -m vllm_npu.tools.engines.offline_engine [--request FILE]

The first line on stdin (or FILE) is an EngineRequest. The program builds `vllm.LLM` and answers `{"event": "ready", ...}`.
Then, for each strategy, it switches the running engine to the strategy, generates the same prompts greedily, and answers
`{"event": "finished", ...}` (a StrategyResult). With `await_go`, it waits for a further line on stdin before every strategy.
The end of the input ends the process in good order.

For data parallelism, each rank is one such process. All engines run a step at the same time until no rank has work left, so
`generate` returns on all ranks at about the same time. With `await_go`, the parent also keeps the ranks together between
strategies, and every engine stays alive until the last rank has answered.

`EngineRequest` and `StrategyResult` are the whole protocol. vLLM is imported only when an engine is built, because the import
is slow and the parent process imports this module too.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput


class MalformedRequestError(ValueError):
    """The request is not one JSON object with the fields of EngineRequest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """The task of one engine process."""

    model: str  # folder with config.json and model.safetensors
    prompts: list[list[int]]  # this rank's share, as token ids
    max_tokens: list[int]  # tokens to generate for each prompt; different numbers let ranks end at different steps
    strategies: list[str | None] = field(default_factory=lambda: [None])  # None: keep vLLM's own communication
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    data_parallel_port: int = 0  # on 127.0.0.1, the same on every rank; ignored when data_parallel_size is 1
    enable_expert_parallel: bool = False
    dtype: str = "float32"
    enforce_eager: bool = True  # False: torch.compile
    await_go: bool = False  # wait for a line on stdin before every strategy
    measure_margins: bool = False  # report the least gap to the second-best token
    measure_prompts: bool = False  # report the log-probability of every token of the prompts
    engine_args: dict[str, Any] = field(default_factory=dict)  # further vllm.EngineArgs, by their Python names

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.max_tokens):
            raise MalformedRequestError(
                f"EngineRequest: {len(self.prompts)} prompts but {len(self.max_tokens)} max_tokens; give one per prompt"
            )
        if not self.prompts or not all(self.prompts):
            raise MalformedRequestError("EngineRequest: every rank needs at least one prompt, none of them empty")
        if self.data_parallel_size > 1 and not self.data_parallel_port:
            raise MalformedRequestError(
                f"EngineRequest: data_parallel_size={self.data_parallel_size} needs data_parallel_port, "
                "a free port that all ranks share"
            )

    def to_json(self) -> str:
        """One line of JSON, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse one JSON object. Raises MalformedRequestError, which names the fault."""
        try:
            members = json.loads(text)
        except json.JSONDecodeError as error:
            raise MalformedRequestError(f"EngineRequest: not JSON ({error}); got {text[:80]!r}") from error
        if not isinstance(members, dict):
            raise MalformedRequestError(f"EngineRequest: expected a JSON object, got {type(members).__name__}")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(members.keys() - known):
            raise MalformedRequestError(f"EngineRequest: unknown fields {unknown}; it has {sorted(known)}")
        if missing := sorted({"model", "prompts", "max_tokens"} - members.keys()):
            raise MalformedRequestError(f"EngineRequest: missing fields {missing}")
        return cls(**members)


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyResult:
    """The tokens that one rank generated with one strategy."""

    strategy: str | None  # the requested one; the counters name the one that ran
    tokens: list[list[int]]  # one list per prompt of the request, in order
    seconds: float  # of generate()
    counters: list[dict[str, Any]]  # one for each worker (tensor-parallel rank); empty for strategy None
    smallest_margin: float | None  # least gap (nats) to the second-best token; None: not measured
    prompt_logprobs: list[list[float]] | None = None  # of each prompt's tokens but the first (nats); None: not measured

    def to_json(self) -> str:
        """One line of JSON. Its event tells the parent that it is a result."""
        return json.dumps({"event": "finished", **asdict(self)})

    @classmethod
    def from_event(cls, event: dict[str, Any]) -> Self:
        """The result of a parsed line of `to_json`."""
        return cls(**{f.name: event[f.name] for f in fields(cls)})


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the engine process. Exit status 2: malformed request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--request", type=Path, help="file with the request, instead of the first line on stdin")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _exit_in_good_order)
    answers = _claim_stdout()
    try:
        request = EngineRequest.from_json(options.request.read_text() if options.request else sys.stdin.readline())
    except (MalformedRequestError, OSError) as error:
        parser.error(str(error))
    serve_request(request, answers)
    sys.stderr.flush()
    os._exit(0)  # the engine is shut down; the interpreter would take seconds to take vLLM's modules apart


def serve_request(request: EngineRequest, answers: TextIO) -> None:
    """Run `request`. Write one JSON line to `answers` when the engine is ready, and one for each strategy."""
    started = time.perf_counter()
    with _engine(request) as llm:
        _answer(answers, json.dumps({"event": "ready", "seconds": time.perf_counter() - started}))
        for strategy in request.strategies:
            if request.await_go and not sys.stdin.readline():
                return
            _answer(answers, _run_strategy(llm, request, strategy).to_json())
        if request.await_go:
            sys.stdin.readline()  # engines of other ranks communicate with this one until every rank has answered


@contextmanager
def _engine(request: EngineRequest) -> Iterator["LLM"]:
    """Build the engine. After the block, also after an error, shut its processes down."""
    if request.data_parallel_size > 1:
        os.environ.update(
            VLLM_DP_RANK=str(request.data_parallel_rank),
            VLLM_DP_RANK_LOCAL=str(request.data_parallel_rank),
            VLLM_DP_SIZE=str(request.data_parallel_size),
            VLLM_DP_MASTER_IP="127.0.0.1",
            VLLM_DP_MASTER_PORT=str(request.data_parallel_port),
        )
    from vllm import LLM
    from vllm.platforms import current_platform

    engine_args: dict[str, Any] = {
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,  # every strategy must prefill its prompts itself
        **request.engine_args,
    }
    if current_platform.is_cpu() and request.dtype == "float32":
        # COMPAT(vllm 0.32): on a CPU with AMX, vLLM chooses AMX_MLA for latent attention, which takes 16-bit weights alone.
        # Other models ignore this choice. CAN REMOVE when vLLM looks at the dtype.
        engine_args.setdefault("attention_backend", "CPU_MLA")
    llm = LLM(
        model=request.model,
        skip_tokenizer_init=True,
        dtype=request.dtype,
        tensor_parallel_size=request.tensor_parallel_size,
        enable_expert_parallel=request.enable_expert_parallel,
        enforce_eager=request.enforce_eager,
        disable_log_stats=True,
        **engine_args,
    )
    try:
        yield llm
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SIGTERM must not interrupt the shutdown
        llm.llm_engine.engine_core.shutdown()


def _run_strategy(llm: "LLM", request: EngineRequest, strategy: str | None) -> StrategyResult:
    """Switch the running engine to `strategy` (None: do not switch) and generate every prompt greedily."""
    from vllm import SamplingParams

    if strategy is not None:
        llm.collective_rpc("set_moe_comm", args=(strategy,))
        llm.collective_rpc("moe_comm_counters")  # the counters start again at 0
    sampling = [
        SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=2 if request.measure_margins else None,
            prompt_logprobs=0 if request.measure_prompts else None,
        )
        for max_tokens in request.max_tokens
    ]
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in request.prompts]
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    return StrategyResult(
        strategy=strategy,
        tokens=[list(output.outputs[0].token_ids) for output in outputs],
        seconds=seconds,
        counters=[] if strategy is None else llm.collective_rpc("moe_comm_counters"),
        smallest_margin=_smallest_margin(outputs) if request.measure_margins else None,
        prompt_logprobs=[_prompt_logprobs(output) for output in outputs] if request.measure_prompts else None,
    )


def _smallest_margin(outputs: "list[RequestOutput]") -> float:
    """Least gap in log-probability (nats) between the best and the second-best token, over all generated tokens."""
    gaps = []
    for output in outputs:
        for position in output.outputs[0].logprobs or []:
            best, second = sorted((entry.logprob for entry in position.values()), reverse=True)[:2]
            gaps.append(best - second)
    return min(gaps)


def _prompt_logprobs(output: "RequestOutput") -> list[float]:
    """The log-probability (nats) of each token of the prompt but the first, which the model does not predict."""
    positions = zip(output.prompt_token_ids or [], output.prompt_logprobs or [], strict=True)
    return [entries[token].logprob for token, entries in positions if entries is not None]


def _claim_stdout() -> TextIO:
    """Keep stdout for answers only: other writes to it, here and in child processes, go to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def _answer(answers: TextIO, line: str) -> None:
    answers.write(line + "\n")
    answers.flush()


def _exit_in_good_order(signum: int, frame: FrameType | None) -> None:
    """Handler of SIGTERM. The exit runs `finally` blocks, which shut the engine's own processes down."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
