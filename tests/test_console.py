"""Tests printed output: lines break at words, tables fit and nothing is cut off, in terminals of any width and in pipes."""

import ast
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from ftjax.console import make_console, print_table, say
from ftjax.errors import UserError
from ftjax.models.table import families

PACKAGE = Path(__file__).parents[1] / "ftjax"
PATH = "runs/" + "a-long-name/" * 9 + "final"
COMMAND = f"ftjax train {PATH}/config.yaml 'data.columns={{prompt: question, completion: answer}}' method.r=16 training.seed=3"
PROSE = "a sentence of short words, none of which is ever torn apart, however narrow the window is in which it is read"
HEAD = ("metric", "value (95 % interval)", "base", "difference", "p")
ROWS = [
    ("exact_match", "0.8123 (0.7812 to 0.8431)", "0.6 (0.57 to 0.63)", "+0.2123 (+0.18 to +0.24)", "0.0012"),
    ("f1", "0.9 (0.88 to 0.92)", "0.7 (0.67 to 0.73)", "+0.2 (+0.17 to +0.23)", "0.5"),
]


def terminal(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, markup=False, highlight=False)


def printed(width, *texts):
    console = terminal(width)
    for text in texts:
        say(console, text)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 60, 33])
def test_prose_breaks_at_words(width):
    lines = printed(width, f"error: {PROSE}\n  - {PROSE}")
    assert max(map(cell_len, lines)) <= width and len(lines) > 3
    assert " ".join(" ".join(lines).split()) == f"error: {PROSE} - {PROSE}"
    first = next(number for number, line in enumerate(lines) if line.startswith("  - "))
    assert all(line.startswith("    ") for line in lines[first + 1 :]), "a line goes on beneath where it began"


@pytest.mark.parametrize("width", [80, 60])
def test_what_is_copied_stays_one_line(width):
    lines = printed(width, f"{PROSE}: {PATH}, or: {COMMAND}; {PROSE}", f"  vLLM:       vllm serve {PATH}")
    assert any(PATH in line for line in lines)
    assert any(COMMAND in line for line in lines)
    assert any(f"vllm serve {PATH}" in line for line in lines)
    assert all(cell_len(line) <= width for line in lines if PATH not in line)


def test_wide_characters_count_twice():
    assert max(map(cell_len, printed(20, "汉字 " * 20))) <= 20


def test_what_is_quoted_cannot_steer_the_terminal():
    console = terminal(80)
    say(console, "\x1b[2J[bold]x")
    print_table(console, ("a", "\x1b[0m"), [("\x1b[2J", "\x07")])
    assert not set("\x1b\x07") & set(console.file.getvalue()) and "[bold]x" in console.file.getvalue()


@pytest.mark.parametrize("width", [200, 80, 60, 40])
def test_a_table_fits_and_says_everything(width):
    console = terminal(width)
    print_table(console, HEAD, ROWS)
    lines = console.file.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert "…" not in "".join(lines)
    for unit in re.findall(r"\([^)]+\)|[^\s()]+", " ".join(cell for row in ROWS for cell in row)):
        assert any(unit in line for line in lines), "an interval is not torn apart either"


def test_a_table_that_fits_stands_in_columns_of_a_row_each():
    console = terminal(100)
    print_table(console, HEAD, ROWS, title="scores")
    title, head, first, second = console.file.getvalue().splitlines()
    assert title == "scores" and head.split("  ")[0] == "metric"
    assert first.endswith("0.0012") and second.rstrip().endswith("   0.5"), "numbers stand at the right"
    assert first.index("(0.7812 to 0.8431)") + 18 == second.index("(0.88 to 0.92)") + 14


def test_a_pipe_has_no_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    console = make_console()
    say(console, f"{PROSE}, {COMMAND}")
    print_table(console, HEAD, [[cell * 9 for cell in row] for row in ROWS])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{PROSE}, {COMMAND}" and len(lines) == 2 + len(ROWS)
    assert "…" not in "".join(lines) and ROWS[0][1] * 9 in lines[2]


def test_a_long_cell_in_a_pipe_does_not_widen_the_other_rows(capsys):
    print_table(make_console(), ("run", "what", "loss"), [("first", PROSE, "0.5"), ("second", "none", "12.25")], left=(0, 1))
    assert capsys.readouterr().out.splitlines() == [
        "run     what   loss",
        f"first   {PROSE}    0.5",
        "second  none  12.25",
    ]


def test_only_one_module_makes_consoles_and_tables():
    for path in PACKAGE.rglob("*.py"):
        if path != PACKAGE / "console.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                made = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Console", "Table")
                assert not made, f"{path}:{node.lineno}: use ftjax.console"


def in_terminal(width, *arguments):
    """Return what a command writes to a terminal of this width, without colours."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "FORCE_COLOR")}
    environment |= {"TERM": "xterm", "NO_COLOR": "1", "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "ftjax", *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    read = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        read += piece
    os.close(ours)
    process.wait()
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", read.decode()).replace("\r\n", "\n")


@pytest.mark.parametrize("width", [pytest.param(80, marks=pytest.mark.sweep), 60])
def test_a_command_in_a_terminal(width, tmp_path):
    shown = in_terminal(width, "models")
    assert max(map(cell_len, shown.splitlines())) <= width
    assert all(family.example in shown for family in families()), "what one copies is whole"
    broken = tmp_path / ("long-" * 20 + "name.yaml")
    broken.write_text("modle: {}\ndata: {train: x}\n")
    shown = in_terminal(width, "train", str(broken))
    assert str(broken) in shown and shown.startswith("error:")
    assert all(cell_len(line) <= width for line in shown.splitlines() if str(broken) not in line)


def test_a_file_name_that_is_no_text(tmp_path, capsysbinary):
    """Python reads its bytes as surrogates, which no stream takes."""
    console = make_console()
    say(console, os.fsdecode(b"caf\xe9.jsonl") + " and \ud83d")
    print_table(console, ["file"], [[os.fsdecode(b"caf\xe9.jsonl")]])
    assert capsysbinary.readouterr().out.split() == [rb"caf\xe9.jsonl", b"and", rb"\ud83d", b"file", rb"caf\xe9.jsonl"]
    assert str(UserError(os.fsdecode(b"\xff"))) == r"\xff"


def test_tables_fit_a_notebook(monkeypatch):
    """A notebook is no terminal, and has a width all the same."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert make_console().width < 200
    monkeypatch.setattr("rich.console._is_jupyter", lambda: False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert make_console().width > 10_000
