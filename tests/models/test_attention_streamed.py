"""Tests attention over pages block by block against attention over gathered pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.models.nn import attention_streamed
from ftjax.models.nn.attention import xla
from ftjax.models.nn.attention_streamed import streamed
from ftjax.models.nn.layer_types import Pattern

PAGE, PAGES, LAYERS, VIRTUAL = 4, 9, 2, 3
CASES = {  # T, N, K, H, D, pattern, sinks, virtual tokens, dtype
    "one token": (1, 6, 3, 8, 8, Pattern(0.3), False, False, jnp.float32),
    "one key head": (1, 4, 1, 8, 12, Pattern(0.3), False, False, jnp.float32),
    "many key heads": (1, 20, 10, 8, 8, Pattern(0.3), False, False, jnp.float32),
    "window, cap, sinks": (1, 4, 2, 8, 8, Pattern(0.3, window=5, softcap=2.0), True, False, jnp.float32),
    "chunks after virtual tokens": (1, 4, 2, 8, 8, Pattern(0.3, chunk=6), False, True, jnp.float32),
    "several tokens": (5, 4, 2, 8, 4, Pattern(0.3, window=7), True, True, jnp.float32),
    "several tokens, chunks": (5, 4, 2, 8, 8, Pattern(0.3, chunk=6), False, False, jnp.float32),
    "bfloat16": (1, 4, 2, 8, 8, Pattern(0.3), False, True, jnp.bfloat16),
}


def inputs(case: str) -> tuple[tuple[jax.Array, ...], Pattern, jax.Array | None, tuple | None]:
    """Return q, keys, values, tables in random order and lengths; and what else a layer has."""
    t, n, kv, h, d, pattern, sinks, virtual, dtype = CASES[case]
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    before = jnp.asarray([0, 2 * PAGE + 3, PAGE * PAGES - t, 7], jnp.int32)
    rows = len(before)
    table = jnp.asarray(1 + rng.permutation(rows * PAGES).reshape(rows, PAGES), jnp.int32)
    keys, values = (normal(LAYERS, rows * PAGES + 1, PAGE, kv, size) for size in (h, d))
    prefix = None
    if virtual:
        position = before[:, None, None] + jnp.arange(t)[:, None] + VIRTUAL
        place = jnp.arange(VIRTUAL)
        seen = jnp.ones((rows, t, VIRTUAL), bool)
        seen &= True if pattern.window is None else position - place < pattern.window
        seen &= True if pattern.chunk is None else position // pattern.chunk == place // pattern.chunk
        prefix = normal(VIRTUAL, kv, h), normal(VIRTUAL, kv, d), seen
    return (normal(rows, t, n, h), keys, values, table, before), pattern, normal(n) if sinks else None, prefix


def expected(arrays: tuple[jax.Array, ...], pattern: Pattern, sinks, prefix) -> jax.Array:
    """Compute the same as plain XLA over all pages of the tables, gathered."""
    q, keys, values, table, before = arrays
    rows, t = q.shape[:2]
    k, v = (x[1, table].reshape(rows, PAGE * PAGES, *x.shape[3:]) for x in (keys, values))
    own, seen = jnp.ones((rows, t), jnp.int32), None
    if pattern.chunk is not None:
        virtual = 0 if prefix is None else VIRTUAL
        own = (before[:, None] + jnp.arange(t) + virtual) // pattern.chunk
        seen = jnp.broadcast_to((jnp.arange(k.shape[1]) + virtual) // pattern.chunk, k.shape[:2])
    return xla(q, k, v, own, seen, before, pattern, sinks, prefix)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pages", [1, 2, PAGES])
def test_blocks_attend_as_whole_tables_do(case, pages, monkeypatch):
    """In blocks of one page, of some that do not divide the table, and of all."""
    arrays, *rest = inputs(case)
    monkeypatch.setattr(attention_streamed, "LONGEST", pages * PAGE)
    counts = jnp.full(len(arrays[-1]), arrays[0].shape[1], jnp.int32)
    got = jax.jit(lambda arrays: streamed(*arrays[:3], jnp.int32(1), *arrays[3:], counts, *rest))(arrays)
    close = 2e-2 if got.dtype == jnp.bfloat16 else 2e-6
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (got, expected(arrays, *rest))), atol=close)


@pytest.mark.parametrize("case", ["one token", "window, cap, sinks", "chunks after virtual tokens"])
def test_a_row_is_the_same_in_any_company(case, monkeypatch):
    """To the bit, whether others are longer, shorter, or idle: blocks that it does not see change nothing."""
    (q, keys, values, table, before), *rest = inputs(case)
    monkeypatch.setattr(attention_streamed, "LONGEST", PAGE)
    run = jax.jit(lambda before, counts: streamed(q, keys, values, 1, table, before, counts, *rest))
    ones = jnp.ones(4, jnp.int32)
    want = run(before, ones)[1]
    for others in (0, 1, PAGE * PAGES - 1):
        np.testing.assert_array_equal(run(jnp.full(4, others, jnp.int32).at[1].set(before[1]), ones)[1], want)
    np.testing.assert_array_equal(run(before, ones.at[jnp.array([0, 2, 3])].set(0))[1], want)


@pytest.mark.parametrize("idle", [30, 0])
def test_only_the_blocks_that_are_seen_are_read(idle, monkeypatch):
    """What is not finite there would show: it is multiplied by a weight of 0. So does the price fall with short texts."""
    (q, keys, values, table, _), pattern, *rest = inputs("window, cap, sinks")
    monkeypatch.setattr(attention_streamed, "LONGEST", PAGE)
    before, counts = jnp.array([9, 11, 10, idle], jnp.int32), jnp.array([1, 1, 1, 0], jnp.int32)
    seen = range((9 - 5 + 1) // PAGE, 11 // PAGE + 1)  # blocks of the window before 9, up to 11
    unread = table[:, jnp.array([page for page in range(PAGES) if page not in seen])]
    spoilt = [x.at[:, unread].set(jnp.nan) for x in (keys, values)]
    got = streamed(q, *spoilt, 1, table, before, counts, pattern, *rest)[:3]
    np.testing.assert_array_equal(got, streamed(q, keys, values, 1, table, before, counts, pattern, *rest)[:3])
    assert np.isfinite(got).all()
