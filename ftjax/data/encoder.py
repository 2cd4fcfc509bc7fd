"""The base of every objective's encoder: rows become texts, batches of texts become tokens, tokens become documents."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftjax.data.control import Control
from ftjax.data.example import Example
from ftjax.data.faults import Faults
from ftjax.data.tokens import Tokens
from ftjax.errors import UserError


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document: `tokens` int32 `[n]`, and `weights` float32 `[n]`, the weight of each token as a target.

    `labels` float32 `[labels]`: further numbers of the document, such as the labels of a text.
    """

    tokens: np.ndarray
    weights: np.ndarray
    where: str
    source: int = 0
    labels: np.ndarray | None = None


Unit = tuple[Encoded, ...]  # the documents of one row, which stay in one row of a batch


class NoWay(UserError):
    """The tokenizer cannot serve the data: no row is at fault, so none is skipped."""


@dataclass(slots=True)
class TextPlan:
    """A text and its spans: start, stop, weight.

    Attributes:
        cuts: where prompts end in it, ascending.
        whole: tokenise it as a whole despite the cuts.
        answered: it ends with an answer, after which the end is trained.
        spelled: special tokens that answers spell.
        closers: special tokens that the template writes after answers.
        control: for a text with aliases.
    """

    example: Example
    text: str
    spans: list[tuple[int, int, float]]
    cuts: list[int] = field(default_factory=list)
    whole: bool = False
    chat: bool = False
    answered: bool = True
    spelled: frozenset[int] = frozenset()
    closers: frozenset[int] = frozenset()
    control: Control | None = None

    @property
    def texts(self) -> list[str]:
        return [*(self.text[:cut] for cut in self.cuts), self.text]


@dataclass
class RowEncoder(ABC):
    """Turns rows into documents, in batches; `notes` counts what deserves a warning.

    Subclasses define the texts of a row (`plan`) and the document of their tokens (`encode`).
    """

    tokenizer: Any
    notes: Counter[str] = field(default_factory=Counter, kw_only=True)

    def __post_init__(self):
        self.tokens = Tokens(self.tokenizer)

    @abstractmethod
    def plan(self, example: Example) -> Sequence[TextPlan | Encoded]:
        """Return the texts of a row, the same number for every row of an objective, or documents if it is tokenised
        already.

        Raises UserError, with file and line, for a row that cannot be used, and NoWay if no row could be used.
        """

    @abstractmethod
    def encode(self, plan: TextPlan, encodings: list[Any]) -> Encoded:
        """Return the document of a text from the encodings of `plan.texts`. Raises NoWay if no row could be used."""

    def __call__(self, examples: Sequence[Example], faults: Faults | None = None) -> list[Encoded | None]:
        """Return the document of each example that becomes one, or None for one that `faults` skips.

        Raises UserError as `plan` and `encode` do.
        """
        (units,) = self.stream([examples], faults)
        return [None if unit is None else unit[0] for unit in units]

    def stream(self, chunks: Iterable[Sequence[Example]], faults: Faults | None = None) -> Iterator[list[Unit | None]]:
        """Encode chunks: yield the documents of each example, or None for one that `faults` skips.

        While Rust threads tokenise one chunk, Python renders the texts of the next and finds the weights of the one before.
        """
        faults = faults or Faults()
        waiting: tuple[list[Sequence[TextPlan | Encoded] | None], Future] | None = None
        with ThreadPoolExecutor(1, "tokenize") as pool:
            for examples in chunks:
                plans = [self._planned(example, faults) for example in examples]
                coming = plans, pool.submit(self._tokenised, plans)
                if waiting is not None:
                    yield self._encoded(*waiting)
                waiting = coming
            if waiting is not None:
                yield self._encoded(*waiting)

    def _planned(self, example: Example, faults: Faults) -> Sequence[TextPlan | Encoded] | None:
        try:
            return self.plan(example)
        except NoWay:
            raise
        except UserError as error:
            faults(error)
            return None

    def _tokenised(self, plans: list[Sequence[TextPlan | Encoded] | None]) -> Iterator[list[Any]]:
        """Return the encodings of each text, in order."""
        wanted = [plan for row in plans for plan in row or () if isinstance(plan, TextPlan)]
        encodings = iter(self.tokens.batch([text for plan in wanted if plan.control is None for text in plan.texts]))
        return iter(
            [plan.control.batch(plan.texts) if plan.control else [next(encodings) for _ in plan.texts] for plan in wanted]
        )

    def _encoded(self, plans: list[Sequence[TextPlan | Encoded] | None], batch: Future) -> list[Unit | None]:
        encodings = batch.result()
        return [
            None
            if row is None
            else tuple(self.encode(plan, next(encodings)) if isinstance(plan, TextPlan) else plan for plan in row)
            for row in plans
        ]
