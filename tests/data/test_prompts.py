"""Rows with a prompt and nothing to imitate: for objectives that generate the answers."""

import json

import pytest
from data_tokenizers import CHATML, byte_level

from ftjax.config import Config
from ftjax.config.data import DataConfig
from ftjax.data.pipeline import load_splits
from ftjax.data.rollout import RolloutTokens
from ftjax.errors import UserError
from ftjax.evaluate.rows import items_of

GRPO = RolloutTokens(8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def load(path, rows, tokenizer, encoding=GRPO, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_splits(DataConfig(train=str(path), max_length=64, **options), tokenizer, seed=0, encoding=encoding)[0]


def texts(split, tokenizer) -> list[str]:
    return [tokenizer.decode(unit[0].tokens.tolist()) for unit, _ in split.first(9)]


def references(path, **options) -> list[tuple]:
    data = {"train": str(path), "max_length": 64, **options}
    objective = {"name": "grpo", "max_completion_length": 8}
    config = Config.model_validate({"model": {"path": "x"}, "data": data, "objective": objective})
    return [item.example.references for item in items_of(config.data.sources("train"), config)[0]]


ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
ROWS = {
    "text": ([{"prompt": "P", "level": 3}], "P", ()),
    "with an answer": ([{"prompt": "P", "completion": "a"}], "P", ("a",)),
    "of TRL": ([{"prompt": user("P"), "solution": "a"}], "P", ("a",)),
    "both as messages": ([{"prompt": user("P"), "completion": [{"role": "assistant", "content": "a"}]}], "P", ("a",)),
    "references": ([{"prompt": "P", "answer": 3, "references": ["a", "b"]}], "P", ("a", "b")),
    "a number": ([{"prompt": "P", "ground_truth": 3}], "P", ("3",)),
    "messages": ([{"messages": [*user("P"), {"role": "assistant", "content": "a"}]}], "P", ("a",)),
    "unanswered": ([{"messages": user("P")}], "P", ()),
    "question and answer": ([{"question": "P", "answer": "a"}], "P", ("a",)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_prompt_is_what_a_generating_model_sees(name, tmp_path):
    rows, prompt, answers = ROWS[name]
    tokenizer = byte_level(CHATML)
    split = load(tmp_path / "a.jsonl", rows, tokenizer)
    assert texts(split, tokenizer) == [ASKED.format(prompt)]
    assert not split.documents.trained.any()
    assert references(tmp_path / "a.jsonl") == [answers]
    assert split.report.lines()[1:] == [f"{split.report.tokens} tokens of prompts"]  # and no warning of unused columns


def test_turns_that_end_with_the_users(tmp_path):
    """An earlier answer is a part of the prompt and no reference."""
    turns = [*user("P"), {"role": "assistant", "content": "a"}, *user("Q")]
    tokenizer = byte_level(CHATML)
    split = load(tmp_path / "a.jsonl", [{"messages": turns}], tokenizer)
    [text] = texts(split, tokenizer)
    assert text.endswith("Q<|im_end|>\n<|im_start|>assistant\n") and "a<|im_end|>" in text
    assert references(tmp_path / "a.jsonl") == [()]


def test_without_a_chat_template(tmp_path):
    tokenizer = byte_level()
    rows = [{"prompt": "Say: "}]
    assert texts(load(tmp_path / "a.jsonl", rows, tokenizer), tokenizer) == ["Say: "]
    split = load(tmp_path / "b.jsonl", [{"a": 1, "b": 2}], tokenizer, template="{a}+{b}=")
    assert texts(split, tokenizer) == ["1+2="]
    split = load(tmp_path / "c.jsonl", [{"problem": "x", "answer": "y"}], tokenizer, columns={"prompt": "problem"})
    assert texts(split, tokenizer) == ["x"] and references(tmp_path / "c.jsonl", columns={"prompt": "problem"}) == [("y",)]


def test_long_prompts_are_dropped_and_counted(tmp_path):
    """A row must hold the prompt and the longest answer."""
    tokenizer = byte_level()
    split = load(tmp_path / "a.jsonl", [{"prompt": "x" * 56}, {"prompt": "y" * 57}, {"prompt": "z"}], tokenizer)
    assert texts(split, tokenizer) == ["x" * 56, "z"]
    assert split.report.dropped == {"longer than max_length - max_completion_length": 1}
    with pytest.raises(UserError, match=r"a.jsonl:2: the prompt has 57 tokens, and data.max_length 64 less .* leaves 56"):
        load(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "y" * 57}], tokenizer, truncation="error")
    with pytest.raises(UserError, match=r"lower objective\.max_completion_length"):
        load(tmp_path / "b.jsonl", [{"prompt": "y" * 57}], tokenizer)


def test_rows_without_a_prompt(tmp_path):
    tokenizer = byte_level(CHATML)
    with pytest.raises(UserError, match=r"a.jsonl:1: there is no prompt to answer"):
        load(tmp_path / "a.jsonl", [{"text": "x"}], tokenizer)
    with pytest.raises(UserError, match=r'b.jsonl:1: expected columns "prompt"; found "q"'):
        load(tmp_path / "b.jsonl", [{"q": "x"}], tokenizer)
    with pytest.raises(UserError, match=r"c.jsonl:2: 'prompt' is empty"):
        load(tmp_path / "c.jsonl", [{"prompt": "x"}, {"prompt": " "}], tokenizer)


def test_other_objectives_have_nothing_to_imitate_there(tmp_path):
    from ftjax.data.encoding import ANSWERS

    with pytest.raises(UserError, match=r"a.jsonl:1: there is a prompt and no answer to imitate"):
        load(tmp_path / "a.jsonl", [{"prompt": "x"}], byte_level(CHATML), ANSWERS, format="prompt")
