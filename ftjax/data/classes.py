"""Texts with a class, for a classification head.

The class stands as one more token behind the text, where a causal model cannot see it from: packing, which makes each token the
target of the one before, so lets the last token of the text predict it. The text `Hi there` of the class 2 is

    tokens   1 12 57  2        targets  12 57  2  0
                               weights   0  0  1  0
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftjax.config import Config
from ftjax.config.data import DataConfig
from ftjax.data.clean import normalizer
from ftjax.data.encode import Encoded, Encoder, NoWay, _Plan
from ftjax.data.example import Example
from ftjax.data.faults import Faults
from ftjax.data.find import find
from ftjax.data.formats import Reader
from ftjax.data.read import read_rows
from ftjax.data.truncate import truncate
from ftjax.errors import UserError

MOST = 200  # classes that are found in data; more are answers, not classes


def label_of(example: Example) -> str:
    """UserError where a row has no answer."""
    if not example.references:
        raise UserError(f"{example.where}: the row has no label; expected columns such as text and label")
    return example.references[0].strip()


def text_of(example: Example) -> str:
    """What a classifier reads: one text, as it stands in the row, without a template. UserError for a conversation."""
    if example.messages is None:
        if example.prompt is None:
            raise UserError(f"{example.where}: a classification head needs a text and its label; found no prompt")
        return example.prompt
    question = [message for message in example.messages if message["role"] != "assistant"]
    if len(question) != 1 or not isinstance(question[0].get("content"), str):
        raise UserError(
            f"{example.where}: a classification head reads one text, and the row has {len(question)} messages before its "
            "label; leave objective.head out, or give the text as one column"
        )
    return question[0]["content"]


@dataclass
class ClassEncoder(Encoder):
    """Encodes texts as transformers' tokenizers do for classifiers, with what they put before a text and without an EOS."""

    classes: tuple[str, ...] = ()

    def _plan(self, example: Example) -> _Plan:
        label = label_of(example)
        if label not in self.classes:
            raise UserError(f"{example.where}: the label {label!r} is not in objective.labels: {', '.join(self.classes)}")
        return _Plan(example, text_of(example), [])

    def _ready(self, example: Example) -> Encoded:
        raise NoWay(f"{example.where}: a classification head needs text, not input_ids")

    def _encode(self, plan: _Plan, encoding: Any) -> Encoded:
        ids = self.tokens.with_prefix(encoding.ids)
        if not ids:
            raise NoWay(f"{plan.example.where}: the text has no token")
        weights = np.zeros(len(ids) + 1, np.float32)
        weights[-1] = 1.0
        number = self.classes.index(label_of(plan.example))
        return Encoded(np.array([*ids, number], np.int32), weights, plan.example.where, plan.example.source)


def make_encoder(tokenizer: Any, config: DataConfig, classes: Sequence[str] | None = None) -> Encoder:
    """For answers, or for the classes of a head."""
    if classes is not None:
        return ClassEncoder(tokenizer, classes=tuple(classes))
    return Encoder(tokenizer, config.train_on_inputs, config.last_turn_only)


def cut(document: Encoded, config: DataConfig, encoder: Encoder) -> Sequence[Encoded]:
    """What a document that is longer than `max_length` becomes (`ftjax.data.truncate`); a class stays behind its text."""
    if not isinstance(encoder, ClassEncoder):
        return truncate(document, config.max_length, config.truncation, encoder.tokens.bos)
    if config.truncation == "split":
        raise UserError(
            "data.truncation: split would give every part of a text the class of the whole; choose right, left or drop"
        )
    text = replace(document, tokens=document.tokens[:-1], weights=document.weights[:-1])
    pieces = [text]
    if config.max_length - 1 < len(text.tokens):
        pieces = truncate(text, config.max_length - 1, config.truncation, encoder.tokens.bos)
    return [
        replace(
            piece, tokens=np.append(piece.tokens, document.tokens[-1]), weights=np.append(piece.weights, document.weights[-1])
        )
        for piece in pieces
    ]


def with_labels(config: Config) -> Config:
    """The configuration with the labels of its classification; another objective's as it is."""
    if config.objective.name != "classification":
        return config
    labels = find_labels(config.data, config.objective.labels)
    changes = {"objective": config.objective.model_copy(update={"labels": labels})}
    if config.evaluate.labels is None:
        changes["evaluate"] = config.evaluate.model_copy(update={"labels": labels})
    return config.model_copy(update=changes)


def find_labels(config: DataConfig, given: Sequence[str] | None) -> list[str]:
    """The classes of the training data in alphabetical order, or those that are given, where all rows have one of them.

    Raises UserError for a row with another one, and where there are too many or too few to be classes.
    """
    faults, normalize, found = Faults(config.on_error == "skip"), normalizer(config.unicode_normalization), {}
    for source in config.sources("train"):
        reader = None
        for row in read_rows(source, faults, found=find(source)):
            reader = reader or Reader(source, row, normalize)
            try:
                example = reader(row)
            except UserError:
                continue  # counted, or an error, when it is tokenised
            label = label_of(example)
            if given is not None and label not in given:
                raise UserError(f"{example.where}: the label {label!r} is not in objective.labels: {', '.join(given)}")
            found.setdefault(label, example.where)
            if len(found) > MOST:
                raise UserError(
                    f"objective classification: more than {MOST} different labels, such as {', '.join(list(found)[:3])}; are "
                    "these classes? Then name them in objective.labels"
                )
    if given is None and len(found) < 2:
        raise UserError(
            f"objective classification: all rows have the label {next(iter(found), None)!r}; name the classes "
            "in objective.labels"
        )
    return list(given) if given is not None else sorted(found)
