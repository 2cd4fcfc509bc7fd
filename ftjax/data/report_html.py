"""A `DataReport` as HTML."""

from collections.abc import Sequence
from html import escape

from ftjax.data.report import DataReport
from ftjax.page.chart import histogram_chart
from ftjax.page.document import table


def report_html(name: str, report: DataReport, bins: Sequence[tuple[int, int, int]], heading: str = "h2") -> list[str]:
    """Return HTML with the counts, the warnings and a chart of the lengths; `bins` come from `histogram`."""
    rows = [
        ("rows read", report.rows),
        *([("pairs made of two rows", report.joined)] if report.joined else []),
        *([("pairs made two answers", report.divided)] if report.divided else []),
        ("kept", report.kept), ("documents", report.documents),
        *((f"truncated ({policy})", count) for policy, count in report.truncated.items()),
        *((f"dropped: {reason}", count) for reason, count in report.dropped.items()),
        *([("held out for validation", report.held_out)] if report.held_out else []),
        ("tokens", report.tokens), ("trained tokens", report.trained_tokens), ("rows of an epoch", report.packed_rows),
    ]  # fmt: skip
    efficiency = ("packing efficiency" if report.packing else "tokens that are not padding", f"{100 * report.efficiency:.1f} %")
    return [
        f"<{heading}>{escape(name)}: {escape(report.source)}</{heading}>",
        *(f'<p class="warning">Warning: {escape(warning)}</p>' for warning in report.warnings),
        table((), [*((label, f"{value:,}") for label, value in rows), efficiency]),
        histogram_chart(f"{name}: lengths of the documents", bins, "tokens, from", "documents"),
    ]
