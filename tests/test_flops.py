"""Tests the closed form of the FLOPs against the matrix products in the program, and the table of chips."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from models.cases import FEW, ONE_OF_EACH, UNLIKE
from models.hybrid import make
from oracle import Case, attach_full, context, make_hf, tokens
from processes import ALL

from ftjax.chips import CHIPS, chip_of
from ftjax.config import FullConfig, LoraConfig
from ftjax.flops import Chunk, TrainFlops, peak_of, train_flops, train_flops_per_token
from ftjax.hub.load import open_model
from ftjax.methods import method_of
from ftjax.models.composite import text_of
from ftjax.models.model import Model, build_module
from ftjax.models.nn.delta_rule import gated_delta_rule
from ftjax.models.nn.memory import RecurrentState
from ftjax.models.nn.ssd import state_space

B, T = 2, 12


def products(jaxpr) -> float:
    """Return the FLOPs of all matrix products in a program; loop bodies count once per iteration."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        elif eqn.primitive.name == "ragged_dot_general":
            # [M, in] x [X, in, out], or the weights' gradient [M, in] x [M, out]: M in out products either way.
            rows, other = (var.aval.shape for var in eqn.invars[:2])
            wide = math.prod(other[1:]) if len(other) == 3 else rows[1] * other[1]
            total += 2 * rows[0] * wide
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += times * sum(products(inner) for inner in jaxprs_in_params(eqn.params))
    return total


def program(model: Model, also: tuple[str, ...] | list[str] | None = None) -> float:
    """Return FLOPs per token of the gradient of the summed logits by the trained parameters, and by the embedding so that every
    layer's input has a gradient; or by `also` instead."""
    ids = tokens(B, T)
    ctx = context(ids, attention="xla")
    values = {path: spec.abstract for path, spec in model.specs.items()}
    also = embeddings(model) if also is None else also
    trained = {path: value for path, value in values.items() if path in model.trainable or path in also}
    frozen = {path: value for path, value in values.items() if path not in trained}

    def loss(trained, frozen):
        module = model.bind({**trained, **frozen})
        hidden, _, _ = module.hidden(jnp.asarray(ids), ctx)
        return module.unembed(hidden, ctx).sum()

    return products(jax.make_jaxpr(jax.grad(loss))(trained, frozen).jaxpr) / (B * T)


def in_chunks(model: Model) -> float:
    """Return FLOPs per token of the chunks of the gated delta rule or of Mamba-2 in all layers, forward and backward, above
    those of the recurrence."""
    layers = [record for layer in model.memories for record in layer if isinstance(record, RecurrentState)]
    if not layers:
        return 0
    (n, d, v), text = layers[0].shape, text_of(model.config)
    if "linear_num_key_heads" not in text:
        return len(layers) * mamba2_in_chunks(n, d, v, text.get("mamba_n_groups") or text["n_groups"])
    keys = jax.ShapeDtypeStruct((B, T, text["linear_num_key_heads"], d), jnp.float32)
    values, each = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, T, n, v), (B, T, n)))

    def total(*inputs):
        return gated_delta_rule(*inputs, jnp.zeros((B, n, d, v)), jnp.ones((B, T), jnp.int32))[0].sum()

    chunked = products(jax.make_jaxpr(jax.grad(total, argnums=range(5)))(keys, keys, values, each, each).jaxpr)
    return len(layers) * (chunked / (B * T) - 18 * n * d * v)


def mamba2_in_chunks(n: int, h: int, d: int, groups: int) -> float:
    """Return the same of one layer of Mamba-2."""
    shapes = (B, T, n, d), (B, T, groups, h), (B, T, groups, h), (B, T, n), (n,)

    def total(*inputs):
        return state_space(*inputs, jnp.zeros((B, n, h, d)), jnp.ones((B, T), jnp.int32))[0].sum()

    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    chunked = products(jax.make_jaxpr(jax.grad(total, argnums=range(5)))(*inputs).jaxpr)
    return chunked / (B * T) - 12 * n * h * d


def embeddings(model: Model) -> list[str]:
    return [path for path, spec in model.specs.items() if "vocab" in spec.row.axes]


def build(case: Case, folder, attach) -> Model:
    make_hf(case, folder)
    facts, _ = open_model(folder)
    root = build_module(facts)
    attach(root)
    return Model.of(root, facts)


def attach_lora(root) -> None:
    config = LoraConfig(r=3)
    method_of(config).attach(root, config)


@pytest.mark.parametrize(("case", "attach"), [
    pytest.param(case, attach, id=f"{case}-{name}")
    for case in UNLIKE for name, attach in {"full": attach_full, "lora": attach_lora}.items()
    if ALL or attach is attach_full or case in FEW
])  # fmt: skip
def test_closed_form(case, attach, tmp_path):
    """The closed form agrees; XLA's attention multiplies masked pairs too, so the closed form counts them."""
    model = build(case, tmp_path, attach)
    flops = train_flops(model)
    pairs = 4 * flops.matrices + 2 * flops.trained + sum(12 * width * T for width in flops.attention.values())
    head = (
        0
        if attach is attach_full
        else next(2 * model.specs[p].size for p in embeddings(model) if p == f"{model.output}.weight")
    )
    pairs += 3 * flops.states + in_chunks(model)
    assert program(model) == pytest.approx(pairs + head, rel=1e-3)


@pytest.mark.parametrize("lowest", [0, 2])
def test_layers_with_a_recurrent_state(lowest):
    """Products with the state count by what the layer declares; a depthwise convolution is not a matrix product."""
    model, _ = make(("recurrent", "plain", "recurrent"), trainable=not lowest)
    if lowest:
        root = model.bind({path: spec.abstract for path, spec in model.specs.items()})
        config = FullConfig(last_layers=3 - lowest)
        method_of(config).attach(root, config)
        model = Model.of(root, model.config)
    flops = train_flops(model)
    state = 4 * 4 * 8 * 8
    assert (flops.states, flops.states_below) == (2 * state, state if lowest else 0)
    if not lowest:
        convolutions = 2 * 2 * 24
        pairs = 6 * (flops.matrices - convolutions) + 12 * 32 * T + 3 * flops.states
        assert program(model) == pytest.approx(pairs, rel=1e-6)


PARTS = [  # what trains, and which matrices of four layers a gradient reaches
    ({"last_layers": 1}, 1),
    ({"last_layers": 3, "freeze": ["mlp"]}, 3),
    ({"train": [r"layers\.2\.mlp", "lm_head"]}, 2),
    ({"train": ["lm_head"]}, 0),
    ({"train": [r"model\.norm"]}, 0),
    ({"last_layers": 1, "train": ["embed_tokens"]}, 4),
    ({"freeze": ["embed_tokens"]}, 4),
]


TIED = [part for part in PARTS if "lm_head" not in part[0].get("train", [])]  # a tied model has no projection of its own


@pytest.mark.parametrize(
    "method, reached, tied", [(*part, False) for part in PARTS] + [(*part, True) for part in TIED], ids=str
)
def test_frozen_layers_below_the_lowest_trained_one(method, reached, tied, tmp_path):
    """Frozen layers below the lowest trained one get no gradient; that layer counts as a whole."""
    config = FullConfig(**method)
    case = Case("llama", "llama", {"num_hidden_layers": 4, "tie_word_embeddings": tied})
    model = build(case, tmp_path, lambda root: method_of(config).attach(root, config))
    flops = train_flops(model)
    layer = 32 * (2 * 32 + 2 * 16 + 3 * 48)
    assert flops.below == (4 - reached) * layer
    assert sum(flops.attention_below.values()) == (4 - reached) * 32
    closed = 4 * flops.matrices + 2 * flops.trained - 2 * flops.below + (4 * 12 - (4 - reached) * 8) * 32 * T
    inputs = 0
    if r"layers\.2\.mlp" in method.get("train", []):  # in that layer, attention comes before the trained weights
        inputs = 2 * 32 * (2 * 32 + 2 * 16) + 8 * 32 * T
    assert program(model, ()) == pytest.approx(closed - inputs, rel=1e-3)
    positions, segments = np.arange(T)[None], np.ones((1, T), int)
    assert flops.of_batch(positions, segments) == pytest.approx(T * flops.per_token(T))
    assert ("below the lowest" in flops.formula(T)) == bool(flops.below)


def test_adapters_of_the_upper_layers(tmp_path):
    config = LoraConfig(r=3, layers_to_transform=[2, 3])
    case = Case("llama", "llama", {"num_hidden_layers": 4})
    flops = train_flops(build(case, tmp_path, lambda root: method_of(config).attach(root, config)))
    assert flops.below == 2 * 32 * (2 * 32 + 2 * 16 + 3 * 48) and flops.attention_below == {None: 2 * 32}


def test_linear_attention_below_the_lowest_trained_layer(tmp_path):
    """A token uses the state of 6 heads of 8 x 12 in each of three layers; frozen ones have no gradient."""
    case = next(case for case in ONE_OF_EACH if case.model_type == "qwen3_5_text")
    config = FullConfig(last_layers=2)
    flops = train_flops(build(case, tmp_path, lambda root: method_of(config).attach(root, config)))
    assert (flops.states, flops.states_below) == (6 * 3 * 6 * 8 * 12, 6 * 2 * 6 * 8 * 12)
    longer = flops.per_token(9) - flops.per_token(7)
    assert longer == 12 * 4 * 16  # of the one layer with attention, W = heads x head size, one key more
    assert "recurrent states" in flops.formula(7)


def test_llama_by_hand(tmp_path):
    """Two layers of 32 (q, o) + 16 (k, v) + 3 x 48 columns over 32 rows, and a head of 96, give the FLOPs."""
    model = build(Case("llama", "llama"), tmp_path, attach_full)
    n = 2 * 32 * (2 * 32 + 2 * 16 + 3 * 48) + 96 * 32
    assert train_flops(model) == TrainFlops(n, n, {None: 2 * 32})
    assert train_flops_per_token(model, 7) == 6 * n + 12 * 2 * 32 * 4
    assert "4 x 1.843e+04 weights" in train_flops(model).formula(7)


@pytest.mark.parametrize("window", [None, 3, 50, Chunk(2)])
def test_documents_of_a_packed_row(window):
    """Each document attends to itself only, within its windows; padding counts nothing."""
    flops = TrainFlops(10, 1, {window: 8})
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 0, 0]])
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0]])
    assert flops.of_batch(positions, segments) == pytest.approx(5 * flops.per_token(5) + 3 * flops.per_token(3))
    assert flops.of_batch(positions, segments * 0) == 0
    if window == Chunk(2):
        assert flops.per_token(5) == pytest.approx(42 + 12 * 8 * (1 + 2 + 1 + 2 + 1) / 5)
    if window == 3:
        assert flops.per_token(5) == 42 + 12 * 8 * (1 + 2 + 3 + 3 + 3) / 5


class Device:
    def __init__(self, device_kind, **attributes):
        self.device_kind = device_kind
        self.__dict__.update(attributes)


def test_chips():
    """Figures of TPUs agree with jax's, including a device that is half a chip; an unknown device has none."""
    from jax._src.pallas.mosaic.tpu_info import chip_version_from_device_kind, get_tpu_info_for_chip

    for chip in CHIPS.values():
        assert all(chip_of(kind) is chip for kind in chip.kinds)
        version = chip_version_from_device_kind(chip.kinds[0])
        if version is not None and chip.name not in ("v3",):  # jax gives v3 the peak of a clock that [2] does not
            info = get_tpu_info_for_chip(version, 1)
            cores = version.num_physical_tensor_cores_per_chip
            assert cores == chip.cores
            assert info.bf16_ops_per_second * cores == pytest.approx(chip.peak, rel=0.01)
            assert info.hbm_capacity_bytes * cores == pytest.approx(chip.hbm, rel=0.08)
            assert info.mem_bw_bytes_per_second * cores == pytest.approx(chip.hbm_bandwidth, rel=0.13)
    assert peak_of([Device("TPU7x", num_cores=1)] * 8) == 4 * 2307e12
    assert peak_of([Device("TPU v5", num_cores=2)] * 4) == 4 * 459e12
    assert peak_of([Device("NVIDIA H100 80GB HBM3")]) == 989e12
    assert peak_of(jax.devices()) is None
