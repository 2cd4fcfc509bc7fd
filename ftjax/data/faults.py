"""Handling of broken rows: one ends the run, or is skipped and counted."""

from ftjax.errors import UserError

SHOWN = 5  # messages that are kept for display; all are counted


class Faults:
    """Callable that takes the error of one row and raises it, or counts it if `skip` is set (`data.on_error: skip`)."""

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.count = 0
        self.messages: list[str] = []
        self.notes: dict[str, None] = {}  # decisions about a file that deserve a warning

    def note(self, text: str) -> None:
        self.notes[text] = None

    def __call__(self, error: UserError) -> None:
        if not self.skip:
            raise error
        self.count += 1
        if len(self.messages) < SHOWN:
            self.messages.append(str(error))
