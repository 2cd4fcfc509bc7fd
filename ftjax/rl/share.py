"""Answers that several processes generate together: each a share, on devices of its own.

    7 requests, 2 processes    process 0: 0 1 2    process 1: 3 4 5 6

No process waits for another while it generates: their programs run over different devices and at different times, so that
nothing between may need all of them. They exchange what they have at the end, as messages that need no device.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ftjax.distributed import store
from ftjax.distributed.exchange import Exchange
from ftjax.errors import UserError
from ftjax.generate.answer import Generation
from ftjax.generate.finite import NotFinite
from ftjax.generate.request import Request

_exchange = Exchange("answers")


def in_shares(requests: Sequence[Request], answer: Callable[[Sequence[Request]], list[Generation]]) -> list[Generation]:
    """Return the answers to all requests, exact to the bit, of which this process generates its share; all call it.

    An answer depends on its request alone, so any shares give the same ones. If a process raises UserError, the first one's is
    raised on all, so that all can save their state.
    """
    if not store.several():
        return answer(requests)
    index, count = store.index(), store.count()
    own = requests[len(requests) * index // count : len(requests) * (index + 1) // count]
    found = _exchange(_told(own, answer))
    for one in found:
        if "error" in one:
            raise (NotFinite if one["not finite"] else UserError)(one["error"])
    return [Generation(*values) for one in found for values in one["answers"]]


def _told(own: Sequence[Request], answer: Callable[[Sequence[Request]], list[Generation]]) -> dict[str, Any]:
    """Return this process's answers, or its error, as JSON."""
    try:
        found = answer(own)
    except UserError as error:
        return {"error": str(error), "not finite": isinstance(error, NotFinite)}
    return {"answers": [[one.text, one.tokens, one.finish_reason, one.logprobs, one.prompt_tokens] for one in found]}
