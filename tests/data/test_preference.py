"""Tests preferences: the common beginning is the prompt, and only the answer after it is trained."""

import json

import pytest

from ftjax.config.data import SourceConfig
from ftjax.data.pairs import Pairs
from ftjax.data.reader import Reader, to_examples
from ftjax.data.row import Row
from ftjax.data.unpaired import Unpaired
from ftjax.errors import UserError


def read(values, **source):
    return next(to_examples([Row(values, "a.jsonl:1")], SourceConfig(path="a.jsonl", **source)))


def texts_of(example):
    """The contents of the prompt's messages and of those of the answer."""
    texts = [message["content"] for message in example.messages]
    return texts[: example.prompt_turns], texts[example.prompt_turns :]


def turns(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


ANSWER = turns("A", first="assistant")
SYSTEM = {"role": "system", "content": "S"}


@pytest.mark.parametrize(
    "row, asked, answer",
    [
        ({"prompt": "Q", "chosen": turns("Q", "A"), "rejected": turns("Q", "B")}, ["Q"], ["A"]),
        ({"prompt": turns("Q"), "chosen": turns("Q", "A"), "rejected": turns("Q", "B")}, ["Q"], ["A"]),
        ({"prompt": "Q", "chosen": [SYSTEM, *turns("Q", "A")], "rejected": [SYSTEM, *turns("Q", "B")]}, ["S", "Q"], ["A"]),
        ({"prompt": "r", "chosen": turns("q", "a", "r", "A"), "rejected": turns("q", "a", "r", "B")}, ["q", "a", "r"], ["A"]),
        ({"prompt": turns("Q"), "chosen": ANSWER, "rejected": ANSWER}, ["Q"], ["A"]),
        ({"chosen": turns("Q", "A"), "rejected": turns("Q", "B")}, ["Q"], ["A"]),
        ({"prompt": None, "chosen": turns("q", "a", "r", "A"), "rejected": turns("q", "a", "r", "B")}, ["q", "a", "r"], ["A"]),
        ({"chosen": turns("Q", "A"), "rejected": turns("Q", "A")}, ["Q"], ["A"]),
        ({"prompt": "Q", "completion": turns("Q", "A")}, ["Q"], ["A"]),
        ({"chosen": {"role": ["user", "assistant"], "content": ["Q", "A"]},
          "rejected": {"role": ["user", "assistant"], "content": ["Q", "B"]}}, ["Q"], ["A"]),
        # as LLaMA-Factory and axolotl have them: the conversation so far, and one message each
        ({"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"},
          "rejected": {"from": "gpt", "value": "B"}}, ["Q"], ["A"]),
        ({"messages": turns("Q"), "chosen": ANSWER[0], "rejected": {**ANSWER[0], "content": "B"}}, ["Q"], ["A"]),
        ({"messages": turns("Q"), "chosen": "A", "rejected": "B"}, ["Q"], ["A"]),
        ({"messages": turns("other", "talk"), "chosen": turns("Q", "A"), "rejected": turns("Q", "B")}, ["Q"], ["A"]),
        # tables hold messages as JSON text
        ({"chosen": json.dumps(turns("Q", "A")), "rejected": json.dumps(turns("Q", "B"))}, ["Q"], ["A"]),
        ({"prompt": json.dumps(turns("Q")), "chosen": json.dumps(ANSWER), "rejected": json.dumps(ANSWER)}, ["Q"], ["A"]),
        ({"prompt": json.dumps(turns("Q")), "completion": json.dumps(ANSWER)}, ["Q"], ["A"]),
        # a question beside whole conversations is none of them
        ({"question": "R", "chosen": turns("Q", "A"), "rejected": turns("Q", "B")}, ["Q"], ["A"]),
    ],
)  # fmt: skip
def test_what_messages_have_in_common_is_the_prompt(row, asked, answer):
    example = read(row, format="prompt_completion" if "completion" in row else "preference")
    assert texts_of(example) == (asked, answer)


@pytest.mark.parametrize(
    "chosen, rejected, prompt, answer",
    [
        ("Q: 1+1?\nA: two", "Q: 1+1?\nA: three", "Q: 1+1?\nA:", " two"),
        ("Is it red? It is blue.", "Is it red? It is green.", "Is it red? It is", " blue."),
        ("Frage?\nJa", "Frage?\nNein", "Frage?\n", "Ja"),
        ("一加一等于二", "一加一等于三", "一加一等于", "二"),
    ],
)
def test_what_texts_have_in_common_is_the_prompt_up_to_a_word(chosen, rejected, prompt, answer):
    example = read({"chosen": chosen, "rejected": rejected})
    assert (example.prompt, example.completion) == (prompt, answer)


@pytest.mark.parametrize(
    "row, asked",
    [
        ({"question": "Which?"}, ["Which?"]),
        ({"system": "S", "question": "Which?"}, ["S", "Which?"]),
        ({"instruction": "Which?", "input": ""}, ["Which?"]),
        ({"instruction": "Add.", "input": "2 3", "system": "S", "history": [["q", "a"]]}, ["S", "q", "a", "Add.\n\n2 3"]),
        ({"prompt": None, "question": "Which?"}, ["Which?"]),
        ({"prompt": "Which?", "question": "Another?"}, ["Which?"]),
    ],
)
def test_a_question_or_an_instruction_beside_two_texts_is_the_prompt(row, asked):
    """Also if both texts begin alike, which would be the prompt without them."""
    example = read({**row, "chosen": "It is red.", "rejected": "It is blue."})
    assert texts_of(example) == (asked, ["It is red."]) and texts_of(example.rejected) == (asked, ["It is blue."])
    assert example.completion == "It is red."


def test_a_question_that_both_texts_repeat():
    example = read({"question": "Which is it?", "chosen": "Which is it? Red", "rejected": "Which is it? Blue"})
    assert (example.prompt, example.completion) == ("Which is it?", " Red")


def test_a_column_that_looks_like_the_prompt_has_to_be_named():
    """The common beginning of two answers is no prompt, and what was asked would be lost."""
    row = {"query": "Which?", "chosen": "It is red.", "rejected": "It is blue."}
    with pytest.raises(UserError, match=r"^a.jsonl:1: there is no prompt, and 'query' looks like one: .*\{prompt: query\}"):
        read(row)
    assert texts_of(read(row, columns={"prompt": "query"})) == (["Which?"], ["It is red."])
    whole = {"query": "Which?", "chosen": "Q: Which?\nA: red", "rejected": "Q: Which?\nA: blue"}
    assert read(whole).prompt == "Q: Which?\nA:"


def test_messages_as_python_prints_them_are_refused():
    with pytest.raises(UserError, match=r"^a.jsonl:1: 'chosen' holds messages as Python prints them; write them as JSON"):
        read({"chosen": str(turns("Q", "A")), "rejected": str(turns("Q", "B"))})


def test_an_answer_that_is_a_list_of_other_objects_stays_text():
    answer = '[{"role": "CEO", "name": "Ann"}]'
    assert read({"prompt": "Q", "chosen": answer, "rejected": "[]"}).completion == answer


@pytest.mark.parametrize("opening", ["\n\n", ""])
def test_a_transcript_is_a_conversation(opening):
    start = f"{opening}Human: q\n\nAssistant: a\n\nHuman: What is 1+1?\n\nAssistant:"
    example = read({"chosen": f"{start} It is 2.", "rejected": f"{start} It is 3."})
    assert [message["content"] for message in example.messages] == ["q", "a", "What is 1+1?", "It is 2."]
    assert example.prompt_turns == 3 and (example.prompt, example.completion) == (start, " It is 2.")


def test_a_prompt_of_some_words_that_both_texts_repeat():
    example = read({"prompt": "What is it?", "chosen": "What is it? Good", "rejected": "What is it? Bad"})
    assert (example.prompt, example.completion) == ("What is it?", " Good")
    greeting = read({"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"})
    assert greeting.completion == "Hi there"


@pytest.mark.parametrize(
    "row, message",
    [
        ({"chosen": "good", "rejected": "bad"}, "there is no prompt: name its column"),
        ({"chosen": ANSWER, "rejected": ANSWER}, "there is no prompt"),
        ({"chosen": "Q: a", "rejected": "Q: a"}, "nothing is left of an answer"),
        (
            {"prompt": "P", "chosen": turns("Q", "A"), "rejected": turns("Q", "B")},
            "a message of role user that is not the prompt's",
        ),
        ({"prompt": "P", "chosen": ANSWER, "rejected": "B"}, "expected both alike"),
        ({"prompt": "P", "chosen": {"text": "A"}, "rejected": "B"}, "'chosen' is an object, expected an answer as text"),
    ],
)
def test_what_cannot_be_split_is_refused(row, message):
    with pytest.raises(UserError, match=rf"^a.jsonl:1: .*{message}"):
        read(row)


@pytest.mark.parametrize(
    "label, wanted",
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), (0.0, False), ("True", True), ("false", False)],
)
def test_the_label_of_an_unpaired_preference(label, wanted):
    example = read({"prompt": "Q", "completion": "A", "label": label})
    assert (example.prompt, example.completion, example.wanted) == ("Q", "A", wanted)


def test_another_label_is_none_of_a_preference():
    assert read({"prompt": "Q", "completion": "A", "label": "maths"}).wanted
    assert read({"prompt": "Q", "completion": "A", "label": False}, format="prompt_completion").wanted
    with pytest.raises(UserError, match="'label' is 'maths', expected true or false"):
        read({"prompt": "Q", "completion": "A", "label": "maths"}, format="kto")


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": turns("q", "a", "Q", "A")},
        {"conversations": [{"from": who, "value": text} for who, text in zip(["human", "gpt"] * 2, "qaQA", strict=True)]},
        {"messages": json.dumps(turns("q", "a", "Q", "A"))},
    ],
)
def test_the_label_of_a_conversation_is_that_of_its_last_answer(columns):
    """As LLaMA-Factory has it. Other objectives train the whole conversation."""
    rows = [Row({**columns, "label": label}, "a.jsonl:1") for label in (True, 0)]
    reader = Reader(SourceConfig(path="a.jsonl"), rows, prefers=Unpaired().formats)
    found = [reader(row) for row in rows]
    assert [example.wanted for example in found] == [True, False] and all(example.labelled for example in found)
    assert texts_of(found[0]) == (["q", "a", "Q"], ["A"])
    with pytest.raises(UserError, match="'label' is 'good', expected true or false"):
        reader(Row({**columns, "label": "good"}, "a.jsonl:1"))
    assert not next(to_examples(rows)).labelled
    with pytest.raises(UserError, match=r"the last message is of role user; the label is that of an answer"):
        reader(Row({"messages": turns("q", "a", "Q"), "label": True}, "a.jsonl:1"))


@pytest.mark.parametrize(
    "row, advice",
    [
        ({"prompt": "Q", "winner": "A", "loser": "B"}, "{chosen: winner, rejected: loser}"),
        ({"prompt": "Q", "response_1": "A", "response_2": "B"}, "{prompt: NAME, chosen: NAME, rejected: NAME}"),
        ({"prompt": "Q", "response": "A", "label": True}, "{completion: response}"),
    ],
)
def test_advice_for_an_objective_that_compares_answers(row, advice):
    """Only what it can use is named."""
    with pytest.raises(UserError) as caught:
        Reader(SourceConfig(path="a.jsonl"), [Row(row, "a.jsonl:1")], prefers=Pairs().formats)
    assert 'expected columns "chosen" and "rejected" or "prompt" and "completion" and "label"; found' in str(caught.value)
    assert advice in str(caught.value) and "document" not in str(caught.value)
