#!/usr/bin/env python3
"""How fast a model folder is loaded, beside reading the same bytes plainly.

    python scripts/bench/load.py [--model FOLDER] [--times 5]

Without a folder, one with the shapes of Llama 3.2 1B in bfloat16 (2.5 GB, all zeros but for the header) is made in a temporary
folder. Prints, each as the median of `--times` runs that take turns,
- plain: every tensor read through `safetensors` slices (`safe_open(...).get_slice(name)[:]`) into an array of numpy's;
- load: ftjax, from the open folder to arrays on the devices, in the dtype of the files;
- write: the same arrays into a new model folder;
and the ratio of the first two. The file is read once before, so that both find it in the page cache: what is compared is the
program, not the disk.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from ftjax.config import MeshConfig
from ftjax.hub.gather import host_piece
from ftjax.hub.load import load_base, open_model
from ftjax.hub.safetensors import CODES, Tensor, write_file
from ftjax.mesh import make_mesh
from ftjax.models.facts import read_config
from ftjax.models.model import Model, build_module

LLAMA_1B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path)
    p.add_argument("--times", type=int, default=5)
    return p.parse_args()


def make_model(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with the tensors of `config` in bfloat16, all zero."""
    (folder / "config.json").write_text(json.dumps(config))
    facts = read_config(folder)
    model = Model.of(build_module(facts), facts)
    dtype = np.dtype(jnp.bfloat16)
    tensors = [
        Tensor(piece.name, piece.shape, dtype, lambda shape=piece.shape: np.zeros(shape, dtype))
        for spec in model.specs.values()
        for piece in spec.written()
    ]
    write_file(folder / "model.safetensors", tensors)
    return folder


def plain(folder: Path) -> int:
    """Bytes of every tensor, each read into an array of its own and kept until all are there."""
    kept = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():
                kept.append(opened.get_slice(name)[:])
    return sum(array.nbytes for array in kept)


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or make_model(Path(temporary), LLAMA_1B)
        facts, source = open_model(folder)
        model = Model.of(build_module(facts), facts)
        dtype = source.dtype(next(iter(source.keys())))
        mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])

        def load() -> dict[str, jax.Array]:
            return jax.block_until_ready(load_base(model, open_model(folder)[1], mesh, dtype, str(folder)))

        def write() -> int:
            params = loaded[0]
            tensors = [
                Tensor(piece.name, piece.shape, dtype, host_piece(params[path], piece.index, piece.shape))
                for path, spec in model.specs.items()
                for piece in spec.written()
            ]
            with tempfile.TemporaryDirectory() as out:
                write_file(Path(out) / "model.safetensors", tensors)
            return 0

        size = plain(folder)
        loaded = [load()]
        seconds: dict[str, list[float]] = {"plain": [], "load": [], "write": []}
        runs: dict[str, Callable[[], Any]] = {"plain": lambda: plain(folder), "load": load, "write": write}
        for _ in range(options.times):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    print(f"{folder.name if options.model else 'Llama 3.2 1B'}: {size / 1e9:.2f} GB in {CODES[dtype]}, {os.cpu_count()} cores")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"{name:6} {value:7.3f} s  {size / value / 1e9:6.2f} GB/s")
    print(f"load / plain: {median['plain'] / median['load']:.2f} of the speed; target 0.80")


if __name__ == "__main__":
    main()
