"""GLM-4.7-Flash: the layers of DeepSeek V3, in an order that config.json lists."""

from ftjax.errors import UserError
from ftjax.models.deepseek_v3 import carry_extra_layers, corrected_router, latent_decoder
from ftjax.models.facts import Facts
from ftjax.models.llama import LlamaForCausalLM


def listed_layers(facts: Facts) -> tuple[bool, ...]:
    """Return for each layer whether it has experts. Raises UserError unless `mlp_layer_types` says so for every layer."""
    types, layers = facts["mlp_layer_types"], facts["num_hidden_layers"]
    if len(types) != layers or set(types) - {"dense", "sparse"}:
        raise UserError(
            f"config.json of this {facts.model_type} model has mlp_layer_types {', '.join(map(str, types))}; "
            f"give dense or sparse for each of its {layers} layers"
        )
    return tuple(kind == "sparse" for kind in types)


def build(facts: Facts) -> LlamaForCausalLM:
    """Build the abstract model of a `glm4_moe_lite` config.json."""
    sparse = listed_layers(facts)
    dense = sparse.index(True) if True in sparse else len(sparse)
    facts.only("first_k_dense_replace", dense, why="transformers reads mlp_layer_types, and the two must agree")
    facts.only("scoring_func", "sigmoid", why="its router has sigmoid scores")
    facts.only("topk_method", "noaux_tc", why="its router chooses groups with a correction bias")
    carry_extra_layers(facts)
    return latent_decoder(facts, corrected_router(facts), sparse, interleaved=facts["rope_interleave"])
