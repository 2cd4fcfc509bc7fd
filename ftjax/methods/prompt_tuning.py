"""Prompt tuning: learned embeddings of virtual tokens (Lester et al. 2021, arXiv:2104.08691, section 2).

Names, initialisations and the file are PEFT's: one tensor `prompt_embeddings [V, E]`.

Legend: V virtual tokens, E embed.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ftjax.config import PromptTuningConfig
from ftjax.errors import UserError
from ftjax.methods.method import Method, Start
from ftjax.methods.prefix_tuning import NO_MERGE, VIRTUAL, file_name, own, put
from ftjax.models.gemma import GemmaModel
from ftjax.models.model import Model
from ftjax.models.nn.cache import Cache, Layout
from ftjax.models.nn.context import Context, Prefix
from ftjax.models.nn.memory import KeysValues, one_for_all
from ftjax.models.nn.param import Init
from ftjax.models.nn.stack import memories


class PromptTokens(nnx.Module):
    """`Prefix` from embeddings: the model reads them once, and every document attends to their keys and values."""

    def __init__(self, remembered: KeysValues, layers: int, count: int, embed: int):
        self.layout = Layout(((remembered,),) * layers)
        self.embedding = own((count, embed), "embedding", Init("normal"))

    def flat(self) -> Float[Array, "virtual E"]:
        """Return the embeddings."""
        return self.embedding[...]

    def __call__(self, root: nnx.Module, ctx: Context) -> Prefix:
        embeddings = self.flat()[None]
        ones = jnp.ones(embeddings.shape[:2], jnp.int32)
        cache = Cache.empty(self.layout, 1, ones.shape[1], ctx.dtype)
        own_ctx = replace(ctx, positions=jnp.cumsum(ones, axis=1) - 1, segment_ids=ones, dropout=None)
        _, cache, _ = root.hidden(embeddings, own_ctx, cache)
        [keys], [values] = cache.keys, cache.values
        return Prefix(keys[:, 0], values[:, 0])


def attach(root: nnx.Module, config: PromptTuningConfig) -> None:
    """Add virtual tokens before every text to an abstract model, in place."""
    count, sizes = config.num_virtual_tokens, root.sizes
    put(root, PromptTokens(one_for_all(memories(root)), sizes.layers, count, sizes.embed), count)


def start(config: PromptTuningConfig, model: Model, begin: Start) -> dict[str, np.ndarray]:
    """Return embeddings of a text's tokens (truncated or repeated), or of random tokens; nothing for random values."""
    embedding, count = model.embedding, config.num_virtual_tokens
    if config.prompt_tuning_init == "RANDOM":
        return {}
    if config.prompt_tuning_init == "TEXT":
        ids = begin.tokenize(config.prompt_tuning_init_text)
        if not ids:
            raise UserError(f"method.prompt_tuning_init_text: {config.prompt_tuning_init_text!r} has no tokens")
        ids = np.resize(np.array(ids), count)
    else:
        ids = np.random.default_rng(begin.seed).integers(0, embedding.shape[0], count)
    module = model.bind({path: spec.abstract for path, spec in model.specs.items()})
    scale = next((node.scale for _, node in nnx.iter_graph(module) if isinstance(node, GemmaModel)), 1)
    return {"virtual.embedding": begin.fetch(embedding.path, (ids,)) * scale}


def virtual_settings(kind: str, base_model: str, model: Model) -> dict:
    """Return adapter_config.json for virtual tokens that are embeddings."""
    virtual = model.bind({path: spec.abstract for path, spec in model.specs.items()}).virtual
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": virtual.embedding.get_value().shape[0],
        "num_transformer_submodules": 1,
        "num_layers": model.sizes.layers,
        "num_attention_heads": model.sizes.heads,
        "token_dim": virtual.embedding.get_value().shape[1],
    }


def saved_config(config: PromptTuningConfig, base_model: str, model: Model) -> dict:
    """Return adapter_config.json for PEFT."""
    values = virtual_settings("PROMPT_TUNING", base_model, model) | {"prompt_tuning_init": config.prompt_tuning_init}
    if config.prompt_tuning_init == "TEXT":
        values |= {"prompt_tuning_init_text": config.prompt_tuning_init_text, "tokenizer_name_or_path": base_model}
    return values


def from_saved(config: PromptTuningConfig, saved: dict) -> PromptTuningConfig:
    """Return the settings of a PEFT folder; the initialisation of its values does not matter any more."""
    return PromptTuningConfig(num_virtual_tokens=saved["num_virtual_tokens"], adapter_path=config.adapter_path)


METHOD = Method(
    PromptTuningConfig,
    attach,
    reads=lambda saved: saved.get("peft_type") == "PROMPT_TUNING",
    kind="PROMPT_TUNING",
    saved_config=saved_config,
    from_saved=from_saved,
    known=frozenset((*VIRTUAL, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")),
    file_name=file_name,
    start=start,
    no_merge=NO_MERGE,
)
