"""`ftjax report`: a run on one page, and in a few lines."""

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from ftjax.errors import UserError
from ftjax.page.document import page
from ftjax.report.curves import curves
from ftjax.report.read import Run, read_run
from ftjax.report.results import checks, evaluations, generations, rewarded
from ftjax.report.setup import configuration, data, environment, warnings
from ftjax.report.terminal import print_summary, tiles


def report(folder: Path, *, out: Path | None = None, console: Any = None) -> Path:
    """Write the page, print the summary, and return the path of the page.

    Args:
        folder: a run's output_dir, finished or not (or its `final/` or `best/`).
        out: the HTML file; None for `report.html` in the run's folder.

    Raises UserError if the folder is not a run, one of its files is damaged, or the page cannot be written.
    """
    from ftjax.console import make_console, say

    console = console or make_console()
    run = read_run(folder)
    out = out or run.folder / "report.html"
    try:
        out.write_text(html(run), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; choose another file with --out") from None
    print_summary(run, console)
    say(console, f"written: {out}")
    return out


def html(run: Run) -> str:
    """Return the whole page."""
    name = run.folder.resolve().name
    told = f"{run.config.model.path}, {run.config.method.name}, {run.config.objective.name}"
    shown = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in tiles(run))
    body = [
        f"<header><h1>{escape(name)}</h1><p class=soft>{escape(told)}</p></header>",
        f'<div class="tiles">{shown}</div>',
        *(f'<p class="warning">{escape(words)}</p>' for words in warnings(run)),
        "<main>",
    ]
    for title, parts in (
        ("Training", curves(run)),
        ("Before and after", evaluations(run)),
        ("Safety and stability", checks(run)),
        ("Answers while training", generations(run)),
        ("Answers of the student" if run.config.objective.name == "distill" else "Answers and their rewards", rewarded(run)),
        ("Data", data(run)),
        ("Configuration", configuration(run)),
        ("Environment", environment(run)),
    ):
        body += _section(title, parts)
    return page(f"{name}: ftjax report", [*body, "</main>"])


def _section(title: str, parts: Iterable[str]) -> list[str]:
    parts = [part for part in parts if part]
    return [f"<section><h2>{escape(title)}</h2>", *parts, "</section>"] if parts else []
