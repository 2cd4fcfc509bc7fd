"""Large messages between processes, again and again: see `Exchange`."""

import json
from typing import Any

from ftjax.distributed import store

PIECE = 2**20  # characters; the store sends messages of at most four million bytes


class Exchange:
    """Gives every process the values of all, in the store of the processes, without leaving them there.

    exchange = Exchange("answers")
    exchange([1, 2])    # [[1, 2], [3]] on both of two processes, if the other gives [3]
    """

    def __init__(self, about: str):
        self._about = about
        self._before: str | None = None  # where this process's latest value is

    def __call__(self, value: Any) -> list[Any]:
        """Return the JSON of all processes, in their order; all call it."""
        if not store.several():
            return [value]
        key = store.new_name(self._about)
        own = f"{key}/{store.index()}"
        text = json.dumps(value)
        pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
        store.put(f"{own}/pieces", len(pieces))
        for number, piece in enumerate(pieces):
            store.put(f"{own}/{number}", piece)
        found = [_read(f"{key}/{process}") for process in range(store.count())]
        if self._before is not None:
            store.remove(self._before)  # every process has written this value, and had read all of those before
        self._before = own
        return found


def _read(key: str) -> Any:
    """Return a process's value."""
    return json.loads("".join(store.wait_for(f"{key}/{number}") for number in range(store.wait_for(f"{key}/pieces"))))
