"""Prompts to which the model in training generates answers, and the values of the answers' tokens.

A row becomes a document that is its prompt. The answers are generated while training, and each of their tokens then has three
values: the advantage of its answer, and its log-probability for the parameters before the first update with these answers and
for the sampler that generated them.

    {"prompt": "2+2=", "answer": "4"}      document: <s> 2 + 2 =      reference for rewards: 4
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftjax.config.data import DataConfig
from ftjax.data.align import VALUES as ALIGNED
from ftjax.data.encoder import Encoded, RowEncoder, TextPlan, Unit
from ftjax.data.encoding import Answers, RowEncoding
from ftjax.data.example import Example
from ftjax.data.template import example_prompt
from ftjax.errors import UserError

VALUES = ("advantage", "logprob", "sampler_logprob")  # of each token of an answer, in this order


def as_prompt(example: Example) -> Example:
    """Return the example with all messages as its prompt if no answer of the assistant ends them."""
    turns = example.messages
    if turns and example.prompt_turns is None and turns[-1]["role"] != "assistant":
        said = [turn.get("content") for turn in turns if turn["role"] == "assistant"][-1:]
        references = () if list(example.references) == said else example.references  # an earlier answer is no reference
        return replace(example, prompt_turns=len(turns), references=references)
    return example


class PromptEncoder(RowEncoder):
    """Encodes the prompt of a row as a generating model sees it."""

    def plan(self, example: Example) -> Sequence[TextPlan | Encoded]:
        """Return the prompt as a document; see `RowEncoder.plan`."""
        ids = None
        if example.messages or example.prompt is not None:
            ids = example_prompt(as_prompt(example), self.tokenizer)
        if not ids:
            raise UserError(
                f"{example.where}: there is no prompt to answer; expected a column prompt (text or messages; of another name: "
                "data.columns: {prompt: NAME}), or messages that end with the user's"
            )
        tokens = np.array(ids, np.int32)
        return [Encoded(tokens, np.zeros(len(tokens), np.float32), example.where, example.source)]

    def encode(self, plan: TextPlan, encodings: list[Any]) -> Encoded:
        """Never called: `plan` returns documents."""
        raise AssertionError("a prompt is a document already")


@dataclass(frozen=True)
class TaughtTokens(Answers):
    """Each row has an answer, for each of whose tokens there are predictions of a teacher.

    Attributes:
        width: their values (`ftjax.data.predictions`).
    """

    width: int = 0

    @property
    def values(self) -> int:
        return self.width


@dataclass(frozen=True)
class AnsweredTokens(Answers):
    """Each row has an answer; in a batch, generated answers take the place of some.

    Each token has one value: 1 if it is one of the data's.
    """

    @property
    def values(self) -> int:
        return 1


@dataclass(frozen=True)
class AlignedTokens(Answers):
    """Each row has an answer, whose text is aligned with a teacher's tokens.

    Attributes:
        mixed: generated answers take the place of some; the last value is 1 for tokens of the data.
    """

    mixed: bool = False

    @property
    def values(self) -> int:
        return len(ALIGNED) + self.mixed


@dataclass(frozen=True)
class PromptTokens(RowEncoding):
    """Each row is a prompt; the documents of a batch are prompts with generated answers.

    Attributes:
        reserved: the most tokens of an answer.
    """

    reserved: int = 0
    answers = False
    imitated = False
    formats = ("prompt",)

    def key(self) -> Any:
        return ["prompts", self.reserved]

    def encoder(self, tokenizer: Any, config: DataConfig) -> PromptEncoder:
        return PromptEncoder(tokenizer)

    def shorten(self, unit: Unit, config: DataConfig, bos: int | None) -> Sequence[Encoded]:
        """Drop the row: a part of a prompt may be no question. Raises UserError with `data.truncation: error`."""
        if config.truncation == "error":
            raise UserError(
                f"{unit[0].where}: the prompt has {len(unit[0].tokens)} tokens, and data.max_length {config.max_length} less "
                f"objective.max_completion_length {self.reserved} leaves {config.max_length - self.reserved}; raise max_length"
            )
        return ()

    def captions(self, unit: Unit) -> Sequence[str]:
        return ["prompt"] * len(unit)


@dataclass(frozen=True)
class RolloutTokens(PromptTokens):
    """The same, with the values of each token that learning from rewards needs."""

    @property
    def values(self) -> int:
        return len(VALUES)


@dataclass(frozen=True)
class AlignedPromptTokens(PromptTokens):
    """The same, with the alignment of each answer with a teacher's tokens."""

    @property
    def values(self) -> int:
        return len(ALIGNED)
