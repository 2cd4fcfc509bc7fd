"""Tests attention in pages by the TPU kernel, in interpret mode, against attention over gathered pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from paged_kernel import interpreted

from ftjax.config import MeshConfig
from ftjax.mesh import AXES, make_mesh
from ftjax.models.nn.attention import xla
from ftjax.models.nn.attention_paged import PageKernel, in_pages, lanes, part
from ftjax.models.nn.layer_types import Pattern
from ftjax.models.nn.memory import LATENT, KeysValues

PAGE, PAGES, LAYERS = 16, 5, 2
CASES = {  # T, N, K, H, pattern, dtype
    "one token": (1, 4, 2, 128, Pattern(0.1), jnp.bfloat16),
    "one token, window": (1, 4, 1, 64, Pattern(0.1, window=20, softcap=5.0), jnp.float32),
    "several tokens, window": (9, 6, 2, 80, Pattern(0.1, window=20), jnp.float32),
}


def expected(q, pages, place, table, before, pattern: Pattern) -> jax.Array:
    """Compute the same as plain XLA over the pages of each row, gathered."""
    groups, *_, both, width = pages.shape
    rows = table.shape[0] // groups
    found = [pages[row // rows, place][table[row]].reshape(-1, both, width) for row in range(table.shape[0])]
    k, v = part(jnp.stack(found), q.shape[-1])
    return xla(q, k, v, jnp.ones(q.shape[:2], jnp.int32), None, before, pattern)


def inputs(shape: tuple[int, ...], kv_heads: int, dtype, groups: int) -> tuple[jax.Array, ...]:
    """Return q, pages, tables in random order, and lengths: none yet, a part of a page, and as many as the table takes."""
    rows, t, _, h = shape
    each = rows // groups
    count = each * PAGES + 1
    rng = np.random.default_rng(0)
    table = np.concatenate([rng.permutation(np.arange(1, count)).reshape(each, PAGES) for _ in range(groups)])
    keys = jax.random.split(jax.random.key(0))
    pages = jax.random.normal(keys[0], (groups, LAYERS, count, PAGE, 2 * kv_heads, lanes(h)), dtype)
    before = np.resize([0, 2 * PAGE + 3, PAGE * PAGES - t], rows)
    return jax.random.normal(keys[1], shape, dtype), pages, jnp.asarray(table, jnp.int32), jnp.asarray(before, jnp.int32)


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_attends_as_xla_does(case, monkeypatch):
    """In any order of pages, each row as far as its text goes; tables that are too large for one call are read in several."""
    t, n, kv_heads, h, pattern, dtype = CASES[case]
    q, pages, table, before = inputs((3, t, n, h), kv_heads, dtype, 1)
    monkeypatch.setattr("ftjax.models.nn.attention_paged.TABLE", 4 * PAGES * (1 if t == 1 else 3))
    with interpreted():
        got = jax.jit(in_pages, static_argnums=6)(q, pages, jnp.int32(1), table, before, jnp.full(3, t, jnp.int32), pattern)
    want = expected(q, pages, 1, table, before, pattern)
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (got, want)), atol=2e-2 if dtype == jnp.bfloat16 else 1e-5)


def test_rows_that_do_not_decode_read_one_page():
    """Others would be found missing here. What is in it, finite or not, does not reach the results of other rows."""
    q, pages, table, before = inputs((3, 1, 2, 128), 1, jnp.float32, 1)
    want = expected(q, pages, 1, table, before, Pattern(0.1))
    pages, idle = pages.at[:, :, table[1]].set(jnp.nan), table.at[1, 1:].set(10**6)
    with interpreted():
        counts = jnp.array([1, 0, 1], jnp.int32)
        got = jax.jit(in_pages, static_argnums=6)(q, pages, jnp.int32(1), idle, before, counts, Pattern(0.1))
    np.testing.assert_allclose(got[::2], want[::2], atol=1e-5)


def test_each_device_reads_the_pages_of_its_rows_and_heads():
    pattern, mesh = Pattern(0.1), make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    q, pages, table, before = inputs((4, 1, 4, 128), 2, jnp.float32, 2)
    with interpreted(), jax.set_mesh(mesh):
        got = jax.jit(in_pages, static_argnums=6)(q, pages, jnp.int32(1), table, before, jnp.ones(4, jnp.int32), pattern)
    np.testing.assert_allclose(got, expected(q, pages, 1, table, before, pattern), atol=1e-5)


@pytest.mark.parametrize(
    ("record", "page", "dtype", "tensor", "why"),
    [
        (KeysValues(8, 128, 128), 32, "bfloat16", 8, ""),
        (KeysValues(8, 64, 64), 16, "bfloat16", 1, ""),
        (KeysValues(4, 256, 256), 32, "bfloat16", 4, ""),
        (KeysValues(4, 256, 256), 32, "bfloat16", 1, "key heads of size 256 in bfloat16, 4 per device"),
        (KeysValues(3, 64, 64), 32, "bfloat16", 1, "key heads in bfloat16, 3 per device"),
        (KeysValues(4, 128, 128), 32, "bfloat16", 8, "4 key heads with tensor=8"),
        (KeysValues(1, 64, 512, LATENT), 32, "bfloat16", 1, "keys of size 64 with values of size 512"),
        (KeysValues(8, 128, 128), 32, "float16", 1, "float16"),
        (KeysValues(8, 128, 128), 20, "bfloat16", 1, "pages of 20 tokens"),
    ],
)
def test_what_the_kernel_does_not_take_is_said(record, page, dtype, tensor, why):
    kernel = PageKernel(AbstractMesh(tuple(tensor if axis == "tensor" else 1 for axis in AXES), AXES))
    assert kernel.takes(record, page, dtype) is not bool(why)
    assert why in "".join(kernel.reasons) and len(kernel.reasons) == bool(why)
