"""Builds a tiny run without files: a model with a method, a batch, and the training step."""

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.config import Config
from ftjax.train.setup import Setup, compile_steps
from ftjax.train.step import init_state


def make_config(folder, *, method=None, optimizer=None, mesh=None, objective=None, **training) -> Config:
    return Config.model_validate({
        "model": {"path": str(folder), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
        "method": method or {"name": "lora", "r": 4, "lora_alpha": 8},
        "data": {"train": "unused.jsonl", "max_length": 32},
        "objective": objective or {"name": "sft"},
        "optimizer": {"learning_rate": 1e-2, "lr_scheduler_type": "constant", **(optimizer or {})},
        "training": {"global_batch_size": 8, **training},
        "mesh": mesh or {"fsdp": 1, "data": 1},
    })  # fmt: skip


def make_batch(rows: int, length: int, vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return packed rows with several documents, prompts of weight zero, padding, and one row of padding only."""
    rng = np.random.default_rng(seed)
    shape = (rows, length)
    batch = {"tokens": rng.integers(3, vocab, shape), "targets": rng.integers(3, vocab, shape)}
    batch["segment_ids"] = np.sort(rng.integers(1, 4, shape), axis=1)
    batch["segment_ids"][:, length - length // 8 :] = 0
    batch["segment_ids"][-1] = 0
    starts = np.diff(batch["segment_ids"], axis=1, prepend=-1) != 0
    index = np.arange(length)
    batch["positions"] = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    weights = (rng.random(shape) < rng.random((rows, 1))) & (batch["segment_ids"] > 0)
    batch = {name: value.astype(np.int32) for name, value in batch.items()}
    return {**batch, "weights": weights.astype(np.float32)}


def run_steps(setup: Setup, batches: list[dict], microbatches: int = 1, steps: int = 100) -> tuple[list, dict]:
    """Return the metrics of each update, and the trained parameters at the end."""
    from jax.sharding import NamedSharding

    from ftjax.mesh import spec

    step, _, optimizer, _ = compile_steps(setup, steps)
    state = init_state(setup.params, optimizer)
    metrics = []
    with jax.set_mesh(setup.mesh):
        for batch in batches:
            placed = {
                name: jax.device_put(
                    rows.reshape(microbatches, -1, rows.shape[-1]), NamedSharding(setup.mesh, spec((None, "batch", "length")))
                )
                for name, rows in batch.items()
            }
            state, out = step(state, setup.frozen, placed, jax.random.key(0), jnp.float32(np.inf))
            metrics.append(jax.block_until_ready(out))  # eight devices on two cores: one program at a time
    return metrics, {path: np.asarray(leaf) for path, leaf in state.params.items()}


def reported(metrics: list) -> dict[str, float]:
    """Return what each update reports, as means, by name and number of the update."""
    found = {}
    for step, out in enumerate(metrics):
        values = {"loss": out.loss, "weight": out.weight, "grad_norm": out.grad_norm}
        values |= {name: total / count for name, (total, count) in out.metrics.items()}
        found |= {f"{name} {step}": float(value) for name, value in values.items()}
    return found
