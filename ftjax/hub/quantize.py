"""Quantises weights while they are read: one layer at a time, and only the part on this host's devices."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float

from ftjax.mesh import dividing, sharding
from ftjax.models.nn.param import Spec
from ftjax.models.nn.quantized import Part, Quantization, Quantized


def quantised_array(spec: Spec, mesh: Mesh, read: Callable[[tuple[slice, ...]], np.ndarray]) -> Quantized:
    """Return a sharded parameter in its row's format.

    Host memory: the quantised shards of this host's devices, and one layer (of one expert) in full precision.

    Args:
        read: returns a part of the weight in the source's dtype.
    """
    how, shape = spec.row.quantization, spec.shape
    sharding(mesh, spec.path, shape, spec.row.axes)  # refuses sizes that do not divide
    parts = how.parts(shape, spec.row.axes)
    whole = len(shape) + how.whole_axis
    made: dict[tuple[tuple[int, int], ...], dict[str, np.ndarray]] = {}

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        bounds = [one.indices(size)[:2] for one, size in zip(index, parts[name].shape, strict=True)]
        bounds[whole] = (0, shape[whole])
        key = tuple(bounds)
        if key not in made:
            made[key] = _quantise(spec, key, read)
        return made[key][name][(slice(None),) * whole + (index[whole],)]

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
    return NamedSharding(mesh, dividing(mesh, part.shape, part.axes))


def _quantise(spec: Spec, bounds: tuple[tuple[int, int], ...], read: Callable) -> dict[str, np.ndarray]:
    """Quantise a part of a weight, each layer and expert by itself."""
    how, depth = spec.row.quantization, len(spec.stacked)
    depth += spec.row.axes[depth] == "experts"
    stack, matrix = bounds[:depth], tuple(slice(*bound) for bound in bounds[depth:])
    out: dict[str, np.ndarray] = {}
    for place in np.ndindex(*(stop - start for start, stop in stack)):
        weight = read((*(slice(start + i, start + i + 1) for i, (start, _) in zip(place, stack, strict=True)), *matrix))
        weight = weight.reshape(weight.shape[depth:])
        for name, value in vars(_on_host(how, weight)).items():
            if not isinstance(value, np.ndarray):  # a size
                continue
            if name not in out:
                out[name] = np.empty((*(stop - start for start, stop in stack), *value.shape), value.dtype)
            out[name][place] = value
    return out


def _on_host(how: Quantization, weight: Float[np.ndarray, "*parts R C"]) -> Quantized:
    """Quantise with XLA on the host's CPU, several times faster than numpy; accelerator memory stays free."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # the process was told to use accelerators only
        host = jax.local_devices()[0]
    return jax.device_get(_jitted(how, jax.device_put(weight, host)))


_jitted = jax.jit(lambda how, weight: how.quantise(weight), static_argnums=0)
