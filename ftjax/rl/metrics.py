"""Metrics of generated answers and their rewards, under TRL's names, and examples to look at.

Legend: N answers in groups of G to one prompt, F reward functions. NaN: a function had nothing to say.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32

from ftjax.generate.answer import Generation
from ftjax.rl.advantages import Advantages
from ftjax.rl.environment import Environments
from ftjax.rl.rewards import Reward
from ftjax.rl.rollout import Rollout

LONGEST = 2000  # characters of a logged prompt or answer


def answer_metrics(answers: Sequence[Rollout | Generation]) -> dict[str, float]:
    """Return lengths in tokens, and how many answers reached the limit."""
    lengths = np.array([one.size if isinstance(one, Rollout) else len(one.tokens) for one in answers], np.float64)
    cut = np.array([one.truncated for one in answers])
    ended = lengths[~cut] if not cut.all() else np.zeros(1)
    found = {"completions/clipped_ratio": float(cut.mean())}
    for kind, values in (("", lengths), ("terminated_", ended)):
        for name, value in (("mean", values.mean()), ("min", values.min()), ("max", values.max())):
            found[f"completions/{name}_{kind}length"] = float(value)
    return found


def dialogue_metrics(environments: Environments, turns: Sequence[int]) -> dict[str, float]:
    """Return the turns and tool calls of a dialogue, and the share of calls that failed, under TRL's names."""
    found = {"rollout/turns": float(np.mean(turns))}
    if environments.tools:
        found["tools/call_frequency"] = environments.calls / len(turns)
        found["tools/failure_frequency"] = environments.failures / max(1, environments.calls)
    return found


def reward_metrics(rewards: Sequence[Reward], values: Float32[np.ndarray, "N F"], advantages: Advantages) -> dict[str, float]:
    """Return mean and spread of each reward and of their sum; a mean of nothing is left out."""
    found = {}
    for number, reward in enumerate(rewards):
        found |= _spread(values[:, number], f"rewards/{reward.name}/mean", f"rewards/{reward.name}/std")
    found |= _spread(advantages.rewards, "reward", "reward_std")
    return found | {"frac_reward_zero_std": float(advantages.alike.mean())}


def _spread(values: np.ndarray, mean: str, std: str) -> dict[str, float]:
    there = values[~np.isnan(values)].astype(np.float64)
    found = {mean: float(there.mean())} if len(there) else {}
    return found | ({std: float(there.std(ddof=1))} if len(there) > 1 else {})


def weighted_means(found: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Return the mean of each metric over `(weight, metrics)` pairs; those that lack it do not count."""
    means = {}
    for name in dict.fromkeys(name for _, metrics in found for name in metrics):
        weights, values = zip(*((weight, metrics[name]) for weight, metrics in found if name in metrics), strict=True)
        means[name] = float(np.average(values, weights=weights))
    return means


def totals(metrics: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return metrics of one batch as sums with the weight 1: they are averaged over batches, as TRL averages them."""
    return {name: (value, 1.0) for name, value in metrics.items()}


def examples(
    rewards: Sequence[Reward], rollouts: Sequence[Rollout], values: Float32[np.ndarray, "N F"], advantages: Advantages,
    count: int, extra: Sequence[Mapping[str, object]],
) -> list[dict[str, str]]:  # fmt: skip
    """Return some answers with their rewards: those to the first prompts, as far as `count` goes.

    Args:
        extra: what reward functions have logged of each answer, by name.
    """
    found = []
    for number, one in list(enumerate(rollouts))[:count]:
        row = {"prompt": one.shown_prompt[:LONGEST], "text": one.shown[:LONGEST], "reward": f"{advantages.rewards[number]:.4g}"}
        row |= {reward.name: f"{values[number, at]:.4g}" for at, reward in enumerate(rewards)} if len(rewards) > 1 else {}
        row |= {name: str(value)[:LONGEST] for name, value in extra[number].items()}
        found.append({**row, "advantage": f"{advantages.values[number]:.4g}"})
    return found
