"""`ftjax init`: look at data and machine, ask what a person knows better, and write a configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ftjax.config.load import load_config
from ftjax.console import make_console, say
from ftjax.data.advice import written
from ftjax.errors import UserError
from ftjax.long_steps import long_step
from ftjax.propose.goals import GOALS, goal_of, with_goal
from ftjax.propose.machine import Machine, this_machine
from ftjax.propose.propose import Proposal, propose, stem
from ftjax.propose.seen import look
from ftjax.propose.text import text_of

Ask = Callable[[str, str], str]  # (question, what holds without an answer) -> answer


def init(
    data: str, out: Path, *, model: str | None = None, goal: str | None = None, columns: str | None = None, force: bool = False,
    ask: Ask | None = None, console: Any = None, machine: Machine | None = None,
) -> Proposal:  # fmt: skip
    """Propose a configuration for `data` and write it to `out`; return the proposal.

    Args:
        model: None chooses one that the machine can train.
        goal: one of `GOALS`; None finds it in the data.
        columns: what the columns of the data mean, as `prompt=english,completion=german`; None finds it out.
        force: replace `out` if it exists.
        ask: asks a person; None takes what is proposed.
        machine: None for this one.

    Raises UserError if `out` exists, the data or the model cannot be read, or the goal does not fit the data.
    """
    console = console or make_console()
    if goal is not None and goal not in GOALS:
        raise UserError(f"--goal {goal}: choose one of {', '.join(GOALS)}")
    if out.exists() and not force and not (ask and _yes(ask(f"{out} exists; replace it? (yes, no)", "no"))):
        raise UserError(f"{out} exists; name another file with --out, or replace it with --force")
    seen = look(data, parsed(columns) if columns else None)
    say(console, f"{data}: {seen.rows:,} rows of the format {seen.format}")
    if seen.in_order:
        taken = written(seen.columns)
        say(console, f"the names of its columns do not say what they are; by their order {taken}; --columns says otherwise")
        answer = ask("columns", taken) if ask else taken
        seen = seen if answer == taken else look(data, parsed(answer))
    if goal is None:
        goal, why = goal_of(seen)
        say(console, f"goal: {goal} ({GOALS[goal].purpose}), because {why}")
        goal = _chosen(ask, goal) if ask else goal
    seen = with_goal(seen, goal)
    machine = machine or this_machine()
    say(console, f"machine: {machine.words}")
    name, why = (model, "named with --model") if model else machine.model()
    if ask and model is None:
        answer = ask("model: a Hub id, a folder or a .gguf file", name)
        name, why = (answer, "your choice") if answer != name else (name, why)
    folder = f"runs/{stem(data)}"
    folder = ask("folder of the run", folder) if ask else folder
    try:
        with long_step("reading") as step:
            found = propose(seen, goal, (name, why), machine, output_dir=folder, tell=step.now)
    except UserError as error:
        if model is None and name in str(error):
            raise UserError(f"{error}\n{name} was chosen for this machine; name another model with --model") from None
        raise
    text = text_of(found, f"ftjax init {data}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}; name another file with --out") from None
    load_config(out)
    show(found, out, console)
    return found


def show(found: Proposal, out: Path, console: Any) -> None:
    """Print what was chosen, the lengths of the documents, and the next commands."""
    say(console, "tokens a document, or a pair:")
    bins = found.lengths.histogram()
    most, wide = max(count for *_, count in bins), len(f"{bins[-1][1]:,}")
    for low, high, count in bins:
        say(
            console, f"  {low:>{wide},} - {high:>{wide},}  {'█' * round(40 * count / most) or ('▏' if count else '')} {count:,}"
        )
    values = {one.key: one.value for one in found.settings}
    shown = ("model.path", "model.quantization", "method.name", "objective.name", "data.max_length",
             "training.num_train_epochs", "training.global_batch_size", "training.gradient_accumulation_steps",
             "optimizer.learning_rate")  # fmt: skip
    say(console, ", ".join(f"{key.partition('.')[2]} {values[key]}" for key in shown if key in values))
    say(console, f"about {found.updates:,} updates")
    for warning in found.warnings:
        say(console, f"warning: {warning}", "yellow")
    say(console, f"written: {out}")
    say(console, f"next: ftjax preview {out}, then ftjax train {out}")


def parsed(columns: str) -> dict[str, str]:
    """Return `prompt=english,completion=german`, or the same as YAML, as a mapping. Raises UserError for anything else."""
    if columns.startswith("{"):
        try:
            found = yaml.safe_load(columns)
        except yaml.YAMLError:
            found = None
        if isinstance(found, dict) and all(isinstance(name, str) for name in (*found, *found.values())):
            return found
        raise UserError(f"--columns {columns}: expected names, as in {{prompt: english, completion: german}}")
    found = {}
    for part in columns.split(","):
        ours, sign, theirs = (text.strip() for text in part.partition("="))
        if not (ours and sign and theirs):
            raise UserError(f"--columns {columns}: write our name and the file's, as in prompt=english,completion=german")
        found[ours] = theirs
    return found


def _chosen(ask: Ask, goal: str) -> str:
    """Ask until the goal is one of `GOALS`."""
    while (answer := ask(f"goal ({', '.join(GOALS)})", goal)) not in GOALS:
        pass
    return answer


def _yes(answer: str) -> bool:
    return answer.strip().lower() in ("y", "yes")
