"""Tests that docs/models.md has the table that the registry gives."""

from models_table import PAGE, filled, table


def test_the_table_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert page == filled(page, table()), "run python scripts/models_table.py"
