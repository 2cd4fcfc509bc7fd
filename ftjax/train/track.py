"""Where metrics go: metrics.jsonl, TensorBoard, Weights & Biases."""

import importlib.util
import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ftjax.errors import UserError

COMPARED = ("train/loss", "eval/loss", "eval/token_accuracy")  # beside the settings, where TensorBoard compares runs


def check_report_to(report_to: Sequence[str]) -> None:
    """Raises UserError where what a run is to report to is not installed; called before a model is loaded."""
    if "wandb" in report_to and importlib.util.find_spec("wandb") is None:
        raise UserError("training.report_to: wandb is not installed; pip install 'ftjax[wandb]', or leave wandb out")


class Tracker:
    """Writes one row of metrics at a time; only the process that was made `active` writes.

    `resume_from`: rows after this step, left by a process that was stopped, are dropped, since those steps run again.
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
    ):
        """Args: run_id: of the run at Weights & Biases."""
        self._file = self._board = self._wandb = None
        if not active:
            return
        if "wandb" in report_to:
            self._wandb = _wandb_run(folder, config, run_id)
        path = folder / "metrics.jsonl"
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= resume_from]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board_errors: list[BaseException] = []
        if "tensorboard" in report_to:
            from tensorboardX import SummaryWriter
            from tensorboardX.summary import hparams

            self._quiet_board()
            # With a queue that a row of metrics fills, logging would wait for ever for a writer that has failed.
            purge = resume_from + 1 if resume_from else None
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge, max_queue=10_000)
            # Not by add_hparams, which makes a run of its own for them.
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

    def log_texts(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Answers to fixed prompts: a list in metrics.jsonl, text in TensorBoard, a table in W&B."""
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

    def warn(self, step: int, text: str) -> None:
        """A warning, kept beside the metrics."""
        if self._file is None:
            return
        self._write({"step": step, "warning": text})
        if self._board is not None:
            self._board.add_text("warning", text, step)

    def _write(self, row: Mapping[str, Any]) -> None:
        """One line. Raises UserError where it, or TensorBoard's before it, could not be written."""
        try:
            for error in self._board_errors:
                raise error
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{self._file.name}: metrics could not be written: {error.strerror or error}; make room and run the same "
                "command again"
            ) from None

    def _quiet_board(self) -> None:
        """Hear of an error in TensorBoard's own thread, which would end with a traceback."""
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
                with suppress(OSError):  # of a full disk, which was said
                    one.close()
        if self._wandb is not None:
            self._wandb.finish()


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Settings by their whole name (`optimizer.learning_rate`), lists as JSON; what is not set is left out."""
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
    """As a Markdown block, which keeps line breaks."""
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    "


def _complete_lines(path: Path) -> list[str]:
    """The lines that were written to their end: a kill may cut the last one."""
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
