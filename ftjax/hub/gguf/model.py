"""Presents a llama.cpp GGUF file of the Llama architecture as a Hugging Face checkpoint: configuration and tensors.

The inverse of llama.cpp's `convert_hf_to_gguf.py` (class LlamaModel): names, and the row order of q_proj and k_proj, which
llama.cpp interleaves for its own RoPE.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GGMLType

from ftjax.errors import UserError
from ftjax.hub.gguf.file import GGUFFile, open_gguf, shortest
from ftjax.hub.gguf.rope import rope_parameters

ARCHITECTURE = "llama"
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # belongs to the configuration, not the weights
ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
MLP = ("ffn_gate", "ffn_up", "ffn_down")
# Settings of other architectures that llama.cpp's converter writes into Llama files with neutral values.
WITHOUT_EFFECT = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "attention.layer_norm_epsilon": None}
# Tokens that end a turn, besides the end of the text: llama.cpp stops at each of them.
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of the model in this file.

    Raises UserError for another architecture, and for settings that Hugging Face's Llama cannot express.
    """
    file = open_gguf(path)
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(
            f"{path}: a GGUF file of architecture {architecture!r}; ftjax reads GGUF files of {ARCHITECTURE!r} "
            "(Llama, Mistral, SmolLM and others alike). Use the model's Hugging Face folder instead"
        )
    settings = {key[len("llama.") :]: value for key, value in file.metadata.items() if key.startswith("llama.")}

    def take(key: str, *default: Any) -> Any:
        if key in settings:
            value = settings.pop(key)
            if isinstance(value, list) and len(set(value)) != 1:
                raise UserError(f"{path}: llama.{key} differs from layer to layer, which Llama cannot express: {value}")
            return _uniform(value)
        if default:
            return default[0]
        raise UserError(f"{path}: the file lacks llama.{key}; it is damaged or was not made by llama.cpp's converter")

    layers, embed = take("block_count"), take("embedding_length")
    heads = take("attention.head_count")
    head_dim = take("attention.key_length", embed // heads)
    if take("attention.value_length", head_dim) != head_dim:
        raise UserError(f"{path}: keys and values of different sizes, which a Hugging Face Llama cannot express")
    rope = {key[len("rope.") :]: settings.pop(key) for key in list(settings) if key.startswith("rope.")}
    factors = None
    if ROPE_FACTORS in file.tensors:
        factors = file.read_rows(ROPE_FACTORS, slice(None)).astype(np.float32)
    tokens = file.metadata.get("tokenizer.ggml.tokens", ())
    take("vocab_size", len(tokens))  # corrected below by the embedding
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _tensor_shape(file, "token_embd.weight")[0],
        "hidden_size": embed,
        "intermediate_size": take("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": take("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",  # the only activation that llama.cpp's Llama has
        "max_position_embeddings": take("context_length"),
        "rms_norm_eps": shortest(take("attention.layer_norm_rms_epsilon")),
        "rope_parameters": rope_parameters(path, rope, head_dim, factors),
        "attention_bias": _bias(file, ATTENTION, layers),
        "mlp_bias": _bias(file, MLP, layers),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": _dtype(file),
        **_special_ids(file),
    }
    unknown = {
        key: value
        for key, value in settings.items()
        if key != "tensor_data_layout" and not (key in WITHOUT_EFFECT and WITHOUT_EFFECT[key] in (None, value)) and value
    }
    if unknown:
        found = ", ".join(f"llama.{key} = {value}" for key, value in sorted(unknown.items()))
        raise UserError(f"{path}: settings that ftjax does not know: {found}. Use the model's Hugging Face folder instead")
    return config


def _tensor_shape(file: GGUFFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise UserError(
            f"{file.path}: the file has no tensor {name}; it holds {len(file.tensors)} tensors. Is it a vocabulary?"
        )
    return file.tensors[name].shape


def _bias(file: GGUFFile, modules: Sequence[str], layers: int) -> bool:
    names = [f"blk.{layer}.{module}.bias" for layer in range(layers) for module in modules]
    have = [name in file.tensors for name in names]
    if any(have) and not all(have):
        present, absent = names[have.index(True)], names[have.index(False)]
        raise UserError(f"{file.path}: it has {present} but not {absent}; a Hugging Face Llama has biases on all or on none")
    return any(have)


def _dtype(file: GGUFFile) -> str:
    types = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return {frozenset({GGMLType.F16}): "float16", frozenset({GGMLType.BF16}): "bfloat16"}.get(frozenset(types), "float32")


def _special_ids(file: GGUFFile) -> dict[str, Any]:
    def token_id(name: str) -> int | None:
        return file.metadata.get(f"tokenizer.ggml.{name}")

    ends = list(dict.fromkeys(i for name in END_IDS if (i := token_id(name)) is not None))
    return {
        "bos_token_id": token_id("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": token_id("padding_token_id"),
    }


class GGUFSource:
    """Presents the tensors of a GGUF file under Hugging Face names and in Hugging Face layout (see `TensorSource`).

    Block-quantised tensors are read as float32; F32, F16 and BF16 as they are stored. Only the rows that are asked for
    are read and dequantised.

    Raises UserError for tensors that no Llama has.
    """

    def __init__(self, path: Path):
        self._file = open_gguf(path)
        self._stored: dict[str, str] = {}  # Hugging Face name -> GGUF name
        for stored in self._file.tensors:
            if stored != ROPE_FACTORS:
                self._stored[_hub_name(path, stored)] = stored
        heads = _uniform(self._file.metadata.get("llama.attention.head_count", 1))
        kv_heads = _uniform(self._file.metadata.get("llama.attention.head_count_kv", heads))
        self._heads = {"q_proj": heads, "k_proj": kv_heads}

    def keys(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._stored[name]].shape

    def dtype(self, name: str) -> np.dtype:
        return self._file.dtype(self._stored[name])

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        rows = index[0] if index else slice(None)
        heads = self._heads.get(name.split(".")[-2])
        if heads:
            rows = interleaved_rows(self.shape(name)[0], heads)[rows]
        out = self._file.read_rows(self._stored[name], rows)
        return np.ascontiguousarray(out[(slice(None), *index[1:])]) if len(index) > 1 else out


def _hub_name(path: Path, stored: str) -> str:
    module, _, kind = stored.rpartition(".")
    layer = ""
    if module.startswith("blk."):
        _, layer, block = module.split(".", 2)
        module = f"blk.{{}}.{block}"
    if module not in NAMES or kind not in ("weight", "bias"):
        raise UserError(f"{path}: it holds the tensor {stored}, which no Hugging Face Llama has")
    return f"{NAMES[module].format(layer)}.{kind}"


def _uniform(value: int | list[int]) -> int:
    """Collapse a list of equal per-layer numbers to one; `read_config` refuses lists that differ."""
    return value[0] if isinstance(value, list) else value


def interleaved_rows(rows: int, heads: int) -> np.ndarray:
    """Return `[rows]` int: the index at which llama.cpp stores each row of q_proj or k_proj.

    Hugging Face pairs dimension i of a head with i + H/2; llama.cpp stores the pairs next to each other.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)
