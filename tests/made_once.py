"""Keeps files that take time to make: they are made once on a machine, and again when the code that makes them changes."""

import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

MAKERS = ("made_sets.py", "oracle.py", "story_model.py", "story_text.py")


def make_once(root: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder under `root` that `make(folder)` has filled, now or earlier, here or in another process."""
    here = Path(__file__).parent
    digest = sha256(b"".join((here / maker).read_bytes() for maker in MAKERS)).hexdigest()[:16]
    folder = root / digest / name
    unfinished = folder.with_name(f"{name}-unfinished")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)  # of an attempt that failed
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder
