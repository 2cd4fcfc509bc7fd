"""Makes a smaller model to distill into: some layers of a model, evenly spread from the first to the last, with all else of it.

    python scripts/make_student.py MODEL OUT --layers 4

MODEL is a Hub id, a folder or a .gguf file. OUT is a Hugging Face folder with tokenizer. It has to be trained: no layer expects
what the one before it now gives.
"""

import argparse
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ftjax.config import FullConfig, ModelConfig
from ftjax.errors import UserError
from ftjax.hub.model_folder import from_source, model_tensors, write_folder
from ftjax.hub.open import open_base
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.models.model import Model, build_module

LAYER = re.compile(r"(?<=\.)(layers|h)\.(\d+)(?=\.)")


class SomeLayers:
    """A `TensorSource` whose layer `n` is layer `chosen[n]` of another."""

    def __init__(self, source, chosen: list[int]):
        self._source, self._chosen = source, chosen

    def _name(self, name: str) -> str:
        return LAYER.sub(lambda found: f"{found[1]}.{self._chosen[int(found[2])]}", name)

    def keys(self) -> list[str]:
        place = {of: number for number, of in enumerate(self._chosen)}
        found = [(name, LAYER.search(name)) for name in self._source.keys()]
        kept = [(name, layer) for name, layer in found if layer is None or int(layer[2]) in place]
        return [name if layer is None else LAYER.sub(f"{layer[1]}.{place[int(layer[2])]}", name) for name, layer in kept]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._name(name))

    def dtype(self, name: str) -> np.dtype:
        return self._source.dtype(self._name(name))

    def read(self, name: str, index=()) -> np.ndarray:
        return self._source.read(self._name(name), index)


def make_student(name: str, out: Path, layers: int, dtype: str = "float32") -> Path:
    """Write the student. Raises UserError unless the model has at least so many layers and is cut by their number alone."""
    path, config, source = open_base(name)
    whole = config["num_hidden_layers"]
    if not 2 <= layers <= whole:
        raise UserError(f"--layers {layers}: {name} has {whole}; choose 2 to {whole}")
    chosen = np.linspace(0, whole - 1, layers).round().astype(int).tolist()
    config = {**config, "num_hidden_layers": layers}
    if config.get("layer_types"):
        config["layer_types"] = [config["layer_types"][one] for one in chosen]
    model = Model.of(build_module(config), config)
    tensors = model_tensors(model, from_source(SomeLayers(source, chosen), {}), {}, FullConfig(), jnp.dtype(dtype))
    out.mkdir(parents=True, exist_ok=True)
    write_folder(out, model, tensors, dtype, path)
    load_tokenizer(ModelConfig(path=name)).save_pretrained(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args()
    print(make_student(options.model, options.out, options.layers, options.dtype))
