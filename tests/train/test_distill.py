"""Distillation beside what tests/train/test_distill_trl.py compares: splits, teachers of several kinds, written predictions,
refusals."""

import json
import shutil
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
import torch
from oracle import ONE, Case, make_hf, one_device
from processes import ALL
from tiny_run import make_config, reported, run_steps
from tiny_tokenizer import make_tokenizer, save_tokenizer
from transformers import AutoModelForCausalLM
from whole_runs import config, losses, rows

from ftjax.config import Config
from ftjax.data.batch import Batch
from ftjax.data.pipeline import load_splits
from ftjax.data.predictions import facts_of
from ftjax.errors import UserError
from ftjax.hub.tokenizer.same import refuse_other_tokenizer
from ftjax.objectives import encoding_of
from ftjax.objectives.distill import divergence, likely
from ftjax.train.run import train
from ftjax.train.setup import Setup, prepare
from ftjax.train.teach import teach, with_predictions

LORA, FULL = {"name": "lora", "r": 4, "lora_alpha": 8}, {"name": "full"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Of another family and other sizes."""
    folder = tmp_path_factory.mktemp("teacher")
    make_hf(
        Case("qwen3", "qwen3", {"hidden_size": 48, "num_hidden_layers": 3, "head_dim": 8, "initializer_range": 0.2}), folder
    )
    save_tokenizer(folder)
    return folder


def distill(teacher, **settings):
    return {"name": "distill", "teacher_model_name_or_path": str(teacher), "lmbda": 0, **settings}


# ---- splits ----

MIXED = {"beta": 0.3, "temperature": 1.5, "crossentropy_weight": 0.5}
# Packing, microbatches, mesh; a chunk of the loss is 8 tokens a device, and a row has 64.
SPLITS = {
    "unpacked, microbatches": (False, 4, None),
    "microbatches, data x fsdp x tensor": (True, 2, {"data": 2, "fsdp": 2, "tensor": 2}),
    "fsdp": (False, 1, {"fsdp": 8}),
    "fsdp x tensor x sequence": (True, 4, {"fsdp": 2, "tensor": 2, "sequence": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def update(model, data, teacher):
    """What two updates on the same rows report, and the weights after them, by method and split."""

    @cache
    def run(method, split):
        packing, microbatches, mesh = SPLITS[split] if split else (True, 1, None)
        settings = make_config(
            model, method=FULL if method == "full" else LORA, mesh=mesh, optimizer={"adam_epsilon": 1e-3},
            objective=distill(teacher, loss_chunk=8, **MIXED),
        )  # fmt: skip
        lines = settings.data.model_copy(update={"train": str(data / "validation.jsonl"), "max_length": 64, "packing": packing})
        settings = settings.model_copy(update={"data": lines})
        with pytest.MonkeyPatch.context() as patch:
            if mesh is None:
                patch.setattr("ftjax.train.setup.make_mesh", lambda config, devices=None: one_device())
            setup = prepare(settings)
        for path, value in setup.params.items():
            moved = np.asarray(value) + 0.1 * np.random.default_rng(len(path)).normal(size=value.shape).astype(np.float32)
            setup.params[path] = jax.device_put(moved, value.sharding)
        documents, _ = load_splits(settings.data, make_tokenizer(), seed=0, encoding=encoding_of(settings))
        (batch,) = documents.batches(16, seed=0, shuffle=True, epochs=1)
        metrics, params = run_steps(setup, [batch] * 2, microbatches)
        return reported(metrics), params

    return run


LINES = [("lora", split) for split in (SPLITS if ALL else list(SPLITS)[1:2])] + [
    ("full", split) for split in list(SPLITS) * ALL
]


@pytest.mark.parametrize("method, split", LINES, ids=lambda text: text.replace(" ", ""))
def test_any_split_is_the_same(update, method, split):
    (want, weights), (got, others) = update(method, None), update(method, split)
    assert want.keys() == got.keys() and want["loss 0"] > 1.01 * want["loss 1"]
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    for path, value in weights.items():
        np.testing.assert_allclose(others[path], value, atol=2e-5, err_msg=path)


# ---- teachers ----


def first_loss(settings: Config) -> float:
    setup = prepare(settings, ONE)
    documents, _ = load_splits(settings.data, make_tokenizer(), seed=0, encoding=encoding_of(settings))
    return mean_loss(setup, next(documents.batches(4, seed=0, shuffle=True, epochs=1)))


def mean_loss(setup: Setup, batch: Batch) -> float:
    @jax.jit
    def totals(params, frozen, batch):
        return setup.loss_fn(params, frozen, batch, setup.runtime.context(batch))[0]

    found = totals(setup.params, setup.frozen, batch)
    return float(found.loss / found.weight)


def test_a_teacher_with_more_rows_of_padding(model, data, tmp_path):
    """The student itself, with a vocabulary that is padded further: they agree on what both have."""
    wide = AutoModelForCausalLM.from_pretrained(model)
    wide.resize_token_embeddings(112, mean_resizing=False)
    with torch.no_grad():
        wide.lm_head.weight[96:] = 3.0
    wide.save_pretrained(tmp_path / "wide")
    save_tokenizer(tmp_path / "wide")
    for beta in (0.0, 1.0):
        found = first_loss(config(model, data, tmp_path, method=LORA, objective=distill(tmp_path / "wide", beta=beta)))
        assert abs(found) < 1e-6


@pytest.fixture(scope="module")
def taught(model, data, teacher, tmp_path_factory):
    """A run with a teacher, of four updates."""
    out = tmp_path_factory.mktemp("taught")
    train(run_config(model, data, out, distill(teacher, beta=0.5, temperature=2.0)), devices=ONE)
    return out


def run_config(model, data, out, objective, **over):
    training = {"max_steps": 4, "global_batch_size": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "report_to": []}
    return config(model, data, out, **{"method": LORA, "objective": objective, "training": training, **over})


def test_it_learns(taught):
    found = losses(taught)
    assert found[4] < found[1]
    for row in rows(taught):
        assert row.get("train/divergence") == pytest.approx(row.get("train/loss"))
    evaluated = [row for row in rows(taught) if "eval/loss" in row]
    assert evaluated[-1]["eval/loss"] < evaluated[0]["eval/loss"]
    assert evaluated[-1]["eval/perplexity"] == pytest.approx(np.exp(evaluated[-1]["eval/cross_entropy"]))


def test_its_card_names_the_teacher_without_its_place(taught, teacher):
    card = (taught / "final" / "README.md").read_text()
    assert f"teacher_model_name_or_path: {teacher.name}\n" in card and str(teacher.parent) not in card


def test_it_is_resumed(taught, model, data, teacher, tmp_path):
    shutil.copytree(taught, tmp_path / "run")
    for path in ("checkpoints/4", "final"):
        shutil.rmtree(tmp_path / "run" / path)
    train(run_config(model, data, tmp_path / "run", distill(teacher, beta=0.5, temperature=2.0)), devices=ONE)
    assert losses(tmp_path / "run") == losses(taught)
    names = [folder / "final" / "adapter_model.safetensors" for folder in (taught, tmp_path / "run")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_run_with_an_adapter_teaches_itself_nothing(taught, model, data, tmp_path):
    """The student starts from the adapter that the teacher has."""
    method = {"name": "lora", "adapter_path": str(taught / "final")}
    assert abs(first_loss(config(model, data, tmp_path, method=method, objective=distill(taught)))) < 1e-6
    assert first_loss(config(model, data, tmp_path, method=LORA, objective=distill(taught))) > 1e-4


def test_a_teacher_is_counted_and_frozen(model, data, teacher, tmp_path):
    """Its arrays are among the frozen ones that `ftjax plan` adds up, and its forward pass is in the FLOPs."""
    setup = prepare(config(model, data, tmp_path, method=FULL, objective=distill(teacher)), ONE)
    alone = prepare(config(model, data, tmp_path, method=FULL), ONE)
    own = {path for path in setup.frozen if path.startswith("teacher.")}
    assert set(setup.abstract_params()[1]) == set(setup.frozen) and not own & setup.params.keys()
    assert set(setup.frozen) - own == set(alone.frozen) and len(own) == len(setup.teacher.model.specs)
    more = setup.train_flops.per_token(1) - alone.train_flops.per_token(1)
    matrices = sum(leaf.size for path, leaf in setup.frozen.items() if path in own and "norm" not in path) - 96 * 48
    assert more == pytest.approx(2 * matrices + 4 * 3 * 4 * 8)  # three layers of four heads of eight
    assert "of the teacher" in setup.train_flops.formula(32) and "qwen3" in setup.teacher.line()


# ---- predictions on disk ----


def taught_by_file(teacher, folder, **settings):
    return {**distill(teacher, beta=0.5, temperature=2.0), "teacher_logprobs": str(folder), **settings}


@pytest.fixture(scope="module")
def written(model, data, teacher, tmp_path_factory):
    """Predictions of the whole vocabulary."""
    folder = tmp_path_factory.mktemp("written")
    teach(run_config(model, data, folder, taught_by_file(teacher, folder / "all", loss_top_k=96)), ONE)
    return folder / "all"


def test_predictions_of_all_tokens_are_the_teacher(taught, written, model, data, teacher, tmp_path):
    """Losses of training and evaluation, without the teacher."""
    settings = taught_by_file(tmp_path / "gone", written, loss_top_k=96)
    train(run_config(model, data, tmp_path / "run", settings), devices=ONE)
    for name in ("train/loss", "eval/loss", "eval/cross_entropy"):
        want, got = ([row[name] for row in rows(folder) if name in row] for folder in (taught, tmp_path / "run"))
        np.testing.assert_allclose(got, want, rtol=1e-5)
        assert len(want) > 1


def test_the_file(written, model, data):
    """What any library for Arrow finds in it."""
    table = pa.ipc.open_file(written / "validation.arrow").read_all()
    facts = facts_of(written / "validation.arrow")
    assert facts["top_k"] == facts["vocabulary"] == 96 and facts["temperature"] == 2.0 and facts["teacher"]
    texts = [json.loads(line)["completion"] for line in (data / "validation.jsonl").read_text().splitlines()]
    tokenizer, found = make_tokenizer(), {}
    for row in table.to_pylist():
        found.setdefault(row["document"], []).append((row["position"], row["token"]))
        assert sorted(row["ids"]) == list(range(96)) and row["logprobs"] == sorted(row["logprobs"], reverse=True)
        assert sum(np.exp(row["logprobs"])) == pytest.approx(1, abs=1e-5) and row["rest"] < -1e20
    answers = [tokenizer.decode([token for _, token in sorted(found[number])][:-1]) for number in sorted(found)]
    assert answers == texts


def test_the_likeliest_tokens_and_the_rest(written, model, data, teacher, tmp_path):
    """Fewer tokens than were written: the others are one outcome. The loss is then a lower bound."""
    losses = [
        first_loss_of_file(run_config(model, data, tmp_path, taught_by_file(teacher, written, loss_top_k=k)))
        for k in (5, 30, 96)
    ]
    assert 0 < losses[0] < losses[1] < losses[2]


def first_loss_of_file(settings: Config) -> float:
    setup = prepare(settings, ONE)
    splits = load_splits(settings.data, make_tokenizer(), seed=settings.training.seed, encoding=encoding_of(settings))
    return mean_loss(setup, next(with_predictions(settings, splits)[0].batches(4, seed=0, shuffle=True, epochs=1)))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_one_outcome_for_the_rest(beta):
    """Beside the same sums in float64; also for a teacher that is certain, whose rest has no probability."""
    rng = np.random.default_rng(0)
    logits, k = rng.normal(size=(2, 3, 12)), 4
    logits[0, 0, 1] += 60
    student, teacher = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (rng.normal(size=(3, 12)), logits[0]))
    ids = np.argsort(-teacher, axis=-1)[:, :k]

    def coarse(x):
        picked = np.exp(np.take_along_axis(x, ids, axis=-1))
        others = np.array([np.exp(np.delete(row, own)).sum() for row, own in zip(x, ids, strict=True)])
        return np.concatenate([picked, others[:, None]], axis=-1)

    p, q = coarse(teacher), coarse(student)
    m = beta * p + (1 - beta) * q
    kl = lambda a, b: (a * (np.log(np.maximum(a, 1e-300)) - np.log(b))).sum(-1)  # noqa: E731
    want = kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m)
    wanted = jnp.asarray(np.log(p), jnp.float32)

    def loss(logits):
        return divergence(likely(logits, jnp.asarray(ids)), wanted, beta)

    logits = jnp.asarray(student, jnp.float32)
    np.testing.assert_allclose(loss(logits), want, rtol=2e-5)
    assert np.isfinite(jax.grad(lambda x: loss(x).sum())(logits)).all()


def test_the_same_predictions_are_kept(written, model, data, teacher, capsys):
    before = (written / "train.arrow").stat().st_mtime_ns
    teach(run_config(model, data, written, taught_by_file(teacher, written, loss_top_k=96)), ONE)
    assert (written / "train.arrow").stat().st_mtime_ns == before and "there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, data_settings, message",
    [
        ({"teacher_logprobs": "{folder}/none"}, {}, "there are no predictions of a teacher for data.train; run `ftjax teach`"),
        ({"temperature": 1.0}, {}, "was written at 2.0"),
        ({}, {"max_length": 12}, "for other documents than those of data.train"),
        ({"loss_top_k": 200}, {}, "has 96"),
    ],
)
def test_other_predictions_are_refused(settings, data_settings, message, written, model, data, teacher, tmp_path):
    settings = {name: value.format(folder=tmp_path) if isinstance(value, str) else value for name, value in settings.items()}
    given = run_config(model, data, tmp_path / "run", taught_by_file(teacher, written, **{"loss_top_k": 96, **settings}))
    given = given.model_copy(update={"data": given.data.model_copy(update=data_settings)})
    with pytest.raises(UserError, match=message):
        train(given, devices=ONE)


# ---- refusals ----


def test_another_tokenizer_is_refused(model, data, teacher, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"a":', '"\u00e9":'))
    with pytest.raises(UserError, match=r"another tokenizer than .*: 1 only in .*: 'a'; 1 only in .*other: '\u00e9'"):
        train(run_config(model, data, tmp_path / "run", distill(other)), devices=ONE)


def test_special_tokens_and_merges_differ():
    own, ends, pieces = make_tokenizer(), make_tokenizer(), make_tokenizer()
    refuse_other_tokenizer(own, make_tokenizer(), "A", "B")
    ends.eos_token = "<pad>"
    with pytest.raises(UserError, match=r"eos_token is '</s>' \(2\) in A and '<pad>' \(0\) in B.*model.tokenizer: B"):
        refuse_other_tokenizer(own, ends, "A", "B")
    pieces.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(UserError, match="the same tokens divide a text differently"):
        refuse_other_tokenizer(own, pieces, "A", "B")


@pytest.mark.parametrize(
    "objective, message",
    [
        ({}, "distill needs a teacher"),
        ({"teacher_model_name_or_path": "t", "beta": 1.5}, "less than or equal to 1"),
        ({"teacher_logprobs": "d", "lmbda": 0.5}, "need the teacher itself"),
        ({"teacher_model_name_or_path": "t", "lmbda": 0, "max_completion_length": 9}, "changes nothing without lmbda above 0"),
        ({"teacher_model_name_or_path": "t", "lmbda": 1, "crossentropy_weight": 1}, "changes nothing without lmbda below 1"),
        ({"teacher_model_name_or_path": "t", "loss_top_k": 9}, "changes nothing without teacher_logprobs"),
        ({"teacher_model_name_or_path": "t", "distillation_weight": 0}, "does not use the teacher"),
        ({"teacher_model_name_or_path": "t", "lmbda": 1}, "data.max_length 64 must hold prompt and answer"),
    ],
)
def test_settings_that_do_not_fit(objective, message, model, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(model, data, tmp_path, objective={"name": "distill", **objective})


def test_streams_have_no_share_for_the_student(model, data, tmp_path):
    with pytest.raises(ValueError, match="lmbda above 0 draws documents of the whole set"):
        config(model, data, tmp_path, objective={**distill("t"), "lmbda": 0.5}, data__streaming=True)


def test_a_missing_teacher(model, data, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        train(run_config(model, data, tmp_path / "run", distill(tmp_path / "nowhere")), devices=ONE)
