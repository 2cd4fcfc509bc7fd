"""The interface of a model to the rest of ftjax: a static structure and a flat dict of arrays.

Modules are built abstract and split once; after that everything is a pure function of `{path: array}`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from ftjax import tree
from ftjax.models.branches import branches
from ftjax.models.causal_lm import CausalLM, Sizes
from ftjax.models.classifier import classes_of, to_classifier
from ftjax.models.facts import Facts
from ftjax.models.inside import put_inside, text_facts
from ftjax.models.nn.memory import Memory
from ftjax.models.nn.param import Buffer, Spec, specs, variables
from ftjax.models.nn.rope import Rope, unread
from ftjax.models.nn.stack import is_separate, memories
from ftjax.models.registry import FAMILIES, check_supported


@dataclass(frozen=True)
class Model:
    """An abstract model, ready to be bound to arrays.

    Attributes:
        config: config.json, completed by transformers.
        specs: the spec of every parameter, by path.
        buffers: arrays that are neither loaded nor trained (LoRA scales), by path.
        sizes, ignored, carried, output, ropes, notes, max_positions: attributes of the root module
            (`ftjax.models.causal_lm.CausalLM`).
        embedding: the spec of the input embedding `[V, E]`.
        memories: memory records of each layer, for decoding.
        branches: whether documents of a row may share their start (`ftjax.models.nn.context.Branching`).
    """

    config: Mapping[str, Any]
    specs: Mapping[str, Spec]
    buffers: Mapping[str, np.ndarray]
    graphdef: Any
    treedef: Any
    order: tuple[str, ...]
    sizes: Sizes
    embedding: Spec
    memories: tuple[tuple[Memory, ...], ...]
    branches: bool
    output: str
    ignored: tuple[str, ...]
    carried: tuple[str, ...]
    ropes: tuple[Rope, ...]
    notes: tuple[str, ...]
    max_positions: int | None

    @classmethod
    def of(cls, module: CausalLM, config: Mapping[str, Any]) -> "Model":
        """Split a module with abstract parameters into structure and specs."""
        graphdef, state = nnx.split(module)
        found = dict(variables(module))
        order = tuple(".".join(map(str, path)) for path, _ in nnx.to_flat_state(state))
        buffers = {path: np.asarray(v.get_value()) for path, v in found.items() if isinstance(v, Buffer)}
        rows = specs(module)
        [embedding] = (spec for spec in rows.values() if spec.hf_template == f"{module.embedding}.weight")
        return cls(
            config, rows, buffers, graphdef, jax.tree.structure(state), order, sizes=module.sizes, embedding=embedding,
            memories=memories(module), branches=branches(module, module.ropes), output=module.output, ignored=module.ignored,
            carried=module.carried, ropes=module.ropes, notes=module.notes, max_positions=module.max_positions,
        )  # fmt: skip

    def bind(self, params: Mapping[str, jax.Array]) -> Any:
        """Return the module with these arrays as parameters, some of them `Separate`; for use inside jit."""
        leaves = [self.buffers[path] if path in self.buffers else params[path] for path in self.order]
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, jax.tree.leaves(leaves, is_leaf=is_separate)))

    @property
    def trainable(self) -> dict[str, Spec]:
        return tree.split(self.specs, lambda path: self.specs[path].row.trainable)[0]

    @property
    def frozen(self) -> dict[str, Spec]:
        return tree.split(self.specs, lambda path: self.specs[path].row.trainable)[1]


def note_unread(facts: Facts) -> None:
    """Add a note for each RoPE parameter that has no effect."""
    ropes = facts.get("rope_parameters") or {}
    nested = [value for value in ropes.values() if isinstance(value, Mapping)]
    for key in sorted({key for one in nested or [ropes] for key in unread(one)} - facts.read_in_rope):
        facts.note(
            f"config.json of this {facts.model_type} model has {key} in its RoPE parameters, which transformers ignores too"
        )


def build_module(config: Mapping[str, Any]) -> CausalLM:
    """Build the abstract module of a completed config.json (`ftjax.models.facts`); every field is honoured or rejected."""
    whole = Facts(config)
    composite = FAMILIES[whole.model_type].composite
    facts = whole if composite is None else text_facts(whole, composite)
    if composite is None or facts.model_type != FAMILIES[whole.model_type].module:  # some text models occur only inside
        check_supported(facts.model_type, "config.json")
    module = FAMILIES.get(facts.model_type, FAMILIES[whole.model_type]).build(facts)
    facts.finish()
    note_unread(facts)
    if composite is not None:
        whole.finish()
        module = put_inside(module, facts, composite)
        facts.carried += composite.carried
    if classes_of(config):
        to_classifier(module, config)
    module.notes, module.max_positions, module.carried = tuple(facts.notes), facts.max_positions, tuple(facts.carried)
    return module
