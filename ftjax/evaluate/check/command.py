"""`ftjax check`: report what fine-tuning did to the rest of a model, for people and for continuous integration."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from ftjax.compile_cache import keep_compiled_programs
from ftjax.config import Config
from ftjax.config.code import refuse_unasked
from ftjax.config.load import Override
from ftjax.console import make_console, say
from ftjax.distributed import store
from ftjax.distributed.agree import agree, digest
from ftjax.errors import UserError
from ftjax.evaluate.check.counterfactual import by_axis
from ftjax.evaluate.check.examine import Examined, examine
from ftjax.evaluate.check.material import Piece, gather, pieces
from ftjax.evaluate.check.result import (
    ANSWERS,
    RESULTS,
    TITLE,
    VARIED,
    as_json,
    by_type,
    card_section,
    print_findings,
    write_answers,
    write_varied,
)
from ftjax.evaluate.check.verdict import findings
from ftjax.evaluate.extra import need
from ftjax.evaluate.held_out import DECIDE, changed_documents, trained_config, training_splits
from ftjax.evaluate.lm_eval.command import load_tasks
from ftjax.evaluate.target import Target, find_target
from ftjax.generate.session import Generator
from ftjax.hub.card import with_section
from ftjax.hub.same_model import model_facts
from ftjax.long_steps import long_step
from ftjax.mesh import devices_or_all
from ftjax.version import __version__

VERBATIM = ("verbatim_train", "verbatim_validation", "longest_run_train", "longest_run_validation")


def check(
    target: str, overrides: Sequence[Override] = (), *, adapter: Path | None = None, prompts: str | None = None,
    limit: int | None = None, out: Path | None = None, compare_base: bool = True, as_json_object: bool = False,
    console: Any = None, devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Check, print, and write `results.json`, `answers.jsonl` and the card's section; return the results.

    `results["failed"]` names the metrics beyond their limits.

    Args:
        target: a run, a configuration file, a model or a PEFT folder (`find_target`).
        overrides: `key=value`; prompts and limit are short for check.prompts and check.limit.
        out: the folder to write; None for `check` in the run's folder, or in the current one.
        compare_base: check the base model too, if there is one.
        devices: devices to use, such as `jax.devices()[:4]`; None uses all.

    Raises UserError if the target, a file or a setting is wrong or missing.
    """
    console = console or make_console(stderr=as_json_object, quiet=store.index() > 0)
    given = {"prompts": prompts, "limit": limit}
    overrides = [*overrides, *(f"check.{name}={_quoted(value)}" for name, value in given.items() if value is not None)]
    found = find_target(target, overrides, adapter=adapter)
    settings, data_config = found.config.check, _data_config(found)
    material = gather(settings)
    lm_eval = found.config.evaluate.lm_eval.model_copy(update={"tasks": settings.lm_eval_tasks})
    if lm_eval.tasks:  # report a missing task before anything is loaded
        refuse_unasked(found.config, "check.lm_eval_tasks", "evaluate.lm_eval.include_path")
        need("lm_eval", "check.lm_eval_tasks")
        load_tasks(lm_eval)
    if store.several():
        facts = {"digest of the material": digest(material), **settings.model_dump(mode="json")}
        agree("this check", {**facts, **model_facts(found.model, found.config.model.revision, found.adapter)})
    base = found.base() if compare_base and (found.adapter or found.run) else None
    keep_compiled_programs()

    examined: dict[str, Examined] = {}
    tokenizer, data, missing, kind = None, {}, {}, ""
    for label, one in (("tuned", found), *((("base", base),) if base else ())):
        with long_step(f"loading {one.name}") as step:
            generator = one.load(tokenizer, devices)
            if tokenizer is None:
                tokenizer, kind = generator.tokenizer, str(generator.engine.dtype)
                data, missing = _data(found, data_config, generator)
            examined[label] = examine(
                generator, material, data, settings, lm_eval,
                lambda text, one=one, step=step: step.now(f"checking {one.name}: {text}"),
            )  # fmt: skip
        generator = None  # free its memory for the next model
    tuned = examined["tuned"]
    tuned.missing |= missing
    evaluation = found.config.evaluate
    numbers = {"confidence": evaluation.confidence, "resamples": evaluation.resamples, "seed": evaluation.seed}
    judged = findings(tuned, examined.get("base"), settings, numbers, kind)
    results = {
        "model": found.name, "base": base.name if base else None, "passed": all(one.verdict != "failed" for one in judged),
        "failed": [one.name for one in judged if one.verdict == "failed"],
        "not_measured": {one.name: one.reason for one in judged if one.verdict == "not measured"},
        "findings": [one.state() for one in judged], "refused_by_type": by_type(tuned, examined.get("base"), numbers),
        "counterfactual": {
            name: by_axis(material.varied, one.varied) for name, one in examined.items() if one.varied is not None
        },
        "prompts": len(tuned.asked), "confidence": evaluation.confidence, "sources": material.sources,
        "settings": settings.model_dump(mode="json"), "version": __version__, "device": devices_or_all(devices)[0].device_kind,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    if store.index():
        return results
    folder = out or _folder(found)
    card = (found.adapter or Path(found.model)) / "README.md" if found.run else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_answers(folder / ANSWERS, tuned, examined.get("base"))
        if tuned.varied is not None:
            write_varied(folder / VARIED, material.varied, tuned.varied, base and examined["base"].varied)
        (folder / RESULTS).write_text(as_json(results), encoding="utf-8")
        if card is not None and card.is_file():
            section = card_section(results, judged, results["settings"])
            card.write_text(with_section(card.read_text(encoding="utf-8"), TITLE, section), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another folder with --out") from None
    if as_json_object:
        print(as_json(results), end="")
    else:
        print_findings(results, judged, console)
    written = [
        folder / RESULTS,
        folder / ANSWERS,
        *([folder / VARIED] if tuned.varied is not None else []),
        *([card] if card is not None and card.is_file() else []),
    ]
    say(console, f"written: {', '.join(map(str, written))}")
    if results["failed"]:
        say(console, f"failed: {', '.join(results['failed'])}", "red")
    return results


def _data_config(found: Target) -> Config:
    """Return settings of the rows to continue: the run's, but from the files that the command names, where it names some.

    Raises UserError if the command asks for another split than the run's: rows that it trained on would count as held out.
    """
    given = found.config
    if not given.check.verbatim_rows:
        return given
    trained = trained_config(found, DECIDE, "set check.verbatim_rows=0")
    files = {"train": given.data.train, "validation": given.data.validation}
    return trained.model_copy(update={"data": trained.data.model_copy(update=files)})


def _data(found: Target, config: Config, generator: Generator) -> tuple[dict[str, Sequence[Piece]], dict[str, str]]:
    """Return the rows to continue, and reasons for those that are missing. Args: config: `_data_config`."""
    settings = found.config.check
    if not settings.verbatim_rows:
        return {}, dict.fromkeys(VERBATIM, "check.verbatim_rows is 0")
    if config.data.train == "-":
        why = "the model's training data is not known; give a run, or data.train=FILE"
        return {}, dict.fromkeys(VERBATIM, why)
    try:
        train, validation = training_splits(config, generator.tokenizer)
    except UserError as error:
        return {}, dict.fromkeys(VERBATIM, f"the training data cannot be read: {error}")
    if changed := changed_documents(found, train, None):
        return {}, dict.fromkeys(VERBATIM, changed)
    rows, missing = {}, {}
    for name, split, seed in (("train", train, config.training.seed), ("validation", validation, None)):
        rows[name], short = pieces(split, settings, generator.context, seed=seed) if split else ([], 0)
        if not rows[name]:
            why = f"no row has {settings.verbatim_length} trained tokens after {settings.verbatim_prefix} ({short} are shorter)"
            why = why if split else "there is no validation data"
            missing |= {f"{metric}_{name}": why for metric in ("verbatim", "longest_run")}
    return rows, missing


def _folder(found: Target) -> Path:
    """Return `check` in a run's folder, or in the current one; with the model's name unless it is a run's `final/`."""
    name = Path(found.name).name
    return (found.run or Path()) / ("check" if found.run and name == "final" else f"check-{name}")


def _quoted(value: Any) -> str:
    return f"'{value.replace(chr(39), 2 * chr(39))}'" if isinstance(value, str) else str(value)
