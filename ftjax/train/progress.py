"""Progress of a run: a progress bar in a terminal and in a notebook, plain lines elsewhere."""

import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import jax
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from ftjax.console import make_console
from ftjax.console import say as write
from ftjax.long_steps import described_by, hidden

_console = make_console()


@contextmanager
def silent() -> Iterator[None]:
    """Print neither lines nor a progress bar within."""
    before, _console.quiet = _console.quiet, True
    try:
        with hidden():
            yield
    finally:
        _console.quiet = before


def say(*lines: str) -> None:
    """Print lines above the progress bar, on the first process only."""
    if jax.process_index() == 0:
        for line in lines:
            write(_console, line)


class Progress:
    """Counts updates and tokens; `with` shows the bar."""

    def __init__(self, total: int, first: int):
        self._total = total
        self._marks: list[tuple[float, float]] = []  # (time, tokens so far)
        self._tokens = 0.0
        self._bar, self._text, self._described = None, "starting", ExitStack()
        notebook = _console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        if jax.process_index() == 0 and (sys.stdout.isatty() or notebook):
            bar = BarColumn(bar_width=None, table_column=Column(ratio=1))  # the rest of the line
            columns = (bar, MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=_console, expand=True)
            self._task = self._bar.add_task(self._text, total=total, completed=first)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
            self._described.enter_context(described_by(self._describe))
        return self

    def __exit__(self, *_) -> None:
        self._described.close()
        if self._bar:
            self._bar.stop()

    def _describe(self, text: str) -> None:
        """Show what a step beside the updates does, such as an evaluation; "" shows the last update again."""
        self._bar.update(self._task, description=text or self._text)

    def update(self, step: int, loss: float, tokens: float, ended: float | None = None) -> None:
        """Count an update. Args: ended: when it was found to be done (`time.perf_counter`); None: now."""
        if self._marks:  # the first step compiles, so its time does not count
            self._tokens += tokens
        self._marks.append((time.perf_counter() if ended is None else ended, self._tokens))
        del self._marks[:-20]
        if self._bar:
            self._text = f"loss {loss:.4f}  {self.rate():,.0f} tokens/s"
            self._bar.update(self._task, completed=step, description=self._text)

    def rate(self) -> float:
        """Return tokens per second (without padding) over the last updates; 0 until there are two."""
        if len(self._marks) < 2:
            return 0.0
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / max(end - start, 1e-9)

    def skip_time(self) -> None:
        """Leave the time since the last update, spent on an evaluation, out of the rate."""
        if self._marks:
            skipped = time.perf_counter() - self._marks[-1][0]
            self._marks = [(at + skipped, tokens) for at, tokens in self._marks]

    def report(self, step: int, row: Mapping[str, float]) -> None:
        """Print one row of metrics as a line."""
        shown = (
            "train/loss",
            "train/reward",
            "train/learning_rate",
            "train/tokens_per_second",
            "train/mfu",
            "eval/loss",
            "eval/token_accuracy",
        )
        others = [name for name in row if name.startswith("eval/") and name not in (*shown, "eval/perplexity", "eval/seconds")]
        text = "  ".join(f"{name} {row[name]:.4g}" for name in (*shown, *others) if name in row)
        if self._bar is None or any(name.startswith("eval/") for name in row):
            say(f"step {step}/{self._total}  {text}")
