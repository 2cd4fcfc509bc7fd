"""Runs trials one after another until the study has enough of them."""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftjax.api.run import Run, train_config
from ftjax.api.settings import settings_of
from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.tune.study import RETRY, WHY, Plan, ask, best_of, ended, open_study, optuna, retry, take_over

IN_A_ROW = 3  # trials that fail before the search gives up
WEIGHTS = ("final", "best")


def work(plan: Plan, say: Callable[[str], None], devices: Sequence[Any] | None = None) -> None:
    """Run trials until the study has `plan.trials`, or nothing is left to do for this process.

    Raises UserError if several trials in a row fail, and Interrupted if a signal stopped a trial, which is then queued again.
    """
    study = open_study(plan)
    if lost := take_over(plan, study):
        say(f"{lost} interrupted trial(s) go on from their last checkpoints")
    failures = 0
    while (found := ask(plan, study)) is not None:
        trial, settings = found
        failed = _try(plan, study, trial, settings, say, devices)
        failures = failures + 1 if failed else 0
        if failed and failures == min(IN_A_ROW, plan.trials):
            raise UserError(f"{failures} trials in a row failed, the last one with: {failed}")
        if plan.keep == "best":
            tidy(plan, study)


def _try(
    plan: Plan, study: Any, trial: Any, settings: Mapping[str, Any], say: Callable[[str], None], devices: Any
) -> Exception | None:
    """Run one trial and tell the study how it ended; return the error if its settings failed."""
    package, folder, number = optuna(), plan.run(trial), trial.number
    shown = ", ".join(f"{key} {_short(value)}" for key, value in settings.items())
    say(f"trial {number}: {shown}")
    config = of_trial(plan, trial, settings)
    before = _reported(study, trial)
    for step, value in before.items():
        trial.report(value, step)
    start = time.monotonic()

    def heard(row: Mapping[str, Any]) -> None:
        value, step = row.get(plan.metric), row["step"]
        if not isinstance(value, int | float) or step in before:
            return
        before[step] = value
        trial.report(value, step)
        if trial.should_prune():
            raise package.TrialPruned

    states = package.trial.TrialState
    try:
        train_config(config, command="the same search", on_log=heard, quiet=True, devices=devices)
        value = _value(plan, Run(folder))
    except package.TrialPruned:
        study.tell(trial, state=states.PRUNED)
        say(f"trial {number}: pruned at step {max(before)}, {plan.metric} {before[max(before)]:.6g}")
        return None
    except KeyboardInterrupt:
        retry(plan, study, trial)
        raise
    except UserError as error:
        trial.set_user_attr(WHY, str(error).splitlines()[0])
        study.tell(trial, state=states.FAIL)
        say(f"trial {number}: failed: {str(error).splitlines()[0]}")
        return error
    except Exception as error:
        trial.set_user_attr(WHY, repr(error))
        study.tell(trial, state=states.FAIL)
        raise
    trial.set_user_attr("seconds", round(time.monotonic() - start, 1))
    study.tell(trial, value)
    best = best_of(plan, ended(study))
    say(f"trial {number}: {plan.metric} {value:.6g}; best so far {best.value:.6g} of trial {best.number}")
    return None


def of_trial(plan: Plan, trial: Any, settings: Mapping[str, Any]) -> Config:
    """Return the configuration of a trial."""
    own: dict[str, Any] = {**settings, "output_dir": str(plan.run(trial))}
    if plan.config.training.checkpoint_dir:
        own["training.checkpoint_dir"] = f"{plan.config.training.checkpoint_dir.rstrip('/')}/{plan.run(trial).name}"
    return settings_of(plan.config, own, note=lambda text: None)


def _value(plan: Plan, run: Run) -> float:
    """Return the best value of the metric in a run. Raises UserError if it has none."""
    values = [float(value) for value in run.metrics.get(plan.metric, ()) if math.isfinite(value)]
    if not values:
        raise UserError(f"{run.folder}: this run has no finite {plan.metric}; it has {', '.join(sorted(run.metrics))}")
    return max(values) if plan.greatest else min(values)


def _reported(study: Any, trial: Any) -> dict[int, float]:
    """Return what the attempts before this one have reported, by step."""
    first, found = trial.user_attrs.get(RETRY), {}
    if first is not None:
        for one in study.get_trials(deepcopy=False):
            if one.number != trial.number and one.user_attrs.get(RETRY, one.number) == first:
                found |= one.intermediate_values
    return found


def tidy(plan: Plan, study: Any) -> None:
    """Remove checkpoints of trials that have ended, and weights of all but the best."""
    trials = ended(study)
    best = best_of(plan, trials)
    for one in trials:
        kept = () if best is not None and one.number == best.number else WEIGHTS
        for name in ("checkpoints", *kept):
            shutil.rmtree(plan.run(one) / name, ignore_errors=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
