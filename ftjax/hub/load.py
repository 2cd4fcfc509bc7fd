"""Loads weights into device memory slice by slice, straight into the right shards."""

import math
import mmap
import zlib
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ftjax.errors import UserError
from ftjax.hub.adapter.file import Renamed
from ftjax.hub.fetch import resolve_config
from ftjax.hub.joined import Joined
from ftjax.hub.narrow import narrowed
from ftjax.hub.packed.formats import dequantiser
from ftjax.hub.quantize import abstract_quantised, quantised_array
from ftjax.hub.safetensors import SafetensorsFolder
from ftjax.hub.source import TensorSource
from ftjax.long_steps import long_step
from ftjax.mesh import sharding
from ftjax.methods.tied import OUTPUTS, tied_names
from ftjax.models.facts import INSTEAD, complete_config, read_config
from ftjax.models.model import Model, build_module
from ftjax.models.nn.param import Layout, Spec, specs
from ftjax.models.nn.quantized import Quantized
from ftjax.models.registry import FAMILIES

# Tensors that other tools store beside quantised weights: GPTQ and AWQ, bitsandbytes, FP8 and compressed-tensors.
QUANTISED = (
    ".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".quant_map", ".SCB", ".weight_scale", ".weight_scale_inv",
    ".weight_packed", ".weight_zero_point", ".input_scale",
)  # fmt: skip

LARGE = 1 << 22  # bytes from which NumPy asks for huge pages


def open_model(path: Path) -> tuple[dict, TensorSource]:
    """Return `(config.json completed by transformers, the tensors)` of a model folder or a .gguf file."""
    hf_config = read_hf_config(path)
    if path.suffix == ".gguf":
        from ftjax.hub.gguf.model import GGUFSource

        return hf_config, GGUFSource(path)
    source = SafetensorsFolder(path)
    family = FAMILIES[hf_config["model_type"]]
    if family.composite is not None:
        source.rename(family.composite.in_model)
    # transformers' own names begin with `model.`, whatever those of published files do.
    source.add_prefix(family.prefix, but=("lm_head.", "embed_out.", "score.", "mtp."), but_with=("model.",))
    if family.from_composite:
        start = family.from_composite
        source.rename(lambda name: f"{family.prefix}.{name.removeprefix(start)}" if name.startswith(start) else name)
    unpack = dequantiser(read_config(path), str(path))
    found = unpack(source) if unpack else source
    if any(f".{module}." in name for module in family.joined for name in source.keys()):
        found = Joined(found, specs(build_module(hf_config)), family.joined)
    return hf_config, _with_embedding(hf_config, found)


def _with_embedding(hf_config: Mapping[str, Any], source: TensorSource) -> TensorSource:
    """Return the tensors; a tied table that the file holds only as the output is the embedding too, as in transformers."""
    head = next((name for name in OUTPUTS if name in source.keys()), None)
    names = tied_names(build_module(hf_config)) if head and hf_config.get("tie_word_embeddings") else None
    if names is None or f"{names[0]}.weight" in source.keys():
        return source
    return Renamed(source, {**{name: name for name in source.keys()}, f"{names[0]}.weight": head})


def read_hf_config(path: Path) -> dict:
    """Read config.json of a model folder or a .gguf file as transformers completes it; weights need not be present."""
    if path.suffix == ".gguf":
        from ftjax.hub.gguf.config import read_config as read_gguf_config

        return complete_config(read_gguf_config(path), str(path))
    config = read_config(path)
    dequantiser(config, str(path))  # refuses formats that cannot be read; the others are written dequantised
    return {key: value for key, value in config.items() if key != "quantization_config"}


def positions_of(path: str, revision: str | None = None) -> int | None:
    """Return the longest text in tokens that a model was made for, by its config.json; None if ftjax lacks the model."""
    try:
        return build_module(read_hf_config(resolve_config(path, revision))).sizes.positions
    except UserError:  # the code that needs the model reports its errors
        return None


def load_base(model: Model, source: TensorSource, mesh: Mesh, dtype, where: str) -> dict[str, jax.Array]:
    """Load every parameter of the base model: trained ones in their own dtype, frozen ones in `dtype`. `where` is for
    messages."""
    check_tied(model, source, where)
    return load_params(base_specs(model), source, mesh, dtype, where, model.ignored, model.carried)


def base_specs(model: Model) -> dict[str, Spec]:
    return {path: spec for path, spec in model.specs.items() if not spec.row.adapter}


def check_base(model: Model, source: TensorSource, where: str) -> None:
    """Raise UserError if the tensors are not those of the base model; for callers that read them one by one."""
    check_tied(model, source, where)
    check_keys(base_specs(model), source, model.ignored, where, model.carried)


def check_tied(model: Model, source: TensorSource, where: str) -> None:
    """Raise UserError if config.json ties the output to the embedding but the file holds another output."""
    embedding = f"{model.output}.weight"
    heads = [name for name in ("lm_head.weight", "embed_out.weight") if name in model.ignored and name in source.keys()]
    for name in heads:
        if embedding in source.keys() and not np.array_equal(source.read(name), source.read(embedding)):
            raise UserError(
                f"{where}: config.json says tie_word_embeddings, but {name} is not {embedding}; to use {name}, set "
                "tie_word_embeddings to false, or else remove that tensor"
            )


def load_params(
    specs: Mapping[str, Spec],
    source: TensorSource,
    mesh: Mesh,
    dtype,
    where: str,
    ignored: Sequence[str] = (),
    carried: Sequence[str] = (),
) -> dict[str, jax.Array]:
    """Load these parameters as sharded arrays: trained ones in their own dtype (float32), frozen ones in `dtype` or in
    their row's quantisation.

    The whole key set is compared first. Raises UserError that lists missing, unused and misshapen tensors.
    """
    check_keys(specs, source, ignored, where, carried)
    # Largest first: a parameter exists twice while it moves to the device, so the largest do before most of the model is
    # loaded.
    order = sorted(specs, key=lambda path: -specs[path].size)
    have, found = set(source.keys()), {}
    size = {path: spec.size * np.dtype(stored(spec, dtype).dtype).itemsize for path, spec in specs.items()}
    with long_step("loading weights", sum(size.values()), "bytes") as step:
        for path in order:
            found[path] = _load(stored(specs[path], dtype), source, mesh, have)
            step.advance(size[path])
    return found


def stored(spec: Spec, dtype) -> Spec:
    """Return the spec with the dtype that a run uses: trained and method parameters keep theirs, frozen base parameters use
    `dtype`."""
    return spec if spec.row.trainable or spec.row.adapter else spec.astype(dtype)


def abstract_param(spec: Spec, mesh: Mesh, dtype) -> jax.ShapeDtypeStruct | Quantized:
    """Return the shape and sharding of a parameter in a run. Raises UserError if a size does not divide."""
    where = sharding(mesh, spec.path, spec.shape, spec.row.axes)
    if spec.row.quantization is not None:
        return abstract_quantised(spec, mesh)
    return jax.ShapeDtypeStruct(spec.shape, stored(spec, dtype).dtype, sharding=where)


def check_keys(
    specs: Mapping[str, Spec], source: TensorSource, ignored: Sequence[str], where: str, carried: Sequence[str] = ()
) -> None:
    """Raise UserError unless the source has exactly the expected tensors in the expected shapes.

    It is also raised for integer or 8-bit weights: their values depend on scales that such a checkpoint stores separately.
    """
    have = {name for name in source.keys() if not name.startswith(tuple(carried))}
    asked = {piece.name: piece.shape for spec in specs.values() for piece in spec.pieces(layout_in(spec, have))}
    quantised = sorted(name for name in have if name.endswith(QUANTISED)) + [
        n for n in asked if n in have and _coarse(source, n)
    ]
    if quantised:
        raise UserError(
            f"{where}: its weights are quantised ({quantised[0]} is {source.dtype(quantised[0])}), in a way that ftjax "
            f"does not read; {INSTEAD}"
        )
    missing = sorted(set(asked) - have)
    unused = sorted(name for name in have - set(asked) if not name.endswith(tuple(ignored)))
    shapes = [
        f"{name} is {tuple(source.shape(name))}, the model's is {shape}"
        for name, shape in asked.items()
        if name in have and tuple(source.shape(name)) != shape
    ]
    problems = []
    for label, names in (("missing", missing), ("not part of this model", unused), ("of another shape", shapes)):
        if names:
            problems.append(f"{len(names)} {label}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    if problems:
        raise UserError(f"{where}: the weights do not fit the model; tensors " + "; ".join(problems))


def _coarse(source: TensorSource, name: str) -> bool:
    dtype = source.dtype(name)
    return dtype.itemsize == 1 or dtype.kind in "iub"


def layout_in(spec: Spec, have: Container[str]) -> Layout | None:
    """Return the layout of a parameter that a checkpoint with these names has; None is the parameter's own name."""
    layouts = (*spec.row.layouts, None)
    if len(layouts) == 1:
        return None

    def present(layout: Layout | None) -> float:
        found = [piece.name in have for piece in spec.pieces(layout)]
        return sum(found) / len(found)

    return max(layouts, key=present)  # first among equals: a missing tensor is reported under the name that is written


def block_reader(
    spec: Spec, source: TensorSource, layout: Layout | None, dtype=None
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """Return a function that reads a part of a parameter from the tensors that hold it, in `dtype` or in the source's dtype."""
    pieces = list(spec.pieces(layout))
    depth = len(spec.stacked) + (len(layout.labels) if layout else 0)
    names = np.array([piece.name for piece in pieces], dtype=object).reshape(spec.shape[:depth])
    inside, stored = spec.shape[depth:], pieces[0].shape
    # If memory splits a dimension of the tensor, slice the dimensions before it while reading, and the rest afterwards.
    common = next((i for i, (a, b) in enumerate(zip(inside, stored, strict=False)) if a != b), min(len(inside), len(stored)))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        chosen = list(np.ravel(names[index[:depth]])) if depth else [str(names)]
        shape = tuple(len(range(*s.indices(n))) for s, n in zip(index, spec.shape, strict=True))
        out = aligned_empty(shape, dtype or source.dtype(chosen[0]))
        flat = out.reshape(len(chosen), *shape[depth:])
        if shape[depth:] == inside and isinstance(source, SafetensorsFolder) and {*map(source.dtype, chosen)} == {out.dtype}:
            source.read_all(chosen, flat)
            return out
        for number, name in enumerate(chosen):
            if inside == stored:
                flat[number] = narrowed(name, source.read(name, index[depth:]), out.dtype)
            else:
                part = source.read(name, index[depth : depth + common])
                part = part.reshape(*part.shape[:common], *inside[common:])
                flat[number] = narrowed(name, part[(slice(None),) * common + index[depth + common :]], out.dtype)
        return out

    return read


def _load(spec: Spec, source: TensorSource, mesh: Mesh, have: Container[str]) -> jax.Array | Quantized:
    """Load one parameter; each device's shard is read separately."""
    where = sharding(mesh, spec.path, spec.shape, spec.row.axes)
    if spec.row.ranks is not None:  # ranks differ by layer, and adapters are small: assemble it on the host
        whole = np.zeros(spec.shape, spec.dtype)
        for piece in spec.pieces():
            whole[piece.index] = source.read(piece.name)
        return jax.make_array_from_callback(spec.shape, where, lambda index: whole[index])
    layout = layout_in(spec, have)
    if spec.row.quantization is not None:
        return quantised_array(spec, mesh, block_reader(spec, source, layout))
    # Each device asks for its shard; devices with the same shard share one read.
    return jax.make_array_from_callback(spec.shape, where, block_reader(spec, source, layout, spec.dtype))


def aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return an uninitialised array at a 64-byte boundary, which the CPU device uses without a copy.

    A large one is in small pages: NumPy would ask for huge ones, which a machine whose memory is in pieces has to make first.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.frombuffer(mmap.mmap(-1, size), np.uint8) if size >= LARGE else np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def init_params(specs: Mapping[str, Spec], mesh: Mesh, seed: int) -> dict[str, jax.Array]:
    """Initialise parameters with their row's initialiser; the values are the same on every mesh."""
    params = {}
    for path, spec in specs.items():
        where = sharding(mesh, path, spec.shape, spec.row.axes)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        params[path] = jax.jit(spec.row.init, static_argnums=(1, 2), out_shardings=where)(key, spec.shape, spec.dtype)
    return params
