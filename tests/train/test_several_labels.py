"""Tests heads for several labels per row and for numbers: transformers' losses, gradients, folders and predictions."""

import json

import jax
import numpy as np
import pytest
import torch
from oracle import ONE, Case, make_hf
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_run import run_steps
from tiny_tokenizer import save_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from verbs import evaluate

from ftjax.config import Config
from ftjax.data.classes import with_labels
from ftjax.data.pipeline import load_splits
from ftjax.errors import UserError
from ftjax.evaluate.observe import make_observer
from ftjax.generate.session import Generator
from ftjax.hub.export import export
from ftjax.hub.model_folder import from_params, model_tensors
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.objectives import encoding_of
from ftjax.train.run import train
from ftjax.train.setup import prepare

WORDS = ["abc", "bad", "cabbage", "dab", "fed", "ace", "x", "beef", "cafe", "deaf xyz", "face", "bead"]
MULTI, REGRESSION = "multi_label_classification", "regression"
NAMES = ["has a", "has b", "has c"]
TRUTH = {
    "multi": np.array([[float(letter in word) for letter in "abc"] for word in WORDS]),
    "number": np.array([[len(word) / 4 - 1] for word in WORDS]),
    "numbers": np.array([[len(word) / 4 - 1, float(word.count("a"))] for word in WORDS]),
}
KINDS = {"multi": MULTI, "number": REGRESSION, "numbers": REGRESSION}
LABELS = {"multi": NAMES, "number": ["LABEL_0"], "numbers": ["LABEL_0", "LABEL_1"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write a data file of each kind."""
    folder, found = tmp_path_factory.mktemp("data"), {}
    for kind, truth in TRUTH.items():
        rows = truth.tolist()
        if kind == "multi":
            rows = [[name for name, value in zip(NAMES, row, strict=True) if value] for row in rows]
        if kind == "number":
            rows = [row[0] for row in rows]
        found[kind] = written(folder / f"{kind}.jsonl", rows)
    return found


def written(path, labels):
    path.write_text("".join(json.dumps({"text": w, "label": one}) + "\n" for w, one in zip(WORDS, labels, strict=True)))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    make_hf(Case("llama", "llama", {"tie_word_embeddings": True}), path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def heads(base, tmp_path_factory):
    """Write classifiers of each kind with transformers."""
    found = {}
    for kind, labels in LABELS.items():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            base, id2label=dict(enumerate(labels)), pad_token_id=0, problem_type=KINDS[kind]
        )
        torch.nn.init.normal_(model.score.weight)
        found[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(found[kind])
        save_tokenizer(found[kind])
    return found


def make_config(model, rows, out, kind, *, method="full", **over) -> Config:
    values = {
        "model": {"path": str(model), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
        "method": {"name": method, **({"r": 4, "lora_alpha": 8} if method == "lora" else {})},
        "data": {"train": str(rows), "validation": str(rows), "max_length": 32, "contamination": "ignore"},
        "objective": {"name": "classification", "problem_type": KINDS[kind]},
        "optimizer": {"learning_rate": 1e-2, "adam_epsilon": 1e-3, "lr_scheduler_type": "constant"},
        "training": {"max_steps": 40, "global_batch_size": 4, "report_to": [], "logging_steps": 10},
        "mesh": {"fsdp": 1, "data": 1}, "output_dir": str(out),
    }  # fmt: skip
    for section, more in over.items():
        values[section] = {**values.get(section, {}), **more}
    return Config.model_validate(values)


def packed(config: Config, rows: int) -> dict[str, np.ndarray]:
    """Return all texts in one batch with this many rows, several texts in a row."""
    split, _ = load_splits(config.data, load_tokenizer(config.model), seed=0, encoding=encoding_of(config))
    (batch,) = split.batches(rows, seed=0, shuffle=False, epochs=1)
    assert (batch["segment_ids"].max(1) > 1).any() and batch["weights"].sum() == len(WORDS)
    return batch


def hf_batch(folder) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    return dict(tokenizer(WORDS, return_tensors="pt", padding=True, return_token_type_ids=False))


def hf_scores(model, folder) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(**hf_batch(folder)).logits.numpy()


def predictions(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


# ---- the loss of transformers ----


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind, heads, data, tmp_path):
    """Of every weight, on the same texts, packed here and padded there."""
    config = with_labels(make_config(heads[kind], data[kind], tmp_path, kind))
    made = prepare(config, ONE)
    batch = packed(config, 4)

    @jax.jit
    def mean(params):
        sums, _ = made.loss_fn(params, made.frozen, batch, made.runtime.context(batch))
        return sums.loss / sums.weight

    loss, gradients = jax.value_and_grad(mean)(made.params)
    model = AutoModelForSequenceClassification.from_pretrained(heads[kind])
    out = model(**hf_batch(heads[kind]), labels=torch.tensor(TRUTH[kind], dtype=torch.float32))
    out.loss.backward()
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
    named = {t.name: t.data() for t in model_tensors(made.model, from_params(gradients), gradients, config.method, np.float32)}
    want = dict(model.named_parameters())
    assert named.keys() == want.keys() and "score.weight" in named
    for name, value in named.items():
        np.testing.assert_allclose(value, want[name].grad.numpy(), rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.sweep  # test_matrix.py has several labels on a mesh
@pytest.mark.parametrize("kind", ["multi", "numbers"])
def test_any_split(kind, heads, data, tmp_path):
    """Microbatches and meshes give the loss and the gradient of one device; a row of padding is among the rows."""
    want = None
    for mesh, microbatches, packing in (
        (None, 1, True), (None, 4, True), ({"data": 2, "fsdp": 4}, 1, True), ({"fsdp": 2, "sequence": 2, "tensor": 2}, 2, True),
        (None, 2, False),
    ):  # fmt: skip
        over = {"data": {"packing": packing}, "training": {"global_batch_size": 8}, **({"mesh": mesh} if mesh else {})}
        config = with_labels(make_config(heads[kind], data[kind], tmp_path, kind, **over))
        batch = packed(config, 8) if packing else unpacked(config)
        made = prepare(config, None if mesh else ONE)
        if packing:  # what a plan counts is what comes
            assert {name: one.shape[1:] for name, one in made.abstract_batch().items()} == {
                name: rows.shape for name, rows in batch.items()
            }
        (metrics,), _ = run_steps(made, [batch], microbatches)
        got = [float(value) for value in (metrics.loss, metrics.weight, metrics.grad_norm)]
        want = want or got
        np.testing.assert_allclose(got, want, rtol=2e-5, err_msg=str((mesh, microbatches, packing)))


def unpacked(config: Config) -> dict[str, np.ndarray]:
    split, _ = load_splits(config.data, load_tokenizer(config.model), seed=0, encoding=encoding_of(config))
    (batch,) = split.batches(16, seed=0, shuffle=False, epochs=1)
    return batch


# ---- runs: files, metrics and messages ----


@pytest.mark.parametrize("kind", ["multi", "numbers", pytest.param("number", marks=pytest.mark.sweep)])
def test_full(kind, base, data, tmp_path, capsys):
    """final/ is transformers' classifier of this kind, has learned, and evaluates there as here; the run measured it too."""
    metric = "micro_f1" if kind == "multi" else "mae"
    config = make_config(
        base, data[kind], tmp_path / "run", kind, evaluate={"training_rows": 12},
        training={"eval_steps": 10, "metric_for_best_model": metric, "early_stopping_patience": 3},
    )  # fmt: skip
    train(config, make_observer=make_observer, devices=ONE)
    said, final = capsys.readouterr().out, tmp_path / "run" / "final"
    saved = json.loads((final / "config.json").read_text())
    assert saved["problem_type"] == KINDS[kind]
    model, info = AutoModelForSequenceClassification.from_pretrained(final, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert list(model.config.id2label.values()) == LABELS[kind]
    wanted = hf_scores(model, final)
    results = evaluate(str(tmp_path / "run"), out=tmp_path / "here")
    values = {name: one.value for name, one in results["metrics"].items()}
    rows = predictions(tmp_path / "here")
    if kind == "multi":
        shares = [list(row["scores"]["probabilities"].values()) for row in rows]
        np.testing.assert_allclose(shares, 1 / (1 + np.exp(-wanted)), atol=1e-4)
        assert results["task"] == "classification" and values["micro_f1"] > 0.9 and values["subset_accuracy"] > 0.7
        assert json.loads(rows[0]["prediction"]) == NAMES and json.loads(rows[0]["references"][0]) == NAMES
        assert "its labels: has a, has b, has c" in said
    else:
        np.testing.assert_allclose([json.loads(row["prediction"]) for row in rows], wanted, atol=1e-4)
        assert results["task"] == "regression" and values["mae"] < 0.3 and values["pearson"] > 0.9
        assert values["mse"] == pytest.approx(np.square(wanted - TRUTH[kind]).mean(), abs=1e-5)
    loss = evaluate(str(final), task="loss", data=str(data[kind]), out=tmp_path / "loss")["metrics"]["loss"].value
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in logged if "eval/loss" in row][-1]
    assert last["eval/loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
    assert last[f"eval/{metric}"] == pytest.approx(values[metric], abs=1e-4) and "eval/perplexity" not in last
    assert ("eval/subset_accuracy" in last) == (kind == "multi") and "eval/token_accuracy" not in last
    best = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert best["problem_type"] == KINDS[kind] and "text-classification" in (final / "README.md").read_text()
    (found,) = pipeline("text-classification", str(final), top_k=None)(["abc"])  # with the head's own function
    ours = 1 / (1 + np.exp(-wanted[0])) if kind == "multi" else wanted[0]
    np.testing.assert_allclose(sorted(one["score"] for one in found), sorted(ours), atol=1e-4)


@pytest.mark.parametrize("kind", ["number", pytest.param("multi", marks=pytest.mark.sweep)])
def test_lora(kind, base, data, tmp_path):
    """A PEFT folder with the head; merged, the same; a folder that PEFT wrote."""
    train(make_config(base, data[kind], tmp_path / "run", kind, method="lora"), make_observer=make_observer, devices=ONE)
    final = tmp_path / "run" / "final"
    assert json.loads((final / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS[kind]))
    wanted = hf_scores(PeftModel.from_pretrained(fresh, final), final)
    evaluate(str(tmp_path / "run"), out=tmp_path / "here")
    np.testing.assert_allclose(said(tmp_path / "here", kind), wanted, atol=1e-3)
    with pytest.raises(UserError, match="--compare-base: several labels and numbers need a head"):
        evaluate(str(tmp_path / "run"), compare_base=True)
    export(tmp_path / "run", tmp_path / "merged", merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.problem_type == KINDS[kind] and list(merged.config.id2label.values()) == LABELS[kind]
    np.testing.assert_allclose(hf_scores(merged, tmp_path / "merged"), wanted, atol=1e-4)
    torch.manual_seed(0)
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS[kind]))
    theirs = get_peft_model(fresh, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    objective = f"objective={{name: classification, problem_type: {KINDS[kind]}, labels: [{', '.join(LABELS[kind])}]}}"
    evaluate(str(base), [objective], adapter=tmp_path / "theirs", data=str(data[kind]), out=tmp_path / "again")
    np.testing.assert_allclose(said(tmp_path / "again", kind), hf_scores(theirs, base), atol=1e-3)


def said(folder, kind) -> list[list[float]]:
    """Return the scores behind the predictions."""
    rows = predictions(folder)
    if kind != "multi":
        return [json.loads(row["prediction"]) for row in rows]
    shares = np.array([list(row["scores"]["probabilities"].values()) for row in rows])
    return np.log(shares) - np.log1p(-shares)


@pytest.mark.parametrize("kind", ["multi", "numbers"])
def test_what_transformers_wrote(kind, heads, data, tmp_path):
    """A folder says itself what its head is for; thresholds move what is said."""
    wanted = hf_scores(AutoModelForSequenceClassification.from_pretrained(heads[kind]), heads[kind])
    results = evaluate(str(heads[kind]), data=str(data[kind]), out=tmp_path / "here")
    rows = predictions(tmp_path / "here")
    if kind == "numbers":
        np.testing.assert_allclose([json.loads(row["prediction"]) for row in rows], wanted, atol=1e-4)
        return
    shares = 1 / (1 + np.exp(-wanted))
    for limits, given in (([0.5] * 3, "0.5"), ([0.2] * 3, "0.2"), ([0.5, 0.9, 0.5], "{has b: 0.9}")):
        over = [f"evaluate.threshold={given}"]
        results = evaluate(str(heads[kind]), over, data=str(data[kind]), out=tmp_path / "moved")
        chosen = [[NAMES[i] for i in np.flatnonzero(row >= limits)] for row in shares]
        assert [json.loads(row["prediction"]) for row in predictions(tmp_path / "moved")] == chosen
    whole = (shares >= [0.5, 0.9, 0.5]) == (TRUTH["multi"] > 0.5)
    assert results["metrics"]["subset_accuracy"].value == whole.all(1).mean()
    with pytest.raises(UserError, match=r"evaluate\.threshold: has d: no such label; there are has a, has b, has c"):
        evaluate(str(heads[kind]), ["evaluate.threshold={has d: 0.9}"], data=str(data[kind]), out=tmp_path / "odd")


def test_a_head_whose_labels_have_other_numbers(heads, data, tmp_path):
    """Its rows follow the order that is asked for, so that names keep their scores."""
    turned = ["has c", "has a", "has b"]
    made = prepare(make_config(heads["multi"], data["multi"], tmp_path, "multi", objective={"labels": turned}), ONE)
    head = AutoModelForSequenceClassification.from_pretrained(heads["multi"]).score.weight.detach().numpy()
    np.testing.assert_array_equal(np.asarray(made.params["score.weight"]), head[[2, 0, 1]])
    assert list(made.model.config["id2label"].values()) == turned


# ---- mistakes ----


@pytest.mark.parametrize(
    ("kind", "model", "over", "says"),
    [
        ("multi", "number", {}, "the model has a head for regression already, and multi_label_classification is asked for"),
        ("multi", "base", {"data": {"validation": "{odd}"}}, r"odd\.jsonl:2: the label 'has d' is not in objective\.labels"),
        ("multi", "base", {"evaluate": {"task": "f1", "training_rows": 4}}, "the tasks are classification and loss"),
        ("number", "base", {"evaluate": {"task": "classification", "training_rows": 4}}, "the tasks are regression and loss"),
    ],
)  # fmt: skip
def test_refused(kind, model, over, says, base, heads, data, tmp_path):
    written(tmp_path / "odd.jsonl", [["has a"], ["has d"], *[[]] * 10])
    if "data" in over:
        over = {**over, "data": {"validation": str(tmp_path / "odd.jsonl")}}
    config = make_config(heads.get(model, base), data[kind], tmp_path / "run", kind, **over)
    with pytest.raises(UserError, match=says):
        train(config, make_observer=make_observer, devices=ONE)


def test_a_head_writes_nothing(heads, base, data, tmp_path):
    with pytest.raises(UserError, match="a classification head and generates no text"):
        Generator(str(heads["multi"])).generate(["abc"])
    with pytest.raises(UserError, match="need a head, and this model has none"):
        evaluate(str(base), data=str(data["number"]), task="regression", out=tmp_path)
