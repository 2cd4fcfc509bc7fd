"""Whole runs that train from preferences: what is interrupted goes on as if it had not been, to the bit."""

import json
import shutil

import numpy as np
import pytest
from oracle import ONE
from whole_runs import config, losses, rows, same_adapter

from ftjax.evaluate.observe import make_observer
from ftjax.train.run import train

# Both need statistics of all microbatches, and have dropout, which must be the same there and in the loss.
OBJECTIVES = {
    "dpo": ({"name": "dpo", "loss_type": ["sigmoid", "aot_unpaired", "sft"]}, "rewards/margins"),
    "kto": ({"name": "kto"}, "kl"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("validation", 9)):
        words = [f"{n}{''.join(rng.choice(list('abcdef'), rng.integers(2, 12)))}" for n in range(count)]
        found = {
            "dpo": [{"prompt": word, "chosen": word[::-1], "rejected": word.upper()} for word in words],
            "kto": [{"prompt": w, "completion": w[::-1] if n % 2 else w.upper(), "label": n % 2} for n, w in enumerate(words)],
        }
        for kind, lines in found.items():
            (root / kind).mkdir(exist_ok=True)
            (root / kind / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.mark.parametrize("name", ["kto", pytest.param("dpo", marks=pytest.mark.sweep)])  # the first has a batch statistic too
def test_resumed(name, model, data, tmp_path):
    objective, metric = OBJECTIVES[name]
    whole, out = tmp_path / "whole", tmp_path / "run"
    settings = {
        "objective": objective, "training__max_steps": 6, "training__gradient_accumulation_steps": 2,
        "training__logging_steps": 1,
    }  # fmt: skip
    train(config(model, data / name, whole, **settings), make_observer=make_observer, devices=ONE)
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "6")
    shutil.rmtree(out / "final")
    train(config(model, data / name, out, **settings), make_observer=make_observer, devices=ONE)
    same_adapter(whole, out)
    assert losses(out) == losses(whole) and len(set(losses(whole).values())) > 4
    for kind in ("train", "eval"):
        found, want = ([row[f"{kind}/{metric}"] for row in rows(run) if f"{kind}/{metric}" in row] for run in (out, whole))
        assert found == want and any(want)  # a KL divergence is at least 0
