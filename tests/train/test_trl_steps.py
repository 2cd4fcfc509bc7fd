"""Ten updates of every preference loss follow TRL's trainers: the same batches, AdamW, schedule and clipping, loss by loss."""

import dataclasses
from itertools import islice
from typing import get_args

import numpy as np
import pytest
from tiny_run import run_steps
from trl_oracle import FULL, LORA, PAIRS, Ours, Theirs, make_model

from ftjax.config.preference import SMOOTHED, DpoLoss
from ftjax.data import unpaired

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

BATCH, STEPS = 4, 10
OPTIMIZER = {
    "learning_rate": 3e-3, "lr_scheduler_type": "linear", "warmup_steps": 3, "weight_decay": 0.1, "adam_beta2": 0.98,
    "max_grad_norm": 0.5,
}  # fmt: skip
PAIRED = [{**row, "prompt": f"{mark}{row['prompt']}"} for mark in "pq" for row in PAIRS]
LABELLED = [
    {"prompt": f"{index}{row['prompt']}", "completion": row[kind], "label": kind == "chosen"}
    for index, row in enumerate(PAIRED)
    for kind in [("chosen", "rejected")[index % 3 == 1]]
]
# Each loss: the objective, TRL's trainer, and settings that differ between the two.
LOSSES = {
    **{
        name: ({"name": "dpo", "loss_type": [name], **({"label_smoothing": 0.2} if name in SMOOTHED else {})}, "dpo", {})
        for name in get_args(DpoLoss)
        if name != "sft"
    },
    "sigmoid+sft": ({"name": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, "dpo", {}),
    **{f"cpo-{name}": ({"name": "cpo", "loss_type": name}, "cpo", {}) for name in ("sigmoid", "hinge", "ipo", "simpo")},
    "cpo-alphapo": ({"name": "cpo", "loss_type": "alphapo", "alpha": 0.2, "beta": 2.0}, "cpo", {}),
    "simpo": ({"name": "simpo", "beta": 2.0}, "cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "orpo": ({"name": "orpo"}, "orpo", {}),
    "kto": ({"name": "kto", "desirable_weight": 0.8}, "kto", {}),
    "apo_zero_unpaired": ({"name": "kto", "loss_type": "apo_zero_unpaired"}, "kto", {}),
    "reward": ({"name": "reward", "center_rewards_coefficient": 0.05}, "reward", {}),
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 6.0},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
}  # fmt: skip
QUICK = [("sigmoid", "llama", "lora")]  # the losses and gradients of the others are compared one batch at a time
CASES = [
    pytest.param(loss, family, method, marks=() if (loss, family, method) in QUICK else pytest.mark.sweep)
    for loss in LOSSES
    for family in FAMILIES
    for method in ("lora", "full")
]


@pytest.mark.parametrize(("loss", "family", "method"), CASES)
def test_ten_steps(loss, family, method, tmp_path, monkeypatch):
    """Losses within 1e-4."""
    objective, kind, differences = LOSSES[loss]
    rows = LABELLED if objective["name"] == "kto" else PAIRED
    if objective["name"] == "kto":  # TRL exchanges the answers of a batch for the KL divergence, ftjax those of 256 rows
        monkeypatch.setattr(unpaired, "GROUP", BATCH)
    folder = make_model(tmp_path / "model", family, **FAMILIES[family])
    ours = Ours(folder, rows, objective, LORA if method == "lora" else FULL, packing=False, shuffle=False)
    settings = {name: value for name, value in objective.items() if name != "name"}
    theirs = Theirs(
        folder, rows, ours, tmp_path / "out", kind, max_steps=STEPS, per_device_train_batch_size=BATCH, save_strategy="no",
        train_sampling_strategy="sequential", **OPTIMIZER, **settings, **differences,
    )  # fmt: skip
    want, compute = [], theirs.trainer.compute_loss

    def noted(*inputs, **more):
        loss = compute(*inputs, **more)
        want.append(loss.item())
        return loss

    theirs.trainer.compute_loss = noted
    theirs.trainer.train()
    setup = dataclasses.replace(ours.setup, config=ours.setup.config.model_copy(update={
        "optimizer": type(ours.setup.config.optimizer).model_validate(OPTIMIZER)
    }))  # fmt: skip
    batches = islice(ours.split.batches(BATCH, seed=0, shuffle=False, epochs=None), STEPS)
    metrics, _ = run_steps(setup, list(batches), steps=STEPS)
    np.testing.assert_allclose([float(out.loss) for out in metrics], want, rtol=1e-4, atol=1e-4)
    assert min(want[-3:]) < max(want[:3]) - 0.01, "nothing was learned, so nothing was compared"
