"""LoRA's targets with their ranks and scales, by PEFT's rules, and the checks of its configuration.

An existing folder (`adapter_path`) may name modules that the model does not have: PEFT ignores them, so they are notes there,
and errors only in a user's own configuration.
"""

import math
import re
from collections.abc import Callable, Iterator

from flax import nnx

from ftjax.config import LoraConfig
from ftjax.errors import UserError, join_problems
from ftjax.methods.bias import trained_biases
from ftjax.methods.lora_experts import expert_sites, is_targeted
from ftjax.methods.lora_experts import problems as expert_problems
from ftjax.methods.save import names_to_save, refuse_missing
from ftjax.methods.tied import on_embedding, tied_names
from ftjax.methods.token_rows import row_problems, row_sites
from ftjax.methods.walk import describe, embeddings, layer_index, linears, matches, refuse_unmatched
from ftjax.models.classifier import HEAD


class NoEffect(str):
    """A setting without effect."""


def is_target(name: str, config: LoraConfig, *, embedding: bool = False) -> bool:
    """Return whether a module is adapted."""
    if config.exclude_modules and matches(name, config.exclude_modules):
        return False
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.modules_to_save):
        return False
    if config.target_modules == "all-linear":
        if embedding or name.rpartition(".")[2] == "lm_head":  # PEFT leaves the output embedding out
            return False
    elif not matches(name, config.target_modules):
        return False
    return config.layers_to_transform in (None, []) or layer_index(name, config.layers_pattern) in _layers(config)


def rank_of(name: str, config: LoraConfig, *, embedding: bool = False) -> int:
    """Return the rank of one module; 0 if it is not adapted."""
    return named_rank(name, config) if is_target(name, config, embedding=embedding) else 0


def named_rank(name: str, config: LoraConfig) -> int:
    """Return the rank that the options give a module or parameter, whether or not it is adapted."""
    return _pattern(name, config.rank_pattern, config.r, first=bool(config.adapter_path))


def scale_of(name: str, rank: int, config: LoraConfig) -> float:
    """Return the factor on a module's update."""
    alpha = _pattern(name, config.alpha_pattern, config.lora_alpha, first=bool(config.adapter_path))
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def saved_modules(config: LoraConfig, output: str) -> list[str]:
    """Return `modules_to_save`, always with a classification head, as in PEFT."""
    return list(dict.fromkeys([*config.modules_to_save, *([HEAD] if output == HEAD else [])]))


def _layers(config: LoraConfig) -> list[int]:
    layers = config.layers_to_transform
    return layers if isinstance(layers, list) else [layers]


def _fits(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _pattern(name: str, patterns: dict, default, *, first: bool = False):
    """Look up a module's value in a pattern. Args: `first`: take the first of several, as PEFT does."""
    found = {key: value for key, value in patterns.items() if _fits(key, name)}
    if len(set(found.values())) > 1 and not first:
        raise UserError(
            f"method: rank_pattern or alpha_pattern gives {name} several values ({found}); tools differ in which one they "
            "take, so make the patterns exclude each other"
        )
    return next(iter(found.values()), default)


def adapted_modules(root: nnx.Module, config: LoraConfig) -> set[str]:
    """Return the Hugging Face names of all dense layers and embeddings that are adapted."""
    dense = {name for site in linears(root) for name in site.names if is_target(name, config)}
    return dense | {name for site in embeddings(root) for name in site.names if is_target(name, config, embedding=True)}


def check(root: nnx.Module, config: LoraConfig) -> None:
    """Raise UserError that lists all conflicting options and names that the model does not have. For a folder, settings without
    effect are added to the model's notes instead."""
    config = on_embedding(root, config)
    found = [*config.conflicts(), *_target_problems(root, config), *_option_problems(root, config)]
    found += expert_problems(root, config)
    problems = list(dict.fromkeys(found))
    if config.adapter_path:
        ignored = [problem for problem in problems if isinstance(problem, NoEffect)]
        problems = [problem for problem in problems if problem not in ignored]
        root.notes = (*root.notes, *(f"{config.adapter_path}: without effect: {t.replace('method.', '')}" for t in ignored))
    if problems:
        raise UserError(join_problems(problems, "method"))


def _said(call: Callable[[], object]) -> list[str]:
    """Return the message of the UserError that a call raises."""
    try:
        call()
    except UserError as error:
        return [str(error)]
    return []


def _target_problems(root: nnx.Module, config: LoraConfig) -> Iterator[str]:
    """Yield targets, layers and patterns that match nothing, or too much."""
    targets = config.target_modules
    dense = [name for site in linears(root) for name in site.names]
    tables = [name for site in embeddings(root) for name in site.names]
    if isinstance(targets, list):
        yield from map(NoEffect, _said(lambda: refuse_unmatched("method.target_modules", targets, [*dense, *tables])))
    if config.layers_to_transform is not None:
        exist = {layer_index(name) for name in dense} - {None}
        if absent := sorted(set(_layers(config)) - exist):
            yield NoEffect(f"method.layers_to_transform: {absent} do not exist; layers are 0 to {max(exist)}")
    of_experts = [name for site in expert_sites(root) for name in site.names if is_targeted(name, config)]
    adapted = sorted([*adapted_modules(root, config), *of_experts])
    if not adapted:
        yield f"method.target_modules: {targets!r} matches no linear layer; the model has {describe(iter(dense))}"
        return
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, option)
        if unused := [key for key in patterns if not any(_fits(key, name) for name in adapted)]:
            yield NoEffect(f"method.{option}: {', '.join(map(repr, unused))} matches none of {describe(iter(adapted))}")
        overlaps = [said for name in adapted for said in _said(lambda name=name, p=patterns: _pattern(name, p, None))]
        if overlaps and not config.adapter_path:
            yield overlaps[0]
            return  # ranks are not known
    yield from _rank_problems(root, config)


def _rank_problems(root: nnx.Module, config: LoraConfig) -> Iterator[str]:
    """Yield ranks that an initialisation does not allow; one entry for all layers."""
    option, odd, large = f"method.init_lora_weights: {config.init_lora_weights}", {}, {}
    for site in linears(root):
        size = min(site.layer.size_in, site.layer.size_out)
        for name in site.names:
            rank = rank_of(name, config)
            odd |= {name: rank} if rank % 2 else {}
            large |= {name: (rank, size)} if rank > size else {}
    if config.init_lora_weights == "orthogonal" and odd:
        yield f"{option} needs an even rank, and {next(iter(odd))} has {next(iter(odd.values()))}"
    if config.pissa and large:
        name, (rank, size) = next(iter(large.items()))
        yield f"{option}: the weight of {name} has {size} singular values, fewer than its rank {rank}; lower r or rank_pattern"


def _option_problems(root: nnx.Module, config: LoraConfig) -> Iterator[str]:
    """Yield options that exclude each other, or that this model does not allow."""
    saved = saved_modules(config, root.output)
    both = config.ensure_weight_tying
    yield from map(NoEffect, _said(lambda: refuse_missing(root, saved)))
    yield from _said(lambda: names_to_save(root, saved, both=both))
    kept = names_to_save(root, saved, both=True)
    updated = [site for site in embeddings(root) if is_target(site.names[0], config, embedding=True)]
    for site in updated:
        yield from _embedding_problems(site.names[0], config, tied=site.path == root.output)
    tied = tied_names(root)
    if both and not (tied and (f"{tied[0]}.weight" in kept or any(site.path == root.output for site in updated))):
        why = "neither target_modules nor modules_to_save names it" if tied else "this model does not tie them"
        yield NoEffect(
            f"method.ensure_weight_tying: for an embedding that trains and is tied to the output; {why}, so leave it out"
        )
    yield from row_problems(root, config)
    for site, _ in row_sites(root, config):
        embedding = hasattr(site.layer, "attend")
        others = {
            "target_modules": is_target(site.names[0], config, embedding=embedding),
            "modules_to_save": f"{site.names[0]}.weight" in kept,
        }
        for option in (option for option, also in others.items() if also):
            yield (
                f"method.trainable_token_indices and method.{option} both train {site.names[0]}; leave it out of one of them"
            )
    if config.bias != "none":
        biases = trained_biases(root, config.bias, adapted_modules(root, config))
        if not biases:
            where = "this model has" if config.bias == "all" else "the layers of target_modules have"
            yield NoEffect(f"method.bias: {config.bias}, but {where} no biases; leave it out")
        if both := sorted(biases & kept):
            yield (
                f"method.bias: {config.bias} and method.modules_to_save both train {both[0]}, which an adapter file holds "
                "once; leave one of them out"
            )


def _embedding_problems(name: str, config: LoraConfig, tied: bool) -> Iterator[str]:
    """Yield options that an adapted embedding does not allow."""
    if tied and not config.ensure_weight_tying:
        yield (
            f"method.target_modules: this model ties {name} to its output, and PEFT would adapt the input alone, which no "
            "merged model could hold; set method.ensure_weight_tying: true, which adapts both"
        )
    dense_only = {"use_dora: true": config.use_dora}
    dense_only[f"init_lora_weights: {config.init_lora_weights}"] = config.init_lora_weights not in (True, "gaussian")
    for option in (option for option, asked in dense_only.items() if asked):
        yield f"method.{option} is for dense layers, and target_modules names the embedding {name}; leave one of them out"
