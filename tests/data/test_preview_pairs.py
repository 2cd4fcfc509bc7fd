"""What `ftjax preview` and the start of a run show of preferences: both documents of a row, and where they part."""

import io
import json

import numpy as np
import pytest
from data_tokenizers import CHATML, MARKED, byte_level
from pair_sets import labelled, load, talk, write
from rich.console import Console

from ftjax.config import Config
from ftjax.data.encoder import Encoded
from ftjax.data.pairs import Pairs
from ftjax.data.preview import preview
from ftjax.data.scored import Scored
from ftjax.data.shown import parting, show_unit
from ftjax.data.unpaired import Unpaired
from ftjax.objectives import encoding_of
from ftjax.train.announce import example_lines


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))


def config_of(path, objective="dpo", **data):
    data = {"train": str(path), "max_length": 1024} | data
    return Config.model_validate({"model": {"path": "none"}, "data": data, "objective": {"name": objective}})


def run(path, objective="dpo", tokenizer=None, *, data=(), **options):
    config, out = config_of(path, objective, **dict(data)), io.StringIO()
    console = Console(file=out, width=200, color_system=None)
    preview(config, tokenizer or byte_level(), console=console, encoding=encoding_of(config), **options)
    return out.getvalue()


PAIR = {"prompt": "Once upon a time", "chosen": " there was a girl", "rejected": " there was no one"}


def test_both_answers_are_printed_and_where_they_part(tmp_path):
    text = run(write(tmp_path / "a.jsonl", PAIR))
    first, second, *_ = text.split("example 1, ")[1:]
    assert first.startswith("chosen: ") and "Once upon a time there was‖ a girl" in first
    assert second.startswith("rejected: ") and "tokens as above ‖ no one" in second and "Once upon" not in second
    assert "trained:  there was a girl<|endoftext|>" in first and "trained:  there was no one<|endoftext|>" in second
    [line] = [line for line in text.splitlines() if line.startswith("they part")]
    unit = load(tmp_path / "a.jsonl").first(1)[0][0]
    at = parting(unit)
    tokens = [byte_level().decode(document.tokens[at : at + 1]) for document in unit]
    assert line == f"they part (‖) at token {at}: {tokens[0]!r} | {tokens[1]!r}"
    assert "1 of 1 examples kept" in text


def test_a_long_prompt_does_not_hide_it(tmp_path):
    text = run(write(tmp_path / "a.jsonl", {**PAIR, "prompt": "Once upon a time " * 300}), data={"max_length": 8192})
    assert "tokens before" in text and "‖ a girl" in text and "‖ no one" in text and len(text) < 6000


@pytest.mark.parametrize(
    "one, other, at", [([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 4], 2), ([1, 2, 4], [1, 2], 2), ([1], [2], 0)]
)
def test_parting(one, other, at):
    documents = [Encoded(np.array(ids, np.int32), np.ones(len(ids), np.float32), "a:1") for ids in (one, other)]
    assert parting(documents) == at and parting(documents[:1]) is None


@pytest.mark.parametrize(
    "encoding, captions, last",
    [
        (Pairs(), ["chosen", "rejected"], "<|endoftext|>"),
        (Unpaired(), ["wanted", "for the KL divergence"], "<|endoftext|>"),
        (Unpaired(kl=False), ["wanted"], "<|endoftext|>"),
        (Scored(), ["chosen (margin 1.5)", "rejected"], " -> score"),
    ],
)
def test_what_each_document_is(encoding, captions, last, tmp_path):
    split = load(write(tmp_path / "a.jsonl", {**PAIR, "margin": 1.5}), encoding)
    (unit, place) = split.first(1)[0]
    shown = show_unit(unit, byte_level(), encoding, *place)
    assert [item.caption for item in shown] == captions and {item.texts[-1] for item in shown} == {last}
    assert [item.segment - shown[0].segment for item in shown] == list(range(len(captions)))


def test_json_holds_both_documents(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", *(labelled(f"P{n}", f" {n}", n % 2 == 0) for n in range(6)))
    run(path, "kto", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [(item["example"], item["caption"]) for item in found["examples"]][:4] == [
        (0, "wanted"), (0, "for the KL divergence"), (1, "unwanted"), (1, "for the KL divergence"),
    ]  # fmt: skip
    for one, other in zip(found["examples"][::2], found["examples"][1::2], strict=True):
        at = one["parts_at"]
        assert (
            at == other["parts_at"] and one["tokens"][:at] == other["tokens"][:at] and one["tokens"][at] != other["tokens"][at]
        )
    assert found["train"]["joined"] == found["train"]["divided"] == 0 and found["train"]["kept"] == 6


def test_the_page_shows_both_documents(tmp_path):
    page = tmp_path / "page.html"
    run(write(tmp_path / "a.jsonl", PAIR, {**PAIR, "prompt": "Hello"}), html=page)
    text = page.read_text(encoding="utf-8")
    assert text.count("<h2>Example ") == 2 and text.count("<h3>chosen: ") == text.count("<h3>rejected: ") == 2
    assert text.count('class="t p"') == 4 == text.count(", where the two part") and "differs from token" in text
    assert "where the two documents of a row part</span>" in text
    write(tmp_path / "b.jsonl", {"prompt": "Hello", "completion": " you"})
    run(tmp_path / "b.jsonl", "sft", html=page)
    assert "part</span>" not in page.read_text(encoding="utf-8") and "<h3>" not in page.read_text(encoding="utf-8")


def test_the_report_counts_pairs_and_their_rows(tmp_path):
    rows = [labelled("P", " a", True), labelled("P", " b", False), labelled("Q", " c", True)]
    page = tmp_path / "page.html"
    text = run(write(tmp_path / "a.jsonl", *rows), html=page)
    assert "1 of 2 examples kept" in text and "2 rows with one answer make 1 pairs" in text
    assert "pairs made of two rows" in page.read_text(encoding="utf-8")
    text = run(write(tmp_path / "b.jsonl", PAIR), "kto", html=page)
    assert "2 of 2 examples kept" in text and "1 pairs make 2 answers with a label" in text
    assert "pairs made two answers" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "objective, lines",
    [
        (
            "dpo",
            ["an example (trained tokens are marked), chosen:", "Once upon a time[[ there was a girl<|endoftext|>]]",
             "and rejected, where they part:", "[... 8 tokens ...] [[ no one<|endoftext|>]]"],
        ),
        (
            "kto",
            ["an example (trained tokens are marked), wanted:", "Once upon a time[[ there was a girl<|endoftext|>]]",
             "and for the KL divergence, where they part:", None],
        ),
        (
            "reward",
            ["an example (trained tokens are marked), chosen:", "Once upon a time there was a girl<|endoftext|>[[ -> score]]",
             "and rejected, where they part:", "[... 8 tokens ...]  no one<|endoftext|>[[ -> score]]"],
        ),
        ("sft", ["an example (trained tokens are marked):", "Once upon a time[[ there was a girl<|endoftext|>]]"]),
    ],
)  # fmt: skip
def test_the_start_of_a_run_shows_both(objective, lines, tmp_path):
    config = config_of(write(tmp_path / "a.jsonl", PAIR, {**PAIR, "prompt": "Hello"}), objective)
    split = load(tmp_path / "a.jsonl", encoding_of(config))
    found = example_lines(config, split, byte_level())
    at = parting(split.first(1)[0][0])
    wanted = [line and line.replace("8 tokens", f"{at} tokens") for line in lines]
    assert len(found) == len(wanted) and all(want is None or got == want for got, want in zip(found, wanted, strict=True))


@pytest.mark.parametrize("objective", ["dpo", "kto", "reward"])
def test_a_set_of_preferences(objective, data_sets, reader, tmp_path, capsys):
    """With a tokenizer that has learned from such texts: nothing is lost, and each row has its two documents."""
    from transformers import AutoTokenizer

    folder = data_sets / "preference_helpful"
    tokenizer = AutoTokenizer.from_pretrained(reader)
    tokenizer.chat_template = "{{ bos_token }}" + MARKED
    data = {"validation": str(folder / "validation.jsonl"), "max_length": 8192}
    run(folder / "train.jsonl", objective, tokenizer, as_json=True, data=data)
    found = json.loads(capsys.readouterr().out)
    for part in ("train", "validation"):
        report, rows = found[part], len((folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines())
        count = rows * (2 if objective == "kto" else 1)
        assert report["rows"] == rows and report["kept"] + sum(report["dropped"].values()) == count
        assert report["kept"] > 0.7 * count and report["documents"] == 2 * report["kept"]
        assert not any("no EOS" in warning or "BOS" in warning for warning in report["warnings"])
    for one, other in zip(found["examples"][::2], found["examples"][1::2], strict=True):
        same = tokenizer.decode(one["tokens"][: one["parts_at"]])
        assert "<|im_start|>assistant" in same and one["tokens"][: one["parts_at"]] == other["tokens"][: one["parts_at"]]


def test_a_conversation_is_shown_with_its_template(tmp_path):
    row = {"prompt": talk("Hello"), "chosen": "fine", "rejected": "no"}
    text = run(write(tmp_path / "a.jsonl", row), tokenizer=byte_level(CHATML))
    assert "<|im_start|>assistant⏎" in text and "trained: fine<|im_end|>⏎" in text and "trained: no<|im_end|>⏎" in text
