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
from ftjax.data.memory import is_kept
from ftjax.errors import Interrupted, UserError
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
    processes = [_start(plan, part) for part in parts]
    lines = [threading.Thread(target=_forward, args=(one, say), daemon=True) for one in processes]
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
        for one in processes:
            if one.poll() is None:
                one.terminate()
    for thread in lines:
        thread.join()
    errors = [one.stderr.read() for one in processes if one.returncode]
    if errors:
        raise UserError(f"{len(errors)} of {count} processes failed: {errors[0].strip() or 'they were ended'}")


def _start(plan: Plan, part: Share) -> subprocess.Popen:
    work = {
        "folder": str(plan.folder), "space": plan.space, "trials": plan.trials, "seed": plan.seed, "sampler": plan.sampler,
        "prune": plan.prune, "storage": plan.storage, "name": plan.name, "keep": plan.keep, "cores": part.cores,
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "ftjax.tune.parallel"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, **part.environment},
    )  # fmt: skip
    process.stdin.write(json.dumps(work))
    process.stdin.close()
    return process


def _forward(process: subprocess.Popen, say: Callable[[str], None]) -> None:
    for line in process.stdout:
        say(line.rstrip("\n"))


def _run(given: dict[str, Any]) -> None:
    cores: Sequence[int] = given.pop("cores")
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX makes its threads
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
