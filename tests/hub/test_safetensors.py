"""Tests safetensors: against the library, with damaged files, and the memory that loading takes."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from oracle import Case, load, make_hf
from safetensors.numpy import load_file, save_file

from ftjax.errors import UserError
from ftjax.hub.safetensors import SafetensorsFolder, Tensor, write_model

TENSORS = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b.weight": (np.arange(30) / 7).astype(ml_dtypes.bfloat16).reshape(5, 3, 2),
    "c": np.float16([1.5, -2]),
    "scalar": np.array(7, np.int64),
}


def as_tensors(tensors):
    return [Tensor(name, value.shape, value.dtype, lambda value=value: value) for name, value in tensors.items()]


@pytest.mark.parametrize("limit", [1 << 30, 100])
def test_both_directions(tmp_path, limit):
    """The library reads ftjax's files and ftjax the library's, in one file and in shards."""
    files = write_model(tmp_path, as_tensors(TENSORS), limit)
    assert len(files) == (1 if limit > 100 else 2)
    theirs = {name: value for file in files for name, value in load_file(file).items()}
    ours = SafetensorsFolder(tmp_path)
    save_file(TENSORS, tmp_path / "again.safetensors")
    again = SafetensorsFolder(tmp_path, single="again.safetensors")
    assert theirs.keys() == set(ours.keys()) == set(again.keys()) == TENSORS.keys()
    for name, value in TENSORS.items():
        for got in (theirs[name], ours.read(name), again.read(name)):
            assert got.dtype == value.dtype and got.tobytes() == value.tobytes(), name


def test_parts(tmp_path):
    write_model(tmp_path, as_tensors(TENSORS))
    source = SafetensorsFolder(tmp_path)
    np.testing.assert_array_equal(source.read("a.weight", (slice(1, 3), slice(2, 5))), TENSORS["a.weight"][1:3, 2:5])
    np.testing.assert_array_equal(source.read("b.weight", (slice(2, 5),)), TENSORS["b.weight"][2:5])


@pytest.fixture
def folder(tmp_path):
    make_hf(Case("llama", "llama"), tmp_path)
    return tmp_path


@pytest.mark.parametrize("keep", [3, 60, -40])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors.*(cut off|truncated).*download it again"):
        load(folder)


def test_missing_file(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors.*missing.*config\.json"):
        load(folder)


def test_index_without_its_shard(tmp_path):
    make_hf(Case("llama", "llama"), tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        load(tmp_path)


def test_keys_that_do_not_fit(folder):
    """One error names missing, unused and misshapen tensors (T18)."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.extra.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].copy()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        load(folder)
    for word in ("missing", "mlp.up_proj", "not part of", "layers.0.extra", "another shape", "model.norm.weight", "(31,)"):
        assert word in str(error.value)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    import os

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_model(tmp_path, as_tensors(TENSORS))
    assert not list(tmp_path.iterdir())


MEASURE = """
import json, os, sys, threading, time
import jax, jax.numpy as jnp
from pathlib import Path
from ftjax.config import MeshConfig
from ftjax.hub.load import load_base, open_model
from ftjax.mesh import make_mesh
from ftjax.models.model import Model, build_module

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

config, source = open_model(Path(sys.argv[1]))
model = Model.of(build_module(config), config)
mesh = make_mesh(MeshConfig())
jax.block_until_ready(jnp.ones((256, 256)) @ jnp.ones((256, 256)))
before, peak, running = resident(), [0], [True]

def watch():
    while running[0]:
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
params = load_base(model, source, mesh, jnp.float32, "x")
jax.block_until_ready(params)
running[0] = False
thread.join()
size = sum(leaf.nbytes for leaf in params.values())
print(json.dumps({"added": peak[0] - before, "size": size, "largest": max(s.size * 4 for s in model.specs.values())}))
"""


def test_loading_holds_one_copy(tmp_path):
    """The process grows by at most 1.15 times the model plus its largest tensor."""
    values = {"vocab_size": 4096, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "head_dim": 64}
    make_hf(Case("big", "llama", values), tmp_path)
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True,
                         env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})  # fmt: skip
    seen = json.loads(run.stdout)
    one = 4 * 768 * 4096  # the largest tensor of the checkpoint, in bytes
    assert seen["size"] > 3e8
    assert seen["added"] <= 1.15 * seen["size"] + one, seen
