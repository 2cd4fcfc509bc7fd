"""Tests exports of a run: merged, portable, as it is, and what is refused (T14, T19)."""

import json
import warnings

import numpy as np
import pytest
from oracle import Case, adapted, hf_logits, logits, make_hf, tokens
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from tiny_tokenizer import make_tokenizer, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftjax.config import Config, LoraConfig
from ftjax.config.load import save_config
from ftjax.data.predictions import new_predictions
from ftjax.errors import UserError
from ftjax.hub.adapter.own_base import base_of
from ftjax.hub.export import export
from ftjax.hub.gguf.write import write_file as write_gguf
from ftjax.hub.safetensors import write_file as write_safetensors
from ftjax.hub.written import readable

MIXED = LoraConfig(
    r=4, lora_alpha=10, target_modules=["q_proj", "v_proj", "down_proj"],
    rank_pattern={"v_proj": 2, r"layers\.0\.mlp\.down_proj": 1}, alpha_pattern={"q_proj": 3},
)  # fmt: skip


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def run(request, tmp_path):
    """Return the folder of a finished run with a LoRA whose layers differ in rank and scale."""
    return make_run(tmp_path, MIXED, request.param)


def make_run(folder, method, tied=False, dtype="float32"):
    base = folder / "base"
    make_hf(Case("llama", "llama", {"tie_word_embeddings": tied}), base)
    save_tokenizer(base)
    final = folder / "run" / "final"
    model, params = adapted(base, final, method)
    save_tokenizer(final)
    settings = {"model": {"path": str(base), "dtype": dtype, "compute_dtype": dtype}, "data": {"train": "x.jsonl"}}
    save_config(Config.model_validate({**settings, "method": method.model_dump()}), folder / "run" / "config.yaml")
    return folder / "run", base, logits(model, params, tokens(2, 20))


def test_merged(run, tmp_path):
    folder, _, want = run
    export(folder, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(hf_logits(merged, tokens(2, 20)), want, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("ab").input_ids[0] == 1
    assert (tmp_path / "merged" / "generation_config.json").exists()


def test_portable(run, tmp_path):
    """The portable adapter has one rank, alpha equal to it, plain keys, and the same logits."""
    folder, base, want = run
    export(folder, tmp_path / "portable", portable=True)
    saved = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert saved["r"] == saved["lora_alpha"] == 4
    assert not saved["rank_pattern"] and not saved["alpha_pattern"] and not saved["use_rslora"]
    assert not {"exclude_modules", "trainable_token_indices", "ensure_weight_tying"} & set(saved)  # older PEFT has no such keys
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "portable")
    np.testing.assert_allclose(hf_logits(theirs, tokens(2, 20)), want, atol=1e-4)


def test_a_copy_names_no_path(tmp_path, monkeypatch):
    """In a copy of an older adapter the base's path is replaced by its name, which resolves by a digest."""
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    folder, base, _ = make_run(tmp_path, MIXED)
    before = (folder / "final" / "adapter_config.json").read_text()
    assert str(base) in before
    export(folder, tmp_path / "out")
    assert (folder / "final" / "adapter_config.json").read_text() == before
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved == {**json.loads(before), "base_model_name_or_path": "base"}
    assert base_of(tmp_path / "out", saved) == str(base)
    export(tmp_path / "out", tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    base.rename(tmp_path / "elsewhere")
    export(folder, tmp_path / "gone")
    assert json.loads((tmp_path / "gone" / "adapter_config.json").read_text()) == saved


def test_merge_rounds_once(tmp_path):
    """The update is added in float32 and rounded to bfloat16 at the end, as merging in float32 by PEFT does."""
    import torch
    from safetensors.torch import load_file

    folder, base, _ = make_run(tmp_path, MIXED, dtype="bfloat16")
    export(folder, tmp_path / "merged", merge=True)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "final").merge_and_unload()
    got = load_file(tmp_path / "merged" / "model.safetensors")
    for name, value in theirs.state_dict().items():
        assert got[name].dtype == torch.bfloat16
        apart = (got[name].float() - value.to(torch.bfloat16).float()).abs()
        # Summation order may move a value across a rounding boundary: one unit in the last place, and rarely.
        assert (apart > 0).float().mean() < 0.01 and (apart <= value.abs() / 64 + 1e-6).all(), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_that_was_made_elsewhere(tmp_path, tied):
    """It merges into the given base or the one that it names, in the base's dtype, with its own tokenizer."""
    import torch

    base, folder, adapter = tmp_path / "base", tmp_path / "out", tmp_path / "elsewhere" / "adapter"
    make_hf(Case("llama", "llama", {"tie_word_embeddings": tied, "vocab_size": len(make_tokenizer())}), base)
    save_tokenizer(base)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with warnings.catch_warnings(action="ignore"):
        theirs = get_peft_model(model, PeftLoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
        )).eval()  # fmt: skip
        with torch.no_grad():
            theirs.base_model.model.lm_head.weight.add_(0.1)
        theirs.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    export(str(base), folder / "given", adapter=adapter, merge=True)
    export(adapter, folder / "named", merge=True)
    ids = tokens(2, 20, vocab=len(tokenizer))
    for out in (folder / "given", folder / "named"):
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert merged.dtype == torch.float32
        np.testing.assert_allclose(hf_logits(merged, ids), hf_logits(theirs, ids), atol=1e-4)
        assert len(AutoTokenizer.from_pretrained(out)) == len(tokenizer)
    with pytest.raises(UserError, match=r"expected an adapter folder with adapter_config\.json"):
        export(str(base), folder / "x", adapter=base, merge=True)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base model; name it: ftjax export BASE --adapter"):
        export(adapter, folder / "x", merge=True)


def test_refusals(tmp_path):
    folder, _, _ = make_run(tmp_path, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(UserError, match=r"lm_head.*--merge"):
        export(folder, tmp_path / "a", portable=True)
    with pytest.raises(UserError, match="choose one"):
        export(folder, tmp_path / "a", portable=True, merge=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UserError, match="not empty"):
        export(folder, tmp_path / "full", merge=True)
    with pytest.raises(UserError, match=r"full/x is a file; choose a folder"):
        export(folder, tmp_path / "full" / "x", merge=True)
    with pytest.raises(UserError, match=r"there is no such run"):
        export(tmp_path / "absent", tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("write", [
    lambda path: write_gguf(path, "llama", {}, []), lambda path: write_safetensors(path, []),
    lambda path: new_predictions(path, {"top_k": 1}).__enter__(),
], ids=["gguf", "safetensors", "predictions"])  # fmt: skip
def test_a_file_beneath_a_file(write, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"written: Not a directory|written: File exists"):
        write(tmp_path / "file" / "a")


def test_it_says_what_it_wrote(tmp_path, capsys):
    """The output lists files with sizes, and what loads them, for each kind of export."""
    folder, _, _ = make_run(tmp_path, MIXED)
    said = {}
    for name, settings in {"merged": {"merge": True}, "portable": {"portable": True}, "as-it-is": {}}.items():
        export(folder, tmp_path / name, **settings)
        said[name] = capsys.readouterr().out
        files = [file for file in (tmp_path / name).iterdir()]
        assert f"{tmp_path / name}: {len(files)} files, {readable(sum(file.stat().st_size for file in files))}\n" in said[name]
        for file in files:
            assert f"{file.name} {readable(file.stat().st_size)}" in said[name]
    assert "wrote a whole model (LlamaForCausalLM, float32)" in said["merged"] and "PEFT" not in said["merged"]
    assert f"vllm serve {tmp_path / 'merged'}\n" in said["merged"] and "--gguf f16 --out model.gguf" in said["merged"]
    assert "wrote an adapter (LORA) for base" in said["portable"] and "--gguf --lora --out" in said["portable"]
    assert f"--enable-lora --lora-modules tuned={tmp_path / 'portable'}\n" in said["portable"]
    assert "only with --portable: vLLM ignores rank_pattern and alpha_pattern\n" in said["as-it-is"]
    assert f"PeftModel.from_pretrained(model, {str(tmp_path / 'as-it-is')!r})" in said["as-it-is"]


def test_it_says_what_nothing_but_peft_loads(tmp_path, capsys):
    folder, _, _ = make_run(tmp_path, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    export(folder, tmp_path / "out")
    assert "vLLM, llama.cpp: only merged (--merge): it has DoRA" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "said"), [
    (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (19572, "19.6 kB"), (999_600, "1 MB"), (2_516_582_400, "2.52 GB"),
    (1_234_000_000_000, "1,234 GB"),
])  # fmt: skip
def test_sizes(size, said):
    assert readable(size) == said
