"""The other side of step.py: transformers + PEFT on PyTorch, on ftjax's batches and from ftjax's adapter.

    python scripts/bench/peft_step.py --model DIR --batches FILE.npz --out FILE.json
                                      (--adapter FOLDER [--quantize] | --method full)

AdamW has ftjax's settings: 0.9, 0.999, 1e-8, no weight decay, gradients clipped to norm 1, constant learning rate. `--quantize`
loads the base in nf4 (bitsandbytes) with scales in float32: DIR then has the values of ftjax's nf4 weights, which rounding the
scales again would change.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--batches", type=Path, required=True, help="input_ids and labels, int [steps, B, T]")
    p.add_argument("--out", type=Path, required=True)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--adapter", help="a PEFT folder: where training starts")
    which.add_argument("--method", choices=["full"], help="train all weights")
    p.add_argument("--quantize", action="store_true")
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--attention", default="sdpa")
    p.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    p.add_argument("--compile", action="store_true")
    return p.parse_args()


def load(a: argparse.Namespace, device: str) -> torch.nn.Module:
    dtype = getattr(torch, a.dtype)
    how = {"attn_implementation": a.attention, "dtype": dtype, "device_map": device}
    if a.quantize:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(a.model, **how)
    if a.adapter:
        model = PeftModel.from_pretrained(model, a.adapter, is_trainable=True)
    if a.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def main() -> None:
    a = arguments()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(a, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=a.lr, weight_decay=0.0, fused=device == "cuda")
    run = torch.compile(model) if a.compile else model
    with np.load(a.batches) as file:
        batches = {name: torch.as_tensor(file[name], dtype=torch.long, device=device) for name in ("input_ids", "labels")}
    losses, seconds, cpu = [], [], []
    for number in range(len(batches["labels"])):
        start, busy = time.perf_counter(), time.process_time()
        loss = run(**{name: rows[number] for name, rows in batches.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))  # waits for the device
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - busy)
    found = {"loss": losses, "seconds": seconds, "cpu_seconds": cpu, "trained": sum(parameter.numel() for parameter in trained)}
    if device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    a.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
