"""Fills in the table of families in docs/models.md from the registry.

python scripts/models_table.py
"""

from pathlib import Path

from smallest_slice import smallest_slice

from ftjax.models.registry import FAMILIES
from ftjax.models.table import families

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
START, END = "<!-- table: scripts/models_table.py -->", "<!-- end of table -->"


def table() -> str:
    """Return the table in Markdown, a line for each family."""
    head = "| model_type | models | example | windows | experts | LoRA at 4,096 | beside the text |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for one in families():
        composite = FAMILIES[one.model_type].composite
        parts = ", ".join(f"`{prefix.removesuffix('.')}`" for prefix in composite.carried) if composite else ""
        marks = ["yes" if yes else "" for yes in (one.windows, one.experts)]
        cells = (f"`{one.model_type}`", one.notes, one.example, *marks, smallest_slice(one.model_type), parts)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(page: str, table: str) -> str:
    """Return the page with this table between the two marks."""
    before, rest = page.split(START)
    return f"{before}{START}\n{table}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), table()), encoding="utf-8")
