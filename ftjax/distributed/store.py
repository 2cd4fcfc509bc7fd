"""Messages between processes: the key-value store of JAX's coordination service, which needs no device.

JAX has no public name for it; Orbax uses the same private one.
"""

import itertools
import json
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

_DAY = 24 * 3600 * 1000  # milliseconds: long before, the heartbeat notices a process that never comes

_numbers = itertools.count()


def _state() -> Any | None:
    """Return JAX's record of the processes; None if this is the only one. Does not import JAX."""
    if "jax" not in sys.modules:
        return None
    from jax._src.distributed import global_state

    return global_state if global_state.client is not None and global_state.num_processes > 1 else None


def several() -> bool:
    """Return whether this process is one of several that were joined."""
    return _state() is not None


def index() -> int:
    """Return the index of this process, from 0; uses no device."""
    state = _state()
    return 0 if state is None else state.process_id


def count() -> int:
    """Return the number of joined processes."""
    state = _state()
    return 1 if state is None else state.num_processes


def name(process: int | None = None, host: str | None = None) -> str:
    """Format as `process 1 of 4 (host)`; this process by default."""
    return f"process {index() if process is None else process} of {count()} ({host or socket.gethostname()})"


def new_name(about: str) -> str:
    """Return a new name that is the same on all processes, which must call this in the same order."""
    return f"ftjax/{about}/{next(_numbers)}"


def put(key: str, value: Any) -> None:
    """Store JSON under a key that nobody has written yet."""
    _state().client.key_value_set(key, json.dumps(value))


def wait_for(key: str) -> Any:
    """Return the JSON of a key as soon as it is written."""
    return json.loads(_interruptible(_state().client.blocking_key_value_get, key))


def under(folder: str) -> dict[str, Any]:
    """Return the JSON of all existing keys `folder/NAME`, by NAME."""
    found = _state().client.key_value_dir_get(folder)
    return {key.rpartition("/")[2]: json.loads(value) for key, value in found}


def remove(folder: str) -> None:
    """Remove all keys `folder/NAME`, which no process reads any more."""
    _state().client.key_value_delete(folder)


def wait_for_all(about: str) -> None:
    """Return when every process has called this."""
    _interruptible(_state().client.wait_at_barrier, new_name(about))


def _interruptible(call: Callable[[str, int], Any], key: str) -> Any:
    """Return the result of a call that may wait for another process; Ctrl-C ends the wait.

    The call waits in C++, where Python handles no signal; Python can wait for a thread that makes the call.
    """
    ended: list[tuple[Any, Exception | None]] = []

    def work() -> None:
        try:
            ended.append((call(key, _DAY), None))
        except Exception as error:
            ended.append((None, error))

    thread = threading.Thread(target=work, name=f"wait-for-{key}", daemon=True)
    thread.start()
    thread.join()
    value, error = ended[0]
    if error is not None:
        raise error
    return value


def from_first(about: str, value: Any) -> Any:
    """Return the JSON of process 0 on all processes; all call it."""
    if not several():
        return value
    key = new_name(about)
    if index() == 0:
        put(key, value)
    return wait_for(key)


def gathered(about: str, value: Any) -> list[Any]:
    """Return the JSON of all processes, in their order; all call it."""
    if not several():
        return [value]
    key = new_name(about)
    put(f"{key}/{index()}", value)
    return [wait_for(f"{key}/{process}") for process in range(count())]
