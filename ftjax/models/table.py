"""`ftjax models`: the families, what each supports, and a model of each to try."""

import dataclasses
import json
from dataclasses import dataclass

from ftjax.models.registry import FAMILIES


@dataclass(frozen=True)
class Support:
    """A family, as a person who chooses a model wants to know it.

    Attributes:
        model_type: what config.json says.
        example: a Hub id.
        notes: which models these are.
        packing: several documents in one row, none of which sees another.
        tensor_parallel: heads and feed-forward layers may be spread over devices (`mesh.tensor`).
        windows: layers may see a window of the text, if config.json says so.
        experts: routed experts in place of (some) feed-forward layers.
        positions: `rotary`, or `learned` in a table as long as the longest text.
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
    """All families by name. What config.json can ask for is read off transformers' configuration classes; packing and
    tensor parallelism are laws that every family keeps."""
    from transformers import CONFIG_MAPPING

    found = []
    for name, family in sorted(FAMILIES.items()):
        fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[name])}
        found.append(
            Support(
                name,
                family.example,
                family.notes,
                packing=True,
                tensor_parallel=True,
                windows="sliding_window" in fields,
                experts="num_experts_per_tok" in fields,
                positions="rotary" if "rope_parameters" in fields else "learned",
            )
        )
    return found


def show(*, as_json: bool) -> None:
    """Print the table, for people or as a JSON list."""
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
