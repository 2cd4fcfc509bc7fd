"""Advice for a plan that does not fit, or could be faster."""

from ftjax.mesh import parts
from ftjax.plan.result import Plan
from ftjax.train.setup import Design


def advice(plan: Plan, made: Design) -> list[str]:
    """Return settings to try, the most effective first."""
    return _to_fit(plan, made) if plan.fits is False else _to_speed_up(plan)


def _to_fit(plan: Plan, made: Design) -> list[str]:
    config, memory = made.config, plan.memory
    rows = plan.rows // plan.microbatches // parts(plan.mesh, "batch")
    state = sum(memory[kind] for kind in ("weights", "trained", "optimizer"))
    lines = []
    if plan.remat != "full" and memory["temporaries"] > 0.2 * plan.limit:
        lines.append(f"model.remat: full (it is {plan.remat}): keep one activation per layer and recompute the others")
    if rows > 1:
        more = plan.microbatches * rows
        lines.append(f"training.gradient_accumulation_steps: {more}: one row of {plan.max_length} tokens per device at a time")
    if plan.mesh["data"] > 1 and state > 0.2 * plan.limit:
        more = plan.mesh["data"] * plan.mesh["fsdp"]
        lines.append(f"mesh: {{data: 1, fsdp: {more}}}: parameters and moments sharded over {more}, not {plan.mesh['fsdp']}")
    if config.method.name == "full":
        lines.append("method: {name: lora, r: 16}: no moments and gradients for the weights")
    elif config.model.quantization is None and memory["weights"] > 0.2 * plan.limit:
        lines.append("model.quantization: nf4: the frozen weights in a quarter of their bytes")
    if rows <= 1 and plan.max_length >= 4096:
        lines.append("mesh.sequence: 2 or more: each row's activations sharded")
    lines.append("a larger slice: parameters are sharded over its chips")
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
