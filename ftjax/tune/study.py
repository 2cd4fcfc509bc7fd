"""The study of a search: its storage, its samplers and its trials, so that it resumes and repeats."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftjax.config import Config
from ftjax.errors import UserError
from ftjax.tune.space import Dimension

SLOTS = 1_000_003  # a prime: seeds of two searches do not meet
STARTUP = 5  # trials that end before any is pruned
JOURNAL = "journal:"
# User attributes of trials.
RETRY, FOLDER, OWNER, SURPLUS, WHY = "retry", "folder", "owner", "surplus", "why"


@dataclass(frozen=True)
class Plan:
    """A search: what its processes need to know.

    Attributes:
        folder: everything that the search writes.
        trials: number of them in the whole study.
        storage: URL of Optuna's, or `journal:FILE`; None for SQLite in `folder`.
        keep: whose weights stay: of the best trial, or of all.
    """

    config: Config
    dimensions: tuple[Dimension, ...]
    folder: Path
    trials: int
    seed: int
    sampler: Literal["tpe", "random"] = "tpe"
    prune: bool = True
    storage: str | None = None
    name: str = "study"
    keep: Literal["best", "all"] = "best"

    @property
    def metric(self) -> str:
        return self.config.training.metric_for_best_model

    @property
    def greatest(self) -> bool:
        return self.config.training.best_is_greatest

    @property
    def space(self) -> str:
        return " ".join(f"{one.key}={one.text.replace(', ', ',')}" for one in self.dimensions)

    def run(self, trial: Any) -> Path:
        """Return the folder of a trial, or of the one that it repeats."""
        return self.folder / "trials" / trial.user_attrs.get(FOLDER, f"{trial.number:04d}")


def optuna() -> Any:
    """Import Optuna. Raises UserError if it is not installed."""
    try:
        import optuna as package
    except ImportError:
        raise UserError("ftjax tune needs Optuna, which is not installed: pip install 'ftjax[tune]'") from None
    package.logging.set_verbosity(package.logging.WARNING)
    return package


def open_study(plan: Plan) -> Any:
    """Open the study, or create it.

    Raises UserError if it exists with another search, or its storage cannot be opened.
    """
    package = optuna()
    where = plan.storage or f"sqlite:///{(plan.folder / 'study.db').resolve()}"
    try:
        if where.startswith(JOURNAL):
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend

            storage: Any = JournalStorage(JournalFileBackend(where.removeprefix(JOURNAL)))
        else:
            storage = where
        pruner = package.pruners.MedianPruner(n_startup_trials=STARTUP) if plan.prune else package.pruners.NopPruner()
        study = package.create_study(
            storage=storage, study_name=plan.name, direction="maximize" if plan.greatest else "minimize", pruner=pruner,
            load_if_exists=True,
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:  # the errors of databases have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--storage {where}: cannot be opened: {reason}") from None
    _same_search(plan, study)
    return study


def _same_search(plan: Plan, study: Any) -> None:
    """Record what is searched, or compare it with what the study has."""
    wanted = {"search": plan.space, "metric": plan.metric, "seed": plan.seed, "sampler": plan.sampler}
    given = {name: study.user_attrs.get(name) for name in wanted}
    if all(value is None for value in given.values()):
        for name, value in wanted.items():
            study.set_user_attr(name, value)
        return
    other = [f"{name} is {value}, and was {given[name]}" for name, value in wanted.items() if value != given[name]]
    if other:
        raise UserError(f"{plan.folder}: this study is another search: {'; '.join(other)}. Choose another folder with --out")


def ask(plan: Plan, study: Any) -> tuple[Any, dict[str, Any]] | None:
    """Return the next trial with its settings by key; None if there is none left.

    A trial's suggestions depend on the study's seed, on its own place and on the trials that have ended, not on which process
    asks. So a search that is interrupted goes on as if it had not been.
    """
    package = optuna()
    states = package.trial.TrialState
    trials = [one for one in study.get_trials(deepcopy=False) if not one.user_attrs.get(SURPLUS)]
    waiting = any(one.state == states.WAITING for one in trials)
    if not waiting and len(slots(trials)) >= plan.trials:
        return None
    trial = study.ask()
    place = slot(trial.number, study.get_trials(deepcopy=False))
    if trial.user_attrs.get(RETRY) is None and place >= plan.trials:  # another process was quicker
        trial.set_user_attr(SURPLUS, True)
        study.tell(trial, state=states.FAIL)
        return None
    trial.set_user_attr(OWNER, owner())
    seed = (plan.seed * SLOTS + place) % 2**32
    study.sampler = (
        package.samplers.RandomSampler(seed=seed) if plan.sampler == "random" else package.samplers.TPESampler(seed=seed)
    )
    return trial, {one.key: one.suggest(trial) for one in plan.dimensions}


def slot(number: int, trials: Any) -> int:
    """Return the place of a trial among those that are not repetitions."""
    return number - sum(one.number < number and one.user_attrs.get(RETRY) is not None for one in trials)


def slots(trials: Any) -> set[int]:
    """Return the numbers of the trials, without repetitions."""
    return {one.number for one in trials if one.user_attrs.get(RETRY) is None}


def retry(plan: Plan, study: Any, trial: Any) -> None:
    """Have an interrupted trial go on in its folder, from its last checkpoint, as the next trial."""
    states = optuna().trial.TrialState
    first = trial.user_attrs.get(RETRY, trial.number)
    given = {RETRY: first, FOLDER: plan.run(trial).name}
    study.enqueue_trial(dict(trial.params), user_attrs=given)
    study.tell(trial.number, state=states.FAIL)


def take_over(plan: Plan, study: Any) -> int:
    """Queue the trials again whose process on this host has ended; return their number."""
    states = optuna().trial.TrialState
    lost = [one for one in study.get_trials(states=(states.RUNNING,)) if _is_lost(one.user_attrs.get(OWNER))]
    for trial in lost:
        retry(plan, study, trial)
    return len(lost)


def owner(pid: int | None = None) -> str:
    """Return host, process and its start, which together name a process once."""
    pid = pid or os.getpid()
    began = ""
    with suppress(OSError):
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {pid} {began}"


def _is_lost(name: str | None) -> bool:
    host, pid, *_ = (name or "").split(" ") if name else ("", "")
    if host != socket.gethostname():
        return False  # another host's, which may still run
    return owner(int(pid)) != name or not Path(f"/proc/{pid}").exists()


def ended(study: Any) -> list[Any]:
    """Return the trials that have ended, without those that were interrupted and repeated."""
    states = optuna().trial.TrialState
    trials = study.get_trials(deepcopy=False)
    repeated = {one.user_attrs[RETRY] for one in trials if one.user_attrs.get(RETRY) is not None}
    last: dict[int, Any] = {}
    for one in trials:
        if one.state in (states.COMPLETE, states.PRUNED, states.FAIL) and not one.user_attrs.get(SURPLUS):
            last[one.user_attrs.get(RETRY, one.number)] = one
    return [
        one for first, one in sorted(last.items())
        if first not in repeated or one.user_attrs.get(WHY) or one.state != states.FAIL
    ]  # fmt: skip


def best_of(plan: Plan, trials: Any) -> Any | None:
    """Return the best of the trials that were completed."""
    states = optuna().trial.TrialState
    complete = [one for one in trials if one.state == states.COMPLETE]
    return min(complete, key=lambda one: (-one.value if plan.greatest else one.value, one.number), default=None)
