"""Runs side by side on one page: figures, settings that differ, curves laid over one another, and metrics with intervals."""

from collections.abc import Iterable, Mapping
from html import escape
from itertools import groupby

from ftjax.page.chart import interval_chart, line_chart
from ftjax.page.document import details, keys, page, section, table
from ftjax.report.compare import bounds, figures, metric_rows, metrics, settings
from ftjax.report.curves import DRAWN, NOT_DRAWN, PICTURES, RATE
from ftjax.report.read import Run
from ftjax.report.setup import configuration, warnings


def comparison(runs: Mapping[str, Run]) -> str:
    """Return the whole page."""
    body = [
        f"<header><h1>{escape(', '.join(runs))}</h1><p class=soft>{len(runs)} runs side by side</p></header>",
        keys(list(runs)),
        "<main>",
        *section("Key figures", [table(["", *runs], figures(runs), numbers=False)]),
        *section("What differs in the settings", _settings(runs)),
        *section("Curves", _curves(runs)),
        *section("Evaluations and checks", _metrics(runs)),
        *section("Warnings", _warnings(runs)),
        *section("Configurations", (details(name, *configuration(run)) for name, run in runs.items())),
    ]
    return page(f"{', '.join(runs)}: ftjax report", [*body, "</main>"])


def _settings(runs: Mapping[str, Run]) -> Iterable[str]:
    rows = settings(runs)
    return [table(["", *runs], rows, numbers=False)] if rows else ["<p>Nothing but the folder.</p>"]


def _curves(runs: Mapping[str, Run]) -> Iterable[str]:
    pictures = [
        (f"{title}: {label}" if len(series) > 1 else title, name)
        for title, series in PICTURES
        for label, name in series.items()
    ]
    others = dict.fromkeys(name for run in runs.values() for name in run.names("eval/"))
    pictures += [(name.removeprefix("eval/"), name) for name in others if name not in DRAWN and name not in NOT_DRAWN]
    drawn = []
    for title, name in pictures:
        series = {run: one.curve(name) for run, one in runs.items()}
        if title == RATE:
            series = {run: [(step, rate) for step, rate in points if rate > 0] for run, points in series.items()}
        drawn.append(line_chart(title, series))
    return [f'<div class="charts">{"".join(drawn)}</div>'] if any(drawn) else ["<p>There is no metric yet.</p>"]


def _metrics(runs: Mapping[str, Run]) -> Iterable[str]:
    for group, found in groupby(metrics(runs), key=lambda one: one.group):
        which = list(found)
        yield f"<h3>{escape(group)}</h3>"
        charts = [interval_chart(one.name, {run: bounds(one.found.get(run, {})) for run in runs}) for one in which]
        yield f'<div class="charts">{"".join(charts)}</div>' if group != "check" else ""
        yield table(*metric_rows(which, runs))


def _warnings(runs: Mapping[str, Run]) -> Iterable[str]:
    return [f'<p class="warning">{escape(name)}: {escape(words)}</p>' for name, run in runs.items() for words in warnings(run)]
