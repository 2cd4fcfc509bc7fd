"""Distillation across tokenizers beside what tests/train/test_uld_trl.py compares: splits, packing, templates, refusals."""

import json
from functools import cache

import jax
import numpy as np
import pytest
from data_tokenizers import CHATML, spaced
from merging_tokenizer import save_student, save_teacher
from oracle import ONE, Case, make_hf, one_device
from processes import ALL
from tiny_run import make_config, reported, run_steps
from tiny_tokenizer import save_tokenizer
from whole_runs import config

from ftjax.data.pipeline import load_splits
from ftjax.errors import UserError
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.objectives import encoding_of
from ftjax.train.run import train
from ftjax.train.setup import prepare
from ftjax.train.teacher import with_partners

WORDS = ["aueces in aueces", "esecauin", "yes because", "it is", "four is red", "6 + 7", "au lait", "best", "in it", "cause"]
MIXED = {"uld_use_hybrid_loss": True, "beta": 0.3, "temperature": 1.5, "crossentropy_weight": 0.5}
SPLITS = {
    "unpacked, microbatches": (False, 4, None),
    "microbatches, data x fsdp x tensor": (True, 2, {"data": 2, "fsdp": 2, "tensor": 2}),
    "fsdp x tensor x sequence": (True, 1, {"fsdp": 2, "tensor": 2, "sequence": 2}),
    "fsdp": (True, 1, {"fsdp": 8}),
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    make_hf(Case("llama", "llama"), folder)
    save_student(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    make_hf(Case("qwen3", "qwen3", {"hidden_size": 48, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 80}), folder)
    save_teacher(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": f"{word[::-1]}?\n", "completion": word} for word in WORDS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def distill(teacher, **settings):
    return {"name": "distill", "teacher_model_name_or_path": str(teacher), "lmbda": 0, "use_uld_loss": True, **settings}


def split_of(settings):
    tokenizer = load_tokenizer(settings.model)
    return with_partners(settings, load_splits(settings.data, tokenizer, seed=0, encoding=encoding_of(settings)), tokenizer)[0]


@pytest.fixture(scope="module")
def update(student, teacher, rows):
    """What two updates on the same rows report, and the weights after them."""

    @cache
    def run(split):
        packing, microbatches, mesh = SPLITS[split] if split else (True, 1, None)
        settings = make_config(
            student, mesh=mesh, optimizer={"adam_epsilon": 1e-3}, objective=distill(teacher, loss_chunk=8, **MIXED)
        )
        lines = settings.data.model_copy(update={"train": str(rows), "max_length": 64, "packing": packing})
        settings = settings.model_copy(update={"data": lines})
        with pytest.MonkeyPatch.context() as patch:
            if mesh is None:
                patch.setattr("ftjax.train.setup.make_mesh", lambda config, devices=None: one_device())
            setup = prepare(settings)
        for path, value in setup.params.items():
            moved = np.asarray(value) + 0.1 * np.random.default_rng(len(path)).normal(size=value.shape).astype(np.float32)
            setup.params[path] = jax.device_put(moved, value.sharding)
        (batch,) = split_of(settings).batches(16, seed=0, shuffle=True, epochs=1)
        metrics, params = run_steps(setup, [batch] * 2, microbatches)
        return reported(metrics), params

    return run


@pytest.mark.parametrize("split", list(SPLITS)[: None if ALL else 3], ids=lambda text: text.replace(" ", ""))
def test_any_split_is_the_same(update, split):
    """Also packed rows, in which the teacher's documents begin elsewhere than the student's."""
    (want, weights), (got, others) = update(None), update(split)
    assert want.keys() == got.keys() and want["loss 0"] > 1.01 * want["loss 1"] and want["weight 0"] > 20
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    for path, value in weights.items():
        np.testing.assert_allclose(others[path], value, atol=2e-5, err_msg=path)


def test_rows_have_room_for_both(student, teacher, rows):
    """A document takes the longer of its two tokenisations."""
    settings = make_config(student, objective=distill(teacher))
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"train": str(rows), "max_length": 48})})
    split = split_of(settings)
    own, theirs = split.lengths, split.partners.sizes(split.chosen)
    assert (own > theirs).any()
    plan = split.plan(0, True, 0)
    for row in range(len(plan)):
        inside = np.searchsorted(split.chosen, plan.documents[plan.starts[row] : plan.starts[row + 1]])
        assert np.maximum(own, theirs)[inside].sum() <= 48


# ---- templates ----


def test_each_side_has_its_own_template(tmp_path, capsys):
    """The teacher reads the conversation in its own form; answers of both turns are aligned, with their ends."""
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    make_hf(Case("llama", "llama", {"max_position_embeddings": 512}), student)
    save_tokenizer(student, chat=True)
    tokenizer = spaced(CHATML)
    make_hf(Case("llama", "llama", {"max_position_embeddings": 512, "vocab_size": len(tokenizer)}), teacher)
    tokenizer.save_pretrained(teacher)
    turns = [("user", "Hi"), ("assistant", "Hello world"), ("user", "Who?"), ("assistant", "Lily loved you.")]
    row = {"messages": [{"role": who, "content": text} for who, text in turns]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    settings = config(student, tmp_path, tmp_path / "run", objective=distill(teacher))
    data = settings.data.model_copy(update={"train": str(tmp_path / "rows.jsonl"), "validation": None, "max_length": 256})
    split = split_of(settings.model_copy(update={"data": data}))
    assert not any("counterpart" in text for text in split.report.warnings)
    other = split.partners.other.document(0)
    read = tokenizer.decode(other.tokens)
    assert "<|im_start|> user" in read or "<|im_start|>user" in read
    own, pair = split.documents.document(0), split.partners.pair(0)
    assert pair.aligned == int(own.weights.sum()), "every trained token, ends included"
    ends = np.flatnonzero(own.tokens == load_tokenizer(settings.model).eos_token_id)
    assert {tokenizer.convert_ids_to_tokens(int(pair.tokens[pair.partners[end - 1]])) for end in ends if own.weights[end]} == {
        "<|im_end|>"
    }


# ---- refusals ----


@pytest.mark.parametrize(
    "lines, message",
    [
        ([{"input_ids": [1, 5, 6, 2], "labels": [-100, 5, 6, 2]}], r"token ids \(data.format: input_ids\).*give the texts"),
        (
            [{"prompt": "a", "completion": "@@@@@@@@yes"}],
            r"cannot be aligned.* 0% .*the student trains '@@@.*another teacher",
        ),
    ],
    ids=["ids", "texts"],
)
def test_what_cannot_be_aligned_is_refused(student, teacher, tmp_path, lines, message):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = config(student, tmp_path, tmp_path / "run", objective=distill(teacher), data__validation=None)
    with pytest.raises(UserError, match=message):
        train(given, devices=ONE)


@pytest.mark.parametrize(
    "objective, data, message",
    [
        ({"teacher_logprobs": "d"}, {}, "use_uld_loss compares whole distributions"),
        ({"use_uld_loss": False, "uld_use_hybrid_loss": True}, {}, "changes nothing without use_uld_loss"),
        ({"beta": 0.5}, {}, "beta 0.5 changes nothing without uld_use_hybrid_loss"),
        ({"uld_use_hybrid_loss": True, "uld_hybrid_matched_weight": 1}, {}, "set both or neither"),
        ({}, {"truncation": "left"}, "data.truncation: left: objective.use_uld_loss aligns two texts from their beginning"),
        ({}, {"streaming": True}, "aligns two tokenisations of a whole set"),
    ],
)
def test_settings_that_do_not_fit(objective, data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(
            "m", tmp_path, tmp_path, objective=distill("t", **objective), **{f"data__{name}": it for name, it in data.items()}
        )
