"""The page that `ftjax preview --html` writes: one file that needs nothing else."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ftjax.data.report import DataReport
from ftjax.data.report_html import report_html
from ftjax.page.document import page

Bins = Sequence[tuple[int, int, int]]


def write_html(path: Path, shown: Sequence[Any], sets: Mapping[str, tuple[DataReport, Bins]]) -> None:
    """Raises OSError where the file cannot be written."""
    body = [
        "<h1>What the model will see</h1>",
        '<p><span class="t">trained</span>, <span class="w">trained with another weight than 1</span>, or context alone. '
        "Each box is a token; its number, id, weight and position are shown when the pointer rests on it.</p>",
        *(section for number, item in enumerate(shown, 1) for section in _example(item, number)),
        *(section for name, (report, bins) in sets.items() for section in report_html(name, report, bins)),
    ]
    path.write_text(page("ftjax preview", body), encoding="utf-8")


def _example(item: Any, number: int) -> list[str]:
    place = f", row {item.row}, segment {item.segment}" if item.row is not None else ""
    tokens = []
    for at, (token, text, weight) in enumerate(zip(item.ids, item.texts, item.weights, strict=True)):
        kind = "t" if weight == 1 else "w" if weight > 0 else "c"
        told = f"token {at}, id {token}, weight {weight:g}, segment {item.segment or 1}, position {at}"
        tokens.append(f'<span class="{kind}" title="{told}">{escape(text.replace(chr(10), "⏎" + chr(10))) or "·"}</span>')
    head = f"Example {number}: {escape(item.where)}: {len(item.ids):,} tokens{place}"
    return [f"<h2>{head}</h2>", f'<div class="document">{"".join(tokens)}</div>']
