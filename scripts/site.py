"""Hooks of mkdocs.yml: pages that come from elsewhere (the README, the schema, the commands), and links that leave docs/."""

import inspect
import re
from pathlib import Path
from typing import Any

import typer

from ftjax import _HOMES, __all__
from ftjax.cli import app
from ftjax.config.reference import Key, parts

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tpu/README.md": "tpu.md",
}
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    pages = {page: rewritten((ROOT / name).read_text(encoding="utf-8"), name) for name, page in PAGES.items()}
    pages |= {
        "reference/configuration.md": configuration(), "reference/commands.md": commands(), "reference/python.md": python(),
    }  # fmt: skip
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links to other files of the repository lead to their pages, or be text."""
    name = page.file.src_uri
    return markdown if page.file.generated_by else rewritten(markdown, f"docs/{name}")


def rewritten(text: str, source: str) -> str:
    """Return Markdown whose links stay within the site. Args: source: the file's path in the repository."""

    def link(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        found = (ROOT / source).parent.joinpath(path).resolve()
        name = found.relative_to(ROOT).as_posix()
        if name in PAGES or (name.startswith("docs/") and name.endswith((".md", ".png", ".svg"))):
            there = PAGES.get(name) or name.removeprefix("docs/")
            return f"[{words}]({there}{'#' + anchor if anchor else ''})"
        return words if words.startswith("`") else f"`{words.strip('`')}`"

    return "".join(
        part if n % 2 else _LINK.sub(link, part) for n, part in enumerate(re.split(r"(```.*?```)", text, flags=re.DOTALL))
    )


# ---- reference ----


def configuration() -> str:
    """Return the page of every key of the configuration."""
    lines = [
        "# Configuration",
        "",
        "Every key, from the schema that validates it. `ftjax config KEY` prints the same in a terminal. The names of other "
        "tools in the last column are read, too.",
    ]
    section = None
    for part in parts():
        if part.name != section:
            section = part.name
            lines += ["", f"## {section}"]
        if part.variant:
            lines += ["", f"### {section}: {part.variant}"]
        lines += ["", _cell(part.meaning)] if part.meaning else []
        if part.keys:
            lines += ["", "| key | type | default | meaning | other names |", "|---|---|---|---|---|"]
            lines += [_row(key) for key in part.keys]
    return "\n".join(lines) + "\n"


def _row(key: Key) -> str:
    aliases = ", ".join(f"`{alias}`" for alias in key.aliases)
    return f"| `{key.name}` | {_cell(key.type)} | `{_cell(key.default)}` | {_cell(key.meaning)} | {aliases} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("{", "&#123;")


def commands() -> str:
    """Return the page of every command with its arguments and options."""
    lines = [
        "# Commands",
        "",
        "`ftjax COMMAND --help` prints the same. Exit codes: 0 done, 1 failed, 2 a mistake in what was asked.",
    ]
    for name, command in sorted(typer.main.get_command(app).commands.items()):
        usage = " ".join(["ftjax", name, *(_usage(one) for one in command.params if one.param_type_name == "argument")])
        lines += ["", f"## ftjax {name}", "", f"```\n{usage} [OPTIONS]\n```", "", inspect.cleandoc(command.help or "")]
        rows = [row for one in command.params if (row := _option(one))]
        if rows:
            lines += ["", "| argument or option | default | meaning |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _usage(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _option(one: Any) -> str:
    if one.name in ("help", "install_completion", "show_completion"):
        return ""
    names = (
        one.metavar or one.name.upper() if one.param_type_name == "argument" else ", ".join([*one.opts, *one.secondary_opts])
    )
    shown = getattr(one, "show_default", None)
    default = (
        shown if isinstance(shown, str) else "" if one.default in (None, ...) or callable(one.default) else str(one.default)
    )
    default = "" if one.required or "Sentinel" in default or default in ("False", "()") else default
    return f"| `{names}` | {_cell(default)} | {_cell(getattr(one, 'help', '') or '')} |"


def python() -> str:
    """Return the page of the Python API, which mkdocstrings fills from the docstrings."""
    lines = ["# Python", "", "`import ftjax`; [api.md](../api.md) shows how the parts go together."]
    for name in __all__:
        if name in _HOMES:
            lines += ["", f"::: {_HOMES[name]}.{name}"]
    lines += ["", "::: ftjax.errors", "    options:", "      members: [UserError, OutOfMemory, Interrupted]"]
    return "\n".join(lines) + "\n"
