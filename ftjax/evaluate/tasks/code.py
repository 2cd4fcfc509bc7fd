"""The task `code`: programs that pass their tests, each run in its own process."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ftjax.config import EvaluateConfig
from ftjax.errors import UserError
from ftjax.evaluate.rows import Item
from ftjax.evaluate.sandbox import Limits, run_program
from ftjax.evaluate.statistic import Scores, means

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def code(items: Sequence[Item], answers: Sequence[Sequence[str]], config: EvaluateConfig) -> Scores:
    """Return pass@k of `num_samples` answers per prompt (Chen et al. 2021, arXiv:2107.03374, eq. 1), and `exact_prefix`, the
    share of answers that begin with the reference.

    The row's `test` column is Python that fails if the program is wrong; with an `entry_point` column, the tests define
    `check(candidate)`. The program is prompt plus answer, or a fenced block of the answer that has the whole function.
    """
    limits = Limits(seconds=config.code_timeout, memory_mb=config.code_memory, processes=config.code_processes)
    programs = [
        (number, program(item, answer))
        for number, (item, tries) in enumerate(zip(items, answers, strict=True))
        for answer in tries
    ]
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(lambda one: run_program(one[1], limits), programs))
    results = [[outcome for (at, _), outcome in zip(programs, outcomes, strict=True) if at == n] for n in range(len(items))]
    scores, shown = [], []
    for item, tries, result in zip(items, answers, results, strict=True):
        passed = sum(outcome == "passed" for outcome in result)
        row = {f"pass@{k}": pass_at_k(len(result), passed, k) for k in config.pass_at_k}
        row["exact_prefix"] = float(np.mean([answer.strip().startswith(item.references[0].strip()) for answer in tries]))
        scores.append(row)
        shown.append({**row, "outcomes": result})
    return means(scores, shown)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the probability that one of k answers, of `samples` with `passed` correct, passes: 1 - C(n - c, k) / C(n, k)."""
    if samples - passed < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(samples - passed + 1, samples + 1)))


def program(item: Item, answer: str) -> str:
    """Return the program to run. Raises UserError if the row has no tests."""
    test = item.values.get("test")
    if not isinstance(test, str) or not test.strip():
        raise UserError(f"{item.where}: evaluate.task code needs a column 'test' with Python that checks the program")
    prompt = item.example.prompt or next(
        (m["content"] for m in reversed(item.example.messages or ()) if m["role"] == "user"), ""
    )
    entry = item.values.get("entry_point")
    blocks = FENCE.findall(answer)
    if blocks:
        whole = next((block for block in blocks if not entry or re.search(rf"def\s+{re.escape(entry)}\b", block)), None)
        body = whole if whole is not None else prompt + blocks[0]
    else:
        whole = entry and re.match(rf"(?:[ \t]*\n)*(?:import|from|def\s+{re.escape(entry)})\b", answer)  # not indented
        body = answer if whole else prompt + answer
    return f"{body}\n\n{test}\n" + (f"\ncheck({entry})\n" if entry else "")
