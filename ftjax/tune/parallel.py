"""Trials at the same time: one process for each share of the devices, all on one study.

`python -m ftjax.tune.parallel` is such a process; it reads its part of the work from standard input.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ftjax.config.load import load_config, save_config
from ftjax.cpu_threads import set_threads
from ftjax.data.memory import is_kept
from ftjax.errors import Interrupted, UserError
from ftjax.gpu import set_flags
from ftjax.tune.shares import Share, shares
from ftjax.tune.space import parse
from ftjax.tune.study import Plan

CONFIG = "search.yaml"  # the configuration that the processes read
FAILED = 3  # exit code of a process whose message is on standard error


def work_in_parallel(plan: Plan, count: int, say: Callable[[str], None]) -> None:
    """Run the trials in `count` processes.

    Raises UserError if the devices do not suffice, the data is in memory, or a process fails; Interrupted if a signal came.
    """
    if any(is_kept(source.path) for split in ("train", "validation") for source in plan.config.data.sources(split)):
        raise UserError("parallel trials are processes of their own, which do not have rows in memory; write them to a file")
    parts = shares(count)
    save_config(plan.config, plan.folder / CONFIG)
    logs = [plan.folder / f"process-{number}.log" for number in range(count)]
    processes = [_start(plan, part, log) for part, log in zip(parts, logs, strict=True)]
    lines = [threading.Thread(target=_forward, args=(one, say), daemon=True) for one in processes]
    ended = _terminated_like_interrupted()
    try:
        for thread in lines:
            thread.start()
        for one in processes:
            one.wait()
    except KeyboardInterrupt:
        for one in processes:  # in a terminal they have the signal already; another one would end them before they have saved
            if one.poll() is None and not sys.stdin.isatty():
                one.send_signal(signal.SIGINT)
        for one in processes:
            one.wait()
        raise Interrupted("the search was stopped; run the same command to go on") from None
    finally:
        ended()
        for one in processes:
            if one.poll() is None:
                one.terminate()
    for thread in lines:
        thread.join()
    failed = [log for one, log in zip(processes, logs, strict=True) if one.returncode]
    if failed:
        said = failed[0].read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise UserError(f"{len(failed)} of {count} processes failed: {said[-1] if said else 'they were ended'} ({failed[0]})")


def _start(plan: Plan, part: Share, log: Path) -> subprocess.Popen:
    """Start a process. Args: log: its standard error, which has its last words."""
    work = {
        "folder": str(plan.folder), "space": plan.space, "trials": plan.trials, "seed": plan.seed, "sampler": plan.sampler,
        "prune": plan.prune, "storage": plan.storage, "name": plan.name, "keep": plan.keep, "cores": part.cores,
    }  # fmt: skip
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "ftjax.tune.parallel"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, env={**os.environ, **part.environment},
        )  # fmt: skip
    process.stdin.write(json.dumps(work))
    process.stdin.close()
    return process


def _terminated_like_interrupted() -> Callable[[], None]:
    """Let SIGTERM stop the search as Ctrl-C does; return a function that takes this back."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)

    def back() -> None:
        signal.signal(signal.SIGTERM, before)

    return back


def _forward(process: subprocess.Popen, say: Callable[[str], None]) -> None:
    with process.stdout:
        for line in process.stdout:
            say(line.rstrip("\n"))


def _run(given: dict[str, Any]) -> None:
    cores: Sequence[int] = given.pop("cores")
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX makes its threads
    set_threads()
    set_flags()
    from ftjax.tune.work import work

    folder = Path(given.pop("folder"))
    space = tuple(parse(given.pop("space")))
    work(Plan(load_config(folder / CONFIG), space, folder, **given), lambda text: print(text, flush=True))


def main() -> None:
    """Entry point of a process."""
    try:
        _run(json.load(sys.stdin))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(1)


if __name__ == "__main__":
    main()
