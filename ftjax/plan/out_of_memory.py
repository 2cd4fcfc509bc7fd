"""What to change in a run whose memory ran out, by the arithmetic of plans: the state exactly, activations as saved."""

from collections.abc import Sequence
from typing import Any

import jax

from ftjax.config import Config
from ftjax.errors import OutOfMemory, UserError
from ftjax.hub.vocabulary import hf_config_of
from ftjax.mesh import devices_or_all, parts
from ftjax.objectives import encoding_of
from ftjax.out_of_memory import asked_for, is_out_of_memory, of_host
from ftjax.plan.advice import to_fit
from ftjax.plan.plan import STEPS
from ftjax.plan.shards import shard_bytes
from ftjax.plan.show import KINDS, size
from ftjax.train.remat import device_memory, saved_bytes
from ftjax.train.setup import Design, compile_steps, design, mesh_of, rows_at_a_time

ACTIVATIONS = "activations that the backward pass keeps"
ALONE = "shorter or fewer rows, more devices, or devices with more memory"


def explain(error: Exception, config: Config, devices: Sequence[jax.Device] | None = None) -> OutOfMemory | None:
    """Return an error that says what the run needs and what to change; None if memory did not run out.

    Args:
        devices: devices of the run; None for all.
    """
    if isinstance(error, UserError) or not is_out_of_memory(error):
        return None
    devices = devices_or_all(devices)
    one = devices[0]
    host = of_host(error) or one.platform == "cpu"
    wanted = asked_for(error)
    first = "the host has no memory left" if host else f"a device ({one.device_kind}) has no memory left"
    first += f": {size(wanted)} were asked for" if wanted else ""
    try:
        lines = _lines(config, devices)
    except Exception:  # what cannot be planned is not explained, and the error itself counts
        lines = [f"What to change: {ALONE}"]
    return OutOfMemory("\n".join([first, *lines, *_elsewhere(config, host)]))


def _lines(config: Config, devices: Sequence[jax.Device]) -> list[str]:
    hf_config = hf_config_of(config)
    mesh, _ = mesh_of(config, hf_config, devices)
    made, limit = design(config, hf_config, mesh), float(device_memory(devices))
    memory = needs(made)
    told = ", ".join(f"{KINDS.get(kind, kind)} {size(count)}" for kind, count in memory.items() if count)
    lines = [f"Each of the {mesh.size} devices needs at least {size(sum(memory.values()))} of {size(limit)}: {told}"]
    state = {kind: count for kind, count in memory.items() if kind != ACTIVATIONS}
    advice = to_fit(made, {**state, "temporaries": limit - sum(state.values())}, limit)
    return [*lines, "What to change, the most effective first:", *(f"  {line}" for line in [*advice, *_shorter(made)])]


def needs(made: Design) -> dict[str, float]:
    """Return bytes on each device, by kind: the state of a step, and what the forward pass keeps for the backward pass."""
    _, _, optimizer, _ = compile_steps(made, STEPS)
    inputs: Any = made.abstract_inputs(optimizer)
    rows = rows_at_a_time(made.config, parts(made.mesh.shape, "batch")) // parts(made.mesh.shape, "batch")
    shape = rows, max(1, made.config.data.max_length // made.mesh.shape["sequence"])
    saved = saved_bytes(
        made.loss_fn, made.runtime, made.model.trainable, made.frozen_specs, made.runtime.remat, shape,
        encoding_of(made.config).values,
    )  # fmt: skip
    return {
        "weights": shard_bytes(inputs[1]),
        "trained": shard_bytes(inputs[0].params),
        "optimizer": shard_bytes(inputs[0].opt_state),
        "input": shard_bytes(inputs[2]),
        ACTIVATIONS: float(saved),
    }


def _shorter(made: Design) -> list[str]:
    length = made.config.data.max_length
    return [
        f"data.max_length: {length // 2} (it is {length}): shorter rows; ftjax preview shows how long the documents are",
        "more devices, or devices with more memory",
    ]


def _elsewhere(config: Config, host: bool) -> list[str]:
    """Return what else of a run takes memory than its training step."""
    lines = []
    if config.objective.name in ("grpo", "rloo"):
        rows = config.objective.generation_batch_rows
        lines.append(f"  while it generates: objective.generation_batch_rows: {max(1, rows // 2)} (it is {rows})")
    if config.data.validation is not None or config.data.validation_split is not None:
        lines.append("  while it evaluates: training.eval_batch_size and evaluate.batch_size: fewer rows at a time")
    if host:
        lines.append("  on the host: data.num_proc: 1, and data.streaming: true for data that is larger than the memory")
    return [*lines, "ftjax plan computes beforehand what a run needs (docs/memory.md)"]
