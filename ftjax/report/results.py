"""Evaluations and checks after training, and generated answers, then and during training."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ftjax.evaluate.lm_eval.scores import harness_scores
from ftjax.evaluate.statistic import format_interval, interval_name, on_few
from ftjax.page.chart import interval_chart
from ftjax.page.document import details, table, text
from ftjax.report.read import Measured, Run

SAMPLES = 6  # per evaluation
SHOWN_STEPS = 4  # of the answers during training; the others are collapsed
FLAGS = ("empty", "repeating", "cut_off", "wrong_language")
COLOURS = {"passed": "good", "failed": "bad", "not judged": "soft", "not measured": "off"}


def evaluations(run: Run) -> Iterable[str]:
    """Yield the HTML of each evaluation: its metrics beside the base's, and answers."""
    for one in run.evaluations:
        results = one.results
        if "results" in results:
            yield from _harness(one)
            continue
        title = f"{results.get('task')} on {results.get('rows', 0):,} rows of {results.get('data')}"
        yield f"<h3>{escape(title)}</h3>"
        beside = f", beside {results['base']['model']}" if "base" in results else ""
        yield f'<p class="soft">{escape(str(results.get("model")) + beside)}</p>'
        yield f'<div class="charts">{"".join(_pictures(results))}</div>'
        yield from (f'<p class="warning">{escape(str(words))}</p>' for words in results.get("warnings", []))
        yield _metrics(results)
        yield from _samples(one)


def harness_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of lm-evaluation-harness' results, as texts."""
    base = {(one.task, one.metric): one for one in harness_scores(results.get("base", {}))}
    rows = []
    for one in harness_scores(results):
        row = [f"{one.task}: {one.metric}", count(one.rows)]
        for found in (one, base.get((one.task, one.metric))):
            bounds = (None, None) if found is None else found.bounds
            row.append(format_interval({"value": found.value, "low": bounds[0], "high": bounds[1]} if found else None))
        rows.append(row if base else row[:3])
    return ["metric", "n", f"value ({interval_name(0.95)})", *(("base",) if base else ())], rows


def _harness(one: Measured) -> Iterable[str]:
    head, rows = harness_rows(one.results)
    yield f"<h3>lm-evaluation-harness: {escape(one.name)}</h3>"
    yield f'<p class="soft">{escape(str(one.results.get("model_name")))}</p>'
    yield table(head, rows)


def rows_of(results: Mapping[str, Any]) -> list[list[str]]:
    """Return name, rows, value, base, difference and p of each metric, as texts."""
    base, difference = results.get("base", {}).get("metrics", {}), results.get("difference", {})
    found = []
    for name, value in results.get("metrics", {}).items():
        row = [name, count(value.get("rows", results.get("rows"))), format_interval(value)]
        if "base" in results:
            change = difference.get(name)
            row += [format_interval(base.get(name)), format_interval(change, "+"), number((change or {}).get("p_value"))]
        found.append(row)
    return found


def count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _pictures(results: Mapping[str, Any]) -> Iterable[str]:
    base = results.get("base", {}).get("metrics", {})
    for name, value in results.get("metrics", {}).items():
        both = {"tuned": value, **({"base": base[name]} if name in base else {})}
        bounds = {who: tuple(_float(one.get(key)) for key in ("value", "low", "high")) for who, one in both.items()}
        yield interval_chart(name, bounds)


def _metrics(results: Mapping[str, Any]) -> str:
    value = f"value ({interval_name(results.get('confidence', 0.95))})"
    head = ["metric", "n", value, *(("base", "difference", "p") if "base" in results else ())]
    parts = [table(head, rows_of(results))]
    for who, found in (("", results), ("base: ", results.get("base", {}))):
        if "confusion_matrix" in found:
            labels = found["labels"]
            rows = [[label, *map(str, row)] for label, row in zip(labels, found["confusion_matrix"], strict=True)]
            parts.append(table(["", *labels], rows, caption=f"{who}true class (rows), chosen class (columns)"))
        if "table" in found:
            rows = [[number(x) if isinstance(x, float) or x is None else str(x) for x in row] for row in found["table"]["rows"]]
            parts.append(table(found["table"]["head"], rows, caption=f"{who}each {found['table']['head'][0]}"))
    return "".join(parts)


def _samples(one: Measured) -> Iterable[str]:
    rows = [row for row in one.rows if "prediction" in row]
    chosen, why = _chosen(rows)
    if not chosen:
        return
    yield f'<p class="soft">{len(chosen)} of {len(rows):,} answers{escape(why)}; all of them are in predictions.jsonl.</p>'
    for row in chosen:
        sides = {"reference": " | ".join(map(str, row.get("references") or [])), "tuned": row["prediction"]}
        if "base_prediction" in row:
            sides["base"] = row["base_prediction"]
        scores = {who: _score(row, prefix) for who, prefix in (("tuned", ""), ("base", "base_"))}
        yield sample(row.get("prompt"), sides, {who: value for who, value in scores.items() if value is not None})


def _chosen(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the rows on which the models differ most, for better and for worse; else evenly spaced rows."""
    change = [(_score(row, "") or 0) - (_score(row, "base_") or 0) if _score(row, "base_") is not None else 0 for row in rows]
    if any(change):
        order = sorted(range(len(rows)), key=lambda i: change[i])
        worse = [i for i in order if change[i] < 0][: SAMPLES // 2]
        better = [i for i in reversed(order) if change[i] > 0][: SAMPLES - len(worse)]
        return [rows[i] for i in (*better, *worse)], ", where the first score differs most between the two models"
    step = max(1, math.ceil(len(rows) / SAMPLES))
    return list(rows[::step]), ""


def _score(row: Mapping[str, Any], prefix: str) -> float | None:
    """Return the first number among a row's scores."""
    scores = row.get(f"{prefix}scores") or {}
    return next((float(value) for value in scores.values() if isinstance(value, int | float)), None)


def sample(prompt: Any, sides: Mapping[str, str], scores: Mapping[str, float] | None = None) -> str:
    """Return the HTML of one prompt with several texts side by side."""
    if isinstance(prompt, list):
        prompt = "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)
    parts = []
    for who, value in sides.items():
        score = f" ({scores[who]:.3g})" if scores and who in scores else ""
        parts.append(
            f"<div><b>{escape(who)}{score}</b>{text(str(value)) if str(value).strip() else '<p class=soft>(empty)</p>'}</div>"
        )
    return f'<div class="sample"><b>prompt</b>{text(str(prompt))}<div class="sides">{"".join(parts)}</div></div>'


def generations(run: Run) -> Iterable[str]:
    """Yield the HTML of each prompt that was answered during training, with its answers by step."""
    prompts: dict[int, list[tuple[int, Mapping[str, str]]]] = {}
    for step, rows in run.generations:
        for place, row in enumerate(rows):
            prompts.setdefault(place, []).append((step, row))
    for answers in prompts.values():
        first = answers[0][1]
        sides = {"reference": first["reference"]} if "reference" in first else {}
        texts = {f"step {step}": row.get("text", "") for step, row in answers}
        names = list(texts)
        open_at = names if len(names) <= SHOWN_STEPS else [names[0], *names[-SHOWN_STEPS + 1 :]]
        yield sample(first.get("prompt", ""), sides | {name: texts[name] for name in open_at})
        rest = {name: texts[name] for name in names if name not in open_at}
        if rest:
            yield details(
                f"{len(rest)} more steps of this prompt", *(sample("", {name: value}) for name, value in rest.items())
            )


def rewarded(run: Run) -> Iterable[str]:
    """Yield the HTML of answers that were trained, with their rewards: the first, the middle and the last that were logged."""
    logged = run.completions
    for place in sorted({0, len(logged) // 2, len(logged) - 1}) if logged else ():
        step, rows = logged[place]
        yield f"<h3>step {step:,}</h3>"
        prompts: dict[str, dict[str, str]] = {}
        for number, row in enumerate(rows):
            said = ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("prompt", "text"))
            title = f"answer {number + 1}{f': {said}' if said else ''}"
            prompts.setdefault(row.get("prompt", ""), {})[title] = row.get("text", "")
        yield from (sample(prompt, sides) for prompt, sides in prompts.items())


def checks(run: Run) -> Iterable[str]:
    """Yield the HTML of each check: verdicts, metrics not measured, and some of the answers with faults."""
    for one in run.checks:
        results = one.results
        beside = f" beside {results['base']}" if results.get("base") else ""
        yield f'<p class="soft">{escape(str(results.get("model")) + beside)}: {results.get("prompts", 0):,} prompts</p>'
        rows = []
        for found in results.get("findings", []):
            if found["verdict"] == "not measured":
                continue
            cells = [count(found.get("rows"))]
            cells += [format_interval(found.get(key), share=bool(found.get("share"))) for key in ("value", "base")]
            words = "".join(f'<td class="n">{escape(value)}</td>' for value in cells)
            said = escape(on_few(found["verdict"], found.get("rows")))
            verdict = f'<td class="v {COLOURS.get(found["verdict"], "soft")}">{said}</td>'
            name, rule = escape(found["title"]), escape(found.get("rule") or "")
            rows.append(f'<tr><th scope="row">{name}</th>{words}<td>{rule}</td>{verdict}</tr>')
        head = "".join(f'<th scope="col"{" class=n" if n in (1, 2, 3) else ""}>{name}</th>' for n, name in enumerate(
            ("metric", "n", "tuned", "base", "limit", "verdict")))  # fmt: skip
        inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        yield f'<div class="scroll" tabindex="0"><table>{inner}</table></div>'
        for name, reason in results.get("not_measured", {}).items():
            yield f'<p class="off">Not measured: {escape(name)}: {escape(str(reason))}</p>'
        if kinds := results.get("refused_by_type"):
            shares = [
                [kind, str(found["prompts"]), *(_share(found.get(who)) for who in ("tuned", "base"))]
                for kind, found in kinds.items()
            ]
            yield details("Refusals by type of prompt", table(["type", "prompts", "tuned", "base"], shares))
        yield details("Answers with findings", *_flagged(one.rows))


def _flagged(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    for flag in (*FLAGS, "safe_refused"):
        for row in [row for row in rows if row.get(flag)][: SAMPLES // 2]:
            sides = {f"tuned: {flag.replace('_', ' ')}": row.get("answer", "")}
            if "base_answer" in row:
                sides["base"] = row["base_answer"]
            yield sample(row.get("prompt"), sides)


def _share(value: Any) -> str:
    """Format a share with its bounds; older checks wrote none."""
    return format_interval(value if isinstance(value, Mapping) or value is None else {"value": value}, share=True)


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
