"""Tests the task `preference`: whether models and reward models prefer the chosen answers, against transformers."""

import json

import numpy as np
import pytest
import torch
from oracle import ONE
from peft import PeftModel
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from verbs import evaluate

from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.evaluate.likelihood import Likelihood
from ftjax.evaluate.tasks.preference import by_likelihood, implicit_rewards
from ftjax.train.run import train

PAIRS = [
    {"prompt": f"{word}:", "chosen": word[::-1], "rejected": word[:2] + "dd"}
    for word in ("abc", "bad", "cab", "fed", "ace", "beef", "cafe", "deaf")
]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


@pytest.fixture(scope="module")
def trained(tiny, pairs_file, tmp_path_factory):
    """Return `trained(objective)`: a run of a few updates on the pairs."""
    made = {}

    def make(objective, method="lora"):
        if (objective, method) not in made:
            folder = made[objective, method] = tmp_path_factory.mktemp(objective)
            train(Config.model_validate({
                "model": {"path": str(tiny), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
                "method": {"name": "lora", "r": 4} if method == "lora" else {"name": method}, "objective": {"name": objective},
                "data": {"train": str(pairs_file), "validation": str(pairs_file), "max_length": 32, "contamination": "ignore"},
                "optimizer": {"learning_rate": 1e-2},
                "training": {"max_steps": 12, "global_batch_size": 4, "report_to": [], "logging_steps": 4},
                "evaluate": {"training_examples": 1}, "output_dir": str(folder),
            }), devices=ONE)  # fmt: skip
        return made[objective, method]

    return make


def logprobs(model, tokenizer, row, name):
    """Sum of the log-probabilities of an answer and its end, and the number of its tokens, by transformers."""
    start = tokenizer(row["prompt"])["input_ids"]
    ids = [*tokenizer(row["prompt"] + row[name])["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(found[at - 1, ids[at]]) for at in range(len(start), len(ids))), len(ids) - len(start)


def test_likelihoods_are_transformers(tiny, trained, tmp_path):
    run = trained("dpo")
    found = evaluate(str(run), compare_base=True, out=tmp_path)
    assert found["task"] == "preference" and found["rows"] == len(PAIRS)
    tokenizer = make_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(tiny)
    each = {}
    for side in ("base", "tuned"):
        model = base if side == "base" else PeftModel.from_pretrained(base, run / "final")
        each[side] = np.array([[logprobs(model, tokenizer, row, name) for name in ("chosen", "rejected")] for row in PAIRS])
    for side, metrics in (("tuned", found["metrics"]), ("base", found["base"]["metrics"])):
        sums, means = each[side][..., 0], each[side][..., 0] / each[side][..., 1]
        assert metrics["pair_accuracy"].value == pytest.approx(np.mean(sums[:, 0] > sums[:, 1]))
        assert metrics["pair_accuracy_per_token"].value == pytest.approx(np.mean(means[:, 0] > means[:, 1]))
        assert metrics["margin"].value == pytest.approx(np.mean(sums[:, 0] - sums[:, 1]), rel=1e-4)
    ratios = each["tuned"][..., 0] - each["base"][..., 0]
    rewards = found["implicit_rewards"]
    assert rewards["reward_accuracy"].value == pytest.approx(np.mean(ratios[:, 0] > ratios[:, 1]))
    assert rewards["reward_margin"].value == pytest.approx(np.mean(ratios[:, 0] - ratios[:, 1]), rel=1e-3)
    assert rewards["reward_margin"].value > 0.5  # it has learned something
    row = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert set(row["scores"]) == {"pair_accuracy", "pair_accuracy_per_token", "margin"}


def test_the_rewards_are_those_of_training(trained, tmp_path):
    run = trained("dpo")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(logged) if "eval/loss" in row)
    found = evaluate(str(run), compare_base=True, out=tmp_path)["implicit_rewards"]
    assert found["reward_accuracy"].value == pytest.approx(last["eval/rewards/accuracies"])
    assert 0.1 * found["reward_margin"].value == pytest.approx(last["eval/rewards/margins"], rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_reward_model_scores_as_transformers(method, tiny, trained, tmp_path):
    run = trained("reward", method)
    found = evaluate(str(run), out=tmp_path)
    tokenizer = make_tokenizer()
    if method == "full":
        model, info = AutoModelForSequenceClassification.from_pretrained(run / "final", output_loading_info=True)
        assert not any(info.values()) and model.config.num_labels == 1
    else:
        base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
        base.config.pad_token_id = 0
        model = PeftModel.from_pretrained(base, run / "final")
    model = model.eval()

    def score(row, name):
        ids = [*tokenizer(row["prompt"] + row[name])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            return float(model(torch.tensor([ids])).logits[0, 0])

    scores = np.array([[score(row, name) for name in ("chosen", "rejected")] for row in PAIRS])
    assert found["metrics"]["pair_accuracy"].value == pytest.approx(np.mean(scores[:, 0] > scores[:, 1]))
    assert found["metrics"]["margin"].value == pytest.approx(np.mean(scores[:, 0] - scores[:, 1]), rel=1e-3)
    assert found["metrics"]["mean_reward"].value == pytest.approx(np.mean(scores), abs=1e-4)
    with pytest.raises(UserError, match="generates no answers"):
        evaluate(str(run), task="exact_match", out=tmp_path)


def test_pairs_beyond_the_context_are_counted(tiny, written, tmp_path):
    data = written("long.jsonl", *PAIRS[:2], {"prompt": "a" * 80 + ":", "chosen": "b", "rejected": "c"})
    found = evaluate(str(tiny), data=data, task="preference", out=tmp_path)
    assert found["rows_longer_than_the_context"] == 1
    assert found["metrics"]["pair_accuracy"].rows == 2


def test_rows_without_a_pair_are_refused(tiny, written, tmp_path):
    data = written("single.jsonl", {"prompt": "a:", "completion": "b"})
    with pytest.raises(UserError, match=r"single\.jsonl:1.*compares two answers"):
        evaluate(str(tiny), data=data, task="preference", out=tmp_path)


def test_rows_that_were_left_out_count_nowhere():
    one, other = Likelihood(1.0, 2.0, 0.0), Likelihood(2.0, 8.0, 0.0)
    found = by_likelihood([(one, other), None, (other, one)])
    assert found.values() == {"pair_accuracy": 0.5, "pair_accuracy_per_token": 0.5, "margin": 0.0}
    missing = np.array([[-1.0, -3.0], [np.nan, np.nan]])
    assert implicit_rewards(missing, missing * 2).values() == {"reward_accuracy": 0.0, "reward_margin": -2.0}
