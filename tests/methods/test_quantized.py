"""Tests quantised base models: the formats, every kind of layer, memory, sharding, resuming and merging."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import ONE, Case, load, logits, make_hf, tokens
from processes import ALL
from quantised import KINDS, compiled_step, dense, lora_model, quantised, sizes_read, with_model
from safetensors.numpy import load_file
from tiny_run import make_batch, make_config, run_steps
from tiny_tokenizer import save_tokenizer

from ftjax import tree
from ftjax.config import Config, LoraConfig
from ftjax.errors import UserError
from ftjax.models.facts import complete_config
from ftjax.models.nn.quantized import NF4, Int8, Nf4, Quantization
from ftjax.train.run import train
from ftjax.train.setup import prepare


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def back(how: Quantization, weight) -> np.ndarray:
    return np.asarray(jax.jit(lambda w: how.quantise(w).dequantise(jnp.float32))(weight))


# ---- the formats ----


def test_the_code_book_is_the_papers():
    """The code book follows Dettmers et al. 2023, eq. 4 and appendix E: quantiles of the normal distribution, an exact zero,
    scaled to [-1, 1]."""
    from scipy.special import ndtri

    edge = (31 / 32 + 29 / 30) / 2
    up, down = ndtri(np.linspace(edge, 0.5, 9)[:-1]), -ndtri(np.linspace(edge, 0.5, 8)[:-1])
    want = np.sort(np.concatenate([up, [0.0], down]))
    np.testing.assert_allclose(NF4, want / np.abs(want).max(), atol=1e-6)


def test_errors_are_those_of_bitsandbytes():
    """Errors are those of its kernels, 0.0728 and 0.2033; its own tests require mean |error| below 0.1 and mean relative error
    below 0.28, for normal weights in blocks of 64."""
    weight = normal(1024, 1024)
    error = np.abs(back(Quantization("nf4"), weight) - weight)
    assert abs(error.mean() - 0.0728) < 3e-4
    assert abs((error / (np.abs(weight) + 1e-8)).mean() - 0.2033) < 2e-3


def test_double_quantisation_costs_a_hundredth_of_the_error():
    """Compares with float32 scales, which blocks of a single row have."""
    weight = normal(256, 1024)
    scale = np.abs(weight.reshape(256, -1, 64)).max(-1, keepdims=True)
    book = np.array(NF4, np.float32)
    exact = book[np.abs(weight.reshape(256, -1, 64, 1) / scale[..., None] - book).argmin(-1)] * scale
    plain, double = (np.abs(x.reshape(256, 1024) - weight).mean() for x in (exact, back(Quantization("nf4"), weight)))
    assert plain < double * 1.001 and double < plain * 1.01


@pytest.mark.parametrize("shape", [(3, 64), (5, 7), (2, 172), (4, 130), (2, 64 * 300)], ids=str)
@pytest.mark.parametrize("conv1d", [False, True])
def test_every_size(shape, conv1d):
    """The formats' error bounds hold for rows that end within a block or byte, and for several groups."""
    weight = normal(*shape, seed=1)
    int8 = back(Quantization("int8", -2 if conv1d else -1), weight)
    step = np.abs(weight).max(axis=0 if conv1d else 1, keepdims=True) / 127
    assert (np.abs(int8 - weight) <= step * 0.5001).all()
    padded = np.pad(weight, ((0, 0), (0, -shape[1] % 64)))
    largest = np.abs(padded.reshape(shape[0], -1, 64)).max(-1)
    # Half of the widest gap in the code book (1 - 0.696), plus the error of the scale: half a step of its group.
    spread = (largest.max(1) - largest.min(1)) / 254
    bound = np.repeat(largest * 0.152 + spread[:, None], 64, axis=1)[:, : shape[1]]
    assert (np.abs(back(Quantization("nf4", -2 if conv1d else -1), weight) - weight) <= bound * 1.001).all()


def test_extremes():
    """Zeros stay zeros; the largest weight of a block with an exact scale is unchanged."""
    zeros = np.zeros((4, 128), np.float32)
    for kind in KINDS:
        np.testing.assert_array_equal(back(Quantization(kind), zeros), zeros)
    weight = normal(4, 64)
    got = back(Quantization("nf4"), weight)
    at = np.abs(weight).argmax(1)
    np.testing.assert_allclose(np.abs(got[np.arange(4), at]), np.abs(weight).max(1), rtol=1e-6)


def test_bits():
    """A weight takes 4 bits, plus 8 in 64 for the scale, plus 64 in 64 x 256 for the group; rows of 14336 have 224 blocks."""
    bits = {kind: 8 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract(kind))) / 14336**2 for kind in KINDS}
    assert 4.12 < bits["nf4"] < 4.13 and 8 < bits["int8"] < 8.003


def abstract(kind):
    return Quantization(kind).abstract((14336, 14336))


# ---- in a model ----

CASES = [
    Case("llama", "llama", {"intermediate_size": 80}),
    Case("gpt2", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}),
    Case("gpt-neox", "gpt_neox", {"attention_bias": True}),
    Case("phi3", "phi3"),
    Case("gemma2", "gemma2", {"num_hidden_layers": 3, "head_dim": 8, "sliding_window": 8}),  # layers outside of a scan
    Case("qwen3", "qwen3", {"tie_word_embeddings": True}),
]
UNLIKE = [case for case in CASES if case.name in ("llama", "gpt2", "gemma2")]  # by how they store and stack their layers


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def of(case):
        if case.name not in made:
            made[case.name] = tmp_path_factory.mktemp(case.name)
            make_hf(case, made[case.name])
        return made[case.name]

    return of


@pytest.mark.parametrize(("case", "kind"), [
    (case, kind) for case in (CASES if ALL else UNLIKE) for kind in KINDS if ALL or kind == "nf4" or case.name == "llama"
], ids=str)  # fmt: skip
def test_logits_are_those_of_what_the_weights_stand_for(bases, case, kind):
    folder = bases(case)
    model, params = load(folder, quantised(kind))
    plain, exact = load(folder)
    ids = tokens(2, 20)
    stand = dense(params)
    held = {path for path, leaf in params.items() if isinstance(leaf, Int8 | Nf4)}
    linears = {path for path, spec in plain.specs.items() if len(spec.shape) == 3}
    assert held == linears, "every dense layer inside the blocks and nothing else"
    got = logits(model, params, ids)
    np.testing.assert_allclose(got, logits(plain, stand, ids), atol=2e-5, rtol=0)
    assert np.abs(got - logits(plain, exact, ids)).max() > 1e-3, "nothing was rounded, so nothing was tested"


def small_llama(kind, layers):
    facts = complete_config({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    }, "here")  # fmt: skip
    return lora_model(facts, kind)


@pytest.mark.parametrize(("kind", "remat"), [("nf4", "full"), *[("int8", "none"), ("nf4", "none"), ("int8", "full")] * ALL])
def test_no_full_copy_of_the_weights(kind, remat):
    """Twelve more layers need memory for activations and gradients only: less than a hundredth of their weights."""
    models = {layers: small_llama(kind, layers) for layers in (4, 16)}
    temp = {layers: compiled_step(model, remat, 8, jnp.float32).temp_size_in_bytes for layers, model in models.items()}
    weights = {n: sum(4 * s.size for s in model.frozen.values() if s.row.quantization) for n, model in models.items()}
    trained = {n: sum(4 * s.size for s in model.trainable.values()) for n, model in models.items()}
    more = temp[16] - temp[4] - 2 * (trained[16] - trained[4])  # gradients, and new parameters before the old ones are freed
    assert more < 0.1 * (weights[16] - weights[4])


def test_an_8b_step_fits():
    """Llama 3.1 8B with nf4 and LoRA on every layer has at most 6 GB of arguments."""
    facts = complete_config({
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }, "here")  # fmt: skip
    model = lora_model(facts, "nf4")
    assert sum(spec.size for spec in model.frozen.values()) == 8_030_261_248
    memory = compiled_step(model, "full", 32, jnp.bfloat16)
    assert memory.argument_size_in_bytes < 6e9
    # The output layer in float32, as the CPU multiplies bfloat16, and none of the blocks' 28 GB.
    assert memory.temp_size_in_bytes < 3.5e9


WIDE = Case("wide", "llama", {"intermediate_size": 96, "hidden_size": 64, "tie_word_embeddings": True})
RUNS = [(CASES[1], "nf4", None), (WIDE, "nf4", {"fsdp": 4, "tensor": 2})]  # mesh; None is one device
MORE = [(CASES[0], "nf4", None), (CASES[0], "int8", None), (CASES[1], "int8", None), (WIDE, "int8", {"fsdp": 4, "tensor": 2})]


@pytest.mark.parametrize(("case", "kind", "mesh"), [*RUNS, *MORE * ALL], ids=str)
def test_training_is_that_of_what_the_weights_stand_for(bases, case, kind, mesh):
    """Gradients pass through dequantisation: losses, norms and adapters agree after three steps, on any devices."""
    batches = [make_batch(8, 16, 96, seed) for seed in range(3)]
    config = make_config(bases(case), optimizer={"adam_epsilon": 1e-3})
    plain = prepare(config, ONE)
    held = one = prepare(with_model(config, quantization=kind, remat="full"), ONE)
    plain.frozen, plain.params = dense(one.frozen), one.params
    if mesh:
        held = prepare(with_model(make_config(bases(case), optimizer={"adam_epsilon": 1e-3}, mesh=mesh), quantization=kind))
        assert len(jax.tree.leaves(held.frozen)[0].sharding.device_set) == 8
        codes = held.frozen["model.layers.block.mlp.up_proj.base.weight"]
        big = codes.values if kind == "int8" else codes.codes
        assert big.addressable_shards[0].data.size == big.size // 8, "it lies in eight parts"
        for a, b in zip(jax.tree.leaves(one.frozen), jax.tree.leaves(held.frozen), strict=True):
            np.testing.assert_array_equal(a, b)
    results = []
    for setup in (held, plain):
        metrics, params = run_steps(dataclasses.replace(setup, params=jax.tree.map(jnp.copy, setup.params)), batches)
        results.append(([float(v) for m in metrics for v in (m.loss, m.grad_norm)], params))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=2e-5)
    for path, value in results[0][1].items():
        np.testing.assert_allclose(value, results[1][1][path], atol=2e-5, err_msg=path)


def test_one_layer_is_read_at_a_time(bases, monkeypatch):
    """The host never holds more than one layer's matrix in full precision."""
    sizes = sizes_read(monkeypatch)
    model, _ = load(bases(CASES[0]), quantised("nf4"))
    held = [spec for spec in model.specs.values() if spec.row.quantization]
    assert sorted(sizes) == sorted(spec.size // 2 for spec in held for _ in range(2))


# ---- in a run ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_hf(Case("llama", "llama", {"initializer_range": 0.05}), folder)
    save_tokenizer(folder)
    words = [("abcdef" * 2)[i % 6 : i % 6 + 5] for i in range(40)]
    rows = [json.dumps({"prompt": word, "completion": word[::-1]}) for word in words]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def run_config(folder, out, **training):
    return Config.model_validate({
        "model": {"path": str(folder), "dtype": "float32", "compute_dtype": "float32", "quantization": "nf4"},
        "method": {"name": "lora", "r": 4, "lora_alpha": 8},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 32},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"max_steps": 4, "global_batch_size": 2, "save_steps": 2, "logging_steps": 1, "report_to": [], **training},
        "mesh": {"fsdp": 1}, "output_dir": str(out),
    })  # fmt: skip


def test_a_run_is_resumed_and_merged(tiny, tmp_path, capsys):
    """Checkpoints hold the adapter only; the merged model has the base's own weights, not rounded ones."""
    from ftjax.generate.session import Generator
    from ftjax.hub.export import export

    train(run_config(tiny, tmp_path / "whole"), devices=ONE)
    stored = (tmp_path / "whole" / "checkpoints" / "4" / "state" / "_METADATA").read_text()
    assert "lora_A" in stored and "base" not in stored
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")  # as if it had ended after its first checkpoint
    for after in ("checkpoints/4", "final"):
        shutil.rmtree(tmp_path / "cut" / after)
    train(run_config(tiny, tmp_path / "cut"), devices=ONE)
    assert "resuming from step 2" in capsys.readouterr().out
    adapters = [load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("whole", "cut")]
    for name, value in adapters[0].items():
        np.testing.assert_array_equal(value, adapters[1][name], err_msg=name)

    export(tmp_path / "whole", tmp_path / "merged", merge=True)
    source, merged = load_file(tiny / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    for name, value in source.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapters[0]:
            value = value + 2 * adapters[0][f"{key}.lora_B.weight"] @ adapters[0][f"{key}.lora_A.weight"]
        np.testing.assert_allclose(merged[name], value, atol=1e-6, err_msg=name)

    generator = Generator(str(tiny), tmp_path / "whole" / "final", dtype="float32", quantization="nf4")
    assert any(isinstance(leaf, Nf4) for leaf in generator.params.values())
    assert any(path.endswith("lora_A") for path in generator.params), "the adapter stays beside rounded weights"


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.sweep)])
def test_lora_learns_on_a_quantised_base(stories, kind):
    """A real model: forty updates lower the loss by over 4; in the sweep, as far as on the float32 base within 0.1 (int8) or
    0.6 (nf4)."""
    batches = [make_batch(4, 32, 512, seed) for seed in (0, 1)] * 20
    final = {}
    for held in (kind, None) if ALL else (kind,):
        config = with_model(make_config(stories, optimizer={"learning_rate": 2e-3}), quantization=held)
        losses = [float(m.loss) for m in run_steps(prepare(config, ONE), batches)[0]]
        assert losses[-1] < losses[0] - 4
        final[held] = losses[-1]
    assert not ALL or abs(final[kind] - final[None]) < {"int8": 0.1, "nf4": 0.6}[kind]


# ---- what is refused ----


def test_full_training_is_refused(tiny, tmp_path):
    from ftjax.config.load import load_config

    path = tmp_path / "c.yaml"
    path.write_text("model: {path: x, quantization: nf4}\nmethod: {name: full}\ndata: {train: y.jsonl}\n")
    with pytest.raises(UserError, match=r"model\.quantization: nf4 .* method full"):
        load_config(path)


def test_an_unknown_format_is_refused(tiny):
    from ftjax.generate.session import Generator

    with pytest.raises(UserError, match=r"fp4.*int8, nf4"):
        Generator(str(tiny), quantization="fp4")


def test_what_trains_is_not_quantised(bases):
    """modules_to_save train in float32 next to the adapter."""
    model, _ = load(bases(CASES[0]), quantised("nf4", LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"])))
    kinds = {path: spec.row.quantization for path, spec in model.specs.items()}
    assert kinds["model.layers.block.mlp.down_proj.weight"] is None
    assert kinds["model.layers.block.self_attn.q_proj.base.weight"].kind == "nf4"
    assert kinds["lm_head.weight"] is None and tree.split(model.trainable, lambda p: "down_proj" in p)[0]
