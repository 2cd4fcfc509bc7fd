"""Tests checkpoint folders from elsewhere: damaged or hostile headers, indices, two models in one folder, quantised weights."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from oracle import Case, hf_logits, load, logits, make_hf, tokens
from safetensors.numpy import load_file, save_file

from ftjax.errors import UserError
from ftjax.hub.load import read_hf_config
from ftjax.hub.safetensors import SafetensorsFolder

INDEX = "model.safetensors.index.json"
WHOLE = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def entry(**changes):
    return {name: value for name, value in {**WHOLE, **changes}.items() if value != "left out"}


HEADERS = {
    "negative offset": {"a": entry(data_offsets=[-8, 8])},
    "overlap": {"a": entry(shape=[3], data_offsets=[0, 12]), "b": entry(shape=[2], data_offsets=[8, 16])},
    "hole": {"a": entry(shape=[2], data_offsets=[8, 16])},
    "negative shape": {"a": entry(shape=[-2, -2])},
    "shape of another size": {"a": entry(shape=[3])},
    "no shape": {"a": entry(shape="left out")},
    "no dtype": {"a": entry(dtype="left out")},
    "no offsets": {"a": entry(data_offsets="left out")},
    "one offset": {"a": entry(data_offsets=[0])},
    "dtype in a list": {"a": entry(dtype=["F32"])},
    "fractions": {"a": entry(shape=[4.0])},
    "entry in a list": {"a": [1, 2]},
    "list": [1, 2],
    "text": "F32",
    "overflow": {"a": entry(shape=[2**62, 4])},
    "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep lists": b"[" * 50_000 + b"]" * 50_000,
    "no UTF-8": b'{"\xff": 1}',
}


def write(path, header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name, tmp_path):
    write(tmp_path / "model.safetensors", {"a": WHOLE})
    assert SafetensorsFolder(tmp_path).keys() == ["a"]
    write(tmp_path / "model.safetensors", HEADERS[name])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    "file", ["../other/x.safetensors", "{}/x.safetensors", "..", ".", "", "a/x.safetensors", "..\\x", 3, None]
)
def test_an_index_stays_in_its_folder(file, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write(other / "x.safetensors", {"a": WHOLE})
    folder = tmp_path / "model"
    folder.mkdir()
    file = file.format(other) if isinstance(file, str) else file
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match=r"index\.json"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize("text", ["[]", "{", "3", '{"weight_map": ["a"]}', '{"weight_map": {}}', "[" * 50_000])
def test_what_is_no_index(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match="not a safetensors index"):
        SafetensorsFolder(tmp_path)


def both(folder, change=lambda tensors: tensors):
    """Write the same tensors as one file and as shards; `change` applies to the file."""
    first = {"a": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.ones(2, np.float32)}
    save_file({"a": first["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": first["b"]}, folder / "model-00002-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))
    save_file(change({name: value.copy() for name, value in first.items()}), folder / "model.safetensors")


CHANGES = {
    "last row": lambda t: {**t, "a": t["a"] + np.array([0, 0, 0, 1], np.float32)[:, None]},
    "fewer": lambda t: {"a": t["a"]},
    "more": lambda t: {**t, "c": t["b"]},
    "shape": lambda t: {**t, "b": np.ones(3, np.float32)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_two_models_in_one_folder(name, tmp_path):
    both(tmp_path, CHANGES[name])
    with pytest.raises(UserError, match=r"two models.*remove the one"):
        SafetensorsFolder(tmp_path)


def test_one_model_twice(tmp_path, capsys):
    """Two copies of a model in one folder are accepted, even if one was rounded."""
    both(tmp_path, lambda t: {**t, "a": t["a"].astype(ml_dtypes.bfloat16)})
    assert SafetensorsFolder(tmp_path).dtype("a") == ml_dtypes.bfloat16
    assert not capsys.readouterr().err


def test_an_index_whose_shards_are_gone(tmp_path, capsys):
    """The single file is the model, as in transformers."""
    both(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert SafetensorsFolder(tmp_path).read("a")[3, 2] == 11
    assert "model-00002-of-00002.safetensors, which is not there" in capsys.readouterr().err


def test_an_index_of_the_file_itself(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert SafetensorsFolder(tmp_path).keys() == ["a"]


@pytest.mark.parametrize(("kind", "table", "head"), [
    ("llama", "model.embed_tokens.weight", "lm_head.weight"),
    ("gpt2", "transformer.wte.weight", "lm_head.weight"),
    ("gpt_neox", "gpt_neox.embed_in.weight", "embed_out.weight"),
])  # fmt: skip
def test_a_tied_table_that_is_saved_as_the_output(kind, table, head, tmp_path):
    """transformers ties the embedding to the output; without the tie each needs its own tensor."""
    values = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64} if kind == "gpt2" else {}
    theirs = make_hf(Case(kind, kind, {**values, "tie_word_embeddings": True}), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({head: tensors.pop(table), **tensors}, file, metadata={"format": "pt"})
    ids = tokens(2, 12)
    np.testing.assert_allclose(logits(*load(tmp_path), ids), hf_logits(theirs, ids), atol=1e-4, rtol=0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": False}))
    with pytest.raises(UserError, match=f"1 missing: {table}"):
        load(tmp_path)


@pytest.fixture
def folder(tmp_path):
    make_hf(Case("llama", "llama"), tmp_path)
    return tmp_path


def change(folder, make):
    """Replace each projection by `make(name, value)`."""
    tensors = load_file(folder / "model.safetensors")
    changed = {}
    for name, value in tensors.items():
        changed |= make(name, value) if name.endswith("_proj.weight") else {name: value}
    save_file(changed, folder / "model.safetensors")


F8, BYTES = ml_dtypes.float8_e4m3fn, np.zeros((4, 4), np.uint8)
QUANTISED = {
    "int8": lambda name, value: {name: (value * 20).astype(np.int8)},
    "int32": lambda name, value: {name: (value * 20).astype(np.int32)},
    "float8": lambda name, value: {name: value.astype(F8)},
    "float8 with scales": lambda name, value: {name: value.astype(F8), f"{name}_scale_inv": np.ones((1, 1), np.float32)},
    "gptq": lambda name, value: {name.replace("weight", "qweight"): BYTES, name.replace("weight", "scales"): BYTES},
    "bitsandbytes": lambda name, value: {name: BYTES, f"{name}.absmax": BYTES},
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights(name, folder):
    change(folder, QUANTISED[name])
    with pytest.raises(UserError, match=r"weights are quantised.*use the original checkpoint.*model\.quantization"):
        load(folder)


@pytest.mark.parametrize("kind", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantised_by_its_configuration_alone(kind, folder):
    """A config.json that says so beside plain weights, as after dequantising by hand, does no harm."""
    path, (_, plain) = folder / "config.json", load(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": kind, "bits": 4}}))
    _, params = load(folder)
    assert all(np.array_equal(params[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("paligemma", {"model_type": "gemma"}, r"google/gemma-2b-it \(gemma\)"),
        ("llava", {"model_type": "mistral"}, "mistralai/Mistral-7B"),
        ("qwen2_5_vl", {"model_type": "qwen2_5_vl_text"}, "take a text model of these families"),
        ("llava", {}, "take a text model of these families"),
        ("llava", "x", "take a text model of these families"),
    ],
)
def test_models_whose_text_is_not_found(kind, text, says, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "text_config": text}))
    with pytest.raises(UserError, match=f"{kind}.*parts for images or sound.*other families.*{says}"):
        read_hf_config(tmp_path)
