"""`ftjax chat`: talk to a model in the terminal."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ftjax.console import say
from ftjax.errors import UserError, printable
from ftjax.generate.named import LoadOptions, find_named
from ftjax.generate.request import Request
from ftjax.generate.sample import Sampling
from ftjax.generate.typed import checked, keep_wrong_bytes, read_turn

HELP = """\
/retry          answer the last question again
/undo           forget the last question and its answer
/reset          forget the conversation; the system message stays
/system TEXT    start over with this system message; without TEXT, with none
/history        show what was said
/save FILE      write the conversation, one row of training data (JSON)
/help           show this
/quit, /exit    leave (so does Ctrl-D); Ctrl-C stops an answer
Pasted lines are one message. A line that ends in \\ continues on the next one."""
SAMPLING = tuple(field.name for field in fields(Sampling))
COMMANDS = ("/retry", "/undo", "/reset", "/system", "/history", "/save", "/help", "/quit", "/exit")


def chat(
    model: str,
    request: Request,
    options: LoadOptions,
    *,
    system: str | None = None,
    sampling: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Run the chat loop until /quit or the end of the input.

    Args:
        model: a run, a configuration file, a PEFT folder or a model (`find_named`).
        request: settings for every answer, except sampling.
        sampling: values for the fields of `Sampling`; those that are None or missing come from the model's
            generation_config.json. Without either, decoding is greedy.

    Raises UserError if the model, the adapter or a setting is invalid, or if piped input is not text.
    """
    from ftjax.console import make_console
    from ftjax.generate.context import recommended
    from ftjax.generate.conversation import Conversation
    from ftjax.generate.open import open_named
    from ftjax.long_steps import long_step

    system = None if system is None else checked(system, "--system")
    found = find_named(model, adapter=options.adapter)
    notes = make_console(stderr=True)
    with long_step(f"loading {found.name}"):
        generator = open_named(found, options).generator
    asked = dict.fromkeys(SAMPLING) | dict(sampling)
    request = replace(request, sampling=recommended(generator.settings, asked))
    talk = Conversation(generator, request, system=system)
    interactive = sys.stdin.isatty()
    keep_wrong_bytes(sys.stdin)
    if interactive:
        say(notes, f"{found.name}; /help shows the commands, /quit leaves")
    saved: set[Path] = set()
    while True:
        try:
            message = read_turn(interactive, alone=lambda line: _command(line) is not None)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except UserError as error:
            if not interactive:
                raise
            say(notes, str(error))
            continue
        if message is None:
            break
        if not message.strip():
            continue
        command, rest = _command(message) or ("", "")
        if command in ("/quit", "/exit"):
            break
        try:
            if command == "/retry":
                if (message := talk.undo()) is None:
                    raise UserError("there is no question yet")
            elif command:
                _obey(talk, command, rest, notes, saved)
                continue
            _answer(talk, message)
        except UserError as error:
            say(notes, str(error))


def _command(message: str) -> tuple[str, str] | None:
    """Return a command and its argument; None for a message, such as pasted lines that begin with a slash."""
    word, *rest = message.strip().split(maxsplit=1) or [""]
    several = "\n" in message.strip() and word not in ("/system", "/save")
    return None if several or not (word.startswith("/") and word[1:].isalpha()) else (word, rest[0] if rest else "")


def _answer(talk: Any, message: str) -> None:
    """Stream the answer to standard output; Ctrl-C stops it and keeps the text so far."""
    pieces = talk.ask(message)
    clean = printable if sys.stdout.isatty() else str  # files get the model's text unchanged
    try:
        for piece in pieces:
            sys.stdout.write(clean(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" ...")
    except UserError as error:
        raise UserError(f"{error}\n/reset forgets what was said so far") from None
    finally:
        pieces.close()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _obey(talk: Any, command: str, rest: str, notes: Any, saved: set[Path]) -> None:
    """Execute a command. `saved` holds the files that this chat has written and may overwrite.

    Raises UserError if the command cannot be executed.
    """
    if command == "/help":
        said = HELP
    elif command == "/history":
        said = "\n".join(f"{message['role']}: {message['content']}" for message in talk.messages) or "nothing was said yet"
    elif command == "/reset":
        talk.reset()
        said = "forgotten"
    elif command == "/undo":
        question = talk.undo()
        said = "there is no question yet" if question is None else f"forgotten: {question}"
    elif command == "/save":
        said = _save(talk.messages, rest, saved)
    elif command == "/system":
        talk.system(rest or None)
        said = f"system message: {rest}" if rest else "no system message"
    else:
        said = f"{command} is no command; choose one of {', '.join(COMMANDS)}"
    say(notes, said)


def _save(messages: Sequence[Any], name: str, saved: set[Path]) -> str:
    path = Path(name).expanduser()
    if not name:
        raise UserError("write /save FILE, such as /save talk.jsonl")
    if path.exists() and path not in saved:
        raise UserError(f"{path}: already exists; choose another name")
    try:
        path.write_text(json.dumps({"messages": list(messages)}, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    saved.add(path)
    return f"written: {path}"
