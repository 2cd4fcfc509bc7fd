"""Full fine-tuning: the base model's weights train, as float32 masters; all of them, or those that are named."""

import re

from flax import nnx

from ftjax.config import FullConfig
from ftjax.errors import UserError
from ftjax.methods.method import Method
from ftjax.methods.parted import layer_of, part_stacks, stacks
from ftjax.methods.save import train
from ftjax.methods.walk import describe
from ftjax.models.nn.layers import LayerNorm, RMSNorm
from ftjax.models.nn.param import Piece, Spec, specs, variables


def attach(root: nnx.Module, config: FullConfig) -> None:
    """Mark the trained parameters, in place. Layers with different trained parts are stacked separately.

    Raises UserError for a pattern that matches no parameter, and if nothing would train.
    """
    chosen = _chosen(root, config)
    part_stacks(root, chosen)
    trained = {path for path, spec in specs(root).items() if any(piece.name in chosen for piece in spec.pieces())}
    for path, variable in variables(root):
        if path in trained:
            train(variable)


def _chosen(root: nnx.Module, config: FullConfig) -> set[str]:
    """Return the Hugging Face names of the trained parameters."""
    rows = [(spec, piece) for spec in specs(root).values() if not spec.row.constant for piece in spec.pieces()]
    names = {piece.name for _, piece in rows}
    if not config.partial:
        return names
    chosen = set().union(*(_named(root, rows, pattern, "train") for pattern in config.train or ()))
    if config.last_layers is not None:
        depth = max(len(stack.kinds) for _, stack in stacks(root))
        if config.last_layers > depth:
            raise UserError(f"method.last_layers: {config.last_layers} is more than the {depth} layers of this model")
        chosen |= {piece.name for spec, piece in rows if spec.stacked and layer_of(spec, piece) >= depth - config.last_layers}
    elif config.train is None:
        chosen = names
    for pattern in config.freeze:
        chosen = chosen - _named(root, rows, pattern, "freeze")
    if not chosen:
        raise UserError("method: train, last_layers and freeze leave nothing to train")
    return chosen


def _named(root: nnx.Module, rows: list[tuple[Spec, Piece]], pattern: str, option: str) -> set[str]:
    """Return the parameters that one entry of `train` or `freeze` names."""
    if pattern == "norms":
        norms = {".".join(map(str, path)) for path, node in nnx.iter_graph(root) if isinstance(node, RMSNorm | LayerNorm)}
        found = {piece.name for spec, piece in rows if spec.path.rpartition(".")[0] in norms}
    elif pattern == "biases":
        found = {piece.name for spec, piece in rows if spec.row.name.endswith("bias")}
    else:
        try:
            found = {piece.name for _, piece in rows if re.search(pattern, piece.name)}
        except re.error as error:
            raise UserError(f"method.{option}: {pattern!r} is not a regular expression: {error}") from None
    if not found:
        raise UserError(
            f"method.{option}: {pattern!r} matches no parameter; the model has {describe(piece.name for _, piece in rows)}"
        )
    return found


METHOD = Method(FullConfig, attach, adapter=False)
