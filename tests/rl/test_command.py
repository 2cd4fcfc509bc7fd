"""`ftjax preview`, `train` and `plan` with the demo's configuration of rewards, on a tiny model."""

from pathlib import Path

import pytest
from oracle import Case, make_hf
from reward_runs import make_config
from tiny_tokenizer import save_tokenizer
from verbs import ftjax
from whole_runs import rows

from ftjax.config.code import refuse_unasked
from ftjax.config.load import load_config
from ftjax.errors import UserError
from ftjax.rl.environment import load_environments

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    make_hf(Case("llama", "llama", {"initializer_range": 0.05, "max_position_embeddings": 512}), folder)
    save_tokenizer(folder, chat=True)
    return folder


def overrides(chat: Path, out: Path) -> list[str]:
    return [
        f"model.path={chat}", f"output_dir={out}", "data.limit=6", "objective.num_generations=2",
        "training.global_batch_size=4",
        "objective.max_completion_length=4", "training.max_steps=2", "training.eval_steps=2", "evaluate.training_rows=2",
        "evaluate.training_max_new_tokens=4", "evaluate.training_examples=0", "method.r=2", "mesh.fsdp=1", "mesh.data=8",
        "data.packing=false", "training.report_to=[]", "training.metric_for_best_model=eval/reward", "data.validation=null",
        "data.validation_split=2",
    ]  # fmt: skip


@pytest.mark.sweep
def test_the_demo_by_rewards(chat, tmp_path, capsys, monkeypatch):
    """The whole configuration is read, on eight devices that share the rows; the columns of messages are the references."""
    monkeypatch.chdir(ROOT)
    given = ["configs/demo/grpo.yaml", *overrides(chat, tmp_path / "run")]
    assert ftjax("preview", *given, "--examples", "1") == 0
    shown = capsys.readouterr().out
    assert "example 1, prompt: ftjax/demo/data/train.jsonl:" in shown and "tokens of prompts" in shown
    assert ftjax("train", *given) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "an update: 2 prompts with 2 answers each, of up to 4 tokens; rewards: json_fields x 1, json_match x 1" in said
    found = rows(tmp_path / "run")
    assert {"eval/reward", "eval/rewards/json_fields/mean", "eval/json_match"} <= {name for row in found for name in row}
    assert (tmp_path / "run" / "best").is_dir() and (tmp_path / "run" / "final").is_dir()


def test_a_plan_has_a_row_for_each_answer(chat, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/demo/grpo.yaml", overrides(chat, tmp_path / "run"))
    from ftjax.plan.plan import design_for
    from ftjax.plan.topology import parse

    made = design_for(config, parse("cpu:8"))
    assert made.abstract_batch()["tokens"].shape == (1, 8, 512)  # four answers, on eight devices
    assert made.abstract_batch()["labels"].shape == (1, 8, 512 * 3)


def test_code_that_only_a_run_names_is_not_run(model, prompts, tmp_path):
    """A run's own config.yaml may be somebody else's."""
    from ftjax.config.load import save_config

    (tmp_path / "final").mkdir()
    save_config(make_config(model, prompts, tmp_path), tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"objective.rewards: \[.*echo.py:echo\] is Python code that would run here"):
        refuse_unasked(load_config(tmp_path / "config.yaml"), "objective.rewards")
    named = [f"objective.rewards=[{prompts / 'echo.py'}:echo]"]
    refuse_unasked(load_config(tmp_path / "config.yaml", named), "objective.rewards")
    save_config(make_config(model, prompts, tmp_path, {"environment": "own.py"}), tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"objective.environment: own.py is Python code that would run here"):
        load_environments(load_config(tmp_path / "config.yaml"))
    with pytest.raises(UserError, match=r"own.py: no such file"):
        load_environments(load_config(tmp_path / "config.yaml", ["objective.environment=own.py"]))
