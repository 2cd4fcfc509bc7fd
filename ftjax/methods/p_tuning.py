"""P-tuning: virtual tokens with embeddings from an MLP during training (Liu et al. 2021, arXiv:2103.10385, section 3.2).

The MLP (three layers, ReLU) and the file are PEFT's: the file stores the output of the MLP, `prompt_embeddings [V, E]`.

Legend: V virtual tokens, E embed, C hidden size of the MLP.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from ftjax.config import PTuningConfig
from ftjax.methods.method import Method
from ftjax.methods.prefix_tuning import NO_MERGE, VIRTUAL, dense, file_name, put, stored_by
from ftjax.methods.prompt_tuning import PromptTokens, virtual_settings
from ftjax.models.model import Model
from ftjax.models.nn.layers import project
from ftjax.models.nn.memory import KeysValues, one_for_all
from ftjax.models.nn.stack import memories


class EncodedTokens(PromptTokens):
    """Prompt tokens that pass through an MLP; without one (loaded from a file) they are used directly."""

    def __init__(self, remembered: KeysValues, layers: int, count: int, embed: int, hidden: int | None):
        super().__init__(remembered, layers, count, embed)
        self.encoded = hidden is not None
        if self.encoded:
            self.weight_0, self.bias_0 = dense(embed, hidden, 0)
            self.weight_2, self.bias_2 = dense(hidden, hidden, 2)
            self.weight_4, self.bias_4 = dense(hidden, embed, 4)

    def flat(self) -> Float[Array, "virtual E"]:
        x = super().flat()
        if not self.encoded:
            return x
        x = jax.nn.relu(project(x, self.weight_0[...]) + self.bias_0[...])
        x = jax.nn.relu(project(x, self.weight_2[...]) + self.bias_2[...])
        return project(x, self.weight_4[...]) + self.bias_4[...]


def attach(root: nnx.Module, config: PTuningConfig) -> None:
    """Add virtual tokens before every text to an abstract model, in place."""
    count, layers, embed = config.num_virtual_tokens, root.sizes.layers, root.sizes.embed
    hidden = None if config.adapter_path else config.encoder_hidden_size or embed
    put(root, EncodedTokens(one_for_all(memories(root)), layers, count, embed, hidden), count)


def saved_config(config: PTuningConfig, base_model: str, model: Model) -> dict:
    """Return adapter_config.json for PEFT."""
    values = virtual_settings("P_TUNING", base_model, model)
    hidden = config.encoder_hidden_size or values["token_dim"]
    return values | {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": hidden}


def from_saved(config: PTuningConfig, saved: dict) -> PTuningConfig:
    """Return the settings of a PEFT folder, which stores the output of the MLP (or LSTM), not the MLP."""
    hidden = saved.get("encoder_hidden_size")
    count = saved["num_virtual_tokens"]
    return PTuningConfig(num_virtual_tokens=count, encoder_hidden_size=hidden, adapter_path=config.adapter_path)


METHOD = Method(
    PTuningConfig,
    attach,
    reads=lambda saved: saved.get("peft_type") == "P_TUNING",
    kind="P_TUNING",
    saved_config=saved_config,
    from_saved=from_saved,
    known=frozenset(
        (*VIRTUAL, "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
    ),
    file_name=file_name,
    stored=stored_by(EncodedTokens.flat),
    no_merge=NO_MERGE,
)
