"""Read text that a user types or pipes in."""

import io
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

from ftjax.errors import UserError

PASTED = 0.05  # seconds within which the next line of a pasted text arrives


def keep_wrong_bytes(stream: TextIO) -> None:
    """Decode invalid bytes as lone surrogates, for `checked` to find.

    Otherwise it would depend on the locale whether Python raises, and the text read together with them would be lost.
    """
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")


def read_standard_input() -> str:
    """Read all of standard input. Raises UserError if it is not valid text."""
    keep_wrong_bytes(sys.stdin)
    return checked(sys.stdin.read(), "the standard input")


def checked(text: str, what: str) -> str:
    """Return the text unchanged. Raises UserError, naming line and byte, if part of it is not valid text.

    Args:
        what: source of the text, for the message.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        wrong = ord(text[error.start])
        found = f"the byte 0x{wrong - 0xDC00:02x}" if 0xDC80 <= wrong <= 0xDCFF else f"half a character, U+{wrong:04X}"
        line = text.count("\n", 0, error.start) + 1
        raise UserError(
            f"{what}: expected UTF-8 text; found {found} in line {line}. Convert it first, for example with "
            "`iconv -f WINDOWS-1252 -t UTF-8`"
        ) from None
    return text


def read_turn(interactive: bool, alone: Callable[[str], bool]) -> str | None:
    """Read one message of a conversation, of one or more lines; return None at the end of the input.

    Lines pasted into a terminal are one message: the terminal marks pasted text, or else the next line is already waiting
    when one is read. A line that ends in a backslash continues on the next one.

    Args:
        alone: whether a line is a message by itself, even if more input is waiting.

    Raises UserError if the input is not valid text.
    """
    if interactive:
        _edit_lines()
    lines: list[str] = []
    while True:
        try:
            line = input("> " if interactive and not lines else "  " if interactive else "")
        except EOFError:
            return checked("\n".join(lines), "the message") if lines else None
        if interactive and not (not lines and alone(line)) and _waits(sys.stdin):
            lines.append(line)
        elif line.endswith("\\"):
            lines.append(line[:-1])
        else:
            return checked("\n".join([*lines, line]), "the message")


def _edit_lines() -> None:
    """Enable line editing and history, and GNU readline's bracketed paste, which Python turns off."""
    try:
        import readline
    except ImportError:  # not on Windows
        return
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")


def _waits(stream: TextIO) -> bool:
    """Return whether more input is waiting."""
    return os.name == "posix" and bool(select.select([stream], [], [], PASTED)[0])
