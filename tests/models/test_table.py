"""Tests what `ftjax models` says of each family."""

import json

import pytest
from cases import CASES
from flax import nnx
from oracle import hf_config

from ftjax.models.facts import complete_config
from ftjax.models.model import build_module
from ftjax.models.nn.stack import Stack
from ftjax.models.registry import FAMILIES
from ftjax.models.table import families, show


@pytest.mark.parametrize("family", families(), ids=lambda family: family.model_type)
def test_the_table_is_true(family):
    """The table agrees with the cases of the family and of its text model, in which each feature is on at least once."""
    windows, experts, learned = set(), set(), set()
    entry = FAMILIES[family.model_type]
    names = {family.model_type, entry.module} if entry.composite else {family.model_type}
    for case in CASES:
        if case.model_type not in names:
            continue
        root = build_module(complete_config(hf_config(case).to_dict(), case.name))
        (stack,) = [node for _, node in nnx.iter_graph(root) if isinstance(node, Stack)]
        windows.add("window=" in str(stack.kinds).replace("window=None", ""))
        experts.add(any("experts" in leaf.row.axes for _, leaf in nnx.iter_graph(root) if isinstance(leaf, nnx.Param)))
        learned.add(root.max_positions is not None)
    assert (family.windows, family.experts) == (any(windows), any(experts))
    assert learned == {family.positions == "learned"}


def test_both_ways_of_printing_list_all(capsys):
    show(as_json=True)
    found = {row["model_type"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(found) == set(FAMILIES) and found["mixtral"]["experts"] and not found["gpt2"]["windows"]
    show(as_json=False)
    lines = capsys.readouterr().out.splitlines()
    for name, family in FAMILIES.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert family.example in line and family.notes in line
