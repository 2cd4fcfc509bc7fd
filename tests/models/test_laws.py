"""Tests every family against transformers. A new family joins through its cases in cases.py."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CASES, OF_EACH_KIND
from hybrid import HYBRID, SHARING, make
from oracle import attach_full, hf_logits, load, logits, make_hf, tokens, write_merged
from processes import ALL
from safetensors.numpy import load_file

from ftjax.config import FullConfig, MeshConfig
from ftjax.mesh import make_mesh
from ftjax.models.composite import TEXT, TIED
from ftjax.models.nn.context import Context
from ftjax.models.registry import FAMILIES
from ftjax.models.table import families

SUPPORT = {family.model_type: family for family in families()}  # what `ftjax models` prints, which the laws below prove
# The laws on several devices try one case of each family, and another where the first has too few heads to shard them.
SHARDED = OF_EACH_KIND + [
    next(case for case in CASES if case.model_type == first.model_type and case.tensor > 1)
    for first in OF_EACH_KIND
    if SUPPORT[first.model_type].tensor_parallel and first.tensor == 1
]

LOGITS = 1e-4  # absolute, float32
T = 40  # longer than every window and original length of the cases; most tests use this length, to share a program


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function from a case to (case, transformers' model, ftjax's model, ftjax's parameters, folder), made once."""

    @cache
    def of(name):
        case, folder = next(case for case in CASES if case.name == name), tmp_path_factory.mktemp("hf")
        hf = make_hf(case, folder)
        return case, hf, *load(folder), folder

    return of


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request, made):
    return made(request.param.name)


@pytest.fixture(scope="module", params=CASES if ALL else OF_EACH_KIND, ids=str)
def family(request, made):
    """The same of one case of each kind, for laws that compile gradients."""
    return made(request.param.name)


def test_every_family_has_a_case():
    assert set(FAMILIES) == {case.model_type for case in CASES}


def test_logits(pair):
    _, hf, model, params, _ = pair
    ids = tokens(1, T)
    np.testing.assert_allclose(logits(model, params, ids), hf_logits(hf, ids), atol=LOGITS, rtol=0)


def test_logits_of_a_short_text(family):
    """Rows may be shorter than windows, chunks and convolutions."""
    _, hf, model, params, _ = family
    ids = tokens(1, 3)
    np.testing.assert_allclose(logits(model, params, ids), hf_logits(hf, ids), atol=LOGITS, rtol=0)


def test_logits_left_padded(pair):
    """Padding does not change the logits of the tokens after it."""
    _, hf, model, params, _ = pair
    ids = tokens(1, T - 5)
    padded = np.concatenate([np.zeros((1, 5), np.int32), ids], axis=1)
    segments = (np.arange(T) >= 5).astype(np.int32)[None]
    positions = np.maximum(np.arange(T) - 5, 0).astype(np.int32)[None]
    ours = logits(model, params, padded, segments=segments, positions=positions)
    np.testing.assert_allclose(ours[:, 5:], hf_logits(hf, ids), atol=LOGITS, rtol=0)


def test_packed_is_unpacked(pair):
    """Documents in one row have the logits that they have alone."""
    case, hf, model, params, _ = pair
    lengths = [21, T - 26, 3]
    documents = [tokens(1, n, seed=n) for n in lengths]
    row = np.concatenate([*documents, np.zeros((1, 2), np.int32)], axis=1)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 2]).astype(np.int32)[None]
    positions = np.concatenate([np.arange(n) for n in [*lengths, 2]]).astype(np.int32)[None]
    ours = logits(model, params, row, segments=segments, positions=positions)
    start = 0
    for document in documents:
        n = document.shape[1]
        np.testing.assert_allclose(ours[:, start : start + n], hf_logits(hf, document), atol=LOGITS, rtol=0)
        start += n
    assert SUPPORT[case.model_type].packing


def test_documents_share_their_start(pair):
    """Two documents whose first 9 tokens are in the row once have the logits that they have alone, beside another document."""
    _, hf, model, params, _ = pair
    if not model.branches:
        return
    start, *rest = tokens(1, 9, seed=1), tokens(1, 8, seed=2), tokens(1, 15, seed=3)
    other, parts = tokens(1, 5, seed=4), [9, 8, 15, 5, 3]
    row = np.concatenate([start, *rest, other, np.zeros((1, 3), np.int32)], axis=1)
    segments, ends = (np.repeat(of, parts)[None].astype(np.int32) for of in ([1, 1, 2, 3, 0], [32, 17, 32, 37, 0]))
    positions = np.concatenate([np.arange(17), np.arange(9, 24), np.arange(5), np.zeros(3)])[None].astype(np.int32)
    for attention in ("xla", "blockwise"):
        ctx = Context(*map(jnp.asarray, (positions, segments)), attention=attention, ends=jnp.asarray(ends))
        with jax.disable_jit():
            module = model.bind(params)
            ours = np.asarray(module.unembed(module.hidden(jnp.asarray(row), ctx)[0], ctx))
        first, second = (hf_logits(hf, np.concatenate([start, one], axis=1)) for one in rest)
        np.testing.assert_allclose(ours[:, :17], first, atol=LOGITS, rtol=0)
        np.testing.assert_allclose(ours[:, 17:32], second[:, 9:], atol=LOGITS, rtol=0)
        np.testing.assert_allclose(ours[:, 32:37], hf_logits(hf, other), atol=LOGITS, rtol=0)


def learner(model):
    """Return the jitted `(params, ids, weights, segments, positions) -> ((loss, logits), gradients)` of a model.

    The loss is the weighted sum of the logits `[B, T, V]`.
    """

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def learn(params, ids, weights, segments, positions):
        module, ctx = model.bind(params), Context(positions, segments)
        found = module.unembed(module.hidden(ids, ctx)[0], ctx)
        return jnp.sum(found * weights), found

    return learn


@pytest.fixture(scope="module")
def learning(family):
    """The same with a model of which all weights are trained, and its `learner`, which the laws on gradients share."""
    case, hf, _, _, folder = family
    model, params = load(folder, attach_full)
    return case, hf, model, params, learner(model)


def test_documents_of_a_row_do_not_meet(learning):
    """Another first document changes neither the logits of the second nor the gradients of its loss."""
    _, _, _, params, learn = learning
    documents_do_not_meet(params, learn)


@pytest.mark.parametrize("choice", [HYBRID, SHARING], ids=["hybrid", "sharing"])
def test_documents_of_a_row_do_not_meet_where_layers_carry_a_state(choice):
    model, params = make(choice, trainable=True)
    documents_do_not_meet(params, learner(model))


def documents_do_not_meet(params, learn):
    first, second, padding = 14, T - 16, 2
    segments = np.repeat([[1, 2, 0]] * 2, [first, second, padding], axis=1).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in (first, second, padding)])] * 2).astype(np.int32)
    weights = np.random.default_rng(1).normal(size=(2, T, 96)).astype(np.float32) * (segments == 2)[..., None]
    row = tokens(2, T)
    other = np.concatenate([tokens(2, first, vocab=40, seed=9), row[:, first:]], axis=1)
    (_, want), gradients = jax.device_get(learn(params, row, weights, segments, positions))
    (_, got), others = jax.device_get(learn(params, other, weights, segments, positions))
    want, got = want[segments == 2], got[segments == 2]
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
    largest = max(float(np.abs(gradient).max()) for gradient in gradients.values())
    for path, gradient in gradients.items():
        np.testing.assert_allclose(others[path], gradient, atol=1e-5 * largest, rtol=0, err_msg=path)


def test_gradients(learning):
    """The gradients of all weights, embedding rows included, agree within 1e-3 relative."""
    case, hf, model, params, learn = learning
    ids = tokens(2, T)
    weights = np.random.default_rng(1).normal(size=(2, T, 96)).astype(np.float32)
    segments, positions = np.ones((2, T), np.int32), np.stack([np.arange(T, dtype=np.int32)] * 2)
    ours = jax.device_get(learn(params, ids, weights, segments, positions)[1])
    hf.zero_grad()
    (hf(torch.tensor(ids).long()).logits * torch.tensor(weights)).sum().backward()
    theirs = {name: p.grad for name, p in hf.named_parameters() if p.grad is not None}  # image parts have none
    theirs = dict(part for name, gradient in theirs.items() for part in apart(case, name, gradient))
    hf.zero_grad()
    # Some are zero up to rounding: without RoPE, a bias of the keys shifts all scores of a query alike.
    rounding = 1e-6 * max(float(gradient.abs().max()) for gradient in theirs.values())
    checked = 0
    for path, spec in model.specs.items():
        for piece in spec.pieces():
            if piece.name in theirs:
                want = theirs[piece.name].numpy()
                np.testing.assert_allclose(
                    ours[path][piece.index].reshape(want.shape),
                    want,
                    atol=max(1e-3 * np.abs(want).max(), rounding),
                    rtol=0,
                    err_msg=piece.name,
                )
                checked += 1
    assert checked >= len(theirs) - 1


def apart(case, name, gradient):
    """Yield names and gradients of the parts that checkpoints have of a parameter: OLMo Hybrid's have three convolutions."""
    if case.model_type == "olmo_hybrid" and name.endswith(".conv1d.weight"):
        for part, own in zip("qkv", gradient.chunk(3), strict=True):
            yield name.replace("conv1d", f"{part}_conv1d"), own
        return
    yield name, gradient


@pytest.mark.parametrize("shard", ["20KB", "5GB"] if ALL else ["20KB"])
def test_round_trip_is_bit_identical(pair, tmp_path, shard):
    """Hugging Face -> ftjax -> Hugging Face keeps every bit, from one file and from several."""
    _, hf, _, _, _ = pair
    hf.save_pretrained(tmp_path / "in", max_shard_size=shard)
    model, params = load(tmp_path / "in")
    (tmp_path / "out").mkdir()
    write_merged(tmp_path / "out", model, params, FullConfig(), tmp_path / "in")

    def all_tensors(folder):
        return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}

    want, got = all_tensors(tmp_path / "in"), all_tensors(tmp_path / "out")
    assert want.keys() == got.keys()
    for name in want:
        assert want[name].tobytes() == got[name].tobytes(), name
    want = said(hf.config.to_dict())
    got = said(type(hf).from_pretrained(tmp_path / "out").config.to_dict())
    texts = want.pop(TEXT, {}), got.pop(TEXT, {})
    for one, other in ((want, got), texts):
        assert {key: other.get(key) for key in one} == one


def said(values: dict) -> dict:
    """Return what a configuration means: with older fields, `rope_parameters` has the `rope_type` under its older name, too,
    and a text model inside another says whether its embeddings are tied, which the whole one decides."""
    values = {key: value for key, value in values.items() if key not in ("_name_or_path", "dtype", "architectures")}
    if rope := values.get("rope_parameters"):
        values["rope_parameters"] = {key: value for key, value in rope.items() if key != "type"}
    if text := values.get(TEXT):
        values[TEXT] = {key: value for key, value in said(text).items() if key != TIED}
    return values


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_eight_devices_are_one(case, made):
    _, hf, _, _, folder = made(case.name)
    ids = tokens(4, 16)
    mesh = make_mesh(MeshConfig(fsdp=8 // case.tensor, tensor=case.tensor))
    model, params = load(folder, mesh=mesh)
    with jax.set_mesh(mesh):
        together = logits(model, params, ids)
    np.testing.assert_allclose(together, hf_logits(hf, ids), atol=LOGITS, rtol=0)
    assert any(not p.sharding.is_fully_replicated for p in params.values())
    if case.tensor > 1:
        axes = {axis for path, s in model.specs.items() if "tensor" in str(params[path].sharding.spec) for axis in s.row.axes}
        assert ({"heads", "mlp"} <= axes) == SUPPORT[case.model_type].tensor_parallel
