"""Tests which tokens are trained: BOS, EOS, boundaries and turns (traps 3, 4, 5 and 7)."""

from dataclasses import replace

import numpy as np
import pytest
from data_tokenizers import (
    CHATML,
    FORGETFUL,
    MARKED,
    MARKED_WITHOUT_END,
    WITH_BOS,
    WITH_TOOLS,
    WITHOUT_ENDS,
    byte_level,
    spaced,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ftjax.data.encode import Encoder
from ftjax.data.example import Example
from ftjax.data.reader import to_examples
from ftjax.data.row import Row
from ftjax.data.template import example_prompt, render_prompt
from ftjax.errors import UserError

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "fine, thank you"},
]


def example(**values) -> Example:
    return next(to_examples([Row(values, "a.jsonl:1")]))


def encode(tokenizer, given, **options):
    return Encoder(tokenizer, **options)([given])[0]


def trained(tokenizer, document) -> str:
    """Return the trained text, with a bar between runs."""
    texts, run = [], []
    for token, weight in zip(document.tokens.tolist(), document.weights, strict=True):
        if weight:
            run.append(token)
        elif run:
            texts, run = [*texts, run], []
    return "|".join(tokenizer.decode(ids) for ids in [*texts, run] if ids)


# Plain text


@pytest.mark.parametrize("make", [byte_level, spaced])
def test_a_completion_and_its_end_are_trained(make):
    tokenizer = make()
    document = encode(tokenizer, example(prompt="Question: What is two plus two?\nAnswer:", completion=" four"))
    assert trained(tokenizer, document) in (" four" + tokenizer.eos_token, "four" + tokenizer.eos_token)
    assert document.tokens[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id and document.weights[-1] == 1
    assert np.count_nonzero(document.tokens == tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("text", ["Hello world", "<s>Hello world", " Hello", "Hello world</s>", "<s>"])
def test_exactly_one_bos_and_one_eos(text):
    tokenizer = spaced()
    ids = encode(tokenizer, example(text=text)).tokens.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert render_prompt(text, tokenizer).count(tokenizer.bos_token_id) == 1


def test_all_of_a_text_is_trained_but_the_bos():
    document = encode(spaced(), example(text="Hello world"))
    assert document.weights.tolist() == [0.0] + [1.0] * (len(document.tokens) - 1)


def test_train_on_inputs():
    for make in (byte_level, spaced):
        given = example(prompt="Hello", completion=" world")
        assert encode(make(), given, train_on_inputs=True).weights[1:].all()
        assert not encode(make(), given).weights.all()
        talk = encode(make(WITH_BOS if make is spaced else CHATML), example(messages=TALK), train_on_inputs=True)
        assert talk.weights[1:].all()


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no EOS token"):
        encode(tokenizer, example(prompt="Hello", completion="world"))


def test_the_truncation_and_padding_of_a_tokenizer_file_are_not_used():
    tokenizer = byte_level()
    whole = encode(tokenizer, example(text="Hello world, how are you today?")).tokens.tolist()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert encode(tokenizer, example(text="Hello world, how are you today?")).tokens.tolist() == whole


# The boundary


@pytest.mark.parametrize("make", [byte_level, spaced])
@pytest.mark.parametrize(
    "prompt, completion",
    [
        ("Hello wor", "ld"),
        ("Hello ", "world"),
        ("Answer", ":"),
        ("Hello\n", "\n\nworld"),
        ("", "world"),
        ("thank yo", "u. I am"),
    ],
)
def test_tokens_that_merge_across_the_boundary(make, prompt, completion):
    tokenizer = make()
    document = encode(tokenizer, example(prompt=prompt, completion=completion))
    before = render_prompt(prompt, tokenizer)
    first = int(np.argmax(document.weights > 0))
    assert document.tokens[:first].tolist() == before, "the model sees another prompt than when it generates"
    text = tokenizer.decode(document.tokens, skip_special_tokens=True)
    assert text == prompt + completion
    assert document.weights[first:].all()


texts = st.text(st.sampled_from("Helo wrd,\n.42'é漢 \t🙂Answer:isthe"), max_size=24)


@settings(max_examples=300, deadline=None)
@given(prompt=texts, completion=texts.filter(lambda text: text.strip()), make=st.sampled_from([byte_level, spaced]))
def test_the_prompt_is_what_generation_sees_and_no_text_is_lost(prompt, completion, make):
    tokenizer = make()
    document = encode(tokenizer, example(prompt=prompt, completion=completion))
    before = render_prompt(prompt, tokenizer)
    assert document.tokens[: len(before)].tolist() == before
    assert not document.weights[: len(before)].any() and document.weights[len(before) :].all()
    assert tokenizer.decode(document.tokens, skip_special_tokens=True) == prompt + completion


def test_the_text_tokenised_whole_where_nothing_merges():
    tokenizer = byte_level()
    document = encode(tokenizer, example(prompt="Hello world,", completion=" how are you"))
    assert document.tokens[:-1].tolist() == tokenizer("Hello world, how are you")["input_ids"]


# Conversations


@pytest.mark.parametrize("make, template", [(byte_level, CHATML), (byte_level, MARKED), (spaced, WITH_BOS)])
def test_the_assistants_turns_and_their_ends_are_trained(make, template):
    tokenizer = make(template)
    document = encode(tokenizer, example(messages=TALK))
    assert trained(tokenizer, document).replace(" \n", "\n") == "Hello there<|im_end|>\n|fine, thank you<|im_end|>\n"
    plain = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert document.tokens.tolist() == plain


def test_marks_are_the_mask_of_transformers():
    tokenizer = byte_level(MARKED)
    theirs = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    document = encode(tokenizer, example(messages=TALK))
    assert document.tokens.tolist() == theirs["input_ids"]
    assert document.weights.astype(int).tolist() == theirs["assistant_masks"]


def test_an_end_of_turn_outside_the_marks_is_trained():
    tokenizer = byte_level(MARKED_WITHOUT_END)
    encoder = Encoder(tokenizer)
    document = encoder([example(messages=TALK)])[0]
    assert trained(tokenizer, document) == "Hello there<|im_end|>|fine, thank you<|im_end|>"
    assert encoder.notes["end outside the marks"] == 2


def test_a_template_that_writes_no_end_gets_an_eos():
    tokenizer = byte_level(WITHOUT_ENDS)
    encoder = Encoder(tokenizer)
    document = encoder([example(messages=TALK)])[0]
    assert document.tokens[-1] == tokenizer.eos_token_id and document.weights[-1] == 1
    assert encoder.notes["end added"] == 1
    asked = encoder([example(messages=TALK[:-1])])[0]  # without an answer at the end there is no end token
    assert asked.tokens[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("template", [WITH_BOS, CHATML])
def test_one_bos_in_a_conversation(template):
    tokenizer = spaced(template)
    document = encode(tokenizer, example(messages=TALK))
    assert document.tokens.tolist().count(tokenizer.bos_token_id) == 1 and document.tokens[0] == tokenizer.bos_token_id
    assert document.weights[0] == 0
    prompt = render_prompt(TALK[:-1], tokenizer)
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert document.tokens[: len(prompt)].tolist() == prompt


def test_train_false_and_weight_of_a_message():
    tokenizer = byte_level(CHATML)
    for template in (CHATML, MARKED):
        tokenizer.chat_template = template
        quiet = [*TALK[:2], {**TALK[2], "train": False}, *TALK[3:]]
        assert trained(tokenizer, encode(tokenizer, example(messages=quiet))) == "fine, thank you<|im_end|>\n"
        half = encode(tokenizer, example(messages=[*TALK[:2], {**TALK[2], "weight": 0.5}, *TALK[3:]]))
        assert set(half.weights.tolist()) == {0.0, 0.5, 1.0}
        assert half.tokens.tolist() == encode(tokenizer, example(messages=TALK)).tokens.tolist()
    with pytest.raises(UserError, match="only the assistant's are"):
        example(messages=[{**TALK[1], "train": True}, TALK[2]])


def test_the_last_turn_only():
    for template in (CHATML, MARKED, FORGETFUL):
        tokenizer = byte_level(template)
        document = encode(tokenizer, example(messages=TALK), last_turn_only=True)
        assert trained(tokenizer, document) == "fine, thank you<|im_end|>\n"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = byte_level(FORGETFUL)
    with pytest.raises(UserError, match=r"a.jsonl:1: the chat template writes .* generation %\} .*last_turn_only"):
        encode(tokenizer, example(messages=TALK))
    assert trained(tokenizer, encode(tokenizer, example(messages=TALK[:3]))) == "Hello there<|im_end|>\n"


def test_an_assistant_that_speaks_first():
    tokenizer = byte_level(CHATML)
    document = encode(tokenizer, example(messages=[TALK[2], TALK[1]]))
    assert trained(tokenizer, document) == "Hello there<|im_end|>\n"


def test_a_prompt_and_a_completion_of_messages_train_what_follows_the_prompt():
    tokenizer = byte_level(CHATML)
    given = example(prompt=TALK[:4], completion=TALK[4:])
    assert trained(tokenizer, encode(tokenizer, given)) == "fine, thank you<|im_end|>\n"
    assert example_prompt(given, tokenizer) == render_prompt(TALK[:4], tokenizer)


def test_tools_reach_the_template():
    tokenizer = byte_level(WITH_TOOLS)
    tools = [{"type": "function", "function": {"name": "add"}}]
    given = example(messages=TALK, tools=tools)
    text = tokenizer.decode(encode(tokenizer, given).tokens)
    assert '"name": "add"' in text and text == tokenizer.apply_chat_template(TALK, tools=tools, tokenize=False)


def test_messages_without_a_template_are_refused():
    with pytest.raises(UserError, match=r"a.jsonl:1: this tokenizer has no chat template.*model.chat_template"):
        encode(byte_level(), example(messages=TALK))


def test_what_a_template_refuses_is_told_with_its_place():
    tokenizer = byte_level("{{ raise_exception('no system role') }}")
    with pytest.raises(UserError, match=r"a.jsonl:1: the chat template refuses these messages: no system role"):
        encode(tokenizer, example(messages=TALK))


# Prompts that are text


def test_a_prompt_goes_through_the_template_where_there_is_one():
    tokenizer, given = byte_level(CHATML), example(prompt="Hello", completion="Hello there")
    document = encode(tokenizer, given)
    assert document.tokens.tolist() == encode(tokenizer, example(messages=TALK[1:3])).tokens.tolist()
    assert example_prompt(given, tokenizer) == render_prompt("Hello", tokenizer)
    raw = replace(given, prompt_format="raw")
    assert tokenizer.decode(encode(tokenizer, raw).tokens) == "HelloHello there<|endoftext|>"
    assert example_prompt(raw, tokenizer) == tokenizer("Hello")["input_ids"] == render_prompt("Hello", tokenizer, chat=False)


@settings(max_examples=100, deadline=None)
@given(
    turns=st.lists(texts.filter(lambda text: text.strip()), min_size=2, max_size=2),
    which=st.sampled_from([(byte_level, CHATML), (byte_level, MARKED), (spaced, WITH_BOS), (spaced, CHATML)]),
)
def test_training_sees_the_prompt_that_generation_makes(turns, which):
    make, template = which
    tokenizer = make(template)
    turns = turns[: len(turns) // 2 * 2]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    given = example(messages=messages)
    document = encode(tokenizer, given)
    prompt = example_prompt(given, tokenizer)
    assert document.tokens[: len(prompt)].tolist() == prompt
    assert document.weights[len(prompt) :].all()


# Given tokens


def test_input_ids_and_labels():
    tokenizer = byte_level()
    document = encode(tokenizer, example(input_ids=[5, 6, 7], labels=[-100, 6, 7]))
    assert document.tokens.tolist() == [5, 6, 7] and document.weights.tolist() == [0, 1, 1]
    with pytest.raises(UserError, match=r"a.jsonl:1: input_ids\[1\] is 100000.*another model"):
        encode(tokenizer, example(input_ids=[5, 100000]))
