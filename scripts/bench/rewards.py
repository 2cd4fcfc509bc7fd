#!/usr/bin/env python3
"""GRPO with LoRA: ftjax beside TRL's GRPOTrainer with transformers' generation, same prompts, weights and settings.

    python scripts/bench/rewards.py --model DIR [--data FILE] [--prompts 8] [--answers 8] [--tokens 64] [--updates 5] [--r 16]
                                    [--length 256] [--trl-batch 64] [--dtype float32] [--json FILE]

FILE has one row a line with a column `prompt`; without it prompts are short questions that are made up. An update generates
`--answers` answers of up to `--tokens` tokens to each of `--prompts` prompts, rewards them by how many digits they have, and
trains on them once. Each side runs in a process of its own, one after the other. Answers are drawn at random and differ in
length, so speed is counted in tokens of answers. Prints for each
- tokens of answers a second over whole updates, the first one left out, and ftjax's over TRL's;
- the seconds of an update by phase: answers, rewards, training step;
- peak memory: the maximum resident set on a CPU, what the device counts elsewhere.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from sides import worker

REWARD = "def digits(completions, **columns):\n    return [sum(c.isdigit() for c in _text(one)) / 10 for one in completions]\n"
REWARD += "\ndef _text(one):\n    return one if isinstance(one, str) else one[0]['content']\n"
PHASES = ("rollout", "reward", "update")


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="a Hugging Face folder with weights and a tokenizer")
    p.add_argument("--data", type=Path, help="a file of prompts")
    p.add_argument("--prompts", type=int, default=8, help="prompts in an update")
    p.add_argument("--answers", type=int, default=8, help="answers to each prompt")
    p.add_argument("--tokens", type=int, default=64, help="most tokens of an answer")
    p.add_argument("--updates", type=int, default=5)
    p.add_argument("--length", type=int, default=256, help="ftjax: tokens of a row")
    p.add_argument("--trl-batch", type=int, default=64, help="TRL: answers of a microbatch")
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--lr", type=float, default=1e-5)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--json", type=Path, help="write the figures there")
    p.add_argument("--worker", choices=["ftjax", "trl"], help=argparse.SUPPRESS)
    p.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    if not (a.model / "config.json").is_file():
        p.error(f"--model: expected a model folder with config.json; {a.model} has none")
    if a.updates < 2:
        p.error("--updates: the first one compiles and is left out; at least 2")
    return a


def prompts(a: argparse.Namespace) -> list[str]:
    """Return the prompts of all updates."""
    count = a.prompts * a.updates
    if a.data is None:
        return [f"What is {number} times {number + 3}?" for number in range(10, 10 + count)]
    found = [json.loads(line)["prompt"] for line in a.data.read_text(encoding="utf-8").splitlines()[:count]]
    if len(found) < count:
        raise SystemExit(f"{a.data}: {len(found)} prompts, and {count} are asked for")
    return found


def ours(a: argparse.Namespace) -> None:
    """The ftjax side: writes `ftjax.json`."""
    from ftjax.gpu import set_flags

    set_flags()  # as `ftjax train`; before JAX looks for devices
    import jax

    from ftjax.config import Config
    from ftjax.rl.learn import Learning
    from ftjax.train.run import train

    (a.work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts(a)))
    (a.work / "digits.py").write_text(REWARD)
    config = Config.model_validate({
        "model": {"path": str(a.model), "dtype": a.dtype, "compute_dtype": a.dtype},
        "method": {"name": "lora", "r": a.r, "lora_alpha": 2 * a.r},
        "data": {"train": str(a.work / "prompts.jsonl"), "max_length": a.length, "shuffle": False},
        "objective": {
            "name": "grpo", "rewards": [str(a.work / "digits.py")], "num_generations": a.answers,
            "max_completion_length": a.tokens, "generation_batch_rows": a.prompts * a.answers,
        },
        "optimizer": {"learning_rate": a.lr, "lr_scheduler_type": "constant"},
        "training": {
            "max_steps": a.updates, "global_batch_size": a.prompts * a.answers, "logging_steps": 1, "report_to": [],
            "save_steps": a.updates + 1,
        },
        "output_dir": str(a.work / "run"),
    })  # fmt: skip
    learning = Learning(config)
    train(config, make_observer=learning.make_observer, make_source=learning.make_source)
    rows = [json.loads(line) for line in (a.work / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/reward" in row]
    found: dict[str, Any] = {phase: [row[f"train/time/{phase}"] for row in rows] for phase in PHASES}
    found["tokens"] = [row["train/completions/mean_length"] * a.prompts * a.answers for row in rows]
    found["seconds"] = [sum(found[phase][at] for phase in PHASES) for at in range(len(rows))]
    found["gap"] = max(row["train/rollout/logprob_gap"] for row in rows)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    (a.work / "ftjax.json").write_text(json.dumps(found | ({"peak_bytes": peak} if peak else {})))


def trl(a: argparse.Namespace) -> None:
    """TRL's side: writes `trl.json`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    space: dict[str, Any] = {}
    exec(REWARD, space)
    tokenizer = AutoTokenizer.from_pretrained(a.model, padding_side="left")
    rows = [[{"role": "user", "content": one}] if tokenizer.chat_template else one for one in prompts(a)]
    size = a.prompts * a.answers
    settings = GRPOConfig(
        output_dir=str(a.work / "trainer"), max_steps=a.updates, per_device_train_batch_size=min(a.trl_batch, size),
        gradient_accumulation_steps=max(1, size // a.trl_batch), num_generations=a.answers, max_completion_length=a.tokens,
        learning_rate=a.lr, lr_scheduler_type="constant", bf16=a.dtype == "bfloat16", gradient_checkpointing=False,
        report_to=[], save_strategy="no", logging_steps=1, seed=0, disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in ("rollout", "reward", "update", "seconds", "tokens")}

    class Timed(GRPOTrainer):
        def _generate(self, *args: Any, **more: Any) -> Any:
            start = time.perf_counter()
            made = super()._generate(*args, **more)
            found["rollout"].append(time.perf_counter() - start)
            found["tokens"].append(float(sum(map(len, made[1]))))
            return made

        def _calculate_rewards(self, *args: Any, **more: Any) -> Any:
            start = time.perf_counter()
            made = super()._calculate_rewards(*args, **more)
            found["reward"].append(time.perf_counter() - start)
            return made

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **more: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            found["seconds"].append(time.perf_counter() - self.start)

    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype)), args=settings,
        reward_funcs=space["digits"], train_dataset=Dataset.from_list([{"prompt": one} for one in rows]),
        peft_config=LoraConfig(r=a.r, lora_alpha=2 * a.r, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()], processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    parts = zip(found["seconds"], found["rollout"], found["reward"], strict=True)
    found["update"] = [whole - rollout - reward for whole, rollout, reward in parts]
    if torch.cuda.is_available():
        found |= {"peak_bytes": torch.cuda.max_memory_allocated()}
    (a.work / "trl.json").write_text(json.dumps(found))


def run(a: argparse.Namespace, side: str, work: Path) -> dict[str, Any]:
    """Run a side in a process of its own; return its figures, without its first update."""
    found = worker(side, work)
    rest = {name: values[1:] for name, values in found.items() if isinstance(values, list)}
    return found | rest | {"tokens_per_second": sum(rest["tokens"]) / sum(rest["seconds"])}


def main() -> int:
    a = arguments()
    if a.worker:
        {"ftjax": ours, "trl": trl}[a.worker](a)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs = (run(a, side, Path(folder)) for side in ("ftjax", "trl"))
    speed = mine["tokens_per_second"] / theirs["tokens_per_second"]
    print(
        "| side | tokens of answers/s | ratio | seconds: answers | rewards | training step | tokens an update | peak memory |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, side, ratio in (("ftjax", mine, f"{speed:.2f}"), ("TRL", theirs, "")):
        times = " | ".join(f"{mean(side[phase]):.3f}" for phase in PHASES)
        size = f"{mean(side['tokens']):.0f} | {side['peak_bytes'] / 1e9:.2f} GB"
        print(f"| {name} | {side['tokens_per_second']:.1f} | {ratio} | {times} | {size} |")
    print(f"\nlargest rollout/logprob_gap of ftjax: {mine['gap']:.1e}")
    if a.json:
        a.json.write_text(json.dumps({"ftjax": mine, "TRL": theirs, "speed": speed}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
