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
from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.generate.decode import State
from ftjax.generate.engine import Engine, decoding_mesh
from ftjax.generate.paged import PagedBatch, Room, page_bytes
from ftjax.hub.load import abstract_param, base_specs
from ftjax.hub.vocabulary import hf_config_of
from ftjax.long_steps import long_step
from ftjax.mesh import make_mesh, notes, spec
from ftjax.models.model import Model, build_module
from ftjax.models.nn.quantise import quantise
from ftjax.plan.arithmetic import program_flops
from ftjax.plan.hlo import Program
from ftjax.plan.roofline import Traffic, bound_of, traffic
from ftjax.plan.shards import shard_bytes
from ftjax.plan.topology import Topology

CONCURRENCY = 16
LONGEST = 8192  # tokens of context, unless others are asked for or the model's are fewer
PAGE = 32
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
    """Return the configured mesh if it has more than `fsdp`, and else one to decode on."""
    if not config.mesh.auto and any(getattr(config.mesh, axis) != 1 for axis in ("data", "expert", "tensor")):
        return make_mesh(config.mesh, devices)
    return decoding_mesh(model, devices)


@dataclass(frozen=True)
class Compiled:
    """The engine's two largest programs, compiled: the one that decodes a token of each row, and one that reads prompts.

    Attributes:
        state: of the rows, as shapes.
        flops: of a decode step, on all devices.
        read_flops: of a call that reads prompts.
        decode, read: the programs.
    """

    state: State
    mesh: Mesh
    flops: float
    read_flops: float
    decode: Any
    read: Any

    @property
    def _stats(self) -> list[Any]:
        return [program.memory_analysis() for program in (self.decode, self.read)]

    def memory(self) -> dict[str, float]:
        """Return the bytes of what is alive beside the weights, by kind."""
        cache = shard_bytes((self.state.cache.keys, self.state.cache.values))
        return {
            "cache": cache,
            "state": shard_bytes(self.state) - cache,
            "temporaries": float(max(one.temp_size_in_bytes for one in self._stats)),
            "program": float(sum(one.generated_code_size_in_bytes for one in self._stats)),
        }

    @property
    def peak(self) -> float:
        """Bytes that are alive at one time, weights included."""
        return float(max(one.peak_memory_in_bytes for one in self._stats))

    def beside(self, params: Any) -> float:
        """Return the bytes that are alive at one time beside these parameters."""
        return max(0.0, self.peak - shard_bytes(params))

    def traffic(self, program: Any, topology: Topology) -> list[Traffic]:
        """Return what one of the programs moves between devices."""
        return traffic(Program.of(program, self.mesh).transfers(), self.mesh, topology)

    def prefill_seconds(self, hbm_bytes: float, topology: Topology) -> float:
        """Return the least time of a call that reads prompts. Args: hbm_bytes: that a device reads for it."""
        return bound_of(self.read_flops, hbm_bytes, self.traffic(self.read, topology), self.mesh, topology)[-1]


def compile_programs(batch: PagedBatch, shape: tuple[int, int], topology: Topology) -> Compiled:
    """Compile the programs of a batch whose arrays are shapes, for its longest tables. Args: shape: of the one that reads."""
    engine, mesh = batch.engine, batch.engine.mesh
    state, width = engine.abstract_state(batch.sizes), batch.widths[-1]
    programs = engine.programs(batch.sizes)
    with (
        jax.set_mesh(mesh),
        nothing_kept() if topology.chip else nullcontext(),
        long_step(f"compiling the decoding programs for {topology.name}"),
    ):
        decode = programs.decode.trace(batch.decode_params, state, batch.turn([], 1, False, {}, width, batch.sizes.rows)[1])
        read = programs.prefill.trace(batch.params, state, batch.part([], {}, shape, width)[1])
        compiled = [traced.lower().compile() for traced in (decode, read)]
    return Compiled(state, mesh, program_flops(decode), program_flops(read), *compiled)


def _measure(plan: ServePlan, batch: PagedBatch, topology: Topology) -> None:
    engine = batch.engine
    programs = compile_programs(batch, max(batch.shapes, key=math.prod), topology)
    memory = plan.memory
    memory.update(programs.memory())
    program = Program.of(programs.decode, programs.mesh)
    plan.peak, plan.flops, plan.hbm_bytes = programs.peak, programs.flops, program.hbm_bytes(min)
    plan.traffic = programs.traffic(programs.decode, topology)
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
    plan.seconds, plan.bound, plan.step_seconds = bound_of(plan.flops, plan.hbm_bytes, plan.traffic, engine.mesh, topology)
    plan.tokens_per_second = plan.rows / plan.step_seconds


def read_bytes(batch: PagedBatch, context: int | None = None) -> float:
    """Return what a device reads at least for one token of each of its rows: every weight, but of an embedding that is not the
    output too only the tokens' rows, and the keys, values and states of contexts of this length. Args: None: of full ones."""
    engine, room = batch.engine, batch.room
    embedding = {path for path, spec in engine.model.specs.items() if spec.row.axes == ("vocab", "embed")}
    looked_up = embedding - {f"{engine.model.output}.weight"}
    weights = shard_bytes({path: value for path, value in batch.params.items() if path not in looked_up})
    pages = room.rows // engine.shards * math.ceil((context or room.context) / room.page)
    cost = page_bytes(engine, room.page)
    return weights + pages * cost + shard_bytes(engine.abstract_state(batch.sizes).cache.states)
