"""The page of a search: history, importance of the settings, parallel coordinates, and every trial."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ftjax.page.chart import line_chart
from ftjax.page.coordinates import Axis, bar_chart, parallel_chart
from ftjax.page.document import page, section, table
from ftjax.tune.study import WHY, Plan, best_of, optuna

FEW = 3  # completed trials below which nothing is said about importance
CURVES = 8  # trials whose evaluations are drawn: as many as the page has colours


def html(plan: Plan, study: Any, trials: Sequence[Any]) -> str:
    """Return the whole page. Args: trials: those that have ended."""
    best, states = best_of(plan, trials), optuna().trial.TrialState
    complete = [one for one in trials if one.state == states.COMPLETE]
    counts = ", ".join(f"{sum(one.state == state for one in trials)} {name}" for name, state in (
        ("completed", states.COMPLETE), ("pruned", states.PRUNED), ("failed", states.FAIL)
    ))  # fmt: skip
    tiles = [(f"{best.value:.6g}", plan.metric), (str(best.number), "best trial")] if best else []
    tiles += [(str(len(trials)), "trials"), *((_shown(value), key) for key, value in (best.params if best else {}).items())]
    shown = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in tiles)
    charts = [_history(plan, complete), bar_chart("importance for the result", importance(study, complete))]
    charts += [_coordinates(plan, complete, best), _curves(plan, trials)]
    body = [
        f"<header><h1>{escape(str(plan.folder.name))}</h1><p class=soft>{escape(plan.space)}; {counts}; "
        f"{'highest' if plan.greatest else 'lowest'} {escape(plan.metric)} wins; seed {plan.seed}</p></header>",
        f'<div class="tiles">{shown}</div>',
        "<main>",
        *section("The search", [f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""]),
        *section("Trials", _trials(plan, trials)),
        "</main>",
    ]
    return page(f"{plan.folder.name}: ftjax tune", body)


def importance(study: Any, complete: Sequence[Any]) -> dict[str, float]:
    """Return how much of the result each setting explains (PED-ANOVA, Watanabe et al. 2023, arXiv:2304.10255).

    Empty if there are too few trials, or all of them have the same result.
    """
    if len(complete) < FEW or len({one.value for one in complete}) < 2:
        return {}
    package = optuna()
    try:
        found = package.importance.get_param_importances(study, evaluator=package.importance.PedAnovaImportanceEvaluator())
    except (RuntimeError, ValueError):  # every trial tried the same values
        return {}
    return {name: float(share) for name, share in found.items()}


def rows(plan: Plan, trials: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of trials, the best first."""
    keys = list(dict.fromkeys(key for one in trials for key in one.params))
    names = [key.rpartition(".")[2] for key in keys]
    names = names if len(set(names)) == len(names) else keys
    order = sorted(trials, key=lambda one: (one.value is None or one.state.name != "COMPLETE", _rank(plan, one), one.number))
    found = []
    for one in order:
        value = one.value if one.state.name == "COMPLETE" else _last(one)
        how = {"COMPLETE": "completed", "PRUNED": f"pruned at step {max(one.intermediate_values, default=0)}"}
        state = how.get(one.state.name, f"failed: {one.user_attrs.get(WHY, '')}".rstrip(": "))
        shown = "-" if value is None else f"{value:.6g}"
        found.append([str(one.number), shown, *(_shown(one.params.get(key)) for key in keys), state])
    return ["trial", plan.metric, *names, "state"], found


def _rank(plan: Plan, one: Any) -> float:
    value = one.value if one.value is not None else _last(one)
    return float("inf") if value is None else -value if plan.greatest else value


def _last(one: Any) -> float | None:
    steps = one.intermediate_values
    return steps[max(steps)] if steps else None


def _trials(plan: Plan, trials: Sequence[Any]) -> Iterable[str]:
    head, cells = rows(plan, trials)
    return [table(head, cells, numbers=False)] if cells else ["<p>No trial has ended yet.</p>"]


def _history(plan: Plan, complete: Sequence[Any]) -> str:
    best, so_far = [], None
    for one in complete:
        so_far = one.value if so_far is None else (max if plan.greatest else min)(so_far, one.value)
        best.append((float(one.number), so_far))
    series = {"best so far": best, "trial": [(float(one.number), one.value) for one in complete]}
    return line_chart(plan.metric, series, across="trial")


def _coordinates(plan: Plan, complete: Sequence[Any], best: Any | None) -> str:
    logarithmic = {one.key: one.kind.startswith("log") for one in plan.dimensions}
    axes = [
        Axis(key.rpartition(".")[2], ["null" if one.params[key] is None else one.params[key] for one in complete], scaled)
        for key, scaled in logarithmic.items()
    ]
    axes.append(Axis(plan.metric, [one.value for one in complete]))
    labels = [
        f"trial {one.number}: {', '.join(f'{key} {_shown(value)}' for key, value in one.params.items())}, {one.value:.6g}"
        for one in complete
    ]
    where = None if best is None else next(n for n, one in enumerate(complete) if one.number == best.number)
    return parallel_chart("settings and results", axes, labels, where)


def _curves(plan: Plan, trials: Sequence[Any]) -> str:
    longest = sorted(trials, key=lambda one: (_rank(plan, one), one.number))[:CURVES]
    series = {f"trial {one.number}": sorted((float(step), value) for step, value in one.intermediate_values.items())
              for one in longest}  # fmt: skip
    series = {name: points for name, points in series.items() if len(points) > 1}
    return line_chart(f"{plan.metric} while training, the best {len(series)}", series) if series else ""


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
