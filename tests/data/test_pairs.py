"""Pairs of answers: what becomes one, what is trained of it, and what is refused or counted."""

import pytest
from data_tokenizers import CHATML, MARKED, WITH_TOOLS, byte_level
from hypothesis import given
from hypothesis import strategies as st
from pair_sets import answer, balanced, both, labelled, load, parts, talk, units, write

from ftjax.data.encoding import ANSWERS
from ftjax.data.pairs import Pairs, rooms
from ftjax.data.scored import Scored
from ftjax.data.unpaired import Unpaired
from ftjax.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))


# ---- what a row becomes ----

EOS, END = "<|endoftext|>", "<|im_end|>\n"
ASKED = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
TRANSCRIPT = "\n\nHuman: Hello\n\nAssistant:"


@pytest.mark.parametrize(
    "row, prompt, chosen, rejected",
    [
        ({"prompt": "Hello", "chosen": " world", "rejected": " you"}, "Hello", " world", " you"),
        ({"chosen": "Hello world", "rejected": "Hello you"}, "Hello", " world", " you"),
        ({"prompt": "Is it?", "chosen": "Is it? I am", "rejected": "Is it? no"}, "Is it?", " I am", " no"),
        ({"chosen": f"{TRANSCRIPT} world", "rejected": f"{TRANSCRIPT} you"}, TRANSCRIPT, " world", " you"),
        ({"prompt": "1+1=", "chosen": 2, "rejected": 3}, "1+1=", "2", "3"),
    ],
)
def test_a_pair_of_texts(row, prompt, chosen, rejected, tmp_path):
    tokenizer = byte_level()
    [[one, other]] = units(load(write(tmp_path / "a.jsonl", row), tokenizer=tokenizer))
    assert parts(one, tokenizer) == (prompt, chosen + EOS)
    assert parts(other, tokenizer) == (prompt, rejected + EOS)
    assert one.where == other.where and one.where.endswith("a.jsonl:1")


WORLD = answer("world")
TOOL = {"type": "function", "function": {"name": "add"}}
LONGER = [answer("fine"), {"role": "user", "content": "And you?"}, answer("too")]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize(
    "row, prompt, chosen, rejected",
    [
        ({"prompt": "Hello", "chosen": "world", "rejected": "you"}, ASKED, f"world{END}", f"you{END}"),
        ({"prompt": talk("Hello"), "chosen": "world", "rejected": "you"}, ASKED, f"world{END}", f"you{END}"),
        ({"prompt": talk("Hello"), "chosen": [WORLD], "rejected": [answer("you")]}, ASKED, f"world{END}", f"you{END}"),
        ({"chosen": talk("Hello", "world"), "rejected": talk("Hello", "you")}, ASKED, f"world{END}", f"you{END}"),
        ({"prompt": "Hello", "chosen": talk("Hello", "a"), "rejected": talk("Hello", "b")}, ASKED, f"a{END}", f"b{END}"),
        ({"chosen": f"{TRANSCRIPT} world", "rejected": f"{TRANSCRIPT} you"}, ASKED, f"world{END}", f"you{END}"),
        (
            {"prompt": "Hello", "chosen": "world", "rejected": "you", "system": "I"},
            f"<|im_start|>system\nI<|im_end|>\n{ASKED}", f"world{END}", f"you{END}",
        ),
        # several turns: all that follows the prompt, as in TRL
        (
            {"prompt": talk("Hello"), "chosen": LONGER, "rejected": [answer("you")]},
            ASKED, f"fine{END}<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\ntoo{END}", f"you{END}",
        ),
    ],
)  # fmt: skip
def test_a_pair_of_conversations(row, prompt, chosen, rejected, template, tmp_path):
    tokenizer = byte_level(template)
    [[one, other]] = units(load(write(tmp_path / "a.jsonl", row), tokenizer=tokenizer))
    assert parts(one, tokenizer) == (prompt, chosen)
    assert parts(other, tokenizer) == (prompt, rejected)


def test_turns_of_an_answer_that_are_not_trained(tmp_path):
    tokenizer = byte_level(CHATML)
    chosen = [answer("fine", train=False), *LONGER[1:]]
    row = {"prompt": talk("Hello"), "chosen": chosen, "rejected": [answer("you")]}
    [[one, other]] = units(load(write(tmp_path / "a.jsonl", row), tokenizer=tokenizer))
    assert (parts(one, tokenizer)[1], parts(other, tokenizer)[1]) == (f"too{END}", f"you{END}")
    row["chosen"] = LONGER
    last = load(write(tmp_path / "b.jsonl", row), tokenizer=tokenizer, last_turn_only=True)
    assert [parts(document, tokenizer)[1] for document in units(last)[0]] == [f"too{END}", f"you{END}"]


def test_pairs_are_read_though_the_rows_have_messages_too(tmp_path):
    """As UltraFeedback has; an objective that imitates takes the messages."""
    tokenizer = byte_level(CHATML)
    row = {"prompt": "Hello", "chosen": talk("Hello", "a"), "rejected": talk("Hello", "b"), "messages": talk("Hello", "c")}
    path = write(tmp_path / "a.jsonl", row)
    assert [parts(document, tokenizer)[1] for document in units(load(path, tokenizer=tokenizer))[0]] == [f"a{END}", f"b{END}"]
    [[document]] = units(load(path, ANSWERS, tokenizer))
    assert parts(document, tokenizer)[1] == f"c{END}"


def test_tools_stand_in_both_halves(tmp_path):
    tokenizer = byte_level(WITH_TOOLS)
    row = {"prompt": talk("Hello"), "chosen": "world", "rejected": "you", "tools": [TOOL]}
    [unit] = units(load(write(tmp_path / "a.jsonl", row), tokenizer=tokenizer))
    assert all(tokenizer.decode(document.tokens).startswith('tools: [{"type": "function"') for document in unit)


# ---- answers with a label ----


def test_labelled_answers_to_one_prompt_are_paired_in_order(tmp_path):
    rows = [
        labelled("P", " a", True),  # 1
        labelled("Q", " x", False),
        labelled("P", " b", False),  # the first pair
        labelled("P", " c", True),
        labelled("Q", " y", True),  # the second
        labelled("R", " z", True),  # alone
        labelled("P", " d", False),  # the third
        {"prompt": "S", "chosen": " good", "rejected": " bad"},
    ]
    tokenizer = byte_level()
    split = load(write(tmp_path / "a.jsonl", *rows[:-1]), tokenizer=tokenizer)
    pairs = [tuple(parts(document, tokenizer)[1].removesuffix(EOS) for document in unit) for unit in units(split)]
    assert pairs == [(" a", " b"), (" y", " x"), (" c", " d")]
    assert [d.where.rpartition(":")[2] for unit in units(split) for d in unit] == ["1", "3", "5", "2", "4", "7"]
    report = balanced(split.report)
    assert (report.rows, report.joined, report.kept) == (7, 3, 3)
    assert dict(report.dropped) == {"unpaired, without an answer of the other kind to the same prompt": 1}
    assert "3 of 4 examples kept" in report.lines()[0] and "6 rows with one answer make 3 pairs" in report.lines()
    mixed = [str(write(tmp_path / f"{n}.jsonl", *part)) for n, part in enumerate((rows[:-1], rows[-1:]))]
    assert balanced(load(tmp_path, train=mixed).report).kept == 4


@pytest.mark.parametrize(
    "one, other",
    [
        ({"tools": [TOOL]}, {}),
        ({"chat_template_kwargs": {"thinking": True}}, {"chat_template_kwargs": {"thinking": False}}),
        ({"system": "I"}, {}),
    ],
)
def test_what_the_model_sees_before_an_answer_must_be_the_same(one, other, tmp_path):
    rows = [labelled("P", "a", True, **one), labelled("P", "b", False, **other), {**labelled("P", "c", False), **one}]
    split = load(write(tmp_path / "a.jsonl", *rows), tokenizer=byte_level(WITH_TOOLS))
    assert [d.where.rpartition(":")[2] for unit in units(split) for d in unit] == ["1", "3"]


def test_labelled_answers_of_which_some_turns_are_trained(tmp_path):
    """Flags say which turns are trained, and the prompt is still the prompt."""
    rows = [
        labelled(talk("Hello"), [answer("a", weight=0.5)], True), labelled(talk("Hello"), [answer("b", train=True)], False)
    ]  # fmt: skip
    tokenizer = byte_level(CHATML)
    [[one, other]] = units(load(write(tmp_path / "a.jsonl", *rows), tokenizer=tokenizer))
    assert (parts(one, tokenizer)[1], parts(other, tokenizer)[1]) == (f"a{END}", f"b{END}")
    assert set(one.weights) == {0, 0.5}


def test_a_pair_of_labelled_rows_is_that_pair_in_validation(tmp_path):
    train = write(
        tmp_path / "t.jsonl",
        labelled("P", " a", True), labelled("P", " b", False), labelled("Q", " a", True), labelled("Q", " b", False),
    )  # fmt: skip
    validation = write(tmp_path / "v.jsonl", {"prompt": "P", "chosen": " a", "rejected": " b"})
    split, other = both(train, validation=str(validation), contamination="drop")
    assert dict(balanced(split.report).dropped) == {"found in validation": 1} and len(units(split)) == len(units(other)) == 1


# ---- what is refused or counted ----


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"messages": talk("Hello", "fine")}], "compares two answers; expected columns prompt, chosen and rejected"),
        ([{"text": "Hello"}], "compares two answers"),
        ([{"prompt": "Hello", "completion": " fine"}], "compares two answers"),
        ([{"input_ids": [1, 2]}], "compares two answers"),
        ([labelled("P", " a", "perhaps")], "'label' is 'perhaps', expected true or false"),
    ],
)
def test_a_row_without_a_second_answer_is_refused(rows, message, tmp_path):
    good = write(tmp_path / "good.jsonl", {"prompt": "P", "chosen": " a", "rejected": " b"})
    bad = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(UserError, match=rf"bad.jsonl:1: .*{message}"):
        load(tmp_path, train=[str(good), str(bad)], tokenizer=byte_level(CHATML))
    report = balanced(load(tmp_path, train=[str(good), str(bad)], on_error="skip", tokenizer=byte_level(CHATML)).report)
    assert (report.kept, dict(report.dropped)) == (1, {"broken (on_error: skip)": 1})


def test_a_label_that_is_missing_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", labelled("P", " a", True), labelled("P", " b", False), labelled("P", " c", None))
    with pytest.raises(UserError, match=r"a.jsonl:3: 'label' is None, expected true or false"):
        load(path)
    assert balanced(load(path, on_error="skip").report).kept == 1


@pytest.mark.parametrize("encoding", [Pairs(), Unpaired(), Unpaired(kl=False), Scored()])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_on_inputs": True}, "data.train_on_inputs: an objective that compares answers trains the answers alone"),
        ({"truncation": "split"}, "data.truncation: split would give parts of answers to compare"),
    ],
)
def test_options_that_do_not_go_with_it(encoding, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "a.jsonl", {"prompt": "P", "chosen": " a", "rejected": " b"}), encoding, **options)


def test_equal_and_empty_halves(tmp_path):
    good = {"prompt": "P", "chosen": " a", "rejected": " b"}
    path = write(tmp_path / "a.jsonl", good, {**good, "rejected": " a"}, labelled("P", " a", True))
    rows = [good, {**good, "rejected": " a"}]
    report = balanced(load(write(path, *rows)).report)
    assert (report.kept, dict(report.dropped)) == (1, {"with equal chosen and rejected answers": 1})
    empty = write(
        tmp_path / "b.jsonl", good, {**good, "chosen": ""}, {**good, "rejected": None}, {"chosen": "P a", "rejected": "P a"}
    )
    with pytest.raises(UserError, match=r"b.jsonl:2: 'chosen' is empty, so there is nothing to compare"):
        load(empty)
    assert dict(balanced(load(empty, drop_empty=True).report).dropped) == {"empty": 3}
    words = " once upon a time there was a little girl"
    same_start = {"prompt": "P", "chosen": f"{words} a", "rejected": f"{words} b"}
    report = balanced(load(write(tmp_path / "c.jsonl", good, same_start), max_length=24, truncation="right").report)
    assert dict(report.dropped) == {"with equal chosen and rejected answers": 1}, "what truncation leaves is equal"


def test_a_prompt_that_is_longer_than_a_row(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "P", "chosen": " a", "rejected": " b"},
        {"prompt": "ab " * 90, "chosen": " a", "rejected": " b"},
    )
    dropped = balanced(load(path, max_length=64).report)
    assert dict(dropped.dropped) == {"longer than max_length": 1}
    total = sum(len(document.tokens) for document in units(load(path, max_length=1024))[1])
    assert any(f"those of 1 examples have up to {total} tokens: raise it" in warning for warning in dropped.warnings)
    cut = balanced(load(path, max_length=64, truncation="right").report)
    assert dict(cut.dropped) == {"without a trained token": 1}
    assert any("no trained token in one of their documents" in w and "a.jsonl:2" in w for w in cut.warnings)
    left = load(path, max_length=64, truncation="left")
    assert left.report.kept == 2 and dict(left.report.truncated) == {"left": 1}
    with pytest.raises(UserError, match=r"a.jsonl:2: the chosen and the rejected conversation have \d+ tokens together, more"):
        load(path, max_length=64, truncation="error")


@given(lengths=st.tuples(st.integers(1, 99), st.integers(1, 99)), capacity=st.integers(2, 120))
def test_rooms(lengths, capacity):
    """Two that fit are whole; otherwise each has half of the row at least, or is whole, and together they fit."""
    given_rooms = rooms(lengths, capacity)
    kept = [min(length, room) for length, room in zip(lengths, given_rooms, strict=True)]
    if sum(lengths) <= capacity:
        assert kept == list(lengths)
    else:
        assert sum(kept) <= capacity and all(k >= min(length, capacity // 2) for k, length in zip(kept, lengths, strict=True))
        assert sum(kept) >= capacity - 1


def test_bounds_count_the_whole_pair(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "Hello", "chosen": " world", "rejected": " you"})
    (length,) = [sum(len(document.tokens) for document in unit) for unit in units(load(path))]
    for options, reason in (
        ({"min_tokens": length + 1}, "shorter than min_tokens"),
        ({"max_tokens": length - 1}, "longer than"),
    ):
        with pytest.raises(UserError, match=f"none of 1 examples is left: 1 {reason}"):
            load(path, **options)
    assert load(path, min_tokens=length, max_tokens=length, max_length=length).report.kept == 1
    with pytest.raises(UserError, match="longer than max_length"):
        load(path, max_length=length - 1)
