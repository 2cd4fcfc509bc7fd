"""Tests that docs/models.md has the table that the registry gives."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_up_to_date(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    from models_table import PAGE, filled, table

    page = PAGE.read_text(encoding="utf-8")
    assert page == filled(page, table()), "run python scripts/models_table.py"
