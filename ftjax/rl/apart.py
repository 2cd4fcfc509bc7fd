"""Devices that only generate answers (`mesh.rollout_devices`), while the others train.

They hold the frozen weights from the start, sharded as decoding wants them, and are sent the trained ones after each update.
With several processes, each has a mesh of its own devices to decode on, which its other devices send the weights to:

    process 0    devices 0 1 train    devices 2 3 generate
    process 1    devices 4 5 train    devices 6 7 generate

    a weight     sharded over 0 1 4 5    gathered: all of it on each of them    cut for 2 3, and for 6 7    copied there
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from ftjax.generate.engine import decoding_mesh
from ftjax.hub.load import abstract_param
from ftjax.mesh import describe, of_process, replicated
from ftjax.train.setup import Setup


class Sent(dict[str, Any]):
    """All parameters of a model, by path, on the devices that generate."""


class RolloutDevices:
    """The devices of a run that generate.

    Attributes:
        mesh: over those of this process.
        processes: that have such devices, equally many each.
    """

    def __init__(self, setup: Setup):
        """Copy the frozen weights there; all processes call it."""
        self.mesh = decoding_mesh(setup.model, of_process(setup.rollout_devices, jax.process_index()))
        self.processes = len(setup.rollout_devices) // self.mesh.size
        dtype, model = jnp.dtype(setup.config.model.dtype), setup.model
        where = {path: abstract_param(spec, self.mesh, dtype) for path, spec in model.specs.items()}
        self._where = jax.tree.map(lambda shape: shape.sharding, where)
        self._between = _as_on(self.mesh, of_process(setup.mesh.devices.flat, jax.process_index()))
        self._trained = frozenset(model.trainable)
        self._frozen = self._put({path: setup.frozen[path] for path in model.frozen})

    def send(self, params: Mapping[str, Any]) -> Sent:
        """Copy the trained ones of these parameters there; all processes call it.

        One process alone does not wait for an update that has yet to compute them.
        """
        return Sent(self._frozen | self._put({path: params[path] for path in self._trained}))

    def line(self) -> str:
        """Describe them."""
        where = f"{self.mesh.size} other device(s)"
        if self.processes > 1:
            where += f" of each of {self.processes} processes, which answer a share each"
        return f"answers are generated on {where}, {describe(self.mesh)}, with the parameters before the latest update"

    def _put(self, values: dict[str, Any]) -> dict[str, Any]:
        """Copy arrays there, one after the other."""
        return jax.tree.map(self._copy, values, {path: self._where[path] for path in values})

    def _copy(self, x: Shaped[Array, "..."], there: NamedSharding) -> Shaped[Array, "..."]:
        """Copy an array from device to device: it is cut first as it will be there, or JAX would take it through the host."""
        cut = _cut(_of_this_process(x, self._between), NamedSharding(self._between, there.spec))
        # The next update takes over the buffers that it reads: what is sent has to be a copy.
        sent = jax.device_put(cut, there, may_alias=False)
        if not x.is_fully_addressable:
            sent.block_until_ready()  # so that one array at a time is whole on the devices that train
        return sent


def _of_this_process(x: Shaped[Array, "..."], own: Mesh) -> Shaped[Array, "..."]:
    """Return the array on this process's devices of its mesh, the mesh `own`, each of which has all of it; all processes call
    it. An array that no other process has a part of is returned as it is."""
    if x.is_fully_addressable:
        return x
    whole = _cut(x, replicated(x.sharding.mesh))
    return jax.make_array_from_single_device_arrays(x.shape, replicated(own), [part.data for part in whole.addressable_shards])


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


def _as_on(mesh: Mesh, devices: Sequence[Any]) -> Mesh:
    """Return the devices, in their order, as a mesh with as many along `tensor` as `mesh` has, if they divide."""
    tensor = math.gcd(mesh.shape["tensor"], len(devices))
    sizes = {"data": len(devices) // tensor, "tensor": tensor}
    return Mesh(np.array(devices).reshape([sizes.get(axis, 1) for axis in mesh.axis_names]), mesh.axis_names)
