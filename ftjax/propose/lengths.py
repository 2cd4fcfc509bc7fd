"""Lengths of the documents in tokens, and the length of a row that follows from them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ftjax.config import Config
from ftjax.data.pipeline import PackedSplit, load_splits
from ftjax.data.report import histogram
from ftjax.objectives import encoding_of

SAMPLE = 20_000  # rows that are tokenised for the histogram
UNLIMITED = 2**24  # tokens
SHORTEST = 128
MOST = 0.99  # share of the documents that a row should hold, if the longest ones would need a much longer row


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row's documents, which stay together: one document, or the two of a pair.

    Attributes:
        trained: share of the tokens that are trained.
        rows: rows of data that were read for this.
        different: documents among them that differ; None if that is not known.
    """

    tokens: np.ndarray
    trained: float
    rows: int
    different: int | None = None

    def row(self, positions: int | None) -> tuple[int, int]:
        """Return the length of a row, a power of two, and the number of documents that are longer.

        Args:
            positions: the longest text that the model was made for.
        """
        most = positions or UNLIMITED
        all_of_them, nearly = (_power(np.quantile(self.tokens, share, method="higher")) for share in (1.0, MOST))
        length = min(all_of_them if all_of_them < 4 * nearly else nearly, most)
        return length, int((self.tokens > length).sum())

    def described(self) -> str:
        """Return the histogram's quantiles in words."""
        low, half, most, high = (int(np.quantile(self.tokens, share, method="nearest")) for share in (0, 0.5, 0.95, 1))
        return f"{low:,} to {high:,} tokens, half of them up to {half:,}, 95 % up to {most:,}"

    def histogram(self) -> list[tuple[int, int, int]]:
        return histogram(self.tokens)


def measure(config: Config, tokenizer: Any) -> Lengths:
    """Tokenise the training data and return its lengths, whatever `data.max_length` is.

    Raises UserError, with file and line, for rows that cannot be read.
    """
    data = config.data.model_copy(
        update={"max_length": UNLIMITED, "limit": SAMPLE, "validation": None, "validation_split": None, "packing": True}
    )
    encoding = encoding_of(config)
    split, _ = load_splits(data, tokenizer, seed=config.training.seed, encoding=encoding)
    assert isinstance(split, PackedSplit)
    tokens = split.lengths.reshape(-1, encoding.sequences).sum(axis=1)
    trained, different = split.report.trained_tokens / max(split.report.tokens, 1), len(np.unique(split.documents.digest))
    return Lengths(tokens, trained, split.report.rows, different)


def _power(tokens: float) -> int:
    """Return the next power of two."""
    return max(SHORTEST, 2 ** int(np.ceil(np.log2(max(tokens, 1)))))
