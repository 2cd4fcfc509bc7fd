"""The part of an objective that turns rows into documents and needs no devices."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ftjax.config.data import DataConfig
from ftjax.data.encode import Encoder
from ftjax.data.encoder import Encoded, RowEncoder, Unit
from ftjax.data.example import Example
from ftjax.data.labels import Labels
from ftjax.data.report import DataReport
from ftjax.data.truncate import truncate

# (row number, digest of its content, example)
Numbered = tuple[int, int, Example]


class RowEncoding(ABC):
    """A way for rows to become documents. Objects are small and are sent to worker processes.

    Attributes:
        sequences: documents per row of data. All of them stay together in one row of a batch, in order.
        answers: whether documents end with an answer that should end with an end token.
        imitated: whether documents are trained as they are; if not, they are prompts, without a trained token.
        reserved: tokens of a row that the documents of an example leave free.
        unwanted: whether rows whose label is false become documents, too.
        rejected: whether rejected answers become documents, too.
        formats: formats of data that it takes before all others.
    """

    sequences: int = 1
    reserved: int = 0
    answers: ClassVar[bool] = True
    imitated: ClassVar[bool] = True
    unwanted: ClassVar[bool] = False
    rejected: ClassVar[bool] = False
    formats: ClassVar[tuple[str, ...]] = ()

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

    def arrange(self, rows: Iterable[Numbered], report: DataReport) -> Iterator[Numbered]:
        """Return the examples to encode, each with a number of its own: the rows themselves by default.

        Examples with one digest stay on one side of a validation split. `report` counts rows that are left out, joined and
        divided.
        """
        return iter(rows)

    def size(self, unit: Sequence[Encoded]) -> int:
        """Return the tokens of a row that `data.min_tokens` and `data.max_tokens` count."""
        return sum(len(document.tokens) for document in unit)

    def refused(self, unit: Sequence[Encoded]) -> str | None:
        """Return the reason for which the documents of a row are dropped; None if they are kept."""
        return None

    def shorten(self, unit: Unit, config: DataConfig, bos: int | None) -> Sequence[Encoded]:
        """Return the documents of a row whose documents are longer than `data.max_length` together; none to drop the row."""
        return truncate(unit[0], config.max_length, config.truncation, bos) if len(unit) == 1 else ()

    def label_text(self, document: Encoded) -> str | None:
        """Return what the last token of a document stands for, for display; None if it is one of the text."""
        return None

    def captions(self, unit: Unit) -> Sequence[str]:
        """Return what each document of a row is, for display; empty if there is nothing to tell."""
        return [""] * len(unit)


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
