"""Presents the tensors of a GGUF file as a Hugging Face checkpoint's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ftjax.errors import UserError
from ftjax.hub.gguf.config import family_in, read_config
from ftjax.hub.gguf.families import parts
from ftjax.hub.gguf.file import open_gguf
from ftjax.hub.gguf.layout import Part
from ftjax.hub.gguf.rope import FACTORS, LONG, SHORT
from ftjax.models.facts import complete_config
from ftjax.models.model import Model, build_module


class GGUFSource:
    """The tensors of a GGUF file under Hugging Face names and in Hugging Face layout (see `TensorSource`).

    Block-quantised tensors are read as float32; F32, F16 and BF16 as they are stored. Only the rows that are asked for are
    read and dequantised, and of a tensor that is stored transposed all.

    Raises UserError for tensors that the model does not have.
    """

    def __init__(self, path: Path):
        self._file = open_gguf(path)
        model_type, family = family_in(self._file)
        config = complete_config(read_config(path), str(path))
        model = Model.of(build_module(config), config)
        names = [piece.name for spec in model.specs.values() for piece in spec.written()]
        stored = self._file.tensors
        self._shapes = {name: tensor.shape for name, tensor in stored.items()}
        self._parts: dict[str, Part] = {
            name: part
            for part in parts(family, config, model.sizes.layers, names)
            if all(one in stored for one in part.gguf)
            for name in part.hub
        }
        known = {one for part in self._parts.values() for one in part.gguf}
        if odd := sorted(set(stored) - known - {FACTORS, SHORT, LONG}):
            raise UserError(f"{path}: it holds the tensor {odd[0]}, which no Hugging Face {model_type} has")

    def keys(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parts[name].hub_shape(name, self._shapes)

    def dtype(self, name: str) -> np.dtype:
        return self._file.dtype(self._parts[name].gguf[0])

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        rows = index[0] if index else slice(None)
        out = self._parts[name].restored(name, self._file.read_rows, self._shapes, rows)
        return np.ascontiguousarray(out[(slice(None), *index[1:])]) if len(index) > 1 else out
