"""`ftjax preview`: what it prints, writes and warns about; whole sets go through it."""

import io
import json

import pytest
from data_sets import write_rows
from data_tokenizers import CHATML, MARKED, byte_level, spaced
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ftjax.config import Config
from ftjax.data.encode import Encoder
from ftjax.data.preview import preview
from ftjax.data.reader import to_examples
from ftjax.data.row import Row
from ftjax.data.shown import render, shown, token_texts
from ftjax.errors import UserError


def run(data, tokenizer, tmp_path, *, colours=False, **options):
    config = Config.model_validate({"model": {"path": "none"}, "data": data})
    out = io.StringIO()
    console = Console(file=out, force_terminal=colours, width=120, color_system="truecolor" if colours else None)
    preview(config, tokenizer, console=console, **options)
    return out.getvalue()


def test_what_is_printed(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 40)
    text = run({"train": str(path), "max_length": 64, "validation_split": 0.2}, byte_level(), tmp_path)
    assert "example 1: " in text and "a.jsonl:1" in text and "segment" in text and "trained:  " in text
    assert "32 of 40 examples kept" in text and "8 of 8 examples kept" in text and "packing efficiency" in text
    assert "tokens a document" in text and "█" in text


def test_colours_say_what_is_trained(tmp_path):
    path = tmp_path / "a.jsonl"
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "fine", "weight": 0.5}]
    path.write_text(json.dumps({"messages": talk}))
    text = run({"train": str(path), "max_length": 64}, byte_level(CHATML), tmp_path, colours=True)
    grey, yellow, green = "\x1b[90m", "33m", "32m"
    assert grey in text and yellow in text and green not in text and "(0.5)" in text
    talk[1].pop("weight")
    path.write_text(json.dumps({"messages": talk}))
    assert green in run({"train": str(path), "max_length": 64}, byte_level(CHATML), tmp_path, colours=True)


def test_json_holds_everything(tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", 40)
    run({"train": str(path), "validation": str(path), "max_length": 64}, byte_level(), tmp_path, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"examples", "train", "validation", "personal_data"}
    train = found["train"]
    assert train["rows"] == train["kept"] == 40 and sum(part["documents"] for part in train["histogram"]) == 40
    assert 0.9 < train["efficiency"] <= 1 and "are found in train too" in train["warnings"][0]
    for example in found["examples"]:
        assert len(example["tokens"]) == len(example["texts"]) == len(example["weights"])
        assert example["trained"] == [weight > 0 for weight in example["weights"]]
        assert "".join(example["texts"]) == byte_level().decode(example["tokens"])
        trained = "".join(t for t, w in zip(example["texts"], example["weights"], strict=True) if w)
        assert trained == json.loads(path.read_text().splitlines()[int(example["where"].rpartition(":")[2]) - 1])[
            "completion"
        ] + ("<|endoftext|>")


def test_the_page(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "<b>Hello</b> & you", "completion": " <script>fine"}) + "\n")
    page = tmp_path / "page.html"
    run({"train": str(path), "max_length": 64}, byte_level(), tmp_path, html=page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "<svg" in text and "<script" not in text and "<b>" not in text
    assert 'class="t" tabindex="0" title="token' in text and 'class="c" tabindex="0" title="token 0, id' in text
    assert text.count('tabindex="0" title="token') == text.count('<th scope="row">') - 7, "each token has a row of the table"
    assert "span:focus::after { content: attr(title)" in text, "what hovering shows is shown to fingers and keys, too"
    assert text.count("<title>") == 1 + 2  # the titles of the page, the histogram and its bar
    with pytest.raises(UserError, match=r"page.html: cannot be written"):
        run({"train": str(path), "max_length": 64}, byte_level(), tmp_path, html=tmp_path / "no" / "page.html")


def test_a_streamed_set(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", 40)
    assert "40 of 40 examples kept" in run({"train": str(path), "max_length": 64, "streaming": True}, byte_level(), tmp_path)


def test_the_marks_of_an_example():
    tokenizer = byte_level()
    document = Encoder(tokenizer)(list(to_examples([Row({"prompt": "Hello", "completion": " world"}, "a:1")])))[0]
    assert render(shown(document, tokenizer)) == "Hello[[ world<|endoftext|>]]"
    long = Encoder(tokenizer)(list(to_examples([Row({"prompt": "Hello " * 900, "completion": "\nworld"}, "a:1")])))[0]
    text = render(shown(long, tokenizer))
    assert "tokens ...]" in text and text.endswith("[[\nworld<|endoftext|>]]") and len(text) < 4000


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("Hello wrd,\n.42é漢🙂 \t"), max_size=40), make=st.sampled_from([byte_level, spaced]))
def test_the_texts_of_tokens_are_the_text(text, make):
    tokenizer = make()
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


SETS = {
    "chat_instruct": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 2048},
    "chat_messages": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 2048, "truncation": "right"},
    "code_completion": {"train": "train.jsonl", "validation": "validation.jsonl"},
    "sentiment_movie": {"train": "train.csv", "validation": "validation.csv", "max_length": 256},
    "summarization_science": {"train": "train.jsonl", "validation": "validation.jsonl", "truncation": "middle"},
    "qa_math": {"train": "train.jsonl", "validation": "validation.jsonl"},
    "preference_helpful": {"train": "train.jsonl", "validation": "validation.jsonl", "max_length": 2048},
    "safety_prompts": {"train": "test.csv", "columns": {"completion": "label"}, "max_length": 256},
}


@pytest.mark.parametrize("name", SETS)
def test_whole_sets_preview_cleanly(name, data_sets, reader, tmp_path, capsys):
    """With and without a chat template: nothing is lost, and the packing is what was asked for."""
    from transformers import AutoTokenizer

    place = data_sets / name
    data = {key: str(place / value) if key in ("train", "validation") else value for key, value in SETS[name].items()}
    tokenizer = AutoTokenizer.from_pretrained(reader)
    if name in ("chat_messages", "preference_helpful"):
        tokenizer.chat_template = "{{ bos_token }}" + MARKED
    run(data, tokenizer, tmp_path, as_json=True)
    found = json.loads(capsys.readouterr().out)
    for part in ("train", "validation") if "validation" in data else ("train",):
        report = found[part]
        assert report["rows"] == report["kept"] + sum(report["dropped"].values()) and report["kept"] > 0.75 * report["rows"]
        assert not any("no EOS" in warning for warning in report["warnings"])
    for example in found["examples"]:
        assert example["tokens"].count(tokenizer.bos_token_id) == 1 and example["tokens"][0] == tokenizer.bos_token_id
    full = {"chat_instruct": 0.98, "qa_math": 0.95}.get(name, 0)  # of all rows but one, which a small set does not fill
    train = found["train"]
    assert train["tokens"] >= full * (train["packed_rows"] - 1) * train["max_length"]
