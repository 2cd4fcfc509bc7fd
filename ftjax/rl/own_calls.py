"""Calls of a user's own code, which may raise or never end."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ftjax.distributed import store
from ftjax.errors import UserError


class Ended(NamedTuple):
    """What a call returned, or the error that it raised."""

    value: Any = None
    error: BaseException | None = None


def call_within(seconds: float, name: str, call: Callable[[], Any]) -> Ended | None:
    """Call a function in a thread; None if it has not ended in time, and is left behind.

    Args:
        name: of the thread.
    """
    ended: list[Ended] = []

    def work() -> None:
        try:
            ended.append(Ended(call()))
        except BaseException as error:
            ended.append(Ended(error=error))

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    return ended[0] if ended else None


def checked(ended: Ended | None, what: str, about: str, seconds: float) -> Any:
    """Return the value of a call.

    Args:
        what: the function, for errors.
        about: what it was called for.

    Raises UserError if it raised, or has not ended.
    """
    if ended is None:
        raise UserError(f"{what}: it has not ended after {seconds:g} s (objective.reward_timeout), {about}")
    if isinstance(ended.error, UserError):
        raise UserError(f"{what}: {ended.error}")
    if ended.error is not None:
        kind, line = type(ended.error).__name__, _line(ended.error)
        raise UserError(f"{what}: {kind}: {ended.error}{line}, {about}") from ended.error
    return ended.value


def on_first(about: str, make: Callable[[], Any]) -> Any:
    """Return the JSON that the first process makes, on all; all call it. Its UserError is raised on all, so that all can save
    their state.

    Args:
        about: what is made, for the names of messages.
    """
    told: dict[str, Any] = {}
    if store.index() == 0:
        try:
            told = {"value": make()}
        except UserError as error:
            told = {"error": str(error)}
    told = store.from_first(about, told)
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


def _line(error: BaseException) -> str:
    """Return where an error was raised, as ` (file:line)`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"
