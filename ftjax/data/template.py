"""Chat templates: render a conversation, find the characters that the assistant wrote, and render the prompt of an answer.

`[user: Hi] [assistant: Hello]` with a ChatML template is
`<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n`, and the assistant's characters are
`Hello<|im_end|>\\n`: what the template writes between its generation prompt and the next turn.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from transformers.utils.chat_template_utils import render_jinja_template

from ftjax.data.control import Control, Mode
from ftjax.data.dialect import CALLS, REASONING, SENTINEL, fit_calls, fold_system, without
from ftjax.data.example import Example, Message
from ftjax.data.tokens import Tokens
from ftjax.errors import UserError

log = logging.getLogger(__name__)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NOT_FOR_TEMPLATES = ("train", "weight")  # keys of a message about its training, not its content
# What `Template` itself gives to a template.
OWN_ARGUMENTS = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversations", "messages",
    "return_assistant_tokens_mask", "tools",
}  # fmt: skip
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Turn:
    """The assistant's characters `start` to `stop` of the text, from message `number` (-1: unknown).

    `prompt`: where the prompt used in generation ends in the text; None if that prompt is another text.
    """

    number: int
    start: int
    stop: int
    prompt: int | None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation in the form that its template takes, and notes on what changed."""

    example: Example
    notes: Counter[str]
    hidden: bool  # it contains marks of `Control`


def render_prompt(
    prompt: str | Sequence[Message],
    tokenizer: Any,
    *,
    chat: bool | None = None,
    tools: list[Any] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    special_tokens_in_text: Mode = "split",
    fold_system: bool = True,
) -> list[int]:
    """Return the ids before the answer, with exactly one BOS (if the tokenizer has one) and, in a chat, the generation
    prompt.

    Text goes through the chat template as a user message if the tokenizer has one, as in training; `chat` overrides this.
    `render_prompt("Hi", tokenizer)` returns the ids of `<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n`;
    without a chat template, those of `<s>Hi`.

    Raises UserError if messages need a chat template and there is none, or if they hold something that these settings
    refuse.
    """
    tokens = Tokens(tokenizer)
    if isinstance(prompt, str):
        if not (bool(tokenizer.chat_template) if chat is None else chat):
            return tokens.text_ids(prompt)
        prompt = [{"role": "user", "content": prompt}]
    example = Example(
        "the prompt", messages=tuple(prompt), tools=tools, template_arguments=template_arguments,
        special_tokens_in_text=special_tokens_in_text, fold_system=fold_system,
    )  # fmt: skip
    template = Template(tokenizer, tools)
    made = template.prepare(example)
    if made.notes["system folded"]:
        log.warning("the chat template takes no system message: it goes in front of the first user's")
    text = template.render(made.example.messages, True, example.where, made.example.tools, template_arguments)
    if not made.hidden:
        return with_chat_bos(tokens.batch([text])[0].ids, tokens)
    log.warning("the prompt spells control tokens; they are read as plain text (special_tokens_in_text: split)")
    text, _ = template.control.reveal(text, (), example.where)
    return with_chat_bos(template.control.real(template.control.batch([text])[0].ids), tokens)


def example_prompt(example: Example, tokenizer: Any) -> list[int] | None:
    """Return the ids that training saw before the example's (last) answer; None if it has no prompt."""
    question = example.question(tokenizer)
    if question is None:
        return None
    return render_prompt(
        question, tokenizer, chat=example.is_chat(tokenizer), tools=example.tools,
        template_arguments=example.template_arguments, special_tokens_in_text=example.special_tokens_in_text,
        fold_system=example.fold_system,
    )  # fmt: skip


def render_reply(
    answer: Message,
    replies: Sequence[Message],
    tokenizer: Any,
    *,
    tools: list[Any] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the ids between the end of an answer and the next one: messages of others, and the generation prompt.

    With a ChatML template and a user's `Why?`, those of `\\n<|im_start|>user\\nWhy?<|im_end|>\\n<|im_start|>assistant\\n`: the
    answer has its own `<|im_end|>`. The text before the answer makes no difference, so ids already there stay as they are.
    Control tokens that replies spell are read as plain text.

    Raises UserError if the template writes earlier messages differently once others follow.
    """
    template = Template(tokenizer, tools)
    messages = ({"role": "user", "content": SENTINEL}, answer, *replies)
    example = Example("the reply", messages=messages, tools=tools, template_arguments=template_arguments)
    made = template.prepare(example)
    turns, extra = made.example.messages, (example.where, made.example.tools, template_arguments)
    before, whole = template.render(turns[:2], False, *extra), template.render(turns, True, *extra)
    closer = template.closers[1]
    name = "" if closer is None else tokenizer.convert_ids_to_tokens(closer)
    if name and name in before:
        before = before[: before.rindex(name) + len(name)]
    if not whole.startswith(before):
        raise UserError(
            "the chat template writes an answer differently once messages follow, so a dialogue cannot go on from its tokens; "
            "set model.chat_template to a version that does not"
        )
    text, tokens = whole[len(before) :], Tokens(tokenizer)
    if not made.hidden:
        return tokens.batch([text])[0].ids
    text, _ = template.control.reveal(text, (), example.where)
    return template.control.real(template.control.batch([text])[0].ids)


def with_chat_bos(ids: list[int], tokens: Tokens) -> list[int]:
    """Return the ids of a rendered conversation with one BOS, even if the template writes none or the first message has
    one."""
    if tokens.bos is None:
        return ids
    while ids[:1] == [tokens.bos]:
        ids = ids[1:]
    return [tokens.bos, *ids]


_controls: WeakKeyDictionary[Any, tuple[Any, Control]] = WeakKeyDictionary()  # copying a large tokenizer takes a second


class Template:
    """The chat template of a tokenizer; `marked` if it marks what the assistant wrote."""

    def __init__(self, tokenizer: Any, tools: list[Any] | None = None):
        """Find the template. Raises UserError if there is none, or several and no default."""
        if not tokenizer.chat_template:
            raise UserError(
                "this tokenizer has no chat template, which messages need: set model.chat_template to a Jinja template or the "
                "path of a .jinja file, or give prompt and completion columns"
            )
        try:
            self.text: str = tokenizer.get_chat_template(None, tools)
        except ValueError:
            named = tokenizer.chat_template
            raise UserError(
                f"this tokenizer has the chat templates {', '.join(sorted(named))} and none is the default; set "
                f"model.chat_template to the one to take, such as {sorted(named)[0]}, or to a Jinja template or .jinja file"
            ) from None
        self.marked = bool(GENERATION.search(self.text))
        self._tokenizer = tokenizer
        self._special = tokenizer.special_tokens_map

    # ---- what the template does, found by trying ----

    def _tried(self, *turns: tuple[str, str], generation: bool = False) -> str | None:
        """Render `(role, content)` turns; None if the template refuses them."""
        try:
            return self.render([{"role": role, "content": content} for role, content in turns], generation, "a probe")
        except UserError:
            return None

    @cached_property
    def takes_system(self) -> bool:
        """Whether it writes a system message; True if unclear."""
        rest = ("user", "Hello"), ("assistant", "Hi")
        text = self._tried(("system", SENTINEL), *rest)
        return SENTINEL in text if text is not None else self._tried(*rest) is None

    @cached_property
    def closers(self) -> tuple[int | None, int | None]:
        """The added tokens that directly follow an answer: the last answer, and an answer before another turn."""
        turns = ("user", "Hello"), ("assistant", SENTINEL)
        names = dict(self._tokenizer.get_added_vocab())
        names |= {name: self._tokenizer.convert_tokens_to_ids(name) for name in self._tokenizer.all_special_tokens}

        def closer(text: str | None) -> int | None:
            tail = (text or "").rpartition(SENTINEL)[2].lstrip()
            found = [name for name in names if name.strip() and tail.startswith(name)]
            return names[max(found, key=len)] if found else None

        return closer(self._tried(*turns)), closer(self._tried(*turns, ("user", "Hello"), ("assistant", "Hi")))

    @cached_property
    def control(self) -> Control:
        made = _controls.get(self._tokenizer)
        key = (self.text, len(self._tokenizer))
        if made is None or made[0] != key:
            # Up to the second question: an earlier answer has no reasoning, whose marks are the assistant's own words.
            turns = ("user", SENTINEL), ("assistant", SENTINEL), ("user", SENTINEL)
            text = self._tried(*turns) or self._tried(*turns[:2]) or self._tried(*turns[:1]) or ""
            made = key, Control(self._tokenizer, text)
            _controls[self._tokenizer] = made
        return made[1]

    # ---- a conversation ----

    def prepare(self, example: Example) -> Chat:
        """Return the conversation in the form that the template takes.

        Raises UserError for spelled control tokens where `special_tokens_in_text` is `error`, and for a system message that
        the template does not take where `fold_system` is false.
        """
        marked = self.control.mark(example.messages, example.special_tokens_in_text, example.where, example.tools)
        messages, notes, turns, tools = marked.messages, marked.notes, example.prompt_turns, marked.tools
        if messages[:1] and messages[0]["role"] == "system" and not self.takes_system:
            if not example.fold_system:
                raise UserError(
                    f"{example.where}: the chat template takes no system message, and data.fold_system is false; leave the "
                    "message out, set model.chat_template to a template that takes one, or data.fold_system: true, which puts "
                    "it in front of the first user's text"
                )
            folded = fold_system(messages)
            if folded is not None:
                messages, notes["system folded"] = folded, 1
                turns = turns - 1 if turns else turns
        messages = fit_calls(
            messages,
            lambda tried: self.render(tried, False, example.where, tools, example.template_arguments),
        )
        return Chat(replace(example, messages=tuple(messages), prompt_turns=turns, tools=tools), notes, marked.hidden)

    def left_out(self, example: Example, text: str, trained: Sequence[int]) -> Counter[str]:
        """Count what the template leaves out of the rendered conversation: parts of the trained messages, and the tools.

        Raises UserError if a trained call is left out, or reasoning that is the whole answer.

        Raises UserError for a trained call that is left out, or reasoning that is all there is.
        """
        where, messages, notes = example.where, example.messages, Counter()

        def same(tried: Sequence[Message], tools: Any) -> bool:
            try:
                return self.render(tried, False, where, tools, example.template_arguments) == text
            except UserError:
                return False

        if example.tools and same(messages, None):
            notes["tools left out"] = 1
        for fields, what in ((CALLS, "calls"), (REASONING, "reasoning")):
            numbers = [n for n in trained if any(messages[n].get(field) for field in fields)]
            if not numbers or not same(without(messages, fields, numbers), example.tools):
                continue
            silent = [n for n in numbers if not (messages[n].get("content") or "").strip()]
            if what == "calls" or silent:
                number = (silent or numbers)[0]
                field = next(field for field in fields if messages[number].get(field))
                raise UserError(
                    f"{where}: the chat template does not write {field}, so what message {number} says would not be trained; "
                    "set model.chat_template to a template that writes it, or put it into the content"
                )
            notes[f"{what} left out"] = 1
        return notes

    def render(
        self, messages: Sequence[Message], generation: bool, where: str, tools: Any = None, arguments: Any = None
    ) -> str:
        """Render a conversation, with the prompt of the next answer if `generation`."""
        return self._render(messages, generation, where, tools, arguments, False)[0]

    def render_marked(self, messages: Sequence[Message], where: str, tools: Any, arguments: Any) -> tuple[str, list[Span]]:
        """Render a conversation; also return the spans between `{% generation %}` and `{% endgeneration %}`."""
        return self._render(messages, False, where, tools, arguments, True)

    def _render(self, messages, generation, where, tools, arguments, marks) -> tuple[str, list[Span]]:
        plain = [
            {key: value for key, value in m.items() if (value is not None or key == "content") and key not in NOT_FOR_TEMPLATES}
            for m in messages
        ]
        if taken := sorted(OWN_ARGUMENTS.intersection(arguments or ())):
            raise UserError(f"{where}: chat_template_kwargs cannot set {', '.join(taken)}, which follows from the rest")
        try:
            texts, spans = render_jinja_template(
                [plain],
                tools=tools,
                chat_template=self.text,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=generation,
                **{**self._special, **(arguments or {})},
            )
        except Exception as error:  # Jinja's errors, and whatever a template raises
            reason = str(error).strip() or type(error).__name__
            raise UserError(f"{where}: the chat template refuses these messages: {reason}") from None
        return texts[0], [tuple(span) for span in spans[0]] if marks else []

    def turns(self, example: Example) -> tuple[str, list[Turn]]:
        """Return the text of a conversation, and the characters of each assistant message.

        Raises UserError if the template does not mark them and rendering turn by turn does not find them.
        """
        messages, where, extra = example.messages, example.where, (example.tools, example.template_arguments)
        numbers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if self.marked:
            text, spans = self.render_marked(messages, where, *extra)
            spans = [span for span in spans if span[0] < span[1]]
            if len(numbers) == len(spans):
                found = zip(numbers, spans, strict=True)
                return text, [Turn(n, *span, self._prompt(messages, n, text, span, where, extra)) for n, span in found]
            if any("train" in m or "weight" in m for m in messages):
                raise UserError(
                    f"{where}: the chat template marks {len(spans)} turns of the assistant and there are {len(numbers)}, so it "
                    "cannot be told which of them train and weight mean"
                )
            return text, [Turn(numbers[-1] if numbers and span == spans[-1] else -1, *span, span[0]) for span in spans]
        text = self.render(messages, False, where, *extra)
        return text, [self._turn(messages, number, number + 1, text, where, extra) for number in numbers]

    def last_turn(self, example: Example) -> tuple[str, list[Turn]]:
        """Return the same as `turns` for the last assistant message alone, which needs only its own prefix."""
        messages, where, extra = example.messages, example.where, (example.tools, example.template_arguments)
        last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        if self.marked and last is not None:
            text, found = self.turns(example)
            return text, found[-1:]
        text = self.render(messages, False, where, *extra)
        return text, [] if last is None else [self._turn(messages, last, last + 1, text, where, extra)]

    def split_at(self, example: Example, prompt_turns: int) -> tuple[str, list[Turn]]:
        """Return the text, and the characters of the messages from `prompt_turns` on."""
        messages, where, extra = example.messages, example.where, (example.tools, example.template_arguments)
        text = self.render(messages, False, where, *extra)
        return text, [self._turn(messages, prompt_turns, len(messages), text, where, extra)]

    def prompt_end(self, example: Example, number: int, text: str) -> int | None:
        """Return where the generation prompt of message `number` ends in the text; None if that prompt is another text."""
        extra = (example.tools, example.template_arguments)
        return self._prompt(example.messages, number, text, (0, len(text)), example.where, extra)

    def _turn(self, messages: Sequence[Message], number: int, stop: int, text: str, where: str, extra: tuple) -> Turn:
        """Return the characters of the messages from `number` to before `stop`."""
        after = text if stop == len(messages) else self.render(messages[:stop], False, where, *extra)
        if not text.startswith(after):  # some templates put an EOS after the whole text
            after = after.removesuffix(self._special.get("eos_token") or "")
        before = self._before(messages, number, text, where, extra)
        if text.startswith(after):
            if before is not None and after.startswith(before):
                return Turn(number, len(before), len(after), len(before))
            # Generation may begin the answer (`<think>`) where the template does not: the answer begins after its header.
            header = self._header(messages, number, where, extra)
            if header and (before is None or before.startswith(header)) and after.startswith(header):
                return Turn(number, len(header), len(after), None)
        raise UserError(
            f"{where}: the chat template writes a conversation's earlier turns differently once later ones follow, so what "
            f"the assistant said in message {number} cannot be told apart. Set model.chat_template to a version with "
            "{% generation %} marks around the assistant's turns"
            + (", or data.last_turn_only: true to train the last turn alone" if stop < len(messages) else "")
        )

    def _prompt(self, messages: Sequence[Message], number: int, text: str, span: Span, where: str, extra: tuple) -> int | None:
        """Return where the generation prompt of a marked turn ends in the text."""
        try:
            before = self._before(messages, number, text, where, extra)
        except UserError:
            return None
        return len(before) if before is not None and text.startswith(before) and len(before) < span[1] else None

    def _before(self, messages: Sequence[Message], number: int, text: str, where: str, extra: tuple) -> str | None:
        """Return the text before an answer, including the generation prompt; None if it cannot be found."""
        if any(message["role"] == "user" for message in messages[:number]):
            return self.render(messages[:number], True, where, *extra)
        # There is no question, and most templates refuse to render nothing or then add a system message. With a question put
        # before the answer, the rest of the text follows the question's prompt.
        asked = [*messages[:number], {"role": "user", "content": SENTINEL}]
        try:
            prompt = self.render(asked, True, where, *extra)
            whole = self.render([*asked, *messages[number:]], False, where, *extra)
        except UserError:
            return None
        rest = whole[len(prompt) :]
        return text[: len(text) - len(rest)] if whole.startswith(prompt) and rest and text.endswith(rest) else None

    def _header(self, messages: Sequence[Message], number: int, where: str, extra: tuple) -> str | None:
        """Return what the template writes before the content of an answer."""
        try:
            text = self.render([*messages[:number], {"role": "assistant", "content": SENTINEL}], False, where, *extra)
        except UserError:
            return None
        return text.partition(SENTINEL)[0] if text.count(SENTINEL) == 1 else None
