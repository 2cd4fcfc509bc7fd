"""Console output: text that wraps between words, tables that fit, and nothing truncated.

In a terminal, lines wrap between words. A command, a path or any other word that is wider than the terminal stays on one
line, which the terminal itself wraps, so that it can be copied whole. A pipe has no width: every line, and every row of a
table, stays one line.
"""

import re
from collections.abc import Container, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftjax.errors import printable

UNKNOWN = 100_000  # width of a pipe in columns
GAP = 2  # spaces between the columns of a table
ALIGNED = 40  # columns; in a pipe, a wider cell moves the rest of its own row and not that of all rows
_VERBS = (
    "init|train|tune|preview|evaluate|check|report|runs|config|generate|chat|export|plan|sweep|merge-adapters|doctor|models"
)
_WORD = r"""(?:'[^'\n]*'|"[^"\n]*"|,(?!\s)|[^\s'";`,])+"""
COMMAND = rf"\b(?:ftjax (?:{_VERBS})\b|(?:python|pip|vllm|lm_eval|xprof) )(?: ?{_WORD})*"
_UNIT = re.compile(rf"(?:{COMMAND}|\(\S+ to \S+\)|\S)+")  # units that never wrap


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Create a console that prints text as it is: no markup, no emoji, no highlighted numbers."""
    console = Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)
    if not (console.is_terminal or console.is_jupyter):
        console.width = UNKNOWN
    return console


def say(console: Console, text: str | Text = "", style: str = "") -> None:
    """Print a text, wrapped between words in a terminal; continuation lines keep the indentation.

    Escape sequences in plain text are shown and not obeyed.
    """
    text = Text(printable(text), style) if isinstance(text, str) else text
    if not console.is_terminal:
        console.print(text, soft_wrap=True)
        return
    for line in text.split("\n", allow_blank=True):
        console.print(_broken(line, console.width), overflow="ignore", no_wrap=True, crop=False)


def _broken(line: Text, width: int) -> Text:
    """Wrap the line to at most `width` columns; a wider unit gets a line of its own."""
    plain = line.plain
    if line.cell_len <= width:
        return line
    indent = len(plain) - len(plain.lstrip(" "))
    indent += 2 if plain.startswith("- ", indent) else 0
    spans: list[tuple[int, int]] = []  # of each line
    for unit in _UNIT.finditer(plain, indent):
        start, stop = unit.span()
        if spans and line[spans[-1][0] : stop].cell_len + indent <= width:
            spans[-1] = spans[-1][0], stop
        else:
            spans.append((start, stop))
    if not spans:
        return line
    begins = [line[:indent], *(Text("\n" + " " * indent) for _ in spans[1:])]
    return Text.assemble(*(part for begin, (a, b) in zip(begins, spans, strict=True) for part in (begin, line[a:b])))


def print_table(
    console: Console, head: Sequence[str], rows: Sequence[Sequence[str | Text]], *, title: str = "", left: Container[int] = (0,)
) -> None:
    """Print rows of texts in columns that fit the terminal, with cells wrapped between words.

    If even the longest words do not fit next to each other, each row becomes `name: value; ...`. In a pipe each row is one
    line, whatever is in it.

    Args:
        left: indices of text columns, aligned left; the others are aligned right, as numbers.
    """
    if title:
        say(console, title, "bold")
    cells = [[Text(printable(cell)) if isinstance(cell, str) else cell for cell in row] for row in rows]
    head = [printable(name) for name in head]
    if console.width == UNKNOWN:
        _print_lines(console, [[Text(name) for name in head], *cells] if any(head) else cells, left)
        return
    columns = [[Text(name), *column] for name, *column in zip(head, *cells, strict=True)]
    widths = _widths([_extent(column) for column in columns], console.width - GAP * (len(columns) - 1))
    if widths is None:
        _print_records(console, head, cells)
        return
    table = Table(box=None, header_style="bold", padding=(0, GAP, 0, 0), pad_edge=False, show_header=any(head))
    for number, (name, width) in enumerate(zip(head, widths, strict=True)):
        side = "left" if number in left else "right"
        table.add_column(_broken(Text(name), width), justify=side, width=width, overflow="fold")
    for row in cells:
        table.add_row(*(_broken(cell, width) for cell, width in zip(row, widths, strict=True)))
    console.print(table)


def _extent(cells: Sequence[Text]) -> tuple[int, int]:
    """Return the widths of the widest unit and the widest cell of a column."""
    units = max((Text(unit).cell_len for cell in cells for unit in _UNIT.findall(cell.plain)), default=0)
    return units, max((cell.cell_len for cell in cells), default=0)


def _widths(extents: Sequence[tuple[int, int]], room: int) -> list[int] | None:
    """Return column widths: the widest shrink until all fit, none below its widest unit; None if that is too wide."""
    widths = [most for _, most in extents]
    if sum(least for least, _ in extents) > room:
        return None
    while sum(widths) > room:
        widest = max((n for n, (least, _) in enumerate(extents) if widths[n] > least), key=widths.__getitem__)
        widths[widest] -= 1
    return widths


def _print_lines(console: Console, rows: Sequence[Sequence[Text]], left: Container[int]) -> None:
    widths = [
        max((cell.cell_len for cell in column if cell.cell_len <= ALIGNED), default=0) for column in zip(*rows, strict=True)
    ]
    for row in rows:
        line = ""
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            text, space = " ".join(cell.plain.splitlines()), " " * (width - cell.cell_len)
            line += (text + space if number in left else space + text) + " " * GAP
        say(console, line.rstrip())


def _print_records(console: Console, head: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
    for first, *others in rows:
        say(console, first)
        line = Text()
        for name, cell in zip(head[1:], others, strict=True):
            if not cell.plain.strip():
                continue
            one = Text.assemble(f"{name}: " if name else "", cell)
            if line and line.cell_len + one.cell_len + 4 > console.width:
                say(console, line)
                line = Text()
            line = Text.assemble(line, "; " if line else "  ", one)
        say(console, line)
