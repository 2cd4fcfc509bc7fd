"""Answers that are dialogues: the model generates, an environment replies, until one of them ends it or the tokens are used up.

    prompt    what is 12 * 34?
    model     <tool_call>{"name": "multiply", ...}</tool_call><end>     trained
    replies   <user>408<end><assistant>                                 not trained
    model     408<end>                                                  trained

Tokens are put together as they were generated, and nothing is tokenised twice, so what is trained is what was sampled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ftjax.data.example import Example, Message
from ftjax.data.rollout import as_prompt
from ftjax.data.template import Template, example_prompt, render_reply
from ftjax.errors import UserError
from ftjax.generate.answer import Generation
from ftjax.generate.speech import form_of, reasons, splitter, thinks
from ftjax.rl.environment import Environments, call_message
from ftjax.rl.prompts import Question
from ftjax.rl.rollout import Rollout

# (prompts, numbers of the dialogues, turn, the most tokens of each answer) -> answers
Generate = Callable[[list[list[int]], list[int], int, list[int]], list[Generation]]


@dataclass
class Dialogue:
    """One answer, while it is made.

    Attributes:
        budget: the most tokens of the answer, replies included.
        own: for each token, whether the model generated it.
        messages: the answer as messages, where the model sees the chat template.
        said: the same as texts.
    """

    example: Example
    ids: list[int]
    budget: int
    tokens: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    truncated: bool = False

    @property
    def left(self) -> int:
        return self.budget - len(self.tokens)


class Dialogues:
    """Makes dialogues with the instances of an environment.

    Attributes:
        turns: answers of the model in each of the latest dialogues.
    """

    def __init__(
        self, environments: Environments, tokenizer: Any, *, max_length: int, max_completion_length: int, replies: int | None
    ):
        """
        Args:
            max_length: tokens of a prompt with its answer.
            max_completion_length: tokens of an answer, replies included.
            replies: most replies in a dialogue; None for any number.

        Raises UserError if the environment has tools and the chat template no form of calls that is known.
        """
        self._environments, self._tokenizer = environments, tokenizer
        self._length, self._budget, self._replies = max_length, max_completion_length, replies
        text = Template(tokenizer, environments.tools or None).text if tokenizer.chat_template else ""
        self._form = form_of(text) if environments.tools else None
        self._template = text
        self.turns: list[int] = []
        if environments.tools and self._form is None:
            raise UserError(
                f"objective.environment: {environments.name} has tools, which the model calls through its chat template, "
                "and this tokenizer's writes no form of calls that is known; choose a model whose template does, or give the "
                "environment a step that reads the answers"
            )

    def hold(self, questions: Sequence[Question], generate: Generate) -> list[Rollout]:
        """Return an answer to each question."""
        said = self._environments.begin([q.item.values for q in questions], [q.item.where for q in questions])
        held = [self._begun(question, more) for question, more in zip(questions, said, strict=True)]
        active, turn = list(range(len(held))), 0
        while active:
            found = generate([held[n].ids + held[n].tokens for n in active], active, turn, [held[n].left for n in active])
            for number, answer in zip(active, found, strict=True):
                self._heard(held[number], answer)
            active = [n for n in active if not held[n].truncated]
            turn += 1
            if turn - 1 == self._replies or not active:
                break
            replies = self._environments.reply(active, [held[n].messages[-1] for n in active])
            active = [n for n, reply in zip(active, replies, strict=True) if reply and self._replied(held[n], reply)]
        self.turns = [sum(message["role"] == "assistant" for message in one.messages) for one in held]
        return [self._rollout(question, one) for question, one in zip(questions, held, strict=True)]

    def _begun(self, question: Question, more: str | None) -> Dialogue:
        """Return a dialogue with its prompt, to which the environment may add a text and its tools."""
        example, ids = as_prompt(question.item.example), question.ids.tolist()
        if more or self._environments.tools:
            example = _extended(example, more or "", self._tokenizer)
            example = replace(example, tools=[*(example.tools or []), *self._environments.tools] or None)
            ids = example_prompt(example, self._tokenizer)
        budget = min(self._budget, self._length - len(ids))
        if budget < 1:
            raise UserError(
                f"{question.item.where}: with the tools and texts of {self._environments.name} the prompt has {len(ids)} "
                f"tokens, and data.max_length {self._length} leaves none for an answer; raise max_length"
            )
        return Dialogue(example, ids, budget)

    def _heard(self, one: Dialogue, answer: Generation) -> None:
        prompt = one.ids + one.tokens
        one.tokens += answer.tokens
        one.own += [True] * len(answer.tokens)
        one.logprobs += answer.logprobs
        one.truncated = answer.truncated
        content, calls = answer.text, []
        if self._form is not None:
            text = self._tokenizer.decode(answer.tokens[: None if answer.truncated else -1], skip_special_tokens=False)
            thinking = reasons(self._template) and thinks(self._tokenizer.decode(prompt[-16:]))
            pieces = list(splitter(self._template, self._form, thinking).feed(text, end=True))
            calls = [(piece.call.name, piece.call.arguments) for piece in pieces if piece.call is not None]
            content = "".join(piece.content for piece in pieces) if calls else content
        one.messages.append(call_message(content, calls))
        one.said.append(answer.text)

    def _replied(self, one: Dialogue, replies: list[Message]) -> bool:
        """Add replies; False if they leave no room for another answer, and the dialogue ends without them."""
        example = one.example
        if example.is_chat(self._tokenizer):
            more = {"tools": example.tools, "template_arguments": example.template_arguments}
            ids = render_reply(one.messages[-1], replies, self._tokenizer, **more)
        else:
            ids = self._tokenizer("".join(reply["content"] for reply in replies), add_special_tokens=False)["input_ids"]
        if len(ids) >= one.left:
            return False
        one.tokens += ids
        one.own += [False] * len(ids)
        one.logprobs += [0.0] * len(ids)
        one.messages += replies
        one.said += [reply["content"] for reply in replies]
        return True

    def _rollout(self, question: Question, one: Dialogue) -> Rollout:
        chat = one.example.is_chat(self._tokenizer)
        return Rollout(
            question.item, question.prompt, one.ids, one.messages[-1]["content"], one.tokens, one.logprobs, one.truncated,
            tuple(one.own), tuple(one.messages) if chat else (), "\n".join(one.said) if chat else "".join(one.said),
        )  # fmt: skip


def _extended(example: Example, more: str, tokenizer: Any) -> Example:
    """Return the example with a text at the end of its prompt: of the last user message, as in TRL."""
    if not example.is_chat(tokenizer):
        return replace(example, prompt=example.prompt + more)
    turns = list(example.question(tokenizer))
    last = max((n for n, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if last is None:
        turns.append({"role": "user", "content": more})
    else:
        turns[last] = {**turns[last], "content": f"{turns[last]['content']}{more}"}
    return replace(example, messages=tuple(turns), prompt_turns=len(turns))
