"""`ftjax evaluate TARGET --lm-eval TASKS`: tasks, metrics, tables and results of lm-evaluation-harness."""

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ftjax.compile_cache import keep_compiled_programs
from ftjax.config.code import refuse_unasked
from ftjax.config.evaluate import LmEvalConfig
from ftjax.config.load import Override
from ftjax.console import make_console, print_table, say
from ftjax.distributed import store
from ftjax.distributed.agree import agree
from ftjax.errors import UserError
from ftjax.evaluate.extra import need
from ftjax.evaluate.lm_eval.scores import harness_scores
from ftjax.evaluate.result import RESULTS
from ftjax.evaluate.target import find_target
from ftjax.generate.session import Generator
from ftjax.hub.same_model import model_facts


def evaluate_harness(
    target: str, overrides: Sequence[Override] = (), *, tasks: Sequence[str] | None = None, adapter: Path | None = None,
    limit: int | None = None, out: Path | None = None, compare_base: bool = False, allow_code_execution: bool = False,
    as_json: bool = False, devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the tasks, print their table, and write `results.json` and `samples_TASK.jsonl` as lm_eval does; return the results.

    Args:
        target, out, compare_base, devices: as in `ftjax.evaluate.command.evaluate`.
        tasks: None for `evaluate.lm_eval.tasks`.
        limit: rows per task.
        allow_code_execution: tasks may run what the model wrote, without the guards of ftjax's own task `code`.

    Raises UserError if a task is unknown, or the target or lm_eval is missing.
    """
    found = find_target(target, overrides, adapter=adapter)
    settings = found.config.evaluate
    refuse_unasked(found.config, "evaluate.lm_eval.include_path", *(("evaluate.lm_eval.tasks",) if tasks is None else ()))
    asked = settings.lm_eval.model_copy(update={"tasks": list(tasks)} if tasks is not None else {})
    limit = settings.limit if limit is None else limit
    base = found.base() if compare_base else None
    need("lm_eval", "--lm-eval")
    load_tasks(asked)
    if store.several():
        facts = {"limit": limit, **asked.model_dump(mode="json")}
        agree("this evaluation", {**facts, **model_facts(found.model, found.config.model.revision, found.adapter)})
    keep_compiled_programs()
    options = {"limit": limit, "batch_size": settings.batch_size, "unsafe": allow_code_execution}
    results = run_tasks(found.load(devices=devices), asked, **options)
    results["model_name"] = found.name
    samples = results.pop("samples")
    if base:
        results["base"] = run_tasks(base.load(devices=devices), asked, **options)
        results["base"]["model_name"] = base.name
        results["base"].pop("samples")
    if store.index():
        return results
    name = "-".join(Path(task).stem for task in asked.tasks)
    folder = out or (found.run or Path()) / "evaluation" / f"lm-eval-{name}"[:120]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).write_text(_json(results, indent=2) + "\n", encoding="utf-8")
        for task, rows in samples.items():
            path = folder / f"samples_{task.replace('/', '_')}.jsonl"
            path.write_text("".join(_json(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another folder with --out") from None
    if as_json:
        print((folder / RESULTS).read_text(encoding="utf-8"), end="")
    else:
        _print(results)
        say(make_console(), f"written: {folder}")
    return results


def load_tasks(asked: LmEvalConfig) -> tuple[list[Any], Any]:
    """Return `(tasks for lm_eval's simple_evaluate, its TaskManager)`. Raises UserError for a task that does not exist."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    files_only = asked.tasks and all(task.endswith(".yaml") for task in asked.tasks)  # lm_eval indexes thousands of its own
    manager = TaskManager(include_path=asked.include_path, include_defaults=not files_only)
    found: list[Any] = []
    for task in asked.tasks:
        if task.endswith(".yaml"):
            more = [load_yaml(str(Path(path).absolute()), resolve_func=True) for path in sorted(glob.glob(task))]
        else:
            more = manager.match_tasks([task])
        if not more:
            raise UserError(
                f"--lm-eval: no task is named {task!r}; `lm-eval ls tasks` lists them, evaluate.lm_eval.include_path adds a "
                "folder, and a .yaml file may be named"
            )
        found += more
    if not found:
        raise UserError("--lm-eval: there is no task; name some, separated by commas")
    return found, manager


def run_tasks(
    generator: Generator, asked: LmEvalConfig, *, limit: int | None = None, batch_size: int = 32, unsafe: bool = False
) -> dict[str, Any]:
    """Return the result of lm_eval's `simple_evaluate`: `results` by task, `samples`, `versions`, `n-shot` and more."""
    from lm_eval import simple_evaluate

    from ftjax.evaluate.lm_eval.harness import FtjaxLM

    tasks, manager = load_tasks(asked)
    return simple_evaluate(
        FtjaxLM(generator, batch_size=batch_size),
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        num_fewshot=asked.num_fewshot,
        apply_chat_template=asked.apply_chat_template,
        fewshot_as_multiturn=asked.fewshot_as_multiturn and asked.apply_chat_template,
        system_instruction=asked.system_instruction,
        confirm_run_unsafe_code=unsafe,
    )


def _json(value: Any, **options: Any) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **options)


def _print(results: dict[str, Any]) -> None:
    from lm_eval.utils import make_table
    from rich.cells import cell_len

    console = make_console()

    for one in (results, results.get("base")):
        if one is not None:
            say(console, f"{one['model_name']}:")
            tables = [make_table(one), *([make_table(one, "groups")] if "groups" in one else [])]
            if max(map(cell_len, "\n".join(tables).splitlines()), default=0) <= console.width:
                print(*tables, sep="\n")
                continue
            rows = []
            for score in harness_scores(one):
                around = "" if score.stderr is None else f"{score.stderr:.4f}"
                rows.append((score.task, score.metric, f"{score.value:.4f}", around))
            print_table(console, ("task", "metric", "value", "stderr"), rows, left=(0, 1))
