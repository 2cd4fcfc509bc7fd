"""The watchdog: notices a loss that is not a number or has jumped, and an evaluation that no longer improves."""

import itertools
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from ftjax.errors import UserError

WINDOW = 32  # losses that the running median looks back on
WARMUP = 8  # losses needed before a spike can be told


class LossWatch:
    """The limit that the next update's loss must not exceed."""

    def __init__(self, factor: float | None):
        self._factor = factor
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def limit(self) -> float:
        if self._factor is None or len(self.recent) < WARMUP:
            return math.inf
        return self._factor * statistics.median(self.recent)

    def see(self, step: int, loss: float, grad_norm: float, good: bool) -> None:
        """Raises Diverged where the update was refused."""
        if not good:
            raise Diverged(step, loss, grad_norm, self.limit())
        self.recent.append(loss)


class Diverged(UserError):
    """An update was refused; the state is still that of the step before."""

    def __init__(self, step: int, loss: float, grad_norm: float, limit: float):
        what = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        if math.isfinite(loss) and math.isfinite(grad_norm):
            what += f", while {limit:.4g} is the limit (training.loss_spike_factor times the running median)"
        super().__init__(
            f"training diverged at step {step}: {what}. The update was not applied and the state before it was saved. "
            "Try a lower optimizer.learning_rate, more warmup or a smaller optimizer.max_grad_norm"
        )


RISES = 2  # evaluations in a row whose loss is higher than the one before


class OverfitWatch:
    """Notices that the validation loss rises while the training loss falls."""

    def __init__(self):
        self.seen: list[list[float]] = []  # [step, training loss since the evaluation before, validation loss]
        self.warned = False

    def see(self, step: int, train_loss: float, eval_loss: float) -> str | None:
        """A warning, where this evaluation gives reason for one that was not given before."""
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


@dataclass
class BestMetric:
    """Tells whether an evaluation is the best so far, and when to stop waiting for a better one."""

    name: str
    greater_is_better: bool
    patience: int | None
    threshold: float
    value: float | None = None
    step: int = 0
    waited: int = 0

    def see(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether this evaluation is better than all before it, by more than the threshold.

        Raises UserError where the metric does not exist.
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
