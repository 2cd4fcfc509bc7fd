"""Compiled programs are kept on disk, so that the second start of a run does not compile again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def keep_compiled_programs() -> None:
    """Use `~/.cache/ftjax/xla` (below FTJAX_CACHE where that is set), unless JAX is already told another place.

    A folder that cannot be written only means that nothing is kept. Nothing is kept either of several processes on CPUs: what
    XLA reads back from disk for them runs its collectives in another order than on the process that compiled it (jaxlib
    0.10.2), and Gloo ends both.
    """
    # Asked first, because it touches no device: `ftjax doctor` comes here before it looks whether there are any.
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
    """Programs are neither read from disk nor kept: those for devices that are only described cannot be loaded again."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks only once whether there is a cache
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
