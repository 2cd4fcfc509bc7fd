"""Rows to evaluate on, read and formatted as in training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftjax.config import Config
from ftjax.config.data import SourceConfig
from ftjax.data.classes import find_labels
from ftjax.data.clean import normalizer
from ftjax.data.example import Example
from ftjax.data.faults import Faults
from ftjax.data.find import find
from ftjax.data.labels import Labels
from ftjax.data.reader import read_source
from ftjax.data.rollout import as_prompt
from ftjax.data.values import EmptyRow
from ftjax.errors import UserError
from ftjax.objectives import encoding_of


@dataclass(frozen=True)
class Item:
    """One row: as an example, and as in its file."""

    example: Example
    values: Mapping[str, Any]

    @property
    def where(self) -> str:
        return self.example.where

    @property
    def references(self) -> tuple[str, ...]:
        """Answers to compare with. Raises UserError if the row has none."""
        if not self.example.references:
            raise UserError(f"{self.where}: the row has no answer to compare with; evaluate.task: loss needs none")
        return self.example.references

    @property
    def label(self) -> str:
        return self.references[0].strip()


Places = frozenset[tuple[int, str]]  # of rows: the index of their source, and file and line


def splits_off(config: Config) -> bool:
    """Return whether to evaluate on rows split off the training data."""
    return config.evaluate.data is None and config.data.validation_split is not None


def sources(config: Config) -> list[SourceConfig]:
    """Return the sources of the rows, with `data`'s formats, columns and templates. Raises UserError if none is named."""
    if splits_off(config):
        return config.data.sources("train")
    given = config.evaluate.data if config.evaluate.data is not None else config.data.validation
    if given is None:
        raise UserError("evaluate: there is no data; name it with --data FILE, evaluate.data or data.validation")
    return config.data.model_copy(update={"validation": given}).sources("validation")


def labels_of(config: Config) -> Labels | None:
    """Return the labels and how rows write them: as found in training, or, for a model without a run, in the rows."""
    labels = Labels.of(config.objective)
    if labels is None or labels.single or (labels.names and (labels.form != "auto" or labels.problem_type == "regression")):
        return labels
    names, form = find_labels(sources(config), config.data, labels)
    return replace(labels, names=tuple(names), form=form)


def read_items(config: Config, limit: int | None = None, only: Places | None = None) -> tuple[list[Item], int]:
    """Return `(rows, number of broken, empty or unwanted rows left out)`.

    Args:
        only: the rows to return; the others do not count as left out.
        limit: the most rows to return, evenly spaced, so that the order of classes in a file does not matter.

    Raises UserError, with file and line, for a wrong row, unless `data.on_error` skips it.
    """
    found, left_out = items_of(sources(config), config, only, labels_of(config))
    if limit is not None and limit < len(found):
        found = [found[i] for i in np.linspace(0, len(found) - 1, limit).round().astype(int)]
    return found, left_out


def items_of(
    sources: Sequence[SourceConfig], config: Config, only: Places | None = None, labels: Labels | None = None
) -> tuple[list[Item], int]:
    """Return the rows of these sources and how many are left out; see `read_items`.

    Rows of an objective that generates all answers are read as prompts.
    """
    faults, empty, found = Faults(config.data.on_error == "skip"), 0, []
    normalize, prompts = normalizer(config.data), not encoding_of(config).imitated
    options: dict[str, Any] = {"normalize": normalize, "label": labels and labels.read}
    options["prefers"] = encoding_of(config).formats if prompts else ()
    for number, source in enumerate(sources):
        for reader, row in read_source(source, faults, found=find(source), **options):
            try:
                example = reader(row).with_source(number, *config.data.reading)
                example = as_prompt(example) if prompts else example
            except EmptyRow as error:
                empty += 1
                if not config.data.drop_empty:
                    faults(error)
                    empty -= 1
                continue
            except UserError as error:
                faults(error)
                continue
            if not example.wanted:  # an undesirable answer of an unpaired preference is no reference
                empty += 1
                continue
            if only is None or (number, example.where) in only:
                found.append(Item(example, row.values))
    if not found:
        first = f" (the first: {faults.messages[0]})" if faults.messages else ""
        raise UserError(f"evaluate: no row is left of {sources[0].path}{first}")
    return found, 0 if only is not None else faults.count + empty
