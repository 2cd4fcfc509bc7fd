#!/usr/bin/env python3
"""Measures how fast data is tokenised and batched.

    python scripts/bench/data.py --model MODEL --train FILE [--columns prompt=text,completion=label] [--max-length 2048]
                                 [--json FILE]

MODEL is anything with a tokenizer: a folder, a .gguf file, a Hub id. Prints
- tokenising: the bare batch call of `tokenizers` on the texts that the model sees, and ftjax's encoder on the same examples
  in the same chunks (template, spans, boundaries, weights, BOS and EOS included), and the ratio of the two;
- a first start, which also reads, checks, packs and writes the cache, and a second start, which reads it;
- packed tokens per second from the cache, as batches on the host.
Each figure is the best of `--times` runs, in a new cache folder. Nothing else should run on the machine.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ftjax.config import DataConfig, ModelConfig
from ftjax.data.build import CHUNK
from ftjax.data.encode import Encoder
from ftjax.data.pipeline import Split, load_splits
from ftjax.data.read import read_rows
from ftjax.data.reader import to_examples
from ftjax.hub.tokenizer.load import load_tokenizer


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--train", required=True)
    p.add_argument("--columns", default="", help="ours=theirs,...")
    p.add_argument("--max-length", type=int, default=2048)
    p.add_argument("--batch", type=int, default=16, help="rows of a batch")
    p.add_argument("--times", type=int, default=3)
    p.add_argument(
        "--target-tokens", type=float, default=2e7, help="packed tokens that are read, in as many epochs as it takes"
    )
    p.add_argument("--json", type=Path, help="write the figures there")
    return p.parse_args()


def best(times: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of the fastest run, and its result."""
    quickest, value = float("inf"), None
    for _ in range(times):
        start = time.perf_counter()
        value = run()
        quickest = min(quickest, time.perf_counter() - start)
    return quickest, value


def tokenising(config: DataConfig, tokenizer: Any, times: int) -> dict[str, float]:
    source = config.sources("train")[0]
    examples = list(to_examples(read_rows(source), source))
    chunks = [examples[start : start + CHUNK] for start in range(0, len(examples), CHUNK)]
    encoder = Encoder(tokenizer)
    texts = [[plan.text for example in chunk for plan in encoder.plan(example)] for chunk in chunks]
    backend = tokenizer.backend_tokenizer

    def bare() -> int:
        return sum(len(e.ids) for chunk in texts for e in backend.encode_batch(chunk, add_special_tokens=False))

    def rendered() -> int:
        return sum(len(plan.text) for chunk in chunks for example in chunk for plan in encoder.plan(example))

    def ours() -> int:
        return sum(len(document.tokens) for chunk in encoder.stream(chunks) for unit in chunk for document in unit or ())

    bare()
    seconds, tokens = best(times, bare)
    print(f"tokenizers, bare batch call:  {tokens / seconds / 1e6:8.2f} million tokens/s  ({tokens:,} tokens, {seconds:.2f} s)")
    template, _ = best(times, rendered)
    other, count = best(times, ours)
    print(f"ftjax, template to weights:   {count / other / 1e6:8.2f} million tokens/s  ({other:.2f} s)")
    print(
        f"ratio: {other / seconds:.2f}, target 1.2; the rendering of templates alone takes {template:.2f} s, beside tokenising"
    )
    return {"tokens": tokens, "bare_seconds": seconds, "encoder_seconds": other, "template_seconds": template}


def starting(config: DataConfig, tokenizer: Any, times: int) -> Iterator[tuple[Split, dict[str, float]]]:
    """Yield the packed rows while their cache folder exists, and the seconds of both starts."""

    def first() -> Any:
        os.environ["FTJAX_CACHE"] = tempfile.mkdtemp(dir=root)
        return load_splits(config, tokenizer, seed=0)[0]

    with tempfile.TemporaryDirectory() as root:
        seconds, split = best(1, first)
        again, split = best(times, lambda: load_splits(config, tokenizer, seed=0)[0])
        print(f"first start: {seconds:.2f} s; second start, from the cache: {again:.2f} s")
        for line in split.report.lines():
            print(f"  {line}")
        yield split, {"first_start_seconds": seconds, "second_start_seconds": again}


def packing(split: Split, batch: int, target: float, times: int) -> dict[str, float]:
    epochs = max(1, round(target / split.report.tokens))

    def read() -> int:
        batches = split.batches(batch, seed=0, shuffle=True, epochs=epochs)
        return sum(int((rows["segment_ids"] > 0).sum()) for rows in batches)

    seconds, tokens = best(times, read)
    print(f"packed tokens from the cache: {tokens / seconds / 1e6:8.2f} million/s ({epochs} epochs, {seconds:.2f} s); target 5")
    return {"packed_tokens": tokens, "packed_seconds": seconds}


def main() -> None:
    options = arguments()
    columns = dict(pair.split("=", 1) for pair in options.columns.split(",") if pair)
    config = DataConfig(train=options.train, columns=columns, max_length=options.max_length)
    tokenizer = load_tokenizer(ModelConfig(path=options.model))
    print(f"{Path(options.train).name}, {type(tokenizer).__name__} of {len(tokenizer):,} tokens, {os.cpu_count()} cores")
    found = tokenising(config, tokenizer, options.times)
    for split, starts in starting(config, tokenizer, options.times):
        found |= starts | packing(split, options.batch, options.target_tokens, options.times)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
