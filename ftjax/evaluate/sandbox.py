"""Runs a Python program that nobody has read: apart, for a limited time, in limited memory, without the network.

It is a guard against accidents, not a prison: the program runs as this user and can read this user's files. Programs of a
model that is not trusted belong into a container or a virtual machine besides.
"""

import contextlib
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ftjax.errors import UserError

Outcome = Literal["passed", "failed", "timeout"]
# AUDIT_ARCH_*, and the numbers of socket and io_uring_setup, with which sockets could be opened too
SYSCALLS = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}
FILE_BYTES = 16 << 20


@dataclass(frozen=True)
class Limits:
    """Of one program; `seconds` counts the wall clock and, by itself, the processor."""

    seconds: float = 10.0
    memory_mb: int = 1024


# Runs first in the new process, with standard modules only. The filter refuses socket() with EACCES, also to every process
# that the program starts, and cannot be taken off again. What the program prints goes nowhere; only when it has come to its
# end is the word written that it was not told.
BOOTSTRAP = r"""
import ctypes, math, os, resource, struct, sys
arch, sock, ring, seconds, memory, size = map(float, sys.argv[1:7])
arch, sock, ring = int(arch), int(sock), int(ring)
def limit(what, value):
    resource.setrlimit(what, (int(value), int(value)))
limit(resource.RLIMIT_CPU, math.ceil(seconds) + 1)
limit(resource.RLIMIT_AS, memory)
limit(resource.RLIMIT_DATA, memory)
limit(resource.RLIMIT_FSIZE, size)
limit(resource.RLIMIT_CORE, 0)
rules = [
    (0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000),     # another architecture's calls: killed
    (0x20, 0, 0, 0), (0x35, 2, 0, 0x40000000), (0x15, 1, 0, sock), (0x15, 0, 1, ring),
    (0x06, 0, 0, 0x00050000 | 13), (0x06, 0, 0, 0x7FFF0000),           # EACCES, or allowed
]
code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
filters = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(filters)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    os.write(1, b"no filter")
    os._exit(1)
word, _, source = sys.stdin.read().partition("\n")
out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
for number in (0, 1, 2):
    os.dup2(null, number)
del ctypes, struct, resource, sys.argv[1:]
def run():
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
run()
os.write(out, word.encode())
os._exit(0)
"""


def run_program(source: str, limits: Limits) -> Outcome:
    """`passed` where the program comes to its end; an exception, an exit and a limit that is hit are all failures.

    Raises UserError where this machine cannot cut a process off from the network.
    """
    arch, sock, ring = _syscalls()
    word = secrets.token_hex(16)
    size = limits.memory_mb << 20
    numbers = [str(n) for n in (arch, sock, ring, limits.seconds, size, FILE_BYTES)]
    with tempfile.TemporaryDirectory(prefix="ftjax-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", BOOTSTRAP, *numbers], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=folder, start_new_session=True, close_fds=True,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            said = process.communicate(f"{word}\n{source}".encode("utf-8", "replace"), timeout=limits.seconds)[0]
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # and what the program started
            process.communicate()
    if said == b"no filter":
        raise UserError(
            "code execution: this system refuses seccomp filters, so that programs cannot be kept from the network; "
            "evaluate on a machine that allows them, or leave the task out"
        )
    return "passed" if said == word.encode() and process.returncode == 0 else "failed"


@cache
def _syscalls() -> tuple[int, int, int]:
    if not sys.platform.startswith("linux") or platform.machine() not in SYSCALLS:
        raise UserError(
            f"code execution needs Linux on {' or '.join(SYSCALLS)}, where programs can be kept from the network; this is "
            f"{sys.platform} on {platform.machine()}"
        )
    return SYSCALLS[platform.machine()]
