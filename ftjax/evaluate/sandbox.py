"""Runs a Python program that nobody has read: apart, for a limited time, in limited memory, without the network.

It is a guard against accidents and cheap tricks, not a prison.

Held: time, memory and size of files of each process, the number of processes, the network, and that nothing which the program
has started outlives it, whatever session it is in. The verdict is that of a keeper (`ftjax.evaluate.keeper`) in another
process, whose memory and files the program cannot reach. `passed` needs the program to come to its end: `sys.exit`, `os._exit`,
handlers of `atexit`, words found in memory, and texts written to whatever file descriptors are open do not pass.

Not held: answer and tests run in one process, as the tests of these data sets are written, so an answer may change what the
tests compare with (an object that equals everything), or follow the keeper's own steps, if it knows them. The program is this
user's and reads this user's files. The number of processes is looked at a hundred times a second, and each has a memory limit
of its own. Where no PID namespace is allowed (neither root nor user namespaces), a program that kills the keeper can leave
processes behind. Programs of a model that is not trusted belong into a container or a virtual machine besides.
"""

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from ftjax.errors import UserError

Outcome = Literal["passed", "failed", "timeout"]
# AUDIT_ARCH_*, and the numbers of socket and io_uring_setup, with which sockets could be opened too
SYSCALLS = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}
FILE_BYTES = 16 << 20
KEEPER = Path(__file__).with_name("keeper.py")
GRACE = 30.0  # seconds beyond the program's, for the keeper to start and to clear away


@dataclass(frozen=True)
class Limits:
    """Of one program; `seconds` counts the wall clock and the processor apart; `processes` may be there at a time, it too."""

    seconds: float = 10.0
    memory_mb: int = 1024
    processes: int = 32


def run_program(source: str, limits: Limits) -> Outcome:
    """`passed` where the program comes to its end; an exception, an exit and a limit that is hit are all failures.

    Raises UserError where this machine cannot cut a process off from the network.
    """
    numbers = (*_syscalls(), limits.seconds, limits.memory_mb << 20, FILE_BYTES, limits.processes)
    with tempfile.TemporaryDirectory(prefix="ftjax-code-", ignore_cleanup_errors=True) as folder:
        keeper = subprocess.Popen(
            [sys.executable, "-I", str(KEEPER), *map(str, numbers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=folder, start_new_session=True, close_fds=True,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            said = keeper.communicate(source.encode("utf-8", "replace"), timeout=limits.seconds + GRACE)[0]
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            _end(keeper)
    if said == b"no filter":
        raise UserError(
            "code execution: this system refuses seccomp filters, so that programs cannot be kept from the network; "
            "evaluate on a machine that allows them, or leave the task out"
        )
    return {b"passed": "passed", b"timeout": "timeout"}.get(said, "failed")


def _end(keeper: subprocess.Popen) -> None:
    """By a signal after which it clears away what it keeps, if it has not ended (this program was interrupted)."""
    for stop in (keeper.terminate, keeper.kill):
        if keeper.poll() is None:
            stop()
            with contextlib.suppress(subprocess.TimeoutExpired):
                keeper.wait(timeout=5)
    keeper.stdin.close()
    keeper.stdout.close()


@cache
def _syscalls() -> tuple[int, int, int]:
    if not sys.platform.startswith("linux") or platform.machine() not in SYSCALLS:
        raise UserError(
            f"code execution needs Linux on {' or '.join(SYSCALLS)}, where programs can be kept from the network; this is "
            f"{sys.platform} on {platform.machine()}"
        )
    return SYSCALLS[platform.machine()]
