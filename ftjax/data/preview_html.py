"""The page that `ftjax preview --html` writes: one self-contained file."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ftjax.data.report import DataReport
from ftjax.data.report_html import report_html
from ftjax.page.document import details, page, table

Bins = Sequence[tuple[int, int, int]]


def write_html(path: Path, shown: Sequence[Any], sets: Mapping[str, tuple[DataReport, Bins]]) -> None:
    """Write the page. Raises OSError if the file cannot be written."""
    body = [
        "<h1>What the model will see</h1>",
        '<p><span class="t">trained</span>, <span class="w">trained with another weight than 1</span>, or context alone. '
        "Each box is a token; its number, id, weight and position are shown when the pointer rests on it, or it is touched or "
        "reached with the Tab key, and are in the table below.</p>",
        *(section for number, item in enumerate(shown, 1) for section in _example(item, number)),
        *(section for name, (report, bins) in sets.items() for section in report_html(name, report, bins)),
    ]
    path.write_text(page("ftjax preview", body), encoding="utf-8")


def _example(item: Any, number: int) -> list[str]:
    place = f", row {item.row}, segment {item.segment}" if item.row is not None else ""
    tokens, rows = [], []
    for at, (token, text, weight) in enumerate(zip(item.ids, item.texts, item.weights, strict=True)):
        kind = "t" if weight == 1 else "w" if weight > 0 else "c"
        told = f"token {at}, id {token}, weight {weight:g}, segment {item.segment or 1}, position {at}"
        seen = text.replace("\n", "⏎\n") or "·"
        tokens.append(f'<span class="{kind}" tabindex="0" title="{told}">{escape(seen)}</span>')
        rows.append((str(at), seen, str(token), f"{weight:g}", str(item.segment or 1)))
    head = f"Example {number}: {escape(item.where)}: {len(item.ids):,} tokens{place}"
    each = table(("position", "text", "id", "weight", "segment"), rows)
    return [f"<h2>{head}</h2>", f'<div class="document">{"".join(tokens)}</div>', details("Its tokens as a table", each)]
