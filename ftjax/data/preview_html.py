"""The page that `ftjax preview --html` writes: one self-contained file."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from ftjax.data.report import DataReport
from ftjax.data.report_html import report_html
from ftjax.data.shown import Shown
from ftjax.page.document import details, page, table

Bins = Sequence[tuple[int, int, int]]
PARTING = '; <span class="p">where the two documents of a row part</span>'


def write_html(path: Path, shown: Sequence[Sequence[Shown]], sets: Mapping[str, tuple[DataReport, Bins]]) -> None:
    """Write the page. Raises OSError if the file cannot be written."""
    body = [
        "<h1>What the model will see</h1>",
        '<p><span class="t">trained</span>, <span class="w">trained with another weight than 1</span>, or context alone'
        f"{PARTING if any(len(items) > 1 for items in shown) else ''}. "
        "Each box is a token; its number, id, weight and position are shown when the pointer rests on it, or it is touched or "
        "reached with the Tab key, and are in the table below.</p>",
        *(section for number, items in enumerate(shown, 1) for section in _example(items, number)),
        *(section for name, (report, bins) in sets.items() for section in report_html(name, report, bins)),
    ]
    path.write_text(page("ftjax preview", body), encoding="utf-8")


def _example(items: Sequence[Shown], number: int) -> list[str]:
    """Return a section for the documents of a row."""
    first = items[0]
    if not first.caption:
        return [f"<h2>Example {number}: {_told(first)}</h2>", *_tokens(first)]
    return [
        f"<h2>Example {number}</h2>",
        *(part for item in items for part in (f"<h3>{escape(item.caption)}: {_told(item)}</h3>", *_tokens(item))),
    ]


def _told(item: Shown) -> str:
    place = f", row {item.row}, segment {item.segment}" if item.row is not None else ""
    parting = f", differs from token {item.parts_at} on" if item.parts_at is not None else ""
    return f"{escape(item.where)}: {len(item.ids):,} tokens, {item.trained:,} trained{place}{parting}"


def _tokens(item: Shown) -> list[str]:
    tokens, rows = [], []
    for at, (token, text, weight) in enumerate(zip(item.ids, item.texts, item.weights, strict=True)):
        kind = "t" if weight == 1 else "w" if weight > 0 else "c"
        parts = at == item.parts_at
        told = f"token {at}, id {token}, weight {weight:g}, segment {item.segment or 1}, position {at}"
        told += ", where the two part" if parts else ""
        seen = text.replace("\n", "⏎\n") or "·"
        tokens.append(f'<span class="{kind}{" p" if parts else ""}" tabindex="0" title="{told}">{escape(seen)}</span>')
        rows.append((str(at), seen, str(token), f"{weight:g}", str(item.segment or 1)))
    each = table(("position", "text", "id", "weight", "segment"), rows)
    return [f'<div class="document">{"".join(tokens)}</div>', details("Its tokens as a table", each)]
