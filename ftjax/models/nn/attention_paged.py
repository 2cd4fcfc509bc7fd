"""Attention over keys and values in pages by a kernel for TPUs, which reads each page where it is.

Plain XLA first gathers the pages of every row: it reads them, writes a copy as long as the longest table of any row, and reads
the copy. The kernel, jax.experimental.pallas.ops.tpu.ragged_paged_attention, follows the tables itself, reads each row only as
far as its text goes, and keeps scores on chip. It takes one query per row (decoding) or many (reading a part of a prompt).

It wants keys and values in one array, `[pages, W, 2 K, D]`: those of head k at 2 k and 2 k + 1, D a multiple of the lanes of a
TPU. (An array whose last dimension is smaller takes as much of a TPU's memory anyway.) `PagedCache` lays them out so for every
record that `PageKernel.takes`. In layers with something that the kernel lacks, XLA gathers from the same array.

Legend: B rows, T query length, N heads, K kv heads, H head dim, D the same in whole lanes, G groups of rows, P pages of a
group, W tokens of a page, n pages of a row's table, l layers with the same record.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from ftjax.mesh import fitting, parts
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.memory import KeysValues

LANES = 128
SUBLANES = 16  # a page has a multiple of so many tokens
KEYS = 1024  # most keys of a block, and
BLOCK = 1 << 21  # its most bytes; two blocks are in VMEM at a time
SCORES = 1 << 20  # most bytes of the scores of a block, of one kv head
QUERIES = 32  # most queries of a block
TABLE = 1 << 19  # most bytes of the tables of a call's rows, which are in SMEM


class PageKernel:
    """The kernel on the devices of a mesh, and what it leaves to XLA there.

    Attributes:
        reasons: why layers gather pages, each once; filled in when an engine lays out its arrays and traces its programs.
    """

    def __init__(self, mesh: Mesh):
        self.shards = parts(mesh.shape, "kv_heads")
        self.reasons: dict[str, None] = {}

    def takes(self, record: KeysValues, page: int, dtype) -> bool:
        """Return whether the kernel can read pages of `page` tokens with these keys and values."""
        return self._noted(self._unfit(record, page, jnp.dtype(dtype)))

    def attends(self, pattern: Pattern, sinks: bool, prefix: bool) -> bool:
        """Return whether the kernel has all that attention in this layer needs."""
        lacks = [(sinks, "sinks"), (prefix, "virtual tokens"), (pattern.chunk is not None, "chunks")]
        return self._noted(", ".join(name for has, name in lacks if has))

    def _noted(self, reason: str) -> bool:
        if reason:
            self.reasons[reason] = None
        return not reason

    def _unfit(self, record: KeysValues, page: int, dtype: jnp.dtype) -> str:
        heads, packed = record.kv_heads, 4 // dtype.itemsize
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"{dtype}"
        if record.key_dim != record.value_dim:
            return f"keys of size {record.key_dim} with values of size {record.value_dim}"
        if heads % self.shards:
            return f"{heads} key heads with tensor={self.shards}"
        here = heads // self.shards
        tiles = 2 * here / packed
        if tiles not in (1, 2, 4, 8) and tiles % 8:
            return f"key heads in {dtype}, {here} per device"
        if record.key_dim > LANES and tiles > 1:
            return f"key heads of size {record.key_dim} in {dtype}, {here} per device"
        return f"pages of {page} tokens" if page % SUBLANES else ""


def lanes(size: int) -> int:
    """Return the size of a head in whole lanes."""
    return math.ceil(size / LANES) * LANES


def join(k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> Float[Array, "B T {2*k.shape[2]} D"]:
    """Return keys and values as the kernel reads them."""
    b, t, heads, size = k.shape
    both = jnp.stack([k, v], axis=3).reshape(b, t, 2 * heads, size)
    return jnp.pad(both, ((0, 0),) * 3 + ((0, lanes(size) - size),))


def part(both: Float[Array, "B S both D"], size: int) -> tuple[Float[Array, "B S K {size}"], Float[Array, "B S K {size}"]]:
    """Return the keys and values that `join` has joined."""
    return both[:, :, 0::2, :size], both[:, :, 1::2, :size]


def in_pages(
    q: Float[Array, "B T N H"], pages: Float[Array, "G l P W both D"], place: Int32[Array, ""] | int,
    table: Int32[Array, "B n"], before: Int32[Array, " B"], counts: Int32[Array, " B"], pattern: Pattern,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Compute attention of each row's next T tokens, whose keys and values are in its pages already.

    Args:
        place: index of the layer's pages.
        before: tokens of the row before these.
        counts: how many of the T are not padding, for whose queries the results mean nothing; rows without any read no pages.
    """
    attend = partial(_attend, pattern=pattern)
    values = q, pages, jnp.asarray(place, jnp.int32), table, jnp.where(counts > 0, before, 0)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(*values)
    rows, heads = fitting(mesh, "batch", q.shape[0]), fitting(mesh, "kv_heads", pages.shape[4] // 2)
    tokens = PartitionSpec(rows, None, heads, None)
    by_row = PartitionSpec(rows)
    specs = tokens, PartitionSpec(rows, None, None, None, heads, None), PartitionSpec(), by_row, by_row
    # check_vma=False: Pallas kernels do not declare over which mesh axes their results vary.
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)(*values)


def _attend(
    q: jax.Array, pages: jax.Array, place: jax.Array, table: jax.Array, before: jax.Array, *, pattern: Pattern
) -> jax.Array:
    """Compute attention of the rows and heads of one device, which has one group of pages."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention  # slow to import

    (b, t, n, h), dtype = q.shape, q.dtype
    _, layers, count, size, both, width = pages.shape
    if pattern.window is not None:  # pages that are out of every query's sight are left out: only distances count
        first = jnp.maximum(before + 1 - pattern.window, 0) // size
        few = min(table.shape[1], (pattern.window + t - 2) // size + 2)
        table = jnp.take_along_axis(table, first[:, None] + jnp.arange(few, dtype=jnp.int32), axis=1, mode="clip")
        before = before - first * size
    table, pages = table + place * count, pages.reshape(layers * count, size, both, width)  # no copy of the layer's pages
    q = jnp.pad(q.astype(pages.dtype), ((0, 0),) * 3 + ((0, width - h),))
    rows = next(r for r in range(b, 0, -1) if b % r == 0 and (4 * r * table.shape[1] <= TABLE or r == 1))  # per call
    keys, queries = _block(rows * t, n // (both // 2), table.shape[1], size, both * width * pages.dtype.itemsize)

    def some(at: int) -> jax.Array:
        own = slice(at, at + rows)
        return ragged_paged_attention(
            q[own].reshape(rows * t, n, width), pages, before[own] + t, table[own], jnp.arange(rows + 1, dtype=jnp.int32) * t,
            jnp.full(1, rows, jnp.int32), sm_scale=pattern.scale, sliding_window=pattern.window, soft_cap=pattern.softcap,
            num_kv_pages_per_block=keys, num_queries_per_block=queries,
        )  # fmt: skip

    # Otherwise its products of float32 are rounded to bfloat16. It multiplies arrays of unlike dtypes, which ftjax does not.
    precision = "float32" if pages.dtype == jnp.float32 else None
    with jax.default_matmul_precision(precision), jax.numpy_dtype_promotion("standard"):
        y = jnp.concatenate([some(at) for at in range(0, b, rows)])
    return y.reshape(b, t, n, width)[..., :h].astype(dtype)


def _block(tokens: int, heads: int, pages: int, size: int, token_bytes: int) -> tuple[int, int]:
    """Return `(pages of keys, queries)` of a block, of `heads` query heads per kv head."""
    keys = max(1, min(pages, KEYS // size, BLOCK // (size * token_bytes)))
    queries = max(8, min(QUERIES, SCORES // (4 * heads * keys * size)))
    return keys, min(tokens, queries)
