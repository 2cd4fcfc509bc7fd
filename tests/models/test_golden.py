"""Pins the loss and gradients of two training steps of each family: they change only on purpose.

NumPy makes the weights from Hugging Face's tensor names, independently of PyTorch and of the way in which ftjax stacks
parameters.
"""

import json
import os
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import UNLIKE
from oracle import TINY, attach_full, hf_config, one_device
from processes import ALL
from tiny_run import make_batch, make_config, run_steps

from ftjax.mesh import sharding
from ftjax.models.facts import complete_config
from ftjax.models.model import Model, build_module
from ftjax.models.nn.param import Spec
from ftjax.train.setup import Setup
from ftjax.train.step import Runtime

WRITE = bool(os.environ.get("FTJAX_WRITE_GOLDEN"))
GOLDEN = Path(__file__).with_name("golden.json")
FACTORS = (".weight", ".layer_scalar", ".scale", ".per_expert_scale")  # of norms, layers, routers and experts
NAMES = ("loss", "grad_norm", "update_norm")
MOVED = """
{case}: {name} of two training steps was {old} and is {new}.
If you did not mean to change what this model computes, look at what you changed. The other laws say whether it still is
what transformers computes. If you did mean it, or new versions of JAX or transformers round otherwise, write the new numbers
and say why in the commit:
    FTJAX_WRITE_GOLDEN=1 python -m pytest tests/models/test_golden.py
"""


def weights(spec: Spec) -> np.ndarray:
    value = np.empty(spec.shape, np.float32)
    for piece in spec.pieces():
        rng = np.random.default_rng(zlib.crc32(piece.name.encode()))
        part = rng.normal(size=value[piece.index].shape) * 0.15
        # Factors are about 1. With a factor near 0 for a layer's output, the next norm would divide by next to nothing, and
        # the gradients would differ from CPU to CPU by more than the numbers below may.
        factor = len(piece.shape) == 1 and piece.name.endswith(FACTORS)
        value[piece.index] = part + 1 if factor else part
    return value


def two_steps(case) -> dict[str, list[float]]:
    config = complete_config(hf_config(case).to_dict(), case.name)
    root = build_module(config)
    attach_full(root)
    model, mesh = Model.of(root, config), one_device()
    params = {
        path: jax.device_put(weights(spec), sharding(mesh, path, spec.shape, spec.row.axes))
        for path, spec in model.specs.items()
    }
    # A large epsilon: otherwise Adam would turn a gradient of rounding errors into a full step.
    settings = make_config(case.name, method={"name": "full"}, optimizer={"learning_rate": 1e-2, "adam_epsilon": 1e-3})
    setup = Setup(settings, mesh, model, Runtime(), source=Path(case.name), params=params)
    batches = [make_batch(4, 32, TINY["vocab_size"], seed) for seed in (0, 1)]
    metrics, _ = run_steps(setup, batches)
    return {name: [float(getattr(out, name)) for out in metrics] for name in NAMES}


# The gradients of other families are compared with transformers; these show that the step does with them what it did.
PINNED = [case for case in UNLIKE if WRITE or ALL or case.name in ("llama", "gpt-oss")]


@pytest.mark.parametrize("case", PINNED, ids=str)
def test_golden_steps(case):
    pinned = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    new = two_steps(case)
    if WRITE:
        GOLDEN.write_text(json.dumps(dict(sorted({**pinned, case.name: new}.items())), indent=1) + "\n")
        return
    assert case.name in pinned, f"{case}: no numbers are pinned yet; write them with FTJAX_WRITE_GOLDEN=1 (see {__file__})"
    for name in NAMES:
        old = pinned[case.name][name]
        assert np.allclose(new[name], old, rtol=2e-4), MOVED.format(case=case, name=name, old=old, new=new[name])


def test_nothing_is_pinned_for_nothing():
    assert set(json.loads(GOLDEN.read_text())) == {case.name for case in UNLIKE}
