"""What a layer remembers of the tokens before, while it decodes: each says so by records, and the cache is built from them.

A module within a block has the records as its attribute `memory`. A layer with none sees each token by itself.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx

from ftjax.errors import UserError


@dataclass(frozen=True)
class KeysValues:
    """Keys and values of every token: keys `[K, D]`, as they are after RoPE, and values `[K, V]`.

    A latent that keys and values are made from (MLA) is one head of its own sizes.

    Attributes:
        name: under which later layers may read them (`Shared`).
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    name: str = ""


@dataclass(frozen=True)
class Shared:
    """Nothing of its own: the layer reads the keys and values that the last layer before it wrote under this name."""

    name: str = ""


@dataclass(frozen=True)
class ConvState:
    """The last `width` inputs of a causal convolution: its kernel's size less one.

    Attributes:
        name: tells apart several of one layer.
        restarts: the layer starts anew with each document of a packed row; where it does not, rows hold one document each.
    """

    channels: int
    width: int
    name: str = ""
    restarts: bool = True

    dtype: ClassVar[None] = None  # that of the activations

    @property
    def shape(self) -> tuple[int, ...]:
        return self.width, self.channels


@dataclass(frozen=True)
class RecurrentState:
    """A state that each token changes; zeros before the first.

    Attributes:
        name, restarts: as those of `ConvState`.
    """

    shape: tuple[int, ...]
    name: str = ""
    restarts: bool = True

    dtype: ClassVar[str] = "float32"


State = ConvState | RecurrentState
Memory = KeysValues | Shared | State


def declared(block: nnx.Module) -> tuple[Memory, ...]:
    """What the modules of a block say that they remember."""
    nodes = [node for _, node in nnx.iter_graph(block) if isinstance(node, nnx.Module)]
    return tuple(record for node in nodes for record in getattr(node, "memory", ()))


def packs(layers: Iterable[tuple[Memory, ...]]) -> bool:
    """Whether several documents may be in one row."""
    return all(getattr(record, "restarts", True) for own in layers for record in own)


def one_for_all(layers: Iterable[tuple[Memory, ...]]) -> KeysValues:
    """The keys and values of a model in which every layer has ones of the same size, and nothing else.

    Raises UserError for another model: virtual tokens are keys and values of that size in every layer.
    """
    found = set(layers)
    record = next(iter(found))[0] if len(found) == 1 and len(next(iter(found))) == 1 else None
    if not isinstance(record, KeysValues) or record.key_dim != record.value_dim:
        raise UserError(
            "method.name: virtual tokens are keys and values of one size in every layer, and the layers of this model remember "
            "other things; use method.name: lora"
        )
    return record
