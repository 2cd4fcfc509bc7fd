"""Likelihood of the trained tokens of examples, tokenized and weighted as in training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ftjax.config.data import DataConfig
from ftjax.data.encoder import Encoded, Unit
from ftjax.data.encoding import ANSWERS, RowEncoding
from ftjax.data.example import Example
from ftjax.errors import UserError
from ftjax.generate.batch import SCORES, groups
from ftjax.generate.cache import bucket
from ftjax.generate.finite import require_finite
from ftjax.generate.score import Query, arrays
from ftjax.generate.session import Generator


@dataclass(frozen=True)
class Likelihood:
    """Sums over the trained tokens of one document.

    Attributes:
        loss: sum of weight times -log p(token | tokens before it), natural logarithm.
        weight: sum of the weights.
        correct: weight of the tokens that are the argmax at their positions.
    """

    loss: float
    weight: float
    correct: float


def encode(examples: Sequence[Example], tokenizer, config: DataConfig, encoding: RowEncoding = ANSWERS) -> list[list[Encoded]]:
    """Encode each example into the documents that it becomes in training; none if no token of it would be trained."""
    encoder = encoding.encoder(tokenizer, config)
    found = []
    for document in encoder(examples):
        pieces = [document]
        if len(document.tokens) > config.max_length:
            pieces = encoding.shorten((document,), config, encoder.tokens.bos)
        found.append([piece for piece in pieces if piece.weights[1:].any()])
    return found


def encode_units(examples: Sequence[Example], tokenizer, config: DataConfig, encoding: RowEncoding) -> list[Unit]:
    """Encode each example into all of its documents, without truncation."""
    [units] = encoding.encoder(tokenizer, config).stream([examples])
    return units


def likelihoods(
    generator: Generator, documents: Sequence[Encoded], batch_size: int, progress: Callable[[int], None] | None = None
) -> list[Likelihood]:
    """Compute the likelihood of each document, batched by length. Calls `progress` with the number of documents done.

    Raises UserError for a document that does not fit in the model's context.
    """
    pairs, weights = [], []
    for document in documents:
        if len(document.tokens) > generator.context:
            raise UserError(
                f"{document.where}: {len(document.tokens)} tokens, and the model's context is {generator.context}; lower "
                "data.max_length, which leaves longer rows out (or truncates them: data.truncation)"
            )
        first = int(np.flatnonzero(document.weights[1:])[0]) + 1
        ids = document.tokens.tolist()
        pairs.append((ids[:first], ids[first:]))
        weights.append(document.weights[first:].astype(np.float64))
    found: dict[int, Likelihood] = {}
    for batch, rows in batches(generator, [len(a) + len(b) for a, b in pairs], batch_size):
        logprobs, best = generator.engine.score(generator.params, *arrays([Query.of(*pairs[i]) for i in batch], rows))
        for row, i in enumerate(batch):
            size = len(weights[i])
            require_finite(logprobs[row, :size], documents[i].where, generator.model, generator.params)
            loss = -float(weights[i] @ logprobs[row, :size].astype(np.float64))
            found[i] = Likelihood(loss, float(weights[i].sum()), float(weights[i] @ best[row, :size]))
        if progress:
            progress(len(found))
    return [found[i] for i in range(len(pairs))]


def head_scores(
    generator: Generator,
    texts: Sequence[list[int]],
    labels: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Return scores (logits) `[N, labels]` of a classification head, read at the last token of each text."""
    found = np.zeros((len(texts), labels))
    done = 0
    for batch, rows in batches(generator, [len(text) for text in texts], batch_size):
        tokens, segments, index, _ = arrays([Query(texts[i], [len(texts[i]) - 1], [0]) for i in batch], rows)
        found[batch] = generator.engine.head(generator.params, tokens, segments, index[:, 0])[: len(batch)]
        require_finite(found[batch], "a text", generator.model, generator.params)
        done += len(batch)
        if progress:
            progress(done)
    return found


def batches(generator: Generator, lengths: Sequence[int], batch_size: int):
    """Yield `(indices of documents, rows of the arrays)`, longest first; fewer rows if the attention scores are large."""
    heads = generator.model.sizes.heads
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while left:
        longest = bucket(lengths[left[0]], 16)
        fits = max(1, SCORES // (heads * longest * longest))
        size = min(batch_size, 1 << (fits.bit_length() - 1))
        batch, left = left[:size], left[size:]
        yield batch, groups([lengths[i] for i in batch], size, generator.engine.shards)[1]
