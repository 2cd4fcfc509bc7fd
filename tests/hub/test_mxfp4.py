"""Tests MXFP4 checkpoints against transformers: dequantisation, and the logits of a whole model."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import Case, hf_logits, load, logits, make_hf, one_device, tokens, write_merged
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ftjax.config import FullConfig, MeshConfig
from ftjax.errors import UserError
from ftjax.hub.load import open_model
from ftjax.hub.packed.mxfp4 import VALUES, dequantise
from ftjax.mesh import make_mesh

CASE = Case("gpt-oss", "gpt_oss", {
    "hidden_size": 64, "intermediate_size": 96, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
})  # fmt: skip


def pack(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise float32 (X, I, N) to blocks and scales: each value becomes the nearest that its block's scale allows."""
    x = np.ascontiguousarray(weight.swapaxes(1, 2))
    x = x.reshape(*x.shape[:2], -1, 32)
    exponent = np.ceil(np.log2(np.abs(x).max(axis=-1) / 6.0)).astype(np.int32)
    codes = np.abs(np.ldexp(x, -exponent[..., None])[..., None] - VALUES).argmin(axis=-1).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return `(transformers' model with dequantised weights, the MXFP4 folder)`."""
    plain, packed = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("packed")
    hf = make_hf(CASE, plain)
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales = pack(tensors.pop(name))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        value = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
        assert value.abs().max() > 0.1
        with torch.no_grad():
            hf.get_parameter(name).copy_(value)
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(config))
    return hf, packed


def test_every_byte_and_scale():
    """All 256 pairs under small, medium and large scales equal transformers' values bit for bit."""
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 4, 4, 16)
    for exponent in (1, 100, 127, 140, 250):
        scales = np.full((1, 4, 4), exponent, np.uint8)
        want = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).swapaxes(1, 2).contiguous()
        got = dequantise(blocks, scales)
        assert got.dtype == ml_dtypes.bfloat16
        assert got.tobytes() == want.view(torch.uint16).numpy().tobytes()


def test_any_part_of_a_tensor(folders):
    _, folder = folders
    source = open_model(folder)[1]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = source.read(name)
    assert whole.shape == source.shape(name) == (4, 64, 192)
    parts = [
        (slice(1, 3),),
        (slice(0, 4), slice(10, 50)),
        (slice(2, 3), slice(32, 64), slice(5, 101)),
        (slice(0, 1), slice(63, 64)),
    ]
    for index in parts:
        np.testing.assert_array_equal(source.read(name, index), whole[index])


@pytest.mark.parametrize("devices", [1, 8])
def test_model(folders, devices):
    hf, folder = folders
    ids = tokens(2, 20)
    model, params = load(folder, mesh=one_device() if devices == 1 else make_mesh(MeshConfig(fsdp=4, tensor=2)))
    for path, value in params.items():
        if path.endswith("experts.down_proj"):
            want = [layer.mlp.experts.down_proj.detach().numpy() for layer in hf.model.layers]
            np.testing.assert_array_equal(value, np.stack(want))
    if devices == 1:
        np.testing.assert_allclose(logits(model, params, ids), hf_logits(hf, ids), atol=1e-4, rtol=0)


def test_written_without_quantisation(folders, tmp_path):
    hf, folder = folders
    model, params = load(folder)
    write_merged(tmp_path, model, params, FullConfig(), folder)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = type(hf).from_pretrained(tmp_path, dtype=torch.float32)
    ids = tokens(1, 12)
    np.testing.assert_array_equal(hf_logits(again, ids), hf_logits(hf, ids))


def test_another_quantisation_is_refused(folders, tmp_path):
    _, folder = folders
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match="quantization_config"):
        load(tmp_path)
