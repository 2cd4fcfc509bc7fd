"""Advice for a plan that does not fit, or could be faster."""

from collections.abc import Mapping

from ftjax.mesh import parts
from ftjax.plan.result import Plan
from ftjax.train.setup import Design


def advice(plan: Plan, made: Design) -> list[str]:
    """Return settings to try, the most effective first."""
    if plan.fits is not False:
        return _to_speed_up(plan)
    return [*to_fit(made, plan.memory, plan.limit), "a larger slice: parameters are sharded over its chips"]


def to_fit(made: Design, memory: Mapping[str, float], limit: float) -> list[str]:
    """Return settings that take less memory on each device.

    Args:
        memory: bytes by kind: weights, trained, optimizer and temporaries.
        limit: bytes of a device.
    """
    config, mesh, remat = made.config, dict(made.mesh.shape), made.runtime.remat
    microbatches, length = config.training.gradient_accumulation_steps, config.data.max_length
    rows = config.training.global_batch_size // microbatches // parts(mesh, "batch")
    state = sum(memory[kind] for kind in ("weights", "trained", "optimizer"))
    lines = []
    if remat != "full" and memory["temporaries"] > 0.2 * limit:
        lines.append(f"model.remat: full (it is {remat}): keep one activation per layer and recompute the others")
    if rows > 1:
        more = microbatches * rows
        lines.append(f"training.gradient_accumulation_steps: {more}: one row of {length} tokens per device at a time")
    if mesh["data"] > 1 and state > 0.2 * limit:
        more = mesh["data"] * mesh["fsdp"]
        lines.append(f"mesh: {{data: 1, fsdp: {more}}}: parameters and moments sharded over {more}, not {mesh['fsdp']}")
    if config.method.name == "full":
        lines.append("method: {name: lora, r: 16}: no moments and gradients for the weights")
    elif config.model.quantization is None and memory["weights"] > 0.2 * limit:
        lines.append("model.quantization: nf4: the frozen weights in a quarter of their bytes")
    if config.model.dtype == "float32" and memory["weights"] > 0.2 * limit and config.model.quantization is None:
        lines.append("model.dtype: bfloat16: the frozen weights in half of their bytes")
    if config.optimizer.state_dtype == "float32" and memory["optimizer"] > 0.2 * limit:
        lines.append("optimizer.state_dtype: int8: the moments in a quarter of their bytes")
    if rows <= 1 and length >= 4096:
        lines.append("mesh.sequence: 2 or more: each row's activations sharded")
    return lines


def _to_speed_up(plan: Plan) -> list[str]:
    if not plan.seconds or plan.bound == "matrix units":
        return []
    if plan.bound in ("ICI", "DCN"):
        rows = plan.rows // plan.microbatches / parts(plan.mesh, "batch")
        return [
            f"bound by {plan.bound}: more rows per gathered parameter hide it; training.global_batch_size "
            f"{2 * plan.rows}, now {rows:g} row(s) per device and microbatch"
        ]
    return ["bound by HBM: more or longer rows per device and microbatch use each weight that is read more often"]
