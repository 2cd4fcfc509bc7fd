"""Every attention backend is the reference, values and gradients, packed and windowed (T2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftjax.models import attention_blockwise
from ftjax.models.attention import BACKENDS, Pattern, attend

B, T, N, K, H = 2, 37, 4, 2, 8
PATTERNS = {
    "causal": Pattern(0.35),
    "window": Pattern(0.35, window=9),
    "softcap": Pattern(0.35, softcap=2.0),
    "both": Pattern(0.5, window=5, softcap=3.0),
}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))
    segments = jnp.asarray([np.repeat([1, 2, 3, 0], [12, 20, 3, 2]), np.repeat([1, 0], [30, 7])], jnp.int32)
    return q, k, v, segments


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "xla"])
def test_backend_is_the_reference(inputs, backend, pattern, sinks, monkeypatch):
    monkeypatch.setattr(attention_blockwise, "BLOCK", 8)
    *qkv, segments = inputs
    real = (segments > 0)[:, :, None, None]

    sink_scores = jnp.asarray([-1.0, 0.5, 2.0, 9.0])

    def loss(name, q, k, v, scores):
        out = attend(q, k, v, segments, segments, 0, PATTERNS[pattern], name, scores if sinks else None) * real
        return jnp.sum(jnp.sin(out) * jnp.arange(H)), out

    (_, want), want_grads = jax.value_and_grad(lambda *x: loss("xla", *x), (0, 1, 2, 3), has_aux=True)(*qkv, sink_scores)
    (_, got), got_grads = jax.value_and_grad(lambda *x: loss(backend, *x), (0, 1, 2, 3), has_aux=True)(*qkv, sink_scores)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_do_not_see_each_other(inputs, backend):
    """Changing document 1 leaves document 2's outputs as they were, to the bit."""
    q, k, v, segments = inputs
    other = (segments == 1)[:, :, None, None]
    changed = [jnp.where(other, x + 1, x) for x in (q, k, v)]
    run = jax.jit(lambda q, k, v: attend(q, k, v, segments, segments, 0, PATTERNS["causal"], backend))
    before, after = np.asarray(run(q, k, v)), np.asarray(run(*changed))
    second = np.asarray(segments == 2)
    np.testing.assert_array_equal(before[second], after[second])
    assert np.abs(before - after)[np.asarray(segments == 1)].max() > 0.1
