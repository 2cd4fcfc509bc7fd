"""How the rows of a data set become documents: the part of an objective that needs no devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ftjax.config.data import DataConfig
from ftjax.data.encode import Encoder
from ftjax.data.encoder import Encoded, RowEncoder
from ftjax.data.labels import Labels
from ftjax.data.truncate import truncate


class RowEncoding:
    """One way for rows to become documents. Objects are small and are sent to worker processes.

    Attributes:
        sequences: documents of each row of data. All of a row stay together in one row of a batch, in their order.
        answers: whether documents end with an answer that should end with an end token.
    """

    sequences: ClassVar[int] = 1
    answers: ClassVar[bool] = True

    @property
    def values(self) -> int:
        """Numbers that a document carries besides its tokens (`Encoded.labels`)."""
        return 0

    def key(self) -> Any:
        """What of it decides which documents come out, as JSON: a part of their cache's key."""
        return type(self).__name__

    @property
    def label_reader(self) -> Callable[[Any, str], Any] | None:
        """Reads a value of the label column, given the place of its row; None: the format does."""
        return None

    def encoder(self, tokenizer: Any, config: DataConfig) -> RowEncoder:
        """What encodes rows with this tokenizer."""
        raise NotImplementedError

    def shorten(self, document: Encoded, config: DataConfig, bos: int | None) -> Sequence[Encoded]:
        """The pieces that a document longer than `data.max_length` becomes; none where it is dropped."""
        return truncate(document, config.max_length, config.truncation, bos)

    def label_text(self, document: Encoded) -> str | None:
        """The labels of a document for people; None where it has none."""
        return None


@dataclass(frozen=True)
class Answers(RowEncoding):
    """Each row is a text, or a conversation whose answers are trained.

    Attributes:
        labels: of a classification by words: how the label column is read.
    """

    labels: Labels | None = None

    def key(self) -> None:
        """The options of the data and the rows themselves say all of it."""
        return None

    @property
    def label_reader(self) -> Callable[[Any, str], Any] | None:
        return None if self.labels is None else self.labels.read

    def encoder(self, tokenizer: Any, config: DataConfig) -> Encoder:
        return Encoder(tokenizer, config.train_on_inputs, config.last_turn_only)


ANSWERS = Answers()
