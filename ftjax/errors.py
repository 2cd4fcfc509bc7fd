"""The one exception that means: the user's input is wrong, and here is what to do."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in a configuration, a file or an argument.

    The command line prints the message without a traceback and exits with 2. The message says what
    was asked, what was found and what to do. What it quotes of a file cannot steer the terminal.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message)))


# What a terminal obeys rather than shows: all but the end of a line and tabs, as the pictures of them.
CONTROL = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    0x7F: "\u2421",
}


def printable(text: str) -> str:
    """Text from outside, for a terminal: escape sequences in it are shown and not obeyed."""
    return text.translate(CONTROL)


def join_problems(problems: Sequence[str], what: str) -> str:
    """One message for all that is wrong with `what`."""
    if len(problems) == 1:
        return problems[0]
    return f"{what}: {len(problems)} things do not fit:" + "".join(f"\n- {problem}" for problem in problems)
