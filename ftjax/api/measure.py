"""Evaluation and checks of models."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftjax.api.settings import overrides_of
from ftjax.console import make_console
from ftjax.cpu_threads import set_threads
from ftjax.distributed.join import joined


def evaluate(
    target: str | os.PathLike[str], data: Any = None, *, task: str | None = None,
    adapter: str | os.PathLike[str] | None = None, limit: int | None = None, compare_base: bool = False,
    out: str | os.PathLike[str] | None = None, allow_code_execution: bool = False, devices: Sequence[Any] | None = None,
    **overrides: Any,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a model on data, with confidence intervals; return the results, which are also written.

    >>> rows = [{"prompt": "Tom went", "completion": " home."}, {"prompt": "The dog", "completion": " ran."}]
    >>> results = ftjax.evaluate("runs/first", rows, task="loss")
    >>> results["rows"], sorted(results["metrics"]["loss"])
    (2, ['high', 'low', 'rows', 'value'])

    Args:
        target: a run, a configuration file, a model or a PEFT folder.
        data: a file, a Hub id, or rows in memory as for `train`; None for the run's validation data.
        task: `loss`, `exact_match`, `f1`, `rouge`, ... or a .py file; None for the run's.
        adapter: a PEFT folder or a run, to put on the model.
        limit: most rows, evenly spaced.
        compare_base: evaluate the base model too, with a paired test.
        out: folder for results.json and predictions.jsonl; None for `evaluation/...` in the run's folder.
        allow_code_execution: let the task `code` run what the model writes.
        devices: devices of JAX to use; None uses all.
        overrides: settings by key, as for `train`.

    Raises UserError if the target, the data, the task or a package is wrong or missing.
    """
    given = {"evaluate.data": data, "evaluate.task": task, "evaluate.limit": limit}
    set_threads()
    with joined():
        from ftjax.evaluate.command import evaluate as run
        from ftjax.evaluate.result import plain

        found = run(
            os.fspath(target), overrides_of({**overrides, **_given(given)}), adapter=_path(adapter), out=_path(out),
            compare_base=compare_base, allow_code_execution=allow_code_execution, devices=devices,
            console=make_console(quiet=True),
        )  # fmt: skip
        return plain(found)


def check(
    target: str | os.PathLike[str], *, adapter: str | os.PathLike[str] | None = None, prompts: str | None = None,
    limit: int | None = None, compare_base: bool = True, out: str | os.PathLike[str] | None = None,
    devices: Sequence[Any] | None = None, **overrides: Any,
) -> dict[str, Any]:  # fmt: skip
    """Look for what fine-tuning broke, beside the base model; return the results, which are also written.

    >>> results = ftjax.check("runs/first", limit=1, compare_base=False, check__max_new_tokens=2,
    ...                       check__stability_prompts=1, check__verbatim_rows=0, check__speed_runs=0)
    >>> results["passed"] == (not results["failed"])
    True

    Args:
        target: a run, a configuration file, a model or a PEFT folder.
        adapter: a PEFT folder or a run, to put on the model.
        prompts: a file of safety prompts (columns prompt and label); None for those built in.
        limit: most safety prompts per label.
        compare_base: run the checks on the base model too.
        out: folder for results.json and answers.jsonl; None for `check` in the run's folder.
        devices: devices of JAX to use; None uses all.
        overrides: settings by key, as for `train`.

    Returns: the results; `failed` names the metrics that are beyond their limits.

    Raises UserError if the target, a file or a setting is wrong or missing.
    """
    given = {"check.prompts": prompts, "check.limit": limit}
    set_threads()
    with joined():
        from ftjax.evaluate.check.command import check as run
        from ftjax.evaluate.result import plain

        found = run(
            os.fspath(target), overrides_of({**overrides, **_given(given)}), adapter=_path(adapter), out=_path(out),
            compare_base=compare_base, devices=devices, console=make_console(quiet=True),
        )  # fmt: skip
        return plain(found)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _path(value: str | os.PathLike[str] | None) -> Path | None:
    return None if value is None else Path(value)
