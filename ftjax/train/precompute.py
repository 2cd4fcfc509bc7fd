"""Log-probabilities of the reference model, computed once before training (`objective.precompute_ref_log_probs`).

Each document then carries its number as one more value (`RowEncoding.values`), and an update needs no pass of the reference
model and, in full fine-tuning, no copy of it. The numbers are kept in the cache of tokenised data, by documents and model.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from ftjax.config import Config
from ftjax.data.pipeline import PackedSplit, Split
from ftjax.data.store import cache_folder
from ftjax.distributed import store
from ftjax.errors import UserError
from ftjax.hub.run_folder import starting_adapter
from ftjax.hub.same_model import model_facts
from ftjax.long_steps import counted
from ftjax.mesh import replicated
from ftjax.objectives import objective_of
from ftjax.objectives.objective import Forward
from ftjax.train.layout import BatchLayout
from ftjax.train.progress import say
from ftjax.train.setup import Setup


def with_reference_values(setup: Setup, split: Split | None) -> Split | None:
    """Return the data set with the values of the reference model, if the objective computes them before training.

    Raises UserError for streamed data.
    """
    if split is None or objective_of(setup.config).precomputed(setup.config.objective) is None:
        return split
    if not isinstance(split, PackedSplit):
        raise UserError(
            "objective.precompute_ref_log_probs: the reference model needs all documents before training, and data.streaming "
            "reads them while training; leave one of the two out"
        )
    found = _cached(setup, split)
    documents = split.documents
    values = np.zeros((len(documents), 1), np.float32)
    values[split.chosen, 0] = found
    known = () if documents.labels is None else (documents.labels,)
    return replace(split, documents=replace(documents, labels=np.concatenate([*known, values], axis=1)))


def _cached(setup: Setup, split: PackedSplit) -> np.ndarray:
    """Return the value of each chosen document, float32, from the cache if every process has it there."""
    path = cache_folder() / "reference" / f"{_key(setup.config, split)}.npy"
    found = _read(path, len(split.chosen))
    if all(store.gathered("cached reference", found is not None)):
        return found
    if jax.process_index() == 0:
        say(f"computing log-probabilities of the reference model for {len(split.chosen):,} documents")
    found = _compute(setup, split)
    if jax.process_index() == 0 or not path.is_file():
        _write(path, found)
    return found


def _key(config: Config, split: PackedSplit) -> str:
    """Return a digest of everything that determines the values."""
    facts: dict[str, Any] = {
        "documents": split.fingerprint()["digest"],
        "model": model_facts(config.model.path, config.model.revision, starting_adapter(config.method)),
        "settings": config.model.model_dump(mode="json", include={"dtype", "compute_dtype", "quantization"}),
        "objective": config.objective.model_dump(mode="json", include={"name", "ld_alpha"}),
        "seed": config.training.seed,  # new token embeddings
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _read(path: Path, count: int) -> np.ndarray | None:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return found if found.shape == (count,) and np.isfinite(found).all() else None


def _write(path: Path, values: np.ndarray) -> None:
    """Write by replacing, so that no other process reads a part; a full disk costs only the time of the next run."""
    temporary = path.with_name(f"{path.stem}.{store.index()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, values)
        temporary.replace(path)
    except OSError as error:
        say(f"warning: {path}: cannot be written ({error.strerror}), so the next start computes it again")


def _compute(setup: Setup, split: PackedSplit) -> np.ndarray:
    """Run the reference model over all chosen documents: float32 `[N]`."""
    options = setup.config.training
    rows = options.eval_batch_size or options.global_batch_size // options.gradient_accumulation_steps
    layout = BatchLayout(setup.mesh, rows)
    every = replace(split, weights=(1.0,) * len(split.weights))
    batches = every.batches(rows, seed=0, shuffle=False, epochs=1, rows=layout.own, width_multiple=layout.length_parts)
    plan = batches.plan(0)
    values = jax.jit(partial(_values, setup), out_shardings=replicated(setup.mesh))
    found, counts = np.zeros(len(split.documents), np.float32), np.diff(plan.starts)
    steps = counted("computing the reference model's log-probabilities", batches, -(-len(plan) // rows), "batches")
    for start, batch in zip(range(0, len(plan), rows), steps, strict=True):
        table = np.asarray(values(setup.params, setup.frozen, layout.arrays(batch)))
        for row, count in zip(table, counts[start : start + rows], strict=False):
            first = plan.starts[start]
            found[plan.documents[first : first + count]] = row[:count]
            start += 1
    if not np.isfinite(found).all():
        bad = split.documents.where[int(np.argmax(~np.isfinite(found)))].as_py()
        raise UserError(f"{bad}: its log-probability under the reference model is not finite; are the model's weights?")
    return found[split.chosen]


def _values(setup: Setup, params: dict, frozen: dict, batch: dict) -> jax.Array:
    """Compute the values of each document of a batch, `[B, documents]`."""
    reference = setup.before_training
    own = reference.initial(params, frozen, setup.model, setup.config.model.dtype)
    ctx = replace(setup.runtime, remat="none").context(batch)
    forward = Forward(reference.model, {}, own, batch, ctx, setup.config.objective.loss_chunk * setup.shards)
    return objective_of(setup.config).precomputed(setup.config.objective)(forward)
