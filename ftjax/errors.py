"""The one exception that means: the user's input is wrong, and here is what to do."""


class UserError(Exception):
    """A mistake in a configuration, a file or an argument.

    The command line prints the message without a traceback and exits with 2. The message says what
    was asked, what was found and what to do.
    """
