"""`ftjax report`: a run on one page, and in a few lines; several runs side by side."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ftjax.errors import UserError
from ftjax.page.document import page, section
from ftjax.report.compare import MOST, named, print_comparison
from ftjax.report.compare_page import comparison
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
    _write(out, html(run))
    print_summary(run, console)
    say(console, f"written: {out}")
    return out


def compare(folders: Sequence[Path], *, out: Path | None = None, console: Any = None) -> Path:
    """Write the page that compares runs, print the comparison, and return the path of the page.

    Args:
        folders: output_dirs of runs, finished or not.
        out: the HTML file; None for `comparison.html` beside the first run.

    Raises UserError as `report` does, for a run that is given twice, and for more runs than can be told apart.
    """
    from ftjax.console import make_console, say

    if len(folders) > MOST:
        raise UserError(
            f"report: {len(folders)} runs; at most {MOST} can be told apart on one page (ftjax runs lists any number)"
        )
    found = [read_run(folder) for folder in folders]
    if len({run.folder.resolve() for run in found}) < len(found):
        raise UserError("report: a run is given twice; name each once")
    console, runs = console or make_console(), named(found)
    out = out or found[0].folder.resolve().parent / "comparison.html"
    _write(out, comparison(runs))
    print_comparison(runs, console)
    say(console, f"written: {out}")
    return out


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; choose another file with --out") from None


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
        body += section(title, parts)
    return page(f"{name}: ftjax report", [*body, "</main>"])
