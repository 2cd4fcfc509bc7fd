"""What happens to a row that is wrong: it ends the run, or it is left out and counted."""

from ftjax.errors import UserError

SHOWN = 5  # messages that are kept to be shown; all are counted


class Faults:
    """Call it with the error of one row. It raises that error, or counts it where `skip` (`data.on_error: skip`)."""

    def __init__(self, skip: bool = False):
        self.skip = skip
        self.count = 0
        self.messages: list[str] = []
        self.notes: dict[str, None] = {}  # what was done with a file, and is worth a warning

    def note(self, text: str) -> None:
        self.notes[text] = None

    def __call__(self, error: UserError) -> None:
        if not self.skip:
            raise error
        self.count += 1
        if len(self.messages) < SHOWN:
            self.messages.append(str(error))
