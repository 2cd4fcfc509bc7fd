"""What a person types or pipes in, as text."""

import io
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

from ftjax.errors import UserError

PASTED = 0.05  # seconds within which the next line of a pasted text is there


def keep_wrong_bytes(stream: TextIO) -> None:
    """Let bytes that are no text of the stream's encoding through as lone surrogates, for `checked` to find: whether Python
    raises at them depends on the locale, and what was read with them would be lost."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")


def read_standard_input() -> str:
    """All of it. Raises UserError where it is not text."""
    keep_wrong_bytes(sys.stdin)
    return checked(sys.stdin.read(), "the standard input")


def checked(text: str, what: str) -> str:
    """The text itself. Raises UserError where a part of it was no text, naming line and byte.

    Args:
        what: where it comes from.
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
    """One message of a conversation, of one line or several; None at the end of the input.

    Lines that are pasted into a terminal are one message: it marks what is pasted, or else the next line already waits when
    one is read. A line that ends in a backslash goes on in the next one.

    Args:
        alone: whether a line is a message by itself, whatever waits behind it.

    Raises UserError where it is not text.
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
    """Arrow keys and a history; and GNU's readline takes what is pasted as one text, which Python turns off."""
    try:
        import readline
    except ImportError:  # not on Windows
        return
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")


def _waits(stream: TextIO) -> bool:
    """Whether there is more to be read at once."""
    return os.name == "posix" and bool(select.select([stream], [], [], PASTED)[0])
