"""The part of an objective that turns rows into documents and needs no devices."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ftjax.config.data import DataConfig
from ftjax.data.encode import Encoder
from ftjax.data.encoder import Encoded, RowEncoder
from ftjax.data.labels import Labels
from ftjax.data.truncate import truncate


class RowEncoding(ABC):
    """A way for rows to become documents. Objects are small and are sent to worker processes.

    Attributes:
        sequences: documents per row of data. All of them stay together in one row of a batch, in order.
        answers: whether documents end with an answer that should end with an end token.
    """

    sequences: ClassVar[int] = 1
    answers: ClassVar[bool] = True

    @property
    def values(self) -> int:
        """Extra numbers of a document besides its tokens (`Encoded.labels`)."""
        return 0

    def key(self) -> Any:
        """Return the settings that determine the documents, as JSON for the cache key."""
        return type(self).__name__

    @property
    def label_reader(self) -> Callable[[Any, str], Any] | None:
        """Function that reads a value of the label column, given the location of its row; None: the format reads it."""
        return None

    @abstractmethod
    def encoder(self, tokenizer: Any, config: DataConfig) -> RowEncoder:
        """Return the encoder for this tokenizer."""

    def shorten(self, document: Encoded, config: DataConfig, bos: int | None) -> Sequence[Encoded]:
        """Return the pieces of a document longer than `data.max_length`; none if it is dropped."""
        return truncate(document, config.max_length, config.truncation, bos)

    def label_text(self, document: Encoded) -> str | None:
        """Return the document's labels as text for display; None if it has none."""
        return None


@dataclass(frozen=True)
class Answers(RowEncoding):
    """Each row is a text, or a conversation whose answers are trained.

    Attributes:
        labels: how the label column is read, for a classification by words.
    """

    labels: Labels | None = None

    def key(self) -> None:
        """Return None: the data options and the rows determine the documents."""
        return None

    @property
    def label_reader(self) -> Callable[[Any, str], Any] | None:
        return None if self.labels is None else self.labels.read

    def encoder(self, tokenizer: Any, config: DataConfig) -> Encoder:
        return Encoder(tokenizer, config.train_on_inputs, config.last_turn_only)


ANSWERS = Answers()
