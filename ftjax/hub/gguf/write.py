"""Writes a model as one GGUF file, tensor by tensor."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter, LlamaFileType
from gguf import GGMLQuantizationType as GGMLType
from gguf.constants import GGML_QUANT_VERSION, GGUFType
from gguf.quants import quantize

from ftjax.errors import UserError
from ftjax.hub.gguf.families import copies_output, family_of, parts
from ftjax.hub.gguf.family import Family
from ftjax.hub.gguf.layout import One, Part, Same
from ftjax.hub.gguf.settings import gguf_settings
from ftjax.hub.gguf.tokenizer_keys import model_name, tokenizer_keys
from ftjax.hub.narrow import narrowed
from ftjax.hub.safetensors import Tensor
from ftjax.long_steps import long_step
from ftjax.models.composite import text_of
from ftjax.models.model import Model

TYPES = {
    "f32": (GGMLType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
WHOLE = ("token_embd.weight", "output.weight")  # which 4 bits would hurt most
# llama.cpp computes with these in float32: positions, scores of experts, convolutions, and norms of groups.
ALWAYS_F32 = ("position_embd.weight", "ffn_gate_inp.weight", "conv1d.weight", "shortconv.conv.weight", "ssm_norm.weight")


@dataclass(frozen=True)
class Stored:
    """A tensor to write: `data()` is called once, in its turn, and returns this shape in float32."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLType
    data: Callable[[], np.ndarray]

    def bytes(self) -> np.ndarray:
        data = np.ascontiguousarray(self.data(), np.float32)
        assert data.shape == self.shape, (self.name, data.shape, self.shape)
        return quantize(narrowed(self.name, data, np.dtype(np.float16)) if self.kind == GGMLType.F16 else data, self.kind)

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


def kind_of(name: str, shape: Sequence[int], asked: str) -> GGMLType:
    """Return how a tensor is stored in a file of the type `asked`: vectors as float32; rows that do not divide into blocks as
    float16."""
    kind, _ = TYPES[asked]
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(ALWAYS_F32):
        return GGMLType.F32
    if kind == GGMLType.Q4_0 and name in WHOLE:
        kind = GGMLType.Q8_0
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLType.F16


def write_model(
    path: Path, model: Model, tensors: Sequence[Tensor], asked: str, tokenizer: Any, *,
    ends: Collection[int], folder: Path | None, name: str, note: Callable[[str], None],
) -> None:  # fmt: skip
    """Write a whole model.

    Args:
        tensors: under Hugging Face names, in float32.
        asked: one of `TYPES`.
        ends: ids that end an answer.
        folder: where the tokenizer comes from.
        name: the model's, for people.
        note: called with remarks for the user.

    Raises UserError if llama.cpp cannot compute this model as it is, or its tokenizer gives other ids.
    """
    config = text_of(model.config)
    family = family_of(config)
    settings, factors = gguf_settings(config, model.sizes, note)
    values: dict[str, Any] = {
        "general.type": GGUFType.MODEL, "general.name": model_name(name, tokenizer),
        "general.file_type": int(TYPES[asked][1]), "general.quantization_version": GGML_QUANT_VERSION,
        **{f"{family.architecture}.{key}": value for key, value in settings.items()},
        **tokenizer_keys(tokenizer, model.sizes.vocab, ends, config.get("bos_token_id"), folder, note),
    }  # fmt: skip
    stored = [Stored(n, table.shape, GGMLType.F32, lambda table=table: table) for n, table in factors.items()]
    write_file(path, family.architecture, values, [*stored, *model_tensors(family, model, tensors, asked)])


def model_tensors(family: Family, model: Model, tensors: Sequence[Tensor], asked: str) -> Iterator[Stored]:
    """Yield the tensors of a file, in the order of the layers."""
    config = text_of(model.config)
    by_name = {tensor.name: tensor for tensor in tensors}
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    found: list[Part] = parts(family, config, model.sizes.layers, by_name)
    names = {name for part in found for name in part.gguf}
    if "output.weight" not in names and copies_output(family, config):
        change = next((make(config) for end, make in family.changes.items() if re.search(end, "lm_head.weight")), Same())
        found.append(One(f"{model.output}.weight", "output.weight", change))
    for part in sorted(found, key=_place):
        for name, shape in part.shapes(shapes).items():
            yield Stored(
                name, shape, kind_of(name, shape, asked),
                lambda part=part, name=name: part.stored(name, lambda one: by_name[one].data()),
            )  # fmt: skip


def _place(part: Part) -> tuple[int, str]:
    name = part.gguf[0]
    return (int(name.split(".")[1]) if name.startswith("blk.") else -1 if name.startswith("token") else 1 << 30, name)


def write_file(path: Path, architecture: str, values: Mapping[str, Any], tensors: Sequence[Stored]) -> None:
    """Write a GGUF file, which appears under its name only when complete."""
    partial = path.with_name(path.name + ".partial")
    writer = GGUFWriter(partial, architecture)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for key, value in values.items():
            _add(writer, key, value)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with long_step(f"writing {path.name}", sum(tensor.nbytes for tensor in tensors), "bytes") as step:
            for tensor in tensors:
                writer.write_tensor_data(tensor.bytes())
                step.advance(tensor.nbytes)
        writer.close()
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}; nothing was left half-written") from None
    finally:
        writer.close()
        with suppress(OSError):  # where it could not be made
            partial.unlink()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a key with the type of its value; lists of whole numbers are int32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, [int(one) if isinstance(one, int) and not isinstance(one, bool) else one for one in value])
