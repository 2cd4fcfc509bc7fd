"""Chooses how a checkpoint's packed weights are read, by the `quantization_config` of its config.json."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ftjax.errors import UserError
from ftjax.hub.packed.bitsandbytes import bitsandbytes_weights
from ftjax.hub.packed.compressed import packed_weights
from ftjax.hub.packed.gptq import awq_weights, gptq_weights
from ftjax.hub.packed.mxfp4 import mxfp4_weights
from ftjax.hub.packed.scaled import scaled_weights
from ftjax.hub.packed.source import DequantisedSource, Weight
from ftjax.hub.source import TensorSource
from ftjax.models.facts import INSTEAD

# Ends of tensors that no weight needs: scales of activations, and a mark of bitsandbytes.
WITHOUT = (
    ".weight_format", ".input_scale", ".activation_scale", ".input_scale_ub", ".input_zero_point", ".output_scale",
)  # fmt: skip
COMPRESSED = {"pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"}


def dequantiser(config: Mapping[str, Any], where: str) -> Callable[[TensorSource], TensorSource] | None:
    """Return what presents a checkpoint's packed weights as the numbers that they represent; None if it has none.

    Raises UserError for formats that ftjax does not read, by their names.

    Args:
        config: config.json, with its `quantization_config` if it has one.
        where: the checkpoint, for messages.
    """
    how = config.get("quantization_config")
    if not how:
        return None
    method = how.get("quant_method") or ("bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & how.keys() else None)
    match method:
        case "mxfp4":
            weights = mxfp4_weights
        case "fp8" | "fbgemm_fp8":
            weights = partial(scaled_weights, block=how.get("weight_block_size"))
        case "compressed-tensors" if how.get("format") in COMPRESSED and not _sparse(how):
            weights = partial(_compressed, block=_block(how))
        case "gptq" if how.get("bits") in (2, 3, 4, 8) and how.get("checkpoint_format") in ("gptq", "gptq_v2", None):
            weights = partial(gptq_weights, bits=how["bits"], first_version=how.get("checkpoint_format") != "gptq_v2")
        case "awq" if how.get("bits", how.get("w_bit")) == 4 and str(how.get("version", "gemm")).lower() == "gemm":
            weights = partial(awq_weights, bits=4)
        case "bitsandbytes":
            weights = bitsandbytes_weights
        case _:
            named = ", ".join(
                str(how[name]) for name in ("quant_method", "format", "checkpoint_format", "version", "bits") if name in how
            )
            raise UserError(
                f"{where}: its weights are quantised (quantization_config: {named or how}), in a format that ftjax does "
                f"not read; {INSTEAD}. If its tensors are not quantised, remove that field from config.json"
            )
    return lambda source: DequantisedSource(source, weights(source), without=WITHOUT)


def _compressed(source: TensorSource, block: list[int] | None) -> dict[str, Weight]:
    return scaled_weights(source, block) | packed_weights(source)


def _block(how: Mapping[str, Any]) -> list[int] | None:
    """Return rows and columns of a block of compressed-tensors, if all its groups of layers have the same."""
    groups = [(group.get("weights") or {}) for group in (how.get("config_groups") or {}).values()]
    blocks = [group["block_structure"] for group in groups if group.get("block_structure")]
    return blocks[0] if blocks and all(block == blocks[0] for block in blocks) else None


def _sparse(how: Mapping[str, Any]) -> bool:
    return (how.get("sparsity_config") or {}).get("format", "dense") not in ("dense", None)
