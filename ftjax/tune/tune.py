"""`ftjax tune`, as a function: run the trials, show them, and write the best configuration."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftjax.api.run import Run
from ftjax.api.settings import Settings, settings_of
from ftjax.config import Config
from ftjax.config.load import load_config, save_config
from ftjax.console import make_console, print_table, say
from ftjax.cpu_threads import set_threads
from ftjax.errors import Interrupted, UserError
from ftjax.gpu import set_flags
from ftjax.tune.space import check, parse
from ftjax.tune.study import Plan, best_of, ended, open_study

PAGE, BEST = "tune.html", "best.yaml"
SHOWN = 20  # trials in the terminal


@dataclass(frozen=True)
class Tuned:
    """What a search has found.

    Attributes:
        folder: trials, study and page, as an absolute path.
        value: the best value of the metric.
        settings: its settings by key.
        trials: all that have ended, each with `number`, `state`, `value`, `settings` and `folder`.
    """

    folder: Path
    value: float
    settings: dict[str, Any]
    trials: list[dict[str, Any]]
    _best: Path

    @property
    def config(self) -> Config:
        """The configuration with the best settings."""
        return load_config(self.folder / BEST)

    @property
    def best(self) -> Run:
        """The run of the best trial, with its weights."""
        return Run(self._best)


def tune(
    config: Settings, search: str | Mapping[str, Any], *, trials: int, out: str | os.PathLike[str] = "tune",
    storage: str | None = None, study: str | None = None, sampler: Literal["tpe", "random"] = "tpe", seed: int | None = None,
    prune: bool = True, parallel: int = 1, keep: Literal["best", "all"] = "best", quiet: bool = False,
    devices: Sequence[Any] | None = None, **overrides: Any,
) -> Tuned:  # fmt: skip
    """Search for the settings with the best metric; go on if `out` holds an unfinished search.

    >>> rows = [{"prompt": "Tom went", "completion": " home."}, {"prompt": "The dog", "completion": " ran."}] * 4
    >>> found = ftjax.tune(
    ...     {"model": {"path": "model"}, "data": {"train": rows, "validation": rows}, "training": {"max_steps": 1}},
    ...     {"optimizer.learning_rate": "log(1e-4,1e-2)"}, trials=1, out="search", quiet=True,
    ... )
    >>> sorted(found.settings), found.best.folder.name
    (['optimizer.learning_rate'], '0000')

    Args:
        config, overrides: as for `train`; `training.metric_for_best_model` is what counts.
        search: keys and their values: `log(a,b)`, `uniform(a,b)`, `int(a,b)`, `logint(a,b)` or a list.
        trials: number of trials of the whole search; more than before continue it.
        out: folder of the search.
        storage: URL of an Optuna storage, or `journal:FILE`; None for SQLite in `out`.
        study: name of the study in the storage; None for that of the folder.
        sampler: `tpe` learns from the trials before; `random` does not.
        seed: of the sampler; None for `training.seed`.
        prune: stop trials early that are worse than the median of the others.
        parallel: trials at a time, each on devices of its own.
        keep: whose weights stay: the best trial's, or all.
        quiet: print nothing.
        devices: devices of JAX to use, with `parallel` 1; None uses all.

    Raises UserError for anything wrong in the search, the configuration, the model or the data, and Interrupted if a signal
    stopped it.
    """
    from ftjax.tune.parallel import work_in_parallel
    from ftjax.tune.work import tidy, work

    set_threads()
    set_flags()
    console = make_console(quiet=quiet)
    settings = settings_of(config, overrides)
    dimensions = tuple(parse(search))
    check(settings, dimensions)
    _refuse_nothing_to_compare(settings)
    if trials < 1 or parallel < 1:
        raise UserError(f"trials {trials}, parallel {parallel}: both are at least 1")
    folder = Path(out)
    plan = Plan(
        settings, dimensions, folder, trials, settings.training.seed if seed is None else seed, sampler, prune, storage,
        study or folder.resolve().name, keep,
    )  # fmt: skip
    try:
        (folder / "trials").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another folder with --out") from None
    opened = open_study(plan)

    def tell(text: str) -> None:
        say(console, text)

    if prune and settings.training.eval_steps is None and plan.metric.startswith("eval/"):
        tell("note: nothing is pruned: training.eval_steps is not set, so that each trial is evaluated once, at its end")
    try:
        if parallel > 1:
            work_in_parallel(plan, parallel, tell)
        else:
            work(plan, tell, devices)
    except Interrupted:
        tell(f"stopped; the same command goes on with the search in {folder}")
        raise
    finally:
        done = ended(opened)
        _write(plan, opened, done)
    best = best_of(plan, done)
    if best is None:
        raise UserError(f"{folder}: none of {len(done)} trials was completed; {folder / PAGE} says why")
    if keep == "best":
        tidy(plan, opened)
    _show(plan, done, console)
    return Tuned(folder.absolute(), float(best.value), dict(best.params), [_state(plan, one) for one in done], plan.run(best))


def _refuse_nothing_to_compare(config: Config) -> None:
    """Raise UserError if the metric is one of evaluations, and there are none."""
    data = config.data
    has = data.validation is not None or data.validation_split is not None or config.evaluate.training_rows
    if config.training.metric_for_best_model.startswith("eval/") and not has:
        raise UserError(
            f"tune compares trials by {config.training.metric_for_best_model}, and there is nothing to evaluate; set "
            "data.validation or data.validation_split"
        )


def _write(plan: Plan, study: Any, done: Sequence[Any]) -> None:
    """Write the page and, if there is one, the best configuration."""
    from ftjax.tune.page import html

    best = best_of(plan, done)
    try:
        (plan.folder / PAGE).write_text(html(plan, study, done), encoding="utf-8")
        if best is not None:
            save_config(settings_of(plan.config, dict(best.params), note=lambda text: None), plan.folder / BEST)
    except OSError as error:
        raise UserError(f"{plan.folder}: cannot be written: {error.strerror}") from None


def _show(plan: Plan, done: Sequence[Any], console: Any) -> None:
    from ftjax.tune.page import rows

    head, cells = rows(plan, done)
    print_table(console, head, cells[:SHOWN], left=(len(head) - 1,))
    if len(cells) > SHOWN:
        say(console, f"... and {len(cells) - SHOWN:,} more")
    best = best_of(plan, done)
    say(console, f"written: {plan.folder / PAGE}, {plan.folder / BEST}")
    say(console, f"the best trial's weights: {plan.run(best)}; to train it again: ftjax train {plan.folder / BEST}")


def _state(plan: Plan, one: Any) -> dict[str, Any]:
    return {
        "number": one.number, "state": one.state.name.lower(), "value": one.value, "settings": dict(one.params),
        "folder": str(plan.run(one).absolute()),
    }  # fmt: skip
