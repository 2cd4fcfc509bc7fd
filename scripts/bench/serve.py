#!/usr/bin/env python3
"""Compares the engine of `ftjax serve` with transformers' continuous batching: same weights, same prompts, greedy, one run.

    python scripts/bench/serve.py --model MODEL [--requests 16] [--rows 8] [--shortest 16] [--longest 256] [--new 48]
                                  [--shared 0] [--times 2] [--dtype float32] [--json FILE]

MODEL is a Hugging Face folder or a .gguf file. Each side runs in a process of its own, one after the other. All requests come
at once, with prompts of many lengths; with --shared, each begins with the same so many tokens. Prints generated tokens per
second (the best of the rounds after a first one that compiles), the same per second of processor time, which a busy machine
does not change, and the median time to the first token of that round; and how many of the generated tokens are the same.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from sides import printed


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a Hugging Face folder or a .gguf file")
    p.add_argument("--requests", type=int, default=16)
    p.add_argument("--rows", type=int, default=8, help="requests that run at the same time")
    p.add_argument("--shortest", type=int, default=16, help="tokens of the shortest prompt")
    p.add_argument("--longest", type=int, default=256, help="tokens of the longest prompt")
    p.add_argument("--shared", type=int, default=0, help="tokens that all prompts begin with")
    p.add_argument("--new", type=int, default=48, help="tokens of an answer")
    p.add_argument("--times", type=int, default=2)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--json", type=Path, help="write the figures there")
    p.add_argument("--side", choices=["ftjax", "transformers"], help=argparse.SUPPRESS)
    return p.parse_args()


def prompts_of(a: argparse.Namespace, vocab: int, round_number: int) -> list[list[int]]:
    """Return random prompts, others in each round; in most vocabularies the ids of special tokens are below them."""
    rng = np.random.default_rng(round_number)
    shared = rng.integers(vocab // 10, vocab, a.shared).tolist()
    lengths = np.linspace(a.shortest, a.longest, a.requests).astype(int)
    return [shared + rng.integers(vocab // 10, vocab, length).tolist() for length in rng.permutation(lengths)]


def figures(a: argparse.Namespace, seconds: float, used: float, first: float, tokens: list) -> dict[str, Any]:
    count = a.requests * a.new
    return {"speed": count / seconds, "per_cpu": count / used, "first": first, "tokens": tokens}


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest round but the first, with the tokens of all rounds."""
    found = max(rounds[1:], key=lambda one: one["speed"])
    return {**found, "tokens": [one["tokens"] for one in rounds]}


def ours(a: argparse.Namespace) -> dict[str, Any]:
    from ftjax.generate.paged import PagedBatch, Room
    from ftjax.generate.request import Request
    from ftjax.generate.scheduler import Job, Scheduler
    from ftjax.generate.session import Generator

    generator = Generator(a.model, dtype=a.dtype)
    generator.ends = frozenset()  # answers have their full length, as on the other side
    room = Room.fit(generator.engine, rows=a.rows, context=a.shared + a.longest + a.new)
    batch = PagedBatch(generator.engine, generator.params, room)
    batch.warm_up()
    rounds = []
    for number in range(a.times + 1):
        scheduler = Scheduler(batch)
        prompts = prompts_of(a, generator.model.sizes.vocab, number)
        start, used = time.perf_counter(), time.process_time()
        jobs = [Job(generator.begin(Request(prompt, max_new_tokens=a.new))) for prompt in prompts]
        for job in jobs:
            scheduler.submit(job)
        while not scheduler.idle:
            scheduler.step()
        seconds, used = time.perf_counter() - start, time.process_time() - used
        first = statistics.median(job.first - job.arrived for job in jobs)
        rounds.append(figures(a, seconds, used, first, [job.answer.tokens for job in jobs]))
    return best(rounds)


def theirs(a: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    path = Path(a.model)
    where = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dtype": getattr(torch, a.dtype), "attn_implementation": "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(**where, **options).to(device).eval()
    config = GenerationConfig(max_new_tokens=a.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=32, max_requests_per_batch=a.rows, num_blocks=1024, max_batch_tokens=512)
    rounds = []
    for number in range(a.times + 1):
        prompts = prompts_of(a, model.config.vocab_size, number)
        start, used = time.perf_counter(), time.process_time()
        found = model.generate_batch(prompts, config, batching, record_timestamps=True)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        answers = sorted(found.values(), key=lambda one: int(one.request_id.rpartition("_")[2]))
        firsts = [one.timestamps[0] - one.created_time for one in answers if one.timestamps]
        tokens = [list(one.generated_tokens) for one in answers]
        assert len(tokens) == a.requests and all(len(one) == a.new for one in tokens), [len(one) for one in tokens]
        first = statistics.median(firsts) if firsts else float("nan")
        rounds.append(figures(a, seconds, used, first, tokens))
    return best(rounds)


def main() -> int:
    a = arguments()
    if a.side:
        print(json.dumps(ours(a) if a.side == "ftjax" else theirs(a)))
        return 0
    sides = printed(("ftjax", "transformers"))
    mine, peer = sides["ftjax"], sides["transformers"]
    same = float(np.mean(np.array(mine.pop("tokens")) == np.array(peer.pop("tokens"))))
    print("| | ftjax | transformers | ratio |\n|---|---:|---:|---:|")
    print(f"| tokens a second | {mine['speed']:.1f} | {peer['speed']:.1f} | {mine['speed'] / peer['speed']:.2f} |")
    ratio = mine["per_cpu"] / peer["per_cpu"]
    print(f"| tokens a processor second | {mine['per_cpu']:.1f} | {peer['per_cpu']:.1f} | {ratio:.2f} |")
    print(f"| time to first token, s | {mine['first']:.2f} | {peer['first']:.2f} | {mine['first'] / peer['first']:.2f} |")
    print(f"\n{same:.1%} of the generated tokens are the same")
    if a.json:
        a.json.write_text(json.dumps({**sides, "same": same}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
