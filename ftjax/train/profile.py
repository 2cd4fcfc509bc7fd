"""`training.profile_steps`: a trace of a few updates, for `xprof` or TensorBoard's profile plugin."""

from contextlib import AbstractContextManager
from pathlib import Path

import jax

from ftjax.errors import UserError
from ftjax.train.progress import say


class Profile:
    """Traces the updates `first` to `last`, both included, into `folder`; each process traces its own devices."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, total: int):
        """Raises UserError if the run ends before the last of them."""
        self._steps, self._folder, self._on = steps, folder, False
        if steps and steps[1] > total:
            raise UserError(f"training.profile_steps: {list(steps)} are not all in this run, which has {total} steps")

    def step(self, number: int) -> AbstractContextManager:
        """Return a context for the dispatch of one update, which the trace labels with its number."""
        if self._steps and number == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def dispatched(self, number: int, result: object) -> None:
        """Stop the trace after the last update to profile; waits for it, so that the trace is complete."""
        if self._on and number >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()
            say(f"profile of steps {self._steps[0]} to {self._steps[1]}: xprof --logdir {self._folder}")

    def close(self) -> None:
        """Write the trace so far: a run may stop between the steps."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
