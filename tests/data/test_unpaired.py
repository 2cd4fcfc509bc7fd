"""Labelled answers for KTO: their labels, and the document that estimates the KL divergence."""

import json

import pytest
from data_tokenizers import CHATML, byte_level
from pair_sets import answer, balanced, both, labelled, load, parts, talk, units, write, write_pairs

from ftjax.data import unpaired
from ftjax.data.unpaired import Unpaired
from ftjax.errors import UserError

EOS, END = "<|endoftext|>", "<|im_end|>\n"
KTO, WITHOUT_KL = Unpaired(), Unpaired(kl=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))


def said(split, tokenizer):
    """`(prompt, answer, label)` of every document, by row."""
    return [
        [(*(text.removesuffix(EOS) for text in parts(d, tokenizer)), float(d.labels[0])) for d in unit] for unit in units(split)
    ]


def test_each_answer_has_its_label_and_a_neighbours_answer(tmp_path):
    rows = [labelled("P", " a", True), labelled("Q", " b", False), labelled("R", " c", "true")]
    tokenizer = byte_level()
    split = load(write(tmp_path / "a.jsonl", *rows), KTO, tokenizer)
    assert said(split, tokenizer) == [
        [("P", " a", 1), ("P", " c", 0)],
        [("Q", " b", -1), ("Q", " a", 0)],
        [("R", " c", 1), ("R", " b", 0)],
    ]
    assert (balanced(split.report).kept, split.report.joined, split.report.divided) == (3, 0, 0)
    alone = load(tmp_path / "a.jsonl", WITHOUT_KL, tokenizer)
    assert said(alone, tokenizer) == [[("P", " a", 1)], [("Q", " b", -1)], [("R", " c", 1)]]


def test_labelled_conversations(tmp_path):
    """The last answer has the label; those before it are part of the prompt."""
    rows = [{"messages": talk("p", "x", "P", "a"), "label": True}, {"messages": talk("Q", "b"), "label": False}]
    tokenizer = byte_level(CHATML)
    split = load(write(tmp_path / "a.jsonl", *rows), KTO, tokenizer)
    found = said(split, tokenizer)
    assert [[(text, label) for _, text, label in unit] for unit in found] == [
        [(f"a{END}", 1), (f"b{END}", 0)],
        [(f"b{END}", -1), (f"a{END}", 0)],
    ]
    assert all("x<|im_end|>" in prompt for prompt, _, _ in found[0])


def test_a_pair_is_two_labelled_answers(tmp_path):
    rows = [{"prompt": "P", "chosen": " a", "rejected": " b"}, {"prompt": "Q", "chosen": " c", "rejected": " d", "margin": 2}]
    tokenizer = byte_level()
    split = load(write(tmp_path / "a.jsonl", *rows), KTO, tokenizer)
    assert said(split, tokenizer) == [
        [("P", " a", 1), ("P", " c", 0)],
        [("P", " b", -1), ("P", " d", 0)],
        [("Q", " c", 1), ("Q", " a", 0)],
        [("Q", " d", -1), ("Q", " b", 0)],
    ]
    report = balanced(split.report)
    assert (report.rows, report.divided, report.kept) == (2, 2, 4)
    assert "4 of 4 examples kept" in report.lines()[0] and "2 pairs make 4 answers with a label" in report.lines()


def test_the_answer_is_to_another_prompt_and_each_is_taken_once(tmp_path):
    """Answers to one prompt stand together in most files, and in pairs always."""
    counts = {"P": 3, "Q": 1, "R": 2, "S": 1}
    rows = [labelled(p, f" {p}{n}", n % 2 == 0) for p, count in counts.items() for n in range(count)]
    tokenizer = byte_level()
    found = said(load(write(tmp_path / "a.jsonl", *rows), KTO, tokenizer), tokenizer)
    assert all(own[0] == other[0] != other[1].strip()[0] for own, other in found)
    assert sorted(other[1] for _, other in found) == sorted(own[1] for own, _ in found)
    same = [labelled("P", f" {n}", True) for n in range(3)]  # there is no other prompt: another answer then
    found = said(load(write(tmp_path / "b.jsonl", *same), KTO, tokenizer), tokenizer)
    assert [other[1] for _, other in found] == [" 2", " 0", " 1"]


def test_groups(tmp_path, monkeypatch):
    """Answers are exchanged within a group; one that is alone takes the last of the group before, or its own."""
    monkeypatch.setattr(unpaired, "GROUP", 3)
    rows = [labelled(f"P{n}", f" {n}", True) for n in range(4)]
    tokenizer = byte_level()
    for count, others in ((4, [" 2", " 0", " 1", " 2"]), (1, [" 0"])):
        found = said(load(write(tmp_path / f"{count}.jsonl", *rows[:count]), KTO, tokenizer), tokenizer)
        assert [other[1] for _, other in found] == others


@pytest.mark.parametrize("flags", [{}, {"train": True}, {"weight": 0.5}])
def test_conversations_exchange_all_turns_of_their_answers(flags, tmp_path):
    several = [answer("a"), {"role": "user", "content": "And?"}, answer("b", **flags)]
    rows = [labelled(talk("P", "p", "Q"), several, True), labelled("R", "c", False)]
    tokenizer = byte_level(CHATML)
    [[own, swapped], [other, also]] = units(load(write(tmp_path / "a.jsonl", *rows), KTO, tokenizer))
    asked = tokenizer.apply_chat_template(talk("P", "p", "Q"), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(swapped.tokens) == f"{asked}c{END}" and parts(swapped, tokenizer)[1] == f"c{END}"
    told = tokenizer.decode(own.tokens).removeprefix(asked)
    assert tokenizer.decode(also.tokens) == tokenizer.decode(other.tokens).replace(f"c{END}", told)
    assert [document.labels.tolist() for document in (own, swapped, other, also)] == [[1], [0], [-1], [0]]


def test_texts_and_conversations_in_one_set(tmp_path):
    tokenizer = byte_level(CHATML)
    rows = [labelled("P", "a", True), labelled(talk("Q"), [answer("b")], False)]
    found = said(load(write(tmp_path / "a.jsonl", *rows), KTO, tokenizer), tokenizer)
    assert [[text.removesuffix(END) for _, text, _ in unit] for unit in found] == [["a", "b"], ["b", "a"]]


def test_labels_are_in_the_batch(tmp_path):
    split = load(write_pairs(tmp_path / "a.jsonl", 6), KTO, max_length=64)
    labels = []
    for batch in split.batches(2, seed=0, shuffle=True, epochs=1):
        for values, segments in zip(batch["labels"], batch["segment_ids"], strict=True):
            labels += [float(values[segments == n].sum()) for n in range(1, segments.max() + 1)]
    assert sorted(labels[::2]) == [-1] * 6 + [1] * 6 and labels[1::2] == [0] * 12


@pytest.mark.parametrize("row", [{"messages": talk("P", "a")}, {"text": "P a"}, {"prompt": "P", "completion": "a"}])
def test_a_row_without_a_label_is_refused(row, tmp_path):
    good, bad = write(tmp_path / "good.jsonl", labelled("P", " a", True)), write(tmp_path / "bad.jsonl", row)
    settings = {"train": [str(bad), str(good)], "tokenizer": byte_level(CHATML)}
    with pytest.raises(UserError, match=r"bad.jsonl:1: this objective needs to know whether an answer is wanted; expected"):
        load(tmp_path, KTO, **settings)
    report = balanced(load(tmp_path, KTO, on_error="skip", **settings).report)
    assert (report.kept, dict(report.dropped)) == (1, {"broken (on_error: skip)": 1})


@pytest.mark.parametrize("wanted", [True, False])
def test_labels_that_are_all_alike(wanted, tmp_path):
    """There is nothing to compare, which is said; answers of both kinds are trained without a word."""
    rows = [labelled("P", " a", wanted), labelled("Q", " b", wanted)]

    def said(name, *rows):
        report = load(write(tmp_path / name, *rows), KTO, byte_level()).report
        return [warning for warning in report.warnings if "nothing to tell them from" in warning]

    (warning,) = said("alike.jsonl", *rows)
    assert (
        f"all 2 answers are {'wanted' if wanted else 'unwanted'}" in warning and f"label {str(not wanted).lower()}" in warning
    )
    assert not said("both.jsonl", *rows, labelled("R", " c", not wanted))


def test_a_row_is_judged_by_its_own_answer(tmp_path):
    """The answer of another row is shortened where it must be, and a row that has half of the room is kept."""
    rows = [labelled("P", " a", True), labelled("Q", f" {'b ' * 60}", False)]
    tokenizer = byte_level()
    path = write(tmp_path / "a.jsonl", *rows)
    [[short, long], [own, _]] = units(load(path, KTO, tokenizer))
    for policy in ("drop", "right", "left", "middle"):
        split = load(path, KTO, tokenizer, max_length=64, truncation=policy)
        assert balanced(split.report).kept == 1 + (policy != "drop"), policy
        assert dict(split.report.truncated) == ({policy: 1} if policy != "drop" else {})
        assert any("in 1 rows the document for the KL" in warning for warning in split.report.warnings)
        first, second = units(split)[0]
        assert first.tokens.tolist() == short.tokens.tolist()
        assert second.tokens.tolist() == long.tokens.tolist()[: 64 - len(first.tokens)]
        assert all(sum(len(d.tokens) for d in unit) <= 64 for unit in units(split))
    with pytest.raises(UserError, match=r"a.jsonl:2: \d+ tokens are more than half of data.max_length 64"):
        load(path, KTO, tokenizer, max_length=64, truncation="error")
    length = len(own.tokens)
    assert load(path, KTO, tokenizer, min_tokens=length, max_tokens=length).report.kept == 1


def test_both_answers_of_a_pair_are_on_one_side(tmp_path):
    """They have the prompt in common, so that validation would see what is trained."""
    path = write_pairs(tmp_path / "a.jsonl", 40)
    train, validation = both(path, KTO, validation_split=0.25)
    assert validation.report.kept == 20 and balanced(train.report).kept == 60 == 80 - train.report.held_out
    sides = [{document.where for unit in units(split) for document in unit[:1]} for split in (train, validation)]
    assert not sides[0] & sides[1] and [len(side) for side in sides] == [30, 10]
    other = write(tmp_path / "b.jsonl", *map(json.loads, path.read_text().splitlines()[:3]))
    clean, _ = both(path, KTO, validation=str(other), contamination="drop")
    assert balanced(clean.report).dropped["found in validation"] == 6 and clean.report.kept == 74


def test_a_stream_whose_labels_change_is_another(tmp_path):
    rows = [labelled("P", " a", True), labelled("Q", " b", False)]
    found = [
        load(write(tmp_path / "a.jsonl", *({**row, "label": row["label"] is flag} for row in rows)), KTO, streaming=True)
        for flag in (True, False)
    ]
    assert found[0].fingerprint()["tokens"] == found[1].fingerprint()["tokens"]
    assert found[0].fingerprint() != found[1].fingerprint()


def test_a_stream_is_what_the_cache_holds(tmp_path, monkeypatch):
    """Windows of any size: groups do not depend on them."""
    monkeypatch.setattr(unpaired, "GROUP", 4)
    path = write_pairs(tmp_path / "a.jsonl", 11)
    kept = sorted(tuple(map(tuple, (d.tokens.tolist() for d in unit))) for unit in units(load(path, KTO, max_length=64)))
    monkeypatch.setattr("ftjax.data.stream.WINDOW", 3)
    seen = []
    for batch in load(path, KTO, max_length=64, streaming=True).batches(2, seed=0, shuffle=True, epochs=1):
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            texts = [tuple(tokens[segments == n].tolist()) for n in range(1, int(segments.max()) + 1)]
            seen += zip(texts[::2], texts[1::2], strict=True)
    assert sorted(seen) == kept
