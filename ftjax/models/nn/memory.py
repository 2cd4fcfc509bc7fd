"""Records that declare what a layer remembers of earlier tokens while decoding; the cache is built from them.

A module within a block lists its records in the attribute `memory`. A layer without records processes each token
independently.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx

from ftjax.errors import UserError

LATENT = "latent"  # name of the record of latent attention


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of every token: keys `[K, D]` after RoPE, and values `[K, V]`.

    A latent from which keys and values are computed counts as the values of one head (`ftjax.models.nn.latent_attention`).

    Attributes:
        name: name under which later layers may read them (`Shared`), or LATENT.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    name: str = ""


@dataclass(frozen=True)
class Shared:
    """Keys and values of an earlier layer: the last one before this layer that wrote under this name."""

    name: str = ""


@dataclass(frozen=True)
class ConvState:
    """The last `width` inputs of a causal convolution; `width` is the kernel size minus one.

    Attributes:
        name: distinguishes several records of one layer.
        restarts: whether the state is reset at each document of a packed row; if not, rows hold one document each.
    """

    channels: int
    width: int
    name: str = ""
    restarts: bool = True

    dtype: ClassVar[None] = None  # the dtype of the activations

    @property
    def shape(self) -> tuple[int, ...]:
        return self.width, self.channels


@dataclass(frozen=True)
class RecurrentState:
    """A recurrent state, updated by each token and zero before the first one.

    Attributes:
        name, restarts: as in `ConvState`.
    """

    shape: tuple[int, ...]
    name: str = ""
    restarts: bool = True

    dtype: ClassVar[str] = "float32"


State = ConvState | RecurrentState
Memory = KeysValues | Shared | State


def declared(block: nnx.Module) -> tuple[Memory, ...]:
    """Return the records that the modules of a block declare."""
    nodes = [node for _, node in nnx.iter_graph(block) if isinstance(node, nnx.Module)]
    return tuple(record for node in nodes for record in getattr(node, "memory", ()))


def packs(layers: Iterable[tuple[Memory, ...]]) -> bool:
    """Return whether a row may hold several documents."""
    return all(getattr(record, "restarts", True) for own in layers for record in own)


def one_for_all(layers: Iterable[tuple[Memory, ...]]) -> KeysValues:
    """Return the one record of a model whose layers all have keys and values of the same size, and nothing else.

    Raises UserError for other models, because virtual tokens are keys and values of one size in every layer.
    """
    found = set(layers)
    record = next(iter(found))[0] if len(found) == 1 and len(next(iter(found))) == 1 else None
    if not isinstance(record, KeysValues) or record.key_dim != record.value_dim or record.name == LATENT:
        raise UserError(
            "method.name: virtual tokens are keys and values of one size in every layer, and the layers of this model have "
            "another kind of memory; use method.name: lora"
        )
    return record
