"""Asks a server with OpenAI's interface."""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from ftjax.errors import UserError

TRIES = 3
BUSY = (429, 500, 502, 503, 504)
Found = TypeVar("Found")


def post(
    address: str, asked: dict[str, Any], who: str, read: Callable[[Any], Found], api_key_env: str = "OPENAI_API_KEY",
    timeout: float = 60.0,
) -> Found:  # fmt: skip
    """Return what `read` finds in the server's reply; one that is busy is asked again.

    Args:
        who: the server in messages, such as `the judge`.
        read: takes the JSON; a LookupError, TypeError or ValueError means that the reply is of another kind.
        api_key_env: environment variable with the key; none is sent if it is not set.
        timeout: seconds of one request.

    Raises UserError if it cannot be reached, refuses, or replies with something else.
    """
    key = os.environ.get(api_key_env)
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
            raise UserError(f"{who} at {address} refused a request: {error.code} {error.reason}: {said}") from None
        except (OSError, ValueError) as error:  # among them URLError and TimeoutError
            raise UserError(
                f"{who} at {address} cannot be reached: {getattr(error, 'reason', error)}; is the server running?"
            ) from None
    try:
        return read(json.loads(body))
    except (ValueError, LookupError, TypeError):
        said = body[:200].decode("utf-8", "replace")
        raise UserError(f"{who} at {address} did not reply as an OpenAI-compatible server does: {said!r}") from None
