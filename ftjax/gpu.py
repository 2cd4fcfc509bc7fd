"""XLA flags for training on several NVIDIA GPUs: one table, set before anything uses a device.

A flag that XLA_FLAGS already has stays. The flags overlap communication with computation; they change results only by rounding.
Source: JAX, "GPU performance tips" (docs.jax.dev/en/latest/gpu_performance_tips.html); XLA, xla/xla.proto.
"""

import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

MiB = 2**20

# flag: (value, why)
FLAGS: dict[str, tuple[str, str]] = {
    "xla_gpu_enable_latency_hiding_scheduler": ("true", "starts transfers early and waits late, to overlap them with compute"),
    "xla_gpu_enable_while_loop_double_buffering": ("true", "gathers the next layer's parameters while this layer computes"),
    "xla_gpu_enable_pipelined_all_gather": ("true", "pipelines all-gathers across the iterations of the loop over layers"),
    "xla_gpu_enable_pipelined_reduce_scatter": ("true", "the same for reduce-scatters of gradients"),
    "xla_gpu_enable_pipelined_all_reduce": ("true", "the same for all-reduces of gradients (data parallelism)"),
    "xla_gpu_all_gather_combine_threshold_bytes": (str(256 * MiB), "gathers a layer's parameters in one transfer"),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": (str(256 * MiB), "reduces a layer's gradients in one transfer"),
    "xla_gpu_all_reduce_combine_threshold_bytes": (
        str(256 * MiB),
        "reduces the many small gradients of adapters in one transfer",
    ),
}


def set_flags(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """Add the missing flags to XLA_FLAGS if there are NVIDIA GPUs and JAX for them; return the added flags."""
    if not gpus_here() or environment.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    given = environment.get("XLA_FLAGS", "")
    set_already = {flag.split("=")[0].lstrip("-") for flag in given.split()}
    added = [f"--{name}={value}" for name, (value, _) in FLAGS.items() if name not in set_already]
    environment["XLA_FLAGS"] = " ".join([given, *added]).strip()
    return added


def gpus_here() -> bool:
    """Return whether this host has NVIDIA GPUs, and JAX can use them."""
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    return any(Path("/dev").glob("nvidia[0-9]*")) and any(importlib.util.find_spec(name) for name in plugins)
