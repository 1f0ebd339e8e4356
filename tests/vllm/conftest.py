"""Fixtures of the tests with real vLLM: tiny checkpoints, and the tokens that vanilla vLLM generates from them.

Each is made once. An engine takes up to half a minute to start, so tests share engines where they can. All tests here need vLLM
and this package installed beside it. Without them the tests are skipped, and the reason says what is missing.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vllm.forked_engine import FORKED
from tests.vllm.text_prompts import TEXT_MAX_TOKENS, text_prompts
from vllm_npu.errors import UnsupportedConfigError
from vllm_npu.tools.demo.vanilla_demo import SAFE_MARGIN
from vllm_npu.tools.engines.engine_processes import Parallelism, require_vllm
from vllm_npu.tools.engines.engine_set import EngineSet
from vllm_npu.tools.engines.process_tree import SHARED_MEMORY_FOLDER, mapped_shared_memory
from vllm_npu.tools.engines.tiny_models import DEMO_MAX_TOKENS, QWEN3_MOE, TinyModel, demo_prompts, write_tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder: it needs vLLM."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session", autouse=True)
def vllm_with_plugin() -> None:
    """Skip the tests where vLLM or this package beside it is missing. The reason names it."""
    try:
        require_vllm()
    except UnsupportedConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyModel], Path]:
    """Folder of a tiny model, written at the first call."""
    written: dict[str, Path] = {}

    def write(model: TinyModel) -> Path:
        if model.family not in written:
            written[model.family] = write_tiny_model(model, tmp_path_factory.mktemp("models") / model.family)
        return written[model.family]

    return write


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of vLLM's caches, shared by all engines. An engine starts 10 s faster with it."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="session")
def vanilla_tokens(
    checkpoint: Callable[[TinyModel], Path], caches: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[TinyModel], list[list[int]]]:
    """Tokens that vanilla vLLM (one worker, plugin off) generates for demo_prompts(). With QWEN3_MOE, those for TEXTS follow.

    They are made at the first call for a model.
    """
    generated: dict[str, list[list[int]]] = {}

    def generate(model: TinyModel) -> list[list[int]]:
        if model.family not in generated:
            folder = checkpoint(model)
            with_texts = model is QWEN3_MOE
            engines = EngineSet(
                folder,
                Parallelism(),
                strategies=[None],
                prompts=demo_prompts() + (text_prompts(folder) if with_texts else []),
                max_tokens=DEMO_MAX_TOKENS + (TEXT_MAX_TOKENS if with_texts else []),
                folder=tmp_path_factory.mktemp("vanilla"),
                caches=caches,
                **FORKED,
                measure_margins=True,
            )
            with engines:
                engines.wait_until_ready()
                generation = engines.generate()
            assert generation.smallest_margin is not None
            assert generation.smallest_margin > SAFE_MARGIN, "a near tie: identical tokens would prove nothing"
            generated[model.family] = generation.tokens
        return generated[model.family]

    return generate


@pytest.fixture
def shared_memory_unchanged() -> Iterator[None]:
    """Fail if the test leaves a new file in /dev/shm that no living process uses."""
    before = set(SHARED_MEMORY_FOLDER.iterdir())
    yield
    new = set(SHARED_MEMORY_FOLDER.iterdir()) - before
    unused = new - in_use(new)
    assert {path for path in unused if path.exists()} == set()  # other programs may have removed theirs


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder for vLLM's sockets: the path of pytest's own can be too long for them."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


def in_use(paths: set[Path]) -> set[Path]:
    """The files among `paths` that some living process maps. Another program of this machine may have made them."""
    mapped = set()
    for entry in Path("/proc").iterdir():
        if paths and entry.name.isdecimal():
            mapped |= mapped_shared_memory(int(entry.name))
    return {path for path in paths if path.exists() and path.stat().st_ino in mapped}
