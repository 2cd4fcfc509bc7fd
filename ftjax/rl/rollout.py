"""Answers of the model in training, as reward functions see them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftjax.data.example import Example, Message
from ftjax.evaluate.rows import Item


@dataclass(frozen=True)
class Rollout:
    """One answer of the model.

    Attributes:
        item: the row with its prompt.
        prompt: as the row has it: a text or messages.
        text: the answer without the token that ended it.
        tokens: with that token.
        logprobs: of each token, for the sampler.
        truncated: whether it reached the limit.
        own: of a dialogue: for each token, whether the model generated it.
        turns: of a dialogue: its messages, where the model sees the chat template. `text` is then the last answer's.
        whole: of a dialogue: all that was said.
    """

    item: Item
    prompt: str | Sequence[Mapping[str, Any]]
    prompt_ids: Sequence[int]
    text: str
    tokens: Sequence[int]
    logprobs: Sequence[float]
    truncated: bool
    own: Sequence[bool] | None = None
    turns: Sequence[Message] = ()
    whole: str | None = None

    @property
    def size(self) -> int:
        """The number of tokens that the model generated."""
        return len(self.tokens) if self.own is None else sum(self.own)

    @property
    def shown(self) -> str:
        """The answer or dialogue as one text, for people."""
        return self.text if self.whole is None else self.whole

    @property
    def completion(self) -> str | list[dict[str, Any]]:
        """The answer as TRL gives it to reward functions: a text, or messages where the prompt is messages."""
        if self.whole is not None:
            return self.whole if isinstance(self.prompt, str) else list(self.turns)
        return self.text if isinstance(self.prompt, str) else [{"role": "assistant", "content": self.text}]

    @property
    def shown_prompt(self) -> str:
        """The prompt as one text, for people and judges."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in self.prompt)

    @property
    def conversation(self) -> Example:
        """The row with this answer in the place of its own."""
        example = self.item.example
        turns = example.messages
        if turns is not None:
            last = len(turns) if example.prompt_turns is None else example.prompt_turns
            if example.prompt_turns is None and turns[-1]["role"] == "assistant":
                last = max(n for n, turn in enumerate(turns) if turn["role"] == "assistant")
            turns = (*turns[:last], *(self.turns or [{"role": "assistant", "content": self.text}]))
            example = replace(example, messages=turns, prompt_turns=last)
        return replace(example, completion=None if example.prompt is None else self.shown, rejected=None)


# rollouts -> a number for each, or None where there is nothing to say
Function = Callable[[Sequence[Rollout]], Sequence[float | None]]
