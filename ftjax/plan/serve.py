"""Plan serving: compile the engine's programs for chips that need not be present, and report what they hold and how fast.

The programs are those of `ftjax serve` (`ftjax.generate.paged`), with the weights of the base model, into which an adapter is
merged. Only the config.json of the model is read.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ftjax.compile_cache import nothing_kept
from ftjax.config import Config, MeshConfig
from ftjax.errors import UserError
from ftjax.generate.engine import Engine
from ftjax.generate.paged import PagedBatch, Room, page_bytes
from ftjax.hub.load import abstract_param, base_specs
from ftjax.hub.vocabulary import hf_config_of
from ftjax.mesh import make_mesh, notes, spec
from ftjax.models.model import Model, build_module
from ftjax.models.nn.cache import Layout
from ftjax.models.nn.quantise import quantise
from ftjax.plan.arithmetic import program_flops
from ftjax.plan.hlo import Program
from ftjax.plan.plan import shard_bytes
from ftjax.plan.roofline import Traffic, seconds, traffic
from ftjax.plan.topology import Topology

CONCURRENCY = 16
LONGEST = 8192  # tokens of context, unless others are asked for or the model's are fewer
PAGE = 32
SHARDED = ("vocab", "heads", "kv_heads", "mlp")  # dimensions of weights along `tensor`
SHARE = 0.9  # of what the weights leave is for the cache that is compiled for: programs need the rest


@dataclass
class ServePlan:
    """What a server needs and how fast it can decode. Memory and bytes are per device; times are lower bounds.

    Attributes:
        rows: requests that decode at the same time.
        context: tokens of each.
        tokens: tokens of all texts for which the cache has room, on all devices.
        texts: texts of the whole context that fit at the same time.
        hbm_bytes: what the program of a decode step reads and writes, with all contexts full and greedy decoding.
        step_seconds: the least time in which each row gets one token.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    model: str
    dtype: str
    rows: int
    context: int
    memory: dict[str, float]
    limit: float | None
    attention: str = ""
    tokens: int | None = None
    texts: int | None = None
    fits: bool | None = None  # whether all rows can have their whole context at the same time; None if not known
    peak: float | None = None
    flops: float = 0.0  # of a decode step, on all devices
    hbm_bytes: float = 0.0
    traffic: list[Traffic] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: float | None = None
    bound: str | None = None
    tokens_per_second: float | None = None
    mesh_notes: list[str] = field(default_factory=list)
    plan_seconds: float = 0.0


def as_json(plan: ServePlan) -> dict[str, Any]:
    """Return the plan as JSON values."""
    return {**dataclasses.asdict(plan), "traffic": [row._asdict() for row in plan.traffic]}


class AbstractEngine(Engine):
    """An engine whose arrays are shapes with shardings."""

    def shard_rows(self, rows: np.ndarray) -> jax.ShapeDtypeStruct:
        where = jax.NamedSharding(self.mesh, spec(("batch",) + (None,) * (rows.ndim - 1)))
        return jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=where)

    def replicate(self, value: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=jax.NamedSharding(self.mesh, jax.P()))


def plan_serving(config: Config, topology: Topology, concurrency: int | None = None, context: int | None = None) -> ServePlan:
    """Compile the programs that read prompts and decode, for `concurrency` rows of `context` tokens.

    Raises UserError for anything in the configuration that does not fit the model or the topology.
    """
    start = time.perf_counter()
    hf_config = hf_config_of(config)
    root = build_module(hf_config)
    if config.model.quantization:
        quantise(root, config.model.quantization)
    model = Model.of(root, hf_config)
    if context is not None and context > model.sizes.positions:
        raise UserError(f"--context {context}: the model's context is {model.sizes.positions}")
    context = context or min(model.sizes.positions, LONGEST)
    devices = topology.devices()
    mesh = mesh_for(config, model, devices)
    dtype = jnp.dtype(config.model.dtype)
    params = {path: abstract_param(spec, mesh, dtype) for path, spec in base_specs(model).items()}
    limit = topology.chip.hbm * topology.chip.share(devices[0]) if topology.chip else None
    engine = AbstractEngine(model, mesh, dtype)
    weights = shard_bytes(params)
    memory = None if limit is None else int(max(0.0, SHARE * (limit - weights)))
    room = Room.fit(engine, rows=concurrency or CONCURRENCY, context=context, memory=memory, page=min(PAGE, context))
    batch = PagedBatch(engine, params, dataclasses.replace(room, steps=1))
    plan = ServePlan(
        topology.name, topology.chips, dict(mesh.shape), config.model.path, str(config.model.dtype), room.rows, context,
        {"weights": weights}, limit, mesh_notes=notes(mesh),
    )  # fmt: skip
    _measure(plan, batch, topology)
    plan.plan_seconds = time.perf_counter() - start
    return plan


def mesh_for(config: Config, model: Model, devices: Sequence[Any]) -> Mesh:
    """Return the configured mesh if it has more than `fsdp`, and else as many devices along `tensor` as the model's heads
    allow: each token needs all weights, which are better read in parts than gathered."""
    if not config.mesh.auto and any(getattr(config.mesh, axis) != 1 for axis in ("data", "expert", "tensor")):
        return make_mesh(config.mesh, devices)
    sizes = {one.shape[at] for one in model.specs.values() for at, axis in enumerate(one.row.axes) if axis in SHARDED}
    heads = {one.kv_heads for one in Layout(model.memories).keys_values if one.kv_heads > 1}  # a single one is everywhere
    tensor = math.gcd(len(devices), model.sizes.heads, *heads, *sizes)
    return make_mesh(MeshConfig(tensor=tensor, data=len(devices) // tensor, fsdp=1), devices)


def _measure(plan: ServePlan, batch: PagedBatch, topology: Topology) -> None:
    engine, mesh = batch.engine, batch.engine.mesh
    state, width = engine.abstract_state(batch.sizes), batch.widths[-1]
    programs = engine.programs(batch.sizes)
    part = batch.part([], {}, max(batch.shapes, key=math.prod), width)[1]
    with jax.set_mesh(mesh), nothing_kept() if topology.chip else nullcontext():
        traced = programs.decode.trace(batch.params, state, batch.turn([], 1, False, {}, width))
        decode = traced.lower().compile()
        read = programs.prefill.trace(batch.params, state, part).lower().compile()
    stats = [program.memory_analysis() for program in (decode, read)]
    memory = plan.memory
    memory["cache"] = shard_bytes((state.cache.keys, state.cache.values))
    memory["state"] = shard_bytes(state) - memory["cache"]
    memory["temporaries"] = float(max(one.temp_size_in_bytes for one in stats))
    memory["program"] = float(sum(one.generated_code_size_in_bytes for one in stats))
    plan.peak = float(max(one.peak_memory_in_bytes for one in stats))
    plan.flops = program_flops(traced)
    program = Program.of(decode, mesh)
    plan.hbm_bytes = program.hbm_bytes(min)
    plan.traffic = traffic(program.transfers(), mesh, topology)
    plan.attention = engine.attention
    if plan.limit is None:
        return
    cost = page_bytes(engine, batch.room.page)
    if cost:
        left = plan.limit - plan.peak - memory["program"] + memory["cache"]
        pages = max(0, int(left // cost) - 1)  # page 0 is no text's
        plan.tokens = pages * batch.room.page * engine.shards
        plan.texts = pages // math.ceil(plan.context / batch.room.page) * engine.shards
        plan.fits = plan.texts >= plan.rows
    else:
        plan.fits = plan.peak + memory["program"] <= plan.limit
    plan.seconds = seconds(plan.flops, plan.hbm_bytes, plan.traffic, mesh, topology)
    plan.bound = max(plan.seconds, key=plan.seconds.get)
    plan.step_seconds = plan.seconds[plan.bound]
    plan.tokens_per_second = plan.rows / plan.step_seconds
