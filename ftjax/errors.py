"""Errors for callers: mistakes of the user, whose message says what to do, and interrupted runs."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in a configuration, a file or an argument.

    The command line prints the message without a traceback and exits with status 2. The message says what was asked, what
    was found and what to do. Control characters quoted from files cannot affect the terminal.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message)))


class OutOfMemory(UserError):
    """A device or the host has no memory left; the message says what to change."""


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal, after it had saved its state; the message says how to resume it.

    The command line exits with status 1.
    """


# Control characters as visible symbols, except newline and tab; and lone surrogates, which no stream takes. In a file's name
# Python writes a byte that is not UTF-8 as U+DC00 and the byte.
CONTROL = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    0x7F: "\u2421",
    **{code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)},
    **{0xDC00 + byte: f"\\x{byte:02x}" for byte in range(0x80, 0x100)},
}


def printable(text: str) -> str:
    """Make outside text safe for a terminal: escape sequences are shown and not obeyed."""
    return text.translate(CONTROL)


def join_problems(problems: Sequence[str], what: str) -> str:
    """Join all problems with `what` into one message."""
    if len(problems) == 1:
        return problems[0]
    return f"{what}: {len(problems)} things do not fit:" + "".join(f"\n- {problem}" for problem in problems)
