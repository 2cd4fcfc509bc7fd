"""Adapters per request: a base model with places for LoRA adapters, which are filled and emptied while it generates."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftjax.config import LoraConfig, MeshConfig, ModelConfig
from ftjax.errors import UserError
from ftjax.generate.load import choose_dtype
from ftjax.generate.session import Generator
from ftjax.hub.adapter.peft import attach_adapter, load_adapter
from ftjax.hub.load import init_params, load_base
from ftjax.hub.open import open_base
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.mesh import make_mesh
from ftjax.methods.lora_stack import attach_stack, filling
from ftjax.models.model import Model, build_module
from ftjax.models.nn.quantise import quantise


class AdapterStack:
    """The places of a generator's adapters.

    Attributes:
        generator: its parameters have the stacked arrays.
        places: number of places, without the empty one.
        shapes: by path, the shape of one adapter's part of each stacked array.
    """

    def __init__(self, generator: Generator, config: Mapping[str, Any], places: int, rank: int):
        self.generator, self.places, self.rank = generator, places, rank
        self._config = config
        specs = generator.model.specs
        depths = {path: len(spec.stacked) for path, spec in specs.items() if path.rpartition(".")[2].startswith("stack_")}
        self.shapes = {path: (*specs[path].stacked, *specs[path].shape[depth + 1 :]) for path, depth in depths.items()}
        with jax.set_mesh(generator.engine.mesh):
            where = {path: generator.params[path].sharding for path in self.shapes}
            self._write = jax.jit(partial(_write, depths), donate_argnums=0, out_shardings=where)

    @classmethod
    def load(
        cls, model_path: str, *, places: int, rank: int, wanted: Callable[[str], bool], revision: str | None = None,
        dtype: str = "auto", mesh: Any = None, tokenizer: Any = None, chat_template: str | None = None,
        quantization: str | None = None, special_tokens_in_text: Any = None, fold_system: bool | None = None,
    ) -> "AdapterStack":  # fmt: skip
        """Load a base model with empty places; arguments are those of `Generator` and `attach_stack`."""
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else mesh
        kind = choose_dtype(dtype)
        path, config, source = open_base(model_path, revision)
        root = build_module(config)
        if quantization:
            quantise(root, quantization)
        attach_stack(root, places + 1, rank, wanted)
        model = Model.of(root, config)
        # The arrays have the dtype of activations, in which they are multiplied.
        specs = {name: spec.astype(kind) for name, spec in model.specs.items() if spec.row.adapter}
        params = {**load_base(model, source, mesh, kind, str(path)), **init_params(specs, mesh, 0)}
        settings = ModelConfig(path=model_path, revision=revision, tokenizer=tokenizer, chat_template=chat_template)
        generator = Generator.of(model, params, load_tokenizer(settings), mesh=mesh, dtype=kind, source=path)
        generator.special_tokens_in_text = special_tokens_in_text or "split"
        generator.fold_system = fold_system is not False
        return cls(generator, config, places, rank)

    def read(self, folder: Path) -> dict[str, np.ndarray]:
        """Return the arrays of an adapter folder, on the host. Raises UserError if it cannot have a place."""
        root = build_module(self._config)
        try:
            settings = attach_adapter(root, folder)
            if not isinstance(settings, LoraConfig) or settings.use_dora:
                kind = "DoRA" if isinstance(settings, LoraConfig) else settings.name
                raise UserError(f"it is {kind}, and rows of one batch differ in plain LoRA only; serve it by itself")
            adapted = Model.of(root, self._config)
            alone = make_mesh(MeshConfig(), jax.local_devices()[:1])
            values = load_adapter(adapted, folder, alone)
            return filling(self.generator.model, adapted, {path: np.asarray(value) for path, value in values.items()})
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith(str(folder)) else f"{folder}: {text}") from None

    def fill(self, place: int, arrays: Mapping[str, np.ndarray] | None) -> None:
        """Put an adapter into a place, or empty it. No program may be running."""
        assert 1 <= place <= self.places, place
        generator = self.generator
        if arrays is None:
            arrays = {path: np.zeros(shape, np.float32) for path, shape in self.shapes.items()}
        with jax.set_mesh(generator.engine.mesh):
            new = {path: generator.engine.replicate(np.asarray(arrays[path], jnp.float32)) for path in self.shapes}
            old = {path: generator.params[path] for path in self.shapes}
            generator.params.update(self._write(old, new, generator.engine.replicate(np.int32(place))))


def _write(depths: Mapping[str, int], whole: dict[str, jax.Array], new: dict[str, jax.Array], place: jax.Array):
    def one(path: str) -> jax.Array:
        index = (slice(None),) * depths[path]
        return whole[path].at[(*index, place)].set(new[path].astype(whole[path].dtype))

    return {path: one(path) for path in whole}


def updates_of(folders: Sequence[Path], config: Mapping[str, Any]) -> tuple[int, Callable[[str], bool]]:
    """Return `(the largest rank, whether any of these adapters updates the layer with this name)`."""
    rank, names = 1, set()
    for folder in folders:
        root = build_module(config)
        attach_adapter(root, folder)
        model = Model.of(root, config)
        for path, spec in model.trainable.items():
            if path.endswith(".lora_A"):
                rank = max(rank, spec.shape[-2])
                names |= {piece.name.removesuffix(".lora_A.weight") for piece in spec.pieces()}
    return rank, names.__contains__
