"""Tests that the suite checks shapes and dtypes: calls with wrong ones are refused."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from shape_checks import Checks

import ftjax
from ftjax.generate.sample import choose
from ftjax.models.nn.attention import attend
from ftjax.models.nn.context import Context
from ftjax.models.nn.layer_types import Pattern
from ftjax.objectives.loss import cross_entropy

B, T, N, H = 2, 6, 4, 8


def attention(keys: int) -> jax.Array:
    q, k = jnp.ones((B, T, N, H)), jnp.ones((B, keys, 2, H))
    segments = jnp.ones((B, T), jnp.int32)
    return attend(q, k, k, segments, segments, 0, Pattern(1.0), "xla")


def test_a_wrong_shape_is_refused():
    assert attention(T).shape == (B, T, N, H)
    with pytest.raises(TypeCheckError, match="k_segments"):
        attention(T + 1)


def test_a_wrong_shape_is_refused_while_jax_traces():
    with pytest.raises(TypeCheckError, match="temperature"):
        jax.eval_shape(choose, jnp.ones((B, 9)), jnp.ones(1), jax.random.split(jax.random.key(0), B))


def test_a_wrong_dtype_is_refused():
    with pytest.raises(TypeCheckError, match="targets"):
        cross_entropy(jnp.ones((B, T, 9)), jnp.ones((B, T)), jnp.ones((B, T)))


def test_a_record_is_checked():
    with pytest.raises(TypeCheckError, match="segment_ids"):
        Context(jnp.ones((B, T), jnp.int32), jnp.ones((B, T + 1), jnp.int32))


def test_dtypes_are_not_promoted():
    with pytest.raises(jax.dtypes.TypePromotionError, match="promotion"):
        jnp.ones(2, jnp.float32) * jnp.ones(2, jnp.bfloat16)


def test_every_annotated_function_is_checked():
    """`Checks` finds each name of jaxtyping in a signature, and adds its decorator there."""
    for path in Path(ftjax.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if "jaxtyping" not in source:
            continue
        tree = ast.parse(source)
        assert "from jaxtyping import" in source, path
        assert "shape_checks" in ast.unparse(Checks(tree).visit(tree)), path
