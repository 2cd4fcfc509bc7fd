"""Tests schedules against transformers, updates against torch.optim.AdamW, and parameter groups by path."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import Adafactor, get_scheduler

from ftjax.config import OptimizerConfig
from ftjax.errors import UserError
from ftjax.models.nn.param import Row, Spec
from ftjax.train.optimizer import frozen_by_groups, make_optimizer, make_schedule


def spec(path, shape, axes, name):
    return Spec(path, shape, jnp.dtype("float32"), Row(axes, name))


SPECS = {
    "layers.block.q.lora_A": spec("layers.block.q.lora_A", (3, 2, 4), ("layers", "rank", "embed"), "lora_A.weight"),
    "layers.block.q.lora_B": spec("layers.block.q.lora_B", (3, 4, 2), ("layers", "heads", "rank"), "lora_B.weight"),
    "norm.weight": spec("norm.weight", (4,), ("norm",), "weight"),
}


@pytest.mark.parametrize(
    ("name", "theirs", "extra"),
    [
        ("cosine", "cosine", {}),
        ("linear", "linear", {}),
        ("constant", "constant", {}),
        ("constant_with_warmup", "constant_with_warmup", {}),
        ("warmup_stable_decay", "warmup_stable_decay", {"decay_type": "linear"}),
    ],
)
def test_schedules_are_those_of_transformers(name, theirs, extra):
    steps, warmup, decay = 50, 7, 10
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    if extra:
        extra = {**extra, "num_decay_steps": decay}
    scheduler = get_scheduler(theirs, optimizer, warmup, steps, scheduler_specific_kwargs=extra or None)
    config = OptimizerConfig(learning_rate=0.3, lr_scheduler_type=name, warmup_steps=warmup, decay_ratio=decay / steps)
    schedule = make_schedule(config, steps)
    for step in range(steps):
        np.testing.assert_allclose(schedule(step), scheduler.get_last_lr()[0], rtol=1e-5, atol=1e-8, err_msg=str(step))
        optimizer.step()
        scheduler.step()


def values(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=spec.shape).astype(np.float32) for path, spec in SPECS.items()}


def run(config, params, gradients):
    optimizer = make_optimizer(config, SPECS, 10)
    params = {path: jnp.asarray(value) for path, value in params.items()}
    state = optimizer.init(params)
    for grads in gradients:
        updates, state = optimizer.update({path: jnp.asarray(g) for path, g in grads.items()}, state, params)
        params = optax.apply_updates(params, updates)
    return params


def run_torch(groups, params, gradients, clip):
    """Train with torch. Args: groups: path -> (learning rate, weight decay)."""
    tensors = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in params.items()}
    optimizer = torch.optim.AdamW([{"params": [tensors[p]], "lr": lr, "weight_decay": wd} for p, (lr, wd) in groups.items()])
    for grads in gradients:
        for path, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[path])
        torch.nn.utils.clip_grad_norm_(tensors.values(), clip)
        optimizer.step()
    return {path: tensor.detach().numpy() for path, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({}, {"lora_A": (0.1, 0.05), "lora_B": (0.1, 0.05), "norm": (0.1, 0.0)}),
        ({"loraplus_lr_ratio": 8.0}, {"lora_A": (0.1, 0.05), "lora_B": (0.8, 0.05), "norm": (0.1, 0.0)}),
        (
            {
                "groups": [
                    {"pattern": "norm", "learning_rate": 0.01, "weight_decay": 0.2},
                    {"pattern": "lora_A", "weight_decay": 0},
                ]
            },
            {"lora_A": (0.1, 0.0), "lora_B": (0.1, 0.05), "norm": (0.01, 0.2)},
        ),
    ],
    ids=["plain", "lora+", "groups"],
)
def test_updates_are_those_of_torch(settings, groups):
    config = OptimizerConfig(learning_rate=0.1, lr_scheduler_type="constant", weight_decay=0.05, max_grad_norm=2.0, **settings)
    gradients = [values(seed) for seed in range(1, 6)]
    got = run(config, values(0), gradients)
    by_path = {path: next(v for key, v in groups.items() if key in path) for path in SPECS}
    want = run_torch(by_path, values(0), gradients, 2.0)
    for path in SPECS:
        # torch clips to max_norm / (norm + 1e-6), optax to max_norm / norm
        np.testing.assert_allclose(got[path], want[path], rtol=2e-5, atol=2e-5, err_msg=path)


def test_a_group_may_be_one_layer():
    """Layers that are stacked in one array can have different learning rates."""
    group = {"pattern": r"layers\.1\.", "learning_rate": 0.0, "weight_decay": 0.0}
    config = OptimizerConfig(learning_rate=0.1, lr_scheduler_type="constant", groups=[group])
    start = values(0)
    end = run(config, start, [values(1)])
    moved = np.abs(np.asarray(end["layers.block.q.lora_A"]) - start["layers.block.q.lora_A"]).max(axis=(1, 2))
    assert moved[1] == 0 and (moved[[0, 2]] > 0.05).all()


def test_freezing():
    config = OptimizerConfig(groups=[{"pattern": "lora_A", "freeze": True}])
    assert frozen_by_groups(config, SPECS) == {"layers.block.q.lora_A"}


@pytest.mark.parametrize(
    ("pattern", "says"), [("q_prj", "matches no"), ("(", "regular expression"), (r"layers\.2\.", "some layers")]
)
def test_groups_that_are_wrong(pattern, says):
    with pytest.raises(UserError, match=says):
        frozen_by_groups(OptimizerConfig(groups=[{"pattern": pattern, "freeze": True}]), SPECS)


STACKS = {
    # layers equal rows, and there are more experts: neither axis may be taken for one of the matrix
    "layers.block.q": spec("layers.block.q", (40, 24, 32), ("layers", "heads", "embed"), "weight"),
    "layers.block.experts.gate_up_proj": Spec(
        "layers.block.experts.gate_up_proj", (2, 50, 2, 6, 8), jnp.dtype("float32"),
        Row(("layers", "experts", None, "mlp", "embed"), "gate_up_proj", hf_shape=(50, 12, 8)),
    ),
    "layers.block.v.lora_A": Spec(
        "layers.block.v.lora_A", (3, 8, 16), jnp.dtype("float32"),
        Row(("layers", "rank", "embed"), "lora_A.weight", ranks=(8, 2, 0)),
    ),
    "layers.block.v.lora_B": Spec(
        "layers.block.v.lora_B", (3, 16, 8), jnp.dtype("float32"),
        Row(("layers", "heads", "rank"), "lora_B.weight", ranks=(8, 2, 0)),
    ),
    "layers.block.norm": spec("layers.block.norm", (3, 16), ("layers", "norm"), "weight"),
    "lm_head": spec("lm_head", (96, 16), ("vocab", "embed"), "weight"),
}  # fmt: skip


def of_stacks(seed):
    """Return values whose size differs much from layer to layer; padding is zero."""
    rng, found = np.random.default_rng(seed), {}
    for path, one in STACKS.items():
        found[path] = np.zeros(one.shape, np.float32)
        for piece in one.pieces():
            found[path][piece.index] = rng.normal(size=found[path][piece.index].shape) * 10 ** rng.uniform(-3, 2)
    return found


def test_adafactor_is_that_of_transformers():
    """Each tensor is treated separately, in its module's shape: rows, columns, clipped root mean square."""
    config = OptimizerConfig(
        name="adafactor", learning_rate=0.1, lr_scheduler_type="constant", weight_decay=0.05, max_grad_norm=None
    )
    optimizer = make_optimizer(config, STACKS, 10)
    params = of_stacks(0)
    state = optimizer.init({path: jnp.asarray(value) for path, value in params.items()})
    update = jax.jit(lambda *given: optimizer.update(*given))
    pieces = {piece.name: (path, piece) for path, one in STACKS.items() for piece in one.pieces()}
    tensors = {
        name: torch.nn.Parameter(torch.tensor(params[path][piece.index]).reshape(piece.shape))
        for name, (path, piece) in pieces.items()
    }
    vectors = [tensor for tensor in tensors.values() if tensor.ndim == 1]
    matrices = [tensor for tensor in tensors.values() if tensor.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    theirs = Adafactor(groups, lr=0.1, scale_parameter=False, relative_step=False)
    for number in range(1, 5):
        gradients = of_stacks(number)
        updates, state = update(gradients, state, params)
        params = {path: value + np.asarray(updates[path]) for path, value in params.items()}
        for name, (path, piece) in pieces.items():
            tensors[name].grad = torch.tensor(gradients[path][piece.index]).reshape(piece.shape)
        theirs.step()
        for name, (path, piece) in pieces.items():
            got = params[path][piece.index].reshape(piece.shape)
            np.testing.assert_allclose(got, tensors[name].detach().numpy(), rtol=2e-5, atol=2e-5, err_msg=f"{name} {number}")
    kept = sum(math.prod(leaf.shape) for leaf in [*state[0].row.values(), *state[0].col.values()])
    assert kept < sum(math.prod(one.shape) for one in STACKS.values()) / 4


def test_biases_of_experts_are_vectors():
    """Only matrices are decayed: an expert's, and the router's, whose rows are the experts."""
    specs = {
        "r": spec("layers.block.router", (2, 4, 8), ("layers", "experts", "embed"), "router"),
        "a": spec("layers.block.experts.down_proj", (2, 4, 8, 8), ("layers", "experts", "mlp", "embed"), "down_proj"),
        "b": spec("layers.block.experts.down_proj_bias", (2, 4, 8), ("layers", "experts", "embed"), "down_proj_bias"),
    }
    settings = OptimizerConfig(weight_decay=0.1, learning_rate=1.0, lr_scheduler_type="constant")
    optimizer = make_optimizer(settings, specs, 1)
    ones = {name: jnp.ones(one.shape) for name, one in specs.items()}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, ones), optimizer.init(ones), ones)
    assert {name for name, update in updates.items() if np.any(update)} == {"r", "a"}
