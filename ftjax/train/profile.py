"""`training.profile_steps`: a trace of a few updates, for `xprof` or TensorBoard's profile plugin."""

from contextlib import AbstractContextManager
from pathlib import Path

import jax

from ftjax.errors import UserError
from ftjax.train.progress import say


class Profile:
    """Traces the updates `first` to `last`, both included, into `folder`; each process its own devices."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, total: int):
        """Raises UserError where the run ends before them."""
        self._steps, self._folder, self._on = steps, folder, False
        if steps and steps[1] > total:
            raise UserError(f"training.profile_steps: {list(steps)} are not all in this run, which has {total} steps")

    def step(self, number: int) -> AbstractContextManager:
        """Around the dispatch of one update, whose number the trace then shows."""
        if self._steps and number == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def dispatched(self, number: int, result: object) -> None:
        """After an update was dispatched: the last one is waited for, so that the trace has the whole of it."""
        if self._on and number >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()
            say(f"profile of steps {self._steps[0]} to {self._steps[1]}: xprof --logdir {self._folder}")

    def close(self) -> None:
        """Write what there is: a run may be stopped between the steps."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
