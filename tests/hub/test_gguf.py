"""Tests GGUF files read as Hugging Face checkpoints: configuration and tensors against transformers' own loader."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from gguf_writing import demo_model, gguf_name, hub_folder, permuted, random_blocks, sentencepiece_keys, write_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.gguf.dequant import GGML_BLOCK, dequantize
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from ftjax.errors import UserError
from ftjax.hub.gguf import file as gguf_file
from ftjax.hub.gguf.config import read_config
from ftjax.hub.gguf.file import QUANTISED, open_gguf
from ftjax.hub.gguf.model import GGUFSource

TINY = {
    "num_hidden_layers": 2, "max_position_embeddings": 128, "hidden_size": 32, "intermediate_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "vocab_size": 48,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def tiny(**values) -> tuple[dict, dict[str, np.ndarray]]:
    """Return `(config.json, tensors)` of a random Llama of transformers."""
    config = LlamaConfig(**{"tie_word_embeddings": False, "attention_bias": False, **TINY, **values})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return config.to_dict(), tensors


def transformers_tensors(path) -> dict[str, np.ndarray]:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


@pytest.fixture
def llama_gguf(llama, tmp_path):
    config, tensors = hub_folder(llama)
    ids = {"bos": 1, "eos": 2, "padding": 0, "unknown": 0}
    vocabulary = sentencepiece_keys(llama / "tokenizer.model", **ids)
    return write_llama(tmp_path / "model.gguf", config, tensors, tokenizer=vocabulary)


def test_a_model_comes_back_as_it_was(llama, llama_gguf):
    config, tensors = hub_folder(llama)
    found = read_config(llama_gguf)
    assert found == {key: config[key] for key in found}
    left = {key: value for key, value in config.items() if key not in found and value != LlamaConfig().to_dict().get(key)}
    assert not left.keys() - {"transformers_version"}
    source = GGUFSource(llama_gguf)
    assert sorted(source.keys()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert source.shape(name) == tensor.shape and source.dtype(name) == tensor.dtype == np.float32
        assert source.read(name).tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight",
                                  "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"])  # fmt: skip
def test_a_part_is_the_part_of_the_whole(llama, llama_gguf, name):
    tensor = hub_folder(llama)[1][name]
    source = GGUFSource(llama_gguf)
    rows, columns = tensor.shape
    for index in [(slice(3, 11),), (slice(rows - 5, rows), slice(0, 7)), (slice(None), slice(columns // 2, columns)), ()]:
        part = source.read(name, index)
        assert part.flags.c_contiguous and np.array_equal(part, tensor[index])


def test_rows_are_dequantised_group_by_group(tmp_path, monkeypatch):
    config, tensors = tiny()
    name = "model.embed_tokens.weight"
    raw = gguf.quantize(tensors[name], GGMLType.Q8_0)
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    source = GGUFSource(write_llama(tmp_path / "groups.gguf", config, rest, stored={name: (raw, GGMLType.Q8_0)}))
    whole = source.read(name)
    monkeypatch.setattr(gguf_file, "GROUP", 5 * 32)  # five rows of 48
    np.testing.assert_array_equal(source.read(name), whole)
    np.testing.assert_array_equal(source.read(name, (slice(3, 17),)), whole[3:17])


def test_one_dimension(llama, llama_gguf):
    tensor = hub_folder(llama)[1]["model.norm.weight"]
    assert np.array_equal(GGUFSource(llama_gguf).read("model.norm.weight", (slice(2, 9),)), tensor[2:9])


def test_transformers_reads_the_same_tensors(llama_gguf):
    source = GGUFSource(llama_gguf)
    theirs = transformers_tensors(llama_gguf)
    for name in source.keys():
        assert np.array_equal(source.read(name), theirs[name]), name


def test_every_kind_of_storage_in_one_model(tmp_path):
    """Each matrix is stored in another type; rows have 256 numbers so that K-quants fit."""
    config, tensors = tiny(hidden_size=256, intermediate_size=256, head_dim=64, num_key_value_heads=4)
    rng = np.random.default_rng(0)
    kinds = ["Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "F16", "BF16", "Q5_K", "Q2_K", "Q3_K", "Q5_0", "Q5_1", "F32"]
    stored = {}
    for number, name in enumerate([name for name, tensor in tensors.items() if tensor.ndim == 2]):
        kind = GGMLType[kinds[number % len(kinds)]]
        if kind in (GGMLType.F16, GGMLType.BF16, GGMLType.F32):
            data = gguf.quantize(tensors[name], kind)
        else:
            data = random_blocks(tensors[name].shape, kind, rng)
        stored[name] = (data, kind)
    plain = {name: tensor for name, tensor in tensors.items() if name not in stored}
    path = write_llama(tmp_path / "mixed.gguf", config, plain, stored=stored)
    source = GGUFSource(path)
    theirs = transformers_tensors(path)
    assert {source.dtype(name).name for name in source.keys()} == {"float32", "float16", "bfloat16"}
    for name in source.keys():
        mine = source.read(name)
        assert mine.dtype == source.dtype(name)
        assert np.isfinite(mine.astype(np.float32)).all()
        np.testing.assert_array_equal(mine.astype(np.float32), theirs[name], err_msg=f"{name} {stored.get(name, (0, 0))[1]}")


@pytest.mark.parametrize("kind", sorted(QUANTISED, key=lambda kind: kind.name), ids=lambda kind: kind.name)
def test_blocks_against_gguf_and_torch(tmp_path, kind):
    """Compares with the gguf package, and with transformers' independent dequantiser for the types it has."""
    config, tensors = tiny(hidden_size=256)
    name = "model.layers.1.self_attn.q_proj.weight"
    raw = random_blocks(tensors[name].shape, kind, np.random.default_rng(1))
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    path = write_llama(tmp_path / "one.gguf", config, rest, stored={name: (raw, kind)})
    whole = gguf.dequantize(raw, kind)
    source = GGUFSource(path)
    np.testing.assert_array_equal(source.read(name), whole)
    np.testing.assert_array_equal(source.read(name, (slice(5, 21), slice(3, 40))), whole[5:21, 3:40])
    if kind.value in GGML_BLOCK:
        theirs = dequantize(torch.from_numpy(raw), kind.value).reshape(whole.shape).numpy()
        np.testing.assert_allclose(whole, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_near_what_they_were(tmp_path, kind):
    config, tensors = tiny()
    name = "model.layers.0.self_attn.k_proj.weight"
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    stored = {name: (gguf.quantize(tensors[name], GGMLType[kind]), GGMLType[kind])}
    path = write_llama(tmp_path / "one.gguf", config, rest, stored=stored)
    error = np.abs(GGUFSource(path).read(name) - tensors[name]).max()
    assert error < np.abs(tensors[name]).max() * {"Q8_0": 0.01, "Q5_0": 0.1, "Q5_1": 0.1}.get(kind, 0.2)


def test_biases_are_found_and_put_in_order(tmp_path):
    config, tensors = tiny(attention_bias=True, mlp_bias=True)
    path = write_llama(tmp_path / "bias.gguf", config, tensors)
    found, source = read_config(path), GGUFSource(path)
    assert found["attention_bias"] and found["mlp_bias"]
    for name, tensor in tensors.items():
        assert np.array_equal(source.read(name), tensor), name
    del tensors["model.layers.1.self_attn.v_proj.bias"]
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.bias but not blk\.1\.attn_v\.bias"):
        read_config(write_llama(tmp_path / "some.gguf", config, tensors))


def test_untied_and_wide_heads(tmp_path):
    config, tensors = tiny(head_dim=16)
    settings = {"llama.attention.key_length": 16, "llama.attention.value_length": 16}
    path = write_llama(tmp_path / "wide.gguf", config, tensors, settings=settings)
    found = read_config(path)
    assert found["head_dim"] == 16 and found["tie_word_embeddings"] is False
    assert np.array_equal(GGUFSource(path).read("lm_head.weight"), tensors["lm_head.weight"])
    assert np.array_equal(GGUFSource(path).read("model.layers.0.self_attn.q_proj.weight"),
                          tensors["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_of_an_unquantised_file(tmp_path, dtype):
    config, tensors = tiny()
    kind = {"float16": GGMLType.F16, "bfloat16": GGMLType.BF16}[dtype]
    stored = {name: (gguf.quantize(t, kind), kind) for name, t in tensors.items() if t.ndim == 2}
    rest = {name: tensor for name, tensor in tensors.items() if name not in stored}
    assert read_config(write_llama(tmp_path / "half.gguf", config, rest, stored=stored))["dtype"] == dtype


def test_all_ids_that_end_a_turn(tmp_path):
    config, tensors = tiny()
    ids = {f"tokenizer.ggml.{name}_token_id": value for name, value in (("bos", 1), ("eos", 2), ("eot", 7), ("eom", 9))}
    found = read_config(write_llama(tmp_path / "ids.gguf", config, tensors, settings=ids))
    assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (1, [2, 7, 9], None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"llama.expert_shared_count": 8}, "expert_shared_count = 8"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window = 4096"),
        ({"llama.attention.head_count": [4, 8]}, "differs from layer to layer"),
        ({"llama.attention.value_length": 4}, "keys and values of different sizes"),
        ({"llama.block_count": None}, r"lacks llama\.block_count"),
        ({"split.count": 3}, "llama-gguf-split --merge"),
        ({"llama.rope.dimension_count": 4}, "RoPE on 4 of a head's 8"),
        ({"llama.rope.scaling.type": "ntk", "llama.rope.scaling.factor": 2.0}, "'ntk'"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "without both tables"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "original context length"),
        ({"llama.rope.scaling.alpha": 2.0}, r"scaling\.alpha"),
    ],
)
def test_what_a_llama_cannot_express_is_refused(tmp_path, settings, said):
    config, tensors = tiny()
    path = write_llama(tmp_path / "odd.gguf", config, tensors, settings=settings)
    with pytest.raises(UserError, match=said) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_another_architecture_is_refused(tmp_path):
    config, tensors = tiny()
    with pytest.raises(UserError, match=r"odd\.gguf: a GGUF file of architecture 'bloom'; ftjax reads .* gemma, .* llama, "):
        read_config(write_llama(tmp_path / "odd.gguf", config, tensors, architecture="bloom"))


def test_settings_that_mean_nothing_are_taken(tmp_path):
    config, tensors = tiny()
    path = write_llama(
        tmp_path / "more.gguf", config, tensors,
        settings={"llama.expert_count": 0, "llama.expert_used_count": 0, "llama.attention.head_count_kv": [2, 2]},
    )  # fmt: skip
    assert read_config(path)["num_key_value_heads"] == 2
    assert GGUFSource(path).read("model.layers.0.self_attn.k_proj.weight").shape == (16, 32)


def test_tensors_that_no_llama_has_are_refused(tmp_path):
    config, tensors = tiny()
    path = write_llama(
        tmp_path / "moe.gguf", config, tensors, extra={"blk.0.ffn_gate_inp.weight": np.ones((8, 32), np.float32)}
    )
    with pytest.raises(UserError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        GGUFSource(path)


def test_unknown_storage_is_refused_with_the_list(tmp_path):
    config, tensors = tiny(hidden_size=256)
    name = "model.layers.0.mlp.up_proj.weight"
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    raw = np.zeros((64, 292), np.uint8)
    path = write_llama(tmp_path / "q8k.gguf", config, rest, stored={name: (raw, GGMLType.Q8_K)})
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight: stored as Q8_K.*BF16, F16, F32,.*Q4_K.*Q8_0"):
        open_gguf(path)
    mark = gguf_name(name).encode() + np.array([2], "<u4").tobytes() + np.array([256, 64], "<u8").tobytes()
    data = bytearray(path.read_bytes())
    start = data.index(mark) + len(mark)
    data[start : start + 4] = np.array([999], "<u4").tobytes()
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"stored as type number 999.*Q6_K"):
        open_gguf(path)


def test_truncated_at_any_point(llama_gguf, tmp_path):
    data = llama_gguf.read_bytes()
    header = len(data) - sum(tensor.rows.nbytes for tensor in open_gguf(llama_gguf).tensors.values())
    cuts = [5, 12, 30, *range(100, header, header // 25), header, (header + len(data)) // 2, len(data) - 100]
    for cut in cuts:
        path = tmp_path / f"cut{cut}.gguf"
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=f"cut{cut}.gguf: truncated or damaged GGUF file of {cut:,} bytes"):
            GGUFSource(path)
        path.unlink()


def test_what_is_no_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(UserError, match="No such file"):
        open_gguf(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="of 0 bytes"):
        open_gguf(path)
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(UserError, match="not a GGUF file"):
        open_gguf(path)


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    config, tensors = tiny()
    path = write_llama(tmp_path / "model.gguf", config, tensors)
    assert read_config(path)["max_position_embeddings"] == 128
    config["max_position_embeddings"] = 256
    path.unlink()
    write_llama(path, config, tensors)
    assert read_config(path)["max_position_embeddings"] == 256


def test_smollm2_is_what_transformers_reads():
    """Reads a file of llama.cpp's converter and quantiser like transformers: values and order of rows."""
    path = demo_model()
    source = GGUFSource(path)
    config = read_config(path)
    assert (config["vocab_size"], config["hidden_size"], config["num_key_value_heads"]) == (49152, 576, 3)
    assert config["rms_norm_eps"] == 1e-05 and config["rope_parameters"]["rope_theta"] == 100000.0
    assert len(source.keys()) == 2 + 9 * config["num_hidden_layers"]
    undo = LlamaTensorProcessor(config=config)
    stored = open_gguf(path).tensors
    for name in source.keys():
        if ".layers.17." in name or ".layers." not in name:
            tensor = stored[gguf_name(name)]
            theirs = np.array(tensor.rows)
            if tensor.type in QUANTISED:
                theirs = dequantize(torch.from_numpy(theirs), tensor.type.value).reshape(tensor.shape).numpy()
            theirs = undo.process(theirs, gguf_name(name)).weights
            np.testing.assert_allclose(source.read(name), theirs, rtol=1e-6, atol=1e-8, err_msg=name)


def test_the_writer_permutes(untrained, tmp_path):
    """The tests above could not fail if writer and reader both left the rows alone."""
    tensor = hub_folder(untrained)[1]["model.layers.0.self_attn.q_proj.weight"]
    assert not np.array_equal(permuted(tensor, 8), tensor)
    assert np.array_equal(permuted(tensor, 8)[:2], tensor[[0, 4]])  # llama.cpp pairs dimensions 0 and 4 of 8
