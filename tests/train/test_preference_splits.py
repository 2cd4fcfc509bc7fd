"""Objectives that train from preferences: however the rows of an update are packed and split, it is the same update.

Several of these losses need something of all rows of the update: how many tokens they have, how far the model has moved on
answers to other prompts, or the order of all pairs.
"""

import dataclasses
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Case, make_hf, one_device
from processes import ALL
from tiny_run import make_config, reported, run_steps
from tiny_tokenizer import make_tokenizer, save_tokenizer

from ftjax.data.pipeline import load_splits
from ftjax.objectives import OBJECTIVES, dpo, encoding_of
from ftjax.objectives.preference import answer_logprobs
from ftjax.train.setup import prepare

SEED = 17  # moves the model so that KTO's estimate of its KL divergence is well above 0
LORA, FULL = {"name": "lora", "r": 4, "lora_alpha": 8}, {"name": "full"}
PREFERENCES = {
    "dpo": ({"name": "dpo"}, LORA),
    "dpo-sft": ({"name": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}, FULL),
    "aot": ({"name": "dpo", "loss_type": "aot", "beta": 0.3}, LORA),
    "aot_unpaired": ({"name": "dpo", "loss_type": "aot_unpaired", "beta": 0.3}, FULL),
    "cpo": ({"name": "cpo"}, LORA),
    "orpo": ({"name": "orpo"}, FULL),
    "kto": ({"name": "kto", "undesirable_weight": 1.5}, LORA),
    "reward": ({"name": "reward", "center_rewards_coefficient": 0.1}, LORA),
}  # fmt: skip
SEQUENCE = {"fsdp": 2, "tensor": 2, "sequence": 2}  # with a kernel: heads and tokens change places
# Packing, microbatches, mesh.
SPLITS = {
    "unpacked, microbatches": (False, 4, None),
    "microbatches, data x fsdp x tensor": (True, 2, {"data": 2, "fsdp": 2, "tensor": 2}),
    "microbatches, fsdp x tensor x sequence": (True, 4, SEQUENCE),
    "packed, microbatches": (True, 8, None),
    "unpacked": (False, 1, None),
    "unpacked, fsdp": (False, 2, {"fsdp": 8}),
    "sequence": (True, 1, SEQUENCE),
}  # fmt: skip
MESH_OF = {name: list(SPLITS)[1 + number % 2] for number, name in enumerate(PREFERENCES)}  # one of the two meshes for each
QUICK = ("dpo-sft", "kto")  # means over tokens, over the whole batch; test_matrix.py sorts over all pairs
LINES = [(name, split) for name in PREFERENCES for split in SPLITS if ALL or (name in QUICK and split == MESH_OF[name])]
LINES += [] if ALL else [("kto", "unpacked, microbatches")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and rows of very unlike lengths."""
    folder = tmp_path_factory.mktemp("model")
    make_hf(Case("llama", "llama", {"max_position_embeddings": 128, "intermediate_size": 64}), folder)
    save_tokenizer(folder)
    rng = np.random.default_rng(0)
    words = [["".join(rng.choice(list("abcdef"), rng.integers(1, 14))) for _ in range(3)] for _ in range(13)]
    pairs = [{"prompt": a, "chosen": b, "rejected": f"{c}{n}", "margin": n / 9} for n, (a, b, c) in enumerate(words)]
    singles = [{"prompt": f"{a}{n}", "completion": b, "label": n % 3 < 2} for n, (a, b, _) in enumerate(words)]
    for name, rows in (("pairs", pairs), ("singles", singles)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def updates(folder):
    """The results of `run` by objective and split."""
    return cache(lambda name, split: run(folder, *PREFERENCES[name], *(SPLITS[split] if split else (True, 1, None))))


def prepared(folder, objective: dict, method: dict, packing: bool, mesh: dict | None):
    """A model that has moved away from its reference, and one batch of all rows."""
    config = make_config(folder, method=method, mesh=mesh, optimizer={"adam_epsilon": 1e-3}, objective=objective)
    data = {"train": str(folder / ("singles.jsonl" if objective["name"] == "kto" else "pairs.jsonl")), "max_length": 64}
    more = {"attention": "blockwise"} if mesh is SEQUENCE else {}
    config = config.model_copy(update={
        "data": config.data.model_copy(update={**data, "packing": packing}), "model": config.model.model_copy(update=more),
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if mesh is None:
            patch.setattr("ftjax.train.setup.make_mesh", lambda config, devices=None: one_device())
        setup = prepare(config)
    for path, value in setup.params.items():
        moved = np.asarray(value) + 0.1 * np.random.default_rng(SEED + len(path)).normal(size=value.shape).astype(np.float32)
        setup.params[path] = jax.device_put(moved, value.sharding)
    split, _ = load_splits(config.data, make_tokenizer(), seed=0, encoding=encoding_of(config))
    (batch,) = split.batches(16, seed=0, shuffle=True, epochs=1)
    rows = (batch["segment_ids"].max(axis=1) > 0).sum()
    assert rows < 16 and (rows == 13) == (not packing), "rows of padding complete the batch"
    return setup, batch


def run(folder, objective: dict, method: dict, packing: bool, microbatches: int, mesh: dict | None):
    """What two updates on the same rows report, and the weights after them."""
    setup, batch = prepared(folder, objective, method, packing, mesh)
    metrics, params = run_steps(setup, [batch] * 2, microbatches)
    return reported(metrics), params


@pytest.mark.parametrize("name, split", LINES, ids=lambda text: text.replace(" ", ""))
def test_any_split_is_the_same(updates, name, split):
    """Losses, gradients and metrics within 1e-5 relative, as in supervised training."""
    (want, weights), (got, others) = updates(name, None), updates(name, split)
    assert want.keys() == got.keys() and want["loss 0"] != want["loss 1"]
    assert want.get("kl 0", 1) > 0.01, "cut off at 0, so no KL divergence was compared"
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    for path, value in weights.items():
        np.testing.assert_allclose(others[path], value, atol=2e-5, err_msg=path)


def test_statistics_see_what_the_loss_sees(folder, monkeypatch):
    """Dropout leaves out the same in both passes over a microbatch."""

    def watched(inputs):
        totals, auxiliary = dpo.loss(inputs)
        before, now = inputs.statistics["logps"].chosen, answer_logprobs(inputs).chosen
        found = {"apart": jnp.abs(before[inputs.number] - now), "unlike": jnp.abs(before[0] - before[1])}
        return totals._replace(metrics={name: (value.max(), jnp.float32(1)) for name, value in found.items()}), auxiliary

    monkeypatch.setitem(OBJECTIVES, "dpo", dataclasses.replace(dpo.OBJECTIVE, loss=watched))
    method = {**LORA, "lora_dropout": 0.3}
    setup, batch = prepared(folder, {"name": "dpo", "loss_type": "aot"}, method, True, None)
    twice = {name: np.concatenate([values[:4]] * 2) for name, values in batch.items()}
    (metrics,), _ = run_steps(setup, [twice], 2)
    assert metrics.metrics["apart"][0] < 1e-3
    assert metrics.metrics["unlike"][0] > 0.1, "no dropout, so nothing was compared"
