"""`ftjax evaluate`: evaluate a model on data, with confidence intervals, and compare it with its base model."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from ftjax.compile_cache import keep_compiled_programs
from ftjax.config.load import Override
from ftjax.console import make_console, say
from ftjax.distributed import store
from ftjax.distributed.agree import agree, digest
from ftjax.errors import UserError
from ftjax.evaluate.fit import misfits, named_classes
from ftjax.evaluate.held_out import held_out_places
from ftjax.evaluate.measure import Measured, check, measure
from ftjax.evaluate.result import PREDICTIONS, RESULTS, print_results, write_predictions, write_results
from ftjax.evaluate.rows import read_items, sources, splits_off
from ftjax.evaluate.statistic import compare, intervals
from ftjax.evaluate.target import Target, find_target
from ftjax.evaluate.tasks.preference import implicit_rewards
from ftjax.hub.same_model import model_facts
from ftjax.long_steps import long_step
from ftjax.mesh import devices_or_all
from ftjax.version import __version__


def evaluate(
    target: str, overrides: Sequence[Override] = (), *, adapter: Path | None = None, data: str | None = None,
    task: str | None = None, limit: int | None = None, out: Path | None = None, compare_base: bool = False,
    allow_code_execution: bool = False, as_json: bool = False, console: Any = None,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate, print, and write `results.json` and `predictions.jsonl`; return the results.

    Args:
        target: a run, a configuration file, a model or a PEFT folder (`find_target`).
        overrides: `key=value`; the next three are short for evaluate.data, evaluate.task and evaluate.limit.
        out: the folder to write; None for `evaluation/TASK-DATA` in the run's folder, or in the current one.
        compare_base: evaluate the base model on the same rows too, with a paired test.
        allow_code_execution: the task `code` may run what the model wrote.
        devices: devices to use, such as `jax.devices()[:4]`; None uses all.

    Raises UserError if the target, the data, the task or a package is wrong or missing.
    """
    console = console or make_console(stderr=as_json, quiet=store.index() > 0)
    given = {"data": data, "task": task, "limit": limit}
    overrides = [*overrides, *(f"evaluate.{name}={_quoted(value)}" for name, value in given.items() if value is not None)]
    found = find_target(target, overrides, adapter=adapter)
    settings = found.config.evaluate
    check(found.config, allow_code_execution)
    base = found.base() if compare_base else None
    items, left_out = read_items(found.config, settings.limit, held_out_places(found))
    warnings = misfits(settings.task, items, named_classes(found.config))
    for text in warnings:
        console.print(f"warning: {text}", style="yellow", soft_wrap=True, markup=False)
    if store.several():
        facts = {"rows": len(items), "digest of the rows": digest(items), **settings.model_dump(mode="json")}
        agree("this evaluation", {**facts, **model_facts(found.model, found.config.model.revision, found.adapter)})
    keep_compiled_programs()
    paths = [source.path for source in sources(found.config)]
    part = " (validation_split)" if splits_off(found.config) else ""
    described = ", ".join(paths) + part
    folder = out or (found.run or Path()) / "evaluation" / _name(found, settings.task, paths, part)

    tokenizer, measured = None, {}
    for label, one in (("tuned", found), *((("base", base),) if base else ())):
        with long_step(f"loading {one.name}"):
            generator = one.load(tokenizer, devices)
        tokenizer = generator.tokenizer
        with long_step(f"evaluating {one.name}") as step:
            measured[label] = measure(generator, items, found.config, step.of)
        generator = None  # free its memory for the next model
    results = {
        "model": found.name, "task": settings.task, "data": described, "rows": len(items), "rows_left_out": left_out,
        **_summary(measured["tuned"], settings), "confidence": settings.confidence, "warnings": warnings,
    }  # fmt: skip
    numbers = {"confidence": settings.confidence, "resamples": settings.resamples, "seed": settings.seed}
    if base:
        results["base"] = {"model": base.name, **_summary(measured["base"], settings)}
        if measured["tuned"].pairs is not None:
            rewards = implicit_rewards(measured["tuned"].pairs, measured["base"].pairs)
            results["implicit_rewards"] = intervals(rewards, **numbers)
        results["difference"] = compare(measured["base"].scores, measured["tuned"].scores, **numbers)
    results |= {
        "settings": settings.model_dump(mode="json"), "version": __version__,
        "device": devices_or_all(devices)[0].device_kind, "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    if store.index():
        return results
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_predictions(folder / PREDICTIONS, items, tokenizer, measured["tuned"], measured.get("base"))
        write_results(folder / RESULTS, results)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another folder with --out") from None
    if as_json:
        print((folder / RESULTS).read_text(encoding="utf-8"), end="")
    else:
        print_results(results, console)
    say(console, f"written: {folder / RESULTS}, {folder / PREDICTIONS}")
    return results


def _summary(measured: Measured, settings: Any) -> dict[str, Any]:
    numbers = {"confidence": settings.confidence, "resamples": settings.resamples, "seed": settings.seed}
    return {
        "metrics": intervals(measured.scores, **numbers), **measured.extra, "seconds": measured.seconds,
        "tokens": measured.tokens, "tokens_per_second": measured.tokens / max(measured.seconds, 1e-9),
    }  # fmt: skip


def _quoted(value: Any) -> str:
    return f"'{value.replace(chr(39), 2 * chr(39))}'" if isinstance(value, str) else str(value)


def _name(target: Target, task: str, paths: Sequence[str], part: str) -> str:
    """Return the folder's name: the task, the data, and the model unless it is a run's `final/`."""
    which = "" if target.run and target.name.endswith("final") else f"{Path(target.name).name}-"
    path = Path(paths[0])
    words = f"{which}{Path(task).stem}-{path.parent.name + '-' if path.suffix else ''}{path.stem}{part}"
    return re.sub(r"[^\w.-]+", "_", words).rstrip("_")
