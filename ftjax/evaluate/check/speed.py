"""Speed of a model's answers on this machine."""

import statistics
import time
from collections.abc import Callable, Sequence

from ftjax.generate.session import Generator


def speed(generator: Generator, prompts: Sequence[str], length: int, runs: int) -> dict[str, float]:
    """Return medians: seconds to the first token of one prompt, and tokens per second of all prompts in one batch."""
    ids = [generator.encode(prompt, number) for number, prompt in enumerate(prompts)]
    tokens = 0

    def first() -> None:
        generator.generate(ids[:1], max_new_tokens=1, batch_size=1)

    def batch() -> None:
        nonlocal tokens
        answers = generator.generate(ids, max_new_tokens=length, batch_size=len(ids))
        tokens = sum(len(answer.tokens) for answer in answers)

    seconds, all_of_them = _median(first, runs), _median(batch, runs)
    return {"first_token_seconds": seconds, "tokens_per_second": tokens / all_of_them}


def _median(work: Callable[[], None], runs: int) -> float:
    work()  # the first call compiles
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return max(statistics.median(times), 1e-9)
