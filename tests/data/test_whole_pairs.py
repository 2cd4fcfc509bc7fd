"""A pair is one unit: nothing that is done to rows of data parts it."""

from collections import Counter, defaultdict, deque

import numpy as np
import pytest
from data_tokenizers import byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_sets import balanced, both, labelled, load, units, write, write_pairs

from ftjax.data.encode import Encoder
from ftjax.data.pairs import Pairs
from ftjax.data.reader import to_examples
from ftjax.data.row import Row
from ftjax.data.scored import Scored
from ftjax.data.truncate import truncate
from ftjax.data.unpaired import Unpaired
from ftjax.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# ---- duplicates ----

STORY = "once upon a time there was a little girl who loved to play in the park with all of her toys every single day "
STORY += "and when the night came she went home and her mother read her a story about a bear who could not sleep"


def test_a_pair_is_a_duplicate_as_a_whole(tmp_path):
    one = {"prompt": STORY, "chosen": " a", "rejected": " b"}
    rows = [one, {**one, "rejected": " c"}, one, {**one, "chosen": " b", "rejected": " a"}, {**one, "margin": 2}]
    report = balanced(load(write(tmp_path / "a.jsonl", *rows), deduplicate="exact", max_length=1024).report)
    assert (report.kept, dict(report.dropped)) == (4, {"exact duplicates": 1})
    report = balanced(load(tmp_path / "a.jsonl", deduplicate="near", max_length=1024).report)
    assert (report.kept, dict(report.dropped)) == (1, {"exact duplicates": 1, "near duplicates": 3})


def test_a_wanted_answer_is_no_near_duplicate_of_an_unwanted_one(tmp_path):
    """They are alike in their prompt, and the label is what they teach."""
    rows = [labelled(STORY, " a", True), labelled(STORY, " b", False), labelled(STORY, " c", True)]
    for encoding, kept in ((Pairs(), 1), (Unpaired(), 2)):
        split = load(write(tmp_path / "a.jsonl", *rows), encoding, deduplicate="near", max_length=1024)
        assert balanced(split.report).kept == kept and split.report.dropped["near duplicates"] == 1


# ---- a pair is one unit ----


def row_strategy():
    words = st.integers(0, 9)
    preference = st.tuples(st.just("preference"), st.integers(0, 2), words, words)
    return st.lists(
        st.one_of(preference, st.tuples(st.sampled_from([True, False]), st.integers(0, 2), words, words)),
        min_size=1,
        max_size=9,
    )


def as_row(number, kind, prompt, first, second):
    prompt = f"{prompt}{' time' * (3 * prompt)}"
    if kind == "preference":
        return {"prompt": prompt, "chosen": f" {number}{' a' * first}", "rejected": f" {number}x{' b' * second}"}
    return labelled(prompt, f" {number}{' c' * first}", kind)


def expected(rows, tokenizer, length, policy):
    """The pairs of rows as documents, found by hand."""
    texts, waiting = [], defaultdict(deque)
    for row in rows:
        if "chosen" in row:
            texts.append((row["prompt"], row["chosen"], row["rejected"]))
            continue
        others = waiting[row["prompt"], not row["label"]]
        if others:
            pair = (row["completion"], others.popleft())
            texts.append((row["prompt"], *(pair if row["label"] else pair[::-1])))
        else:
            waiting[row["prompt"], row["label"]].append(row["completion"])
    found = Counter()
    for prompt, *answers in texts:
        examples = to_examples([Row({"prompt": prompt, "completion": text}, "a:1") for text in answers])
        unit = Encoder(tokenizer)(list(examples))
        lengths = [len(document.tokens) for document in unit]
        if sum(lengths) > length:
            half = length // 2
            room = [max(half, length - lengths[1]), max(half, length - lengths[0])]
            if policy == "drop":
                continue
            unit = [d if len(d.tokens) <= r else truncate(d, r, policy, None)[0] for d, r in zip(unit, room, strict=True)]
        said = [(tuple(d.tokens.tolist()), tuple(d.weights[1:].tolist())) for d in unit]
        if all(any(weights) for _, weights in said) and said[0][0] != said[1][0]:
            found[tuple(said)] += 1
    return found


def seen_in(batches):
    """The pairs of every row of a batch: segments 1 and 2, 3 and 4, ..."""
    found = Counter()
    for batch in batches:
        for tokens, weights, segments in zip(batch["tokens"], batch["weights"], batch["segment_ids"], strict=True):
            count = int(segments.max())
            assert count % 2 == 0
            said = [
                (tuple(tokens[segments == n].tolist()), tuple(weights[segments == n][:-1].tolist()))
                for n in range(1, count + 1)
            ]
            found.update(zip(said[::2], said[1::2], strict=True))
    return found


@settings(max_examples=80)
@given(
    rows=row_strategy(),
    length=st.integers(8, 80),
    policy=st.sampled_from(["drop", "right", "left", "middle"]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "packing": st.just(False),
            "shuffle": st.just(False),
            "streaming": st.just(True),
            "mix_epochs": st.just(True),
        },
    ),
    share=st.sampled_from([None, 0.4, 1]),
    batch_size=st.integers(1, 3),
)
def test_nothing_parts_a_pair(rows, length, policy, options, share, batch_size, own_cache, tmp_path_factory):
    """Whatever is done to the rows, batches hold whole pairs, chosen first, each once an epoch, and no others."""
    tokenizer = byte_level()
    rows = [as_row(number, *row) for number, row in enumerate(rows)]
    kinds = [[row for row in rows if "chosen" in row], [row for row in rows if "label" in row]]
    folder = tmp_path_factory.mktemp("rows")
    files = [str(write(folder / f"{n}.jsonl", *kind)) for n, kind in enumerate(kinds) if kind]
    wanted = expected([row for kind in kinds for row in kind], tokenizer, length, policy)
    if options.get("packing") is False or options.get("streaming"):
        options.pop("mix_epochs", None)
    if options.get("streaming"):
        options.pop("packing", None)
        share = None
    if len(wanted) < 2 or (share == 1 and sum(wanted.values()) < 2):
        share = None
    config = {"train": files, "max_length": length, "truncation": policy, "validation_split": share, **options}
    if not wanted:
        with pytest.raises(UserError, match="is left"):
            both(folder, tokenizer=tokenizer, **config)
        return
    splits = [split for split in both(folder, tokenizer=tokenizer, **config) if split is not None]
    assert len(splits) == 1 + (share is not None)
    seen = Counter()
    for split in splits:
        seen += seen_in(split.batches(batch_size, seed=0, shuffle=True, epochs=1))
        balanced(split.report)
    assert seen == wanted


@pytest.mark.parametrize("encoding", [Pairs(), Unpaired(), Scored()])
def test_processes_that_encode(encoding, tmp_path):
    """More rows than one chunk: what several processes made is what one made."""
    path = write_pairs(tmp_path / "a.jsonl", 1300)
    one, several = load(path, encoding, max_length=96), load(path, encoding, max_length=95, num_proc=2)
    assert one.report.kept == several.report.kept == 1300 * (2 if isinstance(encoding, Unpaired) else 1)
    for mine, theirs in zip(units(one), units(several), strict=True):
        assert [d.tokens.tolist() for d in mine] == [d.tokens.tolist() for d in theirs]


def test_weights_of_a_mixture(tmp_path):
    """Weights count pairs."""
    one, other = write_pairs(tmp_path / "a.jsonl", 8, 1), write_pairs(tmp_path / "b.jsonl", 8, 2)
    sources = [{"path": str(one), "weight": 2}, {"path": str(other), "weight": 0.5}]
    split = load(tmp_path, train=sources, max_length=96)
    counts = [seen_in(split.batches(2, seed=0, shuffle=True, epochs=epochs)) for epochs in (1, 2)]
    assert sum(counts[0].values()) == 20 and sum(counts[1].values()) == 40
    assert sorted(counts[1].values()) == [1] * 8 + [4] * 8, "the other half comes in the second epoch"
    stream = load(tmp_path, train=sources, max_length=96, streaming=True)
    assert set(seen_in(stream.batches(2, seed=0, shuffle=True, epochs=2))) == set(counts[1])


def test_half_of_a_stream_would_part_pairs(tmp_path):
    rows = [labelled(f"P{n // 2}", f" {n}", n % 2 == 0) for n in range(12)]
    path = write(tmp_path / "a.jsonl", *rows)
    whole = load(tmp_path, train=[{"path": str(path), "weight": 2}], streaming=True)
    assert sum(seen_in(whole.batches(2, seed=0, shuffle=True, epochs=1)).values()) == 12
    half = load(tmp_path, train=[{"path": str(path), "weight": 0.5}])
    assert sum(seen_in(half.batches(2, seed=0, shuffle=True, epochs=1)).values()) == 3
    with pytest.raises(UserError, match=r"a.jsonl: a fractional weight of a streamed set .* would separate the two answers"):
        load(tmp_path, train=[{"path": str(path), "weight": 1.5}], streaming=True)


def test_the_rows_of_a_process_hold_whole_pairs(tmp_path):
    split = load(write_pairs(tmp_path / "a.jsonl", 40), max_length=64)
    every = seen_in(split.batches(4, seed=0, shuffle=True, epochs=1))
    halves = [seen_in(split.batches(4, seed=0, shuffle=True, epochs=1, rows=rows)) for rows in ([0, 3], [1, 2])]
    assert halves[0] + halves[1] == every and all(halves)


def test_a_place_in_a_stream_of_labelled_rows(tmp_path):
    """A run goes on with the pairs that a run without a break has there."""
    rng = np.random.default_rng(0)
    rows = [labelled(f"P{rng.integers(6)}", f" {n}", bool(rng.integers(2))) for n in range(60)]
    split = load(write(tmp_path / "a.jsonl", *rows), streaming=True, max_length=48)
    split.window_rows = 7
    batches = split.batches(2, seed=0, shuffle=True, epochs=2)
    states = [batches.get_state()]
    found = [(seen_in([batch]), states.append(batches.get_state()))[0] for batch in batches]
    assert len({state["window"] for state in states}) > 2 and states[-1]["epoch"] == 1
    for at in (1, len(found) // 2, len(found) - 1):
        again = split.batches(2, seed=0, shuffle=True, epochs=2)
        again.set_state(states[at])
        assert [seen_in([batch]) for batch in again] == found[at:]
