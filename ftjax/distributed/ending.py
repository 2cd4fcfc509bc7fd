"""How several processes end together: what stops one of them is said by all, soon, and with one exit code.

A process that fails would otherwise leave the others in a transfer that waits for it. It posts what happened, waits until the
others have read it, and ends at once; a thread in each of the others looks for such posts.
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
from ftjax.errors import UserError

FAILED, TOLD = "ftjax/failed", "ftjax/told"
# What an error says that is only what the end of another process looks like from here.
BROKEN = (
    "Gloo", "NCCL", "Connection reset", "Connection closed", "Socket closed", "Broken pipe", "UNAVAILABLE", "heartbeat",
    "coordination service", "CoordinationService",
)  # fmt: skip
LOOK = 0.5  # seconds between two looks for what others posted
PATIENCE = 10.0  # seconds that a process which ends waits until the others have read why

_ending = threading.Lock()  # taken by the first that ends this process, and never released


@contextmanager
def together() -> Iterator[None]:
    """Around all that the processes do jointly: when one fails, all end, with its message and its exit code.

    One process alone raises as ever. Of several, each ends within a few seconds after the first has failed; where one dies
    without a word, within `ftjax.distributed.join.HEARTBEAT` seconds, or as soon as a transfer from it breaks.
    """
    if not store.several():
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(done,), name="watch-others", daemon=True).start()
    try:
        yield
        store.wait_for_all("done")  # the first may still write files, and may fail
    except SystemExit:
        store.wait_for_all("done")
        raise
    except BaseException as error:
        fail(error)
    finally:
        done.set()


def asked_to_stop(step: int) -> bool:
    """Whether all processes are to save and stop after this update: one of them got SIGTERM. All call it at every update."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def fail(error: BaseException) -> None:
    """End this process and all others because of an error here; from any thread."""
    code, message = _described(error)
    if message is None:  # a transfer broke: another process may have said why, or does so in a moment
        start = time.monotonic()
        while time.monotonic() - start < 2 * LOOK + 1:
            if others := _failures():
                _end(others)
            time.sleep(LOOK / 5)
        message = (
            f"another process of this run has ended or cannot be reached ({_first_line(error)}). Its own output says why. The "
            "last checkpoint is whole: start the same command on all hosts again to go on from it"
        )
    _end({str(store.index()): {"host": socket.gethostname(), "code": code, "message": message}}, own=True)


def _described(error: BaseException) -> tuple[int, str | None]:
    """The exit code, and the message; None where the error is only what another's end looks like from here."""
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
    """Look for what others posted, until `done`."""
    silent = 0
    while not done.wait(LOOK):
        try:
            failures = _failures()
        except Exception:  # the service is in process 0: without it there is nobody to ask
            silent += 1
            if silent == 3 and not done.is_set():
                _end({"0": {"host": "?", "code": 1, "message": "it has ended or cannot be reached"}}, heard=False)
            continue
        silent = 0
        if failures and not done.is_set():
            _end(failures)


def _failures() -> dict[str, Any]:
    """What other processes posted, by their numbers."""
    own = str(store.index())
    return {process: post for process, post in store.under(FAILED).items() if process != own}


def _end(failures: dict[str, Any], *, own: bool = False, heard: bool = True) -> None:
    """Say what failed and leave, without the exit handlers, which would wait for the others.

    Args:
        own: the failure is this process's: post it.
        heard: the service still answers.
    """
    _ending.acquire()
    for process, post in sorted(failures.items(), key=lambda item: int(item[0])):
        print(f"error: {store.name(int(process), post['host'])}: {post['message']}", file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    if heard:
        with suppress(Exception):  # the service is gone, and nobody can be told
            _tell(failures[str(store.index())] if own else None)
    os._exit(max(post["code"] for post in failures.values()))


def _tell(post: Any | None) -> None:
    """Post why this process ends, where it is the one that failed, and wait until others have read it.

    The first process has the service in it, without which JAX aborts the others, so it leaves last.
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
        time.sleep(LOOK)  # for the others to be gone
    else:
        store.put(f"{TOLD}/{store.index()}", True)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
