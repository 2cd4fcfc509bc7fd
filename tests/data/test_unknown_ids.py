"""Tests that token ids without an embedding are reported with their row of data before training or evaluation."""

import json

import pytest
from oracle import Case, make_hf
from tiny_tokenizer import save_tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from ftjax.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a model with one embedding per token, whose tokenizer then got one more token."""
    made = tmp_path_factory.mktemp("model")
    save_tokenizer(made)
    make_hf(Case("llama", "llama", {"vocab_size": len(AutoTokenizer.from_pretrained(made))}), made)
    tokenizer = AutoTokenizer.from_pretrained(made)
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save_pretrained(made)
    rows = [{"prompt": "ab", "completion": "ba"}, {"prompt": "a b", "completion": "<beyond> b"}]
    (made / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("verb", ["train", "preview"])
def test_named_with_the_row(folder, tmp_path, verb, streaming):
    settings = ["data.streaming=true", "training.max_steps=2"] if streaming else []
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {folder}, dtype: float32, compute_dtype: float32}}\n"
        f"data: {{train: {folder}/train.jsonl, max_length: 32}}\n"
        f"training: {{global_batch_size: 8, report_to: []}}\noutput_dir: {tmp_path}/run\n"
    )
    done = CliRunner().invoke(app, [verb, str(tmp_path / "run.yaml"), *settings])
    assert done.exit_code == 2, done.output
    said = " ".join(done.stderr.split())
    assert "train.jsonl:2: the token '<beyond>' has the id" in said and "model.add_special_tokens" in said
