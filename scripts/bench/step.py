#!/usr/bin/env python3
"""Compares ftjax's train step with transformers + PEFT: same weights, same adapter, same batches, one run.

    python scripts/bench/step.py --model DIR [--method lora full qlora] [--rows 2] [--length 512] [--steps 6] [--r 16]
                                 [--dtype float32] [--compile] [--peer peft_step.py] [--json FILE]

DIR is a Hugging Face folder; one without weights (configs/plan/llama-3.2-1b) gets random ones. Each side runs in a separate
process, one after the other; `--compile` adds a run of the peer under torch.compile. If the peer runs out of memory, it runs
again with gradient checkpointing. Prints for each method
- tokens per second (by the median of the steps after the first), and ftjax's over the peer's;
- peak memory: the maximum resident set on a CPU, the device's own count elsewhere;
- seconds until a step can run: ftjax's compilation, or the peer's first step minus a later one;
- the largest relative difference of the losses: above 1e-3 the comparison is void and the exit code 1;
- the ratio by processor time, which others on the machine change less (it does not count the waiting of one core for another);
- the share of the machine's rate of matrix products that ftjax's step reaches, by `ftjax/flops.py`, and on a GPU the number of
  cuDNN attention kernels in its program.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sides import measured

PEER = Path(__file__).with_name("peft_step.py")
RANDOM_MODEL = Path(__file__).with_name("random_model.py")
LEARNING_RATE = {"lora": 1e-3, "qlora": 1e-3, "full": 1e-5}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    p.add_argument("--method", nargs="+", choices=["lora", "full", "qlora"], default=["lora"])
    p.add_argument("--rows", type=int, default=2)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--attention", default="auto", help="ftjax's model.attention")
    p.add_argument("--remat", default="auto", help="ftjax's model.remat")
    p.add_argument("--peer", type=Path, default=PEER, help="another script with the same options and the same output")
    p.add_argument("--compile", action="store_true", help="the peer under torch.compile, too")
    p.add_argument("--no-peer", action="store_true")
    p.add_argument("--json", type=Path, help="write the figures there")
    p.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if not (a.model / "config.json").is_file():
        p.error(f"--model: expected a model folder with config.json; {a.model} has none")
    return a


def make_batches(path: Path, vocab: int, rows: int, length: int, steps: int) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, vocab, (steps, rows, length))
    np.savez(path, input_ids=ids, labels=ids)


def product_rate(dtype: str) -> float:
    """Return the FLOP/s of large matrix products in `dtype` on the first device, the best of five runs."""
    import jax
    import jax.numpy as jnp

    size, calls = (2048, 1) if jax.default_backend() == "cpu" else (8192, 16)
    left, right = jax.random.normal(jax.random.key(0), (2, size, size), jnp.dtype(dtype))
    product, best = jax.jit(jnp.matmul), float("inf")
    for _ in range(6):  # the first compiles
        start = time.perf_counter()
        jax.block_until_ready([product(left, right) for _ in range(calls)])
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 * calls / best


def ours(a: argparse.Namespace, method: str, work: Path) -> None:
    """Run ftjax's side, in a separate process: write the adapter that both sides start from, then `ours.json`."""
    from ftjax.gpu import set_flags

    set_flags()  # as `ftjax train` does, before JAX looks for devices
    import jax
    import jax.numpy as jnp

    from ftjax.config import Config
    from ftjax.flops import train_flops_per_token
    from ftjax.hub.adapter.peft import write_adapter
    from ftjax.train.setup import compile_steps, prepare
    from ftjax.train.step import init_state

    model = {"path": str(a.model), "dtype": a.dtype, "compute_dtype": a.dtype, "attention": a.attention, "remat": a.remat}
    model |= {"quantization": "nf4"} if method == "qlora" else {}
    optimizer = {"learning_rate": LEARNING_RATE[method], "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
    config = Config.model_validate({
        "model": model, "optimizer": optimizer, "data": {"train": "none", "max_length": a.length},
        "method": {"name": "full"} if method == "full" else {"name": "lora", "r": a.r, "lora_alpha": 2 * a.r},
        "training": {"global_batch_size": a.rows},
    })  # fmt: skip
    setup = prepare(config)
    if method != "full":
        (work / "adapter").mkdir(exist_ok=True)
        write_adapter(work / "adapter", setup.model, setup.params, config.method, str(a.model))
    step, _, optimizer, _ = compile_steps(setup, a.steps)
    state = init_state(setup.params, optimizer)
    setup.params = {}  # the state owns them now
    ids = np.load(work / "batches.npz")["input_ids"].astype(np.int32)
    losses, seconds, cpu = [], [], []
    with jax.set_mesh(setup.mesh):
        key, limit = jax.random.key(0), jnp.float32(np.inf)
        for number in range(a.steps):
            weights = np.ones(ids[number].shape, np.float32)
            weights[:, -1] = 0
            batch = {
                "tokens": ids[number], "targets": np.roll(ids[number], -1, axis=1), "weights": weights,
                "segment_ids": np.ones_like(ids[number]),
                "positions": np.broadcast_to(np.arange(a.length, dtype=np.int32), ids[number].shape),
            }  # fmt: skip
            batch = {name: jnp.asarray(value)[None] for name, value in batch.items()}
            if number == 0:
                start = time.perf_counter()
                step = step.lower(state, setup.frozen, batch, key, limit).compile()
                compile_seconds = time.perf_counter() - start
            start, busy = time.perf_counter(), time.process_time()
            state, metrics = step(state, setup.frozen, batch, key, limit)
            losses.append(float(metrics.loss))
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - busy)
    result = {
        "loss": losses, "seconds": seconds, "cpu_seconds": cpu, "ready_seconds": compile_seconds,
        "device": jax.devices()[0].device_kind,
        "remat": setup.runtime.remat, "attention": setup.runtime.attention,
        "cudnn_attention": step.as_text().count('custom_call_target="__cudnn$fmha'),
        "flops_per_token": train_flops_per_token(setup.model, a.length),
    }  # fmt: skip
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    result |= {"peak_bytes": peak} if peak else {}
    if method == "qlora":  # not earlier: its memory would count as the step's
        write_base(work / "base", setup, a)
    (work / "ours.json").write_text(json.dumps({**result, "product_rate": product_rate(a.dtype)}))


def write_base(folder: Path, setup: Any, a: argparse.Namespace) -> None:
    """Write the base model with the values of its nf4 weights: if the peer rounds them again in the same blocks, nothing
    changes."""
    import jax
    import jax.numpy as jnp

    from ftjax.config import FullConfig
    from ftjax.hub.model_folder import model_tensors, write_folder
    from ftjax.models.nn.quantized import Quantized

    def read(spec, piece) -> np.ndarray:
        depth = len(spec.stacked)
        leaf = jax.tree.map(lambda part: part[piece.index[:depth]], setup.frozen[spec.path])
        weight = leaf.dequantise(jnp.float32) if isinstance(leaf, Quantized) else leaf
        return np.asarray(weight[piece.index[depth:]]).reshape(piece.shape)

    folder.mkdir()
    tensors = model_tensors(setup.model, read, {}, FullConfig(name="full"), jnp.dtype(a.dtype))
    write_folder(folder, setup.model, tensors, a.dtype, a.model)


def theirs(a: argparse.Namespace, method: str, work: Path, compiled: bool) -> dict:
    model = work / "base" if method == "qlora" else a.model
    command = [sys.executable, str(a.peer), "--model", str(model), "--batches", str(work / "batches.npz")]
    command += ["--out", str(work / "theirs.json"), "--dtype", a.dtype, "--lr", str(LEARNING_RATE[method])]
    command += ["--method", "full"] if method == "full" else ["--adapter", str(work / "adapter")]
    command += ["--quantize"] if method == "qlora" else []
    command += ["--compile"] if compiled else []
    try:
        found = measured(command, work / "theirs.json")
    except RuntimeError as error:
        if "OutOfMemoryError" not in str(error):
            raise
        found = measured([*command, "--checkpointing"], work / "theirs.json") | {"remat": "gradient checkpointing"}
    rest = found["seconds"][1:]
    return {"ready_seconds": max(found["seconds"][0] - statistics.median(rest), 0), **found}


def compare(a: argparse.Namespace, method: str, work: Path) -> dict:
    """Return the figures of one method, by side."""
    command = [sys.executable, __file__, *sys.argv[1:], "--model", str(a.model), "--method", method, "--worker", str(work)]
    mine = measured(command, work / "ours.json")
    sides = {"ftjax": mine}
    if not a.no_peer:
        sides["PEFT"] = theirs(a, method, work, compiled=False)
        if a.compile:
            sides["PEFT, torch.compile"] = theirs(a, method, work, compiled=True)
    for side in sides.values():
        side["tokens_per_second"] = a.rows * a.length / statistics.median(side["seconds"][1:])
        side["ratio"] = mine["tokens_per_second"] / side["tokens_per_second"]
        if "cpu_seconds" in side:  # another peer may not have them
            busy, own = (statistics.median(one["cpu_seconds"][1:]) for one in (side, mine))
            side["cpu_ratio"] = busy / own
        side["loss_difference"] = max(abs(x / y - 1) for x, y in zip(mine["loss"], side["loss"], strict=True))
    mine["share"] = mine["tokens_per_second"] * mine["flops_per_token"] / mine["product_rate"]
    return sides


def show(method: str, sides: dict) -> None:
    for name, side in sides.items():
        other = "" if name == "ftjax" else f"{side['ratio']:.2f}"
        apart = "" if name == "ftjax" else f"{side['loss_difference']:.1e}"
        more = f" ({side['remat']})" if name != "ftjax" and "remat" in side else ""
        print(
            f"| {method} | {name}{more} | {side['tokens_per_second']:,.1f} | {other} | {side['peak_bytes'] / 1e9:.2f} GB | "
            f"{side['ready_seconds']:.1f} s | {apart} |",
            flush=True,
        )


def explain(method: str, sides: dict) -> None:
    side = sides["ftjax"]
    cudnn = "" if side["device"] == "cpu" else f"; {side['cudnn_attention']} of cuDNN's attention kernels"
    print(
        f"{method} on {side['device']}: remat {side['remat']}, attention {side['attention']}{cudnn}; "
        f"{side['flops_per_token']:.3g} FLOPs a token: {side['share']:.0%} of {side['product_rate'] / 1e12:.3g} TFLOP/s, "
        "what products reach here"
    )
    ratios = [
        f"{other['cpu_ratio']:.2f} of {name}'s" for name, other in sides.items() if other is not side and "cpu_ratio" in other
    ]
    if ratios:
        print(f"tokens a second of processor time: {', '.join(ratios)}")


def main() -> int:
    a = arguments()
    if a.worker:
        ours(a, a.method[0], a.worker)
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if not any(a.model.glob("*.safetensors")):
            # In a separate process: a child's maximum resident set starts from its parent's.
            subprocess.run([sys.executable, RANDOM_MODEL, a.model, work / "model", "--dtype", a.dtype], check=True)
            a.model = work / "model"
        vocab = json.loads((a.model / "config.json").read_text())["vocab_size"]
        make_batches(work / "batches.npz", vocab, a.rows, a.length, a.steps)
        print("| method | side | tokens/s | ratio | peak memory | until ready | losses apart |")
        print("|---|---|---:|---:|---:|---:|---:|", flush=True)
        for method in a.method:
            found[method] = compare(a, method, work)
            show(method, found[method])
    print()
    for method, sides in found.items():
        explain(method, sides)
    void = [f"{method}, {name}" for method, sides in found.items() for name in sides if sides[name]["loss_difference"] >= 1e-3]
    if void:
        print(f"void, because the losses differ: {'; '.join(void)}", file=sys.stderr)
    if a.json:
        a.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if void else 0


if __name__ == "__main__":
    sys.exit(main())
