"""`ftjax chat`: talk to a model in the terminal."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftjax.console import say
from ftjax.data.control import Mode
from ftjax.errors import UserError, printable
from ftjax.generate.typed import checked, keep_wrong_bytes, read_turn

HELP = """\
/retry          answer the last question anew
/undo           forget the last question and its answer
/reset          forget the conversation; the system message stays
/system TEXT    begin anew with this system message; without TEXT, with none
/history        show what was said
/save FILE      write the conversation, one row of training data (JSON)
/help           show this
/quit, /exit    leave (so does Ctrl-D); Ctrl-C stops an answer
Pasted lines are one message. A line that ends in \\ goes on in the next one."""
COMMANDS = ("/retry", "/undo", "/reset", "/system", "/history", "/save", "/help", "/quit", "/exit")


def chat(
    model: str,
    *,
    adapter: Path | None = None,
    revision: str | None = None,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    dtype: str = "auto",
    quantization: str | None = None,
    special_tokens_in_text: Mode | None = None,
) -> None:
    """Ask, answer, remember, until /quit.

    Args:
        model: a run, a configuration, a PEFT folder or a model (`find_named`).

    Settings that are None are those of the model's generation_config.json; without that, decoding is greedy.

    Raises UserError where the model, the adapter or a setting is wrong, or what is piped in is not text.
    """
    from ftjax.compile_cache import keep_compiled_programs
    from ftjax.console import make_console
    from ftjax.generate.context import recommended
    from ftjax.generate.conversation import Conversation
    from ftjax.generate.named import find_named
    from ftjax.generate.session import Generator

    system = None if system is None else checked(system, "--system")
    found = find_named(model, adapter=adapter)
    keep_compiled_programs()
    notes = make_console(stderr=True)
    with notes.status(f"loading {found.name}"):
        options = found.options(
            revision=revision, tokenizer=tokenizer, chat_template=chat_template, quantization=quantization,
            special_tokens_in_text=special_tokens_in_text, fold_system=None,
        )  # fmt: skip
        generator = Generator(found.model, found.adapter, dtype=dtype, **options)
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    asked["repetition_penalty"] = repetition_penalty
    sampling = recommended(generator.settings, asked)
    talk = Conversation(generator, sampling, system=system, max_new_tokens=max_new_tokens, stop=tuple(stop), seed=seed)
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
    """A command and what stands behind it; None for a message, such as pasted lines that begin with a stroke."""
    word, *rest = message.strip().split(maxsplit=1) or [""]
    several = "\n" in message.strip() and word not in ("/system", "/save")
    return None if several or not (word.startswith("/") and word[1:].isalpha()) else (word, rest[0] if rest else "")


def _answer(talk: Any, message: str) -> None:
    """Write the answer as it comes; Ctrl-C stops it, and what was said stays."""
    pieces = talk.ask(message)
    clean = printable if sys.stdout.isatty() else str  # a file has what the model wrote
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
    """Do what a command says. `saved`: the files that this chat has written, which it may write again.

    Raises UserError where it cannot be done.
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
        said = f"{command} is no command; those that are: {', '.join(COMMANDS)}"
    say(notes, said)


def _save(messages: Sequence[Any], name: str, saved: set[Path]) -> str:
    path = Path(name).expanduser()
    if not name:
        raise UserError("write /save FILE, such as /save talk.jsonl")
    if path.exists() and path not in saved:
        raise UserError(f"{path}: this is there already; choose another name")
    try:
        path.write_text(json.dumps({"messages": list(messages)}, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    saved.add(path)
    return f"written: {path}"
