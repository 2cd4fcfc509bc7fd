"""Runs the whole suite on a CPU that pretends to be eight devices; warnings are errors."""

import os

from quick_compile import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK} --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import hypothesis
import jax
import pytest
import shape_checks

shape_checks.install()  # before anything of ftjax is imported

from ftjax.cpu_threads import set_threads  # noqa: E402

set_threads()  # JAX creates its devices on first use

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
os.environ.setdefault("FTJAX_CACHE", str(ROOT / ".cache" / "ftjax-tests"))

# Every run tries the same examples, so a failure is due to a change. `--hypothesis-profile default` tries new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")

# Arrays of different dtypes are cast explicitly, so that no rounding or widening is by accident.
jax.config.update("jax_numpy_dtype_promotion", "strict")

jax.config.update("jax_compilation_cache_dir", os.environ.get("FTJAX_TEST_CACHE", str(ROOT / ".cache" / "jax-tests")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder with real data and models, next to the project."""
    if not SHARED.is_dir():
        pytest.skip("the shared folder with real data and models is not beside the project")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared) -> Path:
    """Return the folder of a real pretrained Llama with 260,000 parameters."""
    return shared / "models" / "stories260k"


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
