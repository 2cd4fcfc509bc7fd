"""The page that `ftjax preview --html` writes: one file that needs nothing else."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ftjax.data.report import DataReport

STYLE = """
:root { color-scheme: light dark; --trained: #bfe8c5; --other: transparent; --weighted: #f3e2a0; --line: #8884; }
@media (prefers-color-scheme: dark) { :root { --trained: #1d5a2a; --weighted: #6b5a10; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
.document { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: 6px; padding: .8rem; max-height: 32rem; overflow: auto; }
.document span { border-right: 1px solid var(--line); }
.t { background: var(--trained); } .w { background: var(--weighted); } .c { opacity: .5; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } .warning { color: #b3541e; }
svg rect { fill: #4a90d9; } svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
"""
Bins = Sequence[tuple[int, int, int]]


def write_html(path: Path, shown: Sequence[Any], sets: Mapping[str, tuple[DataReport, Bins]]) -> None:
    """Raises OSError where the file cannot be written."""
    body = [
        "<h1>What the model will see</h1>",
        '<p><span class="t">trained</span>, <span class="w">trained with another weight than 1</span>, or context alone. '
        "Each box is a token; its number, id, weight and position are shown when the pointer rests on it.</p>",
        *(section for number, item in enumerate(shown, 1) for section in _example(item, number)),
        *(section for name, (report, bins) in sets.items() for section in _report(name, report, bins)),
    ]
    title = "ftjax preview"
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>{''.join(body)}</html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _example(item: Any, number: int) -> list[str]:
    place = f", row {item.row}, segment {item.segment}" if item.row is not None else ""
    tokens = []
    for at, (token, text, weight) in enumerate(zip(item.ids, item.texts, item.weights, strict=True)):
        kind = "t" if weight == 1 else "w" if weight > 0 else "c"
        told = f"token {at}, id {token}, weight {weight:g}, segment {item.segment or 1}, position {at}"
        tokens.append(f'<span class="{kind}" title="{told}">{escape(text.replace(chr(10), "⏎" + chr(10))) or "·"}</span>')
    head = f"Example {number}: {escape(item.where)}: {len(item.ids):,} tokens{place}"
    return [f"<h2>{head}</h2>", f'<div class="document">{"".join(tokens)}</div>']


def _report(name: str, report: DataReport, bins: Bins) -> list[str]:
    rows = [
        ("rows read", report.rows), ("kept", report.kept), ("documents", report.documents),
        *((f"truncated ({policy})", count) for policy, count in report.truncated.items()),
        *((f"dropped: {reason}", count) for reason, count in report.dropped.items()),
        *([("held out for validation", report.held_out)] if report.held_out else []),
        ("tokens", report.tokens), ("trained tokens", report.trained_tokens), ("rows of an epoch", report.packed_rows),
    ]  # fmt: skip
    cells = "".join(f'<tr><th>{escape(label)}</th><td class="n">{value:,}</td></tr>' for label, value in rows)
    cells += f'<tr><th>packing efficiency</th><td class="n">{100 * report.efficiency:.1f} %</td></tr>'
    return [
        f"<h2>{escape(name)}: {escape(report.source)}</h2>",
        f"<table>{cells}</table>",
        *(f'<p class="warning">Warning: {escape(warning)}</p>' for warning in report.warnings),
        "<h3>Tokens a document</h3>",
        _picture(bins),
    ]


def _picture(bins: Bins) -> str:
    """Bars from left to right, as SVG."""
    if not bins:
        return ""
    width, height, foot = 900, 220, 34
    most, step = max(count for _, _, count in bins), width / len(bins)
    parts = []
    for number, (low, high, count) in enumerate(bins):
        tall = (height - foot - 16) * count / most
        x, y = number * step, height - foot - tall
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{tall:.1f}">'
            f"<title>{low:,} to {high:,} tokens: {count:,} documents</title></rect>"
            f'<text x="{x + step / 2:.1f}" y="{y - 4:.1f}" text-anchor="middle">{count:,}</text>'
            f'<text x="{x + step / 2:.1f}" y="{height - foot + 14}" text-anchor="middle">{low:,}</text>'
        )
    label = f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">tokens, from</text>'
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="histogram of token lengths">{"".join(parts)}{label}</svg>'
    )
