"""Runs one untrusted program, watches it from outside, and prints the verdict; `ftjax.evaluate.sandbox` starts it.

A script with standard modules only, so that it starts quickly. There are three processes: this keeper, which never runs a line
of the program and alone reports the verdict; a reaper, the first process of a PID namespace; and its child, the program.
Whatever the program starts, in any session or process group, is in that namespace and dies with the reaper. If the system
allows no namespace, the keeper adopts (`PR_SET_CHILD_SUBREAPER`) and kills all descendants of the program.

    python -I keeper.py ARCH SOCKET IO_URING SECONDS MEMORY FILE PROCESSES < program.py

prints `passed`, `failed`, `timeout` or `no filter`.
"""

import contextlib
import ctypes
import math
import os
import resource
import select
import signal
import struct
import sys
import time

NEWUSER, NEWPID = 0x10000000, 0x20000000
PDEATHSIG, DUMPABLE, SECCOMP, SUBREAPER, NO_NEW_PRIVS = 1, 4, 22, 36, 38  # of prctl
CAPABILITY_VERSION_3 = 0x20080522
TICK = 0.01  # seconds between two checks of the number of processes
END = b"end\n"

libc = ctypes.CDLL(None, use_errno=True)


def main() -> bytes:
    arch, sock, ring, seconds, memory, size, processes = (float(given) for given in sys.argv[1:8])
    source = sys.stdin.buffer.read()
    libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    apart = into_namespace()
    if not apart:
        libc.prctl(SUBREAPER, 1, 0, 0, 0)
    if not filtered(int(arch), int(sock), int(ring)):
        return b"no filter"
    libc.prctl(DUMPABLE, 0, 0, 0, 0)  # the program has the same user, and must not read or change the keeper
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    said, say = os.pipe()
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        leave = os._exit
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.close(said)
            os.close(tell)
            if apart:
                reap_the_program()
            limit(seconds, memory, size)
            run(source, say, hear)
        finally:
            leave(1)
    try:
        os.close(say)
        os.close(hear)
        return watched(child, said, tell, time.monotonic() + seconds, int(processes) + apart)
    finally:
        end(child)


# ---- the program's process ----


def into_namespace() -> bool:
    """Make the next process the first of a PID namespace, as root or in a new user namespace; return whether that worked."""
    if libc.unshare(NEWPID) == 0:
        return True
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEWUSER | NEWPID) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        # if this fails, the program sees another number for its user, but still owns that user's files
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def filtered(arch: int, sock: int, ring: int) -> bool:
    """Refuse socket() and io_uring with EACCES from here on, in all child processes, for good; return whether that worked."""
    rules = [
        (0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000),     # another architecture's calls: killed
        (0x20, 0, 0, 0), (0x35, 2, 0, 0x40000000), (0x15, 1, 0, sock), (0x15, 0, 1, ring),
        (0x06, 0, 0, 0x00050000 | 13), (0x06, 0, 0, 0x7FFF0000),           # EACCES, or allowed
    ]  # fmt: skip
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(filters)))
    return libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and libc.prctl(SECCOMP, 2, program, 0, 0) == 0


def reap_the_program() -> None:
    """Fork the program from the first process of the namespace; return in the child, exit with all others when it ends."""
    libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    program = os.fork()
    while program:
        if os.wait()[0] == program:
            os._exit(0)


def limit(seconds: float, memory: float, size: float) -> None:
    """Limit this process and those that it starts; root too loses its privileges over other processes."""
    libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(DUMPABLE, 1, 0, 0, 0)
    os.setsid()
    for what, value in (
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1), (resource.RLIMIT_AS, memory), (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, size), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(what, (int(value), int(value)))
    head = ctypes.create_string_buffer(struct.pack("Ii", CAPABILITY_VERSION_3, 0))
    libc.capset(head, ctypes.create_string_buffer(24))


def run(source: bytes, say: int, hear: int) -> None:
    """Run the program without output. Ask the keeper for the word to repeat only when the program has ended."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    write, read, leave = os.write, os.read, os._exit  # saved before the program can replace them
    main, built_in = sys.modules["__main__"].__dict__, __builtins__
    del sys.argv[1:]
    main.clear()  # hide everything of the keeper
    main.update(__name__="__main__", __builtins__=built_in)
    exec(compile(source.decode("utf-8", "replace"), "program.py", "exec"), main)
    write(say, b"end\n")
    write(say, read(hear, 64))
    leave(0)


# ---- the keeper ----


def watched(child: int, said: int, tell: int, deadline: float, processes: int) -> bytes:
    """Return the verdict: `passed` if the program ends in time and then repeats a word created only after its end.

    Args:
        processes: the most processes allowed below the keeper at a time.
    """
    poll, word, heard = select.poll(), b"", b""
    poll.register(said, select.POLLIN)
    with contextlib.suppress(AttributeError, OSError):  # without these, the next tick notices the end
        poll.register(os.pidfd_open(child), select.POLLIN)
    while time.monotonic() < deadline:
        ready = {number for number, _ in poll.poll(TICK * 1000)}
        if said in ready:
            heard += (more := os.read(said, 256))
            if not more:
                return b"failed"
            if not word and heard == END:
                word = os.urandom(16).hex().encode()
                os.write(tell, word)
            elif word and heard == END + word:
                return b"passed"
            elif not (END + word).startswith(heard):
                return b"failed"
        elif ended(child):
            return b"failed"
        if len(descendants(os.getpid())) > processes:
            return b"failed"
    return b"timeout"


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end(child: int) -> None:
    """Kill the child and all its descendants, and wait until they are gone."""
    while True:
        for process in [child, *descendants(os.getpid())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def descendants(process: int) -> list[int]:
    """Return all processes below a process, whatever session they are in."""
    if not os.path.exists("/proc/thread-self/children"):  # CONFIG_PROC_CHILDREN
        return below_by_parents(process)
    found, below = [], [process]
    while below:
        children = []
        for one in below:
            try:
                for task in os.listdir(f"/proc/{one}/task"):
                    with open(f"/proc/{one}/task/{task}/children") as file:
                        children += map(int, file.read().split())
            except (FileNotFoundError, ProcessLookupError):
                continue
        found += children
        below = children
    return found


def below_by_parents(process: int) -> list[int]:
    """Return `descendants` from the parents of all processes, which takes longer."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(name))
    found = list(children.get(process, ()))
    for one in found:  # the list grows in the loop
        found += children.get(one, ())
    return found


if __name__ == "__main__":
    answer = main()
    os.write(1, answer)
