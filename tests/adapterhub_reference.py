"""Computes with the `adapters` library the reference figures of tests/methods/test_bottleneck.py.

The library needs an older transformers, so this file runs in a separate environment:

    python3.11 -m venv DIR && DIR/bin/pip install adapters==1.3.0 torch==2.13.0
    DIR/bin/python tests/adapterhub_reference.py golden > tests/adapterhub_golden.json
    FTJAX_ADAPTERS_PYTHON=DIR/bin/python pytest tests/methods/test_bottleneck.py     # with the live comparison

`golden` prints, for each family and architecture, the adapter's configuration, the names and shapes of its tensors, logits, and
norms of gradients. `logits FAMILY FOLDER` loads an adapter written by ftjax and prints logits. Weights are derived from their
names (`fill`), so that none need be stored.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

KINDS = ("seq_bn", "double_seq_bn", "par_bn")
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": {**SIZES, "tie_word_embeddings": False},
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen3": {**SIZES, "head_dim": 8, "tie_word_embeddings": False},
}
NAME = "default"


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a float32 weight derived from its name; its norm is about one."""
    value = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape) * 0.2
    norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
    return (value + norm).astype(np.float32)


def fill_model(model) -> None:
    """Set every parameter of a PyTorch model from its name."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(fill(name, tuple(parameter.shape))))


def ids() -> np.ndarray:
    """Return token ids `[2, 12]`."""
    return (np.arange(24).reshape(2, 12) * 37 + 11) % 93 + 3


def _base(family: str):
    import adapters
    import torch
    from adapters import AdapterModelInterface
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]), torch_dtype=torch.float32)
    fill_model(model)
    if family == "qwen3":  # the library has no code for this family, but accepts a description of any model
        interface = AdapterModelInterface(
            adapter_methods=["bottleneck"], model_embeddings="embed_tokens", model_layers="layers",
            layer_self_attn="self_attn", layer_cross_attn=None, attn_q_proj="q_proj", attn_k_proj="k_proj",
            attn_v_proj="v_proj", attn_o_proj="o_proj", layer_intermediate_proj="mlp.up_proj",
            layer_output_proj="mlp.down_proj", layer_pre_self_attn="input_layernorm",
            layer_pre_ffn="post_attention_layernorm",
        )  # fmt: skip
        adapters.init(model, interface=interface)
    else:
        adapters.init(model)
    return model.eval()


def _logits(model) -> list:
    import torch

    with torch.no_grad():
        return np.round(model(torch.tensor(ids())).logits[:, -1].numpy().astype(float), 6).tolist()


def _norms(model) -> dict[str, float]:
    """Return, for each tensor of the adapter, the norm of the gradient of the mean next-token cross-entropy."""
    import torch

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    logits, targets = model(torch.tensor(ids())).logits[:, :-1], torch.tensor(ids())[:, 1:]
    torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)).backward()
    return {name: round(p.grad.norm().item(), 6) for name, p in model.named_parameters() if ".adapters." in name}


def golden() -> dict:
    import torch
    from safetensors.numpy import load_file

    out = {}
    for family in FAMILIES:
        out[family] = {"base": _logits(_base(family))}
        for kind in KINDS:
            model = _base(family)
            model.add_adapter(NAME, config=kind)
            model.set_active_adapters(NAME)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".adapters." in name:
                        parameter.copy_(torch.tensor(fill(name, tuple(parameter.shape))))
            with tempfile.TemporaryDirectory() as folder:
                model.save_adapter(folder, NAME, use_safetensors=True)
                tensors = {name: list(value.shape) for name, value in load_file(Path(folder) / "adapter.safetensors").items()}
                config = json.loads((Path(folder) / "adapter_config.json").read_text())
            out[family][kind] = {"config": config, "tensors": tensors, "logits": _logits(model), "norms": _norms(model)}
    return out


def loaded(family: str, folder: str) -> list:
    model = _base(family)
    model.load_adapter(folder, use_safetensors=True, set_active=True)
    return _logits(model)


if __name__ == "__main__":
    if sys.argv[1] == "golden":
        print(json.dumps(golden(), sort_keys=True))
    else:
        print(json.dumps(loaded(*sys.argv[2:])))
