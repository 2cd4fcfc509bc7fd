"""Tests with llama.cpp's own converter that it reads ftjax's folders. `make test-all` only: pip makes an environment, and
llama.cpp's source comes with the npm package node-llama-cpp."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import CASES
from older_families import LATER, UNKNOWN
from oracle import Case, all_values, load, logits, make_hf, write_merged
from qwen_tokenizer import qwen
from sentencepiece import SentencePieceProcessor

from ftjax.config import FullConfig, ModelConfig
from ftjax.hub.tokenizer.files import write_tokenizer
from ftjax.hub.tokenizer.load import load_tokenizer

pytestmark = pytest.mark.sweep  # makes an environment with pip and npm
HERE = Path(__file__).parent
PACKAGE, BINARIES = "node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1"
BYTE_LEVEL = {  # families that the converter takes no SentencePiece model of
    "deepseek_v2", "deepseek_v3", "gpt2", "gpt_neox", "gpt_oss", "granite", "lfm2", "llama4", "llama4_text", "olmo2", "olmo3",
    "olmoe", "qwen2", "qwen3", "qwen3_moe", "smollm3",
}  # fmt: skip
# Values that all published models of a family have, and the converter requires.
SAME_BASE = {"rope_type": "default", "rope_theta": 500000.0}
PUBLISHED = {
    "gemma3": {"attn_logit_softcapping": None},
    "gpt2": {"n_ctx": 64},
    "gpt2-untied": {"n_ctx": 64},
    # With another rope_theta, transformers 5 uses this one for layers with a window.
    "olmo3": {"rope_parameters": {
        "full_attention": SAME_BASE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "sliding_attention": SAME_BASE,
    }},
    "olmo3-other-layers": {"rope_parameters": {"full_attention": SAME_BASE, "sliding_attention": SAME_BASE}},
}  # fmt: skip
CHANGED = {"llama4-plain"}  # transformers 4 drops its attention_bias
# Defaults of the class, which transformers 4 leaves out of the settings of a text model inside another.
DEFAULT_SAID = {
    "gemma3-images": ["tokenizer.ggml.padding_token_id"],
    "llama4-images": ["tokenizer.ggml.bos_token_id"],
}
# Errors for bases that do not convert: from transformers 4.57, which cannot write the first two, and from the converter.
NOT_CONVERTED = {
    "olmo2-tied": "`rope_scaling` must be a dictionary with two fields, `type` and `factor`",
    "phi3-whole-heads": "`rope_scaling` must be a dictionary with three fields, `type`, `short_factor` and `long_factor`",
    "gemma2-uncapped": "error: required argument is not a float",
    "ministral": "Model MinistralForCausalLM is not supported",
    "ministral-all-windows": "Model MinistralForCausalLM is not supported",
    "phimoe": "Model PhimoeForCausalLM is not supported",
    "phimoe-tied": "Model PhimoeForCausalLM is not supported",
    "granitemoehybrid-dense": "Only SILU activation supported",
    "lfm2-untied": "Dimension out of range",  # a bias of the convolution
    "falcon-h1-norm-first": "too many indices for tensor of dimension 1",
    "qwen3-next": "AssertionError",  # about sizes; published ones convert
    **dict.fromkeys(("falcon-h1", "falcon-h1-without-norm"), "KeyError: 'head_dim'"),
    **dict.fromkeys(("glm4", "glm4-whole-heads"), "KeyError: '<|endoftext|>'"),  # a token of the published tokenizers
    **dict.fromkeys(("glm4-moe", "glm4-moe-plain"), "KeyError: '[gMASK]'"),
    **dict.fromkeys(("granite-tied-biases", "granitemoe-tied-biases", "bamba-tied-biases"), "Missing <MODEL_TENSOR.ROPE_FREQS"),
    **dict.fromkeys(
        ("qwen3-moe-dense-first", "qwen3-moe-every-other", "qwen3-moe-all-dense"),
        "Can not map tensor 'model.layers.0.mlp.down_proj.weight'",
    ),
}


def with_vocabulary(case: Case) -> dict:
    """Return the values of a case with as many tokens as the tokenizers have."""
    if "text_config" not in case.values:
        return case.values | {"vocab_size": 512}
    return case.values | {"text_config": case.values["text_config"] | {"vocab_size": 512}}


def npm(place: Path, *packages: str) -> None:
    """Install npm packages in a cache folder that is kept between runs."""
    if not shutil.which("npm"):
        pytest.skip(f"npm, which fetches {packages[0]}, is not installed here")
    place.mkdir(parents=True, exist_ok=True)
    # Without optional packages, which are binaries for every kind of GPU, and without building any.
    command = ["npm", "install", "--prefix", ".", "--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund", *packages]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm cannot install {packages[-1]} here: {done.stderr.strip().splitlines()[0]}")


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """Return a folder with llama.cpp's source in `source`, and the npm package that contains it."""
    place = HERE.parents[1] / ".cache" / PACKAGE.replace("@", "-")
    if not (place / "source" / "convert_hf_to_gguf.py").exists():
        npm(place, PACKAGE)
        bundle = place / "node_modules" / "node-llama-cpp" / "llama" / "gitRelease.bundle"
        subprocess.run(["git", "clone", "--quiet", str(bundle), str(place / "source")], check=True, capture_output=True)
    return place


def ask(python: Path, llama_cpp: Path, folder: Path, asked: list[dict]) -> list:
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [python, HERE / "llama_cpp.py", llama_cpp / "source", folder / "asked.json", folder / "answers.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answers.json").read_text())


def add_tokenizer(base: Path, model_type: str, llama: Path, qwens: Path) -> None:
    if model_type in BYTE_LEVEL:
        files = list(qwens.iterdir())
    else:
        files = [llama / "tokenizer.json", llama / "tokenizer.model"]
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (base / "tokenizer_config.json").write_text(json.dumps(config))
    for file in files:
        shutil.copyfile(file, base / file.name)


def test_the_same_file_is_made_of_a_folder_as_of_its_base(older, llama_cpp, untrained, tmp_path):
    """All tensors, settings and tokens, wherever the base converts. transformers 4.57 writes the bases' config.json."""
    qwens = qwen(tmp_path / "qwen", tokenizer_class="GPT2Tokenizer", chat_template="left out")
    known = [case for case in CASES if case.model_type not in UNKNOWN and case.name not in LATER | CHANGED]
    cases = {case.name: replace(case, values=with_vocabulary(case) | PUBLISHED.get(case.name, {})) for case in known}
    asked = []
    for name, case in cases.items():
        make_hf(case, tmp_path / name)
        add_tokenizer(tmp_path / name, case.model_type, untrained, qwens)
        asked.append({"folder": str(tmp_path / name), "model_type": case.model_type, "values": all_values(case)})
    answers = dict(zip(cases, ask(older, llama_cpp, tmp_path, asked), strict=True))
    refused = {name: answer["error"] for name, answer in answers.items() if answer}

    asked = []
    for name in (name for name in cases if name not in refused):
        base, written = tmp_path / name, tmp_path / f"{name}-written"
        written.mkdir()
        write_merged(written, *load(base), FullConfig(), base)
        write_tokenizer(written, load_tokenizer(ModelConfig(path=str(base))), ModelConfig(path=str(base)), base)
        asked.append({"base": str(base), "folder": str(written)})
    compared = ask(older, llama_cpp, tmp_path, asked)
    answers = {Path(one["base"]).name: answer for one, answer in zip(asked, compared, strict=True)}
    refused |= {name: answer["base"] for name, answer in answers.items() if answer["base"]}
    assert refused.keys() == NOT_CONVERTED.keys(), refused
    assert {name: reason for name, reason in refused.items() if NOT_CONVERTED[name] not in reason} == {}

    converted = {name: answer for name, answer in answers.items() if not answer["base"]}
    wrong = {name: answer["folder"] or answer["apart"] for name, answer in converted.items()}
    assert {name: reason for name, reason in wrong.items() if reason} == DEFAULT_SAID
    assert all(answer["tensors"] >= 2 * cases[name].values.get("num_hidden_layers", 2) for name, answer in converted.items())

    # The SentencePiece model, not a guess where there is none. Phi-3 has scores of its own for the three special tokens.
    pieces = SentencePieceProcessor(str(untrained / "tokenizer.model"))
    scores = [pieces.get_score(index) for index in range(512)]
    for name, answer in converted.items():
        vocabulary = answer["vocabulary"]
        if cases[name].model_type in BYTE_LEVEL:
            assert vocabulary["model"] == "gpt2", name
        else:
            assert (vocabulary["model"], vocabulary["pre"]) == ("llama", "default"), name
            assert vocabulary["scores"][3:] == scores[3:], name


def test_llama_cpp_continues_texts_as_ftjax_does(older, llama_cpp, trained_llama, tmp_path):
    """The same ids of texts, and the same greedy tokens, of a fine-tuned model of texts."""
    if not (llama_cpp / "node_modules" / "@node-llama-cpp" / "linux-x64").exists():
        npm(llama_cpp, PACKAGE, BINARIES)
    model, params = load(trained_llama)
    rng = np.random.default_rng(0)
    params = {path: value + 0.01 * rng.normal(size=value.shape).astype(np.float32) for path, value in params.items()}
    written, texts = tmp_path / "written", ["Once upon a time", "  héllo  \u6f22 kilogram\n", "One day, Lily saw a"]
    written.mkdir()
    write_merged(written, model, params, FullConfig(), trained_llama)
    tokenizer = load_tokenizer(ModelConfig(path=str(trained_llama)))
    write_tokenizer(written, tokenizer, ModelConfig(path=str(trained_llama)), trained_llama)
    assert ask(older, llama_cpp, tmp_path, [{"folder": str(written)}]) == [None]

    asked = [{"file": str(written / "model.gguf"), "texts": texts}]
    (tmp_path / "told.json").write_text(json.dumps(asked))
    command = ["node", HERE / "llama_cpp.mjs", llama_cpp, tmp_path / "told.json", tmp_path / "found.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [answer] = json.loads((tmp_path / "found.json").read_text())
    for text, found in zip(texts, answer["found"], strict=True):
        assert found["ids"] == tokenizer(text).input_ids, text
        whole = found["ids"] + found["next"]
        best = logits(model, params, np.array([whole[:-1]], np.int32))[0].argmax(-1).tolist()
        assert len(found["next"]) == 12
        assert found["next"] == best[-12:], text
