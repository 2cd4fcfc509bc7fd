"""Tests that devices hold one copy of the state: at the start, while it is saved, and after resuming."""

import gc
import json
import shutil

import jax
import numpy as np
import pytest
from oracle import Case, make_hf
from tiny_tokenizer import save_tokenizer

import ftjax.train.loop as loop
from ftjax.config import Config
from ftjax.train.checkpoint import Checkpoints
from ftjax.train.run import train

# Weights on all devices, and as many copies of them: the first has both.
MESHES = [
    {"data": 2, "fsdp": 4},
    *(pytest.param(mesh, marks=pytest.mark.sweep) for mesh in ({"fsdp": 8}, {"data": 8, "fsdp": 1})),
]


def alive() -> int:
    """Return the bytes of all arrays on devices; views of single shards have no bytes of their own."""
    gc.collect()
    return sum(a.nbytes for a in jax.live_arrays() if not isinstance(a.sharding, jax.sharding.SingleDeviceSharding))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_one_state_is_alive(mesh, tmp_path, monkeypatch):
    gc.freeze()  # what other tests left is not looked through again
    make_hf(Case("llama", "llama", {"initializer_range": 0.05}), tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    words = ["".join(np.random.default_rng(n).choice(list("abcdef"), 6)) for n in range(40)]
    text = "".join(json.dumps({"prompt": word, "completion": word[::-1]}) + "\n" for word in words)
    (tmp_path / "train.jsonl").write_text(text)
    config = Config.model_validate({
        "model": {"path": str(tmp_path / "model"), "dtype": "float32", "compute_dtype": "float32"}, "method": {"name": "full"},
        "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 32}, "mesh": mesh, "output_dir": str(tmp_path / "run"),
        "training": {"max_steps": 4, "global_batch_size": 8, "save_steps": 2, "report_to": []},
    })  # fmt: skip
    seen: dict[str, list[float]] = {}
    before = alive()

    def note(name: str, state) -> None:
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        seen.setdefault(name, []).append((alive() - before) / size)

    save, restore, go_on = Checkpoints.save, Checkpoints.restore, loop.Run.loop

    def watched_save(self, step, state, meta, reference=None):
        save(self, step, state, meta, reference)
        note("save", state)

    def watched_restore(self, like, reference=None):
        note("before restoring", like)
        state, *rest = restore(self, like, reference)
        note("restored", state)
        return state, *rest

    def watched_loop(self, first):
        note("going on" if first else "start", self.state)
        return go_on(self, first)

    monkeypatch.setattr(Checkpoints, "save", watched_save)
    monkeypatch.setattr(Checkpoints, "restore", watched_restore)
    monkeypatch.setattr(loop.Run, "loop", watched_loop)
    train(config)
    assert seen.keys() == {"start", "save"} and len(seen["save"]) == 2
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    train(config)
    assert max(seen.pop("before restoring")) < 0.01, "parameters that a checkpoint replaces are given back first"
    assert all(0.99 < part < 1.06 for parts in seen.values() for part in parts), seen  # a batch is on the device as well
