#!/usr/bin/env python3
"""Measures how long a user waits at the start: `ftjax --help`, and the first update of a first and of a second run.

    python scripts/bench/startup.py --model MODEL [--times 5] [--length 128] [--json FILE]

`ftjax --help` is the median of `--times` new processes. The two runs train one update with the same configuration, on a few
rows that the script writes, and share a JAX compilation cache that starts empty, so the second run finds what the first one
compiled. A run's figure is the time from the start of its process to the last change of its metrics.jsonl, after its update;
beside it stands the processor time of the whole run, with the writing of its result, which others on the machine change less.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a Hub id, a folder or a .gguf file")
    p.add_argument("--times", type=int, default=5)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--json", type=Path, help="write the figures there")
    return p.parse_args()


def seconds_of_help(times: int) -> float:
    """Return the median seconds of `ftjax --help`."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ftjax", "--help"], check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def seconds_to_first_update(a: argparse.Namespace, work: Path, name: str) -> tuple[float, float]:
    """Return the seconds of one run from the start of the process to the update in its metrics, and its processor time."""
    data = work / "rows.jsonl"
    rows = ({"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(64))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"model.path={a.model}", f"data.train={data}", f"data.max_length={a.length}", "training.max_steps=1"]
    settings += ["training.logging_steps=1", "training.global_batch_size=2", f"output_dir={work / name}"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(work / "compiled")}
    configuration = work / "config.yaml"
    configuration.write_text("method: {name: lora}\n")
    start = time.time()
    command = [sys.executable, "-m", "ftjax", "train", str(configuration), *settings]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the {name} run ended with {process.returncode}")
    return (work / name / "metrics.jsonl").stat().st_mtime - start, usage.ru_utime + usage.ru_stime


def main() -> None:
    a = arguments()
    found = {"help": seconds_of_help(a.times)}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            found[name], found[f"{name}_cpu"] = seconds_to_first_update(a, Path(folder), name)
    print("| | seconds | of processor time |\n|---|---:|---:|")
    print(f"| `ftjax --help` | {found['help']:.2f} | |")
    for name in ("first", "second"):
        print(f"| first update of a {name} run | {found[name]:.1f} | {found[f'{name}_cpu']:.1f} |")
    if a.json:
        a.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
