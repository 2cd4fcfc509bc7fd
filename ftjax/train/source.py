"""Sources of a run's batches."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from ftjax.config import Config, TrainingConfig
from ftjax.data.batch import Batch
from ftjax.data.pipeline import Split
from ftjax.train.announce import example_lines
from ftjax.train.layout import BatchLayout
from ftjax.train.record import split_record


class BatchSource(Protocol):
    """Endless batches of this process's rows, with a position that is the same on all processes.

    Attributes:
        steps: updates of one run; None if the source has no end, and `training.max_steps` is required.
        steps_per_epoch: updates per pass over a data set; None if there is none.
        layout: how the latest batch is placed on the devices; its number of rows may change from batch to batch.
        follows: whether the next batch depends on the result of an update, so that no work is prepared meanwhile.
        metrics: of the latest batch, by name: a weighted sum and its weight.
        texts: examples of the latest batch, to be logged.
        trouble: a warning about the latest batch, or None.
    """

    steps: int | None
    steps_per_epoch: int | None
    layout: BatchLayout
    follows: bool
    metrics: Mapping[str, tuple[float, float]]
    texts: Sequence[Mapping[str, str]]
    trouble: str | None

    def next(self, params: Mapping[str, jax.Array]) -> Batch:
        """Return the next batch. Args: params: current trained parameters, for batches that the model itself generates.

        Raises UserError if there is none; the position is then that of this batch.
        """

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next batch, as JSON: independent of the number of processes."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Move to a position."""

    def report(self) -> list[str]:
        """Describe the data, for people."""

    def example(self, config: Config, tokenizer: Any) -> list[str]:
        """Show one row, for people."""

    def record(self) -> dict[str, Any] | None:
        """Return what run.json says of the data; None if there is none."""


class DatasetBatches:
    """A `BatchSource` of a tokenized data set, shuffled for each epoch."""

    follows = False
    metrics: Mapping[str, tuple[float, float]] = {}
    texts: Sequence[Mapping[str, str]] = ()
    trouble: str | None = None

    def __init__(self, split: Split, options: TrainingConfig, layout: BatchLayout, steps: int):
        """Args: steps: `steps_of_run`, which may pack every epoch and is computed once per start."""
        self._split, self.layout = split, layout
        self.steps: int | None = steps
        self.steps_per_epoch: int | None = math.ceil(split.rows_per_epoch(0) / options.global_batch_size)
        self._batches = split.batches(
            options.global_batch_size, seed=options.seed, shuffle=True, epochs=None, rows=layout.own,
            width_multiple=layout.length_parts,
        )  # fmt: skip
        self.get_state, self.set_state = self._batches.get_state, self._batches.set_state

    def next(self, params: Mapping[str, jax.Array]) -> Batch:
        """Return the next batch, whatever the parameters are."""
        return next(self._batches)

    def report(self) -> list[str]:
        """Return the report on the data set."""
        return self._split.report.lines()

    def example(self, config: Config, tokenizer: Any) -> list[str]:
        """Return the first document, with the trained tokens marked."""
        return example_lines(config, self._split, tokenizer)

    def record(self) -> dict[str, Any]:
        """Return `split_record` of the data set."""
        return split_record(self._split)


def steps_of_run(split: Split, options: TrainingConfig) -> int:
    """Return the updates of the whole run; epochs may pack into different numbers of rows."""
    if options.max_steps:
        return options.max_steps
    whole = math.ceil(options.num_train_epochs)
    each = [math.ceil(split.rows_per_epoch(epoch) / options.global_batch_size) for epoch in range(whole)]
    return max(1, math.ceil(sum(each[:-1]) + each[-1] * (options.num_train_epochs - whole + 1)))
