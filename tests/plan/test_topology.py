"""Tests the names of slices, and the messages for unknown ones."""

import pytest

from ftjax.errors import UserError
from ftjax.plan.topology import parse


@pytest.mark.parametrize(
    "name, options, shape, slices",
    [
        ("v5e-16", {}, (4, 4), 1),
        ("v5litepod-16", {}, (4, 4), 1),
        ("v5e-256", {}, (16, 16), 1),
        ("v5e:4x8", {}, (4, 8), 1),
        ("v5e", {"chips": 8, "slices": 4}, (2, 4), 4),
        ("v6e-8", {}, (2, 4), 1),
        ("v6e-1", {}, (1, 1), 1),
        ("v4-16", {}, (2, 2, 2), 1),  # TensorCores, two to a chip
        ("v5p-64", {}, (2, 4, 4), 1),
        ("v5p", {"chips": 64}, (4, 4, 4), 1),
        ("v5p-12288", {}, (16, 16, 24), 1),
        ("tpu7x-16", {}, (2, 2, 2), 1),
        ("cpu:8", {}, (8,), 1),
    ],
)
def test_names(name, options, shape, slices):
    topology = parse(name, **options)
    assert (topology.shape, topology.slices) == (shape, slices)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("v5e", {}, "lacks a size"),
        ("v5e-3", {}, "no slice of 3 chips; there are v5e-1, v5e-4, v5e-8"),
        ("v5p-3", {}, "no slice of 3 TensorCores, two per chip"),
        ("v9-8", {}, "expected a TPU version and a size"),
        ("two chips", {}, "expected a TPU version and a size"),
        ("v5e:4x4x4", {}, "slice has 2 dimensions"),
        ("v5e-16", {"chips": 8}, "give one of them"),
        ("cpu:8", {"slices": 2}, "slices are of TPUs"),
    ],
)
def test_names_that_are_none(name, options, message):
    with pytest.raises(UserError, match=message):
        parse(name, **options)


def test_rings():
    """Links form rings in a full pod of v5e, and in slices of whole cubes."""
    assert [parse("v5e-256").wraps(i) for i in (0, 1)] == [True, True]
    assert not parse("v5e-128").wraps(0) and parse("v5e-128").wraps(1)
    assert parse("v5p-128").wraps(0) and not parse("v5p-64").wraps(1)


@pytest.mark.parametrize(
    "name, devices, hosts",
    [("v5e-8", 8, 1), ("v6e-16", 16, 4), ("v5p-16", 8, 2), ("v4-8", 4, 1), ("v6e-1", 1, 1), ("tpu7x-8", 8, 1)],
)
def test_libtpu_knows_them(name, devices, hosts):
    pytest.importorskip("libtpu", reason="planning for TPUs needs libtpu")
    found = parse(name).devices()
    assert len(found) == devices and len({device.process_index for device in found}) == hosts


def test_slices_and_shapes_that_libtpu_refuses():
    pytest.importorskip("libtpu", reason="planning for TPUs needs libtpu")
    assert {device.slice_index for device in parse("v5e-8", slices=2).devices()} == {0, 1}
    with pytest.raises(UserError, match="libtpu knows no such topology"):
        parse("v5e:3x3").devices()
