"""Tests a custom objective in one file with one line to register it: pairs of answers, compared with the model before training.

It trains the difference of the log-probabilities of `chosen` and `rejected`, which is not a sum over tokens, and uses
everything that an objective can ask for: units of two documents, a reference model, metrics.
"""

import json
import math
import shutil
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_tokenizers import byte_level
from oracle import ONE
from processes import ALL
from whole_runs import config, losses, rows, same_adapter

from ftjax.config import Config, Section
from ftjax.config.data import DataConfig
from ftjax.data.encode import Encoder
from ftjax.data.encoding import RowEncoding
from ftjax.data.pipeline import load_splits
from ftjax.objectives import OBJECTIVES, encoding_of, objective_of, register
from ftjax.objectives.logprobs import segment_sums
from ftjax.objectives.loss import LossTotals
from ftjax.objectives.objective import LossInputs, Objective
from ftjax.train.reference import PREFIX
from ftjax.train.run import train
from ftjax.train.setup import prepare

# ---- the objective ----


class ToyPairsConfig(Section):
    """Settings of the objective, which prefers one answer to another."""

    name: Literal["toy_pairs"] = "toy_pairs"
    beta: float = 0.5
    loss_chunk: int = 16


class PairEncoder(Encoder):
    def plan(self, example):
        answers = example.completion, example.rejected.completion
        return [plan for answer in answers for plan in super(PairEncoder, self).plan(replace(example, completion=answer))]


class Pairs(RowEncoding):
    sequences = 2

    def encoder(self, tokenizer, config):
        return PairEncoder(tokenizer)


def loss(inputs: LossInputs) -> tuple[LossTotals, jax.Array]:
    segments = inputs.batch["segment_ids"]
    most = segments.shape[1] // 2  # a document has two tokens at least

    def answers(forward):
        """Return log-probabilities of the answers `[B, pairs]`, chosen and rejected."""
        sums = segment_sums(forward.token_logprobs().logprobs, segments, 2 * (most // 2))
        return sums[:, ::2], sums[:, 1::2]

    chosen, rejected = (a - b for a, b in zip(answers(inputs), answers(inputs.reference), strict=True))
    there = segment_sums((segments > 0).astype(jnp.float32), segments, 2 * (most // 2))[:, ::2] > 0
    margin, count = jnp.where(there, chosen - rejected, 0), jnp.sum(there, dtype=jnp.float32)
    each = jnp.where(there, -jax.nn.log_sigmoid(inputs.config.objective.beta * margin), 0)
    metrics = {"margin": (jnp.sum(margin), count), "accuracy": (jnp.sum((margin > 0) & there, dtype=jnp.float32), count)}
    return LossTotals(jnp.sum(each), count, metrics), inputs.auxiliary


TOY = Objective(ToyPairsConfig, lambda section: Pairs(), loss, reference=lambda section: True)


@pytest.fixture(scope="module", autouse=True)
def registered():
    register(TOY)
    yield
    del OBJECTIVES["toy_pairs"]


# ---- its tests ----


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for name, count in (("train", 90), ("validation", 12)):
        words = [f"{n}{''.join(rng.choice(list('abcdef'), rng.integers(2, 12)))}" for n in range(count)]
        lines = [json.dumps({"prompt": f"{word}=", "chosen": word[::-1], "rejected": word.upper()}) for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def toy(model, pairs, out, **over) -> Config:
    lora = {"name": "lora", "r": 4, "lora_alpha": 8}
    best = {"training__metric_for_best_model": "eval/accuracy", "training__greater_is_better": True}
    own = {"method": lora, "objective": {"name": "toy_pairs"}, "training__logging_steps": 1}
    return config(model, pairs, out, **(own | best | over))


def first_row(folder):
    return next(row for row in rows(folder) if row["step"] == 1 and "train/loss" in row)


@pytest.fixture(scope="module")
def whole(model, pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train(toy(model, pairs, out, training__max_steps=20), devices=ONE)
    return out


def test_it_trains(whole, capsys):
    found = losses(whole)
    assert found[1] == pytest.approx(math.log(2), abs=1e-6) and found[20] < 0.5 * found[1]
    assert first_row(whole)["train/margin"] == pytest.approx(0, abs=1e-5)
    evaluated = [row for row in rows(whole) if "eval/loss" in row]
    assert evaluated[-1]["eval/accuracy"] > 0.9 and evaluated[-1]["eval/margin"] > 1
    assert not {"eval/perplexity", "eval/token_accuracy"} & evaluated[-1].keys()
    assert (whole / "best" / "adapter_model.safetensors").is_file()


def test_it_is_resumed(whole, model, pairs, tmp_path):
    """The reference is made anew of the base model, not of what the checkpoint holds."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for step in (out / "checkpoints").iterdir():
        if int(step.name) > 15:
            shutil.rmtree(step)
    shutil.rmtree(out / "final")
    train(toy(model, pairs, out, training__max_steps=20), devices=ONE)
    same_adapter(whole, out)
    assert losses(out) == losses(whole)


LORA = {"name": "lora", "r": 4, "lora_alpha": 8}
# What a reference is without: copies of what trains, weights that the method changes at the start, modules that it adds.
STARTS = [LORA | {"modules_to_save": ["embed_tokens"], "init_lora_weights": "pissa"}]
MORE_STARTS = [
    LORA | {"modules_to_save": ["embed_tokens"]}, LORA | {"init_lora_weights": "pissa"},
    {"name": "full"},
    LORA | {"use_dora": True}, LORA | {"target_modules": ["embed_tokens", "q_proj"]}, {"name": "ia3"},
    {"name": "double_seq_bn"},
]  # fmt: skip


@pytest.mark.parametrize("method", STARTS + MORE_STARTS * ALL, ids=lambda method: "-".join(map(str, method.values()))[:30])
def test_the_reference_is_the_start(method, model, pairs, tmp_path):
    """The first loss is that of a model that prefers nothing; later ones are measured from there.

    A bottleneck starts with small values, and the reference is without it.
    """
    nothing = 5e-3 if method["name"] == "double_seq_bn" else 2e-5
    settings = toy(model, pairs, tmp_path, method=method, training__max_steps=4, training__eval_steps=None)
    train(settings, devices=ONE)
    found = losses(tmp_path)
    assert found[1] == pytest.approx(math.log(2), abs=nothing) and found[4] < found[1]


def test_the_reference_of_an_adapter_that_is_trained_further(whole, model, pairs, tmp_path):
    """It is the model with that adapter."""
    further = {"name": "lora", "adapter_path": str(whole / "final")}
    train(toy(model, pairs, tmp_path, method=further, training__max_steps=2, training__eval_steps=None), devices=ONE)
    assert losses(tmp_path)[1] == pytest.approx(math.log(2), abs=1e-6)


def test_an_adapter_shares_the_frozen_arrays(model, pairs, tmp_path):
    """Nothing is copied for LoRA; for what trains besides, that alone."""
    lora = {"name": "lora", "r": 4, "lora_alpha": 8}
    for method, copied in ((lora, 0), (lora | {"modules_to_save": ["lm_head"]}, 1)):
        setup = prepare(toy(model, pairs, tmp_path, method=method), ONE)
        own = {path for path in setup.frozen if path.startswith(PREFIX)}
        assert len(own) == copied and setup.frozen.keys() - own == setup.model.frozen.keys()
        assert set(setup.abstract_params()[1]) == set(setup.frozen)
        reference = setup.reference.params(setup.frozen)
        assert all(any(leaf is held for held in setup.frozen.values()) for leaf in reference.values())


def test_its_pass_is_counted(model, pairs, tmp_path):
    """Forward only: 2 FLOPs a weight beside the 4 of a frozen weight that gradients go through."""
    sft = prepare(toy(model, pairs, tmp_path, objective={"name": "sft"}), ONE).train_flops
    toys = prepare(toy(model, pairs, tmp_path), ONE).train_flops
    assert toys.per_token(32) > 1.3 * sft.per_token(32)
    base = sft.matrices - sft.trained
    assert toys.per_token(1) - sft.per_token(1) == pytest.approx(2 * base + sum(sft.attention.values()) * 4)
    assert "reference" in toys.formula(32) and "reference" not in sft.formula(32)


def test_rows_that_are_not_packed(whole, model, pairs, tmp_path):
    """A row is a pair; the first loss over all rows is the same."""
    out = tmp_path / "run"
    train(toy(model, pairs, out, data__packing=False, training__max_steps=2), devices=ONE)
    assert losses(out)[1] == pytest.approx(math.log(2), abs=1e-6)


def test_a_mesh_gives_the_numbers_of_one_device(whole, model, pairs, tmp_path):
    train(toy(model, pairs, tmp_path, mesh={"data": 2, "fsdp": 2, "tensor": 2}, training__max_steps=20))
    one, other = losses(whole), losses(tmp_path)
    np.testing.assert_allclose([other[step] for step in (1, 2, 3)], [one[step] for step in (1, 2, 3)], atol=1e-5)


def test_unknown_to_configurations_that_do_not_register_it(model, pairs, tmp_path):
    assert objective_of(toy(model, pairs, tmp_path)) is TOY and isinstance(encoding_of(toy(model, pairs, tmp_path)), Pairs)
    with pytest.raises(ValueError, match="toy_pears"):
        toy(model, pairs, tmp_path, objective={"name": "toy_pears"})


# ---- pairs in rows ----


@pytest.mark.parametrize("options", [{}, {"packing": False}, {"shuffle": False}, {"mix_epochs": True}, {"streaming": True}])
def test_pairs_stay_together(pairs, options, tmp_path):
    """In any epoch each row has whole pairs, chosen first, and each pair occurs once."""
    data = DataConfig(train=str(pairs / "train.jsonl"), max_length=96, **options)
    split, _ = load_splits(data, byte_level(), seed=0, encoding=Pairs())
    seen = []
    for batch in split.batches(4, seed=0, shuffle=True, epochs=1):
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            count = segments.max()
            assert count % 2 == 0
            texts = [tuple(tokens[segments == n].tolist()) for n in range(1, count + 1)]
            seen += list(zip(texts[::2], texts[1::2], strict=True))
    assert len(seen) == 90 == len(set(seen))
