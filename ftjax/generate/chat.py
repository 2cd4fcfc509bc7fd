"""`ftjax chat`: talk to a model in the terminal."""

import sys
from collections.abc import Sequence
from pathlib import Path

HELP = """\
/reset          forget the conversation; the system message stays
/system TEXT    begin anew with this system message; without TEXT, with none
/history        show what was said
/help           show this
/quit           leave (so does Ctrl-D); Ctrl-C stops an answer
A line that ends in \\ goes on in the next one."""
COMMANDS = ("/reset", "/system", "/history", "/help", "/quit", "/exit")


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
) -> None:
    """Ask, answer, remember, until /quit.

    Settings that are None are those of the model's generation_config.json; without that, decoding is greedy.

    Raises UserError where the model, the adapter or a setting is wrong.
    """
    from rich.console import Console

    from ftjax.errors import UserError
    from ftjax.generate.context import recommended
    from ftjax.generate.conversation import Conversation
    from ftjax.generate.session import Generator

    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    with notes.status(f"loading {model}"):
        generator = Generator(
            model, adapter, revision=revision, tokenizer=tokenizer, chat_template=chat_template, dtype=dtype,
            quantization=quantization,
        )  # fmt: skip
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    asked["repetition_penalty"] = repetition_penalty
    sampling = recommended(generator.settings, asked)
    talk = Conversation(generator, sampling, system=system, max_new_tokens=max_new_tokens, stop=tuple(stop), seed=seed)
    interactive = sys.stdin.isatty()
    if interactive:
        notes.print(f"{model}{f' with {adapter}' if adapter else ''}; /help shows the commands, /quit leaves", markup=False)
    while True:
        try:
            line = _read(interactive)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if line is None:
            break
        if not line.strip():
            continue
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            break
        if command in COMMANDS:
            _obey(talk, command, rest.strip(), notes)
            continue
        if command.startswith("/") and command[1:].isalpha():
            notes.print(f"{command} is no command; those that are: {', '.join(COMMANDS)}", markup=False)
            continue
        try:
            _answer(talk, line)
        except UserError as error:
            notes.print(f"{error}\n/reset forgets what was said so far", markup=False)


def _read(interactive: bool) -> str | None:
    """One message; None at the end of the input."""
    if interactive:
        import readline  # noqa: F401  (the arrow keys work once it is there)
    lines = []
    while True:
        try:
            line = input("> " if interactive and not lines else "  " if interactive else "")
        except EOFError:
            return "\n".join(lines) if lines else None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _answer(talk, line: str) -> None:
    """Write the answer as it comes; Ctrl-C stops it, and what was said stays."""
    pieces = talk.ask(line)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" ...")
    finally:
        pieces.close()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _obey(talk, command: str, rest: str, notes) -> None:
    if command == "/help":
        notes.print(HELP, markup=False)
    elif command == "/history":
        for message in talk.messages:
            notes.print(f"{message['role']}: {message['content']}", markup=False)
    elif command == "/reset":
        talk.reset()
        notes.print("forgotten")
    else:
        talk.system(rest or None)
        notes.print(f"system message: {rest}" if rest else "no system message", markup=False)
