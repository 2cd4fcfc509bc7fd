"""Tests the sandbox for programs that a model wrote."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ftjax.evaluate.sandbox as sandbox
from ftjax.errors import UserError
from ftjax.evaluate import keeper
from ftjax.evaluate.sandbox import Limits, run_program

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="seccomp filters are Linux's")
LIMITS = Limits(seconds=5, memory_mb=512)
CHILD = "import subprocess, sys\nassert subprocess.run([sys.executable, '-c', {!r}], stderr=-3).returncode == {}"


@pytest.mark.parametrize(
    ("source", "outcome"),
    [
        ("assert len('é😀') == 2; print('x' * 100)", "passed"),
        ("assert False", "failed"),
        ("def broken(:", "failed"),
        ("import sys; sys.exit(0)", "failed"),  # before the tests are run
        ("import os; os._exit(0)", "failed"),
        ("import os; os._exit(77)", "failed"),
        ("x = bytearray(900 << 20)", "failed"),
        ("open('a', 'wb').write(b'x' * (20 << 20))", "failed"),
        ("import socket; socket.socket()", "failed"),
        ("import socket\ntry: socket.socket()\nexcept PermissionError: pass\nelse: raise SystemExit(3)", "passed"),
        (CHILD.format("import socket; socket.socket()", 1), "passed"),  # nor can a process that it starts
        (CHILD.format("pass", 0), "passed"),
        ("import os; assert 'HF_TOKEN' not in os.environ and os.getcwd() == os.environ['HOME']", "passed"),
    ],
)
def test_outcomes(source, outcome, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_program(source, LIMITS) == outcome


def test_time(tmp_path):
    """Processes that the program has started are killed too."""
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    source = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    assert run_program(source, Limits(seconds=1)) == "timeout"
    time.sleep(2.5)
    assert not mark.exists()


@pytest.fixture(params=["as this system allows", "adopted"])
def each_way(request, tmp_path, monkeypatch):
    """Run a test in a PID namespace, if there are any, and as on systems without them."""
    if request.param == "adopted":
        changed_keeper(tmp_path, monkeypatch, "apart = into_namespace()", "apart = False")


def changed_keeper(folder, monkeypatch, before, after):
    text = sandbox.KEEPER.read_text()
    assert text.count(before) == 1
    (folder / "keeper.py").write_text(text.replace(before, after))
    monkeypatch.setattr(sandbox, "KEEPER", folder / "keeper.py")


def alive(mark):
    """Return the processes that have this argument; a zombie has no command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += [process.name] if mark.encode() in (process / "cmdline").read_bytes().split(b"\0") else []
    return found


SLEEPER = "[sys.executable, '-c', 'import time; time.sleep(60)', {mark!r}]"
BEGINNINGS = {
    "session": "subprocess.Popen({sleeper}, start_new_session=True)",
    "fork": "if os.fork() == 0:\n    os.setsid()\n    os.execv(sys.executable, {sleeper})",
    "orphan": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.execv(sys.executable, {sleeper})\n"
        "    os._exit(0)\nos.wait()"
    ),
}


@pytest.mark.parametrize("ending", ["pass", "time.sleep(60)", "os._exit(0)"])
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_nothing_outlives_it(beginning, ending, each_way, tmp_path):
    """No child stays, in another session or with open pipes, and none keeps the evaluation waiting."""
    mark, started = f"sleeper of {tmp_path.name}", tmp_path / "started"
    begin = BEGINNINGS[beginning].format(sleeper=SLEEPER.format(mark=mark))
    wait = f"open({str(started)!r}, 'w').close()\ntime.sleep(0.3)"
    start = time.monotonic()
    outcome = run_program(f"import os, subprocess, sys, time\n{begin}\n{wait}\n{ending}", Limits(seconds=2))
    assert outcome == {"pass": "passed", "os._exit(0)": "failed"}.get(ending, "timeout")
    assert time.monotonic() - start < 20 and started.exists() and not alive(mark)


def test_nor_an_interruption(each_way, tmp_path, monkeypatch):
    mark = f"sleeper of {tmp_path.name}"
    seen = []

    def interrupted(self, *given, **options):
        self.stdin.write(source.encode())
        self.stdin.close()
        until = time.monotonic() + 20
        while not alive(mark) and time.monotonic() < until:
            time.sleep(0.05)
        seen.extend(alive(mark))
        raise KeyboardInterrupt

    sleeper = SLEEPER.format(mark=mark)
    source = f"import subprocess, sys, time\nsubprocess.Popen({sleeper}, start_new_session=True)\ntime.sleep(60)"
    monkeypatch.setattr(sandbox.subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_program(source, Limits(seconds=60))
    assert seen and not alive(mark)


WRITE = "\nfor text in found:\n    for fd in range(64):\n        try: os.write(fd, text)\n        except OSError: pass\n"
EVERYTHING = """
import gc, os, sys
found, frame, values = [b"passed", b"end\\n", b"end\\npassed"], sys._getframe(), []
import __main__
values += vars(__main__).values()
while frame:
    values += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]
    frame = frame.f_back
for one in gc.get_objects():
    values += list(one.values()) if type(one) is dict else list(one) if type(one) in (list, tuple) else []
texts = [one.encode("utf-8", "replace") if isinstance(one, str) else one for one in values if isinstance(one, (str, bytes))]
found += list({one for one in texts if 8 <= len(one) <= 64})[:2000]
"""


@pytest.mark.parametrize(
    "program",
    [
        f"{EVERYTHING}{WRITE}os._exit(0)",  # every word in memory, into every file
        "import os\nfound = [b'passed']" + WRITE + "os._exit(0)",
        "import os\nfound = [b'end\\n']" + WRITE + "os._exit(0)",
        "import os\nfor n in os.listdir('/proc'):\n  if n.isdigit() and int(n) != os.getpid() and b'keeper.py' in "
        "open(f'/proc/{n}/cmdline', 'rb').read():\n    try: os.write(os.open(f'/proc/{n}/fd/1', os.O_WRONLY), b'passed')\n"
        "    except OSError: pass\nos._exit(0)",
        "import atexit, sys; atexit.register(print); sys.exit()",
        "import os; os._exit = lambda code: None; raise SystemExit(0)",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL); raise SystemExit(0)",
        "import os, signal; os.kill(os.getppid(), signal.SIGTERM); import time; time.sleep(1); raise SystemExit(0)",
        "import builtins, os; builtins.exec = builtins.compile = print; os.write = os.read = print; assert False",
        "import os\nif os.fork() == 0: assert False\nos.wait()\nassert False",
    ],
)
def test_a_pass_is_not_to_be_had_by_words(program, each_way):
    assert run_program(program, LIMITS) == "failed"


def test_processes(each_way):
    """Processes count towards the limit in any session: a program with forty at a time fails, and one with ten passes."""
    child = "    if os.fork() == 0:\n        os.setsid(); time.sleep(2); os._exit(0)"
    forks = f"import os, time\nfor n in range({{}}):\n{child}\ntime.sleep(0.5)"
    assert run_program(forks.format(40), Limits(seconds=10, processes=20)) == "failed"
    assert run_program(forks.format(10), Limits(seconds=10, processes=20)) == "passed"


def test_descendants_are_the_same_either_way():
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    with subprocess.Popen([sys.executable, "-c", child], start_new_session=True) as process:
        try:
            until = time.monotonic() + 20
            while len(keeper.below_by_parents(process.pid)) < 1 and time.monotonic() < until:
                time.sleep(0.05)
            found = keeper.below_by_parents(process.pid)
            assert len(found) == 1 and keeper.descendants(process.pid) == found
            assert {process.pid, *found} <= set(keeper.below_by_parents(os.getpid()))
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_machine_without_filters(tmp_path, monkeypatch):
    changed_keeper(tmp_path, monkeypatch, "libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) == 0", "False")
    with pytest.raises(UserError, match="refuses seccomp filters"):
        run_program("pass", LIMITS)
    sandbox._syscalls.cache_clear()
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(UserError, match="riscv64"):
        run_program("pass", LIMITS)
    sandbox._syscalls.cache_clear()
