"""The thread that owns the devices: requests wait in its queue, and their news go back to the event loop."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from ftjax.generate.scheduler import Job, Scheduler
from ftjax.serve.errors import ApiError

log = logging.getLogger(__name__)
T = TypeVar("T")


class EngineThread:
    """Runs a scheduler in a thread of its own, the only one that touches it.

    Attributes:
        limit: the most requests that may be there at a time, running and waiting.
        failure: what ended the thread, or None.
    """

    def __init__(self, scheduler: Scheduler, limit: int):
        self.scheduler, self.limit = scheduler, limit
        self.failure: BaseException | None = None
        self.draining = False
        self._inbox: deque[Callable[[], None]] = deque()
        self._jobs: set[Job] = set()
        self._wake = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="ftjax-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def jobs(self) -> frozenset[Job]:
        """The jobs that run or wait."""
        with self._wake:
            return frozenset(self._jobs)

    @property
    def load(self) -> int:
        """Number of jobs that run or wait."""
        return len(self._jobs)

    def submit(self, jobs: Sequence[Job], still: Callable[[], bool] = lambda: True) -> None:
        """Add the jobs of one request, all or none.

        Args:
            still: whether what the jobs ask for is still there, so that no other adapter has taken their place in the engine.

        Raises ApiError: 404 if it is not, 429 if the queue is full, 503 while the server drains, 500 if the engine has failed.
        """
        with self._wake:
            if self.failure is not None:
                raise ApiError(500, f"the engine has failed: {self.failure}")
            if self.draining:
                raise ApiError(503, "the server is shutting down", code="draining")
            if not still():
                raise ApiError(404, "the model was unloaded", "model", "model_not_found")
            if len(self._jobs) + len(jobs) > self.limit:
                raise ApiError(
                    429, f"{len(self._jobs)} requests run or wait, of {self.limit} at most; try again later", code="queue_full"
                )
            self._jobs |= set(jobs)
            for job in jobs:
                self._inbox.append(lambda job=job: self._begin(job))
            self._wake.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs, whose rows are free before the next token."""
        with self._wake:
            for job in jobs:
                job.cancelled = True
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function in the engine's thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self.failure is not None:
                raise ApiError(500, f"the engine has failed: {self.failure}")
            self._inbox.append(run)
            self._wake.notify()
        return future

    def drain(self) -> None:
        """Take no more requests; those that are there go on to their end."""
        with self._wake:
            self.draining = True

    def stop(self) -> None:
        """End the thread, and every request that is still there."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    # ---- in the thread ----

    def _begin(self, job: Job) -> None:
        told = job.news

        def news(job: Job) -> None:
            if job.ended:
                with self._wake:
                    self._jobs.discard(job)
            told(job)

        job.news = news
        self.scheduler.submit(job)

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._inbox and self.scheduler.idle and not self._stopped:
                        self._wake.wait()
                    if self._stopped:
                        break
                    inbox, self._inbox = self._inbox, deque()
                for one in inbox:
                    one()
                if not self.scheduler.idle:
                    self.scheduler.step()
        except BaseException as error:
            log.exception("the engine has failed")
            self._end_all(error)
        else:
            self._end_all(None)

    def _end_all(self, failure: Any) -> None:
        with self._wake:
            self.failure = failure
            left, self._jobs = list(self._jobs), set()
        for job in left:
            job.answer.finish = job.answer.finish or "error"
            job.ended = True
            job.news(job)
