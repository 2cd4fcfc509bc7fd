"""A run that learns from rewards goes on after an interruption as if it had not been, to the bit."""

import shutil

import pytest
from reward_runs import early, logged, make_config, run
from whole_runs import rows, same_adapter

from ftjax.errors import UserError

CASES = {
    # The checkpoint of update 3 is between the two updates of one batch.
    "iterations": {"num_iterations": 2, "temperature": 1.3, "importance_sampling_correction": "token_truncate"},
    "dynamic": {"dynamic_sampling": True, "max_redraws": 3, "num_iterations": 2, "beta": 0.1},
    "rloo": {"name": "rloo", "beta": 0.1, "num_generations": 4},
}


@pytest.mark.parametrize("name", ["dynamic", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("iterations", "rloo"))])
def test_resumed(name, model, prompts, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    options = {"save_steps": 3, "max_steps": 6, "gradient_accumulation_steps": 2}
    objective = {**CASES[name], "rewards": early(prompts)}
    run(make_config(model, prompts, whole, objective, **options))
    shutil.copytree(whole, out)
    for path in (out / "checkpoints" / "6", out / "final"):
        shutil.rmtree(path)
    run(make_config(model, prompts, out, objective, **options))
    same_adapter(whole, out)
    assert logged(out) == logged(whole)
    assert len({row["train/loss"] for row in rows(whole) if "train/loss" in row}) > 4
    assert all(row["train/grad_norm"] > 0 for row in rows(whole) if "train/loss" in row)
    if name == "dynamic":
        assert any(row.get("train/rollout/redrawn_groups") for row in rows(whole))


def test_columns_that_have_changed_are_refused(model, prompts, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(prompts, folder)
    out = tmp_path / "run"
    run(make_config(model, folder, out, max_steps=1))
    path = folder / "prompts.jsonl"
    path.write_text(path.read_text().replace('"answer": "a"', '"answer": "b"'))
    with pytest.raises(UserError, match="columns of the rows, which rewards may read, have changed"):
        run(make_config(model, folder, out, max_steps=1))
