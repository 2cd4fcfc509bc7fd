"""Tests the objective `classification`: label words, and a classification head that transformers and PEFT load."""

import json

import numpy as np
import pytest
import torch
from oracle import ONE, Case, make_hf
from peft import LoraConfig, PeftModel, get_peft_model
from processes import ALL
from tiny_tokenizer import save_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from verbs import evaluate

from ftjax.config import Config
from ftjax.data.classes import TextLabels
from ftjax.data.labels import Labels
from ftjax.data.pipeline import load_splits
from ftjax.errors import UserError
from ftjax.evaluate.observe import make_observer
from ftjax.hub.export import export
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.models.classifier import SINGLE
from ftjax.train.run import train
from ftjax.train.setup import prepare
from ftjax.train.step import make_eval_step

WORDS = ["abc", "bad", "cabbage", "dab", "fed", "ace", "x", "beef", "cafe", "deaf xyz", "face", "bead"]
ROWS = [{"text": word, "label": "low" if word[0] in "abc" else "high"} for word in WORDS]
ROWS[6]["label"] = "none"
LABELS = ["high", "low", "none"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def folder(root, kind="llama", **values):
    path = root / f"{kind}{len(values)}"
    make_hf(Case(kind, kind, values), path)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("models"), tie_word_embeddings=True)


def make_config(model, rows, out, *, method="full", head=True, labels=None, **over):
    values = {
        "model": {"path": str(model), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
        "method": {"name": method, **({"r": 4, "lora_alpha": 8} if method == "lora" else {})},
        "data": {"train": str(rows), "validation": str(rows), "max_length": 32, "contamination": "ignore"},
        "objective": {"name": "classification", "head": head, "labels": labels},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"max_steps": 30, "global_batch_size": 4, "report_to": [], "logging_steps": 10},
        "evaluate": {}, "output_dir": str(out),
    }  # fmt: skip
    for section, more in over.items():
        values[section] = {**values[section], **more}
    return Config.model_validate(values)


def hf_logits(model, tokenizer, side: str) -> np.ndarray:
    """Return the logits of all rows in one padded batch."""
    tokenizer.padding_side = side
    batch = tokenizer([row["text"] for row in ROWS], return_tensors="pt", padding=True)
    # Positions are absolute under left padding: transformers' classifier does not correct them.
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions).logits.numpy()


def shares(results_folder) -> np.ndarray:
    rows = [json.loads(line) for line in (results_folder / "predictions.jsonl").read_text().splitlines()]
    return np.array([[row["scores"]["probabilities"][label] for label in LABELS] for row in rows])


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.tensor(logits), -1).numpy()


# ---- transformers and PEFT load the result ----


def test_full(tied, data, tmp_path, capsys):
    """Labels are found; final/ loads with their names and, padded left or right, the same logits; the model has learned."""
    config = make_config(tied, data, tmp_path / "run")
    train(config, make_observer=make_observer, devices=ONE)
    final = tmp_path / "run" / "final"
    saved = json.loads((final / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForSequenceClassification"]
    assert saved["id2label"] == dict(zip("012", LABELS, strict=True))
    assert saved["problem_type"] == "single_label_classification"
    model, info = AutoModelForSequenceClassification.from_pretrained(final, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(final)
    results = evaluate(str(tmp_path / "run"), out=tmp_path / "here")
    assert results["task"] == "classification" and results["metrics"]["accuracy"].value == 1.0 and results["labels"] == LABELS
    for side in ("left", "right"):
        np.testing.assert_allclose(shares(tmp_path / "here"), softmax(hf_logits(model, tokenizer, side)), atol=1e-4)
    evaluate(str(final), ["evaluate.batch_size=1"], data=str(data), task="classification", out=tmp_path / "alone")
    np.testing.assert_allclose(shares(tmp_path / "alone"), shares(tmp_path / "here"), atol=1e-5)
    # The loss of training is transformers', over packed rows.
    labels = torch.tensor([LABELS.index(row["label"]) for row in ROWS])
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loss = next(row["eval/loss"] for row in reversed(last) if "eval/loss" in row)
    want = torch.nn.functional.cross_entropy(torch.tensor(hf_logits(model, tokenizer, "right")), labels).item()
    assert loss == pytest.approx(want, rel=1e-3, abs=1e-5)
    assert evaluate(str(tmp_path / "run"), task="loss", out=tmp_path / "l")["metrics"]["loss"].value == pytest.approx(
        want, rel=1e-3
    )
    assert "text-classification" in (final / "README.md").read_text() and "ftjax evaluate" in capsys.readouterr().out


def test_lora(tied, data, tmp_path):
    """PEFT loads adapter and head; merged, transformers does."""
    train(make_config(tied, data, tmp_path / "run", method="lora", labels=LABELS), make_observer=make_observer, devices=ONE)
    final = tmp_path / "run" / "final"
    saved = json.loads((final / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS" and saved["modules_to_save"] == ["score"]
    evaluate(str(tmp_path / "run"), out=tmp_path / "here")
    base = AutoModelForSequenceClassification.from_pretrained(tied, num_labels=3)
    model, tokenizer = PeftModel.from_pretrained(base, final), AutoTokenizer.from_pretrained(final)
    got = shares(tmp_path / "here")
    np.testing.assert_allclose(got, softmax(hf_logits(model, tokenizer, "right")), atol=1e-4)
    assert got.argmax(1).tolist() == [LABELS.index(row["label"]) for row in ROWS]
    export(tmp_path / "run", tmp_path / "merged", merge=True)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == dict(enumerate(LABELS))
    np.testing.assert_allclose(got, softmax(hf_logits(merged, tokenizer, "left")), atol=1e-4)


def test_what_peft_wrote(tied, data, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(tied, num_labels=3)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    labels = f"objective={{name: classification, head: true, labels: [{', '.join(LABELS)}]}}"
    evaluate(str(tied), [labels], adapter=tmp_path / "adapter", data=str(data), out=tmp_path / "here")
    want = softmax(hf_logits(model, AutoTokenizer.from_pretrained(tied), "right"))
    np.testing.assert_allclose(shares(tmp_path / "here"), want, atol=1e-4)


# ---- pooling ----


@pytest.mark.parametrize(
    ("kind", "values"),
    [("gemma2", {}), *[("gpt2", {}), ("gpt_neox", {}), ("llama", {})] * ALL],
)
def test_families(kind, values, data, tmp_path):
    """A classifier of transformers has the same loss as packed rows, which are pooled at each text's last token."""
    path = folder(tmp_path, kind, **values)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, id2label=dict(enumerate(LABELS)), pad_token_id=0)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(path)
    config = make_config(path, data, tmp_path / "run", labels=LABELS)
    made = prepare(config, ONE)
    tokenizer = load_tokenizer(config.model)
    split, _ = load_splits(config.data, tokenizer, seed=0, encoding=TextLabels(Labels(SINGLE, tuple(LABELS))))
    (batch,) = split.batches(4, seed=0, shuffle=False, epochs=1)
    assert (batch["segment_ids"].max(1) > 2).any(), "rows hold several texts"
    sums = make_eval_step(made.loss_fn, made.runtime)(made.params, made.frozen, batch)
    logits = torch.tensor(hf_logits(model.eval(), AutoTokenizer.from_pretrained(path), "right"))
    labels = torch.tensor([LABELS.index(row["label"]) for row in ROWS])
    assert sums.weight == len(ROWS)
    assert float(sums.loss) == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-4
    )
    assert float(sums.metrics["token_accuracy"][0]) == (logits.argmax(1) == labels).sum()


def test_long_texts_keep_their_class(tied, tmp_path):
    rows = [{"text": "ab" * 20 + "c", "label": "yes"}, {"text": "cd", "label": "no"}]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoding = TextLabels(Labels(SINGLE, ("no", "yes")))
    for truncation, kept in (("right", [1, 4, 5, 4, 5, 4, 5]), ("left", [1, 5, 4, 5, 4, 5, 6])):
        config = make_config(tied, path, tmp_path, data={"max_length": 8, "truncation": truncation, "validation": None})
        split, _ = load_splits(config.data, load_tokenizer(config.model), seed=0, encoding=encoding)
        (batch,) = split.batches(2, seed=0, shuffle=False, epochs=1)
        row = int(np.flatnonzero(batch["targets"][batch["weights"] > 0].reshape(-1) == 1)[0])
        assert batch["tokens"][row].tolist() == [*kept, 1] and batch["targets"][row, 6] == 1
        assert batch["weights"][row].tolist() == [0, 0, 0, 0, 0, 0, 1, 0]
    config = make_config(tied, path, tmp_path, data={"max_length": 8, "truncation": "split"})
    with pytest.raises(UserError, match="the class of the whole"):
        load_splits(config.data, load_tokenizer(config.model), seed=0, encoding=encoding)


# ---- label words ----


def test_label_words(tied, data, tmp_path):
    """The result is an ordinary causal language model, evaluated by its classes."""
    train(
        make_config(tied, data, tmp_path / "run", head=False, training={"max_steps": 60}, evaluate={"training_examples": 0}),
        make_observer=make_observer,
        devices=ONE,
    )
    results = evaluate(str(tmp_path / "run"), out=tmp_path / "here")
    assert results["task"] == "classification" and results["labels"] == LABELS
    assert results["metrics"]["accuracy"].value > 0.8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    logs = []
    for label in LABELS:
        start = tokenizer("abc\nLabel:")["input_ids"]
        ids = tokenizer(f"abc\nLabel: {label}")["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            found = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        logs.append(found[:-1].gather(1, torch.tensor(ids[1:])[:, None])[len(start) - 1 :].sum().item())
    np.testing.assert_allclose(shares(tmp_path / "here")[0], softmax(np.array(logs)), atol=1e-4)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"labels": ["high", "low"]}, "rows.jsonl:7: the label 'none' is not in objective.labels"),
        ({"data": {"train": "{one}"}}, "all rows have the label 'a'"),
        ({"data": {"train": "{chat}"}}, "the row has 2 messages before its label"),
        ({"evaluate": {"training_prompts": ["a"]}}, "generates no answers"),
        ({"model": {"path": "{granite}"}}, "transformers has no SequenceClassification of the family granite"),
    ],
)
def test_refused(over, says, tied, data, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "x", "label": "a"}\n{"text": "y", "label": "a"}\n')
    turns = [{"role": "user", "content": "x"}] * 2
    chat = [{"prompt": turns, "completion": [{"role": "assistant", "content": label}]} for label in "ab"]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    if "model" in over:
        over = {"model": {"path": str(folder(tmp_path, "granite"))}}
    if "data" in over:
        over = {"data": {"train": over["data"]["train"].format(one=tmp_path / "one.jsonl", chat=tmp_path / "chat.jsonl")}}
        over["data"]["validation"] = None
    over = {"evaluate": {}, **over} if "evaluate" not in over else over
    labels, more = over.pop("labels", None), over
    values = make_config(tied, data, tmp_path / "run", labels=labels).model_dump()
    for section, changes in more.items():
        values[section] = {**values[section], **changes}
    with pytest.raises(UserError, match=says):
        train(Config.model_validate(values), make_observer=make_observer, devices=ONE)


def test_a_head_writes_nothing(tied, data, tmp_path):
    train(make_config(tied, data, tmp_path / "run", training={"max_steps": 1}), devices=ONE)
    with pytest.raises(UserError, match="generates no answers; the tasks are classification and loss"):
        evaluate(str(tmp_path / "run"), task="f1")
    with pytest.raises(UserError, match="is a sequence classifier, and the objective sft"):
        prepare(Config.model_validate({"model": {"path": str(tmp_path / "run" / "final")}, "data": {"train": str(data)}}), ONE)
