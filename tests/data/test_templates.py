"""Tests masks under chat templates like those of published models: the answers and their end tokens are trained."""

import pytest
from data_tokenizers import byte_level, spaced

from ftjax.data.encode import Encoder
from ftjax.data.example import Example
from ftjax.data.reader import to_examples
from ftjax.data.row import Row
from ftjax.data.template import example_prompt, render_prompt
from ftjax.errors import UserError

BEGIN, END = "<|im_start|>", "<|im_end|>"
GENERATION = "{% if add_generation_prompt %}" + BEGIN + "assistant\n\n{% endif %}"
SHAPES = {
    # The system message is always written, and every content is stripped.
    "llama3": (
        "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
        f"{BEGIN}system\n\nToday is Monday.\n{{{{ system }}}}{END}"
        "{% for m in messages %}" + BEGIN + "{{ m.role }}\n\n{{ m.content | trim }}" + END + "{% endfor %}" + GENERATION
    ),
    # A BOS and an EOS around every pair, and no generation prompt.
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # A default system message, as in SmolLM2 and Qwen 2.5.
    "default_system": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}" + BEGIN + "system\nBe kind." + END + "\n{% endif %}"
        + BEGIN + "{{ m.role }}\n{{ m.content }}" + END + "\n{% endfor %}"
        "{% if add_generation_prompt %}" + BEGIN + "assistant\n{% endif %}"
    ),
    # The assistant's role has another name.
    "gemma": (
        "{{ bos_token }}{% for m in messages %}" + BEGIN + "{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}" + END + "\n{% endfor %}{% if add_generation_prompt %}" + BEGIN + "model\n{% endif %}"
    ),
    # Roles are plain text, and EOS ends every turn.
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}  # fmt: skip
ENDS = {"llama3": END, "llama2": " EOS", "default_system": f"{END}\n", "gemma": f"{END}\n", "zephyr": "EOS\n"}
THINKING = (  # only the last answer keeps its reasoning
    "{% for m in messages %}" + BEGIN + "{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}(thought) {% endif %}"
    "{{ m.content }}" + END + "\n{% endfor %}{% if add_generation_prompt %}" + BEGIN + "assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "fine, thank you"},
]


def talk(messages) -> Example:
    return next(to_examples([Row({"messages": messages}, "a.jsonl:1")]))


def runs(tokenizer, document) -> list[str]:
    """Return the text of each trained run, with EOS as `EOS` and without spaces added by decoding."""
    found, inside = [], False
    for token, weight in zip(document.tokens.tolist(), document.weights, strict=True):
        if weight:
            found[len(found) - inside :] = [[*(found[-1] if inside else []), token]]
        inside = bool(weight)
    texts = [tokenizer.decode(ids).replace(tokenizer.eos_token, "EOS").replace(f"{END} \n", f"{END}\n") for ids in found]
    return [text.replace("EOS \n", "EOS\n").strip(" ") for text in texts]


@pytest.mark.parametrize("make", [byte_level, spaced])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_answers_and_their_ends_are_trained(shape, make):
    tokenizer = make(SHAPES[shape])
    if tokenizer.bos_token is None:
        tokenizer.bos_token = BEGIN
    document = Encoder(tokenizer)([talk(TALK)])[0]
    end = ENDS[shape]
    assert runs(tokenizer, document) == [f"Hello there{end}", f"fine, thank you{end}"]
    assert document.weights[0] == 0 and set(document.weights.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("make", [byte_level, spaced])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turns", [TALK, TALK[:2], TALK[1:]], ids=["two pairs", "one pair", "assistant first"])
def test_what_stands_before_the_last_answer_is_what_generation_makes(shape, make, turns):
    tokenizer = make(SHAPES[shape])
    if tokenizer.bos_token is None:
        tokenizer.bos_token = BEGIN
    given = talk(turns)
    document = Encoder(tokenizer)([given])[0]
    prompt = example_prompt(given, tokenizer)
    assert document.tokens[: len(prompt)].tolist() == prompt == render_prompt(turns[:-1], tokenizer)
    assert not document.weights[len(prompt) - 1] and document.weights[len(prompt)] == 1


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "llama2"])
def test_one_bos_whether_the_template_the_tokenizer_or_both_write_it(shape):
    tokenizer = spaced(SHAPES[shape])
    for turns in (TALK, TALK[:2], [{"role": "system", "content": "Be brief."}, *TALK]):
        ids = Encoder(tokenizer)([talk(turns)])[0].tokens.tolist()
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert ids[: len(render_prompt(turns[:-1], tokenizer))] == render_prompt(turns[:-1], tokenizer)


def test_a_bos_before_every_pair_is_kept_as_the_template_writes_it():
    tokenizer = spaced(SHAPES["llama2"])
    ids = Encoder(tokenizer)([talk(TALK)])[0].tokens.tolist()
    assert ids == tokenizer(tokenizer.apply_chat_template(TALK, tokenize=False), add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 2 and ids[0] == tokenizer.bos_token_id != ids[1]


def test_a_template_that_writes_the_last_answer_otherwise():
    tokenizer = byte_level(THINKING)
    with pytest.raises(UserError, match=r"a.jsonl:1: .* message 1 cannot be told apart.*last_turn_only"):
        Encoder(tokenizer)([talk(TALK)])
    document = Encoder(tokenizer, last_turn_only=True)([talk(TALK)])[0]
    assert runs(tokenizer, document) == [f"(thought) fine, thank you{END}\n"]


def test_the_template_of_smollm2():
    """Reads the template from the model that `ftjax demo --only-model` downloads."""
    from pathlib import Path

    from ftjax.hub.gguf.tokenizer import gguf_tokenizer

    model = Path(__file__).parents[2] / "demo" / "model" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not model.is_file():
        pytest.skip("the demo's model is not there; ftjax demo --only-model fetches it")
    tokenizer = gguf_tokenizer(model)
    document = Encoder(tokenizer)([talk(TALK)])[0]
    assert tokenizer.eos_token == END
    assert runs(tokenizer, document) == ["Hello thereEOS\n", "fine, thank youEOS\n"]
    text = tokenizer.decode(document.tokens)
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False) and text.startswith(f"{BEGIN}system\n")
