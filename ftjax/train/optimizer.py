"""AdamW or Adafactor with schedules, clipping and per-parameter groups, assembled from optax.

The update of a parameter p with decay w and learning rate lr is `p -= lr * (m / (sqrt(v) + eps) + w * p)` (Loshchilov and
Hutter 2019, arXiv:1711.05101), as in torch.optim.AdamW. The schedules are those of transformers.get_scheduler.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import wraps

import jax
import numpy as np
import optax

from ftjax.config import OptimizerConfig
from ftjax.errors import UserError
from ftjax.models.nn.param import Spec
from ftjax.train.adafactor import scale_by_adafactor
from ftjax.train.moments import scale_by_held_adam
from ftjax.train.offload import on_the_host


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Build the learning rate schedule of a run of `steps` updates, a function of the update's number, counted from 0."""
    peak, floor = config.learning_rate, config.learning_rate * config.min_lr_ratio
    warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(steps * config.warmup_ratio)
    rest = max(1, steps - warmup)
    match config.lr_scheduler_type:
        case "constant" | "constant_with_warmup":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, floor, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.min_lr_ratio)
        case "warmup_stable_decay":
            decay = min(rest, max(1, math.ceil(steps * config.decay_ratio)))
            after = optax.join_schedules(
                [optax.constant_schedule(peak), optax.linear_schedule(peak, floor, decay)], [rest - decay]
            )
    if config.lr_scheduler_type != "constant" and warmup:
        after = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
    return _promoting(after)


def _promoting(function: Callable) -> Callable:
    """Let a function of optax promote dtypes where the program as a whole does not, as in the tests.

    optax raises decay rates to the power of an integer count, and multiplies such a count with a float (cosine).
    """

    @wraps(function)
    def standard(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return standard


def make_optimizer(config: OptimizerConfig, specs: Mapping[str, Spec], steps: int) -> optax.GradientTransformation:
    """Build the optimizer of the trained parameters `specs`.

    Norm weights, biases and other vectors have no weight decay, as in transformers' Trainer, unless a group sets it.
    Raises UserError for a group that matches nothing.
    """
    rate = {path: _per_layer(spec, lambda name: _rate(config, name)) for path, spec in specs.items()}
    decay = {path: _per_layer(spec, lambda name, s=spec: _decay(config, name, s)) for path, spec in specs.items()}
    schedule = make_schedule(config, steps)
    chain = [optax.clip_by_global_norm(config.max_grad_norm)] if config.max_grad_norm else []
    moments = _moments(config, specs)
    chain.append(on_the_host(moments) if config.offload else moments)
    if any(np.any(value) for value in decay.values()):
        chain.append(optax.stateless(lambda updates, params: {k: u + decay[k] * params[k] for k, u in updates.items()}))
    if any(np.any(value != 1) for value in rate.values()):
        chain.append(optax.stateless(lambda updates, params: {k: u * rate[k] for k, u in updates.items()}))
    chain.append(optax.scale_by_learning_rate(schedule))
    whole = optax.chain(*chain)
    return optax.GradientTransformationExtraArgs(whole.init, _promoting(whole.update))


def _moments(config: OptimizerConfig, specs: Mapping[str, Spec]) -> optax.GradientTransformation:
    """Build the transformation that divides a gradient by its second moment."""
    if config.name == "adafactor":
        return scale_by_adafactor(specs)
    b1, b2, eps = config.adam_beta1, config.adam_beta2, config.adam_epsilon
    if config.state_dtype == "float32":
        return optax.scale_by_adam(b1, b2, eps)
    return scale_by_held_adam(b1, b2, eps, config.state_dtype)


def frozen_by_groups(config: OptimizerConfig, specs: Mapping[str, Spec]) -> set[str]:
    """Return the paths that a group with `freeze: true` freezes.

    Raises UserError for a group whose pattern matches no parameter, and for one that freezes only some layers of a stacked
    parameter.
    """
    names = [piece.name for spec in specs.values() for piece in spec.pieces()]
    for group in config.groups:
        try:
            found = any(re.search(group.pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"optimizer.groups: {group.pattern!r} is not a regular expression: {error}") from None
        if not found:
            raise UserError(f"optimizer.groups: {group.pattern!r} matches no trained parameter, such as {', '.join(names[:3])}")
    frozen = set()
    for path, spec in specs.items():
        flags = [bool((group := _group(config, piece.name)) and group.freeze) for piece in spec.pieces()]
        if all(flags):
            frozen.add(path)
        elif any(flags):
            raise UserError(
                f"optimizer.groups: a group freezes some layers of {spec.hf_template.format('*')} and not others; layers are "
                "stacked in one array, so freeze all of them, give those layers learning_rate: 0, or (with method full) name "
                "them in method.freeze"
            )
    return frozen


def _group(config: OptimizerConfig, name: str):
    return next((group for group in config.groups if re.search(group.pattern, name)), None)


def _rate(config: OptimizerConfig, name: str) -> float:
    """Return the factor on the schedule's learning rate."""
    group = _group(config, name)
    if group and group.learning_rate is not None:
        return group.learning_rate / config.learning_rate if config.learning_rate else 0.0
    if config.loraplus_lr_ratio and ".lora_B." in name:
        return config.loraplus_lr_ratio
    return 1.0


def _decay(config: OptimizerConfig, name: str, spec: Spec) -> float:
    group = _group(config, name)
    if group and group.weight_decay is not None:
        return group.weight_decay
    vector = len(spec.shape) - len(spec.stacked) < 2 or spec.row.name.endswith("bias")  # biases of all experts are one array
    return 0.0 if vector else config.weight_decay


def _per_layer(spec: Spec, value: Callable[[str], float]) -> np.ndarray:
    """Return a number per stacked layer, shaped to broadcast against the parameter."""
    numbers = np.ones(spec.stacked, np.float32)
    for piece in spec.pieces():
        numbers[piece.index[: len(spec.stacked)]] = value(piece.name)
    if numbers.size and np.all(numbers == numbers.flat[0]):
        return np.float32(numbers.flat[0])
    return numbers.reshape(*numbers.shape, *(1,) * (len(spec.shape) - numbers.ndim))
