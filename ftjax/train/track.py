"""Tracking of metrics: metrics.jsonl, TensorBoard, Weights & Biases, MLflow."""

import importlib.util
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftjax.errors import UserError
from ftjax.hub.no_torch import hidden_torch

Heard = Callable[[dict[str, Any]], None]  # is called with every row of metrics.jsonl
COMPARED = ("train/loss", "eval/loss", "eval/token_accuracy")  # beside the settings, where TensorBoard compares runs


def check_report_to(report_to: Sequence[str]) -> None:
    """Raise UserError if a tracker in `report_to` is not installed; called before a model is loaded."""
    for name in ("wandb", "mlflow"):
        if name in report_to and importlib.util.find_spec(name) is None:
            raise UserError(f"training.report_to: {name} is not installed; pip install 'ftjax[{name}]', or leave {name} out")


class Tracker:
    """Writes rows of metrics; only the process with `active` writes.

    `resume_from`: rows after this step, left by an interrupted process, are dropped, since those steps run again.
    """

    def __init__(
        self,
        folder: Path,
        report_to: list[str],
        config: Mapping[str, Any],
        *,
        active: bool,
        resume_from: int = 0,
        run_id: str | None = None,
        heard: Heard | None = None,
    ):
        """
        Args:
            run_id: id of the run at Weights & Biases and MLflow.
            heard: called with each row after it is written.
        """
        self._file = self._board = self._wandb = self._mlflow = None
        self._heard = heard
        if not active:
            return
        if "wandb" in report_to:
            self._wandb = _wandb_run(folder, config, run_id)
        if "mlflow" in report_to:
            from ftjax.train.mlflow import MlflowRun

            self._mlflow = MlflowRun(folder, flat(config), run_id)
        path = folder / "metrics.jsonl"
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= resume_from]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board_errors: list[BaseException] = []
        if "tensorboard" in report_to:
            with hidden_torch():
                from tensorboardX import SummaryWriter
                from tensorboardX.summary import hparams

            self._quiet_board()
            # With a queue that a row of metrics fills, logging would wait forever for a writer that has failed.
            purge = resume_from + 1 if resume_from else None
            self._board = SummaryWriter(
                str(folder / "tensorboard"),
                purge_step=purge,
                max_queue=10_000,
                filename_suffix=f".{time.time_ns()}",  # the rest of the name has only the second
            )
            # add_hparams would create a separate run for them.
            for summary in hparams(flat(config), dict.fromkeys(COMPARED))[:2]:
                self._board.file_writer.add_summary(summary)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        self._write({"step": step, **metrics})
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)
        if self._mlflow is not None:
            self._mlflow.log(step, metrics)

    def log_texts(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Log answers to fixed prompts: a list in metrics.jsonl, text in TensorBoard, a table in W&B."""
        if self._file is None or not rows:
            return
        self._write({"step": step, name: [dict(row) for row in rows]})
        if self._board is not None:
            for number, row in enumerate(rows):
                text = "\n\n".join(f"**{key}**\n\n{_indented(value)}" for key, value in row.items())
                self._board.add_text(f"{name}/{number}", text, step)
        if self._wandb is not None:
            import wandb

            keys = list(dict.fromkeys(key for row in rows for key in row))
            table = wandb.Table(columns=keys, data=[[row.get(key, "") for key in keys] for row in rows])
            self._wandb.log({name: table}, step=step)
        if self._mlflow is not None:
            self._mlflow.log_texts(step, name, rows)

    def warn(self, step: int, text: str) -> None:
        """Log a warning beside the metrics."""
        if self._file is None:
            return
        self._write({"step": step, "warning": text})
        if self._board is not None:
            self._board.add_text("warning", text, step)

    def _write(self, row: Mapping[str, Any]) -> None:
        """Write one line. Raises UserError if it, or an earlier one of TensorBoard, could not be written."""
        try:
            for error in self._board_errors:
                raise error
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{self._file.name}: metrics could not be written: {error.strerror or error}; make room and run the same "
                "command again"
            ) from None
        if self._heard is not None:
            self._heard(dict(row))

    def _quiet_board(self) -> None:
        """Collect errors of TensorBoard's thread, which would print a traceback."""
        before = threading.excepthook

        def excepthook(args) -> None:
            if type(args.thread).__module__.startswith("tensorboardX"):
                self._board_errors.append(args.exc_value)
            else:
                before(args)

        threading.excepthook = excepthook

    def close(self) -> None:
        for one in (self._file, self._board):
            if one is not None:
                with suppress(OSError):  # a full disk has been reported already
                    one.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._mlflow is not None:
            self._mlflow.finish()


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return settings by full name (`optimizer.learning_rate`), lists as JSON; settings that are None are left out."""
    found: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            found |= {f"{prefix}{name}": json.dumps(value, ensure_ascii=False)} if value else {}
        elif value is not None:
            found[f"{prefix}{name}"] = value
    return found


def _indented(text: str) -> str:
    """Format text as a Markdown block, which keeps line breaks."""
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    "


def _complete_lines(path: Path) -> list[str]:
    """Return the complete lines: a killed process may leave the last one truncated."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            lines.append(line)
    return lines


def _wandb_run(folder: Path, config: Mapping[str, Any], run_id: str | None) -> Any:
    import wandb

    try:
        return wandb.init(dir=str(folder), name=folder.name, config=dict(config), resume="allow", id=run_id)
    except wandb.Error as error:  # no key, no network, another version's folder ...
        raise UserError(
            f"training.report_to: wandb cannot start: {str(error).strip()}. Log in with `wandb login`, set WANDB_MODE=offline, "
            "or leave wandb out"
        ) from None
