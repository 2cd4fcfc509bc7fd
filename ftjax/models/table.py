"""`ftjax models`: list the model families, their features and an example model."""

import dataclasses
import json
from dataclasses import dataclass

from ftjax.models.facts import complete_config
from ftjax.models.model import build_module
from ftjax.models.nn.memory import packs
from ftjax.models.nn.param import specs
from ftjax.models.nn.stack import memories
from ftjax.models.registry import FAMILIES

WITHOUT_WINDOWS = {"nemotron_h"}  # transformers has the field and does not read it


@dataclass(frozen=True)
class Support:
    """Features of a model family.

    Attributes:
        model_type: `model_type` in config.json.
        example: a Hub id.
        notes: models of the family.
        packing: whether rows may hold several documents that do not attend to each other.
        tensor_parallel: whether heads and feed-forward layers may be sharded (`mesh.tensor`).
        windows: whether layers may have a sliding window, if config.json has one.
        experts: whether (some) feed-forward layers have routed experts.
        positions: `rotary`, `learned` (a table with one row per position), or `none`.
    """

    model_type: str
    example: str
    notes: str
    packing: bool
    tensor_parallel: bool
    windows: bool
    experts: bool
    positions: str


def families() -> list[Support]:
    """Return all families by name.

    Features that depend on config.json are read from the fields of transformers' configuration classes, the others from the
    abstract model of the class's defaults: what its layers remember, and the axes of its parameters.
    """
    from transformers import CONFIG_MAPPING

    found = []
    for name, family in sorted(FAMILIES.items()):
        text = family.module if family.composite else name
        fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[text])}
        defaults = CONFIG_MAPPING[name]().to_dict()
        if "num_experts_per_tok" in defaults:  # some classes have no default for it
            defaults["num_experts_per_tok"] = defaults["num_experts_per_tok"] or 1
        if defaults.get("layer_types", ()) is None:  # or for these
            defaults["layer_types"] = ["full_attention"] * defaults["num_hidden_layers"]
        root = build_module(complete_config(defaults, name))
        axes = {axis for spec in specs(root).values() for axis in spec.row.axes}
        found.append(
            Support(
                name,
                family.example,
                family.notes,
                packing=packs(memories(root)),
                tensor_parallel={"heads", "mlp"} <= axes,
                windows="sliding_window" in fields and name not in WITHOUT_WINDOWS,
                experts=not fields.isdisjoint({"num_experts_per_tok", "top_k_experts"}),
                positions="rotary" if "rope_parameters" in fields else "none" if root.max_positions is None else "learned",
            )
        )
    return found


def show(*, as_json: bool) -> None:
    """Print the families as a table or as a JSON list."""
    if as_json:
        print(json.dumps([dataclasses.asdict(family) for family in families()], indent=2))
        return
    from ftjax.console import make_console, print_table, say

    def mark(yes: bool) -> str:
        return "yes" if yes else "-"

    head = ("model_type", "example", "packing", "tensor", "windows", "experts", "positions", "models")
    rows = []
    for family in families():
        marks = (family.packing, family.tensor_parallel, family.windows, family.experts)
        rows.append((family.model_type, family.example, *map(mark, marks), family.positions, family.notes))
    console = make_console()
    print_table(console, head, rows, left=range(len(head)))
    say(
        console,
        "\nAny model on the Hub with one of these in its config.json works. packing: several documents in one row; tensor: "
        "mesh.tensor; windows: sliding windows where config.json has them; experts: routed experts.",
    )
