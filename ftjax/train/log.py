"""Rows of training metrics: means since the last row, throughput, memory, and the epoch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ftjax.config import Config
from ftjax.flops import TrainFlops, peak_of
from ftjax.objectives import objective_of
from ftjax.train.means import Means
from ftjax.train.record import peak_memory_gib
from ftjax.train.step import StepMetrics


@dataclass
class Update:
    """An update that was dispatched, and whose metrics have not been fetched."""

    step: int
    metrics: StepMetrics
    limit: float  # the largest loss that is applied
    ended: float | None = None  # when it was found to be done (`time.perf_counter`)
    batch: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # metrics of its batch
    texts: Sequence[Mapping[str, str]] = ()  # examples of its batch


@dataclass(frozen=True)
class Read:
    """Metrics of an update, on the host; see `StepMetrics`."""

    loss: float
    weight: float
    trained: float
    tokens: float
    grad_norm: float
    update_norm: float
    good: bool


class Log:
    """Accumulates the training metrics and builds the rows to log.

    Attributes:
        since_eval: means of the loss since the last evaluation.
        latest: the last row.
        why: why the latest skipped update was skipped.
    """

    def __init__(
        self, mesh: Mesh, flops: TrainFlops, steps: int, steps_per_epoch: int | None, logging_steps: int,
        schedule: Callable[[int], Any], config: Config,
    ):  # fmt: skip
        self._objective, self._section = objective_of(config), config.objective
        self._mesh, self._steps, self._steps_per_epoch, self._logging_steps = mesh, steps, steps_per_epoch, logging_steps
        self._schedule, self._peak, self.flops = schedule, peak_of(list(mesh.devices.flat)), flops
        self._window, self.since_eval = Means(), Means()
        self._counted = np.zeros(2)  # FLOPs and tokens since the last row
        self.latest: dict[str, float] = {}
        self.why = ""

    def read(self, update: Update) -> Read:
        """Fetch the metrics of an update, and add them to the means if it was applied."""
        found = update.metrics
        scalars = (found.loss, found.weight, found.trained, found.tokens, found.grad_norm, found.update_norm, found.good)
        read = Read(*(np.asarray(value).item() for value in scalars))
        if read.good:
            totals = {"loss": (read.loss * read.weight, read.weight)}
            self.since_eval.add(totals)
            metrics = {name: tuple(float(part) for part in pair) for name, pair in found.metrics.items()}
            self._window.add(totals | metrics)
        self._window.add(update.batch)
        self._counted += (np.asarray(found.flops).item(), read.tokens)
        return read

    def is_time(self, step: int) -> bool:
        """Return whether a row is logged after this update."""
        return step % self._logging_steps == 0 or step == self._steps

    def row(self, step: int, read: Read, skipped: int, tokens_per_second: float) -> dict[str, float]:
        """Return the row of this update, with means over the updates applied since the last row.

        Args:
            skipped: updates of the whole run that were not applied.
        """
        means = {**({"loss": 0.0} if read.good else {}), **self._window.means()}
        if self._objective.train_metrics:
            means |= self._objective.derived(self._section, means)
        row = {f"train/{name}": value for name, value in means.items()}
        row["train/learning_rate"] = float(self._schedule(step - 1 - skipped))
        if read.good:
            row |= {"train/grad_norm": read.grad_norm, "train/update_norm": read.update_norm}
        row |= {"train/trained_tokens": read.trained, "train/skipped_updates": skipped, **self._speed(tokens_per_second)}
        row["train/peak_memory_gib"] = peak_memory_gib(self._mesh.local_devices)
        if self._steps_per_epoch is not None:
            row["train/epoch"] = step / self._steps_per_epoch
        self._window.clear()
        self._counted[:] = 0
        self.latest |= row
        return row

    def warning(self, row: Mapping[str, float]) -> str | None:
        """Return what looks wrong to the objective in a row, or None."""
        means = {name.removeprefix("train/"): value for name, value in row.items()}
        return self._objective.warning(self._section, means)

    def _speed(self, tokens_per_second: float) -> dict[str, float]:
        """Return the throughput per device, and MFU (`ftjax.flops`) if the chip is known."""
        devices = self._mesh.size
        flops = tokens_per_second * self._counted[0] / max(self._counted[1], 1)
        row = {
            "train/tokens_per_second": tokens_per_second,
            "train/tokens_per_second_per_device": tokens_per_second / devices,
            "train/tflops_per_second_per_device": flops / devices / 1e12,
        }
        return row | ({"train/mfu": flops / self._peak} if self._peak else {})

    def state(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {"window": self._window.state(), "since_eval": self.since_eval.state(), "latest": self.latest}

    def load(self, state: dict[str, Any]) -> None:
        """Load a `state`."""
        self._window.load(state["window"])
        self.since_eval.load(state["since_eval"])
        self.latest = state["latest"]
