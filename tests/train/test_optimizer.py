"""Schedules against transformers, updates against torch.optim.AdamW, groups by path."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_scheduler

from ftjax.config import OptimizerConfig
from ftjax.errors import UserError
from ftjax.models.param import Row, Spec
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
    """`groups`: path -> (learning rate, weight decay)."""
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
    """Layers are stacked in one array, and still have learning rates of their own."""
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
