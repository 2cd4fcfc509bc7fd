"""Preferences on disk, and what they become."""

import json

from data_sets import write_rows
from data_tokenizers import byte_level

from ftjax.config.data import DataConfig
from ftjax.data.pairs import Pairs
from ftjax.data.pipeline import load_splits


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def both(path, encoding=None, tokenizer=None, **options):
    options = {"max_length": 256, "train": str(path)} | options
    return load_splits(DataConfig(**options), tokenizer or byte_level(), seed=0, encoding=encoding or Pairs())


def load(path, encoding=None, tokenizer=None, **options):
    return both(path, encoding, tokenizer, **options)[0]


def units(split):
    """The documents of each row that is kept, in order."""
    size = split.sequences
    documents = [split.documents.document(number) for number in split.chosen]
    return [documents[at : at + size] for at in range(0, len(documents), size)]


def parts(document, tokenizer):
    """`(what is not trained, what is)` of a document, each as the text of its tokens."""
    return tuple(tokenizer.decode(document.tokens[document.weights.astype(bool) == trained]) for trained in (False, True))


def balanced(report):
    assert report.examples == report.kept + sum(report.dropped.values()) + report.held_out
    return report


def talk(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def labelled(prompt, completion, label, **more):
    return {"prompt": prompt, "completion": completion, "label": label, **more}


def write_pairs(path, count, seed=0):
    """Preference rows of unlike lengths."""
    rows = [json.loads(line) for line in write_rows(path, count, seed).read_text().splitlines()]
    return write(
        path, *({"prompt": row["prompt"], "chosen": row["completion"], "rejected": f" no {n}"} for n, row in enumerate(rows))
    )
