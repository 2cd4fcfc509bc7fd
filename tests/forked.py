"""Starts processes from one that has imported everything, which saves half of their time.

`python forked.py` is that one: it imports ftjax and what it needs, touches no device, and forks for every line of JSON that it
reads. Each fork is a process of its own, with its own environment, devices and end, as `python -c CODE` would be.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

# JAX reads these when it is imported, which was before a fork had its own environment.
SETTINGS = {
    "JAX_COMPILATION_CACHE_DIR": ("jax_compilation_cache_dir", str),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": ("jax_persistent_cache_min_compile_time_secs", float),
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": ("jax_persistent_cache_min_entry_size_bytes", int),
}


class Started:
    """A process that was started, with the part of `subprocess.Popen` that tests need."""

    def __init__(self, folder: Path, pid: int):
        self._folder, self.pid = folder, pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        path = self._folder / "status"
        return os.waitstatus_to_exitcode(int(path.read_text())) if path.exists() else None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end; return what was printed."""
        self.wait(timeout)
        return (self._folder / "output").read_text(errors="replace"), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that forks. It ends with this one."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="ftjax-forked-")
        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**environment, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        self._count = 0

    def start(self, code: str, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path | None) -> Started:
        """Run Python code in a new process. Args: arguments: `sys.argv[1:]`."""
        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        folder.mkdir()
        order = [str(folder), code, list(arguments), dict(environment), str(cwd or Path.cwd())]
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Started(folder, int(self._process.stdout.readline()))


def serve() -> None:
    """Fork for every order, and print the new process's id."""
    sys.modules["torch"] = None  # transformers and datasets look for it when they are imported
    import datasets
    import transformers  # noqa: F401

    del sys.modules["torch"]
    import ftjax.cli
    import ftjax.evaluate.command
    import ftjax.evaluate.observe
    import ftjax.generate.command
    import ftjax.models.llama
    import ftjax.models.mixtral
    import ftjax.train.run  # noqa: F401

    assert datasets
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
    for line in sys.stdin:
        order = json.loads(line)
        ours, theirs = os.pipe()
        if os.fork() == 0:
            os.close(ours)
            watch(order, theirs)
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            print(pipe.read(), flush=True)


def watch(order: list, pipe: int) -> None:
    """Fork once more, tell the process's id, and write down how it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pid = os.fork()
    if pid == 0:
        os.close(pipe)
        become(*order)
    os.write(pipe, str(pid).encode())
    os.close(pipe)
    _, status = os.waitpid(pid, 0)
    path = Path(order[0]) / "status"
    path.with_suffix(".new").write_text(str(status))
    path.with_suffix(".new").rename(path)
    os._exit(0)


def become(folder: str, code: str, arguments: list[str], environment: dict[str, str], cwd: str) -> None:
    """Be a process that runs this code, as `python -c` would."""
    output = os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", 1), open(2, "w", 1)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    import jax

    for name, (setting, kind) in SETTINGS.items():
        if name in environment:
            jax.config.update(setting, kind(environment[name]))
    sys.argv = ["-c", *arguments]
    ended = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        ended = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        ended = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)


if __name__ == "__main__":
    serve()
