"""Runs `make demo`: fine-tunes a small model on this machine and shows what it learned.

    python scripts/demo.py

Downloads SmolLM2-135M-Instruct, asks it to turn 50 messages that it will not be trained on into JSON, fine-tunes it with LoRA
on configs/demo/demo.yaml, asks again, and exports a merged Hugging Face folder. All files go to demo/; a second call continues
where the first one stopped. The figures are written to demo/result.json.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from get_demo_model import fetch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

CONFIG = Path("configs/demo/demo.yaml")
TEST = Path("configs/demo/data/test.jsonl")
RUN = Path("demo/run")
MERGED = Path("demo/merged")
LONGEST_ANSWER = 48  # tokens; the forms take 25 to 36

console = Console(highlight=False)


def ftjax(*arguments: str | Path) -> None:
    """Run one `ftjax` command in a separate process, which frees its memory at the end."""
    console.print(f"\n[bold]$ ftjax {' '.join(map(str, arguments))}[/]", soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "ftjax.cli", *map(str, arguments)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def read_test() -> tuple[list[list[dict]], list[dict]]:
    """Return the prompts (system and user turns) and the expected forms."""
    rows = [json.loads(line)["messages"] for line in TEST.read_text(encoding="utf-8").splitlines()]
    return [row[:-1] for row in rows], [json.loads(row[-1]["content"]) for row in rows]


def answers(who: str, model: Path, adapter: Path | None, prompts: list[list[dict]]) -> list[str]:
    """Return greedy answers to all prompts, in one batch."""
    from ftjax.generate.session import Generator

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{who} answers {len(prompts)} messages", total=len(prompts))
        generator = Generator(str(model), adapter=adapter, dtype="float32")
        found = generator.generate(
            prompts,
            max_new_tokens=LONGEST_ANSWER,
            batch_size=len(prompts),
            progress=lambda done, _: bar.update(task, completed=done),
        )
    return [generation.text for generation in found]


def exact(answer: str, form: dict) -> bool:
    """Return whether the answer is the form's JSON object: the same keys with the same values, and nothing else."""
    try:
        return json.dumps(json.loads(answer), sort_keys=True) == json.dumps(form, sort_keys=True)
    except json.JSONDecodeError:
        return False


def main() -> None:
    started = time.monotonic()
    seconds: dict[str, float] = {}

    def phase(name: str) -> None:
        seconds[name] = round(time.monotonic() - started - sum(seconds.values()), 1)

    model = fetch(Path("demo/model"))
    phase("download")
    prompts, forms = read_test()
    before = answers("the base model", model, None, prompts)
    phase("base answers")
    console.print(f"before training: {rate(before, forms)}")

    ftjax("train", CONFIG)
    phase("training")
    after = answers("the tuned model", model, RUN / "final", prompts)
    phase("tuned answers")
    shutil.rmtree(MERGED, ignore_errors=True)  # left by an earlier demo; `export` refuses a folder that is not empty
    ftjax("export", RUN, "--out", MERGED, "--merge")
    phase("export")

    show(prompts, forms, before, after)
    console.print(f"exact match before: [bold]{rate(before, forms)}[/]")
    console.print(f"exact match after:  [bold]{rate(after, forms)}[/]")
    total = time.monotonic() - started
    console.print(f"{total / 60:.1f} minutes: " + ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items()))
    result = {"messages": len(forms), "before": hits(before, forms), "after": hits(after, forms), "seconds": seconds}
    Path("demo/result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"\n{RUN / 'final'} holds a PEFT adapter, {MERGED} a Hugging Face model. Next:\n"
        f"  .venv/bin/ftjax generate {MERGED} --prompt 'hi, I need two red desk lamps by Friday. Anna Keller'\n"
        f"  .venv/bin/ftjax chat {model} --adapter {RUN / 'final'}\n"
        f"  .venv/bin/ftjax train {CONFIG} data.train=YOUR.jsonl data.validation=null output_dir=runs/mine",
        markup=False,
        soft_wrap=True,
    )


def hits(given: list[str], forms: list[dict]) -> int:
    return sum(exact(answer, form) for answer, form in zip(given, forms, strict=True))


def rate(given: list[str], forms: list[dict]) -> str:
    return f"{hits(given, forms)} of {len(forms)} messages ({hits(given, forms) / len(forms):.0%})"


def show(prompts: list[list[dict]], forms: list[dict], before: list[str], after: list[str]) -> None:
    """Print three messages with the answers before and after."""
    table = Table(show_lines=True, title=f"three of the {len(forms)} held-out messages", title_justify="left")
    for heading in ("message", "before", "after"):
        table.add_column(heading, overflow="fold", ratio=1)
    for number in range(3):
        mark = "exact" if exact(after[number], forms[number]) else f"expected {json.dumps(forms[number])}"
        wrapped = after[number].strip().replace(",", ", ")  # for reading; the answer itself is compact
        cells = (prompts[number][-1]["content"], before[number].strip(), f"{wrapped}\n({mark})")
        table.add_row(*map(Text, cells))  # unformatted: answers may contain rich markup
    console.print()
    console.print(table)


if __name__ == "__main__":
    main()
