"""Tests token ids and labels against TRL's preprocessing (`SFTTrainer._prepare_dataset`), format by format."""

import copy
import json
from types import SimpleNamespace

import pytest
from data_tokenizers import CHATML, MARKED, WITH_BOS, byte_level, spaced

from ftjax.config.data import SourceConfig
from ftjax.data.encode import Encoder
from ftjax.data.read import read_rows
from ftjax.data.reader import to_examples
from ftjax.data.row import Row

# TRL sets a field that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

TALKS = [
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello there, my friends."}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is two plus two?\n"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "thank you"},
        {"role": "assistant", "content": "\nfine."},
    ],
]


def trl(rows, tokenizer, tmp_path, **options):
    """Return `(input_ids, labels)` of each row as SFTTrainer prepares them."""
    import trl
    from datasets import Dataset
    from trl.trainer.sft_trainer import SFTTrainer

    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=None, shuffle_dataset=False, report_to="none", use_cpu=True, bf16=False, **options
    )
    completion_only = args.completion_only_loss
    if completion_only is None:
        completion_only = "prompt" in rows[0] and "completion" in rows[0]
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=completion_only)
    # TRL changes the given rows in place.
    data = Dataset.from_list(copy.deepcopy(rows))
    prepared = SFTTrainer._prepare_dataset(trainer, data, tokenizer, args, False, None, "train")
    return [(row["input_ids"], row["labels"]) for row in prepared]


def ours(rows, tokenizer, *, raw=False, **options):
    """Return `(input_ids, labels)` of each row as ftjax prepares them."""
    examples = [
        e.with_source(0, "raw" if raw else "auto") for e in to_examples([Row(row, f"a:{n}") for n, row in enumerate(rows)])
    ]
    documents = Encoder(tokenizer, **options)(examples)
    return [
        (d.tokens.tolist(), [t if w else -100 for t, w in zip(d.tokens.tolist(), d.weights, strict=True)]) for d in documents
    ]


@pytest.mark.parametrize("make", [byte_level, spaced])
def test_text(make, tmp_path):
    rows = [{"text": "Hello world, how are you?"}, {"text": "Once upon a time\n"}]
    for (ids, labels), (their_ids, their_labels) in zip(ours(rows, make()), trl(rows, make(), tmp_path), strict=True):
        assert ids == their_ids and labels[1:] == their_labels[1:]  # TRL labels BOS, which is never predicted


@pytest.mark.parametrize("make", [byte_level, spaced])
@pytest.mark.parametrize("template", [None, CHATML])
def test_prompt_and_completion_as_text(make, template, tmp_path):
    """ftjax gives TRL's result with `prompt_format: raw`, and by default if the tokenizer has no chat template."""
    rows = [
        {"prompt": "Question: What is two plus two?\nAnswer:", "completion": " four"},
        {"prompt": "Hello", "completion": " world, how are you"},
    ]
    if make is spaced:
        template = None if template is None else WITH_BOS
    assert ours(rows, make(template), raw=True) == trl(rows, make(template), tmp_path)
    if template is None:
        assert ours(rows, make(template)) == trl(rows, make(template), tmp_path)


@pytest.mark.parametrize("make, template", [(byte_level, CHATML), (byte_level, MARKED), (spaced, WITH_BOS)])
def test_prompt_and_completion_as_messages(make, template, tmp_path):
    rows = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in TALKS]
    assert ours(rows[:1], make(template)) == trl(rows[:1], make(template), tmp_path)
    got, theirs = ours(rows, make(template)), trl(rows, make(template), tmp_path)
    if make is spaced:
        assert got == theirs
    else:  # `assistant\n` and `\nfine` merge: ftjax keeps the prompt's own tokens, TRL those of the whole
        tokenizer = make(template)
        assert tokenizer.decode(got[1][0]) == tokenizer.decode(theirs[1][0])
        prompt = tokenizer.apply_chat_template(TALKS[1][:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert got[1][0][: len(prompt)] == prompt


@pytest.mark.parametrize("make, template", [(byte_level, MARKED)])
def test_messages_with_marks(make, template, tmp_path):
    rows = [{"messages": TALKS[0]}, {"messages": TALKS[1][:3]}]
    assert ours(rows, make(template)) == trl(rows, make(template), tmp_path, assistant_only_loss=True)


@pytest.mark.parametrize("make, template", [(byte_level, CHATML), (byte_level, MARKED), (spaced, WITH_BOS)])
def test_messages_of_which_all_is_trained(make, template, tmp_path):
    """TRL trains whole conversations unless `assistant_only_loss` is set; ftjax does with `train_on_inputs`."""
    rows = [{"messages": talk} for talk in TALKS]
    theirs = trl(rows, make(template), tmp_path)
    for (ids, labels), (their_ids, their_labels) in zip(ours(rows, make(template), train_on_inputs=True), theirs, strict=True):
        assert ids == their_ids and labels[1:] == their_labels[1:]


def test_sharegpt(tmp_path):
    turns = [{"from": "user", "value": "Hello"}, {"from": "assistant", "value": "Hello there"}]
    rows = [{"conversations": turns}]
    assert ours(rows, byte_level(MARKED)) == trl(rows, byte_level(MARKED), tmp_path, assistant_only_loss=True)


def test_a_boundary_that_merges_is_where_ftjax_differs(tmp_path):
    rows = [{"prompt": "Hello wor", "completion": "ld"}]
    tokenizer = byte_level()
    (ids, labels), (their_ids, _) = ours(rows, tokenizer)[0], trl(rows, tokenizer, tmp_path)[0]
    assert ids != their_ids and tokenizer.decode(ids) == tokenizer.decode(their_ids)
    prompt = tokenizer("Hello wor")["input_ids"]
    assert ids[: len(prompt)] == prompt != their_ids[: len(prompt)]
    assert labels[: len(prompt)] == [-100] * len(prompt)


@pytest.mark.parametrize("name", ["chat_messages", "code_completion"])
def test_whole_sets(name, data_sets, tmp_path):
    """The first rows of whole sets, with marks where they are conversations."""
    file = data_sets / name / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:60]]
    keep = ("messages",) if name == "chat_messages" else ("prompt", "completion")
    rows = [{key: row[key] for key in keep} for row in rows]
    tokenizer = byte_level(MARKED if name == "chat_messages" else None)
    theirs = trl(rows, tokenizer, tmp_path, **({"assistant_only_loss": True} if name == "chat_messages" else {}))
    got = ours(rows, tokenizer)
    same = sum(a == b for a, b in zip(got, theirs, strict=True))
    for (ids, _), (their_ids, _) in zip(got, theirs, strict=True):
        assert tokenizer.decode(ids) == tokenizer.decode(their_ids)
    merged = Encoder(tokenizer)
    merged(list(to_examples(list(read_rows(SourceConfig(path=str(file))))[:60])))
    assert same == len(rows) - merged.notes["merged boundary"] and same > 0.6 * len(rows)
