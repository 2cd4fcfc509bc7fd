"""Output of a check: results.json, answers.jsonl, a table for the terminal, a section of the model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftjax.evaluate.check.counterfactual import Measured, Varied
from ftjax.evaluate.check.examine import Examined
from ftjax.evaluate.check.refusal import phrase
from ftjax.evaluate.check.verdict import Finding
from ftjax.evaluate.result import plain
from ftjax.evaluate.statistic import Interval, format_interval, interval_name, intervals, means, on_few

RESULTS, ANSWERS, VARIED = "results.json", "answers.jsonl", "counterfactual.jsonl"
TITLE = "Safety and stability"
COLOURS = {"passed": "green", "failed": "bold red", "not judged": "dim", "not measured": "yellow"}


def write_answers(path: Path, tuned: Examined, base: Examined | None) -> None:
    """Write one JSON object per prompt: prompt, answer and its properties, with those of the base model."""
    with path.open("w", encoding="utf-8") as file:
        for number, one in enumerate(tuned.asked):
            row: dict[str, Any] = {"where": one.where, "prompt": one.text, "label": one.label, "type": one.kind}
            for prefix, found in (("", tuned), ("base_", base)):
                if found is None:
                    continue
                answer = found.answers[number]
                row |= {f"{prefix}answer": answer.text, f"{prefix}finish_reason": answer.finish_reason}
                row |= {f"{prefix}{name}": bool(value) for name, value in found.judged[number].items()}
                if one.label is not None:
                    row[f"{prefix}refusal"] = phrase(answer.text)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_varied(path: Path, varied: Sequence[Varied], tuned: Measured, base: Measured | None) -> None:
    """Write one JSON object per counterfactual prompt: what it is, and the values of both models."""
    with path.open("w", encoding="utf-8") as file:
        for number, one in enumerate(varied):
            row: dict[str, Any] = {"axis": one.axis, "set": one.set, "group": one.group, "prompt": one.text}
            row |= {"endings": one.endings} if one.endings else {}
            for prefix, found in (("", tuned), ("base_", base)):
                if found is not None:
                    row |= {} if one.endings else {f"{prefix}answer": found.answers[number]}
                    row |= {f"{prefix}{name}": value for name, value in found.values[number].items()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def by_type(tuned: Examined, base: Examined | None, numbers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return shares of refusals by the column `type`, with intervals as `numbers` sets them."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, one in (("tuned", tuned), ("base", base)):
        for asked, row in zip(one.asked, one.judged, strict=True) if one else ():
            if asked.label is not None and asked.kind is not None:
                found.setdefault(f"{asked.label}: {asked.kind}", {}).setdefault(name, []).append(row[f"{asked.label}_refused"])
    return {
        kind: {"prompts": len(values["tuned"]), **{name: _share(each, numbers) for name, each in values.items()}}
        for kind, values in found.items()
    }


def _share(each: Sequence[float], numbers: Mapping[str, Any]) -> Interval:
    return intervals(means([{"refused": one} for one in each]), **numbers)["refused"]


def print_findings(results: Mapping[str, Any], found: Sequence[Finding], console: Any) -> None:
    from rich.text import Text

    from ftjax.console import print_table, say

    beside = f" beside {results['base']}" if results["base"] else ""
    say(console, f"{results['model']}{beside}")
    head, rows = ["metric", "n", "tuned", *(("base",) if results["base"] else ()), "limit", "verdict"], []
    for one in found:
        if one.verdict == "not measured":
            continue
        tuned, base = _values(one)
        cells = [one.title, count(one), tuned, *((base,) if results["base"] else ())]
        rows.append([*cells, one.rule or "", Text(on_few(one.verdict, one.rows), COLOURS[one.verdict])])
    print_table(console, head, rows, left=(0, len(head) - 2, len(head) - 1))
    if results["counterfactual"]:
        print_varied(results, console)
    reasons: dict[str, list[str]] = {}
    for one in found:
        if one.verdict == "not measured":
            reasons.setdefault(one.reason, []).append(one.title)
    for reason, titles in reasons.items():
        say(console, f"not measured: {', '.join(titles)}: {reason}")


def print_varied(results: Mapping[str, Any], console: Any) -> None:
    """Print for each axis of counterfactual prompts the groups with the lowest and the highest value, and the p-values."""
    from ftjax.console import print_table

    tuned, base = (results["counterfactual"].get(name, {}) for name in ("tuned", "base"))
    head, rows = ["differs in", "value", "lowest", "highest", "p", *(("base: p",) if base else ())], []
    for axis, kinds in tuned.items():
        for kind, one in kinds.items():
            order = sorted(one["groups"].items(), key=lambda item: item[1])
            ends = [f"{value:.3g} ({group})" for group, value in (order[0], order[-1])]
            others = [base[axis][kind]] if base else []
            rows.append([axis, kind, *ends, *(_p_value(found["p_value"]) for found in (one, *others))])
    print_table(console, head, rows, left=(0, 1, 2, 3))


def _p_value(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(one: Finding) -> str:
    return "-" if one.rows is None else f"{one.rows:,}"


def _values(one: Finding) -> list[str]:
    """Return the values of the tuned and the base model."""
    return [format_interval(value, share=one.share) for value in (one.value, one.base)]


def card_section(results: Mapping[str, Any], found: Sequence[Finding], settings: Mapping[str, Any]) -> str:
    """Return the model card's section in Markdown. It has file names without folders: a card may be published."""
    rows = [
        f"| {one.title} | {count(one)} | {' | '.join(_values(one))} | {one.rule or ''} | {on_few(one.verdict, one.rows)} |"
        for one in found
        if one.verdict != "not measured"
    ]
    missing = [one.title for one in found if one.verdict == "not measured"]
    names = ", ".join(f"{name.replace('_', ' ')}: {Path(where).name}" for name, where in results["sources"].items())
    lines = [
        f"Checked with `ftjax check` {results['version']} on {results['time'][:10]} ({names}; answers of at most "
        f"{settings['max_new_tokens']} tokens, greedy). In brackets: {interval_name(results['confidence'])}s.",
        "",
        "| metric | n | tuned | base | limit | verdict |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *([f"Not measured: {', '.join(missing)}.", ""] if missing else []),
    ]
    if results["sources"].get("prompts"):
        lines += [
            "Refusals are counted by phrases in the opening of an answer, in English only. The count tells how often the model "
            "declines, not whether its other answers are harmless.", "",
        ]  # fmt: skip
    lines.append("These figures are for the prompts above. They are no proof that the model is safe for any use.")
    return "\n".join(lines)


def as_json(results: Mapping[str, Any]) -> str:
    return json.dumps(plain(dict(results)), indent=2, ensure_ascii=False) + "\n"
