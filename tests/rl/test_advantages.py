"""Advantages are those that TRL's trainers compute from the same rewards."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from ftjax.config.rewards import GrpoConfig as Grpo
from ftjax.config.rewards import RlooConfig as Rloo
from ftjax.rl.advantages import grpo_advantages, rloo_advantages
from ftjax.rl.metrics import reward_metrics
from ftjax.rl.rewards import Reward

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
GROUPS, SIZE, FUNCTIONS = 5, 4, 2
NAMES = ("first", "second")
WEIGHTS = [1.0, -0.5]


def make_rewards() -> np.ndarray:
    """Return rewards of groups: one that is all alike, one with an answer without a reward, one with only one reward."""
    rewards = np.random.default_rng(0).normal(size=(GROUPS, SIZE, FUNCTIONS)).astype(np.float32)
    rewards[1] = 0.5
    rewards[2, 1] = np.nan
    rewards[2, 2, 0] = np.nan
    rewards[3, 1:] = np.nan
    return rewards.reshape(-1, FUNCTIONS)


REWARDS = make_rewards()


@pytest.fixture(scope="module", params=["grpo", "rloo"])
def trainer(request, model, tmp_path_factory):
    kind, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[request.param]
    args = config(
        output_dir=str(tmp_path_factory.mktemp("out")), per_device_train_batch_size=GROUPS * SIZE, num_generations=SIZE,
        bf16=False, use_cpu=True, report_to="none", gradient_checkpointing=False, beta=0.0,
    )  # fmt: skip
    made = kind(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)] * FUNCTIONS, args=args,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * GROUPS * SIZE),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )  # fmt: skip
    made.reward_func_names, made.reward_weights = list(NAMES), torch.tensor(WEIGHTS)
    return made


def theirs(trainer, **settings) -> tuple[np.ndarray, dict[str, float]]:
    """Return advantages and metrics of answers with known rewards."""
    count = GROUPS * SIZE
    answers = [[5, 6, 2]] * count
    generated = ([[1, 4]] * count, answers, ["ab"] * count)
    if isinstance(trainer, GRPOTrainer):
        generated = (*generated[:2], None, ["ab"] * count, None, {}, None, None)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setattr(trainer, name, value)
        patch.setattr(trainer, "_generate", lambda *_, **__: generated)
        patch.setattr(trainer, "_calculate_rewards", lambda *_: torch.tensor(REWARDS))
        trainer.model.train()
        found = trainer._generate_and_score_completions([{"prompt": "a"}] * count)
    metrics = {name: rows[-1] for name, rows in trainer._metrics["train"].items() if rows}
    trainer._metrics["train"].clear()
    return found["advantages"].numpy(), metrics


CASES = {
    "grpo": [
        {}, {"scale_rewards": "batch"}, {"scale_rewards": "none"}, {"multi_objective_aggregation": "normalize_then_sum"},
    ],
    "rloo": [{}, {"normalize_advantages": True}, {"reward_clip_range": (-0.5, 0.7)}],
}  # fmt: skip


def test_advantages_and_metrics(trainer):
    name = "grpo" if isinstance(trainer, GRPOTrainer) else "rloo"
    specs = [{"name": "code", "weight": weight} for weight in WEIGHTS]
    for settings in CASES[name]:
        want, metrics = theirs(trainer, **settings)
        section = (Grpo if name == "grpo" else Rloo)(rewards=specs, num_generations=SIZE, beta=0.0, **settings)
        got = (grpo_advantages if name == "grpo" else rloo_advantages)(section, REWARDS)
        np.testing.assert_allclose(got.values, want, rtol=1e-5, atol=1e-6, err_msg=str(settings))
        mine = reward_metrics([Reward(one, len) for one in NAMES], REWARDS, got)
        for key in ("reward", "reward_std", *(f"rewards/{one}/{what}" for one in NAMES for what in ("mean", "std"))):
            assert mine[key] == pytest.approx(metrics[key], rel=1e-5), (settings, key)


def test_the_kl_divergence_is_a_part_of_the_rewards_of_rloo():
    section = Rloo(rewards=["code"], num_generations=2, beta=0.5)
    rewards, kl = np.array([[1.0], [0.0]], np.float32), np.array([1.0, 3.0], np.float32)
    np.testing.assert_allclose(rloo_advantages(section, rewards, kl).values, [2.0, -2.0])  # 1 - 0.5 against 0 - 1.5
