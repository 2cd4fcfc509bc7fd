"""Initial values of LoRA's parameters (PEFT's `init_lora_weights`), beyond the initialisers of their specs."""

import zlib

import numpy as np

from ftjax.config import LoraConfig
from ftjax.methods.lora_experts import is_of_experts
from ftjax.methods.lora_linear import is_conv1d
from ftjax.methods.method import Start
from ftjax.methods.pissa import principal
from ftjax.methods.token_rows import start_rows
from ftjax.models.model import Model


def start(config: LoraConfig, model: Model, begin: Start) -> dict[str, np.ndarray]:
    """Return initial values that the specs' initialisers do not give: A and B of other initialisations, and DoRA's magnitudes,
    which are the norms of the base weight, as `B A = 0` adds nothing to it."""
    found = dict(start_rows(model, begin))
    if config.init_lora_weights is not True:
        found |= _factors(config.init_lora_weights, model, begin)
    for path, spec in model.specs.items():
        layer, is_magnitude, _ = path.rpartition(".lora_magnitude_vector")
        if not is_magnitude:
            continue
        axis = 0 if is_conv1d(model, layer) else 1
        norms = [
            np.linalg.norm(begin.fetch(f"{layer}.base.weight", index).astype(np.float32), axis=axis)
            for index in np.ndindex(spec.stacked)
        ]
        found[path] = np.stack(norms).reshape(spec.shape)
    return found


def _factors(kind: str, model: Model, begin: Start) -> dict[str, np.ndarray]:
    """Return A and B of all layers, initialised as by PEFT's `init_lora_weights` of that name."""
    found = {}
    for path, spec in model.specs.items():
        layer, is_a, _ = path.rpartition(".lora_A")
        if not is_a:
            continue
        spec_b = model.specs[f"{layer}.lora_B"]
        lora_A, lora_B = np.zeros(spec.shape, np.float32), np.zeros(spec_b.shape, np.float32)
        for rank, index in zip(spec.row.ranks, np.ndindex(spec.stacked), strict=True):
            rng = np.random.default_rng((begin.seed, zlib.crc32(path.encode()), *index))
            if not rank:
                continue
            if kind.startswith("pissa"):
                weight = begin.fetch(f"{layer}.base.weight", index).astype(np.float32)
                weight = weight.T if is_conv1d(model, layer) else weight
                a, b = principal(weight, rank, model.buffers[f"{layer}.scale"][index][0], kind, rng)
            elif is_of_experts(spec):  # `gaussian`: B is zero
                a, b = rng.normal(size=(len(lora_A[index]), rank, spec.shape[-1])) / rank, 0
            else:
                a, b = (_gaussian if kind == "gaussian" else _orthogonal)(rank, spec.shape[-1], spec_b.shape[-2], rng)
            lora_A[index][..., :rank, :], lora_B[index][..., :rank] = a, b
        found[path], found[f"{layer}.lora_B"] = lora_A, lora_B
        if kind.startswith("pissa"):
            found[f"{layer}.start_A"], found[f"{layer}.start_B"] = lora_A, lora_B
    return found


def _gaussian(rank: int, size_in: int, size_out: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(rank, size_in)) / rank, np.zeros((size_out, rank))


def _orthogonal(rank: int, size_in: int, size_out: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mix A and B from alternating rows of a random orthogonal matrix, so that `B A = 0` although neither is zero."""
    q, _ = np.linalg.qr(rng.normal(size=(rank, rank)))
    a = (rng.normal(size=(size_in, rank // 2)) @ q[0::2]).T / 10
    return a, rng.normal(size=(size_out, rank // 2)) @ q[1::2] / 10
