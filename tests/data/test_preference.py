"""Tests preferences: the common beginning is the prompt, and only the answer after it is trained."""

import pytest

from ftjax.config.data import SourceConfig
from ftjax.data.reader import to_examples
from ftjax.data.row import Row
from ftjax.errors import UserError


def read(values, **source):
    return next(to_examples([Row(values, "a.jsonl:1")], SourceConfig(path="a.jsonl", **source)))


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
    ],
)  # fmt: skip
def test_what_messages_have_in_common_is_the_prompt(row, asked, answer):
    example = read(row, format="prompt_completion" if "completion" in row else "preference")
    texts = [message["content"] for message in example.messages]
    assert (texts[: example.prompt_turns], texts[example.prompt_turns :]) == (asked, answer)


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
    "label, wanted", [(True, True), (False, False), (1, True), (0, False), ("True", True), ("false", False)]
)
def test_the_label_of_an_unpaired_preference(label, wanted):
    example = read({"prompt": "Q", "completion": "A", "label": label})
    assert (example.prompt, example.completion, example.wanted) == ("Q", "A", wanted)


def test_another_label_is_none_of_a_preference():
    assert read({"prompt": "Q", "completion": "A", "label": "maths"}).wanted
    assert read({"prompt": "Q", "completion": "A", "label": False}, format="prompt_completion").wanted
    with pytest.raises(UserError, match="'label' is 'maths', expected true or false"):
        read({"prompt": "Q", "completion": "A", "label": "maths"}, format="kto")
