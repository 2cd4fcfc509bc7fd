"""The watchdog: notices a loss that is not a number or has jumped, and an evaluation that no longer improves."""

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
        if self.value is None or sign * (value - self.value) > self.threshold:
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
