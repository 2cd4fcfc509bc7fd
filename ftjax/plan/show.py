"""Plans as text, for people."""

from collections.abc import Sequence

from rich.console import Console

from ftjax.console import print_table
from ftjax.console import say as write
from ftjax.plan.result import Plan
from ftjax.plan.rollout import RolloutPlan
from ftjax.plan.roofline import Traffic
from ftjax.plan.serve import ServePlan
from ftjax.plan.shardings import Placed

KINDS = {
    "weights": "frozen weights",
    "trained": "trained parameters",
    "optimizer": "optimizer",
    "input": "input",
    "padding": "layout padding of these",
    "temporaries": "activations, gradients and other temporaries",
    "program": "the program",
    "total": "total",
}


def show(plan: Plan, console: Console) -> None:
    """Print the whole plan, on one screen."""

    def say(text: str) -> None:
        write(console, text)

    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    say(f"{plan.model}, {plan.method}, on {plan.topology} ({plan.chips} chips, {plan.devices} devices); mesh: {mesh}")
    for note in plan.mesh_notes:
        say(f"mesh: {note}")
    say(plan.parameters)
    micro = f" in {plan.microbatches} microbatches" if plan.microbatches > 1 else ""
    say(
        f"one step: {plan.rows} rows of {plan.max_length} tokens{micro}; attention: {plan.attention}; remat: {plan.remat}; "
        f"planned in {plan.plan_seconds:.0f} s ({plan.plan_cpu_seconds:.0f} s on all cores)"
    )
    if plan.rollout is not None:
        say("an update is planned with one row for each answer; a run packs several into a row")
    rows = [(label, plan.memory.get(kind)) for kind, label in KINDS.items()] + [
        ("live at one time", plan.peak),
        ("available", plan.limit),
    ]
    print_table(console, ("memory per device", ""), [(label, size(value)) for label, value in rows if value])
    if plan.fits is not None:
        say("it fits" if plan.fits else "it does not fit")
    say(f"{plan.flops:.4g} FLOPs per step in the program; {plan.formula}")
    if plan.traffic:
        _show_traffic(plan.traffic, console)
    if plan.seconds:
        parts = ", ".join(f"{name} {value:.4g} s" for name, value in plan.seconds.items())
        say(f"least time of a step: {plan.step_seconds:.4g} s, bound by {plan.bound} ({parts})")
        say(
            f"at most {plan.tokens_per_second:,.0f} tokens/s ({plan.tokens_per_second_per_chip:,.0f} per chip), "
            f"{plan.tokens_per_day:.3g} per day; MFU at most {100 * plan.mfu:.1f} %"
        )
    if plan.rollout is not None:
        _show_rollouts(plan, plan.rollout, console)
    if plan.cost_per_day is not None:
        say(
            f"at {plan.price:g} per chip-hour: {plan.cost_per_day:,.2f} per day, at least "
            f"{plan.cost_per_million_tokens:.4g} per million tokens"
        )
    if plan.advice:
        say("what to change:" if plan.fits is False else "to be faster:")
        for line in plan.advice:
            say(f"  {line}")


ROLLOUT = {
    "cache": "keys and values",
    "state": "states, settings and counts of rows",
    "temporaries": "temporaries",
    "program": "two programs",
}


def _show_rollouts(plan: Plan, rollout: RolloutPlan, console: Console) -> None:
    """Print what the generation of an update's answers needs, and both phases together."""

    def say(text: str) -> None:
        write(console, text)

    say(
        f"answers of an update: {rollout.answers} of {rollout.length} tokens to prompts of {rollout.prompt}, {rollout.rows} at "
        f"a time{f' on each of {rollout.hosts} hosts' if rollout.hosts > 1 else ''}"
    )
    rows = [(label, rollout.memory.get(kind)) for kind, label in ROLLOUT.items()]
    rows += [("live at one time, with all that is kept there", rollout.peak)]
    print_table(console, ("memory per device", ""), [(label, size(value)) for label, value in rows if value])
    if rollout.apart:
        say(f"on {rollout.apart} devices of their own, each of which is sent {size(rollout.sent)} of weights after an update")
    elif plan.peak is not None:
        say(f"both phases, with weights kept once: {size(max(plan.peak, rollout.peak))} are live at one time")
    if rollout.fits is False:
        say(
            "the answers do not fit: fewer objective.generation_batch_rows, a shorter max_completion_length, or more devices "
            "along mesh.tensor"
        )
    if rollout.traffic:
        _show_traffic(rollout.traffic, console)
    if rollout.seconds:
        parts = ", ".join(f"{name} {1e3 * value:.4g} ms" for name, value in rollout.seconds.items())
        say(f"least time of a decode step: {1e3 * rollout.step_seconds:.4g} ms, bound by {rollout.bound} ({parts})")
        say(
            f"least time of the answers: {rollout.rollout_seconds:.4g} s = {rollout.prefill_seconds:.4g} s to read the prompts "
            f"+ {rollout.steps:,} decode steps; at most {rollout.tokens_per_second:,.0f} tokens/s"
        )
        both = (rollout.rollout_seconds, plan.step_seconds)
        say(f"least time of an update with its answers: {max(both) if rollout.apart else sum(both):.4g} s")


def _show_traffic(traffic: Sequence[Traffic], console: Console) -> None:
    rows = [(t.kind, " x ".join(t.axes), f"{t.runs:g}", size(t.ici_bytes), size(t.dcn_bytes)) for t in traffic]
    print_table(console, ("collective", "along", "runs", "ICI", "DCN"), rows, left=(0, 1))


SERVED = {
    "weights": "weights",
    "cache": "keys and values",
    "state": "states, settings and counts of rows",
    "temporaries": "temporaries",
    "program": "two programs",
}


def show_serving(plan: ServePlan, console: Console) -> None:
    """Print the plan of a server."""

    def say(text: str) -> None:
        write(console, text)

    sizes = {axis: count for axis, count in plan.mesh.items() if count > 1}
    mesh = " ".join(f"--mesh {axis}={count}" for axis, count in sizes.items())
    say(f"ftjax serve {plan.model} --dtype {plan.dtype} --rows {plan.rows} --context {plan.context} {mesh}".rstrip())
    say(f"on {plan.topology} ({plan.chips} chips); planned in {plan.plan_seconds:.0f} s; an adapter is merged")
    for note in plan.mesh_notes:
        say(f"mesh: {note}")
    rows = [(label, plan.memory[kind]) for kind, label in SERVED.items()]
    rows += [("live at one time", plan.peak), ("available", plan.limit)]
    print_table(console, ("memory per device", ""), [(label, size(value)) for label, value in rows if value])
    if plan.tokens is not None:
        say(f"room for the keys and values of {plan.tokens:,} tokens: {plan.texts:,} texts of {plan.context} at the same time")
    if plan.fits is not None:
        short = f"it does not fit{' with the whole context of all rows' if plan.texts else ''}"
        say("it fits" if plan.fits else f"{short}: fewer --rows, a shorter --context, more devices or model.quantization: int8")
    say(f"attention: {plan.attention}")
    say(f"a decode step: {plan.flops:.4g} FLOPs; {size(plan.hbm_bytes)} are moved through each device's memory")
    if plan.traffic:
        _show_traffic(plan.traffic, console)
    if plan.seconds:
        parts = ", ".join(f"{name} {1e3 * value:.4g} ms" for name, value in plan.seconds.items())
        say(f"least time of a token of each row: {1e3 * plan.step_seconds:.4g} ms, bound by {plan.bound} ({parts})")
        say(f"at most {plan.tokens_per_second:,.0f} tokens/s with {plan.rows} rows, whose contexts are full")


def size(count: float) -> str:
    """Format bytes for people, in powers of 1000."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= unit), (1, "B"))
    return f"{count / unit:.4g} {name}"


def show_shardings(rows: Sequence[Placed], console: Console) -> None:
    """Print one line per array."""
    for row in rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        axes = f" ({row.axes})" if row.axes else ""
        where = f"{row.partition}: {row.bytes / 1e6:.3f} MB per device"
        write(console, f"{row.kind:10} {row.name}: {row.dtype} {shape}{axes} -> {where}")
