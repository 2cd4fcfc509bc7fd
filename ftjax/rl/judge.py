"""A judge: another model behind an OpenAI-compatible address, which rates each answer with a number."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ftjax.errors import UserError
from ftjax.rl.post import post
from ftjax.rl.rollout import Function, Rollout

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
PROMPT = (
    "Rate the answer to the question below, from 0 (wrong or useless) to 10 (perfect). Reply with the number alone.\n\n"
    "Question:\n{prompt}\n\nAnswer:\n{completion}"
)


def judge(
    *, url: str, model: str, prompt: str = PROMPT, scale: float = 10.0, api_key_env: str = "OPENAI_API_KEY",
    max_tokens: int = 16, timeout: float = 60.0, parallel: int = 8,
) -> Function:  # fmt: skip
    """Return a reward that is the judge's number by `scale`.

    Args:
        url: of the API, such as http://localhost:8000/v1.
        prompt: with {prompt}, {completion} and {reference}; the last number of the reply counts.
        api_key_env: environment variable with the key; none is sent if it is not set.
        timeout: seconds of one request.
        parallel: requests at a time.
    """
    if "{completion}" not in prompt:
        raise UserError("objective.rewards: judge: the prompt has to show the answer, as {completion}")
    address = f"{url.rstrip('/')}/chat/completions"

    def rate(rollout: Rollout) -> float:
        references = rollout.item.example.references
        shown = {"prompt": rollout.shown_prompt, "completion": rollout.text, "reference": references[0] if references else ""}
        text = re.sub(r"\{(prompt|completion|reference)\}", lambda found: shown[found[1]], prompt)
        asked = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": max_tokens}
        said = post(address, asked, "the judge", _text, api_key_env, timeout)
        numbers = NUMBER.findall(said)
        if not numbers:
            raise UserError(f"{rollout.item.where}: the judge at {address} replied without a number: {said[:200]!r}")
        return float(numbers[-1]) / scale

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        with ThreadPoolExecutor(parallel, "judge") as pool:
            return list(pool.map(rate, rollouts))

    return reward


def _text(reply: Any) -> str:
    """Return the text of a reply."""
    return str(reply["choices"][0]["message"]["content"])
