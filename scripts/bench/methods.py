"""Compares all methods on one model in one run: trained parameters, memory of the step, and speed relative to LoRA.

    python scripts/bench/methods.py MODEL [--rows 1] [--length 128] [--steps 5] [--only lora,full]
                                    [--json FILE]

MODEL is a Hub id, a folder or a .gguf file. Prints a Markdown table: trained parameters and their share; the bytes that the
compiled step needs (arguments and temporaries) relative to LoRA; tokens per second of the fastest step relative to LoRA, which
is timed before and after the others to show the drift of a busy machine.
"""

import argparse
import gc
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import ValidationError

from ftjax.config import Config
from ftjax.methods import METHODS
from ftjax.train.setup import compile_steps, new_state, prepare

# Settings that users choose between, besides each method's defaults.
VARIANTS = {
    "lora, DoRA": {"name": "lora", "use_dora": True},
    "lora, PiSSA": {"name": "lora", "init_lora_weights": "pissa_niter_16"},
    "lora, two tokens": {"name": "lora", "trainable_token_indices": [3, 4]},
    "lora, int8 base": {"name": "lora", "quantization": "int8"},
    "lora, nf4 base": {"name": "lora", "quantization": "nf4"},
    "full, last 2 layers": {"name": "full", "last_layers": 2},
    "full, norms": {"name": "full", "train": ["norms"]},
}


def config_of(options: argparse.Namespace, method: dict) -> Config:
    method = dict(method)
    values = {
        "model": {"path": options.model, "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
        "data": {"train": "unused.jsonl", "max_length": options.length},
        "training": {"global_batch_size": options.rows},
        "mesh": {"fsdp": 1, "data": 1},
    }
    values["model"]["quantization"] = method.pop("quantization", None)
    try:
        return Config.model_validate({**values, "method": method})
    except ValidationError:  # methods with a setting that has no default in PEFT
        return Config.model_validate({**values, "method": {**method, "num_virtual_tokens": 20}})


def measure(options: argparse.Namespace, method: dict) -> tuple[int, float, int, float]:
    """Return `(trained parameters, their share of all, bytes of the step, seconds of the fastest step)`."""
    setup = prepare(config_of(options, method))
    step, _, optimizer, _ = compile_steps(setup, 100)
    state, rng = new_state(setup, optimizer), np.random.default_rng(0)
    shape = (1, options.rows, options.length)
    words = {name: rng.integers(3, setup.model.sizes.vocab, shape).astype(np.int32) for name in ("tokens", "targets")}
    rest = {"positions": np.broadcast_to(np.arange(options.length, dtype=np.int32), shape)}
    rest |= {"segment_ids": np.ones(shape, np.int32), "weights": np.ones(shape, np.float32)}
    batch = {name: jnp.asarray(rows) for name, rows in {**words, **rest}.items()}
    key, limit, seconds = jax.random.key(0), jnp.float32(np.inf), []
    with jax.set_mesh(setup.mesh):
        compiled = step.lower(state, setup.frozen, batch, key, limit).compile()
        memory = compiled.memory_analysis()
        for _ in range(options.steps):
            start = time.perf_counter()
            state, metrics = compiled(state, setup.frozen, batch, key, limit)
            metrics.loss.block_until_ready()
            seconds.append(time.perf_counter() - start)
    trained = sum(spec.size for spec in setup.model.trainable.values())
    total = trained + sum(spec.size for spec in setup.model.frozen.values())
    return trained, trained / total, memory.argument_size_in_bytes + memory.temp_size_in_bytes, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, default in (("--rows", 1), ("--length", 128), ("--steps", 5)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--only", help="names of rows, separated by commas; all by default")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    methods = {name: {"name": name} for name in METHODS} | VARIANTS
    chosen = [name for name in methods if name != "lora" and (not options.only or name in options.only.split(","))]
    print("| method | trains | share | memory | speed |\n|---|---|---|---|---|", flush=True)
    lora, found = None, []
    for name in ["lora", *chosen, "lora"]:
        trained, share, size, seconds = measure(options, methods[name])
        lora = lora or (size, seconds)
        row = f"| {name} | {trained:,} | {share:.3%} | {size / lora[0]:.2f} | {lora[1] / seconds:.2f} |"
        print(row if name != "lora" or lora[1] == seconds else f"{row} again", flush=True)
        found.append({"method": name, "trained": trained, "share": share, "bytes": size, "seconds": seconds})
        gc.collect()
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
