"""Tests that, before an answer, training sees the ids that generation makes of the same prompt; other rows are counted.

Also tests spans: the trained text is found in the rendered template, whatever words messages and template have in common.
"""

import json
import random

import pytest
from data_tokenizers import CHATML, MARKED, WITH_BOS, WITHOUT_ENDS, byte_level, spaced
from tokenizers import Tokenizer, normalizers

from ftjax.data.encode import Encoder
from ftjax.data.example import Example
from ftjax.data.reader import to_examples
from ftjax.data.row import Row
from ftjax.data.template import example_prompt, render_prompt
from ftjax.errors import UserError

BLANK_LINE = CHATML.replace("{{ m.role }}\n", "{{ m.role }}\n\n").replace("assistant\n{%", "assistant\n\n{%")
PAIRS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_ALWAYS = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are A helpful assistant<|im_end|>\n{% endif %}" + CHATML
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # in the generation prompt only
TEMPLATES = {
    "chatml": CHATML, "marked": MARKED, "bos": WITH_BOS, "plain": WITHOUT_ENDS, "blank line": BLANK_LINE, "pairs": PAIRS,
    "system always": SYSTEM_ALWAYS, "no system": NO_SYSTEM, "thinks": THINKS,
}  # fmt: skip
BITS = [
    "a",
    "Answer",
    ":",
    " ",
    "  ",
    "\n",
    "\n\n",
    "5",
    "Hel",
    "lo",
    "é",
    "\t",
    "<",
    "|",
    "</s>",
    "<|im_end|>",
    "you",
    "'",
    ".",
]
COUNTED = ("prompt ids differ", "prompt differs")


def blank_lines(template=None):
    """Return a tokenizer that, like GPT-2's, makes one token of `\\n\\n` at the end of a text, and two before a word."""
    tokenizer = byte_level(template)
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    made["model"]["vocab"]["ĊĊ"] = len(made["model"]["vocab"])
    made["model"]["merges"].append(["Ċ", "Ċ"])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(made))
    return tokenizer


def stripping(template=None):
    tokenizer = byte_level(template)
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    return tokenizer


MAKERS = {"byte level": byte_level, "spaced": spaced, "blank lines": blank_lines, "stripping": stripping}


def row(**values) -> Example:
    return next(to_examples([Row(values, "a.jsonl:1")]))


def text(rng) -> str:
    while not (made := "".join(rng.choice(BITS) for _ in range(rng.randint(1, 7)))).strip():
        pass
    return made


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


FORMATS = {
    "completion": lambda rng: {"prompt": text(rng), "completion": text(rng)},
    "messages": lambda rng: {"prompt": [user(text(rng))], "completion": [assistant(text(rng))]},
    "instruction": lambda rng: {"instruction": text(rng), "input": text(rng), "output": text(rng), "system": text(rng)},
    "question": lambda rng: {"question": text(rng), "answer": text(rng)},
    "talk": lambda rng: {"messages": [user(text(rng)), assistant(text(rng))] * 2},
    "system": lambda rng: {"messages": [{"role": "system", "content": text(rng)}, user(text(rng)), assistant(text(rng))]},
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_the_prompt_of_every_row_is_what_generation_makes(make, template):
    tokenizer = MAKERS[make](TEMPLATES.get(template))
    tokenizer.bos_token = tokenizer.bos_token or "<|im_start|>"
    rng, kept = random.Random(3), 0
    for name, values in FORMATS.items():
        if template is None and name in ("messages", "talk", "system"):
            continue
        for _ in range(12):
            example, encoder = row(**values(rng)), Encoder(tokenizer)
            ids = encoder([example])[0].tokens.tolist()
            prompt = example_prompt(example, tokenizer)
            counted = any(encoder.notes[note] for note in COUNTED)
            assert ids[: len(prompt)] == prompt or counted, (name, example)
            kept += not counted
            if name != "talk" and template != "thinks":  # one answer, so no earlier turn can differ
                assert not counted, (name, example)
    assert kept or template == "thinks"


def test_every_answer_of_a_conversation_follows_its_own_prompt():
    """Every answer follows its prompt's ids, not only the last one."""
    talk = [user("Hello"), assistant("fine"), user("you"), assistant("round"), user("a"), assistant("little")]
    for make in (byte_level, spaced):
        tokenizer = make(WITH_BOS)
        document = Encoder(tokenizer)([row(messages=talk)])[0]
        starts = [n for n in range(1, len(document.weights)) if document.weights[n] and not document.weights[n - 1]]
        for number, start in zip((1, 3, 5), starts, strict=True):
            assert document.tokens[:start].tolist() == render_prompt(talk[:number], tokenizer)


def test_tokens_that_split_otherwise_before_an_answer():
    tokenizer = blank_lines()
    prompt = render_prompt("Answer:\n\n", tokenizer)
    whole = tokenizer("Answer:\n\nfour")["input_ids"]
    assert whole[: len(prompt)] != prompt, "this tokenizer should split them otherwise"
    document = Encoder(tokenizer)([row(prompt="Answer:\n\n", completion="four")])[0]
    assert document.tokens[: len(prompt)].tolist() == prompt
    assert not document.weights[: len(prompt)].any() and document.weights[len(prompt) :].all()
    assert tokenizer.decode(document.tokens, skip_special_tokens=True) == "Answer:\n\nfour"


def test_later_answers_whose_prompts_cannot_be_the_same_are_counted():
    tokenizer = blank_lines(BLANK_LINE)
    encoder = Encoder(tokenizer)
    document = encoder([row(messages=[user("Hello"), assistant("fine"), user("you"), assistant("round")])])[0]
    assert encoder.notes["prompt ids differ"] == 1
    first = int(document.weights.argmax())
    assert document.tokens[:first].tolist() == render_prompt([user("Hello")], tokenizer)
    last = Encoder(tokenizer, last_turn_only=True)
    last([row(messages=[user("Hello"), assistant("fine"), user("you"), assistant("round")])])
    assert not last.notes["prompt ids differ"]


def test_all_that_is_trained_and_a_prompt_that_differs_is_counted():
    tokenizer = blank_lines(BLANK_LINE)
    encoder = Encoder(tokenizer, train_on_inputs=True)
    encoder([row(messages=[user("Hello"), assistant("fine")])])
    assert encoder.notes["prompt ids differ"] == 1
    same = Encoder(blank_lines(CHATML), train_on_inputs=True)
    same([row(messages=[user("Hello"), assistant("fine")])])
    assert not same.notes["prompt ids differ"] and not same.notes["prompt differs"]


# Spans


def trained(tokenizer, document) -> str:
    return "".join(tokenizer.decode([t]) if w else "|" for t, w in zip(document.tokens, document.weights, strict=True)).strip(
        "|"
    )


@pytest.mark.parametrize("template", [CHATML, SYSTEM_ALWAYS, WITHOUT_ENDS], ids=["chatml", "system always", "plain"])
@pytest.mark.parametrize("said", ["A", "You", "assistant", "system", "user", "a", "<|im_start|", "\n"])
def test_an_answer_that_speaks_first_in_words_of_the_frame(template, said):
    tokenizer = byte_level(template)
    if not said.strip():
        said = "\nA"
    document = Encoder(tokenizer)([row(messages=[assistant(said), user("a")])])[0]
    end = "" if template is WITHOUT_ENDS else "<|im_end|>"
    assert trained(tokenizer, document) == f"{said}{end}\n"
    alone = Encoder(tokenizer)([row(prompt=[], completion=[assistant(said)])])[0]
    assert trained(tokenizer, alone).startswith(said) and not alone.weights[0]
    greeted = [{"role": "system", "content": said}, assistant(said), user(said), assistant(said)]
    last = Encoder(tokenizer, last_turn_only=True)([row(messages=greeted)])[0]
    assert trained(tokenizer, last).startswith(said)


def test_an_eos_behind_the_whole_conversation():
    """An EOS after the whole conversation, as in Phi-3's template, is not part of an earlier turn."""
    tokenizer = byte_level(CHATML.replace("{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add"))
    document = Encoder(tokenizer)([row(messages=[user("a"), assistant("fine"), user("a"), assistant("round")])])[0]
    runs = [run for run in trained(tokenizer, document).split("|im_end|") if run]
    assert trained(tokenizer, document).count("<|endoftext|>") == 1 and len(runs) == 3


def test_a_beginning_that_generation_alone_writes():
    tokenizer = byte_level(THINKS)
    encoder = Encoder(tokenizer)
    document = encoder([row(messages=[user("a"), assistant("fine")])])[0]
    assert trained(tokenizer, document) == "fine<|im_end|>\n" and encoder.notes["prompt differs"] == 1
    with_it = Encoder(tokenizer)
    document = with_it([row(messages=[user("a"), assistant("<think>\nHello</think>fine")])])[0]
    assert trained(tokenizer, document) == "Hello</think>fine<|im_end|>\n" and not with_it.notes["prompt differs"]


def test_marks_that_begin_within_the_prompt():
    """The template's generation marks say what is trained; the prompt still has the ids of generation."""
    tokenizer = blank_lines(
        MARKED.replace("{{ m.role }}\n{% if", "{% if").replace("{% generation %}", "{% generation %}{{ m.role }}\n")
    )
    example = row(messages=[user("a"), assistant("fine")])
    document = Encoder(tokenizer)([example])[0]
    prompt = example_prompt(example, tokenizer)
    assert trained(tokenizer, document).startswith("assistant\n") or document.tokens[: len(prompt)].tolist() == prompt


# Ends


@pytest.mark.parametrize("template", [WITHOUT_ENDS, CHATML, MARKED.replace("<|im_end|>\n{% endg", "{% endg", 1)])
@pytest.mark.parametrize("said", ["fine", "<json>{}</json>", "<json>", "fine</json> "])
def test_only_an_end_ends_an_answer(template, said):
    tokenizer = byte_level(template)
    tokenizer.add_tokens(["<json>", "</json>"], special_tokens=True)
    document = Encoder(tokenizer)([row(messages=[user("a"), assistant(said)])])[0]
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert ends & set(document.tokens[document.weights > 0].tolist()[-2:])


def test_the_line_behind_an_end_is_trained_as_trl_marks_it():
    """The newline that ChatML writes after the end token belongs to the turn, as docs/data.md says."""
    tokenizer = byte_level(CHATML)
    document = Encoder(tokenizer)([row(messages=[user("a"), assistant("fine")])])[0]
    assert trained(tokenizer, document) == "fine<|im_end|>\n"


def test_unknown_characters_in_answers_are_counted():
    made = Tokenizer.from_str(spaced().backend_tokenizer.to_str().replace('"byte_fallback":true', '"byte_fallback":false'))
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    encoder = Encoder(tokenizer)
    encoder([row(prompt="Hello", completion="漢"), row(prompt="漢", completion="world")])
    assert encoder.notes["unknown tokens"] == 1
    known = Encoder(byte_level())
    known([row(prompt="Hello", completion="漢")])
    assert not known.notes["unknown tokens"]


def test_several_templates_and_no_default():
    tokenizer = byte_level()
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(UserError, match=r"rag, tool_use and none is the default.*model.chat_template"):
        Encoder(tokenizer)([row(messages=[user("a"), assistant("fine")])])
    with pytest.raises(UserError, match="none is the default"):
        render_prompt("Hello", tokenizer)
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert Encoder(tokenizer)([row(messages=[user("a"), assistant("fine")], tools=tools)])[0] is not None


def test_one_of_several_templates_by_its_name(tmp_path):
    from ftjax.config import ModelConfig
    from ftjax.hub.tokenizer.load import load_tokenizer

    tokenizer = byte_level()
    tokenizer.chat_template = {"rag": CHATML, "tool_use": MARKED}
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelConfig(path=str(tmp_path), chat_template="tool_use")).chat_template == MARKED
