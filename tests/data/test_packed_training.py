"""Packed and unpacked rows of a set of conversations train the same (trap 2)."""

from itertools import islice

import jax
import numpy as np
import pytest
import real
from data_tokenizers import byte_level
from oracle import ONE
from processes import ALL
from tiny_run import make_config

from ftjax.config.data import DataConfig
from ftjax.data.pipeline import load_splits
from ftjax.train.setup import prepare

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def summed(setup, split, rows):
    """Return loss, weight and gradients, summed over all batches of an epoch."""

    def total(params, frozen, batch):
        sums, _ = setup.loss_fn(params, frozen, batch, setup.runtime.context(batch))
        return sums.loss, sums.weight

    step = jax.jit(jax.value_and_grad(total, has_aux=True))
    loss, weight, grads = 0.0, 0.0, None
    with jax.set_mesh(setup.mesh):
        for batch in split.batches(rows, seed=0, shuffle=True, epochs=1):
            (one, count), grad = step(setup.params, setup.frozen, batch)
            grad = {name: np.asarray(leaf, np.float64) for name, leaf in grad.items()}
            loss, weight = loss + float(one), weight + float(count)
            grads = grad if grads is None else {name: grads[name] + grad[name] for name in grad}
    return loss, weight, grads


@pytest.fixture(params=["made", *real.SETS * ALL], ids=lambda value: "made" if value == "made" else "real")
def sets(request, made_sets):
    """The sets that the suite makes; those that are real in the sweep."""
    return made_sets if request.param == "made" else request.param


@pytest.fixture
def model(sets, untrained):
    return real.LLAMAS[0] if sets in real.SETS and real.LLAMAS else untrained


@pytest.fixture
def talks(sets, tmp_path):
    """The first conversations of a set."""
    path = tmp_path / "talks.jsonl"
    with (sets / "chat_messages" / "train.jsonl").open() as file:
        path.write_text("".join(islice(file, 30)))
    return path


@pytest.mark.parametrize("truncation", ["split", pytest.param("right", marks=pytest.mark.sweep)])
def test_packed_is_unpacked(model, talks, truncation):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    setup = prepare(make_config(model, method={"name": "full"}), ONE)
    results = []
    for packing in (True, False):
        config = DataConfig(train=str(talks), max_length=256, truncation=truncation, packing=packing)
        split, _ = load_splits(config, tokenizer, seed=0)
        results.append((split, summed(setup, split, 4)))
    (packed, (loss, weight, grads)), (plain, (other_loss, other_weight, other_grads)) = results
    assert packed.rows_per_epoch(0) < plain.rows_per_epoch(0) == packed.report.documents > 20
    assert weight == other_weight == packed.report.trained_tokens
    assert loss == pytest.approx(other_loss, rel=1e-5)
    for name, grad in grads.items():
        assert np.linalg.norm(grad - other_grads[name]) <= 1e-5 * np.linalg.norm(grad) + 1e-7 * weight, name


def test_byte_level_rows_are_shifted_within_documents_only(talks):
    """What the loss sees of a set: each document's own tokens, in order, once."""
    tokenizer = byte_level(TEMPLATE.replace("{{ bos_token }}", ""))
    split, _ = load_splits(DataConfig(train=str(talks), max_length=512, truncation="split"), tokenizer, seed=0)
    total = 0.0
    for batch in split.batches(4, seed=0, shuffle=True, epochs=1):
        inner = (batch["segment_ids"][:, :-1] == batch["segment_ids"][:, 1:]) & (batch["segment_ids"][:, :-1] > 0)
        assert (batch["targets"][:, :-1][inner] == batch["tokens"][:, 1:][inner]).all()
        assert not batch["weights"][:, :-1][~inner].any() and not batch["weights"][:, -1].any()
        total += batch["weights"].sum()
    assert total == split.report.trained_tokens
