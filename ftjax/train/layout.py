"""How the rows of a global batch are placed on the devices of all processes.

The rows that a process has to build follow only from the positions of its devices in the mesh. On a mesh of data=2 x tensor=2
over four processes with one device each, a batch of 8 rows in 2 microbatches is placed like this:

    process 0, data 0, tensor 0    rows 0 1 of microbatch 0, rows 4 5 of microbatch 1
    process 1, data 0, tensor 1    the same
    process 2, data 1, tensor 0    rows 2 3 of microbatch 0, rows 6 7 of microbatch 1
    process 3, data 1, tensor 1    the same

Legend: A microbatches, B rows of a microbatch (over all devices), T length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, Shaped

from ftjax.mesh import parts, spec


@dataclass(frozen=True)
class BatchLayout:
    """Placement of batches of `rows` rows on a mesh.

    Attributes:
        microbatches: A; None for batches without that axis, as in evaluation.
        process: index of the process whose rows are meant; None for this one.
    """

    mesh: Mesh
    rows: int
    microbatches: int | None = None
    process: int | None = None

    @property
    def sharding(self) -> NamedSharding:
        """Sharding of arrays `[A, B, T]`, or `[B, T]` without microbatches."""
        axes = ("batch", "length")
        return NamedSharding(self.mesh, spec(axes if self.microbatches is None else (None, *axes)))

    @property
    def shards(self) -> int:
        """Devices that the tokens of a batch are sharded over."""
        return parts(self.mesh.shape, "batch", "length")

    @property
    def length_parts(self) -> int:
        """Number of shards of a row; its length is a multiple of it."""
        return parts(self.mesh.shape, "length")

    @cached_property
    def own(self) -> Int[np.ndarray, " own"]:
        """Rows of a global batch that the process's devices hold, as ascending numbers from 0."""
        steps = self.microbatches or 1
        return (np.arange(steps)[:, None] * (self.rows // steps) + self._of_each).ravel()

    @cached_property
    def _of_each(self) -> Int[np.ndarray, " own_of_each"]:
        """Rows of one microbatch, or of the batch, that the process's devices hold."""
        shape = self._shape(self.length_parts)
        index = self.process if self.process is not None else jax.process_index()
        held = [where for device, where in self.sharding.devices_indices_map(shape).items() if device.process_index == index]
        return np.unique(np.concatenate([np.arange(*where[-2].indices(shape[-2])) for where in held]))

    def _shape(self, length: int) -> tuple[int, ...]:
        if self.microbatches is None:
            return self.rows, length
        return self.microbatches, self.rows // self.microbatches, length

    def arrays(self, batch: Mapping[str, Shaped[np.ndarray, "own _"]]) -> dict[str, Shaped[Array, "*A B _"]]:
        """Build global arrays `[A, B, T]` (or `[B, T]`) from this process's rows."""
        return {name: self._array(rows) for name, rows in batch.items()}

    def _array(self, rows: Shaped[np.ndarray, "own T"]) -> Shaped[Array, "*A B T"]:
        shape = self._shape(rows.shape[1])
        held = rows.reshape(*shape[:-2], len(self._of_each), shape[-1])
        return jax.make_array_from_callback(shape, self.sharding, lambda index: self.part(held, shape, index))

    def part(
        self, held: Shaped[np.ndarray, "*A own_of_each T"], shape: tuple[int, ...], index: tuple[slice, ...]
    ) -> Shaped[np.ndarray, "*a b t"]:
        """Return a device's shard `array[index]` of an array of this shape, from the rows `held` by the process."""
        *steps, wanted, tokens = index
        rows = np.searchsorted(self._of_each, wanted.indices(shape[-2])[:2])
        return held[(*steps, slice(*rows), tokens)]
