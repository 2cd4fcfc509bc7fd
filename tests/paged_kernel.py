"""Runs the TPU kernel for attention in pages on any machine, in Pallas' interpret mode.

Two things that the kernel does are missing there: loads from a reference that is reshaped or cast, and stores with a mask of
more than one dimension. They are replaced by loads and stores of whole blocks, which mean the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel


class Loaded:
    """A block as a value, with those methods of a reference that the kernel calls."""

    def __init__(self, value: jax.Array):
        self.value, self.dtype = value, value.dtype

    def reshape(self, *shape: int) -> "Loaded":
        return Loaded(self.value.reshape(*shape))

    def bitcast(self, dtype) -> jax.Array:
        """Return every so many rows as one row of wider numbers, as a TPU packs them."""
        packed = jnp.dtype(dtype).itemsize // self.dtype.itemsize
        rows, columns = self.value.shape
        return jax.lax.bitcast_convert_type(self.value.reshape(rows // packed, packed, columns).swapaxes(1, 2), dtype)

    def __getitem__(self, index):
        return self.value[index]


@contextmanager
def interpreted() -> Iterator[None]:
    """Run what is traced inside with the kernel in interpret mode, also where an engine chooses what attention does."""
    wait = kernel.MultiPageAsyncCopyDescriptor.wait

    def store(ref, value, *, mask):
        ref[...] = jnp.where(mask, value, ref[...])

    with pytest.MonkeyPatch.context() as patch, tpu.force_tpu_interpret_mode():
        patch.setattr(kernel.MultiPageAsyncCopyDescriptor, "wait", lambda self: Loaded(wait(self)[...]))
        patch.setattr(tpu, "store", store)
        patch.setattr("ftjax.generate.engine.has_kernel", lambda mesh: True)
        yield
