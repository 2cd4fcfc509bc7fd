"""Tests with llama.cpp itself that it gives the tokens that ftjax gives, for GGUF files and adapters that ftjax wrote.

llama.cpp comes with the npm package node-llama-cpp: `npm install --prefix DIR node-llama-cpp@3.22.1`, and DIR as
FTJAX_NODE_LLAMA_CPP. The tests are skipped without it.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gguf_cases import WRITTEN, make_base
from gguf_writing import demo_model
from oracle import adapted, load, logits
from processes import ALL

from ftjax.config import LoraConfig, ModelConfig
from ftjax.hub.export_gguf import export_gguf
from ftjax.hub.tokenizer.load import load_tokenizer

HERE = Path(__file__).parent
KEPT = HERE.parents[1] / ".cache" / "node-llama-cpp-3.22.1"  # where tests/hub/test_llama_cpp.py installs it
TEXTS = ["once upon a time there was", "a little girl once\n\n upon 1234 times", "<|im_start|>user\nhi<|im_end|>\n"]
ONE_OF_EACH = list({case.model_type: name for name, case in reversed(WRITTEN.items())}.values())[::-1]
COUNT = 16


@pytest.fixture(scope="session")
def node() -> Path:
    """Return the folder with node-llama-cpp."""
    place = Path(os.environ.get("FTJAX_NODE_LLAMA_CPP") or KEPT)
    if not shutil.which("node"):
        pytest.skip("node, which runs llama.cpp here, is not installed")
    if not list(place.glob("node_modules/@node-llama-cpp/*")):
        pytest.skip(f"no node-llama-cpp in {place}; FTJAX_NODE_LLAMA_CPP names a folder in which npm installed it")
    return place


def told(node: Path, folder: Path, asked: list[dict]) -> list[dict]:
    """Return what llama.cpp says to each request (tests/hub/llama_cpp.mjs)."""
    (folder / "asked.json").write_text(json.dumps(asked))
    command = ["node", HERE / "llama_cpp.mjs", node, folder / "asked.json", folder / "told.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "told.json").read_text())


def assert_same_tokens(answer: dict, texts: list[str], tokenizer, model, params) -> None:
    """Assert that llama.cpp read these ids and continued them as ftjax does, each token the most likely one."""
    assert "error" not in answer, answer["error"]
    for text, found in zip(texts, answer["found"], strict=True):
        ids = tokenizer(text).input_ids
        assert found["ids"] == ids, text
        whole = np.array([[*ids, *found["next"]]], np.int32)
        best = logits(model, params, whole[:, :-1])[0].argmax(-1)[len(ids) - 1 :]
        assert found["next"] == best.tolist(), text


def test_every_family(node, tmp_path):
    """One model of each family, and all cases in `make test-all`."""
    names = list(WRITTEN) if ALL else ONE_OF_EACH
    for name in names:
        base = make_base(WRITTEN[name], tmp_path / name)
        export_gguf(str(base), tmp_path / name / "model.gguf", asked="f32")
    asked = [{"file": str(tmp_path / name / "model.gguf"), "texts": TEXTS, "count": COUNT, "size": 64} for name in names]
    answers = told(node, tmp_path, asked)
    different = []
    for name, answer in zip(names, answers, strict=True):
        tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path / name)))
        try:
            assert_same_tokens(answer, TEXTS, tokenizer, *load(tmp_path / name))
        except AssertionError as error:
            different.append(f"{name}: {error}")
        assert tokenizer.eos_token_id in answer.get("ends", ())
    assert not different, "\n".join(different)


def test_a_model_of_texts(node, trained_llama, tmp_path):
    """The ids and tokens of a Llama with a SentencePiece tokenizer."""
    texts = ["Once upon a time", "  héllo  \u6f22 kilogram\n", "One day, Lily saw a", "x</s> y <s>z", ""]
    export_gguf(str(trained_llama), tmp_path / "model.gguf", asked="f32")
    [answer] = told(node, tmp_path, [{"file": str(tmp_path / "model.gguf"), "texts": texts, "count": COUNT}])
    assert_same_tokens(answer, texts, load_tokenizer(ModelConfig(path=str(trained_llama))), *load(trained_llama))


@pytest.mark.sweep
def test_a_real_model_through_its_chat_template(node, tmp_path):
    base = demo_model()
    export_gguf(str(base), tmp_path / "model.gguf", asked="f32")
    tokenizer = load_tokenizer(ModelConfig(path=str(base)))
    asked = ["What is the capital of France?", "Write a haiku about the sea.", "Translate to German: good morning\n\n12345"]
    turns = [[{"role": "user", "content": text}] for text in asked]
    texts = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in turns]
    [answer] = told(node, tmp_path, [{"file": str(tmp_path / "model.gguf"), "texts": texts, "count": COUNT}])
    assert answer["template"] == tokenizer.chat_template and tokenizer.eos_token_id in answer["ends"]
    assert_same_tokens(answer, texts, tokenizer, *load(base))


ADAPTERS = {
    "llama": {"rank_pattern": {"v_proj": 2, r"layers\.0\.mlp\.down_proj": 1}, "alpha_pattern": {"q_proj": 3}},
    "qwen2": {"use_rslora": True}, "gemma2": {}, "gpt2": {}, "gpt-neox": {}, "phi3": {}, "olmo2": {},
    "granitemoehybrid-dense": {},
}  # fmt: skip


def test_adapters(node, tmp_path):
    """The base's file and the adapter's give what ftjax gives for both, with different ranks and scales of layers too."""
    asked, models = [], {}
    for name, settings in ADAPTERS.items():
        base = make_base(WRITTEN[name], tmp_path / name)
        method = LoraConfig(r=4, lora_alpha=10, target_modules="all-linear", **settings)
        models[name] = adapted(base, base / "adapter", method)
        export_gguf(str(base), base / "model.gguf", asked="f32")
        export_gguf(str(base), base / "lora.gguf", asked=None, adapter=base / "adapter", lora=True)
        files = {"file": str(base / "model.gguf"), "texts": TEXTS, "count": COUNT, "size": 64}
        asked += [files, files | {"lora": str(base / "lora.gguf")}]
    answers = told(node, tmp_path, asked)
    for name, plain, tuned in zip(ADAPTERS, answers[::2], answers[1::2], strict=True):
        assert plain["found"] != tuned["found"], name
        assert_same_tokens(tuned, TEXTS, load_tokenizer(ModelConfig(path=str(tmp_path / name))), *models[name])
