"""One run at a time in a folder: two would write the same checkpoints and metrics."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ftjax.config import Config
from ftjax.distributed import store
from ftjax.errors import UserError

LOCK = ".lock"


@contextmanager
def alone_in(config: Config) -> Iterator[None]:
    """Lock `output_dir`, and `training.checkpoint_dir` if it is on a disk; the first process of a run does it.

    The system releases a lock when its process ends, however it ends. A file system without locks is used without one.
    Raises UserError, naming the other process, if one has locked a folder already.
    Raises UserError, naming the other process, where one holds a folder already.
    """
    given = {"output_dir": config.output_dir, "training.checkpoint_dir": config.training.checkpoint_dir}
    with ExitStack() as held:
        for setting, folder in given.items():
            if store.index() == 0 and folder and "://" not in str(folder):
                held.enter_context(_lock(setting, Path(folder)))
        yield


@contextmanager
def _lock(setting: str, folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(f"{setting}: {folder} cannot be written: {error.strerror}; choose another {setting}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read().strip() or "a process that has just begun"
            raise UserError(
                f"{setting}: another run uses {folder}: {other}. Wait until it has ended, stop it, or choose another {setting}"
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
