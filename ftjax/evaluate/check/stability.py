"""Dependence of an answer on what should not matter: whitespace around the prompt, padding, other rows of the batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ftjax.generate.answer import Generation
from ftjax.generate.session import Generator

WHITESPACE = {
    "a trailing space": "{} ",
    "a leading space": " {}",
    "a trailing line break": "{}\n",
    "two spaces between words": None,
}


def variants(prompt: str) -> list[str]:
    """Return the prompt with other whitespace, which does not change its meaning."""
    written = [prompt.replace(" ", "  ") if form is None else form.format(prompt) for form in WHITESPACE.values()]
    return [text for text in written if text != prompt]


def gap(one: Generation, other: Generation) -> float:
    """Return the largest difference of log-probabilities up to and including the first token that differs.

    If two tokens are equally likely, rounding may choose either, and the gap stays small; if other rows or padding leak into a
    prompt, the gap is large.
    """
    differences = []
    for token, own, p, q in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=False):
        differences.append(abs(p - q))
        if token != own:
            break
    return float(np.max(differences))  # Python's max() may ignore NaN


def in_company(generator: Generator, prompts: Sequence[str], length: int) -> tuple[list[Generation], dict[str, list[float]]]:
    """Return greedy answers one by one, and the gap of each to its answer in one batch, and in a batch that pads it."""
    options: dict[str, Any] = {"max_new_tokens": length, "logprobs": True}
    ids = [generator.encode(prompt, number) for number, prompt in enumerate(prompts)]
    alone = generator.generate(ids, batch_size=1, **options)
    together = generator.generate(ids, batch_size=len(ids), **options)
    room = generator.context - length
    filler = (ids[0] * room)[: min(room, 4 * max(map(len, ids)))]
    padded = generator.generate([*ids, filler], batch_size=len(ids) + 1, **options)[:-1]
    gaps = {"batch_gap": together, "padding_gap": padded}
    return alone, {
        name: [gap(a, b) for a, b in zip(alone, others, strict=True)] for name, others in gaps.items()
    }  # fmt: skip


def whitespace(generator: Generator, prompts: Sequence[str], answers: Sequence[Generation]) -> list[float]:
    """Return for each prompt by how many nats per token, on average, other whitespace makes its own answer less likely."""
    forms = [[prompt, *variants(prompt)] for prompt in prompts]
    asked = [form for several in forms for form in several]
    tokens = [answer.tokens for several, answer in zip(forms, answers, strict=True) for _ in several]
    found = iter(generator.score(asked, tokens))
    losses = []
    for several in forms:
        own, *others = [float(np.mean(next(found).logprobs)) for _ in several]
        losses.append(own - float(np.mean(others)))
    return losses
