"""Times the phases of an update."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds spent in each phase of a batch, as metrics."""

    def __init__(self):
        self.spent: dict[str, float] = {}

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Time a phase."""
        start = time.perf_counter()
        yield
        name = f"time/{phase}"
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start
