"""`ftjax config`: print the reference of the configuration, or an example file."""

import json
from dataclasses import asdict
from typing import Any

from ftjax.config.examples import EXAMPLES
from ftjax.config.reference import Key, Part, look_up


def show(asked: str | None, *, as_json: bool = False, console: Any = None) -> None:
    """Print the keys that `asked` means, or all of them. Raises UserError as `look_up` does."""
    from ftjax.console import make_console, print_table, say

    found, note = look_up(asked)
    if as_json:
        print(json.dumps([asdict(key) for part in found for key in part.keys], indent=1, ensure_ascii=False))
        return
    console = console or make_console()
    if note:
        say(console, note)
    if asked is not None and all(len(part.keys) <= 2 for part in found):
        for part in found:
            for key in part.keys:
                _print_key(console, part, key)
        return
    for number, part in enumerate(found):
        if number:
            say(console)
        title = part.name + (f", name: {part.variant}" if part.variant else "")
        say(console, title, "bold reverse")
        if part.meaning:
            say(console, part.meaning)
        rows = [(key.name, key.default, key.type, key.meaning, ", ".join(key.aliases)) for key in part.keys]
        print_table(console, ("key", "default", "type", "meaning", "other names"), rows, left=range(5))
    if asked is None:
        say(console)
        say(console, f"ftjax config --example NAME prints a file to begin with: {', '.join(EXAMPLES)}")


def _print_key(console: Any, part: Part, key: Key) -> None:
    from ftjax.console import say

    where = f" (with {part.name}.name: {part.variant})" if part.variant else ""
    say(console, f"{key.name}{where}", "bold")
    for label, text in (
        ("meaning", key.meaning), ("type", key.type), ("default", key.default), ("other names", ", ".join(key.aliases)),
    ):  # fmt: skip
        if text:
            say(console, f"  {label}: {text}")
