"""One record of a file."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One record; `where` is `file:line` for text files and `file[row]`, counted from 0, for the others."""

    values: dict[str, Any]
    where: str
