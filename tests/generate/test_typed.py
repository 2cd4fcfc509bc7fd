"""Tests chat input that is typed, pasted or piped."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from verbs import chat, ftjax, generate

from ftjax.errors import UserError
from ftjax.generate.chat import HELP
from ftjax.generate.session import Generator
from ftjax.generate.typed import checked

CHAT = "{% for m in messages %}{{ m.content }}{{ ' ' if m.role != 'assistant' else '\n' }}{% endfor %}"
READER = """
from ftjax.generate.typed import read_turn
while (message := read_turn(True, alone=lambda line: line.startswith("/"))) is not None:
    print("READ", ascii(message) + "<<", flush=True)
"""
PASTE = "\x1b[200~{}\x1b[201~"


def in_a_terminal(typed: dict[str, int], readline: bool, tmp_path) -> list[str]:
    """Return the messages that `read_turn` reads; `typed` maps each piece of input to the number of messages it should
    complete."""
    if not readline:  # as on systems whose Python lacks it
        (tmp_path / "readline.py").write_text("raise ImportError\n")
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", READER], stdin=other, stdout=other, stderr=other, env=environment)
    os.close(other)
    shown, end = b"", time.monotonic() + 60

    def read_until(text: bytes, count: int) -> None:
        nonlocal shown
        while shown.count(text) < count:
            assert select.select([main], [], [], max(0, end - time.monotonic()))[0], shown
            shown += os.read(main, 4096)

    try:
        wanted = 0
        read_until(b"> ", 1)
        for piece, count in typed.items():
            os.write(main, piece.encode())
            wanted += count
            read_until(b"<<", wanted)
            read_until(b"> ", wanted + 1)  # and it waits for the next one
    finally:
        process.kill()
        process.wait()
        os.close(main)
    return re.findall(r"READ '(.*)'<<", shown.decode())


@pytest.mark.skipif(os.name != "posix", reason="a terminal of Unix")
def test_pasted_lines_are_one_message(tmp_path):
    """If the terminal marks pasted text, nothing is sent before Enter, and backslashes and keys in it have no effect."""
    typed = {"hello\n": 1, PASTE.format("/def f():\r\tpass \\\r\rf()") + "\n": 1, "a\nb\n": 1, "/x\nmore\n": 2}
    read = in_a_terminal(typed, readline=True, tmp_path=tmp_path)
    assert read == ["hello", r"/def f():\n\tpass \\\n\nf()", r"a\nb", "/x", "more"]


@pytest.mark.skipif(os.name != "posix", reason="a terminal of Unix")
def test_pasted_lines_are_one_message_without_marks_too(tmp_path):
    typed = {"hello\n": 1, "one\n\ntwo \\\nthree\n": 1, "/x\nmore\n": 2}
    read = in_a_terminal(typed, readline=False, tmp_path=tmp_path)
    assert read == ["hello", r"one\n\ntwo \\\nthree", "/x", "more"]


def test_commands(stories, monkeypatch, capsys, tmp_path):
    """Undone turns leave no trace in the conversation; a saved one is a row of training data."""
    file = tmp_path / "talk.jsonl"
    lines = iter(["Once upon", "no", "/undo", "/retry", f"/save {file}", f"/save {file}", f"/save {tmp_path}", "/save", "/undo",
                  "/undo", "/retry", "/help", "/quit now\nplease", "/exit", "never read"])  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    chat(str(stories), chat_template=CHAT, max_new_tokens=8, temperature=0.9, seed=3, dtype="float32")
    out, err = capsys.readouterr()
    assert list(lines) == ["never read"]
    ours, asked = Generator(str(stories), dtype="float32", chat_template=CHAT), [{"role": "user", "content": "Once upon"}]
    padding = [[5]] * 2  # the number of a question is part of its random key: the first and the third
    settings = {"max_new_tokens": 8, "temperature": 0.9, "seed": 3}
    first, _, third = (answer.text for answer in ours.generate([asked, *padding[:1], asked], **settings))
    assert out.startswith(first) and third in out and first != third
    assert json.loads(file.read_text()) == {"messages": [*asked, {"role": "assistant", "content": third}]}
    assert err.count(f"written: {file}") == 2 and "already exists" in err and "write /save FILE" in err
    assert "forgotten: no" in err and "forgotten: Once upon" in err and err.count("there is no question yet") == 2
    assert HELP in err and all(word in HELP for word in ("/retry", "/undo", "/save", "/exit"))
    assert len(out.splitlines()) >= 4  # pasted lines that begin with a command are a message


WRONG = b"caf\xe9 au lait\nplease\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # in the locale's encoding
@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_bytes_that_are_no_text(stories, monkeypatch, capsys, errors, verb):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"fine\n" * (verb == "generate") + WRONG), errors=errors))
    options = {"generate": ["--prompt", "-"], "chat": ["--chat-template", CHAT]}[verb]
    code = ftjax(verb, str(stories), *options)
    out, err = capsys.readouterr()
    line = 2 if verb == "generate" else 1
    assert code == 2 and not out and f"expected UTF-8 text; found the byte 0xe9 in line {line}" in err


@pytest.mark.parametrize("options", [{"prompt": ["caf\udce9"]}, {"prompt": ["a"], "system": "\ud800"}])
def test_arguments_that_are_no_text(stories, options):
    with pytest.raises(UserError, match=r"--(prompt|system): expected UTF-8 text; found (the byte 0xe9|half a character)"):
        generate(str(stories), chat_template=CHAT, **options)
    assert checked("cafe\u0301 \U0001f600", "x") == "cafe\u0301 \U0001f600"
