#!/usr/bin/env python3
"""Compares ftjax with TRL's SFTTrainer from files to a saved adapter: same data, same method, same number of updates.

    python scripts/bench/end_to_end.py --model DIR --data FOLDER [--updates 100] [--rows 2] [--length 512] [--r 16]
                                       [--lr 5e-4] [--dtype float32] [--json FILE]

FOLDER has train.jsonl and validation.jsonl with `instruction`, `input` and `output` (Dolly). Both sides are whole processes:
they import, tokenise, pack rows of `--length` tokens, train LoRA on all linear layers and save. TRL runs with packing and with
the loss on the answer only, like ftjax; its loss never has all logits at once either. ftjax's time includes compilation: its
compilation cache starts empty.

Prints wall time, trained tokens and their ratio (a packer that fills rows better trains more of them in the same number of
updates), and the loss on the first `--validation` rows of validation.jsonl, which transformers and PEFT compute for both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a Hugging Face folder")
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--updates", type=int, default=100)
    p.add_argument("--rows", type=int, default=2)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--validation", type=int, default=32)
    p.add_argument("--json", type=Path, help="write the figures there")
    p.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    return p.parse_args()


def messages_of(row: dict) -> tuple[list[dict], list[dict]]:
    """Return prompt and answer as messages, as ftjax reads a row of this format."""
    question = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    return [{"role": "user", "content": question}], [{"role": "assistant", "content": row["output"]}]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trl(a: argparse.Namespace, work: Path) -> None:
    """Train with TRL, in a separate process: write an adapter to `work`, and the number of trained tokens."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    pairs = [messages_of(row) for row in rows_of(a.data / "train.jsonl")]
    data = Dataset.from_dict({"prompt": [prompt for prompt, _ in pairs], "completion": [answer for _, answer in pairs]})
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype))
    settings = SFTConfig(
        output_dir=str(work / "trainer"), packing=True, max_length=a.length, max_steps=a.updates,
        per_device_train_batch_size=a.rows, learning_rate=a.lr, lr_scheduler_type="cosine", warmup_steps=0.05,
        max_grad_norm=1.0, weight_decay=0.0, gradient_checkpointing=False, bf16=a.dtype == "bfloat16", report_to=[],
        save_strategy="no", logging_steps=10, seed=0, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=a.r, lora_alpha=2 * a.r, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    trained = 0

    class Counting(SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            nonlocal trained
            trained += int((inputs["labels"] != -100).sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Counting(model=model, args=settings, train_dataset=data, peft_config=lora, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(work / "trl"))
    (work / "trl.json").write_text(json.dumps({"trained": trained}))


def ftjax(a: argparse.Namespace, work: Path) -> int:
    """Train with ftjax; return the number of trained tokens."""
    (work / "config.yaml").write_text(
        json.dumps({
            "model": {"path": a.model, "dtype": a.dtype, "compute_dtype": a.dtype},
            "method": {"name": "lora", "r": a.r, "lora_alpha": 2 * a.r, "target_modules": "all-linear"},
            "data": {"train": str((a.data / "train.jsonl").resolve()), "max_length": a.length, "packing": True},
            "optimizer": {"learning_rate": a.lr, "lr_scheduler_type": "cosine", "warmup_ratio": 0.05, "weight_decay": 0.0},
            "training": {"max_steps": a.updates, "global_batch_size": a.rows, "logging_steps": 1, "save_steps": a.updates},
            "output_dir": str(work / "run"),
        })
    )  # fmt: skip
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(work / "compiled")}
    subprocess.run([sys.executable, "-m", "ftjax", "train", str(work / "config.yaml")], check=True, env=environment)
    return sum(line.get("train/trained_tokens", 0) for line in rows_of(work / "run" / "metrics.jsonl"))


def validation_loss(a: argparse.Namespace, adapter: Path) -> float:
    """Return the mean loss over the answers' tokens, computed by transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    total, count = 0.0, 0
    for row in rows_of(a.data / "validation.jsonl")[: a.validation]:
        prompt, answer = messages_of(row)
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(prompt + answer, return_dict=False)[: a.length]
        if len(whole) <= len(before):
            continue
        with torch.inference_mode():
            logits = model(torch.tensor([whole])).logits[0, len(before) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(whole[len(before) :]), reduction="sum"))
        count += len(whole) - len(before)
    return total / count


def main() -> None:
    a = arguments()
    if a.trl:
        trl(a, a.trl)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        start = time.perf_counter()
        trained = ftjax(a, work)
        sides = {"ftjax": {"seconds": time.perf_counter() - start, "trained": trained}}
        start = time.perf_counter()
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--trl", str(work)], check=True)
        sides["TRL"] = {"seconds": time.perf_counter() - start, **json.loads((work / "trl.json").read_text())}
        for name, adapter in (("ftjax", work / "run" / "final"), ("TRL", work / "trl")):
            sides[name]["validation_loss"] = validation_loss(a, adapter)
    print("| | ftjax | TRL |\n|---|---:|---:|")
    for key, label, digits in (
        ("seconds", "wall time, s", 1), ("trained", "trained tokens", 0), ("validation_loss", "validation loss", 4),
    ):  # fmt: skip
        print(f"| {label} | {sides['ftjax'][key]:,.{digits}f} | {sides['TRL'][key]:,.{digits}f} |")
    speeds = [side["trained"] / side["seconds"] for side in sides.values()]
    print(f"\ntrained tokens a second over TRL's: {speeds[0] / speeds[1]:.2f}")
    if a.json:
        a.json.write_text(json.dumps(sides, indent=2) + "\n")


if __name__ == "__main__":
    main()
