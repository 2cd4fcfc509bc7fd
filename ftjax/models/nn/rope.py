"""Rotary position embedding in Hugging Face's rotate-half form, with every `rope_type` of transformers 5.

Sources: Su et al. 2021 (arXiv:2104.09864); linear and NTK scaling as in transformers; YaRN, Peng et al. 2023
(arXiv:2309.00071); LongRoPE, Ding et al. 2024 (arXiv:2402.13753); Llama 3.1's wavelength smoothing (Meta 2024).

Legend: B batch, T query length, N heads, H head dim.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from ftjax.errors import UserError

_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "proportional": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate", "llama_4_scaling_beta",
    },
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
}  # fmt: skip


@dataclass(frozen=True)
class Rope:
    """Inverse frequencies of the rotated dimensions, and their dependence on a document's length.

    Attributes:
        inv_freq: one float32 per pair of rotated dimensions, in radians per token.
        scaling: factor on cos and sin (attention factor of YaRN and LongRoPE).
        long_scaling: that of documents longer than `switch`, if it is another one (Phi-3.5-MoE).
        base, dim, factor: used by `dynamic` to recompute frequencies.
        switch: documents longer than this use `long_inv_freq` (longrope) or a recomputed base (dynamic).
    """

    inv_freq: tuple[float, ...]
    scaling: float = 1.0
    base: float = 0.0
    dim: int = 0
    factor: float = 1.0
    switch: int | None = None
    long_inv_freq: tuple[float, ...] | None = None
    long_scaling: float | None = None

    @property
    def by_length(self) -> bool:
        """True if frequencies depend on the length of the whole text."""
        return self.switch is not None

    @property
    def recomputed_at(self) -> int | None:
        """Length above which LongRoPE uses other frequencies, or None; the cache of a text that exceeds it is rebuilt.

        transformers does the same for Phi-3. (With `dynamic` frequencies, transformers keeps the cached keys.)
        """
        return None if self.long_inv_freq is None else self.switch

    def angles(
        self, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
    ) -> tuple[Float32[Array, "B T half"], Float32[Array, "B T half"]]:
        """Return cos and sin of the rotated half of a head.

        Types that depend on the length of the text use the length of each token's own document, so that packed documents give
        the same results as separate ones.
        """
        inv_freq, scaling = jnp.asarray(self.inv_freq, jnp.float32), self.scaling
        if self.switch is not None:
            length = document_lengths(positions, segment_ids)[..., None]
            if self.long_scaling is not None:
                scaling = jnp.where(length > self.switch, self.long_scaling, self.scaling)
            if self.long_inv_freq is not None:
                inv_freq = jnp.where(length > self.switch, jnp.asarray(self.long_inv_freq, jnp.float32), inv_freq)
            else:
                stretched = jnp.maximum(length, self.switch).astype(jnp.float32) / self.switch
                base = self.base * (self.factor * stretched - (self.factor - 1)) ** (self.dim / (self.dim - 2))
                inv_freq = 1.0 / base ** (jnp.arange(0, self.dim, 2, dtype=jnp.float32) / self.dim)
        angle = positions[..., None].astype(jnp.float32) * inv_freq
        return jnp.cos(angle) * scaling, jnp.sin(angle) * scaling


def angles(rope: "Rope | Mapping[str, Rope]", positions: jax.Array, segment_ids: jax.Array) -> Any:
    """Return `(cos, sin)` of one RoPE, or of several by name."""
    if isinstance(rope, Rope):
        return rope.angles(positions, segment_ids)
    return {name: one.angles(positions, segment_ids) for name, one in rope.items()}


def every(rope: "Rope | Mapping[str, Rope]") -> tuple[Rope, ...]:
    """Return one or several RoPEs as a tuple."""
    return (rope,) if isinstance(rope, Rope) else tuple(rope.values())


def document_lengths(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Return for each token the last position of its document plus one."""
    index = jnp.arange(positions.shape[1], dtype=jnp.int32)
    last = jnp.concatenate([segment_ids[:, :-1] != segment_ids[:, 1:], jnp.ones_like(segment_ids[:, :1], bool)], axis=1)
    end = jax.lax.cummin(jnp.where(last, index, positions.shape[1] - 1), axis=1, reverse=True)
    return jnp.take_along_axis(positions, end, axis=1) + 1


def apply(x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]) -> Float[Array, "B T N H"]:
    """Rotate the first `2 * half` dimensions of each head; leave the others unchanged."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)


def apply_interleaved(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotate the first `2 * half` dimensions of each head, where a pair is two neighbours.

    `apply` instead pairs each dimension of the first half with one of the second.
    """
    size = 2 * cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    a, b = x[..., :size:2].astype(jnp.float32), x[..., 1:size:2].astype(jnp.float32)
    rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(*x.shape[:-1], size).astype(x.dtype)
    return rotated if size == x.shape[-1] else jnp.concatenate([rotated, x[..., size:]], axis=-1)


def longest_text(parameters: Mapping[str, Any], max_position_embeddings: int) -> int:
    """Return the maximum text length in tokens: that of config.json, or a longer one that RoPE scaling extends it to.

    Args:
        parameters: `rope_parameters`, of one RoPE or of several by name.
    """
    several = [value for value in parameters.values() if isinstance(value, Mapping)]

    def stretched(rope: Mapping[str, Any]) -> float:
        dynamic = rope.get("rope_type") == "dynamic"
        trained = max_position_embeddings if dynamic else rope.get("original_max_position_embeddings") or 0
        return (rope.get("factor") or 1) * trained

    return int(max(max_position_embeddings, *map(stretched, several or [parameters])))


def unread(parameters: Mapping[str, Any]) -> list[str]:
    """Return the keys of `rope_parameters` that are set but not read by transformers for their type, such as `finetuned` of
    early YaRN models and `short_mscale` of Phi-3.5 MoE."""
    known = _KEYS.get(parameters.get("rope_type", "default"), set()) | {
        "rope_type", "type", "rope_theta", "partial_rotary_factor",
        "mrope_section", "mrope_interleaved",  # of the positions in an image; those of a text are equal
    }  # fmt: skip
    return sorted(key for key, value in parameters.items() if key not in known and value is not None)


def refuse_partial(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters` unchanged. Raises UserError for a partial rotary factor, in families that rotate whole heads."""
    factor = parameters.get("partial_rotary_factor")
    if factor not in (None, 1, 1.0):
        raise UserError(
            f"rope_parameters: this family rotates whole heads; partial_rotary_factor = {factor!r} is not supported"
        )
    return parameters


def make_rope(parameters: dict[str, Any], head_dim: int, max_position_embeddings: int) -> Rope:
    """Build a RoPE from `rope_parameters` as standardised by transformers 5.

    Keys that do not belong to the type have no effect (`unread`), as in transformers. Raises UserError for an unknown type.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in _KEYS:
        raise UserError(f"rope_parameters: rope_type {kind!r} is not supported; supported are {', '.join(sorted(_KEYS))}")
    base = parameters["rope_theta"]
    part = parameters.get("partial_rotary_factor")
    dim = head_dim if part is None else int(head_dim * part)
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    inv_freq = np.float32(1) / np.float32(base) ** exponent

    def floats(values) -> tuple[float, ...]:
        return tuple(float(v) for v in np.asarray(values, np.float32))

    if kind == "default":
        return Rope(floats(inv_freq))
    if kind == "linear":
        return Rope(floats(inv_freq / np.float32(parameters["factor"])))
    if kind == "proportional":
        return Rope(floats(_proportional(base, head_dim, parameters)))
    if kind == "dynamic":
        return Rope(
            floats(inv_freq), base=float(base), dim=dim, factor=float(parameters["factor"]), switch=max_position_embeddings
        )
    if kind == "llama3":
        return Rope(floats(_llama3(inv_freq, parameters)))
    original = parameters.get("original_max_position_embeddings") or max_position_embeddings
    factor = parameters.get("factor") or max_position_embeddings / original
    if kind == "yarn":
        return Rope(floats(_yarn(base, dim, factor, original, parameters)), scaling=_yarn_scaling(factor, parameters))
    scaling = parameters.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (np.asarray(parameters[key], np.float32) for key in ("short_factor", "long_factor"))
    if len(short) != dim // 2 or len(long) != dim // 2:
        raise UserError(
            f"rope_parameters: short_factor and long_factor need {dim // 2} values, found {len(short)}, {len(long)}"
        )
    return Rope(floats(inv_freq / short), scaling=float(scaling), switch=int(original), long_inv_freq=floats(inv_freq / long))


def _proportional(base: float, head_dim: int, p: dict[str, Any]) -> np.ndarray:
    """Return the frequencies of a whole head of which only a part turns: the others are zero."""
    part, half = p.get("partial_rotary_factor"), head_dim // 2
    turning = int((1.0 if part is None else part) * head_dim // 2)
    inv_freq = np.float32(1) / np.float32(base) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    return np.where(np.arange(half) < turning, inv_freq, np.float32(0)) / np.float32(p.get("factor") or 1)


def _llama3(inv_freq: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    low, high, length = p["low_freq_factor"], p["high_freq_factor"], p["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (length / wavelength - low) / ((high - low) or np.inf)  # Llama 4 Scout has nothing in between
    between = (1 - smooth) * inv_freq / p["factor"] + smooth * inv_freq
    slow = np.where(wavelength > length / low, inv_freq / p["factor"], inv_freq)
    return np.where((wavelength >= length / high) & (wavelength <= length / low), between, slow)


def _yarn(base: float, dim: int, factor: float, original: int, p: dict[str, Any]) -> np.ndarray:
    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001), 0, 1)
    frequencies = np.float32(base) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    return ramp / (factor * frequencies) + (1 - ramp) / frequencies


def _yarn_scaling(factor: float, p: dict[str, Any]) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    return mscale(1.0)
