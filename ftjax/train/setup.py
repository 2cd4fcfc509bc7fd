"""From a configuration to everything that a run needs on its devices.

A `Design` is made from config.json alone: the model with its method, a mesh, and the sharding of every array. `ftjax plan`
compiles a design for chips that are not present, and a run loads weights into it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from ftjax import tree
from ftjax.config import Config
from ftjax.data.batch import batch_arrays
from ftjax.errors import UserError
from ftjax.flops import TrainFlops, train_flops
from ftjax.hub.adapter.peft import attach_adapter, load_adapter, start_adapter
from ftjax.hub.classifier import objectives_hf_config, with_objectives_head
from ftjax.hub.load import abstract_param, load_base
from ftjax.hub.narrow import LARGEST
from ftjax.hub.open import open_base
from ftjax.hub.run_folder import starting_adapter
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.hub.vocabulary import refuse_untrained_rows, tokens_of, with_new_tokens
from ftjax.mesh import devices_or_all, divided, make_mesh, parts, replicated, sharding
from ftjax.methods import method_of
from ftjax.models.composite import text_of
from ftjax.models.model import Model, build_module
from ftjax.models.nn.attention import choose
from ftjax.models.nn.memory import packs
from ftjax.models.nn.param import Spec, variables
from ftjax.models.nn.quantise import quantise
from ftjax.objectives import encoding_of, generates, objective_of
from ftjax.objectives.objective import Forward, LossInputs
from ftjax.train.auto_mesh import choose_mesh
from ftjax.train.optimizer import frozen_by_groups, make_optimizer, make_schedule
from ftjax.train.reference import Reference, make_reference
from ftjax.train.remat import choose_remat, device_memory
from ftjax.train.step import (
    LossFn,
    Runtime,
    StatisticsFn,
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
)
from ftjax.train.teacher import Teacher, teacher_of


@dataclass
class Design:
    """A model with its method on a mesh, as shapes."""

    config: Config
    mesh: Mesh
    model: Model
    runtime: Runtime
    reference: Reference | None = None  # if the objective compares with the initial model in every update
    before_training: Reference | None = None  # if it does so once, before training
    teacher: Teacher | None = None
    rollout_devices: Sequence[Any] = ()  # those that only generate; the mesh is over the others

    @property
    def shards(self) -> int:
        """Devices that the tokens of a batch are sharded over."""
        return parts(self.mesh.shape, "batch", "length")

    @property
    def loss_fn(self) -> LossFn:
        return partial(_loss, self)

    @property
    def statistics_fn(self) -> StatisticsFn | None:
        """Return what the loss needs of every microbatch; None if it needs nothing."""
        found = objective_of(self.config).statistics
        if found is None:
            return None
        return lambda *inputs: jax.lax.stop_gradient(found(_loss_inputs(self, *inputs)))

    @property
    def frozen_specs(self) -> dict[str, Spec]:
        """Specs of all parameters that a step reads but does not change, by path, with the dtypes in which they are held."""
        dtype = jnp.dtype(self.config.model.dtype)
        frozen = {path: spec.astype(dtype) for path, spec in self.model.frozen.items()}
        frozen |= {} if self.reference is None else self.reference.copy_specs(self.model, dtype)
        return frozen | ({} if self.teacher is None else self.teacher.specs(dtype))

    @property
    def train_flops(self) -> TrainFlops:
        """FLOPs per token (`ftjax.flops`)."""
        return train_flops(self.model, self.reference and self.reference.model, self.teacher and self.teacher.model)

    def trained_line(self) -> str:
        """Return PEFT's line: `trainable params: X || all params: Y || trainable%: Z`."""
        trained = sum(spec.size for spec in self.model.trainable.values())
        total = trained + sum(spec.size for spec in self.model.frozen.values())
        return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"

    def abstract_params(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return `(trained, frozen)` parameters by path, as shapes with dtypes and shardings."""
        dtype = jnp.dtype(self.config.model.dtype)
        trained, frozen = ({path: abstract_param(spec, self.mesh, dtype) for path, spec in specs.items()} for specs in (
            self.model.trainable, self.frozen_specs
        ))  # fmt: skip
        return trained, frozen

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the rows of one update `[A, B, T]`, in A microbatches, as shapes."""
        options = self.config.training
        micro = options.gradient_accumulation_steps
        rows = rows_at_a_time(self.config, parts(self.mesh.shape, "batch"))
        shape = (micro, rows, self.config.data.max_length)
        where = sharding(self.mesh, "training.global_batch_size", shape, (None, "batch", "length"))
        return {
            name: jax.ShapeDtypeStruct((*shape[:2], shape[2] * one.width), one.dtype, sharding=where)
            for name, one in batch_arrays(encoding_of(self.config).values).items()
        }

    def abstract_inputs(self, optimizer: optax.GradientTransformation) -> tuple:
        """Return the train step's inputs, as shapes with shardings: state, frozen, batch, key, limit."""
        params, frozen = self.abstract_params()
        everywhere = replicated(self.mesh)
        key = jax.eval_shape(jax.random.key, 0)
        return (
            abstract_state(params, optimizer),
            frozen,
            self.abstract_batch(),
            jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere),
            jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere),
        )


@dataclass
class Setup(Design):
    """A design with its weights on the devices."""

    source: Path = Path()  # the base model's folder or file
    params: dict[str, jax.Array] = field(default_factory=dict)  # trained
    frozen: dict[str, jax.Array] = field(default_factory=dict)
    mesh_reason: str | None = None  # set by `mesh: auto`

    def divided(self, params: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Return `(trained, frozen)` of all parameters by path."""
        return tree.split(dict(params), lambda path: path in self.model.trainable)


def _loss(design: Design, trainable, frozen, batch, ctx, statistics=None, number=0):
    """Compute the loss of a microbatch: see `LossFn`."""
    inputs = _loss_inputs(design, trainable, frozen, batch, ctx, statistics, number)
    return objective_of(design.config).loss(inputs)


def _loss_inputs(design: Design, trainable, frozen, batch, ctx, statistics=None, number=0) -> LossInputs:
    """Gather what a loss reads. `loss_chunk` counts tokens per device, and a batch is on several devices."""
    config, chunk = design.config, design.config.objective.loss_chunk * design.shards

    def reading(other: Reference | Teacher | None) -> Forward | None:
        if other is None:
            return None
        params = jax.lax.stop_gradient(other.params(frozen))
        return Forward(other.model, {}, params, batch, dataclasses.replace(ctx, dropout=None), chunk)

    others = reading(design.reference), reading(design.teacher)
    own = objective_of(config).statistics
    matches = None if design.teacher is None else design.teacher.matches
    return LossInputs(design.model, trainable, frozen, batch, ctx, chunk, config, *others, matches, own, statistics, number)


def build(config: Config, hf_config: Mapping[str, Any]) -> tuple[Model, Config]:
    """Build the abstract model of a completed config.json, with its method attached.

    A run that starts from a PEFT folder takes its settings from there; the configuration is returned with them.
    """
    root, config = _root(config, hf_config)
    return Model.of(root, hf_config), config


def _root(config: Config, hf_config: Mapping[str, Any]) -> tuple[nnx.Module, Config]:
    """Build the model's module: see `build`."""
    root = build_module(hf_config)
    if adapter := starting_adapter(config.method):
        config = config.model_copy(update={"method": attach_adapter(root, adapter, config.method)})
    else:
        method_of(config.method).attach(root, config.method)
    if config.model.quantization:
        quantise(root, config.model.quantization)
    model = Model.of(root, hf_config)
    frozen = frozen_by_groups(config.optimizer, model.trainable)
    held = jnp.dtype(config.optimizer.param_dtype)
    for name, variable in variables(root):
        if name in frozen:
            variable.set_metadata("row", dataclasses.replace(variable.row, trainable=False))
        elif variable.row.trainable:
            variable.set_value(jax.ShapeDtypeStruct(variable.get_value().shape, held))
    return root, config


def mesh_of(
    config: Config, hf_config: Mapping[str, Any], devices: Sequence[Any] | None = None, memory: int | None = None
) -> tuple[Mesh, str | None]:
    """Return the configured mesh, and the reason if `mesh: auto` chose it.

    Args:
        devices: devices to use; None uses all.
        memory: bytes per device; None asks the devices.
    """
    devices, _ = divided(config.mesh, devices_or_all(devices))
    if not config.mesh.auto:
        return make_mesh(config.mesh, devices), None
    teacher = teacher_of(config)
    others = [] if teacher is None else [teacher.model]
    chosen, why = choose_mesh(config, build(config, hf_config)[0], devices, memory or device_memory(devices), others)
    return make_mesh(chosen, devices), why


def design(config: Config, hf_config: Mapping[str, Any], mesh: Mesh, memory: int | None = None) -> Design:
    """Build the design of a run of `config` on `mesh`, from shapes alone.

    Args:
        hf_config: config.json as `ftjax.models.facts` completes it.
        memory: bytes per device of the mesh; None asks the devices.

    Raises UserError for anything in the configuration that does not fit the model.
    """
    hf_config, further = objectives_hf_config(config, hf_config), starting_adapter(config.method) is not None
    root, config = _root(config, hf_config)
    model = Model.of(root, hf_config)
    teacher = teacher_of(config)
    for one, name in ((model, "this model"), *([] if teacher is None else [(teacher.model, "the teacher")])):
        refuse_packing(config, one)
        if one.max_positions is not None and config.data.max_length > one.max_positions:
            raise UserError(
                f"data.max_length: {config.data.max_length} tokens are more than the {one.max_positions} positions that {name} "
                "has learned"
            )
    options, spread = config.training, parts(mesh.shape, "batch")
    steps = options.gradient_accumulation_steps
    rows = rows_at_a_time(config, spread)
    for name, size, of in (("global_batch_size", rows, steps), ("eval_batch_size", options.eval_batch_size or rows, 1)):
        if size % spread:
            raise UserError(
                f"training.{name}: {size} rows at a time do not divide by the {spread} devices that share them; choose a "
                f"multiple of {spread * of}, or mesh.tensor or mesh.sequence, whose devices work on the same rows"
            )
    if config.data.max_length % mesh.shape["sequence"]:
        raise UserError(
            f"data.max_length: {config.data.max_length} tokens do not divide by mesh sequence={mesh.shape['sequence']}; "
            "choose a multiple of it"
        )
    runtime = Runtime(
        jnp.dtype(config.model.compute_dtype),
        choose(config.model.attention, mesh.devices.flat[0], mesh.size),
        config.model.remat,
    )
    objective, reference, once = objective_of(config), None, None
    if objective.reference(config.objective):
        reference = make_reference(root, model, keep_adapter=further)
    elif objective.precomputed(config.objective):
        once = make_reference(root, model, keep_adapter=further)
    made = Design(config, mesh, model, runtime, reference, once, teacher)
    shape = rows // spread, max(1, config.data.max_length // mesh.shape["sequence"])
    memory = memory or device_memory(list(mesh.devices.flat))
    remat = choose_remat(made.loss_fn, runtime, model.trainable, made.frozen_specs, shape, memory, encoding_of(config).values)
    made.runtime = dataclasses.replace(runtime, remat=remat)
    return made


def rows_at_a_time(config: Config, spread: int) -> int:
    """Return the rows of a microbatch; the most of them, if answers that are generated are packed into rows.

    Args:
        spread: devices that share the rows; those of generated answers are filled up to a multiple.
    """
    rows = config.training.global_batch_size // config.training.gradient_accumulation_steps
    return math.ceil(rows / spread) * spread if generates(config) else rows


def refuse_packing(config: Config, model: Model) -> None:
    """UserError for packed rows where a layer would carry what it remembers of one document into the next."""
    if config.data.packing and not packs(model.memories):
        raise UserError(
            "data.packing: some layers of this model do not start anew with each document of a row, so that documents would "
            "not be told apart; set data.packing: false"
        )


def prepare(config: Config, devices: Sequence[jax.Device] | None = None) -> Setup:
    """Build, shard and load the model.

    Args:
        devices: devices to use, of all processes; None uses all.

    Raises UserError for anything wrong in the configuration or the files, or if the mesh does not fit the devices.
    """
    adapter = starting_adapter(config.method)
    path, hf_config, source = open_base(config.model.path, config.model.revision, adapter)
    had = text_of(hf_config)["vocab_size"]
    hf_config, source = with_new_tokens(config.model, hf_config, source)
    hf_config, source = with_objectives_head(config, hf_config, source)
    mesh, why = mesh_of(config, hf_config, devices)
    made = design(config, hf_config, mesh)
    made.rollout_devices = divided(config.mesh, devices_or_all(devices))[1]
    config, model = made.config, made.model
    if config.model.adds_tokens:
        refuse_untrained_rows(model, had, tokens_of(config.model), config.method.name)
    base = load_base(model, source, mesh, jnp.dtype(config.model.dtype), str(path))
    if adapter:
        params = load_adapter(model, adapter, mesh)
    else:

        def tokenize(text: str) -> list[int]:
            return load_tokenizer(config.model)(text)["input_ids"]

        params = start_adapter(model, base, config.method, mesh, config.training.seed, tokenize)
    params, frozen = tree.split({**base, **params}, lambda name: model.specs[name].row.trainable)
    if config.model.dtype == "float16" and not method_of(config.method).adapter:
        _refuse_beyond_float16(model, params)
    if made.reference is not None:
        frozen |= made.reference.copies(model, params, jnp.dtype(config.model.dtype))
    if made.teacher is not None:
        frozen |= made.teacher.load(mesh, config.model.dtype)
    given = {field.name: getattr(made, field.name) for field in dataclasses.fields(Design)}
    return Setup(**given, source=path, params=params, frozen=frozen, mesh_reason=why)


def _refuse_beyond_float16(model: Model, params: Mapping[str, jax.Array]) -> None:
    """Raise UserError if weights, which train in float32, already exceed float16 and could not be saved."""
    for path, value in params.items():
        if (largest := float(jnp.abs(value).max())) > LARGEST:
            raise UserError(
                f"model.dtype: float16 holds values up to {LARGEST:.0f}, and {model.specs[path].hf_template} has some up to "
                f"{largest:.3g}, so that the result could not be saved; choose bfloat16 or float32"
            )


def _without_metrics(loss_fn: LossFn) -> LossFn:
    """Drop the metrics of a loss, so that XLA does not compute them."""

    def loss(*inputs):
        totals, auxiliary = loss_fn(*inputs)
        return totals._replace(metrics={}), auxiliary

    return loss


def compile_steps(setup: Design, steps: int) -> tuple[Any, Any, optax.GradientTransformation, Any]:
    """Build `(train step, evaluation step, optimizer, schedule)` for `steps` updates; the train step donates its state."""
    optimizer = make_optimizer(setup.config.optimizer, setup.model.trainable, steps)
    loss = setup.loss_fn if objective_of(setup.config).train_metrics else _without_metrics(setup.loss_fn)
    train = jax.jit(make_train_step(loss, optimizer, setup.runtime, setup.train_flops, setup.statistics_fn), donate_argnums=0)
    evaluate = jax.jit(make_eval_step(setup.loss_fn, dataclasses.replace(setup.runtime, remat="none")))
    return train, evaluate, optimizer, make_schedule(setup.config.optimizer, steps)


def new_state(setup: Setup, optimizer: optax.GradientTransformation) -> TrainState:
    return init_state(setup.params, optimizer)
