"""PiSSA (Meng et al. 2024, arXiv:2404.02948): LoRA that starts from the largest singular values of each weight.

The paper trains `W_res + s B A` with `s B_0 A_0` of rank r taken out of W (eqs. 2 to 4). Here the base model stays unchanged,
and the same function is `W + s (B A - B_0 A_0)`: A_0 and B_0 are frozen beside the adapter, so that training starts from the
base model bit for bit, in every dtype. Saved, the two products are one plain LoRA of rank 2r on the unchanged base model, which
is PEFT's conversion (`path_initial_model_for_weight_conversion`).
"""

import math

import numpy as np
from jaxtyping import Float

from ftjax.config import LoraConfig
from ftjax.methods.method import Fetch, Stored, own_name
from ftjax.models.model import Model
from ftjax.models.nn.param import Piece, Spec


def principal(
    weight: Float[np.ndarray, "O I"], rank: int, scale: float | np.floating, kind: str, rng: np.random.Generator
) -> tuple[Float[np.ndarray, "{rank} I"], Float[np.ndarray, "O {rank}"]]:
    """Return A and B with `scale * B A` the best approximation of rank `rank` of a weight.

    Args:
        kind: `pissa` for the exact SVD, `pissa_niter_<n>` for n subspace iterations.
    """
    niter = kind.partition("_niter_")[2]
    u, s, vt = _subspace(weight, rank, int(niter), rng) if niter else np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(s[:rank] / scale)
    return root[:, None] * vt[:rank], u[:, :rank] * root


def _subspace(weight: np.ndarray, rank: int, niter: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the largest singular values and vectors (Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1), as
    `torch.svd_lowrank(weight, rank, niter)` computes them."""
    q, _ = np.linalg.qr(weight @ rng.normal(size=(weight.shape[1], rank)).astype(weight.dtype))
    for _ in range(niter):
        q, _ = np.linalg.qr(weight.T @ q)
        q, _ = np.linalg.qr(weight @ q)
    u, s, vt = np.linalg.svd(q.T @ weight, full_matrices=False)
    return q @ u, s, vt


def doubled(model: Model, spec: Spec, piece: Piece, fetch: Fetch) -> Stored:
    """Return A or B of the plain LoRA: `[A; A_0]` or `[B, -B_0]`, whose product is the difference."""
    layer, _, name = spec.path.rpartition(".")
    axis, first, sign = {"lora_A": (0, "start_A", 1), "lora_B": (1, "start_B", -1)}[name]
    shape = tuple(2 * size if dim == axis else size for dim, size in enumerate(piece.shape))

    def data() -> np.ndarray:
        return np.concatenate([fetch(spec.path, piece.index), sign * fetch(f"{layer}.{first}", piece.index)], axis=axis)

    return Stored(own_name(model, spec, piece), shape, data)


def as_plain(config: LoraConfig) -> LoraConfig:
    """Return the settings of that plain LoRA: twice the ranks at the same scales."""
    more = math.sqrt(2) if config.use_rslora else 2
    return config.model_copy(update={
        "r": 2 * config.r, "lora_alpha": more * config.lora_alpha, "init_lora_weights": True,
        "rank_pattern": {name: 2 * rank for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {name: more * alpha for name, alpha in config.alpha_pattern.items()},
    })  # fmt: skip
