"""Tests what linear attention and Mamba-2 compile to for a TPU: matrix products, and loops over chunks, not over tokens."""

import json
import re

import pytest
from oracle import Case, hf_config
from tiny_run import make_config

from ftjax.models.nn.decays import CHUNK
from ftjax.plan.hlo import Program
from ftjax.plan.plan import design_for, trace_step
from ftjax.plan.topology import parse

LENGTH = 6 * CHUNK
PRODUCTS = ("convolution", "dot")  # a TPU's matrix units do both, and its compiler calls them convolutions
CASES = [
    (
        Case("qwen3.5", "qwen3_5_text", {
            "head_dim": 16, "num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        }),
        {2, 16, 24},  # key heads, value heads per key head, key size, value size
    ),
    (
        Case("bamba", "bamba", {
            "num_hidden_layers": 3, "attn_layer_indices": [2], "mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_d_state": 24,
            "mamba_d_head": 16,
        }),
        {2, 16, 24},
    ),
]  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("case, state", CASES, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_the_training_step_on_a_tpu(case, state, tmp_path):
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
    carried = "".join(re.search(rf"%{re.escape(loop.name)} = (.*?) while\(", program.text)[1] for loop in over_chunks)
    arrays = re.findall(r"(\w+)\[([\d,]+)\]", carried)
    states = {dtype for dtype, sizes in arrays if sorted(size for size in sizes.split(",") if size != "1") == state}
    assert states == {"f32"}, "the state is in float32"
    products = [i for name in program.computations for i in program.computations[name].values() if i.opcode in PRODUCTS]
    inside = [i for loop in over_chunks for i in program.with_fused(loop.called("body")) if i.opcode in PRODUCTS]
    assert len(products) > 20 and inside, "matrix products, between chunks too"
