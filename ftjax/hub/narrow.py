"""Converts weights to a narrower dtype; float16 cannot represent values beyond 65504."""

import numpy as np

from ftjax.errors import UserError

LARGEST = float(np.finfo(np.float16).max)


def narrowed(name: str, weight: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return a tensor in `dtype`. Raises UserError, naming it, if values would become infinite."""
    with np.errstate(over="ignore"):
        found = weight.astype(dtype)
    if dtype == np.float16 and weight.dtype != dtype:
        lost = np.isinf(found) & np.isfinite(weight)
        if lost.any():
            largest = float(np.abs(weight[lost].astype(np.float64)).max())
            raise UserError(
                f"{name}: {int(lost.sum()):,} of {lost.size:,} values, up to {largest:.3g}, are beyond what float16 holds "
                f"({LARGEST:.0f}), and would become infinite; take bfloat16 or float32 (model.dtype; --dtype of ftjax generate)"
            )
    return found
