#!/usr/bin/env python3
"""Train step of ftjax beside transformers + PEFT: same weights, same adapter, same batches, one run.

    python scripts/bench/step.py --model DIR [--rows 2] [--length 512] [--steps 6] [--r 16] [--method lora|full]
                                 [--dtype float32] [--peer PEFT_REFERENCE.PY] [--compile]

Each side runs in a process of its own, one after the other. Prints tokens a second (median over the steps after the
first), their ratio, compile time, peak memory (maximum resident set on CPU, the device's own count elsewhere) and the
largest relative difference of the losses; a difference over 1e-3 makes the comparison void and the exit code 1.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PEER = Path(__file__).resolve().parents[3] / "shared" / "bench" / "peft_reference.py"


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a Hugging Face folder")
    p.add_argument("--rows", type=int, default=2)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--steps", type=int, default=6)
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--method", choices=["lora", "full"], default="lora")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--attention", default="auto")
    p.add_argument("--remat", default="auto")
    p.add_argument("--peer", type=Path, default=PEER)
    p.add_argument("--compile", action="store_true", help="torch.compile on the peer's side")
    p.add_argument("--no-peer", action="store_true")
    p.add_argument("--json", type=Path, help="write the figures there")
    p.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return p.parse_args()


def make_batches(path: Path, vocab: int, rows: int, length: int, steps: int) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, vocab, (steps, rows, length))
    np.savez(path, input_ids=ids, labels=ids)


def ours(a: argparse.Namespace, work: Path) -> None:
    """The ftjax side, in a process of its own: writes `ours.json`, and first the adapter that both sides start from."""
    import jax
    import jax.numpy as jnp

    from ftjax.config import Config
    from ftjax.hub.peft import write_adapter
    from ftjax.train.setup import compile_steps, prepare
    from ftjax.train.step import init_state

    method = {"name": "full"} if a.method == "full" else {"name": "lora", "r": a.r, "lora_alpha": 2 * a.r}
    model = {"path": a.model, "dtype": a.dtype, "compute_dtype": a.dtype, "attention": a.attention, "remat": a.remat}
    optimizer = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
    config = Config.model_validate({
        "model": model, "method": method, "optimizer": optimizer, "data": {"train": "none", "max_length": a.length},
        "training": {"global_batch_size": a.rows},
    })  # fmt: skip
    setup = prepare(config)
    if a.method == "lora":
        (work / "adapter").mkdir(exist_ok=True)
        write_adapter(work / "adapter", setup.model, setup.params, config.method, a.model)
    step, _, optimizer, _ = compile_steps(setup, a.steps)
    state = init_state(setup.params, optimizer)
    setup.params = {}  # the state owns them now
    ids = np.load(work / "batches.npz")["input_ids"].astype(np.int32)
    losses, seconds = [], []
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
            start = time.perf_counter()
            state, metrics = step(state, setup.frozen, batch, key, limit)
            losses.append(float(metrics.loss))
            seconds.append(time.perf_counter() - start)
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "loss": losses, "seconds": seconds, "compile_seconds": compile_seconds, "peak_bytes": peak,
        "tokens_per_second": ids[0].size / statistics.median(seconds[1:]), "device": jax.devices()[0].device_kind,
        "remat": setup.runtime.remat, "attention": setup.runtime.attention,
    }  # fmt: skip
    (work / "ours.json").write_text(json.dumps(result))


def theirs(a: argparse.Namespace, work: Path) -> dict:
    command = [sys.executable, str(a.peer), "--model", a.model, "--batches", str(work / "batches.npz")]
    command += ["--out", str(work / "theirs.json"), "--dtype", a.dtype, "--lr", "1e-3"]
    command += ["--method", "full"] if a.method == "full" else ["--adapter", str(work / "adapter")]
    command += ["--compile"] if a.compile else []
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    result = json.loads((work / "theirs.json").read_text())
    # The maximum over all children; where it did not grow, the peer needed no more than the side that ran before it.
    return {**result, "peak_bytes": after * 1024, "peak_is_bound": after == before}


def main() -> int:
    a = arguments()
    if a.worker:
        ours(a, a.worker)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        vocab = json.loads((Path(a.model) / "config.json").read_text())["vocab_size"]
        make_batches(work / "batches.npz", vocab, a.rows, a.length, a.steps)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--worker", str(work)], check=True)
        mine = json.loads((work / "ours.json").read_text())
        print(
            f"ftjax  {mine['tokens_per_second']:8.1f} tokens/s   peak {mine['peak_bytes'] / 1e9:6.2f} GB   compile "
            f"{mine['compile_seconds']:.1f} s   ({mine['device']}, remat {mine['remat']}, attention {mine['attention']})"
        )
        if a.no_peer:
            return 0
        peer = theirs(a, work)
    bound = "at most " if peer["peak_is_bound"] else ""
    print(f"PEFT   {peer['tokens_per_second']:8.1f} tokens/s   peak {bound}{peer['peak_bytes'] / 1e9:.2f} GB")
    apart = max(abs(x / y - 1) for x, y in zip(mine["loss"], peer["loss"], strict=True))
    ratio = mine["tokens_per_second"] / peer["tokens_per_second"]
    verdict = "" if apart < 1e-3 else ": the comparison is void"
    print(f"ratio  {ratio:8.2f}            losses differ by {apart:.1e} relative{verdict}")
    if a.json:
        a.json.write_text(json.dumps({"ftjax": mine, "peft": peer, "ratio": ratio, "loss_difference": apart}, indent=2) + "\n")
    return 0 if apart < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
