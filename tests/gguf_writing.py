"""Writes GGUF files for tests, with the gguf package, as llama.cpp's converter does."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GGMLType
from gguf import GGUFWriter, TokenType
from gguf.constants import GGML_QUANT_SIZES
from safetensors.numpy import load_file

HUB_TO_GGUF = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.", "blk."),
    (".input_layernorm", ".attn_norm"),
    (".post_attention_layernorm", ".ffn_norm"),
    (".self_attn.q_proj", ".attn_q"),
    (".self_attn.k_proj", ".attn_k"),
    (".self_attn.v_proj", ".attn_v"),
    (".self_attn.o_proj", ".attn_output"),
    (".mlp.gate_proj", ".ffn_gate"),
    (".mlp.up_proj", ".ffn_up"),
    (".mlp.down_proj", ".ffn_down"),
]
# Byte offsets of a block's float16 scales: random bytes there could be infinities.
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def gguf_name(name: str) -> str:
    for hub, gguf in HUB_TO_GGUF:
        name = name.replace(hub, gguf)
    return name


def permuted(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Return the order in which llama.cpp stores the rows of q_proj and k_proj (`LlamaModel.permute` of its converter)."""
    return tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def random_blocks(shape: tuple[int, ...], kind: GGMLType, rng: np.random.Generator) -> np.ndarray:
    """Return uint8 `[..., stored width]`: blocks of random content with finite scales."""
    block, size = GGML_QUANT_SIZES[kind]
    high = 256 if kind.name in SCALES else 60  # a float16 whose bytes are below 60 is finite
    blocks = rng.integers(0, high, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    for offset in SCALES.get(kind.name, ()):
        blocks[..., offset + 1] &= 0x1F  # exponent: below 1/64
    return blocks.reshape(*shape[:-1], -1)


def write_llama(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    stored: Mapping[str, tuple[np.ndarray, GGMLType]] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    settings: Mapping[str, Any] | None = None,
    tokenizer=None,
    architecture: str = "llama",
) -> Path:
    """Write a Llama as GGUF.

    Args:
        config: config.json.
        tensors: by Hugging Face name, float32 or float16.
        stored: raw data and its type, instead of `tensors`, by Hugging Face name.
        extra: more tensors, by their GGUF name.
        settings: GGUF keys and values, added to or replacing the usual ones; None leaves the key out.
        tokenizer: called with the writer.
    """
    writer = GGUFWriter(path, architecture)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    usual = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": config["head_dim"],
        "llama.attention.value_length": config["head_dim"],
        "llama.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.vocab_size": config["vocab_size"],
        "llama.rope.dimension_count": config["head_dim"],
    }
    for key, value in (usual | dict(settings or {})).items():
        if value is not None:
            add(writer, key, value)
    if tokenizer is not None:
        tokenizer(writer)

    def order(name: str, data: np.ndarray) -> np.ndarray:
        count = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        return permuted(data, count) if count else data

    for name, data in tensors.items():
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(order(name, data)))
    for name, (data, kind) in (stored or {}).items():
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(order(name, data)), raw_dtype=kind)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a key with the type of its value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def vocabulary(path: Path, write, architecture: str = "llama") -> Path:
    """Write a GGUF file without tensors."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(512)
    write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def hub_folder(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return `(config.json, tensors)` of a folder with one safetensors file."""
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def sentencepiece_keys(file: Path, **ids: int):
    """Write the tokenizer of a SentencePiece model as the converter's `_set_vocab_sentencepiece` does."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(str(file))
    count = model.get_piece_size()

    def kind(index: int) -> int:
        if model.is_unknown(index):
            return TokenType.UNKNOWN
        if model.is_control(index):
            return TokenType.CONTROL
        return TokenType.BYTE if model.is_byte(index) else TokenType.NORMAL

    def write(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([model.id_to_piece(index) for index in range(count)])
        writer.add_token_scores([model.get_score(index) for index in range(count)])
        writer.add_token_types([kind(index) for index in range(count)])
        for name, index in ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)

    return write


def demo_model() -> Path:
    """Return SmolLM2-135M-Instruct as GGUF; skip the test if `ftjax demo --only-model` has not downloaded it."""
    place = Path(os.environ.get("FTJAX_DEMO_MODEL") or Path(__file__).resolve().parents[1] / "demo" / "model")
    found = [place] if place.is_file() else sorted(place.glob("*.gguf"))
    if not found or not re.search("smollm2", found[0].name, re.IGNORECASE):
        pytest.skip("no SmolLM2 GGUF in demo/model or FTJAX_DEMO_MODEL; ftjax demo --only-model fetches it")
    return found[0]
