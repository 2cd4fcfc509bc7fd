"""Devices that only generate answers (`mesh.rollout_devices`), while the others train.

They hold the frozen weights from the start, sharded as decoding wants them, and are sent the trained ones after each update.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from ftjax.generate.engine import decoding_mesh
from ftjax.hub.load import abstract_param
from ftjax.mesh import describe
from ftjax.train.setup import Setup


class Sent(dict[str, Any]):
    """All parameters of a model, by path, on the devices that generate."""


class RolloutDevices:
    """The devices of a run that generate.

    Attributes:
        mesh: over them.
    """

    def __init__(self, setup: Setup):
        """Copy the frozen weights there."""
        self.mesh = decoding_mesh(setup.model, setup.rollout_devices)
        dtype, model = jnp.dtype(setup.config.model.dtype), setup.model
        where = {path: abstract_param(spec, self.mesh, dtype) for path, spec in model.specs.items()}
        self._where = jax.tree.map(lambda shape: shape.sharding, where)
        self._between = _as_on(self.mesh, setup.mesh)
        self._trained = frozenset(model.trainable)
        self._frozen = self._put({path: setup.frozen[path] for path in model.frozen})

    def send(self, params: Mapping[str, Any]) -> Sent:
        """Copy the trained ones of these parameters there, without waiting for an update that has yet to compute them."""
        return Sent(self._frozen | self._put({path: params[path] for path in self._trained}))

    def line(self) -> str:
        """Describe them."""
        return (
            f"answers are generated on {self.mesh.size} other device(s), {describe(self.mesh)}, with the parameters before the "
            "latest update"
        )

    def _put(self, values: dict[str, Any]) -> dict[str, Any]:
        """Copy arrays there, one after the other."""
        return jax.tree.map(self._copy, values, {path: self._where[path] for path in values})

    def _copy(self, x: Shaped[Array, "..."], there: NamedSharding) -> Shaped[Array, "..."]:
        """Copy an array from device to device: it is cut first as it will be there, or JAX would take it through the host."""
        # The next update takes over the buffers that it reads: what is sent has to be a copy.
        return jax.device_put(_cut(x, NamedSharding(self._between, there.spec)), there, may_alias=False)


def _cut(x: Shaped[Array, "..."], sharding: NamedSharding) -> Shaped[Array, "..."]:
    """Reshard an array on its devices, each of which has all of it for a moment."""
    if x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    with jax.set_mesh(sharding.mesh):
        return _gathered(x, whole, sharding)


@partial(jax.jit, static_argnums=(1, 2))
def _gathered(x: Shaped[Array, "..."], whole: NamedSharding, sharding: NamedSharding) -> Shaped[Array, "..."]:
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, whole), sharding)


def _as_on(mesh: Mesh, own: Mesh) -> Mesh:
    """Return the devices of `own`, in their order, as a mesh with as many along `tensor` as `mesh` has, if they divide."""
    tensor = math.gcd(mesh.shape["tensor"], own.size)
    sizes = {"data": own.size // tensor, "tensor": tensor}
    return Mesh(own.devices.reshape([sizes.get(axis, 1) for axis in own.axis_names]), own.axis_names)
