"""Shows what a long step of a command does, how far it is, and what is left: a bar in a terminal and in a notebook, elsewhere a
line now and then, on stderr, and nothing for a step that is quick.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from ftjax.console import make_console, say

SOON = 10.0  # seconds until a step is long where there is no bar
AGAIN = 30.0  # seconds between two lines about one step
SHOWN = 0.5  # seconds until a bar is shown
KEPT = "compiled programs are kept, so the next start is quicker"  # a hint
T = TypeVar("T")

_steps: list["LongStep"] = []  # that are going on; the last one is the innermost
_hidden = 0  # how many callers ask for silence
_describe: Callable[[str], None] | None = None  # of a bar that is up already, such as that of a training run


def amount(number: float, unit: str) -> str:
    """Return a number with its unit: bytes in GB or MB, others with thousands apart."""
    if unit != "bytes":
        return f"{number:,.0f} {unit}".rstrip()
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Return a duration as `40 s`, `2 min 05 s` or `1 h 10 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class LongStep:
    """One step: what it does, and how much of it is done."""

    def __init__(self, what: str, total: float | None = None, unit: str = "", hint: str = ""):
        self.what, self.total, self.unit, self.hint = what, total, unit, hint
        self.done, self.start = 0.0, time.monotonic()

    def advance(self, more: float = 1) -> None:
        """Count what was done since the last call."""
        self.done += more

    def at(self, done: float) -> None:
        """Set what is done so far."""
        self.done = done

    def of(self, done: float, total: float) -> None:
        """Set what is done so far, and how much there is to do."""
        self.done, self.total = done, total

    def now(self, what: str) -> None:
        """Say otherwise what the step does."""
        self.what = what

    def text(self) -> str:
        """Return the step in words: `loading weights: 3.20 GB of 16.00 GB (20%), about 40 s left`."""
        passed = time.monotonic() - self.start
        if not self.total:
            return f"{self.what}: {f'{amount(self.done, self.unit)}, ' if self.done else ''}{duration(passed)} so far"
        share = min(self.done / self.total, 1.0)
        done = amount(self.done, self.unit) if self.unit == "bytes" else f"{self.done:,.0f}"
        text = f"{self.what}: {done} of {amount(self.total, self.unit)} ({share:.0%})"
        return f"{text}, about {duration(passed * (1 - share) / share)} left" if share and passed > 1 else text


@contextmanager
def long_step(what: str, total: float | None = None, unit: str = "", hint: str = "") -> Iterator[LongStep]:
    """Show a step while it goes on.

    Args:
        what: what is done, as in `loading weights`.
        total: how much there is to do, if it is known.
        unit: of `total` and of what `advance` counts; `bytes` are shown as GB.
        hint: said once about a step that is long, such as that the next start is quicker.
    """
    step = LongStep(what, total, unit, hint)
    if not _first_process():
        yield step
        return
    _steps.append(step)
    ended = threading.Event()
    thread = None
    if len(_steps) == 1:
        thread = threading.Thread(target=_watch, args=(ended,), daemon=True, name="ftjax-long-steps")
        thread.start()
    try:
        yield step
    finally:
        _steps.remove(step)
        if thread is not None:
            ended.set()
            thread.join()


def counted(what: str, items: Iterable[T], total: int | None = None, unit: str = "") -> Iterator[T]:
    """Yield the items and count them, as a step."""
    with long_step(what, total, unit) as step:
        for item in items:
            yield item
            step.advance()


def steps_go_on() -> bool:
    """Return whether a step is shown already."""
    return bool(_steps)


@contextmanager
def hidden() -> Iterator[None]:
    """Show no steps within."""
    global _hidden
    _hidden += 1
    try:
        yield
    finally:
        _hidden -= 1


@contextmanager
def described_by(describe: Callable[[str], None]) -> Iterator[None]:
    """Give steps to a bar that is up: it is called with the text of the innermost step, and with "" when there is none."""
    global _describe
    before, _describe = _describe, describe
    try:
        yield
    finally:
        _describe = before


def _first_process() -> bool:
    """Whether this process prints. JAX is asked only where it runs: the answer would start its devices."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def _watch(ended: threading.Event) -> None:
    """Show the innermost step until the outermost has ended."""
    console = make_console(stderr=True)
    bar, told, next_line = None, set(), SOON
    start = time.monotonic()
    try:
        while not ended.wait(0.1 if bar else 0.25):
            step = _steps[-1] if _steps else None
            passed = time.monotonic() - start
            if step is None or _hidden:
                continue
            if _describe is not None:
                _describe(step.text())
            elif console.is_terminal or console.is_jupyter:
                if bar is None and passed > SHOWN:
                    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
                    bar = Progress(*columns, console=console, transient=True)
                    task = bar.add_task("", total=None)
                    bar.start()
                if bar is not None:
                    bar.update(task, description=step.text(), total=step.total, completed=step.done)
            if (_describe is None and bar is None and passed >= next_line) or (step.hint and _long(step, told)):
                hint = f"; {step.hint}" if step.hint and step not in told else ""
                told.add(step)
                say(bar.console if bar else console, f"{step.text()}{hint}")
                next_line = passed + AGAIN
    finally:
        if bar is not None:
            bar.stop()
        if _describe is not None:
            _describe("")


def _long(step: LongStep, told: set[LongStep]) -> bool:
    return step not in told and time.monotonic() - step.start >= SOON
