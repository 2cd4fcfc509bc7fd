"""Quantises weights while they are read: one layer at a time, and only the part on this host's devices."""

import math
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float

from ftjax.mesh import RULES, sharding
from ftjax.mesh import spec as partition
from ftjax.models.nn.param import Spec
from ftjax.models.nn.quantized import Part, Quantization, Quantized


def quantised_array(spec: Spec, mesh: Mesh, read: Callable[[tuple[slice, ...]], np.ndarray]) -> Quantized:
    """Return a sharded parameter in its row's format.

    Host memory: the quantised shards of this host's devices, and one layer in full precision.

    Args:
        read: returns a part of the weight in the source's dtype.
    """
    how, shape = spec.row.quantization, spec.shape
    sharding(mesh, spec.path, shape, spec.row.axes)  # refuses sizes that do not divide
    parts = how.parts(shape, spec.row.axes)
    along = len(shape) - 3 - how.whole_axis  # the shardable one of a matrix's two axes
    made: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[along].indices(shape[along])
        if (start, stop) not in made:
            made[start, stop] = _quantise(spec, along, slice(start, stop), read)
        rest = (*index[:along], slice(None), *index[along + 1 :])
        return made[start, stop][name][rest]

    arrays = {
        name: jax.make_array_from_callback(one.shape, _where(mesh, one), partial(part, name)) for name, one in parts.items()
    }
    return how.of_parts(shape, arrays)


def abstract_quantised(spec: Spec, mesh: Mesh) -> Quantized:
    """Return the result of `quantised_array` as shapes with shardings."""
    parts = spec.row.quantization.parts(spec.shape, spec.row.axes)
    shapes = {name: jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=_where(mesh, part)) for name, part in parts.items()}
    return spec.row.quantization.of_parts(spec.shape, shapes)


def _where(mesh: Mesh, part: Part) -> NamedSharding:
    """Return the weight's own sharding; an axis of its scales that does not divide is replicated."""
    axes = [
        axis if axis and size % math.prod(mesh.shape[name] for name in RULES.get(axis) or ()) == 0 else None
        for size, axis in zip(part.shape, part.axes, strict=True)
    ]
    return NamedSharding(mesh, partition(tuple(axes)))


def _quantise(spec: Spec, along: int, chosen: slice, read: Callable) -> dict[str, np.ndarray]:
    """Quantise all layers for the rows (or columns) `chosen`."""
    how, depth = spec.row.quantization, len(spec.stacked)
    matrix = tuple(chosen if depth + axis == along else slice(0, size) for axis, size in enumerate(spec.shape[depth:]))
    out: dict[str, np.ndarray] = {}
    for layer in np.ndindex(spec.stacked):
        weight = read((*(slice(i, i + 1) for i in layer), *matrix))
        weight = weight.reshape(weight.shape[depth:])
        for name, value in vars(_on_host(how, weight)).items():
            if not isinstance(value, np.ndarray):  # a size
                continue
            if name not in out:
                out[name] = np.empty((*spec.stacked, *value.shape), value.dtype)
            out[name][layer] = value
    return out


def _on_host(how: Quantization, weight: Float[np.ndarray, "R C"]) -> Quantized:
    """Quantise with XLA on the host's CPU, several times faster than numpy; accelerator memory stays free."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # the process was told to use accelerators only
        host = jax.local_devices()[0]
    return jax.device_get(_jitted(how, jax.device_put(weight, host)))


_jitted = jax.jit(lambda how, weight: how.quantise(weight), static_argnums=0)
