"""From an example to token ids, each with the weight that it has in the loss.

Every token carries its weight from the moment it is encoded. The prompt `Hi` with the completion ` there`, for a tokenizer
with BOS, is `<s> Hi _there </s>` with weights `0 0 1 1`.

A prompt is tokenised exactly as `generate` will tokenise it, and the completion follows; where the tokenizer would merge
characters across the boundary, the completion is tokenised by itself, since no generation starts in the middle of a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftjax.data.formats import Example, Message
from ftjax.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document, and 1.0 for each that is trained (as a target), else 0.0."""

    tokens: list[int]
    weights: list[float]
    where: str


def render_prompt(prompt: str | Sequence[Message], tokenizer: Any) -> list[int]:
    """What comes before the answer, with exactly one BOS and, for a conversation, the generation prompt."""
    if isinstance(prompt, str):
        if tokenizer.chat_template:
            prompt = [{"role": "user", "content": prompt}]
        else:
            return _prompt_ids(prompt, tokenizer)
    return _chat_ids(_render(list(prompt), tokenizer, True, "the prompt"), tokenizer)[0]


def encode(example: Example, tokenizer: Any) -> Encoded:
    """One document. A prompt with a completion goes through the chat template where the tokenizer has one.

    Raises UserError where the tokenizer lacks an EOS token, or a chat template that the data needs.
    """
    if example.text is not None:
        tokens = _end(_prompt_ids(example.text, tokenizer), tokenizer)
        first = 1 if tokens[:1] == [tokenizer.bos_token_id] and len(tokens) > 1 else 0
        return Encoded(tokens, [0.0] * first + [1.0] * (len(tokens) - first), example.where)
    if example.messages is not None:
        return _encode_messages(example.messages, tokenizer, example.where)
    if tokenizer.chat_template:
        turns = ({"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion})
        return _encode_messages(turns, tokenizer, example.where)
    prompt = _prompt_ids(example.prompt, tokenizer)
    whole = _prompt_ids(example.prompt + example.completion, tokenizer)
    if whole[: len(prompt)] == prompt:
        completion = whole[len(prompt) :]
    else:
        completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    completion = _end(completion, tokenizer)
    return Encoded(prompt + completion, [0.0] * len(prompt) + [1.0] * len(completion), example.where)


def _prompt_ids(text: str, tokenizer: Any) -> list[int]:
    """With the special tokens that the tokenizer puts before a text, none behind it, and never two BOS."""
    ids = tokenizer(text)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if len(ids) > 1 and ids[0] == ids[1] == bos and bos is not None:
        ids = ids[1:]
    if len(ids) > 1 and ids[-1] == eos and not text.endswith(tokenizer.eos_token or "\0"):
        ids = ids[:-1]
    return ids


def _end(ids: list[int], tokenizer: Any) -> list[int]:
    """With one EOS behind it."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so the model could not learn where an answer ends; set model.tokenizer")
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _render(messages: Sequence[Message], tokenizer: Any, generation: bool, where: str) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: this tokenizer has no chat template, which messages need; set model.chat_template (a Jinja template or "
            "the path of a .jinja file), or give prompt and completion columns"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # Jinja's errors, and whatever a template raises about the roles it sees
        raise UserError(f"{where}: the chat template refuses these messages: {error}") from None


def _chat_ids(text: str, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character spans; the template alone says which special tokens there are."""
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = out["input_ids"], out["offset_mapping"]
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids, spans = ids[1:], spans[1:]
    return ids, spans


def _encode_messages(messages: Sequence[Message], tokenizer: Any, where: str) -> Encoded:
    text = _render(messages, tokenizer, False, where)
    ids, spans = _chat_ids(text, tokenizer)
    trained = _assistant_spans(messages, text, tokenizer, where)
    weights = [float(any(start < stop and a <= start and stop <= b for a, b in trained)) for start, stop in spans]
    if messages[-1]["role"] == "assistant" and ids and ids[-1] not in tokenizer.all_special_ids and weights[-1]:
        ids, weights = _end(ids, tokenizer), [*weights, 1.0]  # a template that does not close the last turn
    return Encoded(ids, weights, where)


def _assistant_spans(messages: Sequence[Message], text: str, tokenizer: Any, where: str) -> list[tuple[int, int]]:
    """Character spans of the assistant's turns, end-of-turn token included, found by rendering turn by turn."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:number], tokenizer, True, where) if number else ""
        after = _render(messages[: number + 1], tokenizer, False, where)
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{where}: the chat template writes earlier turns differently once later ones follow, so what the assistant "
                "said cannot be told apart; use a template with {% generation %} marks (model.chat_template)"
            )
        stop = len(before) + len(after[len(before) :].rstrip())
        spans.append((len(before), stop))
    return spans
