"""Measures what int8 and nf4 cost: the error of the forward pass against float32, and the loss after LoRA steps on each base.

    python scripts/bench/quantized.py MODEL DATA [--steps 100] [--rows 2] [--length 64] [--json FILE]

MODEL is a Hub id, a folder or a .gguf file; DATA any file that `ftjax train` takes. Prints a table with a line each for
float32, int8 and nf4: `bits` per weight of the quantised layers, `weight_error` (mean |error| over mean |weight|),
`logit_error` (the same for logits), `agree` (share of tokens whose likeliest next token is the same), `loss_before` and
`loss_after` (of the last tenth of the steps), all on the same rows. `--steps 0` leaves out the losses.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.config import Config
from ftjax.data.pipeline import load_splits
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.models.nn.quantized import Int8, Nf4
from ftjax.train.setup import Setup, compile_steps, new_state, prepare


def config_of(options: argparse.Namespace, quantization: str | None) -> Config:
    return Config.model_validate({
        "model": {"path": options.model, "dtype": "float32", "compute_dtype": "float32", "quantization": quantization},
        "method": {"name": "lora", "r": 8, "lora_alpha": 16},
        "data": {"train": options.data, "max_length": options.length, "truncation": "right"},
        "optimizer": {"learning_rate": options.learning_rate, "lr_scheduler_type": "constant"},
        "training": {"max_steps": max(1, options.steps), "global_batch_size": options.rows},
        "mesh": {"fsdp": 1, "data": 1},
    })  # fmt: skip


def logits_of(setup: Setup, batch: dict) -> np.ndarray:
    """Return float32 logits `[N, V]` of the tokens that are not padding."""

    def forward(params, batch):
        ctx = setup.runtime.context(batch)
        module = setup.model.bind(params)
        return module.unembed(module.hidden(batch["tokens"], ctx)[0], ctx)

    return np.asarray(jax.jit(forward)({**setup.frozen, **setup.params}, batch))[batch["segment_ids"] > 0]


def measure(options: argparse.Namespace, quantization: str | None, exact: dict) -> dict:
    """Return one line of the output; the first, unquantised one fills `exact`."""
    config = config_of(options, quantization)
    setup = prepare(config)
    split, _ = load_splits(config.data, load_tokenizer(config.model), seed=0)
    batches = split.batches(options.rows, seed=0, shuffle=True, epochs=None)
    line: dict = {"base": quantization or "float32"}
    first = next(batches)
    logits = logits_of(setup, first)
    if quantization is None:
        exact["logits"] = logits
        exact["weights"] = {path: np.asarray(leaf) for path, leaf in setup.frozen.items()}
    else:
        held = {path: leaf for path, leaf in setup.frozen.items() if isinstance(leaf, Int8 | Nf4)}
        bits = 8 * sum(part.nbytes for leaf in held.values() for part in jax.tree.leaves(leaf))
        sums = np.zeros(3)
        for path, leaf in held.items():
            want = exact["weights"][path]
            sums += np.abs(np.asarray(leaf.dequantise(jnp.float32)) - want).sum(), np.abs(want).sum(), want.size
        line["bits"] = round(bits / sums[2], 3)
        line["weight_error"] = round(sums[0] / sums[1], 5)
        line["logit_error"] = round(float(np.abs(logits - exact["logits"]).mean() / np.abs(exact["logits"]).mean()), 5)
        line["agree"] = round(float((logits.argmax(-1) == exact["logits"].argmax(-1)).mean()), 4)
    if not options.steps:
        return line
    step, _, optimizer, _ = compile_steps(setup, options.steps)
    state, losses = new_state(setup, optimizer), []
    with jax.set_mesh(setup.mesh):
        for number in range(options.steps):
            batch = first if number == 0 else next(batches)
            placed = {name: jnp.asarray(rows)[None] for name, rows in batch.items()}
            state, metrics = step(state, setup.frozen, placed, jax.random.key(0), jnp.float32(np.inf))
            losses.append(float(metrics.loss))
    return {**line, "loss_before": round(losses[0], 4), "loss_after": round(float(np.mean(losses[-options.steps // 10 :])), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    for name, default in (("--steps", 100), ("--rows", 2), ("--length", 64)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    exact: dict = {}
    columns = ["base", "bits", "weight_error", "logit_error", "agree", "loss_before", "loss_after"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    found = []
    for quantization in (None, "int8", "nf4"):
        found.append(measure(options, quantization, exact))
        print(f"| {' | '.join(str(found[-1].get(column, '')) for column in columns)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
