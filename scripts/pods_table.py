"""Fills in the table of docs/pods.md with one `ftjax plan` per line, one at a time.

    python scripts/pods_table.py [--plans DIR] [--have | --missing]

Plans in DIR are reused. `--have` makes no new ones and leaves lines without a plan as they are on the page; `--missing` makes
those that the page lacks.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "pods.md"
START, END = "<!-- table: scripts/pods_table.py -->", "<!-- end of table -->"
BFLOAT16 = "optimizer.param_dtype=bfloat16", "optimizer.state_dtype=bfloat16"
CASES = [  # label, configuration, slice, rows, overrides
    ("Llama-3.1-8B, LoRA", "8b-lora", "v5e-8", 16, ()),
    ("Llama-3.1-8B, LoRA", "8b-lora", "v5e-16", 32, ()),
    ("Llama-3.1-8B, LoRA", "8b-lora", "v5e-256", 512, ()),
    ("Llama-3.1-8B, LoRA", "8b-lora", "v6e-8", 16, ()),
    ("Llama-3.1-8B, LoRA", "8b-lora", "v5p-32", 16, ("data.max_length=32768", "mesh={fsdp: 8, sequence: 2}")),
    ("Llama-3.1-8B, LoRA", "8b-lora", "v5p-64", 8, ("data.max_length=131072", "mesh={fsdp: 8, sequence: 4}")),
    ("Llama-3.1-8B, full", "8b-full", "v5e-16", 32, BFLOAT16),
    ("Llama-3.1-8B, full, float32", "8b-full", "v5e-16", 32, ()),
    ("Llama-3.1-8B, full", "8b-full", "v6e-8", 16, BFLOAT16),
    ("Llama-3.1-8B, full, float32", "8b-full", "v5p-16", 16, ()),
    ("Llama-3.1-70B, LoRA", "70b-lora", "v5p-64", 64, ()),
    ("Qwen3-30B-A3B, LoRA with experts", "30b-a3b-lora", "v5e-16", 16, ()),
    ("Qwen3-30B-A3B, LoRA with experts", "30b-a3b-lora", "v6e-16", 16, ()),
    ("Qwen3-30B-A3B, nf4, LoRA with experts", "30b-a3b-lora", "v5e-16", 16, ("model.quantization=nf4",)),
    ("Qwen3-30B-A3B, nf4, LoRA with experts", "30b-a3b-lora", "v6e-16", 16, ("model.quantization=nf4",)),
]
NOT_PLANNED = "not planned yet"
COLUMNS = (
    "", "slice", "chips", "rows", "tokens per row", "mesh", "arguments + temporaries", "alive at one time",
    "memory of a chip", "fits", "least step time", "bound by", "max. tokens/s per chip", "max. MFU", "planning CPU time",
)  # fmt: skip


def command(name: str, slice_: str, rows: int, said: tuple[str, ...]) -> list[str]:
    return ["plan", f"configs/plan/{name}.yaml", "--topology", slice_, f"training.global_batch_size={rows}", *said]


def line(what: str, slice_: str, rows: int, plan: dict | None) -> str:
    if plan is None:
        return table_line([what, slice_, "", rows, "", "", NOT_PLANNED, *[""] * (len(COLUMNS) - 7)])
    memory = plan["memory"]
    used = (memory["total"] - memory.get("program", 0)) / 1e9
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    cells = [what, slice_, plan["chips"], plan["rows"], f"{plan['max_length']:,}", mesh]
    peak = "" if plan["peak"] is None else f"{plan['peak'] / 1e9:.2f} GB"
    cells += [f"{used:.2f} GB", peak, f"{plan['limit'] / 1e9:.1f} GB", "yes" if plan["fits"] else "no"]
    took = f"{plan['plan_cpu_seconds']:.0f} s"
    if plan["step_seconds"] is None:
        return table_line([*cells, "", "", "", "", took])
    speed = f"{plan['tokens_per_second_per_chip']:,.0f}"
    return table_line([*cells, f"{plan['step_seconds']:.2f} s", plan["bound"], speed, f"{plan['mfu']:.0%}", took])


def table_line(cells: list) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=Path, default=ROOT / ".cache" / "pods", help="where plans are kept, as JSON")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--have", action="store_true", help="make none")
    which.add_argument("--missing", action="store_true", help="make only those that the page lacks")
    options = parser.parse_args()
    options.plans.mkdir(parents=True, exist_ok=True)
    text = PAGE.read_text(encoding="utf-8")
    before, (table, after) = text.split(START)[0], text.split(START)[1].split(END)
    published = {tuple(line.split(" | ")[:2]): line for line in table.splitlines() if NOT_PLANNED not in line}
    lines = [table_line(COLUMNS), table_line(["---"] * len(COLUMNS))]
    for what, name, slice_, rows, said in CASES:
        kept = options.plans / ("_".join(["plan", name, slice_, *said]) + ".json")
        on_page = published.get((f"| {what}", slice_))
        if not kept.exists() and not options.have and not (options.missing and on_page):
            ask = [sys.executable, "-m", "ftjax", *command(name, slice_, rows, said), "--json"]
            done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
            if done.returncode not in (0, 1) or not done.stdout:
                raise SystemExit(f"{name} on {slice_}: {done.stderr[-2000:]}")
            kept.write_text(done.stdout)
        plan = json.loads(kept.read_text()) if kept.exists() and kept.stat().st_size else None
        lines.append(on_page if plan is None and on_page else line(what, slice_, rows, plan))
        print(lines[-1], flush=True)
    PAGE.write_text(before + "\n".join([START, *lines, END]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
