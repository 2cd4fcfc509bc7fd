"""`ftjax demo`: fine-tune a small model on this machine and show what it learned.

Asks SmolLM2-135M-Instruct to turn 50 messages that it will not be trained on into JSON, fine-tunes it with LoRA, asks again,
and exports a merged Hugging Face folder. All files go to one folder; a second call continues where the first one stopped.
"""

import json
import re
import shutil
import time
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console

from ftjax.api.export import export
from ftjax.api.model import load
from ftjax.api.run import train_config
from ftjax.config.load import load_config
from ftjax.config.yaml_text import dump
from ftjax.console import make_console, print_table, say
from ftjax.demo.model import fetch

LONGEST_ANSWER = 48  # tokens; the forms take 25 to 36
SPLITS = ("train", "validation", "test")


def demo(out: Path, *, model: str | None = None, overrides: Sequence[str] = ()) -> dict:
    """Run the demo in `out`, print before and after, and write `result.json` there; return it.

    Args:
        model: another model than SmolLM2-135M-Instruct, which is downloaded.
        overrides: `key=value` for the training.

    Raises UserError if the model cannot be downloaded, or for wrong overrides.
    """
    console = make_console()
    started = time.monotonic()
    seconds: dict[str, float] = {}

    def phase(name: str) -> None:
        seconds[name] = round(time.monotonic() - started - sum(seconds.values()), 1)

    config = write_files(out)
    given = model or str(fetch(out / "model"))
    settings = load_config(config, [f"model.path={given}", *overrides])
    run, merged = Path(settings.output_dir), out / "merged"
    phase("download")
    prompts, forms = read_test(out / "data" / "test.jsonl")
    say(console, f"the base model answers {len(prompts)} messages")
    before = answers(given, None, prompts)
    phase("base answers")
    say(console, f"before training: {rate(before, forms)}")

    say(console, f"\n$ ftjax train {config} model.path={given} {' '.join(overrides)}".rstrip(), "bold")
    train_config(settings, command="ftjax demo")
    phase("training")
    say(console, f"\nthe tuned model answers {len(prompts)} messages")
    after = answers(given, run / "final", prompts)
    phase("tuned answers")
    shutil.rmtree(merged, ignore_errors=True)  # left by an earlier demo; `export` refuses a folder that is not empty
    say(console, f"\n$ ftjax export {run} --out {merged} --merge", "bold")
    export(run, merged, merge=True)
    phase("export")

    show(console, prompts, forms, before, after)
    say(console, f"exact match before: {rate(before, forms)}")
    say(console, f"exact match after:  {rate(after, forms)}", "bold")
    total = time.monotonic() - started
    say(console, f"{total / 60:.1f} minutes: " + ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items()))
    result = {"messages": len(forms), "before": hits(before, forms), "after": hits(after, forms), "seconds": seconds}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(
        console,
        f"\n{run / 'final'} holds a PEFT adapter, {merged} a Hugging Face model. Next:\n"
        f"  ftjax generate {merged} --prompt 'hi, I need two red desk lamps by Friday. Anna Keller'\n"
        f"  ftjax chat {given} --adapter {run / 'final'}\n"
        f"  ftjax train {config} data.train=YOUR.jsonl data.validation=null output_dir=runs/mine",
    )
    return result


def write_files(out: Path) -> Path:
    """Write the data and the configuration, whose paths are those in `out`; return the path of the configuration."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    with as_file(files("ftjax.demo")) as here:
        for split in SPLITS:
            shutil.copyfile(here / "data" / f"{split}.jsonl", out / "data" / f"{split}.jsonl")
        text = (here / "demo.yaml").read_text(encoding="utf-8")
    path = out / "demo.yaml"
    own = re.sub(r"(?<=: )demo/(\S+)$", lambda found: dump([str(out / found[1])])[2:].strip(), text, flags=re.M)
    path.write_text(own, encoding="utf-8")
    return path


def read_test(path: Path) -> tuple[list[list[dict]], list[dict]]:
    """Return the prompts (system and user turns) and the expected forms."""
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [row[:-1] for row in rows], [json.loads(row[-1]["content"]) for row in rows]


def answers(model: str, adapter: Path | None, prompts: list[list[dict]]) -> list[str]:
    """Return greedy answers to all prompts, in one batch."""
    loaded = load(model, adapter, dtype="float32")
    return loaded.generate(prompts, max_new_tokens=LONGEST_ANSWER, batch_size=len(prompts))


def exact(answer: str, form: dict) -> bool:
    """Return whether the answer is the form's JSON object: the same keys with the same values, and nothing else."""
    try:
        return json.dumps(json.loads(answer), sort_keys=True) == json.dumps(form, sort_keys=True)
    except json.JSONDecodeError:
        return False


def hits(given: list[str], forms: list[dict]) -> int:
    return sum(exact(answer, form) for answer, form in zip(given, forms, strict=True))


def rate(given: list[str], forms: list[dict]) -> str:
    return f"{hits(given, forms)} of {len(forms)} messages ({hits(given, forms) / len(forms):.0%})"


def show(console: Console, prompts: list[list[dict]], forms: list[dict], before: list[str], after: list[str]) -> None:
    """Print three messages with the answers before and after."""
    rows = []
    for number in range(3):
        mark = "exact" if exact(after[number], forms[number]) else f"expected {json.dumps(forms[number])}"
        told, answered = (
            text.strip().replace(",", ", ") for text in (before[number], after[number])
        )  # so that lines can break
        rows.append((prompts[number][-1]["content"], told, f"{answered}\n({mark})"))
    say(console)
    title = f"three of the {len(forms)} held-out messages"
    print_table(console, ("message", "before", "after"), rows, title=title, left=(0, 1, 2))
