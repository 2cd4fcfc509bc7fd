"""The one exception that means: the user's input is wrong, and here is what to do."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in a configuration, a file or an argument.

    The command line prints the message without a traceback and exits with 2. The message says what
    was asked, what was found and what to do.
    """


def together(problems: Sequence[str], what: str) -> str:
    """One message for all that is wrong with `what`."""
    if len(problems) == 1:
        return problems[0]
    return f"{what}: {len(problems)} things do not fit:" + "".join(f"\n- {problem}" for problem in problems)
