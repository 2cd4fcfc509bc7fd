#!/usr/bin/env python3
"""Compares the engine of `ftjax serve` with transformers' continuous batching and with llama.cpp: same weights, same prompts,
greedy, one run.

    python scripts/bench/serve.py --model MODEL [--requests 16] [--rows 16] [--shortest 16] [--longest 256] [--new 128]
                                  [--shared 0] [--times 2] [--dtype float32] [--llama-cpp FOLDER --gguf FILE]
                                  [--adapters 8] [--json FILE]

MODEL is a Hugging Face folder or a .gguf file. Each side runs in a process of its own, one after the other. All requests come
at once, with prompts of many lengths; with --shared, each begins with the same so many tokens. Prints generated tokens per
second (the best of the rounds after a first one that compiles), the same per second of processor time, which a busy machine
does not change, and the time to the first token of that round, p50 and p99; and how many of the generated tokens are the same.

--llama-cpp names a folder in which npm has installed node-llama-cpp, and --gguf the same weights in that dtype
(`ftjax export --gguf f32`); there are then as many rows as requests. --adapters adds two sides of ftjax: every request with one
LoRA adapter (r = 16, all linear layers), and the requests with so many in turn.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sides import printed


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a Hugging Face folder or a .gguf file")
    p.add_argument("--requests", type=int, default=16)
    p.add_argument("--rows", type=int, default=16, help="requests that run at the same time")
    p.add_argument("--shortest", type=int, default=16, help="tokens of the shortest prompt")
    p.add_argument("--longest", type=int, default=256, help="tokens of the longest prompt")
    p.add_argument("--shared", type=int, default=0, help="tokens that all prompts begin with")
    p.add_argument("--new", type=int, default=128, help="tokens of an answer")
    p.add_argument("--times", type=int, default=2)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--llama-cpp", type=Path, help="a folder in which npm has installed node-llama-cpp")
    p.add_argument("--gguf", type=Path, help="the weights for llama.cpp")
    p.add_argument("--adapters", type=int, default=0, help="adapters in one batch")
    p.add_argument("--json", type=Path, help="write the figures there")
    p.add_argument("--side", choices=["ftjax", "one adapter", "adapters", "transformers", "llama.cpp"], help=argparse.SUPPRESS)
    return p.parse_args()


def prompts_of(a: argparse.Namespace, vocab: int, round_number: int) -> list[list[int]]:
    """Return random prompts, others in each round; in most vocabularies the ids of special tokens are below them."""
    rng = np.random.default_rng(round_number)
    shared = rng.integers(vocab // 10, vocab, a.shared).tolist()
    lengths = np.linspace(a.shortest, a.longest, a.requests).astype(int)
    return [shared + rng.integers(vocab // 10, vocab, length).tolist() for length in rng.permutation(lengths)]


def figures(a: argparse.Namespace, seconds: float, used: float, firsts: list[float], tokens: list) -> dict[str, Any]:
    count = a.requests * a.new
    assert len(tokens) == a.requests and all(len(one) == a.new for one in tokens), [len(one) for one in tokens]
    p50, p99 = np.percentile(firsts, [50, 99]).tolist() if firsts else (float("nan"),) * 2
    return {"speed": count / seconds, "per_cpu": count / used, "p50": p50, "p99": p99, "tokens": tokens}


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest round but the first, with the tokens of all rounds."""
    found = max(rounds[1:], key=lambda one: one["speed"])
    return {**found, "tokens": [one["tokens"] for one in rounds]}


def ours(a: argparse.Namespace) -> dict[str, Any]:
    from ftjax.generate.paged import PagedBatch, Room
    from ftjax.generate.request import Request
    from ftjax.generate.scheduler import Job, Scheduler
    from ftjax.generate.session import Generator

    adapters = {"ftjax": 0, "one adapter": 1, "adapters": a.adapters}[a.side]
    generator = with_adapters(a, adapters) if adapters else Generator(a.model, dtype=a.dtype)
    generator.ends = frozenset()  # answers have their full length, as on the other sides
    room = Room.fit(generator.engine, rows=a.rows, context=a.shared + a.longest + a.new)
    batch = PagedBatch(generator.engine, generator.params, room)
    batch.warm_up()
    rounds = []
    for number in range(a.times + 1):
        scheduler = Scheduler(batch)
        prompts = prompts_of(a, generator.model.sizes.vocab, number)
        start, used = time.perf_counter(), time.process_time()
        jobs = []
        for at, prompt in enumerate(prompts):
            own = 1 + at % adapters if adapters else 0
            jobs.append(Job(generator.begin(Request(prompt, max_new_tokens=a.new)), adapter=own, space=own))
            scheduler.submit(jobs[-1])
        while not scheduler.idle:
            scheduler.step()
        seconds, used = time.perf_counter() - start, time.process_time() - used
        firsts = [job.first - job.arrived for job in jobs]
        rounds.append(figures(a, seconds, used, firsts, [job.answer.tokens for job in jobs]))
    return best(rounds)


def with_adapters(a: argparse.Namespace, count: int) -> Any:
    """Return a generator with so many adapters, whose weights are random."""
    from ftjax.generate.adapters import AdapterStack

    rank, rng = 16, np.random.default_rng(0)
    stack = AdapterStack.load(a.model, places=count, rank=rank, wanted=lambda name: name != "lm_head", dtype=a.dtype)
    for place in range(1, count + 1):
        stack.fill(place, {path: 0.02 * rng.standard_normal(shape, np.float32) for path, shape in stack.shapes.items()})
    return stack.generator


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
        rounds.append(figures(a, seconds, used, firsts, tokens))
    return best(rounds)


def llama_cpp(a: argparse.Namespace) -> dict[str, Any]:
    import gguf

    vocab = len(gguf.GGUFReader(a.gguf).get_field("tokenizer.ggml.tokens").data)
    asked = {
        "file": str(a.gguf.resolve()), "rounds": [prompts_of(a, vocab, number) for number in range(a.times + 1)],
        "count": a.new, "size": a.shared + a.longest + a.new, "threads": os.cpu_count(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder, "asked.json"), Path(folder, "figures.json")
        given.write_text(json.dumps(asked))
        script = Path(__file__).with_name("serve_llama_cpp.mjs")
        subprocess.run(["node", script, a.llama_cpp.resolve(), given, out], check=True)
        found = json.loads(out.read_text())
    return best([figures(a, one["seconds"], one["used"], one["firsts"], one["tokens"]) for one in found])


def main() -> int:
    a = arguments()
    if a.side:
        print(json.dumps({"transformers": theirs, "llama.cpp": llama_cpp}.get(a.side, ours)(a)))
        return 0
    if (a.llama_cpp is None) != (a.gguf is None) or (a.gguf and a.rows != a.requests):
        raise SystemExit("--llama-cpp and --gguf go together, with as many --rows as --requests")
    more = ["one adapter", "adapters"] if a.adapters else []
    sides = printed(("ftjax", *more, "transformers", *(["llama.cpp"] if a.gguf else [])))
    tokens = {side: np.array(found.pop("tokens")) for side, found in sides.items()}
    for name, key in ("tokens/s", "speed"), ("tokens per processor second", "per_cpu"):
        for side, found in sides.items():
            print(f"{name:28} {side:13} {found[key]:7.1f}   ftjax over it {sides['ftjax'][key] / found[key]:.2f}")
    for side, found in sides.items():
        print(f"{'time to the first token, s':28} {side:13} p50 {found['p50']:.2f}  p99 {found['p99']:.2f}")
    if a.adapters:
        print(f"{a.adapters} adapters: {sides['adapters']['speed'] / sides['one adapter']['speed']:.3f} of the speed of one")
    for side in ("transformers", "llama.cpp")[: 1 + bool(a.gguf)]:
        sides[side]["same"] = float(np.mean(tokens["ftjax"] == tokens[side]))
        print(f"{sides[side]['same']:.1%} of the tokens are those of {side}")
    if a.json:
        a.json.write_text(json.dumps(sides, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
