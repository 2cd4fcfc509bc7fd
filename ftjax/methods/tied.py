"""Tied embeddings: options that name the input embedding or the output, applied to both."""

from flax import nnx

from ftjax.config import LoraConfig
from ftjax.methods.walk import embeddings, matches

OUTPUTS = ("lm_head.weight", "embed_out.weight")  # names in checkpoints of what a tied model leaves out


def tied_names(root: nnx.Module) -> tuple[str, str] | None:
    """Return Hugging Face's names of the embedding and of the output tied to it; None if they are not tied."""
    table = next((site for site in embeddings(root) if site.path == root.output), None)
    if table is None:
        return None
    return table.names[0], next(name for name in root.ignored if name.endswith(OUTPUTS)).removesuffix(".weight")


def on_embedding(root: nnx.Module, config: LoraConfig) -> LoraConfig:
    """Return the options with names of a tied output replaced by its embedding, whose parameters then train on both sides: with
    `ensure_weight_tying`, and for `trainable_token_indices` that are the same on both, as in PEFT."""
    names = tied_names(root)
    if names is None:
        return config
    embedding, output = names
    changed = {}
    rows = config.trainable_token_indices
    if isinstance(rows, dict):
        own = [ids for key, ids in rows.items() if matches(embedding, [key])]
        changed["trainable_token_indices"] = {k: v for k, v in rows.items() if not (matches(output, [k]) and v in own)}
    if config.ensure_weight_tying:
        saved, targets = config.modules_to_save, config.target_modules
        changed["modules_to_save"] = list(dict.fromkeys(embedding if output.endswith(one) else one for one in saved))
        if isinstance(targets, list):
            changed["target_modules"] = list(dict.fromkeys(embedding if matches(output, [one]) else one for one in targets))
        elif targets != "all-linear" and matches(output, targets):
            changed["target_modules"] = f"(?:{targets}|{embedding.replace('.', '[.]')})"
    return config.model_copy(update=changed)
