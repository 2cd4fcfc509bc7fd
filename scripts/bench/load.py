#!/usr/bin/env python3
"""Measures how fast a model folder is loaded and written, compared with reading the same bytes, and the host memory needed.

    python scripts/bench/load.py [--model FOLDER] [--times 5] [--json FILE]

Without a folder, one with the shapes of Llama 3.2 1B in bfloat16 (2.5 GB of random weights) is made in a temporary folder.
Prints, as medians of `--times` runs that take turns, seconds and seconds of CPU time, which others on the machine change less:
- plain: every tensor read through `safetensors` slices (`safe_open(...).get_slice(name)[:]`) into a NumPy array;
- load: ftjax, from the open folder to arrays on the devices, in the dtype of the files;
- write: the same arrays into a new model folder;
and the peak host memory (maximum resident set beyond that after the imports) of a process that does only that; on a CPU it
includes the loaded arrays. The file is read once before, so that all runs find it in the page cache: the programs are compared,
not the disk.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from random_model import make_model
from safetensors import safe_open

from ftjax.config import MeshConfig
from ftjax.hub.gather import host_piece
from ftjax.hub.load import load_base, open_model
from ftjax.hub.safetensors import CODES, Tensor, write_file
from ftjax.mesh import make_mesh
from ftjax.models.model import Model, build_module

LLAMA_1B = Path(__file__).resolve().parents[2] / "configs" / "plan" / "llama-3.2-1b"


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path)
    p.add_argument("--times", type=int, default=5)
    p.add_argument("--json", type=Path, help="write the figures there")
    p.add_argument("--peak-of", choices=["plain", "load", "write"], help=argparse.SUPPRESS)
    return p.parse_args()


def plain(folder: Path) -> int:
    """Read every tensor into its own array and keep all of them; return their bytes."""
    kept = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():
                kept.append(opened.get_slice(name)[:])
    return sum(array.nbytes for array in kept)


def dtype_of(folder: Path) -> np.dtype:
    source = open_model(folder)[1]
    return source.dtype(next(iter(source.keys())))


def load(folder: Path, model: Model) -> dict[str, jax.Array]:
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    return jax.block_until_ready(load_base(model, open_model(folder)[1], mesh, dtype_of(folder), str(folder)))


def write(model: Model, params: dict[str, jax.Array], dtype: np.dtype) -> None:
    tensors = [
        Tensor(piece.name, piece.shape, dtype, host_piece(params[path], piece.index, piece.shape))
        for path, spec in model.specs.items()
        for piece in spec.written()
    ]
    with tempfile.TemporaryDirectory() as out:
        write_file(Path(out) / "model.safetensors", tensors)


def resident() -> int:
    """Return the peak resident set of this process in bytes. (getrusage would give the parent's if that was larger.)"""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def peak_of(what: str, folder: Path, model: Model) -> int:
    """Return the host memory in bytes that `what` takes in a process that has done nothing else."""
    jax.devices()
    params = load(folder, model) if what == "write" else {}
    before = resident()
    if what == "write":
        write(model, params, dtype_of(folder))
    else:
        plain(folder) if what == "plain" else load(folder, model)
    return resident() - before


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or make_model(LLAMA_1B, Path(temporary))
        hf_config, _ = open_model(folder)
        model = Model.of(build_module(hf_config), hf_config)
        if options.peak_of:
            print(peak_of(options.peak_of, folder, model))
            return
        dtype, size = dtype_of(folder), plain(folder)
        params = load(folder, model)
        runs: dict[str, Callable[[], Any]] = {
            "plain": lambda: plain(folder), "load": lambda: load(folder, model), "write": lambda: write(model, params, dtype),
        }  # fmt: skip
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        cpu: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.times):
            for name, run in runs.items():
                start, before = time.perf_counter(), time.process_time()
                run()
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - before)
        command = [sys.executable, __file__, "--model", str(folder), "--peak-of"]
        peaks = {name: int(subprocess.check_output([*command, name], text=True).splitlines()[-1]) for name in runs}
    print(
        f"{folder.name if options.model else 'Llama 3.2 1B'}: {size / 1e9:.2f} GB in {CODES[dtype]}, {os.cpu_count()} cores\n"
    )
    median = {name: statistics.median(values) for name, values in seconds.items()}
    busy = {name: statistics.median(values) for name, values in cpu.items()}
    print("| | seconds | of CPU | GB/s | peak memory of the host |\n|---|---:|---:|---:|---:|")
    for name, value in median.items():
        print(f"| {name} | {value:.3f} | {busy[name]:.3f} | {size / value / 1e9:.2f} | {peaks[name] / 1e9:.2f} GB |")
    ratio, of_cpu = (one["plain"] / one["load"] for one in (median, busy))
    print(f"\nload / plain: {ratio:.2f} of the speed, {of_cpu:.2f} by CPU time; target 0.80")
    if options.json:
        found = {"bytes": size, "seconds": median, "cpu_seconds": busy, "peak_bytes": peaks}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
