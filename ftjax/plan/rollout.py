"""Plan the answers of a run that learns from what its model generates: the programs of the engine, with the run's weights on
the run's mesh, for chips that need not be present.

Generation and update take turns, on the same weights: what is alive while answers are generated are weights, moments and
whatever else the run keeps, the pages of keys and values, and the temporaries of the engine's programs. With
`mesh.rollout_devices` they work at the same time, on devices of their own, with weights on either; each host then answers its
share of the prompts on its own devices. The least time is that of reading each distinct prompt once, and of as many decode
steps as it takes for every answer to be as long as allowed.

    512 answers of 1,024 tokens, 256 at a time      2 x 1,024 decode steps
"""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from ftjax.config import Config
from ftjax.generate.answer import Answer
from ftjax.generate.engine import decoding_mesh
from ftjax.generate.offline import arrange
from ftjax.generate.paged import PagedBatch
from ftjax.generate.text import StopStrings
from ftjax.hub.load import abstract_param
from ftjax.mesh import of_process
from ftjax.plan.refused import wanted_bytes
from ftjax.plan.roofline import Traffic, bound_of
from ftjax.plan.serve import AbstractEngine, Compiled, compile_programs, read_bytes
from ftjax.plan.shards import shard_bytes
from ftjax.plan.topology import Topology
from ftjax.train.setup import Design


@dataclass
class RolloutPlan:
    """What the generation of an update's answers needs. Memory and bytes are per device; times are lower bounds.

    Attributes:
        answers: of an update.
        hosts: that generate a share of them each, on a mesh of their own.
        rows: answers that are generated at a time, by each of these.
        prompt, length: tokens of a prompt and of an answer, as many as the configuration allows.
        memory: of what is alive beside what the update keeps: keys and values, states, temporaries and programs.
        peak: bytes that are alive at one time while answers are generated, all that the run keeps there included.
        apart: devices that only generate (`mesh.rollout_devices`); 0: those that train do.
        sent: bytes of trained parameters that each of these is sent after an update.
        prefill_seconds: to read each prompt of an update once.
        flops, hbm_bytes, traffic, seconds: of a decode step, with contexts of mean length.
        step_seconds: the largest of `seconds`, named `bound`.
        rollout_seconds: to generate all answers of an update.
    """

    answers: int
    rows: int
    prompt: int
    length: int
    mesh: dict[str, int]
    memory: dict[str, float]
    peak: float
    fits: bool | None = None
    flops: float = 0.0
    apart: int = 0
    hosts: int = 1
    sent: float = 0.0
    hbm_bytes: float = 0.0
    traffic: list[Traffic] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: float | None = None
    bound: str | None = None
    prefill_seconds: float | None = None
    rollout_seconds: float | None = None
    tokens_per_second: float | None = None

    @property
    def steps(self) -> int:
        """Decode steps of an update, on each host."""
        return math.ceil(self.share / self.rows) * self.length

    @property
    def share(self) -> int:
        """Answers that a host generates, at most."""
        return math.ceil(self.answers / self.hosts)


def plan_rollouts(made: Design, kept: float, limit: float | None, topology: Topology) -> RolloutPlan:
    """Compile the programs that generate the answers of an update of `made`.

    Args:
        kept: bytes on a device that the run keeps between updates, the weights included.
        limit: bytes of a device; None if not known.
    """
    config, section, mesh = made.config, made.config.objective, made.mesh
    trained, frozen = made.abstract_params()
    params = {path: {**frozen, **trained}[path] for path in made.model.specs}
    hosts = 1
    if made.rollout_devices:
        own = of_process(made.rollout_devices, made.rollout_devices[0].process_index)
        hosts = len(made.rollout_devices) // len(own)
        mesh, dtype = decoding_mesh(made.model, own), jnp.dtype(config.model.dtype)
        params = {path: abstract_param(spec, mesh, dtype) for path, spec in made.model.specs.items()}
        kept = shard_bytes(params)
    engine = AbstractEngine(made.model, mesh, made.runtime.dtype, True)
    answers, group = asked(config)
    length = section.max_completion_length
    prompt = max(1, config.data.max_length - length)
    texts = [[number // group] * prompt for number in range(math.ceil(answers / hosts))]  # a group has one prompt
    found = arrange(
        engine, [Answer(text, length, frozenset([0]), StopStrings(), None) for text in texts],
        math.ceil(section.generation_batch_rows / hosts),
    )  # fmt: skip
    room = found.room
    batch = PagedBatch(engine, params, replace(room, steps=1))
    plan = RolloutPlan(answers, room.rows, prompt, length, dict(mesh.shape), {}, kept, hosts=hosts)
    if made.rollout_devices:
        plan.apart, plan.sent = len(made.rollout_devices), shard_bytes({path: params[path] for path in trained})
    try:
        programs = compile_programs(batch, batch.shapes[0], topology)
    except jax.errors.JaxRuntimeError as error:
        plan.fits, plan.peak = False, max(kept, wanted_bytes(error, topology.name))
        return plan
    plan.memory, plan.peak, plan.flops = programs.memory(), kept + programs.beside(params), programs.flops
    if limit is not None:
        plan.fits = plan.peak + plan.memory["program"] <= limit
        _times(plan, batch, programs, found.fresh, topology)
    return plan


def asked(config: Config) -> tuple[int, int]:
    """Return the number of answers of an update, and of those that share a prompt."""
    section, documents = config.objective, config.training.global_batch_size
    if section.name == "distill":
        return max(1, math.floor(section.lmbda * documents)), 1
    return documents, section.num_generations


def _times(plan: RolloutPlan, batch: PagedBatch, programs: Compiled, fresh: int, topology: Topology) -> None:
    plan.hbm_bytes = read_bytes(batch, plan.prompt + plan.length // 2)
    plan.traffic = programs.traffic(programs.decode, topology)
    plan.seconds, plan.bound, plan.step_seconds = bound_of(
        plan.flops, plan.hbm_bytes, plan.traffic, batch.engine.mesh, topology
    )
    rows, tokens = batch.shapes[0]
    calls = math.ceil(fresh / rows) * math.ceil(plan.prompt / tokens)
    plan.prefill_seconds = calls * programs.prefill_seconds(read_bytes(batch, max(1, plan.prompt // 2)), topology)
    plan.rollout_seconds = plan.prefill_seconds + plan.steps * plan.step_seconds
    plan.tokens_per_second = plan.answers * plan.length / plan.rollout_seconds
