"""Loops whose number of runs depends on the data: a name says about how many there are, for plans, which count work."""

import re
from contextlib import AbstractContextManager

import jax

_NAME = re.compile(r"about_(\d+)_runs")


def about(runs: int) -> AbstractContextManager:
    """Name the loops inside, in the traced and in the compiled program."""
    return jax.named_scope(f"about_{runs}_runs")


def named_runs(scopes: str) -> int | None:
    """Return the runs of the innermost of these scopes that names any: those of a loop that is directly inside of it."""
    found = _NAME.findall(scopes)
    return int(found[-1]) if found else None
