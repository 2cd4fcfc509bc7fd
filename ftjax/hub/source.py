"""What a checkpoint is to the loader: named tensors, of which any part can be read."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class TensorSource(Protocol):
    """Tensors under their Hugging Face names and in their Hugging Face layout, whatever the file is.

    Nothing is held in memory but the part that is asked for.
    """

    def keys(self) -> Sequence[str]:
        """The names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype:
        """The dtype that `read` gives: as stored, float32 for block-quantised tensors."""
        ...

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """A new array: the tensor, or the part that contiguous slices (from the first dimension on) cut out of it."""
        ...
