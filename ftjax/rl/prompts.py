"""The prompts of a run, with the columns of their rows, and the order in which they are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

from ftjax.config import Config
from ftjax.config.data import SourceConfig
from ftjax.data.pipeline import PackedSplit
from ftjax.distributed.agree import digest
from ftjax.errors import UserError
from ftjax.evaluate.rows import Item, items_of


@dataclass(frozen=True)
class Question:
    """One prompt.

    Attributes:
        item: its row.
        ids: its tokens.
        place: number of the document in the data set.
    """

    item: Item
    ids: Int32[np.ndarray, " T"]
    place: int

    @property
    def prompt(self) -> str | list[dict[str, Any]]:
        """The prompt as the row has it: a text, or messages."""
        example = self.item.example
        if example.prompt is not None:
            return example.prompt
        last = max((n for n, turn in enumerate(example.messages) if turn["role"] == "assistant"), default=0)
        return list(example.messages[: last if example.prompt_turns is None else example.prompt_turns])


class Prompts:
    """Prompts in the order of a split.

    Attributes:
        facts: digests that must be the same on all processes, and when a run resumes.
    """

    def __init__(self, split: PackedSplit, sources: Sequence[SourceConfig], config: Config):
        """Read the rows of a split again, with all their columns. Raises UserError if they have changed meanwhile."""
        self.split = split
        items, _ = items_of(sources, config, split.places())
        rows = {(item.example.source, item.where): item for item in items}
        self.questions: dict[int, Question] = {}
        for place in split.chosen.tolist():
            document = split.documents.document(place)
            item = rows.get((document.source, document.where))
            if item is None:
                raise UserError(f"{document.where}: the row is gone; has the file changed since this command began?")
            self.questions[place] = Question(item, document.tokens, place)
        self.facts = {"digest of the rows": digest([sorted(item.values.items(), key=str) for item in items])}

    def __len__(self) -> int:
        return len(self.questions)


class Draw:
    """Draws documents of a split without end, epoch after epoch; the position is JSON."""

    def __init__(self, split: PackedSplit, seed: int):
        self._split, self._seed = split, seed
        self.epoch, self.row, self.drawn = 0, 0, 0  # documents of this epoch, and of all epochs, that were drawn
        self._order: list[int] = []
        self._of: int | None = None

    def take(self, count: int) -> list[int]:
        """Return the next documents, by place."""
        found = []
        while len(found) < count:
            if self._of != self.epoch:
                self._order, self._of = self._places(self.epoch), self.epoch
            if self.row >= len(self._order):
                self.epoch, self.row = self.epoch + 1, 0
                continue
            found.append(self._order[self.row])
            self.row, self.drawn = self.row + 1, self.drawn + 1
        return found

    def _places(self, epoch: int) -> list[int]:
        """Return the documents of an epoch in the order in which they are drawn."""
        places = np.sort(self._split.plan(epoch, True, self._seed).documents)
        if self._split.shuffle:
            places = np.random.default_rng((self._seed, 0x70726F6D, epoch)).permutation(places)
        return places.tolist()

    def state(self) -> dict[str, int]:
        """Return the position."""
        return {"epoch": self.epoch, "row": self.row, "drawn": self.drawn}

    def load(self, state: dict[str, int]) -> None:
        """Move to a position."""
        self.epoch, self.row, self.drawn = state["epoch"], state["row"], state["drawn"]
