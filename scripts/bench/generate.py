#!/usr/bin/env python3
"""Compares ftjax's generation with transformers' `generate`: same weights, same prompts, greedy, one run.

    python scripts/bench/generate.py --model DIR [--rows 4] [--prompt 256] [--new 64] [--times 5]
                                     [--dtype float32] [--json FILE]

Each side runs in a separate process, one after the other. An answer of one token measures the prefill; the rest of the time of
a long answer is decoding. Prints tokens per second of both (medians after a first call that compiles), their ratios, and how
many of the generated tokens are the same: if not all are, the comparison is void and the exit code 1.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sides import printed


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a Hugging Face folder")
    p.add_argument("--rows", type=int, default=4)
    p.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    p.add_argument("--new", type=int, default=64, help="tokens of an answer")
    p.add_argument("--times", type=int, default=5)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--json", type=Path, help="write the figures there")
    p.add_argument("--side", choices=["ftjax", "transformers"], help=argparse.SUPPRESS)
    return p.parse_args()


def prompts_of(a: argparse.Namespace) -> list[list[int]]:
    """Return random prompts; in most vocabularies the ids of special tokens are below them."""
    vocab = json.loads((Path(a.model) / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(vocab // 10, vocab, (a.rows, a.prompt)).tolist()


def measure(a: argparse.Namespace, answer: Callable[[int], list[list[int]]]) -> dict:
    """Measure `answer(tokens)`, which returns the ids of each row's answer."""
    found = {}
    for name, new in (("prefill", 1), ("whole", a.new)):
        tokens, seconds = answer(new), []  # compiles
        for _ in range(a.times):
            start = time.perf_counter()
            answer(new)
            seconds.append(time.perf_counter() - start)
        found[name] = statistics.median(seconds)
    decode = a.rows * (a.new - 1) / max(found["whole"] - found["prefill"], 1e-9)
    return {"prefill": a.rows * a.prompt / found["prefill"], "decode": decode, "tokens": tokens}


def ours(a: argparse.Namespace) -> dict:
    from ftjax.generate.session import Generator

    generator = Generator(a.model, dtype=a.dtype)
    generator.ends = frozenset()  # answers have their full length, as on the other side
    prompts = prompts_of(a)
    return measure(a, lambda new: [list(x.tokens) for x in generator.generate(prompts, max_new_tokens=new)])


def theirs(a: argparse.Namespace) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype)).to(device).eval()
    ids = torch.tensor(prompts_of(a), device=device)
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}

    @torch.inference_mode()
    def answer(new: int) -> list[list[int]]:
        return model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)[:, a.prompt :].tolist()

    return measure(a, answer)


def main() -> int:
    a = arguments()
    if a.side:
        print(json.dumps(ours(a) if a.side == "ftjax" else theirs(a)))
        return 0
    sides = printed(("ftjax", "transformers"))
    mine, peer = sides["ftjax"], sides["transformers"]
    same = float(np.mean(np.array(mine.pop("tokens")) == np.array(peer.pop("tokens"))))
    print("| tokens a second | ftjax | transformers | ratio |\n|---|---:|---:|---:|")
    for part in ("prefill", "decode"):
        print(f"| {part} | {mine[part]:.1f} | {peer[part]:.1f} | {mine[part] / peer[part]:.2f} |")
    print(f"\n{same:.1%} of the generated tokens are the same{'' if same == 1 else ': the comparison is void'}")
    if a.json:
        a.json.write_text(json.dumps({**sides, "same": same}, indent=2) + "\n")
    return 0 if same == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
