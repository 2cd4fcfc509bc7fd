"""Answers that the model has generated, as documents: the tokens of an answer carry what its loss needs.

Each trained token has three values: the advantage of its answer, and its log-probability for the parameters before the first
update with these answers and for the sampler that generated them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftjax.config.data import DataConfig
from ftjax.data.encode import Encoder
from ftjax.data.encoding import RowEncoding

VALUES = ("advantage", "logprob", "sampler_logprob")  # of each token, in this order


@dataclass(frozen=True)
class RolloutTokens(RowEncoding):
    """Each document is a prompt with an answer."""

    @property
    def values(self) -> int:
        return len(VALUES)

    def key(self) -> Any:
        return ["rollouts"]

    def encoder(self, tokenizer: Any, config: DataConfig) -> Encoder:
        return Encoder(tokenizer, config.train_on_inputs, config.last_turn_only)

    def captions(self, unit: Sequence[Any]) -> Sequence[str]:
        return [""] * len(unit)
