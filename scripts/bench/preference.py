#!/usr/bin/env python3
"""DPO with LoRA: ftjax beside TRL's DPOTrainer, same pairs, same weights, same adapter, same updates, one run.

    python scripts/bench/preference.py --model DIR --data FILE [--pairs 8] [--updates 6] [--length 1024] [--micro 2] [--r 16]
                                       [--lr 1e-4] [--trl-batch 2] [--checkpointing] [--dtype float32] [--json FILE]

FILE has one pair a line: prompt, chosen and rejected, as text or messages. An update takes the next `--pairs` pairs of those
that fit into a row of `--length` tokens together. ftjax packs them, in microbatches of `--micro` rows; TRL pads them, in
microbatches of `--trl-batch` pairs, with gradient checkpointing if `--checkpointing` is set. Each side runs in a process of its
own, one after the other. Prints for each
- pairs a second (by the median of the updates after the first), and ftjax's over TRL's;
- peak memory: the maximum resident set on a CPU, what the device counts elsewhere;
- the largest relative difference of the losses: one over 1e-3 makes the comparison void and the exit code 1.

FLOPs of a token of LoRA DPO: 4 a weight for the model (forward, and the gradient of its input), 2 for each trained weight, 2 a
weight for the reference model, and attention (`ftjax/flops.py`).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sides import worker


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="a Hugging Face folder with weights and a chat template")
    p.add_argument("--data", type=Path, required=True, help="a file of pairs")
    p.add_argument("--pairs", type=int, default=8, help="pairs in an update")
    p.add_argument("--updates", type=int, default=6)
    p.add_argument("--length", type=int, default=1024)
    p.add_argument("--micro", type=int, default=2, help="ftjax: rows of a microbatch")
    p.add_argument("--trl-batch", type=int, default=2, help="TRL: pairs of a microbatch")
    p.add_argument("--checkpointing", action="store_true", help="TRL: gradient checkpointing, which is its default")
    p.add_argument("--remat", default="auto", help="ftjax's model.remat")
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--json", type=Path, help="write the figures there")
    p.add_argument("--worker", choices=["ftjax", "trl"], help=argparse.SUPPRESS)
    p.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if not (a.model / "config.json").is_file():
        p.error(f"--model: expected a model folder with config.json; {a.model} has none")
    if a.pairs % a.trl_batch:
        p.error(f"--pairs {a.pairs} does not divide by --trl-batch {a.trl_batch}")
    return a


def ours(a: argparse.Namespace) -> None:
    """The ftjax side: writes `ftjax.json`, and first the adapter that both sides start from and the pairs that fit."""
    from ftjax.gpu import set_flags

    set_flags()  # as `ftjax train`; before JAX looks for devices
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ftjax.config import Config
    from ftjax.data.pack import pack
    from ftjax.data.pipeline import load_splits
    from ftjax.hub.adapter.peft import write_adapter
    from ftjax.hub.tokenizer.load import load_tokenizer
    from ftjax.objectives import encoding_of
    from ftjax.train.layout import BatchLayout
    from ftjax.train.setup import compile_steps, prepare
    from ftjax.train.step import init_state

    config = Config.model_validate({
        "model": {"path": str(a.model), "dtype": a.dtype, "compute_dtype": a.dtype, "remat": a.remat},
        "method": {"name": "lora", "r": a.r, "lora_alpha": 2 * a.r}, "objective": {"name": "dpo"},
        "data": {"train": str(a.data), "max_length": a.length, "shuffle": False},
        "optimizer": {"learning_rate": a.lr, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "warmup_ratio": 0.0},
        "training": {"global_batch_size": a.micro},
    })  # fmt: skip
    split, _ = load_splits(config.data, load_tokenizer(config.model), seed=0, encoding=encoding_of(config))
    count = a.updates * a.pairs
    if len(split.chosen) < 2 * count:
        raise SystemExit(f"{a.data}: {len(split.chosen) // 2} pairs fit into {a.length} tokens, and {count} are asked for")
    units = split.chosen[: 2 * count].reshape(a.updates, a.pairs, 2)
    lengths = np.diff(split.documents.starts)[units].sum(-1)
    plans = [pack(of_update, a.length, None) for of_update in lengths]
    rows = -(-max(map(len, plans)) // a.micro) * a.micro  # all updates have the same shape
    plans = [type(plan)(units[n][plan.documents].ravel(), plan.starts * 2) for n, plan in enumerate(plans)]
    lines = [split.documents.where[int(unit[0])].as_py() for unit in units.reshape(-1, 2)]
    (a.work / "lines.json").write_text(json.dumps([int(line.rpartition(":")[2]) for line in lines]))

    options = config.training.model_copy(update={"global_batch_size": rows, "gradient_accumulation_steps": rows // a.micro})
    setup = prepare(config.model_copy(update={"training": options}))
    (a.work / "adapter").mkdir()
    write_adapter(a.work / "adapter", setup.model, setup.params, config.method, str(a.model))
    step, _, optimizer, _ = compile_steps(setup, a.updates)
    state = init_state(setup.params, optimizer)
    setup.params = {}  # the state owns them now
    layout = BatchLayout(setup.mesh, rows, rows // a.micro)
    losses, seconds, used = [], [], int(lengths.sum())
    with jax.set_mesh(setup.mesh):
        key, limit = jax.random.key(0), jnp.float32(np.inf)
        for plan in plans:
            batch = layout.arrays(split.rows(plan, np.arange(rows), a.length))
            start = time.perf_counter()
            state, metrics = step(state, setup.frozen, batch, key, limit)
            losses.append(float(metrics.loss))
            seconds.append(time.perf_counter() - start)
    found = {
        "loss": losses, "seconds": seconds, "device": jax.devices()[0].device_kind, "remat": setup.runtime.remat,
        "tokens": used, "computed": rows * a.length * a.updates,
        "flops_per_token": setup.train_flops.per_token(int(np.mean(lengths) / 2)),
    }  # fmt: skip
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    (a.work / "ftjax.json").write_text(json.dumps(found | ({"peak_bytes": peak} if peak else {})))


def trl(a: argparse.Namespace) -> None:
    """TRL's side: writes `trl.json`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    lines, names = a.data.read_text(encoding="utf-8").splitlines(), ("prompt", "chosen", "rejected")
    found = [json.loads(lines[number - 1]) for number in json.loads((a.work / "lines.json").read_text())]
    rows = [{name: row[name] for name in names} for row in found]
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    for row in rows:  # as ftjax does: text becomes messages if the model has a chat template; TRL takes one kind in all columns
        if tokenizer.chat_template or isinstance(row["prompt"], list):
            roles = zip(names, ("user", "assistant", "assistant"), strict=True)
            row |= {n: [{"role": role, "content": row[n]}] for n, role in roles if isinstance(row[n], str)}
    settings = DPOConfig(
        output_dir=str(a.work / "trainer"), max_length=None, max_steps=a.updates, per_device_train_batch_size=a.trl_batch,
        gradient_accumulation_steps=a.pairs // a.trl_batch, learning_rate=a.lr, lr_scheduler_type="constant", max_grad_norm=1.0,
        weight_decay=0.0, gradient_checkpointing=a.checkpointing, bf16=a.dtype == "bfloat16", report_to=[], save_strategy="no",
        logging_steps=1, seed=0, disable_tqdm=True,
    )  # fmt: skip

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **more: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype))
    lora = LoraConfig(r=a.r, lora_alpha=2 * a.r, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = InOrder(
        model=model, args=settings, train_dataset=Dataset.from_list(rows), peft_config=lora, callbacks=[Clock()],
        processing_class=tokenizer,
    )  # fmt: skip
    set_peft_model_state_dict(trainer.model, load_file(a.work / "adapter" / "adapter_model.safetensors"))
    trainer.train()
    result = {"loss": [row["loss"] for row in trainer.state.log_history if "loss" in row], "seconds": seconds}
    if torch.cuda.is_available():
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    (a.work / "trl.json").write_text(json.dumps(result))


def run(a: argparse.Namespace, side: str, work: Path) -> dict[str, Any]:
    """Run a side in a process of its own; return its figures, with its maximum resident set if it counted no memory."""
    found = worker(side, work)
    return found | {"pairs_per_second": a.pairs / statistics.median(found["seconds"][1:])}


def main() -> int:
    a = arguments()
    if a.worker:
        {"ftjax": ours, "trl": trl}[a.worker](a)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs = (run(a, side, Path(folder)) for side in ("ftjax", "trl"))
    speed, memory = mine["pairs_per_second"] / theirs["pairs_per_second"], mine["peak_bytes"] / theirs["peak_bytes"]
    apart = max(abs(x / y - 1) for x, y in zip(mine["loss"], theirs["loss"], strict=True))
    print("| side | pairs/s | ratio | peak memory | ratio |\n|---|---:|---:|---:|---:|")
    print(f"| ftjax | {mine['pairs_per_second']:.3f} | {speed:.2f} | {mine['peak_bytes'] / 1e9:.2f} GB | {memory:.2f} |")
    print(f"| TRL | {theirs['pairs_per_second']:.3f} | | {theirs['peak_bytes'] / 1e9:.2f} GB | |\n")
    print(
        f"{mine['device']}, remat {mine['remat']}; {mine['tokens']:,} tokens in {mine['computed']:,} computed; "
        f"{mine['flops_per_token']:.3g} FLOPs a token; losses apart by at most {apart:.1e}: "
        f"{', '.join(f'{loss:.4f}' for loss in mine['loss'])}"
    )
    if a.json:
        a.json.write_text(json.dumps({"ftjax": mine, "TRL": theirs, "speed": speed, "memory": memory}, indent=2) + "\n")
    if apart >= 1e-3:
        print("void, because the losses differ", file=sys.stderr)
    return int(apart >= 1e-3)


if __name__ == "__main__":
    sys.exit(main())
