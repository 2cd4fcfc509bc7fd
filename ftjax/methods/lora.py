"""LoRA: attach it to a model, save and load its folder, and merge it.

Names, matching rules, initialisation, scaling and files are PEFT's, so that an adapter means the same in both. The update
itself is in `lora_linear` and `lora_embedding`.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
from flax import nnx

from ftjax.config import LoraConfig
from ftjax.errors import UserError
from ftjax.methods.bias import trained_biases
from ftjax.methods.lora_embedding import LoraEmbedding, output_copies
from ftjax.methods.lora_experts import ExpertsUpdate, expert_sites, is_of_experts, is_targeted, to_file, update_of
from ftjax.methods.lora_experts import file_name as experts_file_name
from ftjax.methods.lora_linear import LoraLinear, is_conv1d
from ftjax.methods.lora_start import start
from ftjax.methods.lora_targets import adapted_modules, check, named_rank, rank_of, saved_modules, scale_of
from ftjax.methods.method import Fetch, Method, Stored, own_name
from ftjax.methods.parted import layer_of, part_stacks
from ftjax.methods.pissa import as_plain, doubled
from ftjax.methods.save import names_to_save, train_names
from ftjax.methods.tied import OUTPUTS, on_embedding
from ftjax.methods.token_rows import DELTA, attach_rows, row_sites, with_rows
from ftjax.methods.walk import embeddings, excluded_modules, linears
from ftjax.models.classifier import HEAD
from ftjax.models.model import Model
from ftjax.models.nn.experts import UPDATE
from ftjax.models.nn.param import Piece, Spec


def attach(root: nnx.Module, config: LoraConfig) -> None:
    """Wrap every matching layer of an abstract model and mark the other trained parameters, in place.

    Raises UserError, naming everything that does not fit, if options exclude each other or a name matches nothing.
    """
    config = on_embedding(root, config)
    check(root, config)
    beside = names_to_save(root, saved_modules(config, root.output), both=config.ensure_weight_tying)
    if config.bias != "none":
        beside |= trained_biases(root, config.bias, adapted_modules(root, config))
    part_stacks(root, beside)
    for site in linears(root):
        ranks = np.array([rank_of(name, config) for name in site.names])
        if ranks.any():
            scales = [scale_of(name, rank, config) if rank else 0 for name, rank in zip(site.names, ranks, strict=True)]
            options = {"dora": config.use_dora, "pissa": config.pissa}
            site.replace(LoraLinear(site, ranks, np.array(scales), config.lora_dropout, **options))
    for site in expert_sites(root):
        ranks = np.array([named_rank(name, config) if is_targeted(name, config) else 0 for name in site.names])
        if ranks.any():
            scales = [scale_of(name, rank, config) if rank else 0 for name, rank in zip(site.names, ranks, strict=True)]
            setattr(site.module, site.name + UPDATE, nnx.data(ExpertsUpdate(site, ranks, np.array(scales))))
    for site in embeddings(root):
        (name,) = site.names
        if rank := rank_of(name, config, embedding=True):
            site.replace(LoraEmbedding(site, rank, scale_of(name, rank, config)))
    for site, ids in list(row_sites(root, config)):
        attach_rows(site, ids, root)
    train_names(root, beside)


def file_name(model: Model, spec: Spec, piece: Piece) -> str:
    """Return PEFT's name of a tensor. A trained bias of an adapted layer is under the layer that PEFT wraps."""
    layer, is_bias, _ = spec.path.rpartition(".base.bias")
    if is_bias:
        ranks = np.reshape(model.specs[f"{layer}.lora_A"].row.ranks, spec.stacked)
        if ranks[piece.index[: len(spec.stacked)]]:
            return f"base_model.model.{piece.name.removesuffix('bias')}base_layer.bias"
    if is_of_experts(spec):
        return experts_file_name(model, spec).format(layer_of(spec, piece))
    return own_name(model, spec, piece)


def stored(config: LoraConfig, model: Model, fetch: Fetch) -> Iterator[Stored]:
    """Yield the trained tensors; PiSSA as the equivalent plain LoRA, and a tied update a second time for the output."""
    for path, spec in model.trainable.items():
        for piece in spec.pieces():
            if config.pissa and path.endswith((".lora_A", ".lora_B")):
                yield doubled(model, spec, piece, fetch)
            elif is_of_experts(spec):
                shape = to_file(spec, np.empty(piece.shape, np.bool_)).shape
                yield Stored(file_name(model, spec, piece), shape, partial(_of_experts, fetch, spec, piece))
            else:
                yield Stored(file_name(model, spec, piece), piece.shape, partial(_part, fetch, path, piece))
    for name, path in output_copies(model).items():
        yield Stored(name, model.specs[path].shape[::-1], lambda path=path: np.ascontiguousarray(fetch(path, ()).T))
    if config.ensure_weight_tying and f"{model.output}.weight" in model.trainable:  # PEFT expects the tied output, too
        table = model.specs[f"{model.output}.weight"]
        for name in OUTPUTS:
            if name in model.ignored and table.row.axes[:1] == ("vocab",):
                yield Stored(f"base_model.model.{name}", table.shape, partial(fetch, table.path, ()))


def _part(fetch: Fetch, path: str, piece: Piece) -> np.ndarray:
    return fetch(path, piece.index).reshape(piece.shape)


def _of_experts(fetch: Fetch, spec: Spec, piece: Piece) -> np.ndarray:
    return to_file(spec, _part(fetch, spec.path, piece))


def merged(model: Model, path: str, index: tuple, weight: np.ndarray, fetch: Fetch) -> np.ndarray:
    """Add the update to one base weight in float32: `W + B diag(scale) A`, for an embedding the product's transpose.

    Args:
        path: the base weight's path, `<layer>.base.weight`; other weights are returned unchanged.
        index: index of the stacked layer, and of the expert.
        fetch: returns a part of an adapter parameter by path and index.
    """
    if (update := update_of(model, path, index, weight.shape, fetch)) is not None:
        return weight.astype(np.float32) + update
    layer, found, _ = path.rpartition(".base.weight")
    if found and f"{layer}.{DELTA}" in model.specs:
        return with_rows(model, layer, weight, fetch)
    if found and f"{layer}.lora_embedding_A" in model.specs:
        lora_A, lora_B = (fetch(f"{layer}.lora_embedding_{name}", ()).astype(np.float32) for name in "AB")
        return weight.astype(np.float32) + ((lora_B * model.buffers[f"{layer}.scale"]) @ lora_A).T
    if not found or f"{layer}.lora_A" not in model.specs:
        return weight

    def product(name: str) -> np.ndarray:
        a, b = (fetch(f"{layer}.{name}_{side}", index).astype(np.float32) for side in "AB")
        return (b * model.buffers[f"{layer}.scale"][index]) @ a

    update = product("lora") - product("start") if f"{layer}.start_A" in model.specs else product("lora")
    conv1d = is_conv1d(model, layer)
    weight = weight.astype(np.float32) + (update.T if conv1d else update)
    if f"{layer}.lora_magnitude_vector" in model.specs and model.buffers[f"{layer}.scale"][index].any():
        factor = fetch(f"{layer}.lora_magnitude_vector", index) / np.linalg.norm(weight, axis=0 if conv1d else 1)
        weight = weight * (factor if conv1d else factor[:, None])
    return weight


def saved_config(config: LoraConfig, base_model: str, model: Model) -> dict:
    """Return adapter_config.json for PEFT; `all-linear` as the names that it resolved to, PiSSA as plain LoRA.

    Args:
        base_model: value of `base_model_name_or_path`.
    """
    config = as_plain(config) if config.pissa else config
    targets = config.target_modules
    wrapped = [path.removesuffix(".base.weight") for path in model.specs if path.endswith(".base.weight")]
    layers = [path for path in wrapped if f"{path}.lora_A" in model.specs]
    if targets == "all-linear":
        own = [spec for spec in model.specs.values() if spec.row.name == "lora_A.weight" and not is_of_experts(spec)]
        targets = sorted({spec.module.rsplit(".", 1)[-1] for spec in own})
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.output == HEAD else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets,
        "exclude_modules": excluded_modules(config.exclude_modules, model),
        "target_parameters": config.target_parameters or None,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "layers_to_transform": config.layers_to_transform,
        "layers_pattern": config.layers_pattern,
        "modules_to_save": saved_modules(config, model.output) or None,
        "fan_in_fan_out": any(is_conv1d(model, layer) for layer in layers),
        "bias": config.bias,
        "trainable_token_indices": config.trainable_token_indices or None,
        "ensure_weight_tying": config.ensure_weight_tying,
        "init_lora_weights": True,
    }


# Keys that `LoraConfig` has under PEFT's names
HONOURED = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "target_parameters", "use_rslora", "use_dora", "rank_pattern",
    "alpha_pattern",
    "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "trainable_token_indices", "ensure_weight_tying",
)  # fmt: skip
# Keys about initial values, about other ways in which PEFT computes, and about training only
INERT = (
    "lora_dropout", "init_lora_weights", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config", "merge_weights",
)  # fmt: skip
STARTS = ("true", "false", "none", "gaussian", "orthogonal", "eva")  # those that leave the base model unchanged


def from_saved(config: LoraConfig, saved: dict) -> LoraConfig:
    """Return the settings of a PEFT folder, to start from it. Raises UserError for what ftjax's LoRA does not support."""
    kind = str(saved.get("init_lora_weights", True)).lower()
    if kind not in STARTS:
        raise UserError(
            f"{config.adapter_path}: adapter_config.json says init_lora_weights = {kind}, which changed the base model as "
            "well; save it from PEFT as a plain LoRA (path_initial_model_for_weight_conversion) and use that folder"
        )
    values = {key: saved[key] for key in HONOURED if saved.get(key) is not None}
    if saved.get("task_type") == "SEQ_CLS":  # PEFT names the heads of all its models; this model's head is added automatically
        heads = ("classifier", HEAD)
        values["modules_to_save"] = [name for name in values.get("modules_to_save", ()) if name not in heads]
    return LoraConfig(**values, lora_dropout=config.lora_dropout, adapter_path=config.adapter_path)


METHOD = Method(
    LoraConfig,
    attach,
    reads=lambda saved: saved.get("peft_type") == "LORA",
    kind="LORA",
    saved_config=saved_config,
    from_saved=from_saved,
    known=frozenset((*HONOURED, *INERT)),
    file_name=file_name,
    copies=output_copies,
    stored=stored,
    start=start,
    merged=merged,
)
