"""Runs an untrusted Python program in its own process, with limits on time and memory, and without the network.

It guards against accidents and cheap tricks; it is not a prison.

It limits the time, memory and file size of each process, the number of processes, and the network, and nothing that the program
has started outlives it, whatever session it is in. The verdict comes from a keeper (`ftjax.evaluate.keeper`) in another
process, whose memory and files the program cannot reach. `passed` requires the program to reach its end: `sys.exit`,
`os._exit`, handlers of `atexit`, words found in memory, and texts written to open file descriptors do not pass.

It does not separate answer and tests: they run in one process, as the tests of these data sets are written, so an answer may
change what the tests compare with (an object that equals everything), or imitate the keeper's protocol, if it knows it. The
program runs as this user and can read this user's files. The number of processes is checked a hundred times a second, and the
memory limit is per process. If the system allows no PID namespace (neither root nor user namespaces), a program that kills the
keeper can leave processes running. Run programs of an untrusted model in a container or a virtual machine as well.
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
# AUDIT_ARCH_*, and the numbers of socket and of io_uring_setup, which could open sockets too
SYSCALLS = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}
FILE_BYTES = 16 << 20
KEEPER = Path(__file__).with_name("keeper.py")
GRACE = 30.0  # seconds beyond the program's limit, for the keeper to start and to clean up


@dataclass(frozen=True)
class Limits:
    """Limits of one program; `seconds` applies to wall-clock and CPU time each, `processes` includes the program."""

    seconds: float = 10.0
    memory_mb: int = 1024
    processes: int = 32


def run_program(source: str, limits: Limits) -> Outcome:
    """Run a program; return `passed` if it reaches its end. An exception, an exit and a reached limit are failures.

    Raises UserError if this machine cannot block the network for a process.
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
            "code execution: this system refuses seccomp filters, so the network cannot be blocked for programs; "
            "evaluate on a machine that allows them, or leave the task out"
        )
    return {b"passed": "passed", b"timeout": "timeout"}.get(said, "failed")


def _end(keeper: subprocess.Popen) -> None:
    """Stop a keeper that still runs (this program was interrupted), first by a signal after which it cleans up."""
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
            f"code execution needs Linux on {' or '.join(SYSCALLS)}, where the network can be blocked for programs; this is "
            f"{sys.platform} on {platform.machine()}"
        )
    return SYSCALLS[platform.machine()]
