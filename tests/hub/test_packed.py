"""Tests checkpoints in few bits: every weight is bit for bit what the tool that wrote it makes of it."""

import json

import bitsandbytes.functional as bnb
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from oracle import Case, hf_logits, load, logits, make_hf, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from ftjax.errors import UserError
from ftjax.hub.load import open_model
from ftjax.hub.packed.bits import unpack
from ftjax.hub.packed.formats import dequantiser
from ftjax.hub.safetensors import SafetensorsFolder
from ftjax.models.nn.quantized import Quantization

ROWS, COLUMNS = 96, 192  # bitsandbytes on a CPU dequantises other than whole blocks a row wrongly
PARTS = [(), (slice(5, 40),), (slice(7, 9), slice(33, 97))]


def weight(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.3


def as_array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def check(tmp_path, how: dict, tensors: dict[str, torch.Tensor], want: torch.Tensor):
    """The tensors are read as the weight `a.weight`, whole and in parts; another tensor passes through."""
    other = torch.arange(6.0).reshape(2, 3)
    save_file(
        {**{name: value.contiguous() for name, value in tensors.items()}, "b.weight": other}, tmp_path / "model.safetensors"
    )
    source = dequantiser({"quantization_config": how}, "here")(SafetensorsFolder(tmp_path))
    assert sorted(source.keys()) == ["a.weight", "b.weight"]
    np.testing.assert_array_equal(source.read("b.weight"), other.numpy())
    want = as_array(want)
    assert source.shape("a.weight") == want.shape
    for part in PARTS:
        got = source.read("a.weight", part)
        assert got.dtype == source.dtype("a.weight") in (want.dtype, np.float32) and got.flags.c_contiguous
        np.testing.assert_array_equal(got.astype(want.dtype).astype(np.float32), want[part].astype(np.float32))


FLOAT8 = {"num_bits": 8, "type": "float"}
SCHEMES = {
    "int4, groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4, groups, asymmetric": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "int8, rows": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int4, one scale": ("pack-quantized", {"num_bits": 4, "strategy": "tensor"}),
    "int3, groups": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
    "int8, rows, as int8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8, rows, asymmetric, as int8": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "FP8, rows": ("float-quantized", {**FLOAT8, "strategy": "channel"}),
    "FP8, one scale": ("float-quantized", {**FLOAT8, "strategy": "tensor"}),
    "FP8, blocks": ("float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [32, 64]}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(tmp_path, name, dtype):
    form, settings = SCHEMES[name]
    args = QuantizationArgs(**settings)
    scheme, value = QuantizationScheme(targets=["Linear"], weights=args, format=form), weight().to(dtype)
    scale, zero = calculate_qparams(*bounds(value, settings), args)
    state = {"weight": value, "weight_scale": scale.to(dtype), "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(form)
    packed = compressor.compress(state, scheme)
    want = compressor.decompress(packed, scheme)["weight"]
    assert want.dtype == dtype and 0 < (want - value).abs().max() < 0.5
    how = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": settings}}}
    check(tmp_path, how, {f"a.{end}": tensor for end, tensor in packed.items()}, want)


def bounds(value: torch.Tensor, settings: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest value that each scale has to cover."""
    if settings["strategy"] == "group":
        value = value.reshape(len(value), -1, settings["group_size"])
        return value.amin(-1), value.amax(-1)
    if settings["strategy"] == "block":
        rows, columns = settings["block_structure"]
        padded = torch.nn.functional.pad(value, (0, -value.shape[1] % columns, 0, -value.shape[0] % rows))
        blocks = padded.reshape(len(padded) // rows, rows, -1, columns)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    if settings["strategy"] == "channel":
        return value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)
    return value.min().reshape(1), value.max().reshape(1)


@pytest.mark.parametrize("grid", [(3, 6), (1, 1)], ids=str)
def test_fp8_is_as_in_transformers(tmp_path, grid):
    packed, scales = weight().to(torch.float8_e4m3fn), weight(1, *grid).abs() + 0.1
    want = Fp8Dequantize(None)._dequantize_one(packed, scales, torch.bfloat16)
    how = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    more = {"a.activation_scale": torch.tensor(2.0)}
    check(tmp_path, how, {"a.weight": packed, "a.weight_scale_inv": scales, **more}, want)


def test_fp8_with_one_number(tmp_path):
    """Mistral's: a scale without dimensions."""
    packed, scale = weight().to(torch.float8_e4m3fn), torch.tensor(0.25, dtype=torch.bfloat16)
    check(tmp_path, {"quant_method": "fp8"}, {"a.weight": packed, "a.weight_scale_inv": scale}, packed.bfloat16() * 0.25)


def test_fp8_with_a_last_block_in_part(tmp_path):
    """DeepSeek's: 96 rows in blocks of 64."""
    packed, scales = weight().to(torch.float8_e4m3fn), weight(1, 2, 3).abs() + 0.1
    want = packed.float() * scales.repeat_interleave(64, 0)[:ROWS].repeat_interleave(64, 1)[:, :COLUMNS]
    how = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    check(tmp_path, how, {"a.weight": packed, "a.weight_scale_inv": scales}, want)


def test_scales_that_fit_no_block(tmp_path):
    tensors = {"a.weight": weight().to(torch.float8_e4m3fn), "a.weight_scale_inv": weight(1, 7, 5).abs()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"a.weight \(96, 192\): its scales \(7, 5\) are neither one number"):
        dequantiser({"quantization_config": {"quant_method": "fp8"}}, "here")(SafetensorsFolder(tmp_path))


@pytest.mark.parametrize("nested", [False, True], ids=["scales", "scales in 8 bits"])
@pytest.mark.parametrize("kind, dtype", [("nf4", torch.bfloat16), ("fp4", torch.float16), ("nf4", torch.float32)])
def test_bitsandbytes_4_bits(tmp_path, kind, dtype, nested):
    packed, state = bnb.quantize_4bit(weight().to(dtype), blocksize=64, compress_statistics=nested, quant_type=kind)
    want = bnb.dequantize_4bit(packed, state)
    tensors = {"a.weight": packed} | {f"a.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    check(tmp_path, how, tensors, want)
    if kind == "nf4":  # quantised again, it has the same codes; its scales are rounded
        whole = dequantiser({"quantization_config": how}, "here")(SafetensorsFolder(tmp_path)).read("a.weight")
        np.testing.assert_allclose(Quantization("nf4").quantise(whole).dequantise(jnp.float32), whole, rtol=5e-3)


def test_bitsandbytes_int8(tmp_path):
    packed, largest, _ = bnb.int8_vectorwise_quant(weight().half())
    want = bnb.int8_vectorwise_dequant(packed, largest).bfloat16()
    tensors = {"a.weight": packed, "a.SCB": largest, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    check(tmp_path, {"load_in_8bit": True}, tensors, want)


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Pack unsigned numbers `[R, K]` along their last dimension into int32 words, lowest bits first."""
    rows = []
    for row in codes:
        stream = sum(int(code) << bits * place for place, code in enumerate(row))
        rows.append(np.frombuffer(stream.to_bytes(len(row) * bits // 8, "little"), "<i4"))
    return torch.tensor(np.stack(rows))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None], ids=str)
@pytest.mark.parametrize("bits, sorted_by_use", [(4, True), (4, False), (3, False), (8, False), (2, True)])
def test_gptq(tmp_path, bits, sorted_by_use, version):
    """Numbers that the paper's method would give; AutoGPTQ's own packing gave the same words."""
    rng, groups = np.random.default_rng(0), COLUMNS // 32
    codes, zeros = rng.integers(0, 1 << bits, (COLUMNS, ROWS)), rng.integers(1, 1 << bits, (groups, ROWS))
    scales = rng.uniform(0.01, 0.1, (groups, ROWS)).astype(np.float16)
    order = rng.permutation(np.arange(COLUMNS) // 32) if sorted_by_use else np.arange(COLUMNS) // 32
    want = ((codes - zeros[order]).astype(np.float16) * scales[order]).T
    tensors = {
        "a.qweight": words(codes.T, bits).T, "a.scales": torch.tensor(scales), "a.g_idx": torch.tensor(order).int(),
        "a.qzeros": words(zeros if version == "gptq_v2" else zeros - 1, bits),
    }  # fmt: skip
    how = {"quant_method": "gptq", "bits": bits, "group_size": 32} | ({"checkpoint_format": version} if version else {})
    check(tmp_path, how, tensors, torch.tensor(np.ascontiguousarray(want)))


def test_awq(tmp_path):
    """AutoAWQ's `dequantize_gemm` gave the same numbers."""
    rng, groups = np.random.default_rng(0), COLUMNS // 32
    codes, zeros = rng.integers(0, 16, (COLUMNS, ROWS)), rng.integers(0, 16, (groups, ROWS))
    scales = rng.uniform(0.01, 0.1, (groups, ROWS)).astype(np.float16)
    want = ((codes - np.repeat(zeros, 32, 0)).astype(np.float16) * np.repeat(scales, 32, 0)).T

    def packed(numbers: np.ndarray) -> torch.Tensor:
        return words(numbers.reshape(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(numbers.shape), 4)

    tensors = {"a.qweight": packed(codes), "a.qzeros": packed(zeros), "a.scales": torch.tensor(scales)}
    how = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    check(tmp_path, how, tensors, torch.tensor(np.ascontiguousarray(want)))


@pytest.mark.parametrize("bits", range(1, 9))
def test_any_width(bits):
    numbers = np.random.default_rng(0).integers(0, 1 << bits, (3, 64))
    np.testing.assert_array_equal(unpack(words(numbers, bits).numpy(), bits), numbers)


@pytest.mark.parametrize(
    "how, named",
    [
        ({"quant_method": "gptq", "bits": 5}, "gptq, 5"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq, marlin, 4"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq, gemv, 4"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "compressed-tensors, nvfp4-pack-quantized"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "sparsity_config": {"format": "sparse-24-bitmask"}},
         "compressed-tensors, pack-quantized"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)  # fmt: skip
def test_other_formats_are_refused_by_name(tmp_path, how, named):
    make_hf(Case("llama", "llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    with pytest.raises(UserError, match=rf"quantization_config: {named}\), in a format that ftjax does not read; use the orig"):
        open_model(tmp_path)


def test_a_model_of_4_bits(tmp_path):
    """A folder that transformers and bitsandbytes wrote gives the logits of the weights that they dequantise."""
    from transformers import BitsAndBytesConfig

    plain, packed = tmp_path / "plain", tmp_path / "packed"
    make_hf(Case("llama", "llama", {"hidden_size": 64, "intermediate_size": 128}), plain)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    hf = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, dtype=torch.float32)
    hf.save_pretrained(packed)
    assert any(name.endswith(".absmax") for name in load_file(packed / "model.safetensors"))
    hf = hf.dequantize(torch.float32)
    batch = tokens(2, 12)
    np.testing.assert_allclose(logits(*load(packed), batch), hf_logits(hf, batch), atol=2e-5)
