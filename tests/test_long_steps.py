"""Tests what a user sees of a step that takes long: a line now and then, or a bar in a terminal."""

import io
import time

import pytest
from oracle import ONE, Case, make_hf
from rich.console import Console
from tiny_tokenizer import save_tokenizer

import ftjax
import ftjax.long_steps as long_steps
from ftjax.long_steps import amount, counted, described_by, duration, hidden, long_step


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(long_steps, "SOON", 0.2)
    monkeypatch.setattr(long_steps, "AGAIN", 60.0)
    monkeypatch.setattr(long_steps, "SHOWN", 0.0)


@pytest.fixture
def console(monkeypatch) -> io.StringIO:
    """Have steps shown in a terminal; return what it gets."""
    found = io.StringIO()
    monkeypatch.setattr(long_steps, "make_console", lambda **_: Console(file=found, force_terminal=True, width=120))
    return found


def wait_until(shown, text: str) -> str:
    """Wait until a text is there, for as long as a busy machine may need."""
    end = time.monotonic() + 60
    while text not in (found := shown()):
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


def heard(capsys):
    """Return a function that returns all that stderr had so far."""
    parts = []

    def so_far() -> str:
        parts.append(capsys.readouterr().err)
        return "".join(parts)

    return so_far


def test_a_line_where_there_is_no_terminal(capsys):
    shown = heard(capsys)
    with long_step("loading weights", 16e9, "bytes", hint="kept for the next time") as step:
        step.advance(4e9)
        wait_until(shown, "\n")
    assert shown() == "loading weights: 4.00 GB of 16.00 GB (25%); kept for the next time\n"


def test_what_is_left(monkeypatch):
    step = long_steps.LongStep("evaluating", 200, "rows")
    step.at(50)
    monkeypatch.setattr(time, "monotonic", lambda: step.start + 30)
    assert step.text() == "evaluating: 50 of 200 rows (25%), about 1 min 30 s left"
    step.total = None
    assert step.text() == "evaluating: 50 rows, 30 s so far"


def test_a_quick_step_says_nothing(capsys):
    assert list(counted("reading", range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_the_innermost_step_is_shown_in_a_terminal(console):
    with long_step("loading a model"):
        wait_until(console.getvalue, "loading a model: 0 s so far")
        with long_step("loading weights", 8, "layers") as step:
            step.advance(2)
            wait_until(console.getvalue, "loading weights: 2 of 8 layers (25%)")
    before = console.getvalue()
    assert before.endswith("\x1b[2K") or "\x1b[?25h" in before, "the bar goes away"


def test_a_long_compilation_is_said_in_a_terminal_too(console):
    """A bar goes away; that compiled programs are kept stays on the screen, and is said once."""
    with long_step("compiling the update", hint="kept for the next time"):
        wait_until(console.getvalue, "kept for the next time")
        time.sleep(0.3)
    assert console.getvalue().count("kept for the next time") == 1


def test_a_bar_that_is_up_shows_the_step(capsys):
    texts = []
    with described_by(texts.append), long_step("evaluating", 4, "batches") as step:
        step.advance()
        wait_until(lambda: "".join(texts), "evaluating: 1 of 4 batches (25%)")
    assert texts[-1] == "" and capsys.readouterr().err == ""


def test_hidden(capsys):
    with hidden(), long_step("loading"):
        time.sleep(0.6)
    assert capsys.readouterr().err == ""


def test_an_error_ends_the_display(capsys):
    with pytest.raises(ZeroDivisionError), long_step("loading"):
        raise ZeroDivisionError
    assert not long_steps.steps_go_on()


def test_a_run_and_what_follows_it_say_what_they_do(tmp_path, monkeypatch):
    """From the data to the exported file."""
    make_hf(Case("llama", "llama"), tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    said, start = [], long_steps.LongStep.__init__

    def heard(self, what, *rest, **more):
        said.append(what)
        start(self, what, *rest, **more)

    monkeypatch.setattr(long_steps.LongStep, "__init__", heard)
    rows = [{"prompt": "abc", "completion": "cba"}, {"prompt": "fed", "completion": "def"}]
    data = {"train": rows, "validation": rows[:1], "max_length": 32, "contamination": "ignore"}
    settings = {"model": {"path": "model"}, "method": {"name": "lora", "r": 2}, "data": data, "output_dir": "run"}
    ftjax.train(settings, devices=ONE, quiet=True, training__max_steps=1, training__global_batch_size=1)
    ftjax.export("run", "merged", merge=True, quiet=True)
    ftjax.evaluate("run", rows, task="loss")
    assert said[:5] == [
        "reading and tokenising the validation data", "reading and tokenising the training data", "loading weights",
        "compiling the update", "evaluating",
    ]  # fmt: skip
    assert {"waiting until the checkpoint is saved", "writing model.safetensors", "evaluating run/final"} < set(said)


def test_amounts():
    assert [amount(1, "rows"), amount(12_345, "rows"), amount(2.5e6, "bytes")] == ["1 rows", "12,345 rows", "2.5 MB"]
    assert [duration(5), duration(65), duration(4200)] == ["5 s", "1 min 05 s", "1 h 10 min"]
