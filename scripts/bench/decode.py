#!/usr/bin/env python3
"""Measures decoding alone against the limit of the machine's memory: each step reads all weights once.

    python scripts/bench/decode.py --model MODEL [--rows 1 8 16] [--context 64] [--new 64] [--dtype float32] [--json FILE]

MODEL is a Hugging Face folder or a .gguf file. Prints, for each number of rows, the time of a step, tokens per second, bytes of
weights per second, and these over the bytes of a large array that are copied per second (the best of twenty, on as many threads
as there are cores), measured in the same run before and after. A copy reads and writes each byte; decoding reads it alone.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a Hugging Face folder or a .gguf file")
    p.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16])
    p.add_argument("--context", type=int, default=64, help="tokens of each prompt")
    p.add_argument("--new", type=int, default=64, help="tokens of an answer")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--json", type=Path, help="write the figures there")
    return p.parse_args()


def copy_bandwidth(size: int = 1 << 28) -> float:
    """Return the bytes that are copied per second."""
    cores = os.cpu_count() or 1
    source, target = (np.ones(size, np.uint8).reshape(cores, -1) for _ in range(2))
    times = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(np.copyto, target, source))
            times.append(time.perf_counter() - start)
    return size / min(times)


def step_seconds(generator, rows: int, a: argparse.Namespace) -> float:
    """Return the time of a decode step, the least of three runs."""
    from ftjax.generate.paged import PagedBatch, Room
    from ftjax.generate.request import Request
    from ftjax.generate.scheduler import Job, Scheduler

    batch = PagedBatch(generator.engine, generator.params, Room.fit(generator.engine, rows=rows, context=a.context + a.new))
    batch.warm_up()
    vocab, found = generator.model.sizes.vocab, []
    for number in range(3):
        rng, scheduler = np.random.default_rng(number), Scheduler(batch, reads_first=True)
        for _ in range(rows):
            prompt = rng.integers(vocab // 10, vocab, a.context).tolist()
            scheduler.submit(Job(generator.begin(Request(prompt, max_new_tokens=a.new))))
        scheduler.step()
        before, start = scheduler.decoded, time.perf_counter()
        while not scheduler.idle:
            scheduler.step()
        found.append((time.perf_counter() - start) / ((scheduler.decoded - before) / rows))
    return min(found)


def main() -> int:
    a = arguments()
    from ftjax.generate.session import Generator

    generator = Generator(a.model, dtype=a.dtype)
    generator.ends = frozenset()
    weights, found = sum(leaf.nbytes for leaf in jax.tree.leaves(generator.params)), {}
    copied = copy_bandwidth()
    for rows in a.rows:
        found[rows] = step_seconds(generator, rows, a)
    copied = max(copied, copy_bandwidth())
    print(f"{weights / 1e6:.0f} MB of weights; {copied / 1e9:.2f} GB/s are copied")
    print("| rows | step, ms | tokens/s | weights, GB/s | over a copy |\n|---:|---:|---:|---:|---:|")
    for rows, seconds in found.items():
        speed = weights / seconds
        print(f"| {rows} | {1e3 * seconds:.1f} | {rows / seconds:.1f} | {speed / 1e9:.2f} | {speed / copied:.2f} |")
    if a.json:
        a.json.write_text(json.dumps({"weights": weights, "copied": copied, "seconds": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
