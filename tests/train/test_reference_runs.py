"""Runs whose reference model is computed once before training, or moves; and what they warn of."""

import json
import shutil

import numpy as np
import pytest
from oracle import ONE
from whole_runs import config, losses, rows, same_adapter

from ftjax.errors import UserError
from ftjax.objectives import dpo
from ftjax.train.reference import PREFIX, MovingReference
from ftjax.train.run import train
from ftjax.train.setup import prepare
from ftjax.train.watch import ROWS, MetricWatch

LORA = {"name": "lora", "r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("validation", 12)):
        words = [f"{n}{''.join(rng.choice(list('abcdef'), rng.integers(2, 12)))}" for n in range(count)]
        lines = [json.dumps({"prompt": f"{word}=", "chosen": word[::-1], "rejected": word.upper()}) for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def pair_config(model, pairs, out, *, method=LORA, name="dpo", steps=8, **objective):
    return config(
        model, pairs, out, method=method, objective={"name": name, "loss_chunk": 16, **objective}, training__logging_steps=1,
        training__max_steps=steps,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "name"),
    [(LORA, "kto"), *(pytest.param(method, "dpo", marks=pytest.mark.sweep) for method in (LORA, {"name": "full"}))],
    ids=["kto", "lora", "full"],
)
def test_a_reference_computed_before_training_gives_the_same_run(method, name, model, pairs, tmp_path, monkeypatch):
    """The numbers are those of a reference in every update; the second start reads them from the cache."""
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    each, once = tmp_path / "each", tmp_path / "once"
    train(pair_config(model, pairs, each, method=method, name=name), devices=ONE)
    settings = pair_config(model, pairs, once, method=method, name=name, precompute_ref_log_probs=True)
    setup = prepare(settings, ONE)
    assert setup.reference is None and not any(path.startswith(PREFIX) for path in setup.frozen)
    train(settings, devices=ONE)
    np.testing.assert_allclose(list(losses(once).values()), list(losses(each).values()), rtol=2e-5)
    stored = sorted((tmp_path / "cache" / "reference").glob("*.npy"))
    assert len(stored) == 2  # of the training and of the validation data
    stored[0].write_bytes(b"broken")  # is computed again
    for step in (once / "checkpoints").iterdir():
        if int(step.name) > 3:
            shutil.rmtree(step)
    monkeypatch.setattr("ftjax.train.precompute._compute", lambda setup, split: np.load(stored[1]) * np.nan)
    with pytest.raises(ValueError):
        train(settings, devices=ONE)


def test_streamed_data_cannot_be_seen_before(model, pairs, tmp_path):
    settings = pair_config(model, pairs, tmp_path, precompute_ref_log_probs=True)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"streaming": True})})
    with pytest.raises(UserError, match=r"precompute_ref_log_probs.*data\.streaming"):
        train(settings, devices=ONE)


def test_a_reference_that_moves(model, pairs, tmp_path):
    """With a share of 1 it is the model itself after each synchronisation, so that the next margin is 0; a resumed run goes on
    with the reference that the checkpoint holds."""
    full = {"name": "full"}
    out = tmp_path / "run"
    options = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 1.0}
    settings = pair_config(model, pairs, out, method=full, **options)
    train(settings, devices=ONE)
    margins = {row["step"]: row["train/rewards/margins"] for row in rows(out) if "train/rewards/margins" in row}
    assert [step for step, margin in margins.items() if abs(margin) < 1e-5] == [1, 2, 4, 7]  # the warmup begins at 0
    whole = losses(out)
    for step in (out / "checkpoints").iterdir():
        if int(step.name) > 6:
            shutil.rmtree(step)
    shutil.rmtree(out / "final")
    train(settings, devices=ONE)
    assert losses(out) == whole


def test_a_reference_moves_by_a_share(model, pairs, tmp_path):
    """Every so many updates, and nothing else that is frozen changes."""
    setup = prepare(pair_config(model, pairs, tmp_path, method={"name": "full"}, sync_ref_model=True), ONE)
    moving = MovingReference(setup.reference, 3, 0.25)
    before = {path: np.array(leaf) for path, leaf in setup.frozen.items()}
    params = {path: leaf + 1.0 for path, leaf in setup.params.items()}
    assert all(moving.after(2, params, setup.frozen)[path] is leaf for path, leaf in setup.frozen.items())
    after = moving.after(3, params, setup.frozen)
    assert after.keys() == before.keys() and set(moving.copies(after)) == set(before)
    for path, leaf in after.items():
        want = 0.25 * np.array(params[setup.reference.copied[path]]) + 0.75 * before[path]
        np.testing.assert_allclose(leaf, want, rtol=1e-6, atol=1e-7)


def test_only_full_fine_tuning_has_a_reference_that_moves(model, pairs, tmp_path):
    with pytest.raises(ValueError, match="use method full"):
        pair_config(model, pairs, tmp_path, sync_ref_model=True)


def test_a_warning_when_chosen_answers_become_less_likely(model, pairs, tmp_path):
    section = pair_config(model, pairs, tmp_path, beta=0.1).objective
    wrong = {"rewards/chosen": -0.5, "rewards/margins": 0.4}  # 5 nats less likely
    assert "5.0 nats" in dpo.warning(section, wrong)
    assert dpo.warning(section, wrong | {"rewards/margins": -0.4}) is None
    assert dpo.warning(section, wrong | {"rewards/chosen": -0.1}) is None
    for other in ({"reference_free": True}, {"loss_type": ["sigmoid", "apo_down"]}):
        assert dpo.warning(section.model_copy(update=other), wrong) is None


def test_a_warning_is_said_once_and_only_if_it_stays():
    watch = MetricWatch()
    said = [watch.see(text) for text in ("a", "a", None, *"bcdef", None, *"ghij")]
    assert said == [None] * 5 + ["d"] + [None] * 7 and ROWS == 3
    again = MetricWatch()
    again.load(watch.state())
    assert [again.see("x") for _ in range(5)] == [None] * 5


def test_warnings_are_printed(model, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dpo, "FALL", -1e9)
    record = dpo.OBJECTIVE
    assert record.warning is dpo.warning
    train(pair_config(model, pairs, tmp_path, steps=6), devices=ONE)
    printed = capsys.readouterr().out
    assert printed.count("chosen answers become less likely") == 1
    warned = [row for row in rows(tmp_path) if "warning" in row]
    assert len(warned) <= 1


@pytest.mark.parametrize(("metric", "steps", "stopped"), [("rewards/accuracies", 60, True), ("rewards/margins", 8, False)])
def test_the_best_step_and_an_early_stop_by_a_metric_of_pairs(metric, steps, stopped, model, pairs, tmp_path):
    """All pairs are soon right, and two evaluations later the run ends; margins grow all the time."""
    best = {"metric_for_best_model": metric, "early_stopping_patience": 2, "eval_steps": 2}
    wanted = pair_config(model, pairs, tmp_path, steps=steps)
    options = wanted.training.model_validate(wanted.training.model_dump() | best)
    train(wanted.model_copy(update={"training": options}), devices=ONE)
    found = {row["step"]: row[f"eval/{metric}"] for row in rows(tmp_path) if "eval/loss" in row}
    first = min(step for step, value in found.items() if value == max(found.values()))
    assert f" {first} optimizer steps" in (tmp_path / "best" / "README.md").read_text()
    assert max(found) == (first + 4 if stopped else first) and (max(found) < steps) == stopped


def test_rewards_are_measured_from_the_start(model, pairs, tmp_path):
    train(pair_config(model, pairs, tmp_path, steps=12), devices=ONE)
    found = [row for row in rows(tmp_path) if "eval/loss" in row][-1]
    assert found["eval/rewards/accuracies"] > 0.7 and found["eval/rewards/margins"] > 0
    assert found["eval/rewards/margins"] == pytest.approx(
        found["eval/rewards/chosen"] - found["eval/rewards/rejected"], rel=1e-4
    )
    same = tmp_path / "again"
    train(pair_config(model, pairs, same, steps=12), devices=ONE)
    same_adapter(tmp_path, same)
