"""The watchdog: skips bad updates, gives up after too many of them, and notices when the validation loss stops improving."""

import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from ftjax.errors import UserError

WINDOW = 32  # losses that define the usual range
WARMUP = 8  # losses needed before a spike can be detected
LAG = 2  # updates: when one starts, the previous one has not been read yet
FLOOR = 3.0  # nats above the median that never count as a spike: a row that surprises the model is no divergence


class LossWatch:
    """Decides which updates are skipped (their gradient is not applied), counts them, and decides when to give up.

    A loss is a spike if it is above the median of the latest losses by more than `factor` times the distance from the median to
    their 90th percentile, and by more than `FLOOR`. Updates skipped in a row do not change the usual range; once an update is
    applied again, they count like all others, so that repeated hard rows are trained.
    """

    def __init__(self, factor: float | None, patience: int):
        """Args: patience: updates in a row that may be skipped."""
        self._factor, self._patience, self._span = factor, patience, WINDOW + patience
        # Step, loss (None: not finite) and whether it was applied.
        self._seen: deque[tuple[int, float | None, bool]] = deque(maxlen=self._span + LAG)
        self.skipped = 0  # in the whole run

    def limit(self, step: int) -> float:
        """Return the largest loss for which update `step` is applied, given the updates up to `step - LAG`.

        Updates read since then do not count, so that an interrupted run resumes with the same limits.
        """
        last = step - LAG
        known = [(loss, good) for number, loss, good in self._seen if last - self._span < number <= last]
        while known and not known[-1][1]:
            known.pop()
        losses = [loss for loss, _ in known if loss is not None][-WINDOW:]
        if self._factor is None or len(losses) < WARMUP:
            return math.inf
        median, high = np.quantile(losses, [0.5, 0.9]).tolist()
        return median + max(FLOOR, self._factor * (high - median))

    def see(self, step: int, loss: float, good: bool) -> None:
        """Record an update. Args: good: whether it was applied."""
        self._seen.append((step, loss if math.isfinite(loss) else None, good))
        self.skipped += not good

    @property
    def in_a_row(self) -> int:
        """Number of the latest updates that were skipped in a row."""
        return sum(1 for _ in itertools.takewhile(lambda row: not row[2], reversed(self._seen)))

    @property
    def gives_up(self) -> bool:
        return self.in_a_row > self._patience

    def forget(self) -> None:
        """Forget the losses seen; the count of skipped updates stays."""
        self._seen.clear()

    def state(self) -> dict[str, Any]:
        return {"seen": [list(row) for row in self._seen], "skipped": self.skipped}

    def load(self, state: dict[str, Any]) -> None:
        self._seen.extend((step, loss, good) for step, loss, good in state["seen"])
        self.skipped = state["skipped"]


def why_skipped(loss: float, grad_norm: float, limit: float) -> str:
    """Describe what was wrong with an update."""
    what = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
    if math.isfinite(loss) and math.isfinite(grad_norm):
        what += f", and a loss above {limit:.4g} counts as a spike (training.loss_spike_factor)"
    return what


class Diverged(UserError):
    """Too many updates in a row were skipped; the state without them is saved."""

    def __init__(self, step: int, skipped: int, last: str):
        """Args: skipped: updates skipped in a row, the last of which is `step`; last: what was wrong with that one."""
        super().__init__(
            f"training diverged at step {step}: {skipped} updates in a row were not applied (the last one: {last}). The "
            f"checkpoint of step {step} holds the weights as they were before these updates, and the position in the data "
            "after them: the same command resumes from there, and learns the usual range of the loss again. If that ends the "
            "same way, earlier updates have broken the weights: choose another output_dir with a lower "
            "optimizer.learning_rate, more warmup or a smaller optimizer.max_grad_norm"
        )


RISES = 2  # evaluations in a row whose loss is higher than the one before


class OverfitWatch:
    """Notices that the validation loss rises while the training loss falls."""

    def __init__(self):
        self.seen: list[list[float]] = []  # [step, training loss since the previous evaluation, validation loss]
        self.warned = False

    def see(self, step: int, train_loss: float, eval_loss: float) -> str | None:
        """Return a warning if this evaluation shows overfitting that was not warned of before."""
        if self.seen and eval_loss < min(row[2] for row in self.seen):
            self.warned = False
        self.seen.append([step, train_loss, eval_loss])
        last = self.seen[-RISES - 1 :]
        rises = len(last) > RISES and all(a[2] < b[2] for a, b in itertools.pairwise(last))
        if self.warned or not rises or not last[-1][1] < last[0][1]:
            return None
        self.warned = True
        best = min(self.seen, key=lambda row: row[2])
        return (
            f"overfitting: the validation loss rises ({best[2]:.4g} at step {best[0]:.0f}, now {eval_loss:.4g}) while the "
            f"training loss falls ({last[0][1]:.4g} to {train_loss:.4g}). best/ has the best of them; fewer epochs, a lower "
            "optimizer.learning_rate, dropout or more data may help, and training.early_stopping_patience ends such a run"
        )

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen, "warned": self.warned}

    def load(self, state: dict[str, Any]) -> None:
        self.seen, self.warned = [list(row) for row in state["seen"]], state["warned"]


ROWS = 3  # rows in a row that look wrong before it is said


class MetricWatch:
    """Passes on what an objective finds wrong with the training metrics, once, if it stays wrong for some rows."""

    def __init__(self):
        self._wrong = 0

    def see(self, warning: str | None) -> str | None:
        """Return the warning if this is the row to say it. Args: warning: what is wrong with this row, or None."""
        if self._wrong > ROWS:  # said before
            return None
        self._wrong = self._wrong + 1 if warning else 0
        if self._wrong < ROWS:
            return None
        self._wrong = ROWS + 1
        return warning

    def state(self) -> int:
        """Return the state as JSON."""
        return self._wrong

    def load(self, state: int) -> None:
        """Load a `state`."""
        self._wrong = state


@dataclass
class BestMetric:
    """Tracks the best evaluation so far, and when to stop waiting for a better one."""

    name: str
    greater_is_better: bool
    patience: int | None
    threshold: float
    value: float | None = None
    step: int = 0
    waited: int = 0

    def see(self, step: int, metrics: dict[str, float]) -> bool:
        """Return whether this evaluation is better than all before it, by more than the threshold.

        Raises UserError if the metric does not exist.
        """
        if self.name not in metrics:
            raise UserError(f"training.metric_for_best_model: {self.name!r} is not measured; there are {', '.join(metrics)}")
        value = metrics[self.name]
        sign = 1 if self.greater_is_better else -1
        if not math.isnan(value) and (self.value is None or sign * (value - self.value) > self.threshold):
            self.value, self.step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        self.value, self.step, self.waited = state["value"], state["step"], state["waited"]
