"""Joint failure of several processes: if one stops, all report why, soon, and exit with the same code.

Otherwise a process that fails would leave the others in a collective that waits for it. It posts what happened, waits until the
others have read it, and exits at once; a thread in each of the others polls for such posts.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ftjax.distributed import store
from ftjax.errors import Interrupted, UserError

FAILED, TOLD = "ftjax/failed", "ftjax/told"
# Words of errors that are only consequences of another process's exit.
BROKEN = (
    "Gloo", "NCCL", "Connection reset", "Connection closed", "Socket closed", "Broken pipe", "UNAVAILABLE", "heartbeat",
    "coordination service", "CoordinationService",
)  # fmt: skip
LOOK = 0.5  # seconds between two polls for posts of others
PATIENCE = 10.0  # seconds that an exiting process waits for the others to read why

_ending = threading.Lock()  # taken by the first thread that ends this process, and never released


@contextmanager
def fail_together() -> Iterator[None]:
    """Wrap joint work: if one process fails, all exit with its message and its exit code.

    A single process raises as usual. With several, all exit within a few seconds after the first failure; if one dies silently,
    within `ftjax.distributed.join.HEARTBEAT` seconds, or as soon as a collective with it breaks.
    """
    if not store.several():
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(done,), name="watch-others", daemon=True).start()
    try:
        yield
        store.wait_for_all("done")  # the first process may still write files, and may fail
    except Interrupted:
        store.wait_for_all("done")
        raise
    except BaseException as error:
        fail(error)
    finally:
        done.set()


def asked_to_stop(step: int) -> bool:
    """Return whether all processes must save and stop after this update, as one got SIGTERM; all call it at every update."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def fail(error: BaseException) -> None:
    """End this process and all others because of an error here; callable from any thread."""
    code, message = _described(error)
    if message is None:  # a collective broke: another process posts why, or has done so
        start = time.monotonic()
        while time.monotonic() - start < 2 * LOOK + 1:
            if others := _failures():
                _end(others)
            time.sleep(LOOK / 5)
        message = (
            f"another process of this run has ended or cannot be reached ({_first_line(error)}). Its own output says why. The "
            "last checkpoint is intact: start the same command on all hosts again to resume from it"
        )
    _end({str(store.index()): {"host": socket.gethostname(), "code": code, "message": message}}, own=True)


def _described(error: BaseException) -> tuple[int, str | None]:
    """Return the exit code and the message; None as message if the error is only a consequence of another's exit."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped by the keyboard"
    if any(word in str(error) for word in BROKEN):
        return 1, None
    import traceback

    traceback.print_exc()
    return 1, f"{type(error).__name__}: {_first_line(error)} (its own output has the traceback)"


def _watch(done: threading.Event) -> None:
    """Poll for posts of others until `done`."""
    silent = 0
    while not done.wait(LOOK):
        try:
            failures = _failures()
        except Exception:  # the service is in process 0: if it is gone, so is that process
            silent += 1
            if silent == 3 and not done.is_set():
                _end({"0": {"host": "?", "code": 1, "message": "it has ended or cannot be reached"}}, heard=False)
            continue
        silent = 0
        if failures and not done.is_set():
            _end(failures)


def _failures() -> dict[str, Any]:
    """Return the posts of other processes, by process index."""
    own = str(store.index())
    return {process: post for process, post in store.under(FAILED).items() if process != own}


def _end(failures: dict[str, Any], *, own: bool = False, heard: bool = True) -> None:
    """Print what failed and exit, without the exit handlers, which would wait for the others.

    Args:
        own: the failure is this process's own: post it.
        heard: the service still answers.
    """
    _ending.acquire()
    for process, post in sorted(failures.items(), key=lambda item: int(item[0])):
        print(f"error: {store.name(int(process), post['host'])}: {post['message']}", file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    if heard:
        with suppress(Exception):  # the service is gone, so nobody can read it
            _tell(failures[str(store.index())] if own else None)
    os._exit(max(post["code"] for post in failures.values()))


def _tell(post: Any | None) -> None:
    """Post why this process exits, if it is the one that failed, and wait until others have read it.

    The first process hosts the service, without which JAX aborts the others, so it exits last.
    """
    first = store.index() == 0
    if post is not None:
        store.put(f"{FAILED}/{store.index()}", post)
    if first:
        store.put(f"{TOLD}/0", True)
    start = time.monotonic()
    while (first or post is not None) and time.monotonic() - start < PATIENCE:
        told = {*store.under(TOLD), *(() if first else store.under(FAILED))}
        if len(told | {str(store.index())}) == store.count():
            break
        time.sleep(LOOK / 10)
    if first:
        time.sleep(LOOK)  # until the others have exited
    else:
        store.put(f"{TOLD}/{store.index()}", True)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
