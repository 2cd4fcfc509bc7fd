"""A tiny model learns a task from rewards alone, and what is logged and reported of it."""

import json

import pytest
from reward_runs import make_config, run
from whole_runs import rows

from ftjax.report.command import report


@pytest.fixture(scope="module")
def learned(model, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("learned") / "run"
    objective = {"num_generations": 16, "max_completion_length": 1, "entropy_coef": 0.05}
    data = {"validation": str(prompts / "prompts.jsonl"), "contamination": "ignore"}
    options = {"max_steps": 45, "global_batch_size": 128, "logging_steps": 5, "eval_steps": 15}
    run(make_config(model, prompts, out, objective, data=data, method={"name": "full"}, **options))
    return out


def test_reward_from_chance_to_nearly_all(learned):
    found = rows(learned)
    rewards = [row["train/reward"] for row in found if "train/reward" in row]
    held = [row["eval/reward"] for row in found if "eval/reward" in row]
    assert rewards[0] < 0.1 and rewards[-1] > 0.9
    assert len(held) == 3 and held[-1] >= 0.875
    assert json.loads((learned / "run.json").read_text())["finished"] == 45
    assert (learned / "best").is_dir()


def test_what_is_logged(learned):
    row = next(row for row in rows(learned) if row.get("train/reward") is not None)
    for name in (
        "reward", "reward_std", "frac_reward_zero_std", "rewards/echo/mean", "rewards/echo/std", "completions/mean_length",
        "completions/clipped_ratio", "time/rollout", "time/reward", "time/update", "rollout/logprob_gap", "entropy",
    ):  # fmt: skip
        assert f"train/{name}" in row
    assert row["train/rollout/logprob_gap"] < 1e-6
    texts = next(row["train/completions"] for row in rows(learned) if "train/completions" in row)
    assert len(texts) == 4 and {"prompt", "text", "reward", "advantage"} <= texts[0].keys()


def test_the_report_shows_rewards_and_answers(learned, tmp_path):
    page = report(learned, out=tmp_path / "report.html").read_text()
    assert "Answers and their rewards" in page
    assert "seconds of an update: rewards" in page and "advantage" in page
