"""Token ids and masks of preferences against the preprocessing of TRL's `DPOTrainer`, `KTOTrainer` and `RewardTrainer`."""

import copy
import json
from types import SimpleNamespace

import pytest
from data_tokenizers import CHATML, MARKED, WITH_BOS, WITH_TOOLS, byte_level, spaced
from pair_sets import answer, labelled, load, talk, units, write

from ftjax.data.scored import Scored
from ftjax.data.unpaired import Unpaired

# TRL sets a field of transformers that was renamed; TRL's and transformers' affair.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))


def trl(name, rows, tokenizer, tmp_path, **options):
    """The rows as a trainer prepares them."""
    import trl
    from datasets import Dataset

    args = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path / "out"), max_length=None, report_to="none", use_cpu=True, bf16=False, **options
    )
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, processing_class=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0
    )
    data = Dataset.from_list(copy.deepcopy(rows))
    return list(getattr(trl, f"{name}Trainer")._prepare_dataset(trainer, data, tokenizer, args, "train"))


def pairs(rows, tokenizer, tmp_path):
    """`(ids, which are trained)` of the chosen and the rejected text of each row, as DPOTrainer has them."""
    return [
        [
            (row["prompt_ids"] + row[key], [False] * len(row["prompt_ids"]) + [True] * len(row[key]))
            for key in ("chosen_ids", "rejected_ids")
        ]
        for row in trl("DPO", rows, tokenizer, tmp_path)
    ]


def ours(rows, tokenizer, tmp_path, encoding=None, **options):
    """The same, of ftjax."""
    found = units(load(write(tmp_path / "rows.jsonl", *rows), encoding, tokenizer, **({"max_length": 4096} | options)))
    return [[(d.tokens.tolist(), (d.weights > 0).tolist()) for d in unit] for unit in found]


TEXTS = [
    {"prompt": "Question: What is two plus two?\nAnswer:", "chosen": " four", "rejected": " I am fine"},
    {"prompt": "Hello", "chosen": " world, how are you", "rejected": " you"},
]
HISTORY = [{"role": "system", "content": "Be kind."}, *talk("Hello", "fine", "What is two plus two?")]
SEVERAL = [answer("four"), {"role": "user", "content": "thank you"}, answer("fine.")]
TALKS = [
    {"prompt": talk("Hello"), "chosen": [answer("Hello there, my friends.")], "rejected": [answer("no")]},
    {"prompt": HISTORY, "chosen": SEVERAL, "rejected": [answer("I am")]},
]


@pytest.mark.parametrize("make, template", [(byte_level, None), (byte_level, CHATML), (spaced, None), (spaced, WITH_BOS)])
def test_texts(make, template, tmp_path):
    """TRL has them never go through the chat template."""
    assert ours(TEXTS, make(template), tmp_path, prompt_format="raw") == pairs(TEXTS, make(template), tmp_path)


@pytest.mark.parametrize("make", [byte_level, spaced])
def test_texts_that_begin_alike(make, tmp_path):
    rows = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in TEXTS]
    assert ours(rows, make(), tmp_path) == pairs(rows, make(), tmp_path)


@pytest.mark.parametrize("make, template", [(byte_level, CHATML), (byte_level, MARKED), (spaced, WITH_BOS)])
@pytest.mark.parametrize("implicit", [False, True])
def test_conversations(make, template, implicit, tmp_path):
    """All that follows the prompt is trained."""
    rows = TALKS
    if implicit:
        rows = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in TALKS]
    assert ours(rows, make(template), tmp_path) == pairs(rows, make(template), tmp_path)


def test_tools(tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "description": "two plus two"}}]
    rows = [{**TALKS[0], "tools": tools}]
    found = ours(rows, byte_level(WITH_TOOLS), tmp_path)
    assert found == pairs(rows, byte_level(WITH_TOOLS), tmp_path)
    assert byte_level().decode(found[0][1][0]).startswith("tools: ")


@pytest.mark.parametrize("rows", [TEXTS, TALKS])
@pytest.mark.parametrize("make, template", [(byte_level, CHATML), (spaced, WITH_BOS)])
def test_labelled_answers_with_those_of_their_neighbours(rows, make, template, tmp_path):
    """All rows are one of KTOTrainer's batches, in which it exchanges answers."""
    labels = ((rows[0], "chosen", True), (rows[1], "rejected", False))
    rows = [labelled(row["prompt"], row[key], label) for row, key, label in labels]
    theirs = [
        [row["prompt_ids"] + row["completion_ids"], row["prompt_ids"] + row["KL_completion_ids"]]
        for row in trl("KTO", rows, make(template), tmp_path, per_device_train_batch_size=8)
    ]
    found = ours(rows, make(template), tmp_path, Unpaired(), prompt_format="raw")
    assert [[ids for ids, _ in unit] for unit in found] == theirs


def test_pairs_as_labelled_answers(tmp_path):
    """TRL puts all chosen answers before all rejected ones, and here each pair stays together."""
    theirs = [
        (row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"]), row["label"])
        for row in trl("KTO", TEXTS, byte_level(), tmp_path)
    ]
    found = units(load(write(tmp_path / "rows.jsonl", *TEXTS), Unpaired(), byte_level()))
    got = [(own.tokens.tolist(), int((own.weights == 0).sum()), bool(own.labels[0] > 0)) for own, _ in found]
    assert sorted(got) == sorted(theirs)


@pytest.mark.parametrize("rows", [TEXTS, TALKS])
@pytest.mark.parametrize("make, template", [(byte_level, CHATML), (byte_level, MARKED), (spaced, WITH_BOS)])
def test_what_a_reward_model_scores(rows, make, template, tmp_path):
    theirs = [[row["chosen_ids"], row["rejected_ids"]] for row in trl("Reward", rows, make(template), tmp_path)]
    found = ours(rows, make(template), tmp_path, Scored(), prompt_format="raw")
    assert [[ids[:-1] for ids, _ in unit] for unit in found] == theirs  # less the token that stands for the score


def first_rows(data_sets, count):
    """Rows of a set of preferences, with answers as TRL takes them."""
    path = data_sets / "preference_helpful" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [{"prompt": r["prompt"], "chosen": [answer(r["chosen"])], "rejected": [answer(r["rejected"])]} for r in rows]


def test_pairs_of_a_set(data_sets, tmp_path):
    """Ids are TRL's wherever no token crosses from the prompt into the answer, and the text is in any case."""
    rows, tokenizer = first_rows(data_sets, 40), byte_level(CHATML)
    found, theirs = ours(rows, tokenizer, tmp_path, max_length=1 << 16), pairs(rows, tokenizer, tmp_path)
    same = 0
    for unit, other in zip(found, theirs, strict=True):
        for (ids, trained), (their_ids, _) in zip(unit, other, strict=True):
            assert tokenizer.decode(ids) == tokenizer.decode(their_ids)
            prompt = [token for token, is_trained in zip(ids, trained, strict=True) if not is_trained]
            assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
        same += unit == other
    assert same > 0.9 * len(rows)


def test_scored_texts_of_a_set(data_sets, tmp_path):
    rows, tokenizer = first_rows(data_sets, 40), byte_level(CHATML)
    theirs = [[row["chosen_ids"], row["rejected_ids"]] for row in trl("Reward", rows, tokenizer, tmp_path)]
    found = ours(rows, tokenizer, tmp_path, Scored(), max_length=1 << 16)
    assert [[ids[:-1] for ids, _ in unit] for unit in found] == theirs
