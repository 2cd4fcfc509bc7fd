"""Compute the log-likelihood of each token of a completion, given its prompt.

Legend: B batch, T length, C longest completion, E embed, V vocab.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32

from ftjax.data.template import render_prompt
from ftjax.generate.cache import bucket
from ftjax.generate.decode import Runner
from ftjax.models.nn.context import Context
from ftjax.objectives.logprobs import token_logprobs
from ftjax.objectives.projection import projection

LOGITS = 1 << 25  # maximum number of logits in memory at a time (128 MiB in float32)


@dataclass(frozen=True)
class Score:
    """Log-likelihood of one completion.

    Attributes:
        tokens: its token ids.
        logprobs: log p(token | all tokens before it), natural logarithm.
        greedy: whether every token is the most probable one at its position.
    """

    tokens: list[int]
    logprobs: list[float]
    greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)


def score_step(
    runner: Runner,
    params: Mapping[str, jax.Array],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    index: Int[Array, "B C"],
    targets: Int[Array, "B C"],
    temperature: float = 1.0,
) -> tuple[Float32[Array, "B C"], Bool[Array, "B C"]]:
    """Return log p of the targets predicted at positions `index`, and whether they are the most probable.

    Args:
        temperature: divides the logits.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    ctx = Context(positions, segment_ids, runner.dtype)
    module = runner.model.bind(params)
    hidden = jnp.take_along_axis(module.hidden(tokens, ctx)[0], index[..., None], axis=1)
    rows, longest = targets.shape
    vocab = jax.eval_shape(lambda h: module.unembed(h, ctx), hidden).shape[-1]
    chunk = min(longest, max(1, LOGITS // (rows * vocab)))
    found = token_logprobs(projection(runner.model, {}, params, ctx), hidden, targets, chunk, temperature=temperature)
    return found.logprobs, found.greedy


def head_step(
    runner: Runner,
    params: Mapping[str, jax.Array],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    index: Int[Array, " B"],
) -> Float32[Array, "B labels"]:
    """Return the scores of a classification head, read at position `index` of each row."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    ctx = Context(positions, segment_ids, runner.dtype)
    module = runner.model.bind(params)
    hidden = jnp.take_along_axis(module.hidden(tokens, ctx)[0], index[:, None, None], axis=1)
    return module.unembed(hidden, ctx)[:, 0]


def completion_ids(
    prompt: Any, ids: Sequence[int], completion: str | Sequence[int], tokenizer: Any, chat: bool | None = None
) -> list[int]:
    """Return the token ids of a completion after a prompt with these ids, tokenised as in training, without an EOS token.

    Plain text is tokenised together with its prompt, unless tokens would merge across the boundary.
    """
    if not isinstance(completion, str):
        return [int(token) for token in completion]
    if isinstance(prompt, str) and (chat is False or not tokenizer.chat_template):
        whole = render_prompt(prompt + completion, tokenizer, chat=chat)
        if whole[: len(ids)] == list(ids):
            return whole[len(ids) :]
    return tokenizer(completion, add_special_tokens=False)["input_ids"]


class Query(NamedTuple):
    """One row of `score_step`: the input `tokens`, and the `targets` predicted at positions `index`."""

    tokens: Sequence[int]
    index: Sequence[int]
    targets: Sequence[int]

    @classmethod
    def of(cls, prompt: Sequence[int], completion: Sequence[int]) -> "Query":
        """Build the row: prompt `5 6` with completion `7 8` becomes `5 6 7`, whose positions 1 and 2 predict 7 and 8."""
        text = [*prompt, *completion]
        return cls(text[:-1], range(len(prompt) - 1, len(text) - 1), completion)


def arrays(
    queries: Sequence[Query], rows: int
) -> tuple[
    Int32[np.ndarray, "{rows} T"], Int32[np.ndarray, "{rows} T"], Int32[np.ndarray, "{rows} C"], Int32[np.ndarray, "{rows} C"]
]:
    """Return tokens, segment ids, `index` and targets, padded on the right."""
    length = bucket(max(len(query.tokens) for query in queries), 16)
    longest = bucket(max(len(query.targets) for query in queries), 4)
    tokens, segments = np.zeros((2, rows, length), np.int32)
    index, targets = np.zeros((2, rows, longest), np.int32)
    for row, query in enumerate(queries):
        tokens[row, : len(query.tokens)] = query.tokens
        segments[row, : len(query.tokens)] = 1
        index[row, : len(query.index)] = query.index
        targets[row, : len(query.targets)] = query.targets
    return tokens, segments, index, targets
