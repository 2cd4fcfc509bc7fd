"""Advantages of answers from their rewards, as TRL computes them.

Legend: N answers in groups of G to one prompt, F reward functions. NaN: a function had nothing to say.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32

from ftjax.config.rewards import GrpoConfig, RlooConfig

TINY = 1e-4  # added to standard deviations


class Advantages(NamedTuple):
    """Advantages of answers.

    Attributes:
        values: how much better than expected each answer is; 0 for one without a reward.
        rewards: weighted sums, before they are clipped; NaN for one without a reward.
        alike: whether all answers of a group have the same reward, so that they teach nothing.
    """

    values: Float32[np.ndarray, " N"]
    rewards: Float32[np.ndarray, " N"]
    alike: Bool[np.ndarray, " groups"]


def grpo_advantages(section: GrpoConfig, rewards: Float[np.ndarray, "N F"]) -> Advantages:
    """Compare each answer with the mean of its group, relative to a standard deviation."""
    rewards, weights, size = rewards.astype(np.float32), _weights(section), section.num_generations
    total = _weighted(rewards, weights)
    if section.multi_objective_aggregation == "normalize_then_sum":
        grouped = rewards.reshape(-1, size, rewards.shape[1])
        each = (grouped - _mean(grouped, 1)) / (_std(grouped, 1) + TINY)
        summed = np.nansum(each.reshape(rewards.shape) * weights, axis=1)
        summed = np.where(np.isnan(rewards).all(axis=1), np.nan, summed).astype(np.float32)
        spread = _std(summed[None], 1)
        values = (summed - _mean(summed[None], 1)[0]) / (spread[0] + TINY)
    else:
        grouped = total.reshape(-1, size)
        values = (grouped - _mean(grouped, 1)).reshape(-1)
        if section.scale_rewards == "group":
            values = (values.reshape(-1, size) / (_std(grouped, 1) + TINY)).reshape(-1)
        elif section.scale_rewards == "batch":
            values = values / (_std(total[None], 1)[0] + TINY)
    return Advantages(np.nan_to_num(values), total, _alike(total.reshape(-1, size)))


def rloo_advantages(
    section: RlooConfig, rewards: Float[np.ndarray, "N F"], kl: Float[np.ndarray, " N"] | None = None
) -> Advantages:
    """Compare each answer with the mean of the others of its group.

    Args:
        kl: log-ratios of the answers to the reference model, which count as a penalty of `beta` each.
    """
    total, size = _weighted(rewards.astype(np.float32), _weights(section)), section.num_generations
    clipped = total if section.reward_clip_range is None else np.clip(total, *section.reward_clip_range)
    penalised = clipped if kl is None else clipped - section.beta * kl.astype(np.float32)
    grouped = penalised.reshape(-1, size)
    count = np.sum(~np.isnan(grouped), axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        others = (np.nansum(grouped, axis=1, keepdims=True) - grouped) / (count - 1)
    values = (grouped - others).reshape(-1)
    if section.normalize_advantages:
        values = (values - _mean(values[None], 1)[0]) / (_std(values[None], 1)[0] + TINY)
    values = np.nan_to_num(values, posinf=0, neginf=0)
    return Advantages(values.astype(np.float32), total, _alike(grouped))


def _weights(section: GrpoConfig | RlooConfig) -> np.ndarray:
    return np.array([reward.weight for reward in section.rewards], np.float32)


def _weighted(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = np.nansum(rewards * weights, axis=1)
    return np.where(np.isnan(rewards).all(axis=1), np.nan, total).astype(np.float32)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Return means over the numbers; NaN where there are none."""
    count = np.sum(~np.isnan(values), axis=axis, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis=axis, keepdims=True) / np.where(count, count, np.nan).astype(np.float32)


def _std(values: np.ndarray, axis: int) -> np.ndarray:
    """Return standard deviations over the numbers, with Bessel's correction."""
    count = np.sum(~np.isnan(values), axis=axis, keepdims=True)
    squares = np.nansum(np.square(values - _mean(values, axis)), axis=axis, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(squares / np.where(count > 1, count - 1, np.nan)).astype(np.float32)


def _alike(grouped: np.ndarray) -> np.ndarray:
    return np.isclose(np.nan_to_num(_std(grouped, 1)), 0).reshape(-1)
