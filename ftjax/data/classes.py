"""Texts with a class label, for a classification head.

The class is appended to the text as one more token, which a causal model cannot see from earlier positions: packing makes
each token the target of the one before, so the last token of the text predicts the class. The text `Hi there` of class 2 is

    tokens   1 12 57  2        targets  12 57  2  0
                               weights   0  0  1  0

Several labels, or the numbers of a regression, are a vector beside the tokens (`Encoded.labels`), and the token is 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ftjax.config import Config
from ftjax.config.data import DataConfig, SourceConfig
from ftjax.data.clean import normalizer
from ftjax.data.encoder import Encoded, NoWay, RowEncoder, TextPlan, Unit
from ftjax.data.encoding import RowEncoding
from ftjax.data.example import Example
from ftjax.data.faults import Faults
from ftjax.data.find import find
from ftjax.data.labels import Labels, Survey
from ftjax.data.reader import read_source
from ftjax.data.truncate import truncate
from ftjax.data.values import EmptyRow
from ftjax.errors import UserError


def label_of(example: Example) -> str:
    """Return the label of an example. Raises UserError if the row has no answer or several."""
    if len(example.references) != 1:
        found = f"{len(example.references)} labels, expected one" if example.references else "no label"
        raise UserError(f"{example.where}: the row has {found}; expected columns such as text and label")
    return example.references[0].strip()


def text_of(example: Example) -> str:
    """Return the text for the classifier as it is in the row, without a template. Raises UserError for a conversation."""
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
class ClassEncoder(RowEncoder):
    """Encodes texts as transformers' tokenizers do for classifiers, with what they put before a text and without an EOS."""

    labels: Labels

    def plan(self, example: Example) -> Sequence[TextPlan]:
        """Plan one text; see `RowEncoder.plan`."""
        if example.input_ids is not None:
            raise NoWay(f"{example.where}: a classification head needs text, not input_ids")
        label = label_of(example)
        if self.labels.single and label not in self.labels.names:
            raise UserError(f"{example.where}: the label {label!r} is not in objective.labels: {', '.join(self.labels.names)}")
        return [TextPlan(example, text_of(example), [])]

    def encode(self, plan: TextPlan, encodings: list[Any]) -> Encoded:
        """Return the document of a text with its class token or its labels."""
        ids = self.tokens.with_prefix(encodings[-1].ids)
        if not ids:
            raise NoWay(f"{plan.example.where}: the text has no token")
        weights = np.zeros(len(ids) + 1, np.float32)
        weights[-1] = 1.0
        label, vector = label_of(plan.example), None
        if not self.labels.single:
            vector = self.labels.vector(label)
        number = self.labels.names.index(label) if vector is None else 0
        return Encoded(np.array([*ids, number], np.int32), weights, plan.example.where, plan.example.source, vector)


@dataclass(frozen=True)
class TextLabels(RowEncoding):
    """Each row is a text whose labels a classification head predicts."""

    labels: Labels

    answers = False

    @property
    def values(self) -> int:
        """Numbers besides the tokens: none for a single class, which is a token."""
        return 0 if self.labels.single or self.labels.names is None else len(self.labels.names)

    def key(self) -> Any:
        return asdict(self.labels)

    @property
    def label_reader(self) -> Callable[[Any, str], Any]:
        return self.labels.read

    def encoder(self, tokenizer: Any, config: DataConfig) -> ClassEncoder:
        return ClassEncoder(tokenizer, self.labels)

    def shorten(self, unit: Unit, config: DataConfig, bos: int | None) -> Sequence[Encoded]:
        """Truncate the text and keep its class after it."""
        [document] = unit
        if config.truncation == "split":
            raise UserError(
                "data.truncation: split would give every part of a text the class of the whole; choose right, left or drop"
            )
        text = replace(document, tokens=document.tokens[:-1], weights=document.weights[:-1])
        pieces = [text]
        if config.max_length - 1 < len(text.tokens):
            pieces = truncate(text, config.max_length - 1, config.truncation, bos)
        return [
            replace(
                piece,
                tokens=np.append(piece.tokens, document.tokens[-1]),
                weights=np.append(piece.weights, document.weights[-1]),
            )
            for piece in pieces
        ]

    def label_text(self, document: Encoded) -> str:
        return self.labels.words(int(document.tokens[-1]), document.labels)


def with_labels(config: Config) -> Config:
    """Return the configuration with the labels of its classification and their format; other objectives stay unchanged.

    Raises UserError for values that are not labels, for labels that are not among the configured ones, and for too many or
    too few labels.
    """
    if config.objective.name != "classification":
        return config
    asked = Labels.of(config.objective)
    if asked.names is not None and (asked.single or asked.form != "auto"):
        return config  # nothing left to find; encoding the rows reports labels that do not fit
    labels, form = find_labels(config.data.sources("train"), config.data, asked)
    changes = {"objective": config.objective.model_copy(update={"labels": labels, "label_format": form})}
    if config.evaluate.labels is None and config.objective.single:
        changes["evaluate"] = config.evaluate.model_copy(update={"labels": labels})
    return config.model_copy(update=changes)


def find_labels(sources: Sequence[SourceConfig], config: DataConfig, labels: Labels) -> tuple[list[str], str]:
    """Return the labels found in the rows, or the configured ones, and their format (`Survey.labels`)."""
    faults, normalize, survey = Faults(config.on_error == "skip"), normalizer(config), Survey(labels)
    for source in sources:
        for reader, row in read_source(source, faults, found=find(source), normalize=normalize, label=survey.read):
            try:
                example = reader(row)
                if not example.wanted:
                    continue
                label = label_of(example)
            except EmptyRow:
                continue  # tokenising counts it or raises the error
            except UserError as error:
                faults(error)
                continue
            if not labels.single:
                continue
            if labels.names is not None and label not in labels.names:
                raise UserError(f"{row.where}: the label {label!r} is not in objective.labels: {', '.join(labels.names)}")
            survey.see(label, row.where)
    return survey.labels()
