"""The cache of compiled programs on disk, so that the second start of a run does not compile again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def keep_compiled_programs() -> None:
    """Use `~/.cache/ftjax/xla` (under FTJAX_CACHE if set), unless JAX has another cache folder configured.

    If the folder cannot be written, nothing is cached. Nor is anything cached for several processes on CPUs: programs that XLA
    loads from disk run their collectives in another order than on the process that compiled them (jaxlib 0.10.2), and Gloo ends
    both.
    """
    # Checked first, because it uses no device: `ftjax doctor` calls this before it checks whether there are any.
    if jax.distributed.is_initialized() and jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if jax.config.jax_compilation_cache_dir or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = Path(os.environ.get("FTJAX_CACHE", Path.home() / ".cache" / "ftjax")) / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Disable the cache: programs for devices that are only described cannot be loaded again."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX checks only once whether there is a cache
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
