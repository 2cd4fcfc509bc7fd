"""Setup of a run in the report: data, configuration, environment."""

from collections.abc import Iterable
from html import escape

import yaml

from ftjax.data.report import DataReport
from ftjax.data.report_html import report_html
from ftjax.page.document import details, table
from ftjax.report.read import Run


def data(run: Run) -> Iterable[str]:
    """Yield the HTML of run.json's statistics of the data."""
    for name, state in run.record.get("data", {}).items():
        state = dict(state)
        bins = [(one["from"], one["to"], one["documents"]) for one in state.pop("histogram", [])]
        yield from report_html(name, DataReport.of_state(state), bins, heading="h3")


def configuration(run: Run) -> Iterable[str]:
    """Yield the HTML of the settings that differ from the defaults, and of all settings."""
    changed = run.config.model_dump(mode="json", exclude_defaults=True)
    shown = yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)
    yield f"<p>What differs from the defaults:</p><pre>{escape(shown)}</pre>"
    yield details("All settings", f"<pre>{escape(run.config_text)}</pre>")


def environment(run: Run) -> Iterable[str]:
    """Return the HTML of run.json's devices and versions."""
    record = run.record
    if not record:
        return ["<p>The run has no run.json, so its environment is not known.</p>"]
    devices, mesh = record.get("devices", {}), record.get("mesh", {})
    rows = [
        ("parameters", record.get("trained", "")),
        ("devices", f"{devices.get('count')} {devices.get('platform')} ({devices.get('kind')})"),
        ("mesh", " x ".join(f"{axis}={size}" for axis, size in mesh.items())),
        ("processes", str(record.get("processes"))), ("remat", str(record.get("remat"))),
        ("attention", str(record.get("attention"))), ("system", str(record.get("system"))),
        ("started", ", ".join(f"{one['time']} at step {one['step']}" for one in record.get("starts", []))),
        *record.get("versions", {}).items(),
    ]  # fmt: skip
    return [table((), rows, numbers=False)]


def warnings(run: Run) -> list[str]:
    """Return the warnings of training, data and checks."""
    found = [f"step {step:,}: {words}" for step, words in run.warnings]
    said: dict[str, list[str]] = {}  # warnings of both sets are shown once
    for name, state in run.record.get("data", {}).items():
        for words in state.get("warnings", []):
            said.setdefault(words, []).append(name)
    found += [f"{' and '.join(names)} data: {words}" for words, names in said.items()]
    for one in run.checks:
        failed = [finding for finding in one.results.get("findings", []) if finding.get("verdict") == "failed"]
        found += [f"{one.name}: {finding['title']}: beyond its limit ({finding.get('rule')})" for finding in failed]
    return found
