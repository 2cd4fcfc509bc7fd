#!/usr/bin/env python3
"""Computes ROUGE of a baseline without a model: the first sentence of the document as its summary.

    python scripts/lead_sentence.py configs/summarization.yaml [key=value ...]

Scores the rows that `ftjax evaluate` of the same configuration takes (`evaluate.data`, `evaluate.limit`) with the same metrics
and intervals, so that base model, tuned model and this baseline can be compared. No model is loaded.
"""

import re
import sys
from collections.abc import Sequence

from ftjax.config.load import load_config
from ftjax.errors import UserError
from ftjax.evaluate.rows import Item, read_items
from ftjax.evaluate.statistic import Interval, format_interval, intervals
from ftjax.evaluate.tasks.overlap import rouge

END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")  # an abbreviation before a capital ends a sentence too


def first_sentence(text: str) -> str:
    return END.split(text.strip(), maxsplit=1)[0]


def document(item: Item) -> str:
    """Return the row's document. Raises UserError if it has none."""
    found = item.values.get("document")
    if not isinstance(found, str):
        raise UserError(f"{item.where}: expected a column 'document', found {', '.join(item.values)}")
    return found


def lead_rouge(config_file: str, overrides: Sequence[str] = ()) -> tuple[int, dict[str, Interval]]:
    """Return `(rows, the intervals of rouge1, rouge2 and so on)`."""
    config = load_config(config_file, overrides)
    settings = config.evaluate
    items, _ = read_items(config, settings.limit)
    scores = rouge(items, [first_sentence(document(item)) for item in items], settings)
    found = intervals(scores, confidence=settings.confidence, resamples=settings.resamples, seed=settings.seed)
    return len(items), found


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        rows, metrics = lead_rouge(sys.argv[1], sys.argv[2:])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"the first sentence of {rows} documents")
    for name, one in metrics.items():
        print(f"{name}  {format_interval(one)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
