"""Where metrics go: metrics.jsonl, TensorBoard, Weights & Biases."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftjax.errors import UserError


@dataclass(frozen=True)
class Observation:
    """What was measured of a model in training: metrics by name, and answers (`prompt`, `text`, and the `reference`)."""

    metrics: Mapping[str, float]
    texts: Sequence[Mapping[str, str]]


class Tracker:
    """Writes one row of metrics at a time; only the process that was made `active` writes.

    `resume_from`: rows after this step, left by a process that was stopped, are dropped, since those steps run again.
    """

    def __init__(self, folder: Path, report_to: list[str], config: Mapping[str, Any], *, active: bool, resume_from: int = 0):
        self._file = self._board = self._wandb = None
        if not active:
            return
        path = folder / "metrics.jsonl"
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= resume_from]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        if "tensorboard" in report_to:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_from + 1 if resume_from else None)
        if "wandb" in report_to:
            try:
                import wandb
            except ImportError:
                raise UserError("training.report_to: wandb is not installed; pip install 'ftjax[wandb]'") from None
            self._wandb = wandb.init(dir=str(folder), name=folder.name, config=dict(config), resume="allow", id=_run_id(folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def log_texts(self, step: int, name: str, rows: Sequence[Mapping[str, str]]) -> None:
        """Answers to fixed prompts: a list in metrics.jsonl, text in TensorBoard, a table in W&B."""
        if self._file is None or not rows:
            return
        self._file.write(json.dumps({"step": step, name: [dict(row) for row in rows]}, ensure_ascii=False) + "\n")
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
        self._file.write(json.dumps({"step": step, "warning": text}, ensure_ascii=False) + "\n")
        if self._board is not None:
            self._board.add_text("warning", text, step)

    def close(self) -> None:
        for one in (self._file, self._board):
            if one is not None:
                one.close()
        if self._wandb is not None:
            self._wandb.finish()


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


def _run_id(folder: Path) -> str:
    """One W&B run for one output folder, also after a resume."""
    import hashlib

    return hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:12]
