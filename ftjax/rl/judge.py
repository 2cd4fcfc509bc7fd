"""A judge: another model behind an OpenAI-compatible address, which rates each answer with a number."""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ftjax.errors import UserError
from ftjax.rl.rollout import Function, Rollout

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
PROMPT = (
    "Rate the answer to the question below, from 0 (wrong or useless) to 10 (perfect). Reply with the number alone.\n\n"
    "Question:\n{prompt}\n\nAnswer:\n{completion}"
)
TRIES = 3
BUSY = (429, 500, 502, 503, 504)


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
        said = _reply(address, asked, os.environ.get(api_key_env), timeout)
        numbers = NUMBER.findall(said)
        if not numbers:
            raise UserError(f"{rollout.item.where}: the judge at {address} replied without a number: {said[:200]!r}")
        return float(numbers[-1]) / scale

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        with ThreadPoolExecutor(parallel, "judge") as pool:
            return list(pool.map(rate, rollouts))

    return reward


def _reply(address: str, asked: dict[str, Any], key: str | None, timeout: float) -> str:
    """Return the text of the judge's reply; a server that is busy is asked again."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(address, json.dumps(asked).encode(), headers)
    for tried in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                body = response.read()
            break
        except urllib.error.HTTPError as error:
            if error.code in BUSY and tried < TRIES:
                time.sleep(tried)
                continue
            said = error.read()[:200].decode("utf-8", "replace")
            raise UserError(f"the judge at {address} refused a request: {error.code} {error.reason}: {said}") from None
        except (OSError, ValueError) as error:  # among them URLError and TimeoutError
            raise UserError(
                f"the judge at {address} cannot be reached: {getattr(error, 'reason', error)}; is the server running?"
            ) from None
    try:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError):
        said = body[:200].decode("utf-8", "replace")
        raise UserError(f"the judge at {address} did not reply as an OpenAI-compatible server does: {said!r}") from None
