"""Tests every attention backend against the reference: values and gradients, packed and windowed (T2)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import ALL

from ftjax.config import MeshConfig
from ftjax.errors import UserError
from ftjax.mesh import make_mesh
from ftjax.models.nn import attention_blockwise
from ftjax.models.nn.attention import AUTO_CUDNN, attend, choose, self_attention
from ftjax.models.nn.attention_cudnn import documents, missing_for
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern

B, T, N, K, H = 2, 37, 4, 2, 8
PATTERNS = {
    "causal": Pattern(0.35),
    "window": Pattern(0.35, window=9),
    "softcap": Pattern(0.35, softcap=2.0),
    "both": Pattern(0.5, window=5, softcap=3.0),
}


HERE = ["blockwise", "splash_interpreted"]  # backends that a CPU can run


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K))
    segments = jnp.asarray([np.repeat([1, 2, 3, 0], [12, 20, 3, 2]), np.repeat([1, 0], [30, 7])], jnp.int32)
    return q, k, v, segments


@pytest.mark.parametrize(("pattern", "sinks"), [
    (pattern, sinks) for pattern in PATTERNS for sinks in (False, True) if ALL or sinks == (pattern == "window")
])  # fmt: skip
def test_backends_are_the_reference(inputs, pattern, sinks, monkeypatch):
    monkeypatch.setattr(attention_blockwise, "BLOCK", 8)
    *qkv, segments = inputs
    real = (segments > 0)[:, :, None, None].astype(jnp.float32)

    sink_scores = jnp.asarray([-1.0, 0.5, 2.0, 9.0])

    def loss(name, q, k, v, scores):
        out = attend(q, k, v, segments, segments, 0, PATTERNS[pattern], name, scores if sinks else None) * real
        return jnp.sum(jnp.sin(out) * jnp.arange(H, dtype=jnp.float32)), out

    @jax.jit
    def all_of_them(*arguments):
        return [jax.value_and_grad(partial(loss, name), (0, 1, 2, 3), has_aux=True)(*arguments) for name in ("xla", *HERE)]

    ((_, want), want_grads), *found = all_of_them(*qkv, sink_scores)
    for backend, ((_, got), got_grads) in zip(HERE, found, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=backend)
        for g, w in zip(got_grads, want_grads, strict=True):
            np.testing.assert_allclose(g, w, atol=2e-5, err_msg=backend)


@pytest.mark.parametrize("backend", ["xla", *HERE])
def test_documents_do_not_see_each_other(inputs, backend):
    """Changing document 1 does not change the outputs of document 2 by a bit."""
    q, k, v, segments = inputs
    other = (segments == 1)[:, :, None, None]
    changed = [jnp.where(other, x + 1, x) for x in (q, k, v)]
    run = jax.jit(lambda q, k, v: attend(q, k, v, segments, segments, 0, PATTERNS["causal"], backend))
    before, after = np.asarray(run(q, k, v)), np.asarray(run(*changed))
    second = np.asarray(segments == 2)
    np.testing.assert_array_equal(before[second], after[second])
    assert np.abs(before - after)[np.asarray(segments == 1)].max() > 0.1


@jax.jit
def in_xla(q, k, v, segments):
    return attend(q, k, v, segments, segments, 0, Pattern(0.35), "xla")


@pytest.mark.parametrize("backend", ["xla", *HERE])
def test_chunks_count_from_the_start_of_a_document(inputs, backend):
    """Each chunk of a document of a packed row is attended to as if it were a document of its own, and nothing else is."""
    *qkv, segments = inputs
    lengths = [[12, 20, 3, 2], [30, 7]]
    positions = jnp.asarray([np.concatenate([np.arange(n) for n in row]) for row in lengths], jnp.int32)
    ctx = Context(positions, segments, attention=backend)
    got = jax.jit(lambda *qkv: self_attention(*qkv, ctx, Pattern(0.35, chunk=5), 0, None)[0])(*qkv)
    alone = np.array([[number for number, size in enumerate(row, 1) for _ in range(size)] for row in (
        [5, 5, 2, 5, 5, 5, 5, 3, 2], [5, 5, 5, 5, 5, 5, 7],
    )], np.int32)  # fmt: skip
    want = in_xla(*qkv, alone).reshape(got.shape)
    real = np.asarray(segments > 0)
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=1e-5)


@pytest.fixture(scope="module")
def windowed():
    return in_a_window("xla")


@pytest.mark.parametrize(
    "sizes", [{"sequence": 4, "fsdp": 2}, {"sequence": 2, "tensor": 2, "data": 2}, {"tensor": 4, "fsdp": 2}], ids=str
)
def test_kernels_under_a_mesh(sizes, windowed):
    """The tokens of a row, or its heads, are sharded over devices; with four devices for two key heads."""
    want, want_grads = windowed
    with jax.set_mesh(make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))):
        found = [in_a_window(backend) for backend in HERE]
    for backend, (got, got_grads) in zip(HERE, found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=backend)
        for g, w in zip(got_grads, want_grads, strict=True):
            np.testing.assert_allclose(g, w, atol=2e-5, err_msg=backend)


def in_a_window(backend: str):
    """Return a loss and its gradients for queries, keys, values and sinks, on the mesh that is set."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 64, heads, H)), jnp.float32) for heads in (8, 2, 2))
    segments = jnp.asarray([np.repeat([1, 2, 0], [30, 30, 4]), np.repeat([1, 2], [50, 14])], jnp.int32)
    sinks = jnp.asarray(rng.normal(size=8), jnp.float32)
    pattern = Pattern(0.35, window=20, softcap=3.0)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
    def loss(q, k, v, sinks):
        real = (segments > 0)[:, :, None, None].astype(jnp.float32)
        out = attend(q, k, v, segments, segments, 0, pattern, backend, sinks) * real
        return jnp.sum(jnp.sin(out) * jnp.arange(H, dtype=jnp.float32))

    return jax.device_get(loss(q, k, v, sinks))


def test_heads_that_do_not_divide(inputs):
    *qkv, segments = inputs
    qkv, segments = [x[:, :32] for x in qkv], segments[:, :32]
    with (
        jax.set_mesh(make_mesh(MeshConfig(sequence=8, fsdp=1))),
        pytest.raises(UserError, match=r"sequence: 8 .* 4 .* 1, 2, 4"),
    ):
        attend(*qkv, segments, segments, 0, PATTERNS["causal"], "blockwise")


# ---- backends of other devices ----


class Device:
    """The attributes of a device that are read."""

    def __init__(self, platform, compute_capability="0"):
        self.platform, self.compute_capability = platform, compute_capability


def test_choice_by_device():
    assert choose("auto", Device("cpu")) == "blockwise" and choose("auto", Device("cpu"), 8) == "xla"
    assert choose("auto", Device("tpu")) == choose("auto", Device("tpu"), 8) == "splash"
    assert choose("auto", Device("gpu", "9.0")) == AUTO_CUDNN and choose("cudnn", Device("gpu", "10.0")) == "cudnn"
    with pytest.warns(UserWarning, match=r"attention: xla.*Hopper.*8\.0"):
        assert choose("auto", Device("gpu", "8.0")) == "xla"
    with pytest.raises(UserError, match=r"splash .* TPUs, and this is a gpu"):
        choose("splash", Device("gpu", "9.0"))
    with pytest.raises(UserError, match="cudnn is not available: it needs an NVIDIA GPU"):
        choose("cudnn", Device("cpu"))


def test_documents_for_cudnn():
    """Documents are given as cuDNN wants them: lengths and starts, -1 for rows with fewer documents than the maximum."""
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0, 0], [1] * 8, [1, 2, 3, 4, 5, 5, 5, 5]], jnp.int32)
    lengths, offsets, count = jax.device_get(jax.jit(documents, static_argnums=1)(segments, 4))
    assert lengths.tolist() == [[3, 2, 3, -1], [8, -1, -1, -1], [1, 1, 1, 1]]
    assert offsets.tolist() == [[0, 3, 5, -1, -1], [0, -1, -1, -1, -1], [0, 1, 2, 3, 4]]
    assert count.tolist() == [3, 1, 5]


@pytest.mark.parametrize("pattern, sinks, dtype, head_dim, said", [
    (Pattern(1.0, softcap=2.0), None, jnp.bfloat16, 64, "softcap"),
    (Pattern(1.0), np.zeros(4, np.float32), jnp.bfloat16, 64, "sinks"),
    (Pattern(1.0), None, jnp.float32, 64, "float32"), (Pattern(1.0), None, jnp.bfloat16, 60, "60"),
])  # fmt: skip
def test_what_cudnn_cannot(pattern, sinks, dtype, head_dim, said):
    assert missing_for(Pattern(1.0, window=4), None, jnp.bfloat16, 64) is None
    assert said in missing_for(pattern, sinks, dtype, head_dim)
    x, segments = jax.ShapeDtypeStruct((1, 16, 4, head_dim), dtype), jax.ShapeDtypeStruct((1, 16), jnp.int32)

    def program(backend: str) -> str:
        run = jax.jit(lambda x, segments: attend(x, x, x, segments, segments, 0, pattern, backend, sinks))
        return run.lower(x, segments).as_text()

    with pytest.raises(UserError, match=said):
        program("cudnn")
    assert program(AUTO_CUDNN) == program("xla")


def test_cudnn_is_called(monkeypatch):
    """Lowered for an NVIDIA GPU, forward and backward with a window, the program has the kernel's custom calls with offsets of
    packed rows."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(private, "check_compute_capability", lambda capability: True)
    q, k = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
    segments = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(q, k, v, segments):
        out = attend(q, k, v, segments, segments, 0, Pattern(0.1, window=100), "cudnn")
        return jnp.sum(out.astype(jnp.float32))

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, segments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert "PADDING_CAUSAL" in text and "sliding_window_length" in text
