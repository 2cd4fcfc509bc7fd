"""Runs the whole suite on a CPU that pretends to be eight devices; warnings are errors."""

import gc
import os
from pathlib import Path

from quick_compile import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"  # of PyTorch: several, on models so small, wait for each other most of the time
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK} --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that tests start find the programs that tests have compiled, except where several work together (processes.py).
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "FTJAX_TEST_CACHE", str(Path(__file__).resolve().parents[1] / ".cache" / "jax-tests")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest
import shape_checks

shape_checks.install()  # before anything of ftjax is imported

import real  # noqa: E402
from made_once import make_once  # noqa: E402
from made_sets import write_sets  # noqa: E402

from ftjax.cpu_threads import set_threads  # noqa: E402

set_threads()  # JAX creates its devices on first use

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("FTJAX_CACHE", str(ROOT / ".cache" / "ftjax-tests"))
MADE = Path(os.environ["FTJAX_CACHE"]) / "made"

# Every run tries the same examples, so a failure is due to a change. `--hypothesis-profile default` tries new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

# Arrays of different dtypes are cast explicitly, so that no rounding or widening is by accident.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# These take longest; workers begin with them, so that none is left with one when the others have finished.
FIRST = ("train/test_processes", "train/test_matrix", "models/test_laws_generate", "models/test_laws_config", "train/test_loop")


def pytest_collection_modifyitems(config, items) -> None:
    """Leave the sweeps to `make test-all`, and put the files that take longest first."""
    if not os.environ.get("FTJAX_TEST_ALL"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("sweep")])
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]
    items.sort(key=lambda item: not any(name in item.nodeid for name in FIRST))


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what stays: PyTorch, JAX and transformers are a million objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_report_header() -> str:
    return f"real models and data: {real.SHARED if real.SHARED.is_dir() else 'none beside the project'}"


def made_or_real(parameter: str | Path) -> str:
    return "made" if parameter == "made" else "real"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data, for a test of what the suite cannot make."""
    if not real.SHARED.is_dir():
        pytest.skip("the folder of real models and data is not beside the project")
    return real.SHARED


@pytest.fixture(scope="session")
def untrained() -> Path:
    """A Llama of 100 thousand random weights; its tokenizer is there as tokenizer.json and as a SentencePiece model."""
    from story_model import write_untrained

    return make_once(MADE, "untrained", write_untrained)


@pytest.fixture(scope="session")
def stories(untrained) -> Path:
    """The same model, trained on short stories."""
    from story_model import train_on_stories

    return make_once(MADE, "stories", lambda folder: train_on_stories(untrained, folder))


@pytest.fixture(scope="session", params=["made", *real.LLAMAS], ids=made_or_real)
def llama(request) -> Path:
    """A folder with a Llama and its tokenizer; the weights of the one that is made are random."""
    return request.getfixturevalue("untrained") if request.param == "made" else request.param


@pytest.fixture(scope="session", params=["made", *real.LLAMAS], ids=made_or_real)
def trained_llama(request) -> Path:
    """The same, trained on stories."""
    return request.getfixturevalue("stories") if request.param == "made" else request.param


@pytest.fixture(scope="session")
def made_pieces() -> Path:
    """A folder with nothing but a SentencePiece model that keeps every space, as those of Llama 2 and Mistral do."""
    from story_model import write_pieces

    return make_once(MADE, "pieces", write_pieces)


@pytest.fixture(scope="session", params=["made", *real.PIECES], ids=made_or_real)
def pieces(request) -> Path:
    return request.getfixturevalue("made_pieces") if request.param == "made" else request.param


@pytest.fixture(scope="session")
def made_sets() -> Path:
    """A folder of small data sets of every kind; their names, columns and formats are those of the real ones."""
    return make_once(MADE, "sets", write_sets)


@pytest.fixture(scope="session", params=["made", *real.SETS], ids=made_or_real)
def data_sets(request) -> Path:
    return request.getfixturevalue("made_sets") if request.param == "made" else request.param


@pytest.fixture(scope="session")
def reader(data_sets, untrained) -> Path:
    """A Llama whose tokenizer has learned from texts like those of `data_sets`."""
    return real.LLAMAS[0] if data_sets in real.SETS and real.LLAMAS else untrained


@pytest.fixture
def lowered():
    """Return a counter of the programs that JAX has lowered so far, whether or not the compilation cache had them."""
    made = []

    def heard(event: str, *_, **__) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            made.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield lambda: len(made)
    jax.monitoring.unregister_event_duration_listener(heard)
