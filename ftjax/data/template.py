"""Chat templates: the text of a conversation, which of its characters the assistant wrote, and the prompt of an answer.

`[user: Hi] [assistant: Hello]` with a ChatML template is
`<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n`, and the assistant's characters are
`Hello<|im_end|>\\n`: what the template writes between its generation prompt and the next turn.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ftjax.data.example import Example, Message
from ftjax.data.tokens import Tokens
from ftjax.errors import UserError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NOT_FOR_TEMPLATES = ("train", "weight")  # of a message: how it is trained, not what it says
Span = tuple[int, int]


def render_prompt(
    prompt: str | Sequence[Message],
    tokenizer: Any,
    *,
    chat: bool | None = None,
    tools: list[Any] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids before the answer, with exactly one BOS (where the tokenizer has one) and, in a chat, the generation prompt.

    Text goes through the chat template as a user's message where the tokenizer has one, as in training; `chat` says so, or
    not. `render_prompt("Hi", tokenizer)` are the ids of `<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n`; for a
    tokenizer without a chat template, those of `<s>Hi`.

    Raises UserError where messages need a chat template that is not there.
    """
    tokens = Tokens(tokenizer)
    if isinstance(prompt, str):
        if not (bool(tokenizer.chat_template) if chat is None else chat):
            return tokens.text_ids(prompt)
        prompt = [{"role": "user", "content": prompt}]
    template = Template(tokenizer, tools)
    text = template.render(list(prompt), True, "the prompt", tools, template_arguments)
    return with_chat_bos(tokens.batch([text])[0].ids, tokens)


def example_prompt(example: Example, tokenizer: Any) -> list[int] | None:
    """The ids that training saw before the example's (last) answer; None where it has no prompt."""
    question = example.question(tokenizer)
    if question is None:
        return None
    return render_prompt(
        question, tokenizer, chat=example.is_chat(tokenizer), tools=example.tools, template_arguments=example.template_arguments
    )


def with_chat_bos(ids: list[int], tokens: Tokens) -> list[int]:
    """A rendered conversation with one BOS, also where the template writes none or the first message begins with one."""
    if tokens.bos is None:
        return ids
    while ids[:1] == [tokens.bos]:
        ids = ids[1:]
    return [tokens.bos, *ids]


class Template:
    """The chat template of a tokenizer; `marked` where it tells by itself what the assistant wrote."""

    def __init__(self, tokenizer: Any, tools: list[Any] | None = None):
        if not tokenizer.chat_template:
            raise UserError(
                "this tokenizer has no chat template, which messages need: set model.chat_template to a Jinja template or the "
                "path of a .jinja file, or give prompt and completion columns"
            )
        self.text: str = tokenizer.get_chat_template(None, tools)
        self.marked = bool(GENERATION.search(self.text))
        self._special = tokenizer.special_tokens_map

    def render(
        self, messages: Sequence[Message], generation: bool, where: str, tools: Any = None, arguments: Any = None
    ) -> str:
        """The text of a conversation, with the prompt of the next answer where `generation`."""
        return self._render(messages, generation, where, tools, arguments, False)[0]

    def render_marked(self, messages: Sequence[Message], where: str, tools: Any, arguments: Any) -> tuple[str, list[Span]]:
        """And the spans between `{% generation %}` and `{% endgeneration %}`."""
        return self._render(messages, False, where, tools, arguments, True)

    def _render(self, messages, generation, where, tools, arguments, marks) -> tuple[str, list[Span]]:
        plain = [
            {key: value for key, value in m.items() if value is not None and key not in NOT_FOR_TEMPLATES} for m in messages
        ]
        try:
            texts, spans = render_jinja_template(
                [plain],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=generation,
                **{**self._special, **(arguments or {})},
            )
        except Exception as error:  # Jinja's errors, and whatever a template raises about the roles it sees
            reason = str(error).strip() or type(error).__name__
            raise UserError(f"{where}: the chat template refuses these messages: {reason}") from None
        return texts[0], [tuple(span) for span in spans[0]] if marks else []

    def turns(self, example: Example) -> tuple[str, list[tuple[int, Span]]]:
        """The text of a conversation, and for each of the assistant's messages (by number) its characters.

        Raises UserError where the template does not tell them and they cannot be found by rendering turn by turn.
        """
        messages, where, extra = example.messages, example.where, (example.tools, example.template_arguments)
        if self.marked:
            text, spans = self.render_marked(messages, where, *extra)
            spans = [span for span in spans if span[0] < span[1]]
            numbers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
            if len(numbers) == len(spans):
                return text, list(zip(numbers, spans, strict=True))
            if any("train" in m or "weight" in m for m in messages):
                raise UserError(
                    f"{where}: the chat template marks {len(spans)} turns of the assistant and there are {len(numbers)}, so it "
                    "cannot be told which of them train and weight mean"
                )
            return text, [(numbers[-1] if numbers and span == spans[-1] else -1, span) for span in spans]
        text = self.render(messages, False, where, *extra)
        found = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._before(messages, number, text, where, extra)
            last = number == len(messages) - 1
            after = text if last else self.render(messages[: number + 1], False, where, *extra)
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"{where}: the chat template writes a conversation's earlier turns differently once later ones follow, so "
                    f"what the assistant said in message {number} cannot be told apart. Set model.chat_template to a version "
                    "with {% generation %} marks around the assistant's turns, or set data.last_turn_only: true where the "
                    "last turn alone is to be trained"
                )
            found.append((number, (len(before), len(after))))
        return text, found

    def _before(self, messages: Sequence[Message], number: int, text: str, where: str, extra: tuple) -> str:
        """What stands before an answer, the generation prompt included."""
        if number:
            return self.render(messages[:number], True, where, *extra)
        # Nothing precedes it, and most templates refuse to render nothing: the prompt is what they add behind the rest.
        prompt = self.render(messages, True, where, *extra)[len(text) :]
        at = text.find(prompt) if prompt else -1
        content = text.find(messages[0].get("content") or "\0")
        return text[: at + len(prompt)] if at >= 0 and at + len(prompt) <= content else ""

    def last_turn(self, example: Example) -> tuple[str, list[tuple[int, Span]]]:
        """As `turns`, with the last of the assistant's messages alone, which needs no prefix but its own."""
        messages, where, extra = example.messages, example.where, (example.tools, example.template_arguments)
        last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if last is None:
            return self.render(messages, False, where, *extra), []
        if self.marked:
            text, found = self.turns(example)
            return text, found[-1:]
        return self.split_at(example, last, last + 1)

    def split_at(self, example: Example, prompt_turns: int, stop: int | None = None) -> tuple[str, list[tuple[int, Span]]]:
        """The text, and the characters of the messages from `prompt_turns` on (to before `stop`)."""
        messages, where, extra = example.messages, example.where, (example.tools, example.template_arguments)
        text = self.render(messages, False, where, *extra)
        before = self._before(messages, prompt_turns, text, where, extra)
        rest = stop is not None and stop < len(messages)
        after = self.render(messages[:stop], False, where, *extra) if rest else text
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{where}: the chat template writes the prompt differently once the answer follows, so the answer's tokens "
                "cannot be told apart. Set model.chat_template to a version with {% generation %} marks around the "
                "assistant's turns, and give messages"
            )
        return text, [(prompt_turns, (len(before), len(after)))]
