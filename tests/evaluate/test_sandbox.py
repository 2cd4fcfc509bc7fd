"""Programs that nobody has read."""

import sys

import pytest

import ftjax.evaluate.sandbox as sandbox
from ftjax.errors import UserError
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
    """Also what the program has started is gone."""
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    source = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    assert run_program(source, Limits(seconds=1)) == "timeout"
    import time

    time.sleep(2.5)
    assert not mark.exists()


def test_a_machine_without_filters(monkeypatch):
    monkeypatch.setattr(sandbox, "BOOTSTRAP", sandbox.BOOTSTRAP.replace("libc.prctl(38, 1, 0, 0, 0)", "True"))
    with pytest.raises(UserError, match="refuses seccomp filters"):
        run_program("pass", LIMITS)
    sandbox._syscalls.cache_clear()
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(UserError, match="riscv64"):
        run_program("pass", LIMITS)
    sandbox._syscalls.cache_clear()
