"""Two processes learn from rewards as one does, and end together where a reward fails."""

import numpy as np
import processes
import pytest
from reward_runs import logged, run, settings

from ftjax.config import Config

# Fails at the fourth update, on the first process: the only one that computes rewards.
REWARD = """
def early(completions, trainer_state, **columns):
    assert trainer_state.global_step != 4, "the fourth"
    return [sum(c in "abcdefghijklm" for c in text) / 4 for text in completions]
"""
# Lives on the first process, and replies once to an answer that ends.
ENVIRONMENT = """
class Once:
    def reset(self, answer, **columns):
        self.answer, self.said = answer, 0

    def step(self, answer):
        self.said += 1
        return self.answer * 3 if self.said == 1 else None
"""
NAMES = (
    "train/reward",
    "train/loss",
    "train/grad_norm",
    "train/entropy",
    "train/completions/mean_length",
    "train/rollout/turns",
)


@pytest.mark.parametrize("evaluated", [False, pytest.param(True, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_two_processes(model, prompts, tmp_path, evaluated, apart):
    """With `apart`, each of them has a device that trains, and one that answers its share of the dialogues."""
    (tmp_path / "early.py").write_text(REWARD)
    (tmp_path / "once.py").write_text(ENVIRONMENT)
    objective = {"rewards": [str(tmp_path / "early.py")], "num_iterations": 1, "beta": 0.1, "dynamic_sampling": True}
    objective |= {"environment": str(tmp_path / "once.py"), "max_completion_length": 40}
    mesh, devices = {"fsdp": 2}, 2
    if apart:
        objective["importance_sampling_correction"] = "token_truncate"
        mesh, devices = {**mesh, "rollout_devices": 2}, 4
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_steps": 10, "data": {"max_length": 48}}
    if evaluated:
        options["data"] |= {"validation": str(prompts / "prompts.jsonl"), "contamination": "ignore"}
        options["eval_steps"] = 3
    one, two = tmp_path / "one", tmp_path / "two"
    whole = settings(model, prompts, one, objective, **{**options, "max_steps": 3})
    run(Config.model_validate({**whole, "mesh": mesh}), devices=processes.jax.devices()[:devices])
    values = {**settings(model, prompts, two, objective, **options), "mesh": mesh}
    running, said = processes.run(2, values, two, devices=devices // 2)
    assert [process.returncode for process in running] == [2, 2], said
    assert all("reward early: AssertionError: the fourth" in text for text in said)
    assert (two / "checkpoints" / "3").is_dir()  # what was before the failure is saved
    for name in (*NAMES, *["eval/reward"] * evaluated):
        want, got = ([row[name] for row in logged(folder) if name in row] for folder in (one, two))
        assert len(got) == len(want) > 0, name
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6, err_msg=name)
