"""The run folder: one process creates it for all, or checks that it holds this very run."""

import os
import secrets
import shutil
import tempfile
from pathlib import Path

from etils import epath

from ftjax.config import Config
from ftjax.config.load import diff_configs, flatten_config, load_config, save_config, shown_value
from ftjax.data.find import find
from ftjax.distributed import store
from ftjax.distributed.agree import see_one_folder
from ftjax.errors import UserError
from ftjax.hub.output import recover, take_place
from ftjax.train.checkpoint import checkpoint_path
from ftjax.train.same_run import is_free

CONFIG, FINAL, BEST, TRACKED = "config.yaml", "final", "best", "run_id"


def checkpoints_of(config: Config) -> epath.Path:
    """Return the folder of a run's checkpoints."""
    return checkpoint_path(config.training.checkpoint_dir or Path(config.output_dir) / "checkpoints")


def open_run_folder(config: Config) -> None:
    """Create the run folder, or check that the run in it is this one; all processes call it.

    Raises UserError if the folder cannot be written, holds checkpoints of another configuration, or is not the same folder for
    all processes.
    """
    checkpoints = checkpoints_of(config)
    if store.index() == 0:
        _create(config, checkpoints)
    see_one_folder(checkpoints, "training.checkpoint_dir" if config.training.checkpoint_dir else "output_dir")


def _create(config: Config, checkpoints: epath.Path) -> None:
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").write_bytes(b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written: {error.strerror}; choose another output_dir") from None
    for result in (folder / FINAL, folder / BEST, *([] if "://" in str(checkpoints) else [Path(checkpoints) / BEST])):
        recover(result)
    kept = checkpoints / CONFIG if config.training.checkpoint_dir else folder / CONFIG
    if any(step.name.isdecimal() for step in _children(checkpoints)) and kept.exists():
        before = _read(kept)
        differences = [key for key in diff_configs(before, config) if not is_free(key, config)]
        if differences:
            _look_for_data(config, differences)
            values = [flatten_config(one) for one in (before, config)]
            lines = [
                f"{key}: {shown_value(values[1].get(key))} (before: {shown_value(values[0].get(key))})" for key in differences
            ]
            raise UserError(
                f"output_dir: {config.training.checkpoint_dir or folder} holds checkpoints of another configuration, which "
                "differs in\n  "
                + "\n  ".join(lines)
                + "\nChoose another output_dir, remove that folder, or undo the difference to resume that run"
            )
    save_config(config, folder / CONFIG)
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        if config.training.checkpoint_dir:
            replace_text(checkpoints / CONFIG, (folder / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"training.checkpoint_dir: {checkpoints} cannot be written: {error.strerror or error}") from None


def _look_for_data(config: Config, differences: list[str]) -> None:
    """Raise UserError if the changed data does not exist: it reports a misspelled path as such, not as another run."""
    for which in ("train", "validation"):
        if f"data.{which}" in differences:
            for source in config.data.sources(which):
                find(source)


def tracked_id(config: Config, first: int) -> str | None:
    """Return the run's id at Weights & Biases and MLflow, which all starts of one run share; None if neither is used.

    The id is kept in the run folder, and also beside the checkpoints if these are elsewhere. A new run gets a new one.

    Args:
        first: the step that this start resumes from.
    """
    if not {"wandb", "mlflow"} & set(config.training.report_to) or store.index() > 0:
        return None
    files = [epath.Path(config.output_dir) / TRACKED]
    if config.training.checkpoint_dir:
        files.append(checkpoints_of(config) / TRACKED)
    kept = [file.read_text().strip() for file in files if first and file.exists()]
    name = kept[0] if kept else secrets.token_hex(6)
    for file in files:
        replace_text(file, name)
    return name


def replace_text(path: Path | epath.Path, text: str) -> None:
    """Write a file atomically, on a disk or in a bucket."""
    if "://" in str(path):
        path.write_text(text)  # bucket objects are written atomically
        return
    partial = path.parent / f".{path.name}.{os.getpid()}"
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _children(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir()) if folder.exists() else []


def _read(path: epath.Path) -> Config:
    """Load a configuration from a disk or a bucket."""
    with tempfile.TemporaryDirectory() as here:
        local = Path(here) / CONFIG
        local.write_text(path.read_text(), encoding="utf-8")
        return load_config(local, asked=False)


# ---- best/, where the run folder is on a disk that may be lost ----


def keep_best(folder: Path, checkpoints: epath.Path) -> None:
    """Copy the run's `best/` beside its checkpoints, on the first process."""
    if store.index() == 0:
        _copy(epath.Path(folder / BEST), checkpoints / BEST)


def bring_best_back(folder: Path, checkpoints: epath.Path) -> str | None:
    """Restore `best/` from beside the checkpoints if the run folder lost it in a restart; all processes call it.

    Returns why it is lost, the same on all processes; None if it is present.
    """
    lost = None
    if store.index() == 0 and not (folder / BEST).exists():
        if (checkpoints / BEST).exists():
            _copy(checkpoints / BEST, epath.Path(folder / BEST))
        else:
            lost = f"{folder / BEST} no longer exists, and there is no copy of it; the next evaluation writes a new one"
    return store.from_first("best", lost)


def _copy(source: epath.Path, target: epath.Path) -> None:
    """Copy a folder of files over another, atomically on a disk."""
    partial = target.parent / f".{target.name}.partial"
    local = "://" not in str(target)
    destination = partial if local else target
    if destination.exists():
        destination.rmtree()
    destination.mkdir(parents=True)
    for file in source.iterdir():
        with file.open("rb") as read, (destination / file.name).open("wb") as write:
            shutil.copyfileobj(read, write, 1 << 24)
    if local:
        take_place(Path(partial), Path(target))
