"""Checkpoints by Orbax: trained parameters, optimizer state, step, and what the loop needs to resume bit for bit.

A save is asynchronous and becomes visible by a rename, so a process killed during a save leaves the earlier checkpoints intact.
A checkpoint holds global arrays: it can be restored on another number of devices or hosts.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ftjax.distributed import store
from ftjax.distributed.ending import fail
from ftjax.errors import UserError
from ftjax.long_steps import long_step
from ftjax.train.step import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every step of every save
# Write one replica of each shard as it is. Replica-parallel saving would first slice each shard on its device: if two devices
# hold the state, each would copy half of it again.
ocp.type_handlers.register_type_handler(jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False), override=True)


# How systems report a full or unwritable disk; the last is TensorStore's own word, where there is no better one.
REASONS = (
    "No space left on device", "Permission denied", "Read-only file system", "Disk quota exceeded", "File too large",
    "RESOURCE_EXHAUSTED",
)  # fmt: skip


class _FailedSave(logging.Filter):
    """Handles a failed save, which Orbax reports with a traceback from each of its threads and raises only later.

    With several processes, waiting for that would leave this one waiting for the others, and them for it.
    """

    def __init__(self, checkpoints: "Checkpoints"):
        super().__init__()
        self._checkpoints = checkpoints

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is shown."""
        error, text = record.exc_info[1] if record.exc_info else None, record.getMessage()
        if error is None or "orbax" not in record.pathname:
            return True
        if store.several() and "Failed to run" in text and str(self._checkpoints.folder) in text:
            fail(self._checkpoints.explained(error) or error)
        return False


def _quiet_writers() -> None:
    """Silence TensorStore's traceback for every array that is written after a save has failed, as nobody awaits it."""
    before = sys.unraisablehook
    if getattr(before, "__module__", None) == __name__:
        return

    def unraisablehook(args) -> None:
        if not (args.exc_type is RuntimeError and str(args.exc_value) == "Event loop is closed"):
            before(args)

    sys.unraisablehook = unraisablehook


class Checkpoints:
    """`checkpoints/STEP/` of one run; keeps the newest `keep`. The folder may be in a bucket: `gs://...`."""

    def __init__(self, folder: epath.PathLike, keep: int):
        self.folder = folder = checkpoint_path(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder, options=options, item_names=("state", "meta"))
        logging.getLogger("absl").addFilter(_FailedSave(self))
        _quiet_writers()

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, meta: dict[str, Any], reference: dict[str, Any] | None = None) -> None:
        """Start saving. `meta` is JSON: the state of the data iterator, the best metric so far, the state of the watchdog.
        `reference` has the arrays of a reference model that moves.

        When this returns, every shard is in host memory and the state may be donated; the files are written afterwards. Nothing
        is copied on the device.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(_saved(state, reference)), meta=ocp.args.JsonSave(meta))
        self._guard(lambda: self._manager.save(step, args=args, force=True))

    def meta(self) -> dict[str, Any] | None:
        """Return what was saved beside the newest state; None if there is no checkpoint."""
        if self.latest is None:
            return None
        return self._read(ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(
        self, like: TrainState, reference: dict[str, Any] | None = None
    ) -> tuple[TrainState, dict[str, Any], dict[str, jax.Array]]:
        """Restore the newest checkpoint: state, meta, and the arrays of a reference model that moves.

        Args:
            like: shapes with shardings, on any mesh; `reference` likewise.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_saved(like, reference)), meta=ocp.args.JsonRestore())
        restored = self._read(args)
        found = restored["state"].pop("reference", {})
        return TrainState(**restored["state"]), restored["meta"], found

    def _read(self, args: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(self.latest, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"{self.folder / str(self.latest)}: this checkpoint does not fit the run, or is damaged: {error}. "
                "Remove that folder to resume from the one before it, or choose another output_dir"
            ) from None

    def wait(self) -> None:
        """Block until the current save is complete. Raises UserError if it failed."""
        with long_step("waiting until the checkpoint is saved"):
            self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        with long_step("waiting until the checkpoint is saved"):
            self._guard(self._manager.close)

    def _guard(self, call) -> None:
        try:
            call()
            self._manager.check_for_errors()
        except Exception as error:
            explained = self.explained(error)
            if explained is None:
                raise
            raise explained from None

    def explained(self, error: BaseException) -> UserError | None:
        """Return the error to show the user for a failed save; None if it is not a disk error."""
        if not _is_disk_error(error):
            return None
        whole = max(ocp.utils.checkpoint_steps(self.folder), default=None)
        before = "There is none before it" if whole is None else f"The checkpoint before it is intact (step {whole})"
        return UserError(
            f"{self.folder}: a checkpoint could not be written: {_reason(error)}. {before}; make room and run the same command "
            "again"
        )


def _saved(state: TrainState, reference: dict[str, Any] | None) -> dict[str, Any]:
    return state._asdict() | ({"reference": reference} if reference else {})


def checkpoint_path(folder: epath.PathLike) -> epath.Path:
    """Return the checkpoint folder as a path, absolute if it is on a disk; it may be in a bucket.

    Raises UserError for a scheme that cannot be opened.
    """
    if "://" not in str(folder):
        return epath.Path(Path(folder).absolute())
    try:
        path = epath.Path(folder)
        path.exists()
    except Exception as error:  # each kind of bucket has errors of its own
        raise UserError(
            f"training.checkpoint_dir: {folder} cannot be opened: {error}. For gs:// install gcsfs (ftjax[tpu] has it) and "
            "check the name and your permissions with: gcloud storage ls"
        ) from None
    return path


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    """Return the reason in a few words; TensorStore puts them after the name of the array and two long paths."""
    text = str(list(_chain(error))[-1]).splitlines()[0]
    return next((words for words in REASONS if words in text), text)


def _is_disk_error(error: BaseException) -> bool:
    """Return whether a failed save is a disk error; TensorStore reports one as text inside a ValueError."""
    return any(isinstance(e, OSError) or any(words in str(e) for words in REASONS) for e in _chain(error))
