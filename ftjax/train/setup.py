"""From a configuration to everything that a run needs on its devices."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ftjax import tree
from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.hub.fetch import resolve_model
from ftjax.hub.load import load_base, open_model
from ftjax.hub.peft import attach_adapter, load_adapter, start_adapter
from ftjax.hub.tokenizer import load_tokenizer
from ftjax.mesh import make_mesh
from ftjax.methods import method_of
from ftjax.models.attention import choose
from ftjax.models.model import Model, build_module
from ftjax.models.param import variables
from ftjax.models.quantized_linear import quantise
from ftjax.objectives import sft
from ftjax.train.optimizer import frozen_by_groups, make_optimizer, make_schedule
from ftjax.train.remat import choose_remat
from ftjax.train.step import Runtime, SumsFn, TrainState, init_state, make_eval_step, make_train_step


@dataclass
class Setup:
    """A model with its method, on a mesh, with weights."""

    config: Config
    source: Path  # the base model's folder or file
    mesh: Mesh
    model: Model
    params: dict[str, jax.Array]  # trained
    frozen: dict[str, jax.Array]
    runtime: Runtime

    @property
    def sums_fn(self) -> SumsFn:
        return partial(_sums, self.model, self.config.objective.loss_chunk, self.mesh.shape["data"] * self.mesh.shape["fsdp"])

    def trained_line(self) -> str:
        """PEFT's line: `trainable params: X || all params: Y || trainable%: Z`."""
        trained = sum(spec.size for spec in self.model.trainable.values())
        total = trained + sum(spec.size for spec in self.model.frozen.values())
        return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"


def _sums(model, chunk, batch_shards, trainable, frozen, batch, ctx):
    """`loss_chunk` counts the tokens of one device; the rows of a batch lie on several."""
    return sft.sums(model, trainable, frozen, batch, ctx, chunk * batch_shards)


def build(config: Config) -> tuple[Model, Any, Path, Config]:
    """The abstract model with its method attached, its tensors' source, and where they are.

    A run that starts from a PEFT folder takes that folder's settings; the configuration comes back with them.
    """
    path = resolve_model(config.model.path, config.model.revision)
    facts, source = open_model(path)
    root = build_module(facts)
    adapter = getattr(config.method, "adapter_path", None)
    if adapter:
        config = config.model_copy(update={"method": attach_adapter(root, Path(adapter), config.method)})
    else:
        method_of(config.method).attach(root, config.method)
    if config.model.quantization:
        quantise(root, config.model.quantization)
    model = Model.of(root, facts)
    frozen = frozen_by_groups(config.optimizer, model.trainable)
    for name, variable in variables(root):
        if name in frozen:
            variable.set_metadata("row", dataclasses.replace(variable.row, trainable=False))
    return (Model.of(root, facts) if frozen else model), source, path, config


def prepare(config: Config) -> Setup:
    """Build, shard and load. Raises UserError for anything in the configuration or the files that is wrong."""
    mesh = make_mesh(config.mesh)
    model, source, path, config = build(config)
    if model.max_positions is not None and config.data.max_length > model.max_positions:
        raise UserError(
            f"data.max_length: {config.data.max_length} tokens are more than the {model.max_positions} positions that this "
            "model has learned"
        )
    rows = config.training.global_batch_size // config.training.gradient_accumulation_steps
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    runtime = Runtime(jnp.dtype(config.model.compute_dtype), choose(config.model.attention, mesh.size), config.model.remat)
    adapter = getattr(config.method, "adapter_path", None)
    base = load_base(model, source, mesh, jnp.dtype(config.model.dtype), str(path))
    if adapter:
        params = load_adapter(model, Path(adapter), mesh)
    else:

        def tokenize(text: str) -> list[int]:
            return load_tokenizer(config.model)(text)["input_ids"]

        params = start_adapter(model, base, config.method, mesh, config.training.seed, tokenize)
    params, frozen = tree.split({**base, **params}, lambda name: model.specs[name].row.trainable)
    setup = Setup(config, path, mesh, model, params, frozen, runtime)
    remat = choose_remat(setup.sums_fn, runtime, model, max(1, rows // shards), config.data.max_length)
    setup.runtime = dataclasses.replace(runtime, remat=remat)
    return setup


def compile_steps(setup: Setup, steps: int) -> tuple[Any, Any, optax.GradientTransformation, Any]:
    """`(train step, evaluation step, optimizer, schedule)` for a run of `steps` updates; the train step donates its state."""
    optimizer = make_optimizer(setup.config.optimizer, setup.model.trainable, steps)
    train = jax.jit(make_train_step(setup.sums_fn, optimizer, setup.runtime), donate_argnums=0)
    evaluate = jax.jit(make_eval_step(setup.sums_fn, dataclasses.replace(setup.runtime, remat="none")))
    return train, evaluate, optimizer, make_schedule(setup.config.optimizer, steps)


def new_state(setup: Setup, optimizer: optax.GradientTransformation) -> TrainState:
    return init_state(setup.params, optimizer)
