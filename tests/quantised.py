"""Builds quantised models, and plain ones of what their weights stand for."""

from functools import partial

import jax
import jax.numpy as jnp
from oracle import one_device
from tiny_run import make_config

from ftjax.config import LoraConfig, OptimizerConfig
from ftjax.flops import train_flops
from ftjax.methods import lora
from ftjax.models.model import Model, build_module
from ftjax.models.nn.quantise import quantise
from ftjax.models.nn.quantized import Int8, Nf4
from ftjax.train.optimizer import make_optimizer
from ftjax.train.setup import Setup
from ftjax.train.step import Runtime, TrainState, make_train_step

KINDS = ("int8", "nf4")


def quantised(kind, method=None):
    def attach(root):
        if method is not None:
            lora.attach(root, method)
        quantise(root, kind)

    return attach


@jax.jit
def dense(params):
    """Return the dequantised weights as plain arrays."""
    return {path: leaf.dequantise(jnp.float32) if isinstance(leaf, Int8 | Nf4) else leaf for path, leaf in params.items()}


def lora_model(facts, kind, **method):
    root = build_module(facts)
    lora.attach(root, LoraConfig(r=8, **method))
    quantise(root, kind)
    return Model.of(root, facts)


def compiled_step(model, remat, length, dtype):
    """Compile the training step of one row, from shapes alone."""
    frozen = {p: s.abstract if s.row.quantization else jax.ShapeDtypeStruct(s.shape, dtype) for p, s in model.frozen.items()}
    params = {path: spec.abstract for path, spec in model.trainable.items()}
    optimizer = make_optimizer(OptimizerConfig(), model.trainable, 10)
    state = TrainState(params, jax.eval_shape(optimizer.init, params), jax.ShapeDtypeStruct((), jnp.int32))
    ints, floats = (jax.ShapeDtypeStruct((1, 1, length), kind) for kind in (jnp.int32, jnp.float32))
    batch = {"tokens": ints, "targets": ints, "weights": floats, "positions": ints, "segment_ids": ints}
    setup = Setup(make_config("none"), one_device(), model, None)
    step = make_train_step(setup.loss_fn, optimizer, Runtime(dtype, "xla", remat), train_flops(model))
    key, limit = jax.eval_shape(partial(jax.random.key, 0)), jax.ShapeDtypeStruct((), jnp.float32)
    return jax.jit(step, donate_argnums=0).lower(state, frozen, batch, key, limit).compile().memory_analysis()


def with_model(config, **values):
    return config.model_copy(update={"model": config.model.model_copy(update=values)})


def sizes_read(monkeypatch) -> list[int]:
    """Return a list that gets the size of each part of a weight that is read to be quantised."""
    from ftjax.hub import load as loading

    sizes, original = [], loading.block_reader

    def spy(spec, *more):
        read = original(spec, *more)

        def count(index):
            out = read(index)
            if spec.row.quantization:
                sizes.append(out.size)
            return out

        return count

    monkeypatch.setattr(loading, "block_reader", spy)
    return sizes
