"""`ftjax plan`: compile the train step of a run for chips that need not be present, and report what it needs of them.

Only the config.json of the model is read. The step is that of `ftjax.train.setup.compile_steps`, and its arguments have the
shapes and shardings that loading would give.
"""

import time
from contextlib import nullcontext
from typing import Any

import jax
from jax.sharding import Mesh

from ftjax.compile_cache import nothing_kept
from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.hub.vocabulary import hf_config_of
from ftjax.long_steps import long_step
from ftjax.mesh import divided, notes
from ftjax.objectives import generates
from ftjax.plan.advice import advice
from ftjax.plan.arithmetic import program_flops
from ftjax.plan.hlo import Program
from ftjax.plan.refused import wanted_bytes
from ftjax.plan.result import Plan
from ftjax.plan.rollout import plan_rollouts
from ftjax.plan.roofline import seconds, traffic
from ftjax.plan.shards import shard_bytes
from ftjax.plan.topology import Topology
from ftjax.train.setup import Design, compile_steps, design, mesh_of

STEPS = 1000  # of the schedule; the program is the same for any number
DAY = 86400


def make_plan(config: Config, topology: Topology, price: float | None = None) -> Plan:
    """Compile the step of `config` for `topology`.

    Args:
        price: per chip-hour, in any currency.

    Raises UserError for anything in the configuration that does not fit the model or the topology.
    """
    start, start_cpu = time.perf_counter(), time.process_time()
    made = design_for(config, topology)
    traced, inputs = trace_step(made)
    memory = {
        "weights": shard_bytes(inputs[1]),
        "trained": shard_bytes(inputs[0].params),
        "optimizer": shard_bytes(inputs[0].opt_state),
        "input": shard_bytes(inputs[2]),
    }
    plan = _describe(made, topology, memory, program_flops(traced))
    try:
        with nothing_kept() if topology.chip else nullcontext(), long_step(f"compiling the update for {topology.name}"):
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        memory["temporaries"] = max(0.0, wanted_bytes(error, topology.name) - sum(memory.values()))
    else:
        _measure(plan, compiled, made.mesh, topology)
    memory["total"] = sum(memory.values())
    if generates(config):
        kept = sum(memory[kind] for kind in ("weights", "trained", "optimizer"))
        plan.rollout = plan_rollouts(made, kept, plan.limit, topology)
    if plan.limit is not None:
        # XLA refuses a program whose peak exceeds the chip's memory. Its sum of temporaries counts the gaps between them twice,
        # so a program may fit although its sum does not.
        plan.fits = plan.hbm_bytes is not None and plan.peak + memory["program"] <= plan.limit
        plan.fits = plan.fits and (plan.rollout is None or plan.rollout.fits)
    if plan.seconds:
        _rates(plan, topology, price)
    plan.advice = advice(plan, made)
    plan.plan_seconds, plan.plan_cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return plan


def design_for(config: Config, topology: Topology) -> Design:
    """Build the design of a run on these chips, from config.json (and an adapter's folder, the tokenizer of added tokens)."""
    hf_config = hf_config_of(config)
    devices = topology.devices()
    memory = int(_limit(topology, devices[0])) if topology.chip else None
    mesh, _ = mesh_of(config, hf_config, devices, memory)
    made = design(config, hf_config, mesh, memory)
    made.rollout_devices = divided(config.mesh, devices)[1]
    return made


def trace_step(made: Design) -> tuple[Any, tuple]:
    """Return `(the traced train step, its abstract inputs)`."""
    step, _, optimizer, _ = compile_steps(made, made.config.training.max_steps or STEPS)
    inputs = made.abstract_inputs(optimizer)
    with jax.sharding.use_abstract_mesh(made.mesh.abstract_mesh):
        return step.trace(*inputs), inputs


def _limit(topology: Topology, device: Any) -> float:
    return topology.chip.hbm * topology.chip.share(device)


def _describe(made: Design, topology: Topology, memory: dict[str, float], flops: float) -> Plan:
    config, options = made.config, made.config.training
    needed = made.train_flops
    return Plan(
        topology=topology.name,
        chips=topology.chips,
        devices=made.mesh.size,
        slices=topology.slices,
        mesh=dict(made.mesh.shape),
        model=config.model.path,
        method=config.method.name,
        parameters=made.trained_line(),
        attention=str(made.runtime.attention),
        remat=str(made.runtime.remat),
        rows=options.global_batch_size,
        microbatches=options.gradient_accumulation_steps,
        max_length=config.data.max_length,
        memory=memory,
        limit=_limit(topology, made.mesh.devices.flat[0]) if topology.chip else None,
        fits=None,
        flops=flops,
        needed_flops=needed.per_token(config.data.max_length) * options.global_batch_size * config.data.max_length,
        formula=needed.formula(config.data.max_length),
        mesh_notes=notes(made.mesh),
    )


def _measure(plan: Plan, compiled: Any, mesh: Mesh, topology: Topology) -> None:
    """Add to the plan what XLA reports: the memory of the compiled program, and from its text the data that it moves."""
    stats = compiled.memory_analysis()
    memory = plan.memory
    memory["padding"] = max(0.0, stats.argument_size_in_bytes - sum(memory.values()))
    memory["temporaries"] = stats.temp_size_in_bytes + max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    memory["program"] = float(stats.generated_code_size_in_bytes)
    plan.peak = float(stats.peak_memory_in_bytes)
    program = Program.of(compiled, mesh)
    plan.hbm_bytes = program.hbm_bytes()
    plan.traffic = traffic(program.transfers(), mesh, topology)
    if topology.chip:
        plan.seconds = seconds(plan.flops, plan.hbm_bytes, plan.traffic, mesh, topology)


def _rates(plan: Plan, topology: Topology, price: float | None) -> None:
    plan.bound = max(plan.seconds, key=plan.seconds.get)
    plan.step_seconds = plan.seconds[plan.bound]
    plan.tokens_per_second = plan.tokens / plan.step_seconds
    plan.tokens_per_second_per_chip = plan.tokens_per_second / plan.chips
    plan.tokens_per_day = plan.tokens_per_second * DAY
    plan.mfu = plan.needed_flops / plan.step_seconds / (plan.chips * topology.chip.peak)
    if price is not None:
        plan.price = price
        plan.cost_per_day = price * plan.chips * 24
        plan.cost_per_million_tokens = plan.cost_per_day / plan.tokens_per_day * 1e6


def check_price(price: float | None) -> None:
    if price is not None and price < 0:
        raise UserError(f"--price {price}: expected the price of a chip per hour, at least 0")
