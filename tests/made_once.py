"""Files that take time to make: once in a session, for all workers of pytest-xdist."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def make_once(tmp_path_factory, name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder that `make(folder)` has filled, here or in another worker of this session."""
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent  # each worker has a folder of its own in the session's
    folder, unfinished = session / "made" / name, session / "made" / f"{name}-unfinished"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)  # of an attempt that failed
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder
