"""Tests evaluation during training: answers to prompts, the metric of a task, best checkpoint and early stopping."""

import json
import math

import jax.numpy as jnp
import pytest
from oracle import ONE
from verbs import evaluate

from ftjax.config import Config, TrainingConfig
from ftjax.errors import UserError
from ftjax.evaluate.observe import make_observer
from ftjax.generate.session import Generator
from ftjax.train.run import train
from ftjax.train.setup import prepare
from ftjax.train.watch import BestMetric, OverfitWatch


def make_config(tiny, rows_file, out, **over) -> Config:
    values = {
        "model": {"path": str(tiny), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
        "method": {"name": "lora", "r": 8, "lora_alpha": 16},
        "data": {"train": str(rows_file), "validation": str(rows_file), "max_length": 32, "contamination": "ignore"},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"max_steps": 40, "global_batch_size": 4, "eval_steps": 10, "logging_steps": 5},
        "evaluate": {"task": "exact_match", "max_new_tokens": 5, "training_max_new_tokens": 6},
        "output_dir": str(out),
    }  # fmt: skip
    for section, more in over.items():
        values[section] = {**values[section], **more}
    return Config.model_validate(values)


def go(config):
    train(config, devices=ONE, make_observer=make_observer)


def lines(folder, key):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


@pytest.fixture(scope="module")
def watched(tiny, rows_file, tmp_path_factory):
    """Return the folder of a run that is evaluated while it trains, and that its task's metric stops."""
    folder = tmp_path_factory.mktemp("watched")
    training = {
        "metric_for_best_model": "exact_match", "early_stopping_patience": 1, "early_stopping_threshold": 0.01, "max_steps": 300
    }  # fmt: skip
    more = {"training_rows": 6, "training_prompts": ["abc:"]}
    go(make_config(tiny, rows_file, folder, training=training, evaluate=more))
    return folder


def test_answers_are_those_of_the_model_at_that_step(watched, tiny):
    """The last answers are those of the saved result, in metrics.jsonl and in TensorBoard."""
    found = lines(watched, "eval/generations")
    assert list(found) == list(lines(watched, "eval/loss"))
    last = found[max(found)]
    assert [row.get("reference") for row in last] == [None, "yes", "yes"] and last[0]["prompt"] == "abc:"
    tuned = Generator(str(tiny), watched / "final", dtype="float32")
    prompts = [tuned.encode("abc:"), tuned.encode("abc:"), tuned.encode("bad:")]
    assert last[1]["prompt"] == "<s>abc:"
    assert last[0]["text"] == tuned.generate(prompts[:1], max_new_tokens=6)[0].text == last[1]["text"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched / "tensorboard"))
    events.Reload()
    board = events.Tensors("eval/generations/1/text_summary")
    assert [event.step for event in board] == list(found) and "abc:" in str(board[-1].tensor_proto.string_val[0])


def test_the_tasks_metric_chooses_and_stops(watched):
    """best/ has the highest exact_match, the run ends one evaluation later, and the metric is that of `ftjax evaluate`."""
    metric = lines(watched, "eval/exact_match")
    best = min(step for step, value in metric.items() if value == max(metric.values()))
    assert metric[best] > metric[10] and max(metric) == best + 10 < 300
    assert f"{best} optimizer steps" in (watched / "best" / "README.md").read_text()
    found = evaluate(str(watched / "best"), limit=6, out=watched / "here")
    assert found["metrics"]["exact_match"].value == metric[best]


def test_prompts_without_validation_data(tiny, rows_file, tmp_path):
    over = {
        "data": {"validation": None},
        "training": {"max_steps": 4, "eval_steps": 2},
        "evaluate": {"training_prompts": ["a"]},
    }
    go(make_config(tiny, rows_file, tmp_path, **over))
    assert list(lines(tmp_path, "eval/generations")) == [2, 4] and not (tmp_path / "best").exists()


def test_a_run_that_is_watched_goes_on(tiny, rows_file, tmp_path, capsys):
    """The metric is NaN there, which is never the best, and no answer is shown."""
    config = make_config(tiny, rows_file, tmp_path, evaluate={"training_rows": 2, "training_prompts": ["abc"]})
    prepared = prepare(config, ONE)
    observer = make_observer(prepared, Generator(str(tiny), dtype="float32").tokenizer, None)
    params = {**prepared.frozen, **prepared.params}
    seen = observer(params)
    assert len(seen.texts) == 1 and not math.isnan(seen.metrics["eval/exact_match"])
    bad = {path: jnp.full_like(value, jnp.nan) if path in prepared.params else value for path, value in params.items()}
    seen = observer(bad)
    assert not seen.texts and math.isnan(seen.metrics["eval/exact_match"])
    assert "no metrics for the answers: prompt 1: the model gives NaN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"task": "code", "training_rows": 2}, "not run while training"),
        ({"task": "numeric_answer", "training_rows": 2}, "holds no number"),
        ({"training_prompts": ["a" * 100]}, "prompt 1 has 101 tokens"),
    ],
)
def test_refused(tiny, rows_file, tmp_path, over, says):
    with pytest.raises(UserError, match=says):
        go(make_config(tiny, rows_file, tmp_path, training={"max_steps": 2, "eval_steps": 1}, evaluate=over))


def test_a_metric_that_does_not_suit_the_references(tiny, tmp_path, capsys):
    """Training refuses it, or warns of it once, as `ftjax evaluate` does."""
    over = {"training": {"max_steps": 2, "eval_steps": 1}, "data": {"validation": None}}
    words = ("cat", "dog", "sun", "sea", "fox", "owl", "ant", "bee", "elk", "cow")
    free = tmp_path / "free.jsonl"
    free.write_text("".join(json.dumps({"prompt": "a", "completion": f"The {word}."}) + "\n" for word in words))
    evaluated = {"data": str(free), "training_rows": 20}
    with pytest.raises(UserError, match="texts, not classes: 10 of 10 rows have an answer that no other row has"):
        go(make_config(tiny, free, tmp_path / "a", evaluate={**evaluated, "task": "classification"}, **over))
    go(make_config(tiny, free, tmp_path / "b", evaluate={**evaluated, "task": "bleu"}, **over))
    assert capsys.readouterr().err.count("warning: evaluate.task bleu: it counts runs of 4 words") == 1


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"early_stopping_patience": 1, "eval_steps": None}, "none before the end; set eval_steps"),
        ({"early_stopping_patience": 1}, "nothing to evaluate; set data.validation"),
    ],
)
def test_early_stopping_that_could_never_stop(tiny, rows_file, tmp_path, training, says):
    with pytest.raises(UserError, match=says):
        go(make_config(tiny, rows_file, tmp_path, data={"validation": None}, training=training))


def test_a_metric_that_nothing_measures(tiny, rows_file, tmp_path):
    """The base's own default, `eval/loss`, is no mistake where prompts are answered; another name is."""
    over = {"data": {"validation": None}, "evaluate": {"training_prompts": ["a"]}}
    training = {"max_steps": 2, "eval_steps": 1, "metric_for_best_model": "rouge1"}
    with pytest.raises(UserError, match="'eval/rouge1' is not measured"):
        go(make_config(tiny, rows_file, tmp_path / "a", training=training, **over))
    training |= {"metric_for_best_model": "train/loss", "logging_steps": 1}
    go(make_config(tiny, rows_file, tmp_path / "b", training=training, **over))
    assert (tmp_path / "b" / "best" / "adapter_config.json").is_file()


# ---- the watchers ----


def test_best_up_and_down():
    up = BestMetric("x", True, patience=2, threshold=0.1)
    assert [up.see(n, {"x": x}) for n, x in enumerate([math.nan, 0.5, 0.55, 0.7, 0.75, 0.6])] == [
        False, True, False, True, False, False
    ]  # fmt: skip
    assert up.exhausted and (up.value, up.step) == (0.7, 3)
    down = BestMetric("x", False, patience=None, threshold=0.0)
    assert [down.see(n, {"x": x}) for n, x in enumerate([2, 1, 1, 0])] == [True, True, False, True] and not down.exhausted
    with pytest.raises(UserError, match="'y' is not measured; there are x"):
        BestMetric("y", False, None, 0).see(1, {"x": 1})


@pytest.mark.parametrize(
    ("name", "given", "metric", "greatest"),
    [
        ("eval/loss", None, "eval/loss", False), ("eval_loss", None, "eval/loss", False), ("loss", None, "eval/loss", False),
        ("eval/task_perplexity", None, "eval/task_perplexity", False), ("rougeL", None, "eval/rougeL", True),
        ("eval/token_accuracy", False, "eval/token_accuracy", False), ("train/loss", None, "train/loss", False),
        ("rewards/accuracies", None, "eval/rewards/accuracies", True), ("logps/rejected", None, "eval/logps/rejected", False),
        ("eval_rewards/margins", None, "eval/rewards/margins", True), ("eval/loss/sigmoid", None, "eval/loss/sigmoid", False),
        ("train/rewards/chosen", None, "train/rewards/chosen", True), ("kl", None, "eval/kl", False),
    ],
)  # fmt: skip
def test_which_way_is_better(name, given, metric, greatest):
    options = TrainingConfig(metric_for_best_model=name, greater_is_better=given)
    assert (options.metric_for_best_model, options.best_is_greatest) == (metric, greatest)


@pytest.mark.parametrize(
    ("train_losses", "eval_losses", "warned"),
    [
        ([3, 2, 1, 0.5], [2, 1, 1.5, 2], [3]),  # rises twice while the training loss keeps falling
        ([3, 2, 1, 0.5, 0.2], [2, 1, 1.5, 2, 3], [3]),  # reported once
        ([3, 2, 1, 1, 0.9, 0.8], [2, 1, 1.5, 2, 0.5, 0.6], [3]),
        ([5, 4, 3, 2, 1, 0.9, 0.8], [2, 1, 1.5, 2, 0.5, 0.6, 0.7], [3, 6]),  # a new best, and then again
        ([3, 2, 1, 0.5], [2, 1, 1.5, 1.4], []),  # one rise is noise
        ([3, 2, 3, 4], [2, 1, 1.5, 2], []),  # both rise, so it is not overfitting
    ],
)
def test_overfitting(train_losses, eval_losses, warned):
    watch, found = OverfitWatch(), []
    for step, (a, b) in enumerate(zip(train_losses, eval_losses, strict=True)):
        state = json.loads(json.dumps(watch.state()))  # as in a checkpoint
        watch = OverfitWatch()
        watch.load(state)
        if said := watch.see(step, a, b):
            found.append(step)
            assert "at step 1" in said or "at step 4" in said
    assert found == warned


def test_a_run_that_overfits_says_so(tiny, tmp_path, capsys):
    for name, letters in (("train", "abcd"), ("validation", "wxyz")):
        rows = [{"prompt": f"{a}{b}:", "completion": f"{b}{a}"} for a in letters for b in letters]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl")}
    config = make_config(
        tiny, tmp_path / "train.jsonl", tmp_path / "run", data=data, evaluate={"training_examples": 0},
        training={"max_steps": 40, "eval_steps": 5},
    )  # fmt: skip
    go(config)
    (said,) = lines(tmp_path / "run", "warning").values()
    assert "overfitting" in said and f"warning: {said}" in capsys.readouterr().out
