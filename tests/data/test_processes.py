"""Tests with real processes under `jax.distributed` that a position saved by four resumes on two, and that every row is seen
once."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

from data_sets import load, whole, write_rows
from quick_compile import QUICK

WORKER = """
import json, sys
import jax

address, count, index, path, out, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:7]
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(address, count, index)
sys.path.insert(0, sys.argv[8])
from data_sets import documents_in, load

from pathlib import Path

split = load(Path(path), max_length=64)
share = 16 // count
batches = split.batches(16, seed=0, shuffle=True, epochs=1, rows=range(index * share, (index + 1) * share))
if sys.argv[7] != "-":
    batches.set_state(json.loads(Path(sys.argv[7]).read_text())["state"])
seen, rows = [], 0
for _, batch in zip(range(int(steps)), batches):
    seen += documents_in(batch)
    rows += len(batch["tokens"])
state = {"state": batches.get_state(), "seen": seen, "rows": rows, "processes": jax.process_count()}
Path(out).write_text(json.dumps(state))
jax.distributed.shutdown()
"""


def launch(count: int, path: Path, folder: Path, steps: int, state: Path | str) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    outs = [folder / f"{count}-{index}.json" for index in range(count)]
    environment = {**os.environ, "XLA_FLAGS": QUICK, "FTJAX_CACHE": str(folder / "cache")}
    tests = str(Path(__file__).resolve().parents[1])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(count), str(i), str(path), str(out), str(steps), str(state), tests],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i, out in enumerate(outs)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(said)
    return [json.loads(out.read_text()) for out in outs]


def test_four_processes_stop_and_two_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / "a.jsonl", 400)
    split = load(path, max_length=64)
    total = -(-split.rows_per_epoch(0) // 16)
    first = launch(4, path, tmp_path, total // 2, "-")
    assert {part["processes"] for part in first} == {4} and {part["rows"] for part in first} == {total // 2 * 4}
    assert all(part["state"] == first[0]["state"] for part in first)
    second = launch(2, path, tmp_path, 1000, tmp_path / "4-3.json")
    seen = Counter(tuple(document) for part in [*first, *second] for document in part["seen"])
    assert seen == whole(split) and set(seen.values()) == {1}
