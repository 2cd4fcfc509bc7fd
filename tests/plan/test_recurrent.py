"""Tests what linear attention and Mamba-2 compile to for a TPU: loops over chunks, not over tokens, with states of float32, and
products of float32, which are convolutions in a TPU program."""

import json
import math
import re
from collections.abc import Iterator

import pytest
from oracle import Case, hf_config
from tiny_run import make_config

from ftjax.models.nn.decays import CHUNK
from ftjax.plan.hlo import Program
from ftjax.plan.plan import design_for, trace_step
from ftjax.plan.topology import parse

LENGTH = 6 * CHUNK
CASES = [
    Case("qwen3.5", "qwen3_5_text", {
        "head_dim": 16, "num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }),
    Case("bamba", "bamba", {
        "num_hidden_layers": 3, "attn_layer_indices": [2], "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 24,
        "mamba_d_head": 16,
    }),
]  # fmt: skip
# Sizes of the letters of `ftjax.models.nn.delta_rule` and `ssd`: C tokens, keys and values (D, V) or state and head (H, D).
HEADS, GROUPS, C = 4, 2, CHUNK
SIZES = {"qwen3.5": (16, 24), "bamba": (24, 16)}


def flops_of_a_chunk(name: str, keys: int, values: int) -> tuple[int, int]:
    """Return the FLOPs of the products of a chunk, in the forward pass and in its gradient.

    A product has two gradients. Those of the decays have one, and the inverse of a triangular matrix, which takes two products
    for each doubling but the first, has a rule of two.
    """
    decays, square = 2 * C * C * HEADS, 2 * C * C
    if name == "bamba":
        # b c^T, once for each group; the values of the chunk; what is read of the state, and what is added to it
        found = square * keys * GROUPS + square * values * HEADS + 2 * (2 * C * keys * values * HEADS)
        return decays + found, decays + 2 * found
    inverse = 2 * (int(math.log2(C)) - 1) * square * C * HEADS
    # k k^T and q k^T; own and held values of the system, and the values read; the state is read twice and written once
    found = 2 * square * keys * GROUPS + square * (2 * values + keys) * HEADS + 3 * (2 * C * keys * values * HEADS)
    return decays + inverse + found, decays + 2 * square * C * HEADS + 2 * found


def products(program: Program) -> Iterator[tuple[str, float]]:
    """Yield the line of every product of float32, and its FLOPs over all runs.

    Batch dimensions of a product are dimensions of the convolution's window that are as far apart as the window is wide.
    """
    lines = {line.partition(" = ")[0].split()[-1].lstrip("%"): line for line in program.text.splitlines() if " = " in line}

    def shape(name: str) -> list[int]:
        return [int(size) for size in re.search(r" = \w+\[([\d,]*)\]", lines[name])[1].split(",") if size]

    def inside(name: str, runs: float) -> Iterator[tuple[str, float]]:
        for one in program.computations[name].values():
            if one.opcode == "fusion":
                yield from inside(one.called("calls"), runs)
            elif one.opcode in ("convolution", "dot") and " = f32[" in lines[one.name]:
                line = lines[one.name]
                right = re.search(r"dim_labels=\w+_(\w+)->", line)[1]
                window = {
                    key: found[1].split("x") for key in ("size", "lhs_dilate") if (found := re.search(rf"{key}=([\dx]+)", line))
                }
                apart = window.get("lhs_dilate", [])
                summed = [int(n) for place, n in enumerate(window.get("size", [])) if apart[place : place + 1] != [n]]
                sizes = shape(one.name), [shape(one.operands[1])[right.index("i")], *summed]
                yield line, runs * 2 * math.prod(sizes[0]) * math.prod(sizes[1])

    for name, runs in program.runs.items():
        yield from inside(name, runs)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")  # of chips that are not there
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_training_step_on_a_tpu(case, tmp_path):
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")
    config = hf_config(case).to_dict() | {"max_position_embeddings": LENGTH}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = make_config(tmp_path, method={"name": "full"}, mesh={"data": 1, "fsdp": 1}, global_batch_size=1)
    model = run.model.model_copy(update={"compute_dtype": "bfloat16", "dtype": "bfloat16"})
    run = run.model_copy(update={"model": model, "data": run.data.model_copy(update={"max_length": LENGTH})})
    made = design_for(run, parse("v5e-1"))
    traced, _ = trace_step(made)
    program = Program.of(traced.lower().compile(), made.mesh)
    loops = [
        (instruction, program.trip_count(instruction))
        for name in program.runs
        for instruction in program.computations[name].values()
        if instruction.opcode == "while"
    ]
    assert max(count for _, count in loops) < LENGTH // 8, "no loop over tokens"
    over_chunks = [loop for loop, count in loops if count == LENGTH // CHUNK]
    assert len(over_chunks) >= 2, "forward and backward"

    # The state goes from chunk to chunk in float32.
    keys, values = SIZES[case.name]
    for loop in over_chunks:
        [line] = re.findall(rf"%{re.escape(loop.name)} = (.*) while\(", program.text)
        carried = [(dtype, math.prod(map(int, dims.split(",")))) for dtype, dims in re.findall(r"(\w+)\[([\d,]+)\]", line)]
        assert {dtype for dtype, size in carried if size == HEADS * keys * values} == {"f32"}, line

    # In the two layers, what the chunks compute are products of the matrix unit, as many as the algorithm has.
    found = {True: 0.0, False: 0.0}
    for line, flops in products(program):
        found["transpose(" in line] += flops
    chunks = 2 * LENGTH // CHUNK
    forward, backward = (chunks * flops for flops in flops_of_a_chunk(case.name, keys, values))
    assert found == {False: forward, True: backward}
