"""Runs the sides of a comparison one after the other, each in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def measured(command: Sequence[str], out: Path, name: str | None = None) -> dict[str, Any]:
    """Return the figures that a side wrote to `out`, with its maximum resident set if it has no figure of device memory.

    Raises RuntimeError with what it printed if it failed; `name` says which side it was, and otherwise the command.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{name or ' '.join(command)} ended with {process.returncode}:\n{said.read()}")
    return {"peak_bytes": usage.ru_maxrss * 1024, **json.loads(out.read_text())}


def worker(side: str, work: Path) -> dict[str, Any]:
    """Return the figures of a side of the running script, which takes `--worker` and `--work`; ends the script if it fails."""
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--worker", side, "--work", str(work)]
    try:
        return measured(command, work / f"{side}.json", side)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None


def printed(sides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the figures that the sides of the running script, which takes `--side`, print last, as JSON."""
    found = {}
    for side in sides:
        with tempfile.TemporaryFile("w+") as out:
            subprocess.run([sys.executable, sys.argv[0], *sys.argv[1:], "--side", side], check=True, stdout=out)
            out.seek(0)
            found[side] = json.loads(out.read().splitlines()[-1])
    return found
