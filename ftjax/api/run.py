"""Training, and what a run has written."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ftjax.api.settings import Settings, settings_of
from ftjax.config import Config
from ftjax.cpu_threads import set_threads
from ftjax.distributed.join import joined
from ftjax.errors import UserError
from ftjax.gpu import set_flags
from ftjax.objectives import generates
from ftjax.report.read import Run as Files
from ftjax.report.read import read_run

if TYPE_CHECKING:
    from ftjax.api.model import Model


class Run(os.PathLike[str]):
    """A run's folder and what is in it. It stands for its path wherever a path is expected.

    >>> run = ftjax.Run("runs/first")
    >>> run.metrics["train/loss"].shape == run.steps["train/loss"].shape
    True

    Attributes:
        folder: the run's output_dir, as an absolute path.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Read a run, finished or not. Raises UserError if the folder is not a run's, or one of its files is damaged."""
        self.folder: Path = Path(folder).absolute()
        self.folder = self._read.folder

    @classmethod
    def _trained(cls, folder: str) -> "Run":
        """Return a run that this process took part in; only the first process of several may have its files."""
        self = cls.__new__(cls)
        self.folder = Path(folder).absolute()
        return self

    @cached_property
    def _read(self) -> Files:
        return read_run(self.folder)

    @property
    def config(self) -> Config:
        """The run's configuration, with every setting."""
        return self._read.config

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        return f"Run({self.folder}: {self.state})"

    @property
    def state(self) -> str:
        """Whether the run has ended, in words."""
        return self._read.state

    @property
    def final(self) -> Path:
        """The folder of the finished run's result."""
        return self.folder / "final"

    @property
    def best(self) -> Path | None:
        """The folder of the best result; None without an evaluation while training."""
        return self.folder / "best" if (self.folder / "best").is_dir() else None

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """Every metric's values, float64 `[N]`, in the order in which they were logged."""
        return {name: np.array([value for _, value in self._read.curve(name)], np.float64) for name in self._read.names("")
                if name != "step"}  # fmt: skip

    @cached_property
    def steps(self) -> dict[str, np.ndarray]:
        """The steps at which each metric was logged, int64 `[N]`."""
        return {name: np.array([step for step, _ in self._read.curve(name)], np.int64) for name in self.metrics}

    @property
    def warnings(self) -> list[tuple[int, str]]:
        """Warnings while training, each with its step."""
        return list(self._read.warnings)

    def model(self, which: Literal["final", "best"] = "final", **options: Any) -> "Model":
        """Load the result.

        >>> model = run.model()

        Args:
            options: those of `load`.

        Raises UserError if the run has no such result.
        """
        if not (self.folder / which).is_dir():
            raise UserError(f"{self.folder}: this run has no {which}/ ({self.state})")
        from ftjax.api.model import load  # not needed to train

        return load(self.folder / which, **options)


def train(
    config: Settings, *, on_log: Callable[[dict[str, Any]], None] | None = None, quiet: bool = False,
    allow_code_execution: bool = False, devices: Sequence[Any] | None = None, **overrides: Any,
) -> Run:  # fmt: skip
    """Fine-tune a model; resume if `output_dir` holds a checkpoint of the same configuration and data.

    >>> rows = [{"prompt": "Tom went", "completion": " home."}, {"prompt": "The dog", "completion": " ran."}]
    >>> run = ftjax.train(
    ...     {"model": {"path": "model"}, "method": {"name": "lora", "r": 4}},
    ...     data__train=rows, training__max_steps=2, output_dir="runs/second", quiet=True,
    ... )
    >>> run.metrics["train/loss"].shape
    (1,)

    Args:
        config: the path of a YAML file, a dict with the same keys, or a `Config`.
        on_log: called with every row of metrics.jsonl after it is written: `step` with metrics, with answers or with a
            warning. An exception that it raises ends the run, which resumes from its last checkpoint.
        quiet: print nothing.
        allow_code_execution: let the reward `code` run what the model writes.
        devices: devices of JAX to use; None uses all.
        overrides: settings by key, with two underscores for the dot. `data__train` and `data__validation` may be rows in
            memory: a list of dicts, a `datasets.Dataset` or a DataFrame of pandas.

    Returns: the run.

    Raises UserError for anything wrong in the configuration, the model or the data, and Interrupted if a signal stopped the
    run, after its state was saved.
    """
    if on_log is not None and not callable(on_log):
        raise UserError(f"on_log: expected a function that takes a row; found {type(on_log).__name__}")
    set_threads()
    set_flags()
    with joined():
        settings = settings_of(config, overrides)
        train_config(
            settings, command="call ftjax.train as before", on_log=on_log, quiet=quiet,
            allow_code_execution=allow_code_execution, devices=devices,
        )  # fmt: skip
    return Run._trained(settings.output_dir)


def train_config(
    config: Config, *, command: str, on_log: Callable[[dict[str, Any]], None] | None = None, quiet: bool = False,
    allow_code_execution: bool = False, devices: Sequence[Any] | None = None,
) -> None:  # fmt: skip
    """Train a validated configuration; both `train` and the command call this. Args: command: what resumes the run."""
    from ftjax.train.progress import silent
    from ftjax.train.run import train as run

    makers: dict[str, Any] = {"make_observer": _observer}
    if generates(config):
        from ftjax.rl.learn import Learning

        learning = Learning(config, allow_code_execution)
        makers = {"make_observer": learning.make_observer, "make_source": learning.make_source}

    def explain(error: Exception, config: Config) -> Exception | None:
        from ftjax.plan.out_of_memory import explain

        return explain(error, config, devices)

    with silent() if quiet else nullcontext():
        run(config, devices=devices, command=command, heard=on_log, explain=explain, **makers)


def _observer(setup: Any, tokenizer: Any, validation: Any) -> Any:
    """Build what evaluates while training; a run that evaluates nothing need not import it."""
    settings = setup.config.evaluate
    if validation is None and not settings.training_prompts and not settings.training_rows:
        return None
    from ftjax.evaluate.observe import make_observer

    return make_observer(setup, tokenizer, validation)
