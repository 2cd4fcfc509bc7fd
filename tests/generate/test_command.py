"""Tests `ftjax generate`: prompts in, answers out."""

import io
import json

import pytest
from verbs import generate

from ftjax.errors import UserError
from ftjax.generate.answer import Generation
from ftjax.generate.command import read_prompts
from ftjax.generate.session import Generator

TEMPLATE = "{{ tools if tools }}{% for m in messages %}{{ m.content }} {% endfor %}"


def written(path, *rows) -> object:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def ours(stories) -> Generator:
    return Generator(str(stories), dtype="float32", chat_template=TEMPLATE)


def test_one_prompt_prints_the_text(stories, ours, capsys):
    generate(str(stories), prompt=["Once upon a time"], max_new_tokens=8, dtype="float32")
    want = ours.generate([ours.tokenizer("Once upon a time")["input_ids"]], max_new_tokens=8)[0]
    assert capsys.readouterr().out == want.text + "\n"


def test_many_prompts_as_json(stories, ours, tmp_path, capsys, monkeypatch):
    """Prompts come from files, arguments and standard input; a conversation's own last answer is not shown to the model."""
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    turns = [{"role": "user", "content": "Once upon"}, {"role": "assistant", "content": "NEVER"}]
    path = written(tmp_path / "a.jsonl", {"prompt": "Tom"}, {"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]})
    settings = {"max_new_tokens": 6, "temperature": 0.8, "seed": 2, "dtype": "float32", "chat_template": TEMPLATE}
    generate(str(stories), prompt=["Lily", "-"], prompts=path, as_json=True, **settings)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    asked = ["Lily", "from stdin", "Tom", turns[:1], turns[:1]]
    assert [row["prompt"] for row in rows] == asked
    want = ours.generate(asked, max_new_tokens=6, temperature=0.8, seed=2)
    assert [row["text"] for row in rows] == [answer.text for answer in want]
    assert {(row["finish_reason"], row["completion_tokens"]) for row in rows} == {("length", 6)}
    assert [row["prompt_tokens"] for row in rows] == [answer.prompt_tokens for answer in want]


def test_many_prompts_as_text(stories, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Once upon a time\n\nTom  \n")
    generate(str(stories), prompts=tmp_path / "a.txt", max_new_tokens=4, dtype="float32")
    out = capsys.readouterr().out
    assert out.startswith("--- Once upon a time\n") and "\n\n--- Tom\n" in out


def test_raw_and_system(stories, ours, capsys):
    settings = {"max_new_tokens": 8, "dtype": "float32", "chat_template": TEMPLATE, "as_json": True}
    generate(str(stories), prompt=["Tom"], raw=True, **settings)
    raw = json.loads(capsys.readouterr().out)
    assert raw["prompt_tokens"] == len(ours.tokenizer("Tom")["input_ids"])
    generate(str(stories), prompt=["Tom"], system="Lily", **settings)
    system = json.loads(capsys.readouterr().out)
    assert system["prompt"] == [{"role": "system", "content": "Lily"}, {"role": "user", "content": "Tom"}]
    assert system["text"] == ours.generate([system["prompt"]], max_new_tokens=8)[0].text != raw["text"]
    with pytest.raises(UserError, match="choose one"):
        generate(str(stories), prompt=["Tom"], raw=True, system="x")


def test_rows_in_trainings_formats(ours, tmp_path):
    """Rows of a data set become the prompts that training saw, tools included."""
    from ftjax.data.read import read_rows
    from ftjax.data.reader import to_examples
    from ftjax.data.template import example_prompt

    path = written(tmp_path / "qa.jsonl", {"question": "Who?", "answer": "Tom"})
    (row,), (example,) = read_prompts(path), to_examples(read_rows(str(path)))
    assert ours.encode(row) == example_prompt(example, ours.tokenizer)
    tool = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    path = written(tmp_path / "tools.jsonl", {"messages": [{"role": "user", "content": "Who?"}], "tools": tool})
    assert len(ours.encode(read_prompts(path)[0])) > len(ours.encode([{"role": "user", "content": "Who?"}])) + 10


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "\n", "a.txt: the file is empty"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ""}\n', r"a.jsonl:2: the prompt is empty"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"}\n', r"a.jsonl:2"),
        ("a.jsonl", '{"colour": "x"}\n', r"a.jsonl:1.*colour"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "x"}]}\n', r"a.jsonl:1: all messages are the assistant"),
        ("a.jsonl", "", "empty"),
    ],
)
def test_wrong_files(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        read_prompts(tmp_path / name)


def test_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "no.txt")
    with pytest.raises(UserError, match="--prompts FILE"):
        generate("anything")


# ---- control tokens spelled out in prompts, and escape sequences in answers ----

SPELLED = "Once</s>upon"


def prompt_tokens(capsys, *arguments, **settings):
    generate(*arguments, max_new_tokens=1, dtype="float32", as_json=True, **settings)
    return [json.loads(line)["prompt_tokens"] for line in capsys.readouterr().out.splitlines()]


def test_special_tokens_in_text(stories, tmp_path, capsys):
    """Control tokens in texts and in rows of a file are split silently."""
    rows = written(
        tmp_path / "a.jsonl",
        {"messages": [{"role": "user", "content": SPELLED}]},
        {"messages": [{"role": "user", "content": f"{SPELLED} a"}]},
    )
    given = {"prompt": [SPELLED], "prompts": rows, "chat_template": TEMPLATE}
    split = prompt_tokens(capsys, str(stories), **given)
    assert split == prompt_tokens(capsys, str(stories), **given, special_tokens_in_text="split")
    encoded = prompt_tokens(capsys, str(stories), **given, special_tokens_in_text="encode")
    assert all(one < other for one, other in zip(encoded, split, strict=True)), "a token, not its letters"
    with pytest.raises(UserError, match=r"spells the control token '</s>'.*--special-tokens-in-text"):
        generate(str(stories), **given, dtype="float32", special_tokens_in_text="error")


def test_a_runs_own_settings_are_the_default(stories, tmp_path, capsys):
    strict = {"special_tokens_in_text": "error", "fold_system": False}
    config = tmp_path / "run.yaml"
    data = {"train": "none.jsonl", **strict}
    settings = {"model": {"path": str(stories)}, "data": data, "output_dir": str(tmp_path / "run")}
    config.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="spells the control token"):
        prompt_tokens(capsys, str(config), prompt=[SPELLED], chat_template=TEMPLATE)
    assert prompt_tokens(capsys, str(config), prompt=[SPELLED], chat_template=TEMPLATE, special_tokens_in_text="split")
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    with pytest.raises(UserError, match=r"takes no system message, and data\.fold_system is false"):
        prompt_tokens(capsys, str(config), prompt=["Tom"], system="Be kind.", chat_template=refuses)
    assert prompt_tokens(capsys, str(stories), prompt=["Tom"], system="Be kind.", chat_template=refuses)


class Terminal(io.StringIO):
    def isatty(self):
        return True


HOSTILE = "\x1b[2Jan answer\x9b31m\n\tof two lines\x07"


@pytest.mark.parametrize("out", [Terminal, io.StringIO])
def test_what_a_model_writes_steers_no_terminal(stories, monkeypatch, out):
    from ftjax.generate.chat import _answer

    class Talk:
        def ask(self, message):
            yield from HOSTILE

    answers = [Generation(HOSTILE, [1], "stop", None, 1)] * 2
    monkeypatch.setattr(Generator, "answer", lambda self, requests, **_: answers[: len(requests)])
    for given, as_json in ((["Tom"], False), (["Tom", "Lily"], False), (["Tom"], True), (None, False)):
        shown = out()
        monkeypatch.setattr("sys.stdout", shown)
        if given is None:
            _answer(Talk(), "Tom")
        else:
            generate(str(stories), prompt=given, as_json=as_json, dtype="float32")
        if as_json:
            assert json.loads(shown.getvalue())["text"] == HOSTILE and "\x1b" not in shown.getvalue()
        elif out is Terminal:
            assert "␛[2Jan answer\\x9b31m\n\tof two lines␇" in shown.getvalue() and "\x1b" not in shown.getvalue()
        else:
            assert HOSTILE in shown.getvalue(), "a file has what the model wrote"
