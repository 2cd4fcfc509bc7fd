"""Tests GGUF files that ftjax writes: read back they are the model they were written from, in every family."""

import json

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from gguf_cases import WRITTEN, make_base
from oracle import Case, adapted, hf_config, load, logits, tokens
from safetensors.numpy import load_file, save_file
from verbs import ftjax

from ftjax.config import LoraConfig, MeshConfig
from ftjax.errors import UserError
from ftjax.hub.adapter.file import Renamed
from ftjax.hub.export_gguf import export_gguf
from ftjax.hub.gguf.families import FAMILIES
from ftjax.hub.gguf.file import open_gguf
from ftjax.hub.gguf.layout import interleaved_rows
from ftjax.hub.gguf.model import GGUFSource
from ftjax.hub.gguf.settings import gguf_settings
from ftjax.hub.load import open_model
from ftjax.hub.model_folder import from_params, model_tensors
from ftjax.mesh import make_mesh
from ftjax.models.composite import text_of
from ftjax.models.facts import complete_config
from ftjax.models.model import Model, build_module
from ftjax.models.registry import FAMILIES as MODELS

# Heads so small that two numbers of Llama 3's RoPE cannot be told from the factors that they give.
NO_WAY_BACK = {
    "llama3.1",
    "granite-tied-biases",
    "mistral-no-window",
    "mixtral-window",
    "bamba-tied-biases",
    "granitemoe-tied-biases",
}
# Weights that a file holds multiplied.
MULTIPLIED = {"falcon-h1", "falcon-h1-norm-first"}
# Tied outputs that llama.cpp wants written twice.
TWICE = {
    "gpt-oss-plain": "lm_head",
    "gpt-neox-serial": "embed_out",
    "olmo2-tied": "lm_head",
    "olmo3-other-layers": "lm_head",
    "olmoe-tied": "lm_head",
}
FIELDS = {"hidden_size", "num_attention_heads", "rms_norm_eps", "layer_types", "hidden_act", "hidden_activation", "n_inner"}


def written(name: str, folder, asked: str = "f32"):
    base, file = make_base(WRITTEN[name], folder / "base"), folder / "model.gguf"
    export_gguf(str(base), file, asked=asked)
    return base, file


@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in NO_WAY_BACK | MULTIPLIED])
def test_a_model_comes_back_as_it_was(name, tmp_path):
    """All tensors bit for bit, or where one was computed to within its rounding; the same settings and RoPE."""
    base, file = written(name, tmp_path)
    config, source = open_model(base)
    found, back = open_model(file)
    composite = MODELS[config["model_type"]].composite  # of which the file has the text model
    own = [name for name in source.keys() if composite is None or not name.startswith(composite.carried)]
    source = Renamed(source, {name.replace("model.language_model.", "model.", 1): name for name in own})
    assert set(back.keys()) - set(source.keys()) == ({f"{TWICE[name]}.weight"} if name in TWICE else set())
    assert set(source.keys()) <= set(back.keys())
    shifted = config["model_type"].startswith(("gemma", "qwen3_5", "qwen3_next"))
    for one in source.keys():
        tensor, again = source.read(one), back.read(one)
        assert back.shape(one) == tensor.shape and again.dtype == np.float32
        if shifted and one.endswith("norm.weight"):
            np.testing.assert_allclose(again, tensor, rtol=0, atol=2.0**-22)
        elif one.endswith(".A_log"):  # the file has its exponential
            np.testing.assert_allclose(again, tensor, rtol=1e-6, atol=1e-6)
        else:
            assert again.tobytes() == tensor.tobytes(), one
        if tensor.ndim > 1:
            assert np.array_equal(back.read(one, (slice(1, 3), slice(0, 5))), tensor[1:3, :5])
    text = text_of(config)
    for field in FIELDS & text.keys() & found.keys():
        if (config["model_type"], field) not in {("ministral", "layer_types")}:
            assert found[field] == text[field], field
    if name == "gpt-oss":  # its files stand for the published models, whose YaRN is not rounded
        found["rope_parameters"].pop("truncate")
    ours, theirs = (build_module(one) for one in (config, found))
    assert [rope.inv_freq for rope in ours.ropes] == [rope.inv_freq for rope in theirs.ropes]
    for mine, its in zip(ours.ropes, theirs.ropes, strict=True):
        assert its.scaling == pytest.approx(mine.scaling, rel=1e-6) and its.long_inv_freq == mine.long_inv_freq


@pytest.mark.parametrize("name", sorted(MULTIPLIED))
def test_multipliers_come_back_in_the_weights(name, tmp_path):
    """A file of Falcon-H1 has no multipliers; the model that is read from it gives the same logits without them."""
    base, file = written(name, tmp_path)
    config, found = open_model(base)[0], open_model(file)[0]
    assert config["embedding_multiplier"] != 1 and found["embedding_multiplier"] == found["lm_head_multiplier"] == 1
    ids = tokens(1, 9)
    np.testing.assert_allclose(logits(*load(file), ids), logits(*load(base), ids), atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "gpt2", "gpt-neox", "bamba", "granitemoehybrid", "nemotron-h", "lfm2"])
def test_a_model_is_loaded_from_its_file(name, tmp_path):
    """The same arrays reach the devices, in shards too, where tensors are stacked, cut or turned."""
    base, file = written(name, tmp_path)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2), jax.devices()[:2])
    (_, want), (_, found) = load(base, mesh=mesh), load(file, mesh=mesh)
    assert want.keys() == found.keys()
    for path, value in want.items():
        assert found[path].sharding == value.sharding, path
        if path.endswith("A_log"):
            np.testing.assert_allclose(found[path], value, rtol=1e-6, atol=1e-6)
        else:
            assert np.array_equal(found[path], value), path


def test_tensors_are_not_as_they_were(tmp_path):
    """The test above could not fail if nothing were changed on the way."""
    base, file = written("llama", tmp_path)
    name, stored = "model.layers.0.self_attn.q_proj.weight", open_gguf(file)
    own = open_model(base)[1].read(name)
    assert not np.array_equal(stored.read_rows("blk.0.attn_q.weight", slice(None)), own)
    assert np.array_equal(stored.read_rows("blk.0.attn_q.weight", np.array([1])), own[[4]])  # 8 dimensions: 0 is paired with 4


@pytest.mark.parametrize("asked", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_types(name, asked, tmp_path):
    """Matrices are what the gguf package makes of them; rows that are no whole blocks stay in float16, vectors in float32."""
    _, exact = written(name, tmp_path / "exact")
    _, file = written(name, tmp_path / "small", asked)
    exact, file = open_gguf(exact), open_gguf(file)
    kind = GGMLType[asked.upper()]
    assert set(exact.tensors) == set(file.tensors)
    for one, tensor in file.tensors.items():
        whole = exact.read_rows(one, slice(None))
        if whole.ndim == 1 or "ffn_gate_inp" in one:
            want = GGMLType.F32
        elif whole.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            want = GGMLType.F16
        else:
            want = GGMLType.Q8_0 if kind == GGMLType.Q4_0 and one in ("token_embd.weight", "output.weight") else kind
        assert tensor.type == want, one
        assert np.array_equal(file.read_rows(one, slice(None)), gguf.dequantize(gguf.quantize(whole, want), want)), one
    assert {tensor.type for tensor in file.tensors.values()} >= {kind, GGMLType.F32}
    assert file.metadata["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{asked.upper()}"]


def test_settings(tmp_path):
    _, file = written("qwen3-moe", tmp_path)
    told = open_gguf(file).metadata
    want = {
        "block_count": 3, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.key_length": 12, "attention.value_length": 12, "expert_count": 6,
        "expert_used_count": 3, "expert_feed_forward_length": 24, "rope.dimension_count": 12, "vocab_size": 304,
    }  # fmt: skip
    assert {key: told[f"qwen3moe.{key}"] for key in want} == want
    assert told["general.architecture"] == "qwen3moe" and told["general.type"] == "model" and told["general.name"] == "model"
    assert told["qwen3moe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert told["tokenizer.ggml.model"] == "gpt2" and told["tokenizer.ggml.pre"] == "gpt-2"
    assert len(told["tokenizer.ggml.tokens"]) == 304


def test_windows(tmp_path):
    """Layers are named where llama.cpp has windows; elsewhere the longest text is the window, with a note."""
    _, file = written("gemma3", tmp_path / "a")
    told = open_gguf(file).metadata
    assert told["gemma3.attention.sliding_window"] == 8
    assert told["gemma3.attention.sliding_window_pattern"] == [True, True, False, True]
    _, file = written("mistral", tmp_path / "b")
    assert open_gguf(file).metadata["llama.context_length"] == 48


def settings_of(model_type: str, **values):
    config = complete_config(hf_config(Case("x", model_type, values)).to_dict(), "x")
    notes = []
    made = gguf_settings(config, Model.of(build_module(config), config).sizes, notes.append)
    return made, notes


def test_phi3_says_that_it_has_no_window():
    assert settings_of("phi3", sliding_window=None)[0][0]["attention.sliding_window"] == 0
    assert settings_of("phi3", sliding_window=16)[0][0]["attention.sliding_window"] == 16


def test_yarn_of_gpt_oss_is_noted():
    """llama.cpp rounds the bounds of its YaRN."""
    yarn = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}
    values = {"head_dim": 8, "num_local_experts": 4, "attention_bias": True, "rope_parameters": yarn}
    (keys, _), notes = settings_of("gpt_oss", **values)
    assert keys["rope.scaling.type"] == "yarn" and "rounds the bounds" in notes[0]


def test_a_shorter_window_is_said():
    (keys, _), notes = settings_of("mistral", sliding_window=16)
    assert keys["context_length"] == 16 and "no sliding windows" in notes[0] and "16 tokens" in notes[0]
    (keys, _), notes = settings_of("mistral", sliding_window=None)
    assert keys["context_length"] == 64 and not notes


@pytest.mark.parametrize(
    ("model_type", "values", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu', but llama.cpp computes .* 'silu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE is of type dynamic"),
        ("qwen2", {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False,
        }}, "yarn with truncate = false"),
        ("qwen2", {"head_dim": 12}, r"head_dim = 12, but llama.cpp computes .* 8 \(hidden_size"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True"),
        ("qwen3_moe", {"num_experts": 4, "norm_topk_prob": False}, "norm_topk_prob = False"),
        ("qwen3_moe", {"num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": None},
         r"attn_logit_softcapping = None, .* 50\.0 where a file does not say"),
        ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 20}, "query_pre_attn_scalar = 20"),
        ("smollm3", {"no_rope_layers": [0, 1]}, "no_rope_layers"),
        ("gpt_oss", {"head_dim": 8, "num_local_experts": 4, "swiglu_limit": 0.7}, r"swiglu_limit = 0\.7"),
        ("granitemoehybrid", {"hidden_size": 32, "mamba_n_heads": 4, "mamba_conv_bias": False}, "mamba_conv_bias = False"),
        ("bamba", {"mamba_n_heads": 4, "time_step_limit": [0.1, 0.5]}, r"time_step_limit = \[0\.1, 0\.5\]"),
        ("nemotron_h", {"hybrid_override_pattern": "ME-*", "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1},
         "layers_block_type"),
        ("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_rms_norm": True, "mamba_norm_before_gate": True},
         "mamba_norm_before_gate = True"),
        ("lfm2_moe", {"layer_types": ["conv", "full_attention"], "routed_scaling_factor": 1.5},
         r"routed_scaling_factor = 1\.5"),
        ("qwen3_5_text", {"linear_value_head_dim": 8, "linear_key_head_dim": 4}, "linear_value_head_dim = 8"),
        ("olmo_hybrid", {}, "cannot be written as GGUF: llama.cpp has no such architecture. Export a folder"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias = False"),
        ("olmo3", {"rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        }}, "one rope_theta for all layers"),
    ],
)  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(model_type, values, said):
    with pytest.raises(UserError, match=said):
        settings_of(model_type, **values)


def test_every_family_that_is_written_is_one_that_is_trained():
    assert set(FAMILIES) <= set(MODELS) | {family.module for family in MODELS.values()}


@pytest.fixture
def adapter(tmp_path):
    """Return `(a base model, an adapter for it, the merged weights by Hugging Face name)`."""
    base = make_base(WRITTEN["llama"], tmp_path / "base")
    settings = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2})
    model, params = adapted(base, tmp_path / "adapter", settings)
    merged = {tensor.name: tensor.data() for tensor in model_tensors(model, from_params(params), params, settings, np.float32)}
    return base, tmp_path / "adapter", merged


def test_an_adapter_is_merged(adapter, tmp_path, capsys):
    """The command line writes the merged weights, with the base that is given or that the adapter names."""
    base, folder, merged = adapter
    assert ftjax("export", str(folder), "--gguf", "f32", "--out", str(tmp_path / "named.gguf")) == 0
    assert ftjax("export", str(base), "--adapter", str(folder), "--gguf", "f32", "--out", str(tmp_path / "given.gguf")) == 0
    said = capsys.readouterr().out
    assert "wrote a whole model (f32)" in said and f"ollama create named -f {tmp_path / 'named.Modelfile'}" in said
    for file in (tmp_path / "named.gguf", tmp_path / "given.gguf"):
        source = GGUFSource(file)
        for name, tensor in merged.items():
            assert np.array_equal(source.read(name), tensor), name
    assert not np.array_equal(open_model(base)[1].read("model.layers.1.mlp.down_proj.weight"), tensor)


def test_an_adapter_alone(adapter, tmp_path):
    """Its product is the change of each weight, as the file has it; `--gguf` may stand without a type."""
    base, folder, merged = adapter
    for name, more in (("f32", ("--gguf",)), ("f16", ("--gguf", "f16"))):
        assert ftjax("export", str(folder), *more, "--lora", "--out", str(tmp_path / f"{name}.gguf")) == 0
    file, half = open_gguf(tmp_path / "f32.gguf"), open_gguf(tmp_path / "f16.gguf")
    told = file.metadata
    assert (told["general.type"], told["adapter.type"], told["adapter.lora.alpha"]) == ("adapter", "lora", 4.0)
    assert len(file.tensors) == 2 * 2 * 2 and {tensor.type for tensor in half.tensors.values()} == {GGMLType.F16}
    stored, own = open_model(base)[1], interleaved_rows(4)
    for layer in range(2):
        for gguf_name, name in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj")):
            a, b = (file.read_rows(f"blk.{layer}.{gguf_name}.weight.lora_{end}", slice(None)) for end in "ab")
            assert len(a) == 4
            change = merged[f"model.layers.{layer}.{name}.weight"] - stored.read(f"model.layers.{layer}.{name}.weight")
            want = own.stored(change) if gguf_name == "attn_q" else change
            np.testing.assert_allclose(b @ a, want, atol=1e-5)
    assert np.abs(want).max() > 0.01


def test_adapters_that_llama_cpp_does_not_read(adapter, tmp_path):
    _, folder, _ = adapter
    with pytest.raises(UserError, match="an adapter is written as f32, f16, bf16, not as q8_0"):
        export_gguf(str(folder), tmp_path / "x.gguf", asked="q8_0", lora=True)
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**saved, "use_dora": True}))
    with pytest.raises(UserError, match=r"llama\.cpp reads plain LoRA only, and this adapter has DoRA; ftjax export --merge"):
        export_gguf(str(folder), tmp_path / "x.gguf", asked=None, lora=True)


def test_flags(tmp_path, capsys):
    out = str(tmp_path / "x.gguf")
    assert ftjax("export", "base", "--lora", "--out", out) == 2
    assert "--lora belongs to --gguf" in capsys.readouterr().err
    assert ftjax("export", "base", "--gguf", "f16", "--portable", "--out", out) == 2
    assert "leave the other options out" in capsys.readouterr().err


def test_mistakes(tmp_path):
    base, file = written("llama", tmp_path)
    with pytest.raises(UserError, match="exists already"):
        export_gguf(str(base), file, asked="f16")
    with pytest.raises(UserError, match=r"--out NAME\.gguf"):
        export_gguf(str(base), tmp_path / "folder", asked="f16")
    with pytest.raises(UserError, match="q5_1: expected one of f32, f16, bf16, q8_0, q4_0"):
        export_gguf(str(base), tmp_path / "x.gguf", asked="q5_1")
    with pytest.raises(UserError, match="leave --lora out"):
        export_gguf(str(base), tmp_path / "x.gguf", asked="f16", lora=True)
    assert not list(tmp_path.glob("x*")) and not list(tmp_path.glob("*.partial"))
    (tmp_path / "own.Modelfile").write_text("PARAMETER temperature 0\n")
    with pytest.raises(UserError, match=r"own\.Modelfile exists already"):
        export_gguf(str(base), tmp_path / "own.gguf", asked="f16")
    assert not (tmp_path / "own.gguf").exists()


def test_values_beyond_float16_are_refused(tmp_path):
    base = make_base(WRITTEN["llama"], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight: 1 of .* beyond what float16 holds"):
        export_gguf(str(base), tmp_path / "model.gguf", asked="f16")
    assert not list(tmp_path.glob("model*"))
    export_gguf(str(base), tmp_path / "model.gguf", asked="bf16")
    found = GGUFSource(tmp_path / "model.gguf").read("model.layers.0.mlp.up_proj.weight")
    assert float(found[0, 0]) == pytest.approx(1e6, rel=0.01)
