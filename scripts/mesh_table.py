"""Fills in the table of meshes in docs/devices.md, and compiles a step on each mesh to check its collectives.

    python scripts/mesh_table.py [--kept DIR] [--have]

For every mesh on one slice and on two, the LoRA step of a small Llama is compiled as `ftjax plan` does, and its collectives are
checked by `faults`. Results in DIR are reused; `--have` compiles nothing.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from jax.sharding import Mesh

from ftjax.compile_cache import nothing_kept
from ftjax.config import Config, MeshConfig
from ftjax.mesh import WEIGHT_AXES, crossings, describe, make_mesh, nearness
from ftjax.plan.hlo import Program
from ftjax.plan.plan import design_for, trace_step
from ftjax.plan.roofline import Traffic, traffic
from ftjax.plan.topology import parse

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "devices.md"
START, END = "<!-- table: scripts/mesh_table.py -->", "<!-- end of table -->"
SLICES = ("v5e-16", "v6e-16", "v5e-64", "v5p-64")
HEADS = 16  # tensor x sequence must divide it
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1024,
    "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": 128, "vocab_size": 8192,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
# XLA's partitioner is the same; what comes after it, scheduling above all, is done with less effort in a third of the time. The
# libtpu of jax 0.12 has no such option.
QUICK = {"exec_time_optimization_effort": -1.0} if version("jax") < "0.12" else {}
Sizes = Mapping[str, int]


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Yield meshes of a slice: all tensor x sequence that divide the heads, with fsdp for the rest; and some with data=2 or
    expert=2."""
    powers = [2**k for k in range(HEADS.bit_length())]
    for tensor, sequence in itertools.product(powers, powers):
        if tensor * sequence <= min(HEADS, devices):
            yield {"fsdp": devices // (tensor * sequence), "tensor": tensor, "sequence": sequence}
    for axis, more in itertools.product(("data", "expert"), (1, 2)):
        yield {axis: 2, "fsdp": devices // (2 * more * more), "tensor": more, "sequence": more}


def config_of(folder: Path, mesh: Sizes, slices: int, method: Mapping | None = None) -> Config:
    """Return a configuration with rows of 256 tokens, two for each device that has its own rows."""
    mesh = {**mesh, "data": slices * mesh.get("data", 1), "slices": slices}
    return Config.model_validate({
        "model": {"path": str(folder), "remat": "full"}, "method": method or {"name": "lora", "r": 4}, "mesh": mesh,
        "data": {"train": "none.jsonl", "max_length": 256},
        "training": {"global_batch_size": 2 * math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "expert"))},
    })  # fmt: skip


def compiled(
    folder: Path, topology: str, slices: int, mesh: Sizes, method: Mapping | None = None
) -> tuple[list[Traffic], float]:
    """Return `(the traffic of the step, the bytes of its gradients in float32)`."""
    where = parse(topology, slices=slices)
    made = design_for(config_of(folder, mesh, slices, method), where)
    traced, _ = trace_step(made)
    with nothing_kept():
        program = Program.of(traced.lower().compile(compiler_options=QUICK), made.mesh)
    gradients = 4.0 * sum(spec.size for spec in made.model.trainable.values())
    return traffic(program.transfers(), made.mesh, where), gradients


def faults(rows: Sequence[Traffic], gradients: float) -> list[str]:
    """Return the collectives that are on the wrong axes.

    Along fsdp and expert, weights are gathered, and rows of the embedding and of the loss are exchanged. Along tensor, results
    are added; the loss adds its parts of the vocabulary over fsdp too. Along sequence, attention exchanges heads for tokens.
    Traffic along other axes must not exceed the gradients, which are added over all of them, and only sums may cross slices.

    Args:
        gradients: bytes of all gradients.
    """
    wrong, inside, between = [], 0.0, 0.0
    for row in rows:
        kind, axes = row.kind, set(row.axes)
        sums = kind in ("all-reduce", "reduce-scatter")
        between += row.dcn_bytes
        if row.dcn_bytes and not sums:
            wrong.append(f"{kind} of {row.dcn_bytes / 1e6:.3f} MB between slices")
        if not (
            (kind != "all-reduce" and axes <= {*WEIGHT_AXES})
            or (sums and axes <= {*WEIGHT_AXES, "tensor"})
            or (kind in ("all-gather", "all-to-all") and axes == {"tensor"})
            or (kind == "all-to-all" and axes == {"sequence"})
        ):
            inside += row.ici_bytes
    for where, size in (("within a slice along axes that only gradients are added over", inside), ("between slices", between)):
        if size > 2 * gradients:  # a sum passes twice
            wrong.append(f"{size / 1e6:.3f} MB {where}; gradients are {gradients / 1e6:.3f} MB")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, default=ROOT / ".cache" / "meshes", help="where results are kept, as JSON")
    parser.add_argument("--have", action="store_true", help="compile nothing")
    parser.add_argument("--only", nargs=2, metavar=("SLICE", "COUNT"), help="compile for one kind of slice and stop")
    options = parser.parse_args()
    options.kept.mkdir(parents=True, exist_ok=True)
    if options.only:
        return compile_all(options.kept, options.only[0], int(options.only[1]))
    for name, slices in itertools.product(SLICES, (1, 2)):
        if not options.have:  # a process compiles for one kind of device
            command = [sys.executable, __file__, "--kept", options.kept, "--only", name, str(slices)]
            subprocess.run(command, cwd=ROOT, check=True)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    PAGE.write_text(before + "\n".join([START, *table(options.kept), END]) + after, encoding="utf-8")


def compile_all(kept: Path, name: str, slices: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA))
        for mesh in meshes(parse(name).chips):
            path = result(kept, name, slices, mesh)
            if not path.exists():
                rows, gradients = compiled(Path(folder), name, slices, mesh)
                found = {"faults": faults(rows, gradients), "gradients": gradients, "rows": [row._asdict() for row in rows]}
                path.write_text(json.dumps(found, indent=1))
                print(name, slices, mesh, found["faults"] or "as it should be", flush=True)


def result(kept: Path, name: str, slices: int, mesh: Sizes) -> Path:
    return kept / ("_".join([name, str(slices), *(f"{axis}{size}" for axis, size in mesh.items())]) + ".json")


def table(kept: Path) -> list[str]:
    """Return the table: one line for all meshes of a slice with equal properties; slices with equal lines share them. Below it,
    how many steps were compiled."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in SLICES:
        found.setdefault(tuple(lines(name)), []).append(name)
    head = ["slice", "mesh", "axes that cross hosts", "axes that cross two slices", "axes not on a ring of neighbours"]
    rows = [f"| {', '.join(names)} {line}" for alike, names in found.items() for line in alike]
    return [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *rows, "", *outcome(kept)]


def lines(name: str) -> list[str]:
    alike: dict[tuple[str, ...], list[str]] = {}
    for mesh in meshes(parse(name).chips):
        one, two = (
            make_mesh(
                MeshConfig(**{"fsdp": 1, **mesh, "data": slices * mesh.get("data", 1), "slices": slices}),
                parse(name, slices=slices).devices(),
            )
            for slices in (1, 2)
        )
        hosts = ", ".join(axis for axis, over in crossings(one).items() if over.hosts)
        slices = ", ".join(axis for axis, over in crossings(two).items() if over.slices)
        alike.setdefault((hosts, slices, cost(one)), []).append(describe(one))
    return [f"| {'; '.join(sorted(meshes, key=len))} | {' | '.join(key)} |" for key, meshes in alike.items()]


def cost(mesh: Mesh) -> str:
    near = nearness(mesh)
    line = [axis for axis, found in near.items() if found.hops == 1 and not found.ring]
    apart = [f"{axis} ({found.links:.2g})" for axis, found in near.items() if found.hops > 1]
    return "; ".join(f"{word}: {', '.join(axes)}" for word, axes in (("line", line), ("apart", apart)) if axes)


def outcome(kept: Path) -> list[str]:
    """Return how many of the compiled steps had no faults, and the faults of the others."""
    found = {
        f"{name}, {slices} slice(s), {mesh}": result(kept, name, slices, mesh)
        for name, slices in itertools.product(SLICES, (1, 2))
        for mesh in meshes(parse(name).chips)
    }
    wrong = {what: json.loads(path.read_text())["faults"] for what, path in found.items() if path.exists()}
    good = sum(not faults for faults in wrong.values())
    return [
        f"{len(wrong)} of these {len(found)} steps were compiled, on one slice and on two; in {good} of them every collective "
        "is on the axes where it belongs.",
        *(f"- {what}: {'; '.join(faults)}" for what, faults in wrong.items() if faults),
    ]


if __name__ == "__main__":
    main()
