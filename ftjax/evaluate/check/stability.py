"""Whether an answer depends on what should not matter: white space around the prompt, padding, the company it is asked in."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ftjax.generate.answer import Generation
from ftjax.generate.session import Generator

WHITESPACE = {
    "a space behind": "{} ",
    "a space before": " {}",
    "a line break behind": "{}\n",
    "two spaces between words": None,
}


def variants(prompt: str) -> list[str]:
    """The prompt with other white space, none of which changes what it asks."""
    written = [prompt.replace(" ", "  ") if form is None else form.format(prompt) for form in WHITESPACE.values()]
    return [text for text in written if text != prompt]


def gap(one: Generation, other: Generation) -> float:
    """The largest difference of log-probabilities up to the first token that differs, that one included.

    Where two tokens are as likely as each other, rounding may choose either, and the gap stays small; where the company or
    the padding of a prompt reaches it, the gap is large.
    """
    differences = []
    for token, own, p, q in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=False):
        differences.append(abs(p - q))
        if token != own:
            break
    return float(np.max(differences))  # NaN where a model gives NaN, which Python's max() may pass over


def in_company(generator: Generator, prompts: Sequence[str], length: int) -> tuple[list[Generation], dict[str, list[float]]]:
    """Greedy answers one by one, and the gap of each to itself in one batch of all and beside a text that makes it padded."""
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
    """Of each prompt, the nats a token by which its own answer becomes less likely when white space differs, on average."""
    forms = [[prompt, *variants(prompt)] for prompt in prompts]
    asked = [form for several in forms for form in several]
    tokens = [answer.tokens for several, answer in zip(forms, answers, strict=True) for _ in several]
    found = iter(generator.score(asked, tokens))
    losses = []
    for several in forms:
        own, *others = [float(np.mean(next(found).logprobs)) for _ in several]
        losses.append(own - float(np.mean(others)))
    return losses
