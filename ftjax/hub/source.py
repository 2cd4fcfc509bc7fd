"""The loader's view of a checkpoint: named tensors, of which any part can be read."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TensorSource(Protocol):
    """Tensors under their Hugging Face names and in Hugging Face layout, whatever the file format.

    Only the requested part is held in memory.
    """

    def keys(self) -> Sequence[str]:
        """Return the names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of `read`'s result: as stored, or float32 for block-quantised tensors."""
        ...

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """Return the tensor, or the part that contiguous slices (from the first dimension on) select, as a new array."""
        ...
