"""Runs under a Python with mlx-lm: the most likely tokens that follow ids. Arguments: what is asked as JSON, a list of
{folder, ids, count}, and the file for the answers."""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step

asked, out = map(Path, sys.argv[1:])


def answer(folder: str, ids: list[list[int]], count: int) -> dict:
    model, tokenizer = load(folder)

    def best(logits):
        return mx.argmax(logits, axis=-1)

    steps = [generate_step(mx.array(each), model, max_tokens=count, sampler=best) for each in ids]
    return {"next": [[int(token) for token, _ in step] for step in steps], "ends": sorted(tokenizer.eos_token_ids)}


answers = []
for one in json.loads(asked.read_text()):
    try:
        answers.append(answer(**one))
    except Exception as error:  # the test lists those that mlx-lm cannot load
        answers.append({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
out.write_text(json.dumps(answers))
