"""Makes a model folder with the shapes of a config.json and random weights, to measure without a download.

python scripts/bench/random_model.py CONFIG_FOLDER OUT [--dtype bfloat16]
"""

import argparse
import json
import math
import shutil
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ftjax.hub.safetensors import Tensor, write_file
from ftjax.models.facts import read_config
from ftjax.models.model import Model, build_module

POOL = 2**22  # random normals; every tensor repeats them from its own offset, which is fast for any size


def make_model(config: Path, folder: Path, dtype: str = "bfloat16") -> Path:
    """Write the model of the folder `config` to `folder`: normal weights of deviation 0.02, ones for the norms.

    Disk: the whole model in `dtype`. Host memory: one layer's largest tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hf_config = read_config(config)
    model = Model.of(build_module(hf_config), hf_config)
    kind = np.dtype(jnp.dtype(dtype))
    pool = (0.02 * np.random.default_rng(0).standard_normal(POOL, np.float32)).astype(kind)

    def values(number: int, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) < 2:
            return np.ones(shape, kind)
        return np.resize(np.roll(pool, 7919 * number), math.prod(shape)).reshape(shape)

    pieces = (piece for spec in model.specs.values() for piece in spec.written())
    tensors = [Tensor(piece.name, piece.shape, kind, partial(values, n, piece.shape)) for n, piece in enumerate(pieces)]
    write_file(folder / "model.safetensors", tensors)
    for file in config.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    written = json.loads((folder / "config.json").read_text()) | {"torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    make_model(options.config, options.out, options.dtype)
