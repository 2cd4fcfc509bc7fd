"""Tests that a plan describes the step that will run, and that its figures are right."""

import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from oracle import Case, make_hf
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tiny_run import make_batch, make_config
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ftjax.cli import app
from ftjax.console import make_console
from ftjax.errors import UserError
from ftjax.flops import train_flops
from ftjax.generate import separate
from ftjax.generate.open import mesh_of
from ftjax.generate.paged import PagedBatch, Room
from ftjax.generate.session import Generator
from ftjax.mesh import spec
from ftjax.plan.arithmetic import program_flops
from ftjax.plan.hlo import Program
from ftjax.plan.plan import design_for, make_plan, trace_step
from ftjax.plan.result import as_json, from_json
from ftjax.plan.rollout import plan_rollouts
from ftjax.plan.roofline import traffic
from ftjax.plan.serve import as_json as serving_json
from ftjax.plan.serve import plan_serving
from ftjax.plan.shardings import shardings
from ftjax.plan.shards import shard_bytes
from ftjax.plan.show import show
from ftjax.plan.topology import parse
from ftjax.rl.apart import RolloutDevices
from ftjax.rl.sampler import Sampler
from ftjax.train.setup import compile_steps, prepare
from ftjax.train.step import init_state

METHODS = {"lora": {"name": "lora", "r": 4, "lora_alpha": 8}, "full": {"name": "full"}}
BFLOAT16 = {"param_dtype": "bfloat16", "state_dtype": "bfloat16"}
CPUS = parse("cpu:8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_hf(Case("llama", "llama", {"intermediate_size": 64}), folder)
    return folder


@pytest.fixture(scope="module")
def bare(folder, tmp_path_factory):
    """Return a folder with nothing but the same model's config.json."""
    bare = tmp_path_factory.mktemp("bare")
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    return bare


def sized(folder, **values):
    """Return config.json with other sizes."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


@pytest.fixture
def wide(bare, tmp_path):
    """Return a model whose arithmetic is nearly all matrix products."""
    (tmp_path / "config.json").write_bytes((bare / "config.json").read_bytes())
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1, "vocab_size": 512, "head_dim": 128}
    return sized(tmp_path, **sizes)


@pytest.mark.parametrize("method", METHODS)
def test_the_planned_step_is_the_one_that_runs(folder, bare, method):
    """Arguments agree in shape, dtype and sharding, adapters included, and so do the programs' FLOPs."""
    options = {
        "method": METHODS[method],
        "mesh": {"data": 2, "fsdp": 4},
        "gradient_accumulation_steps": 2,
        "global_batch_size": 16,
    }
    planned, inputs = trace_step(design_for(make_config(bare, **options), CPUS))
    setup = prepare(make_config(folder, **options))
    step, _, optimizer, _ = compile_steps(setup, 1000)
    where = NamedSharding(setup.mesh, spec((None, "batch", "length")))
    batch = {name: jax.device_put(rows.reshape(2, 8, 32), where) for name, rows in make_batch(16, 32, 96).items()}
    real = (init_state(setup.params, optimizer), setup.frozen, batch, jax.random.key(0), np.float32(1))
    assert jax.tree.structure(inputs) == jax.tree.structure(real)
    for ours, theirs in zip(jax.tree.leaves(inputs[:3]), jax.tree.leaves(real[:3]), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, len(ours.shape))
    with jax.set_mesh(setup.mesh):
        assert program_flops(planned) == program_flops(step.trace(*real))
    adapters = [path for path in inputs[0].params if path.endswith(("lora_A", "lora_B"))]
    assert len(adapters) == (14 if method == "lora" else 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("named", ["run", "run/final", "run/best", "alone"])
def test_an_adapter_brings_its_rows_and_its_output(tmp_path, tied, named):
    """With `method.adapter_path` (a run or a PEFT folder) the plan has the run's arrays: 98 rows, not 96, and for a tied model
    the output that the adapter trains separately."""
    base = tmp_path / "base"
    make_hf(Case("llama", "llama", {"intermediate_size": 64, "tie_word_embeddings": tied}), base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(98, mean_resizing=False)
    warnings.simplefilter("ignore")  # PEFT warns about untying weights
    lora = PeftLoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    result = tmp_path / ("alone" if named == "alone" else "run/best" if named == "run/best" else "run/final")
    get_peft_model(model, lora).save_pretrained(result)
    if named != "alone":
        (tmp_path / "run" / "config.yaml").write_text(f"model: {{path: {base}}}\ndata: {{train: a.jsonl}}\n")
    config = make_config(base, method={"name": "lora", "adapter_path": str(tmp_path / named)}, mesh={"data": 8})
    planned, run = design_for(config, CPUS).model.specs, prepare(config)
    real = {**run.params, **run.frozen}
    assert {name: spec.shape for name, spec in planned.items()} == {name: array.shape for name, array in real.items()}
    assert sum(98 in array.shape for array in real.values()) == 2


def test_an_adapter_of_a_run_without_a_result(folder, tmp_path):
    (tmp_path / "config.yaml").write_text(f"model: {{path: {folder}}}\ndata: {{train: a.jsonl}}\n")
    config = make_config(folder, method={"name": "lora", "adapter_path": str(tmp_path)}, mesh={"data": 8})
    for use in (lambda: design_for(config, CPUS), lambda: prepare(config)):
        with pytest.raises(UserError, match=r"method\.adapter_path: .*this run has no final/ yet"):
            use()


def test_added_rows_are_counted(bare):
    config = make_config(bare, method=METHODS["full"], mesh={"data": 8})
    config = config.model_copy(update={"model": config.model.model_copy(update={"pad_vocab_to_multiple_of": 64})})
    sizes = {spec.shape[0] for spec in design_for(config, CPUS).model.specs.values() if spec.row.axes[:1] == ("vocab",)}
    assert sizes == {128}


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_that_xla_counts(wide, method, remat):
    """XLA counts each loop body once; with one layer and one chunk that is everything. It also counts elementwise
    operations."""
    config = make_config(wide, method=METHODS[method], global_batch_size=1)
    model = config.model.model_copy(update={"remat": remat, "attention": "xla"})
    config = config.model_copy(update={"model": model, "data": config.data.model_copy(update={"max_length": 512})})
    traced, _ = trace_step(design_for(config, parse("cpu:1")))
    assert program_flops(traced) == pytest.approx(traced.lower().cost_analysis()["flops"], rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_of_the_closed_form(wide, method):
    """FLOPs are 6 N per token if everything trains and 4 N for adapters, plus attention to every key: `xla` computes masked
    ones too.

    With sixteen layers, the gradient of the first one's input, which adapters do not need, is small.
    """
    config = make_config(sized(wide, num_hidden_layers=16), method=METHODS[method])
    config = config.model_copy(update={"model": config.model.model_copy(update={"attention": "xla"})})
    made = design_for(config, parse("cpu:1"))
    needed, length = train_flops(made.model), config.data.max_length
    each = 4 * needed.matrices + 2 * needed.trained + 12 * sum(needed.attention.values()) * length
    want = each * config.training.global_batch_size * length
    assert program_flops(trace_step(made)[0]) == pytest.approx(want, rel=0.02)


def test_flops_of_loops(wide):
    """Layers, chunks of the loss and microbatches count once per iteration."""

    def flops(layers: int, micro: int = 1, chunk: int = 1024):
        config = make_config(sized(wide, num_hidden_layers=layers), gradient_accumulation_steps=micro)
        config = config.model_copy(update={"objective": config.objective.model_copy(update={"loss_chunk": chunk})})
        return program_flops(trace_step(design_for(config, parse("cpu:1")))[0])

    two, three, six = (flops(layers) for layers in (2, 3, 6))
    assert six - two == pytest.approx(4 * (three - two), rel=1e-9)
    assert flops(2, micro=4) == pytest.approx(two, rel=1e-9)
    assert flops(2, chunk=64) == pytest.approx(two, rel=1e-9)


def test_flops_of_branches_and_shards():
    x = jnp.zeros((8, 16))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x.T, lambda x: (x @ x.T) @ (x @ x.T), x)

    def shards(x):
        return jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))(x)

    assert program_flops(jax.jit(branches).trace(x)) == 2 * 2 * 8 * 8 * 16 + 2 * 8 * 8 * 8
    assert program_flops(jax.jit(shards).trace(x)) == 8 * 2 * 16


def test_collectives_of_fully_sharded_parameters(wide):
    """Each weight is gathered twice, once forward and once backward, adapters included; only gradients of adapters are reduced;
    the loss moves hidden states and the projection once. All agree with closed forms within 5 %."""
    config = make_config(sized(wide, num_hidden_layers=3, vocab_size=256), mesh={"fsdp": 8}, global_batch_size=8)
    config = config.model_copy(update={"model": config.model.model_copy(update={"remat": "full"})})
    made = design_for(config, CPUS)
    traced, _ = trace_step(made)
    rows = traffic(Program(traced.lower().compile().as_text(), 8).transfers(), made.mesh, CPUS)
    found = {row.kind: row.ici_bytes for row in rows}
    assert all(row.axes == ("fsdp",) for row in rows)
    specs = made.model.specs
    size = {path: 4 * spec.size for path, spec in specs.items() if "layers.block" in path and len(spec.shape) == 3}
    hidden = 4 * 8 * 32 * 512
    gathered = 7 / 8 * (2 * sum(size.values()) + hidden)
    adapters = 7 / 8 * sum(bytes for path, bytes in size.items() if specs[path].row.trainable)
    assert found["all-gather"] == pytest.approx(gathered, rel=0.05)
    reduced = found.get("all-reduce", 0) + found.get("reduce-scatter", 0)
    assert adapters * 0.95 <= reduced <= 2 * 1.05 * (adapters + 7 / 8 * hidden)


def test_collectives_of_experts(tmp_path):
    """Along `expert` rows travel to the devices of their experts and back by all-to-all (test_exchange.py counts them). Dense
    weights, sharded there too, are gathered twice. The loss gathers the tokens once, because the projection is sharded over the
    vocabulary; the embedding gathers ids."""
    make_hf(Case("mixtral", "mixtral", {"num_local_experts": 4}), tmp_path)
    method = {"name": "lora", "r": 4, "target_modules": ["q_proj"]}
    config = make_config(tmp_path, method=method, mesh={"data": 2, "fsdp": 1, "expert": 4})
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 256})})
    made = design_for(config, CPUS)
    traced, _ = trace_step(made)
    rows = traffic(Program(traced.lower().compile().as_text(), 8).transfers(), made.mesh, CPUS)
    found = {row.kind: row.ici_bytes for row in rows if row.axes == ("expert",)}
    specs, group = made.model.specs, 4 * 256  # a row on each of the four devices of a group
    hidden = 4 * group * made.model.config["hidden_size"]
    dense = sum(4 * math.prod(spec.shape) for path, spec in specs.items() if "self_attn" in path)  # sharded along `expert` too
    loss = hidden + 3 * 4 * group  # with targets and weights; and the ids
    assert found["all-gather"] == pytest.approx(3 / 4 * (2 * dense + loss), rel=0.02)
    assert found["all-to-all"] > 0 and "reduce-scatter" not in found


def test_loops_whose_counter_goes_by_more_than_one():
    """Eight iterations run two at a time, as the partitioner writes its loops of permutes."""
    text = """
%condition (p: (u32[], f32[8])) -> pred[] {
  %p = (u32[], f32[8]{0}) parameter(0)
  %number = u32[] get-tuple-element(%p), index=0
  %bound = u32[] constant(8)
  ROOT %less = pred[] compare(%number, %bound), direction=LT
}

%body (p.1: (u32[], f32[8])) -> (u32[], f32[8]) {
  %p.1 = (u32[], f32[8]{0}) parameter(0)
  %number.1 = u32[] get-tuple-element(%p.1), index=0
  %x = f32[8]{0} get-tuple-element(%p.1), index=1
  %one = u32[] constant(1)
  %next = u32[] add(%number.1, %one)
  %after = u32[] add(%next, %one)
  %moved = f32[8]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %results = (u32[], f32[8]{0}) tuple(%after, %moved)
}

ENTRY %main (start: (u32[], f32[8])) -> (u32[], f32[8]) {
  %start = (u32[], f32[8]{0}) parameter(0)
  ROOT %loop = (u32[], f32[8]{0}) while(%start), condition=%condition, body=%body
}
"""
    assert [(transfer.runs, transfer.bytes) for transfer in Program(text, 2).transfers()] == [(4, 4 * 32)]
    by_one = text.replace("tuple(%after", "tuple(%next")
    assert [transfer.runs for transfer in Program(by_one, 2).transfers()] == [8]


def test_a_fusion_inside_of_another_reads_what_it_slices():
    """A nested fusion that slices a stack reads the slice; one that only reshapes reads everything."""
    text = """
%sliced (stack: f32[32,64], at: s32[]) -> f32[1,64] {
  %stack = f32[32,64]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = f32[1,64]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,64}
}

%turned (flat: f32[64]) -> f32[64,1] {
  %flat = f32[64]{0} parameter(0)
  ROOT %same = f32[64,1]{1,0} bitcast(%flat)
}

%product (stack.1: f32[32,64], at.1: s32[], flat.1: f32[64]) -> f32[1,1] {
  %stack.1 = f32[32,64]{1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %flat.1 = f32[64]{0} parameter(2)
  %left = f32[1,64]{1,0} fusion(%stack.1, %at.1), kind=kLoop, calls=%sliced
  %right = f32[64,1]{1,0} fusion(%flat.1), kind=kLoop, calls=%turned
  ROOT %dot = f32[1,1]{1,0} dot(%left, %right), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (stack.2: f32[32,64], at.2: s32[], flat.2: f32[64]) -> f32[1,1] {
  %stack.2 = f32[32,64]{1,0} parameter(0)
  %at.2 = s32[] parameter(1)
  %flat.2 = f32[64]{0} parameter(2)
  ROOT %out = f32[1,1]{1,0} fusion(%stack.2, %at.2, %flat.2), kind=kOutput, calls=%product
}
"""
    assert Program(text, 1).hbm_bytes() == 4 * (64 + 1 + 64 + 1)


def test_what_is_overwritten_in_place_and_branches_that_are_not_taken():
    """A scatter into a buffer writes its updates; a conditional that usually does nothing may count as nothing."""
    text = """
%put (pages: f32[512,64], at: s32[3,1], new: f32[3,64]) -> f32[512,64] {
  %pages = f32[512,64]{1,0} parameter(0)
  %at = s32[3,1]{1,0} parameter(1)
  %new = f32[3,64]{1,0} parameter(2)
  ROOT %after = f32[512,64]{1,0} scatter(%pages, %at, %new), update_window_dims={1}, to_apply=%last
}

%same (x: f32[512,64]) -> f32[512,64] {
  ROOT %x = f32[512,64]{1,0} parameter(0)
}

%negative (y: f32[512,64]) -> f32[512,64] {
  %y = f32[512,64]{1,0} parameter(0)
  ROOT %minus = f32[512,64]{1,0} negate(%y)
}

ENTRY %main (pages.1: f32[512,64], at.1: s32[3,1], new.1: f32[3,64], which: pred[]) -> f32[512,64] {
  %pages.1 = f32[512,64]{1,0} parameter(0)
  %at.1 = s32[3,1]{1,0} parameter(1)
  %new.1 = f32[3,64]{1,0} parameter(2)
  %which = pred[] parameter(3)
  %put.1 = f32[512,64]{1,0} fusion(%pages.1, %at.1, %new.1), kind=kLoop, calls=%put
  ROOT %out = f32[512,64]{1,0} conditional(%which, %put.1, %put.1), true_computation=%same, false_computation=%negative
}
"""
    written = 4 * (3 + 2 * 3 * 64)
    assert Program(text, 1).hbm_bytes(min) == written
    assert Program(text, 1).hbm_bytes() == written + 4 * 2 * 512 * 64


def test_a_plan_of_the_host(bare):
    """A plan from config.json alone has all parts, and survives JSON."""
    plan = make_plan(make_config(bare, mesh={"fsdp": 8}), CPUS)
    assert plan.memory["total"] == sum(bytes for kind, bytes in plan.memory.items() if kind != "total")
    assert plan.fits is None and plan.seconds == {}  # the host's peak is unknown
    assert plan.hbm_bytes > plan.memory["weights"]
    assert from_json(json.loads(json.dumps(as_json(plan)))) == plan


def test_shardings_name_every_array(bare):
    made = design_for(make_config(bare, mesh={"fsdp": 8}), CPUS)
    traced, inputs = trace_step(made)
    rows = shardings(made, traced, inputs)
    named = {row.name: row for row in rows}
    weight = named["model.layers.block.mlp.up_proj.base.weight"]
    assert (weight.kind, weight.axes, weight.partition) == ("frozen", "layers, mlp, embed", "-, -, fsdp")
    assert weight.bytes == 4 * np.prod(weight.shape) / 8
    assert set(made.model.specs) <= set(named)
    kinds = {row.kind for row in rows}
    assert kinds == {"trained", "frozen", "optimizer", "input", "activation"}
    moments = [row for row in rows if row.kind == "optimizer" and "lora_A" in row.name]
    assert len(moments) == 2 * sum(path.endswith("lora_A") for path in made.model.specs)


def test_a_plan_for_chips_that_are_not_there(bare):
    """libtpu compiles it; a slice has as many devices as its name says, and ICI carries what fsdp gathers."""
    pytest.importorskip("libtpu", reason="planning for TPUs needs libtpu")
    config = make_config(bare, mesh={"fsdp": -1}, global_batch_size=4)
    model = config.model.model_copy(update={"dtype": "bfloat16", "compute_dtype": "bfloat16", "remat": "full"})
    config = config.model_copy(update={"model": model, "data": config.data.model_copy(update={"max_length": 128})})
    plan = make_plan(config, parse("v5e-4"), price=1.0)
    assert (plan.chips, plan.devices, plan.mesh["fsdp"], plan.fits) == (4, 4, 4, True)
    assert plan.limit == 16 * 2**30 and 0 < plan.memory["total"] < 1e9
    gathers = [row for row in plan.traffic if row.kind == "all-gather"]
    assert gathers and gathers[0].axes == ("fsdp",) and gathers[0].ici_bytes > plan.memory["weights"]
    assert plan.step_seconds == max(plan.seconds.values()) == plan.seconds[plan.bound]
    assert plan.tokens_per_second == pytest.approx(4 * 128 / plan.step_seconds)
    assert plan.cost_per_day == 96 and 0 < plan.mfu < 1


def test_gradients_of_parts_are_reduce_scatters(wide):
    """On a square of chips XLA turns reduce-scatters into all-reduces, with twice the bytes; not those that it is given
    here."""
    pytest.importorskip("libtpu", reason="planning for TPUs needs libtpu")
    folder = sized(wide, hidden_size=4096, intermediate_size=2048, num_attention_heads=2, num_key_value_heads=1)
    config = make_config(folder, method=METHODS["full"], mesh={"fsdp": -1}, global_batch_size=16, optimizer=BFLOAT16)
    model = config.model.model_copy(update={"dtype": "bfloat16", "compute_dtype": "bfloat16", "remat": "full"})
    config = config.model_copy(update={"model": model, "data": config.data.model_copy(update={"max_length": 128})})
    plan = make_plan(config, parse("v5e-16"))
    found = {row.kind: row for row in plan.traffic}
    gradients = 2 * 3 * 4096 * 2048  # bytes of the three matrices
    assert found["reduce-scatter"].ici_bytes == pytest.approx(15 / 16 * gradients, rel=0.01)


def test_what_does_not_fit_is_said(bare):
    """If XLA refuses the program, the plan says how much memory it wanted, and what to change."""
    pytest.importorskip("libtpu", reason="planning for TPUs needs libtpu")
    config = make_config(bare, mesh={"fsdp": -1}, global_batch_size=2**18)
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 1024})})
    plan = make_plan(config, parse("v5e-4"))
    assert plan.fits is False and plan.memory["total"] > plan.limit
    assert any("gradient_accumulation_steps" in line for line in plan.advice)


def test_xla_that_cannot_compile_names_the_versions(bare, monkeypatch):
    """The error names both versions, for example if libtpu is older than jax."""
    import ftjax.plan.plan as module

    class Traced:
        def __getattr__(self, name):
            raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Unknown attribute\nmore of it")

    monkeypatch.setattr(module, "trace_step", lambda made: (Traced(), trace_step(made)[1]))
    monkeypatch.setattr(module, "program_flops", lambda traced: 1.0)
    with pytest.raises(
        UserError, match=r"cpu:8: XLA did not compile the step, with jax .*: INVALID_ARGUMENT: Unknown attribute\n"
    ):
        make_plan(make_config(bare, mesh={"fsdp": 8}), CPUS)


@pytest.mark.parametrize("window, share", [(None, 10 / 16), (512, 7 / 16)])
def test_flops_of_a_kernel_that_skips_blocks(window, share):
    """Splash attention has blocks of 512 in 2048 tokens: of 16 blocks a causal mask leaves 10, and a window of 512 leaves 7.
    Each has two products forward; backward three for the queries and four for keys and values."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    shape, (b, n, t, h) = (2048, 2048), (2, 4, 2048, 128)
    mask = kernels.CausalMask(shape) if window is None else kernels.LocalMask(shape, (window - 1, 0), 0)
    names = "block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"
    sizes = kernels.BlockSizes(**dict.fromkeys(names, 512))
    kernel = kernels.make_splash_mha(kernels.MultiHeadMask([mask] * n), block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def layers(q, k, v):
        def layer(q, _):
            return jax.vmap(kernel)(q, k, v), None

        return jax.lax.scan(layer, q, length=3)[0].astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((b, n, t, h), jnp.bfloat16)
    traced = jax.jit(jax.grad(layers, (0, 1, 2))).trace(x, x, x)
    assert program_flops(traced) == pytest.approx(3 * (2 + 3 + 4) * 2 * b * n * t * t * h * share, rel=1e-3)


def test_a_server_is_planned_as_it_would_be(bare, folder):
    """Memory is that of the arrays that a server makes, and the mesh one that the heads allow."""
    plan = plan_serving(make_config(bare, method=METHODS["lora"]), parse("cpu:4"), 4, 64)
    assert plan.mesh["tensor"] * plan.mesh["data"] == 4 and plan.rows == 4 and plan.fits is None
    mesh = mesh_of({"data": plan.mesh["data"], "tensor": plan.mesh["tensor"]})
    generator = Generator(str(folder), dtype="float32", mesh=mesh, tokenizer=make_tokenizer())
    batch = PagedBatch(generator.engine, generator.params, Room.fit(generator.engine, rows=4, context=64, page=32))
    batch.open()
    state = batch._state
    assert plan.memory["weights"] == shard_bytes(generator.params)
    assert plan.memory["cache"] == shard_bytes((state.cache.keys, state.cache.values))
    assert plan.memory["weights"] + plan.memory["cache"] + plan.memory["state"] <= plan.peak
    weights = sum(x.size for path, x in generator.params.items() if "embed" not in path)
    assert plan.flops >= 2 * 4 * weights  # of four tokens
    assert json.loads(json.dumps(serving_json(plan)))["rows"] == 4
    layers, found = len(generator.model.memories), {(row.kind, row.axes): row.runs for row in plan.traffic}
    assert found.pop(("all-reduce", ("tensor",))) == 2 * layers + 1, "two a layer, and the lookup of the token"
    assert found.pop(("all-to-all", ("tensor",))) == 1, "the logits"
    assert found.pop(("all-gather", ("tensor",))) <= 4, "tokens, their log-probabilities, and the most probable ones"
    assert set(found) <= {("all-gather", ("data",))} and all(runs <= 5 for runs in found.values()), "what the host reads"


def test_a_server_on_one_cpu(bare, monkeypatch):
    """Its decode program is that of the server: layers with arrays of their own, if the weights are large."""
    config = make_config(bare, method=METHODS["lora"])
    scanned = plan_serving(config, parse("cpu:1"), 4, 64)
    monkeypatch.setattr(separate, "WORTH", 0)
    separated = plan_serving(config, parse("cpu:1"), 4, 64)
    assert separated.memory["weights"] == scanned.memory["weights"] > 0 and separated.memory["cache"] == scanned.memory["cache"]
    assert separated.flops == pytest.approx(scanned.flops, rel=0.01)
    assert separated.hbm_bytes < scanned.hbm_bytes, "no layer's weights are copied out of their stack"


@pytest.mark.parametrize("topology", ["v5e-1", "v6e-4"])
def test_a_server_for_chips_that_are_not_there(wide, topology):
    """What fits follows from the memory that the pages leave, and a step takes at least the time to read every weight and the
    pages, once: a kernel reads them where they are."""
    pytest.importorskip("libtpu", reason="planning for TPUs needs libtpu")
    config, where = make_config(sized(wide, max_position_embeddings=8192)), parse(topology)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    plan = plan_serving(config, where, 16, 4096)
    assert plan.fits and plan.tokens // 4096 >= plan.texts > plan.rows
    assert plan.attention == "a kernel reads pages in place"
    bandwidth = where.chip.hbm_bandwidth
    assert plan.step_seconds >= plan.seconds["HBM"] == plan.hbm_bytes / bandwidth > 0.5 * plan.memory["weights"] / bandwidth
    assert plan.tokens_per_second == pytest.approx(16 / plan.step_seconds)
    assert plan.hbm_bytes == pytest.approx(plan.memory["weights"] + plan.memory["cache"], rel=0.1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--serve", "--price", "1"], "--price: not of a plan with --serve"),
        (["--context", "64"], "--context: only with --serve"),
        (["--serve", "--context", "99999"], "the model's context is"),
    ],
)
def test_options_of_a_server_plan(bare, tmp_path, options, says):
    (tmp_path / "run.yaml").write_text(f"model: {{path: {bare}}}\ndata: {{train: x.jsonl}}\n")
    found = CliRunner().invoke(app, ["plan", str(tmp_path / "run.yaml"), "--topology", "cpu:4", *options])
    assert found.exit_code == 2 and says in " ".join(found.output.split()), found.output


GRPO = {
    "name": "grpo",
    "rewards": ["exact_match"],
    "num_generations": 4,
    "max_completion_length": 16,
    "generation_batch_rows": 8,
}


def test_answers_are_planned_as_they_are_generated(bare, folder, monkeypatch, capsys):
    """Rows, pages and states are those of the engine in a run, for prompts and answers as long as they may be."""
    options = {"objective": GRPO, "mesh": {"fsdp": 2, "tensor": 2}, "global_batch_size": 16}
    plan = make_plan(make_config(bare, **options), parse("cpu:4"))
    found = plan.rollout
    assert (found.answers, found.rows, found.prompt, found.length, found.steps) == (16, 8, 16, 16, 32)
    assert from_json(json.loads(json.dumps(as_json(plan)))) == plan
    made, kept = [], PagedBatch.__init__

    def begin(self, engine, params, room):
        made.append(self)
        kept(self, engine, params, room)

    monkeypatch.setattr(PagedBatch, "__init__", begin)
    setup = prepare(make_config(folder, **options), jax.devices()[:4])
    prompts = [[5 + number // 4] * 16 for number in range(16)]
    with jax.set_mesh(setup.mesh):
        Sampler(setup, make_tokenizer()).generate(setup.params, prompts, range(16))
    (batch,) = made
    cache = batch._state.cache
    assert batch.room.rows == found.rows and shard_bytes((cache.keys, cache.values)) == found.memory["cache"]
    assert shard_bytes(batch._state) == found.memory["cache"] + found.memory["state"]
    weights = shard_bytes({**setup.frozen, **setup.params})
    assert weights == plan.memory["weights"] + plan.memory["trained"]
    assert found.peak >= weights + plan.memory["optimizer"] + found.memory["cache"] + found.memory["state"]
    assert found.flops >= 2 * 8 * sum(x.size for path, x in setup.frozen.items() if "embed" not in path)
    show(plan, make_console())
    shown = " ".join(capsys.readouterr().out.split())
    assert "answers of an update: 16 of 16 tokens to prompts of 16, 8 at a time" in shown
    assert "both phases, with weights kept once" in shown


def test_the_time_of_answers(bare):
    """A decode step reads every weight; all answers take as many steps as their tokens, for each group of rows."""
    pytest.importorskip("libtpu", reason="planning for TPUs needs libtpu")
    chip, made = parse("v5e-1"), design_for(make_config(bare, objective=GRPO, global_batch_size=16), parse("v5e-1"))
    weights = shard_bytes(made.abstract_params())
    found = plan_rollouts(made, weights, chip.chip.hbm, chip)
    assert found.fits and found.step_seconds >= found.seconds["HBM"] == found.hbm_bytes / chip.chip.hbm_bandwidth
    assert weights + found.memory["cache"] > found.hbm_bytes > 0.5 * weights + 0.5 * found.memory["cache"]
    assert found.prefill_seconds > 0 and found.rollout_seconds == found.prefill_seconds + 32 * found.step_seconds
    assert found.tokens_per_second == 16 * 16 / found.rollout_seconds


def test_answers_of_devices_of_their_own(bare, folder):
    """Their weights are those that a run puts there, beside the update's."""
    corrected = {**GRPO, "importance_sampling_correction": "token_truncate"}
    options = {"objective": corrected, "mesh": {"fsdp": 4, "rollout_devices": 4}, "global_batch_size": 16}
    made = design_for(make_config(bare, **options), CPUS)
    found = plan_rollouts(made, math.inf, None, CPUS)
    setup = prepare(make_config(folder, **options))
    sent = RolloutDevices(setup).send(setup.params)
    assert made.mesh.size == 4 == found.apart and set(setup.rollout_devices) == set(sent["model.embed_tokens.weight"].devices())
    assert found.sent == shard_bytes({path: sent[path] for path in setup.params})
    assert shard_bytes(dict(sent)) + found.memory["cache"] < found.peak < math.inf and found.mesh["tensor"] == 2


def test_answers_of_several_hosts(bare, capsys):
    """Each of four hosts has the plan of one with a quarter of the answers, and all together generate four times as fast."""
    pytest.importorskip("libtpu", reason="planning for TPUs needs libtpu")

    def config(hosts):
        objective = {**GRPO, "importance_sampling_correction": "token_truncate", "generation_batch_rows": 4 * hosts}
        mesh = {"fsdp": 2 * hosts, "rollout_devices": 2 * hosts}
        return make_config(bare, objective=objective, mesh=mesh, global_batch_size=16 * hosts)

    one = parse("v5p-8")  # so many TensorCores, two to a chip
    alone = plan_rollouts(design_for(config(1), one), math.inf, one.chip.hbm, one)
    several = make_plan(config(4), parse("v5p-32"))
    found = several.rollout
    show(several, make_console())
    said = " ".join(capsys.readouterr().out.split())
    assert (several.devices, found.apart, found.hosts, found.answers, found.rows) == (8, 8, 4, 64, 4) and several.fits
    assert found.mesh["tensor"] == 2 and from_json(as_json(several)).rollout == found
    for name in ("mesh", "rows", "memory", "peak", "sent", "flops", "hbm_bytes", "seconds", "steps", "rollout_seconds"):
        assert getattr(found, name) == getattr(alone, name), name
    assert found.tokens_per_second == pytest.approx(4 * alone.tokens_per_second)
    assert "answers of an update: 64 of 16 tokens to prompts of 16, 4 at a time on each of 4 hosts" in said
    assert f"least time of an update with its answers: {max(found.rollout_seconds, several.step_seconds):.4g} s" in said


def test_answers_that_do_not_fit(bare, monkeypatch, capsys):
    """XLA refuses a program that wants more memory than a chip has."""

    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.")

    monkeypatch.setattr("ftjax.plan.rollout.compile_programs", refuse)
    plan = make_plan(make_config(bare, objective=GRPO, global_batch_size=16, mesh={"data": 8}), CPUS)
    assert plan.rollout.fits is False and plan.rollout.peak == 20.5 * 2**30
    show(plan, make_console())
    assert "the answers do not fit: fewer objective.generation_batch_rows" in " ".join(capsys.readouterr().out.split())
