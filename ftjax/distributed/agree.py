"""Checks before training that all processes run the same configuration and see the same folder."""

import json
import secrets
import time
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from ftjax.distributed import store
from ftjax.errors import UserError

SHOWN = 12  # differences that a message names
LOOK = 30.0  # seconds until the other hosts must see a file that one host wrote


def agree(about: str, facts: Mapping[str, Any]) -> None:
    """Return when every process has called this with the same facts; all call it.

    Args:
        about: what the facts describe, for the message.
        facts: JSON by readable names, such as `optimizer.learning_rate`.

    Raises UserError, on each process that differs from process 0, naming the differences.
    """
    if not store.several():
        return
    key = store.new_name(about.replace(" ", "-"))
    if store.index() == 0:
        store.put(key, dict(facts))
    first = store.wait_for(key)
    own = {name: _plain(value) for name, value in facts.items()}
    differing = [name for name in {**first, **own} if first.get(name) != own.get(name)]
    if differing:
        lines = [f"{name}: {_short(first.get(name))} on process 0, {_short(own.get(name))} here" for name in differing[:SHOWN]]
        more = [f"and {len(differing) - SHOWN} more"] if len(differing) > SHOWN else []
        raise UserError(
            f"{about} differs from that of process 0, and all processes must have the same settings, files and versions:\n  "
            + "\n  ".join([*lines, *more])
            + "\nStart the same command, with the same files and the same versions, on all hosts"
        )
    store.wait_for_all(about.replace(" ", "-"))


def digest(*values: Any) -> str:
    """Return a digest of values whose `repr` is complete."""
    return sha256(repr(values).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def see_one_folder(folder: Any, setting: str) -> None:
    """Return when every process sees the folder of process 0; all call it, after process 0 has created the folder.

    Args:
        folder: an `epath.Path` of this process.
        setting: the name of the folder's setting, for the message.

    Raises UserError, on each process that does not see it.
    """
    if not store.several():
        return
    key = store.new_name("folder")
    if store.index() == 0:
        mark = f".seen-{secrets.token_hex(8)}"
        (folder / mark).write_text("")
        store.put(key, {"mark": mark, "folder": str(folder)})
    first = store.wait_for(key)
    start = time.monotonic()
    while not (folder / first["mark"]).exists():
        if time.monotonic() - start > LOOK:
            raise UserError(
                f"{setting}: {folder} is not the folder that process 0 sees as {first['folder']}: what that process wrote "
                f"there is not seen here after {LOOK:.0f} seconds. All hosts keep one set of checkpoints: put output_dir on a "
                "file system that they share, or set training.checkpoint_dir to such a folder or a bucket (gs://...)"
            )
        time.sleep(0.2)
    store.wait_for_all("folder")
    if store.index() == 0:
        (folder / first["mark"]).unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Return the value as JSON would return it."""
    return json.loads(json.dumps(value))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
