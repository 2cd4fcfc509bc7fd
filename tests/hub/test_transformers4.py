"""Tests ftjax's folders under transformers 4.57 and PEFT 0.13, whose model code differs, as do their rules for config.json,
tokenizers and adapters. `make test-all` only: the environment is made with pip."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import CASES
from gguf_writing import hub_folder, sentencepiece_keys, write_llama
from older_families import LATER, UNKNOWN
from oracle import Case, hf_logits, load, logits, make_hf, one_device, tokens, write_merged
from qwen_tokenizer import qwen

from ftjax.config import FullConfig, LoraConfig, ModelConfig
from ftjax.config.method import IA3Config, PromptTuningConfig, PTuningConfig
from ftjax.hub.adapter.peft import start_adapter, write_adapter
from ftjax.hub.export import export
from ftjax.hub.tokenizer.files import write_tokenizer
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.methods import method_of

pytestmark = pytest.mark.sweep  # makes an environment with pip
HERE = Path(__file__).parent
REFUSED = {"olmo2-tied", "phi3-whole-heads", "llama4"}  # scalings that transformers 4 cannot express
ONE_BASE = {"olmo3"}  # transformers 4 has one rope_theta for all types of layers of this family
# What transformers 4 computes otherwise, from whatever folder.
OTHERWISE = {
    "bamba": "groups of Mamba-2",
    "granitemoehybrid": "groups of Mamba-2",
    "deepseek-v2": "YaRN's mscale_all_dim does not scale the scores",
    "deepseek-v2-groups": "YaRN's mscale_all_dim does not scale the scores",
    "llama4-plain": "attention has no biases",
    "phimoe": "LongRoPE takes the long factors for a text that is longer than the original length",
}


def ask(python: Path, folder: Path, asked: list[dict]) -> list[dict]:
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [str(python), str(HERE / "transformers4.py"), str(folder / "asked.json"), str(folder / "answers.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answers.json").read_text())


def test_every_family_has_the_same_logits(older, tmp_path):
    ids, asked, want = tokens(2, 24), [], []
    # In transformers 4, gpt-oss's clamp and slope are constants, as in all published models.
    cases = [replace(case, values={k: v for k, v in case.values.items() if not k.startswith("swiglu")}) for case in CASES]
    cases = [case for case in cases if case.model_type not in UNKNOWN and case.name not in LATER]
    for case in cases:
        base, written = tmp_path / case.name, tmp_path / f"{case.name}-written"
        written.mkdir()
        want.append(hf_logits(make_hf(case, base), ids))
        write_merged(written, *load(base), FullConfig(), base)
        asked.append({"folder": str(written), "ids": ids.tolist(), "texts": []})
    apart, refused = {}, {}
    for case, theirs, ours in zip(cases, ask(older, tmp_path, asked), want, strict=True):
        if "error" in theirs:
            refused[case.name] = theirs["error"]
        elif case.name not in ONE_BASE:
            apart[case.name] = float(np.abs(np.array(theirs["logits"]) - ours).max())
    assert set(refused) == REFUSED, refused
    assert {name for name, value in apart.items() if not value < 1e-4} == set(OTHERWISE), apart


def test_tokenizers_have_the_same_ids(older, llama, pieces, tmp_path):
    """Carried over and written anew, from folders, GGUF and SentencePiece; beside a model and in an adapter's folder."""
    base = qwen(tmp_path / "qwen")
    config, tensors = hub_folder(llama)
    keys = sentencepiece_keys(llama / "tokenizer.model", bos=1, eos=2, unknown=0)
    gguf = write_llama(tmp_path / "model.gguf", config, tensors, tokenizer=keys)
    new = {"add_tokens": ["kilogram"], "add_special_tokens": ["<call>"]}
    template = {"chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"}
    sources = [(base, {}), (base, new), (base, template), (base, new | template), (llama, {}), (llama, new)]
    sources += [(gguf, {}), (gguf, new), (pieces, {})]
    texts = ["once upon a  kilogram", "héllo<|im_end|> <tool_call><call>\n\n x", "<s>  \t漢字</s>"]
    asked, want = [], []
    for number, (place, settings) in enumerate(sources):
        for kind in ("model", "adapter"):
            out = tmp_path / f"{number}-{kind}"
            out.mkdir()
            if kind == "model":
                (out / "config.json").write_text(json.dumps({"model_type": "qwen2" if place == base else "llama"}))
            model = ModelConfig(path=str(place), **settings)
            tokenizer = load_tokenizer(model)
            write_tokenizer(out, tokenizer, model, place)
            asked.append({"folder": str(out), "ids": [], "texts": texts})
            answer = {"ids": [tokenizer(text).input_ids for text in texts]}
            answer["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
            if tokenizer.chat_template:
                chat = [{"role": "user", "content": texts[0]}]
                answer["chat"] = tokenizer.apply_chat_template(chat, tokenize=False)
            want.append(answer)
    assert ask(older, tmp_path, asked) == want


# Not prefix tuning: this PEFT runs it with older versions of transformers only.
ADAPTERS = [
    LoraConfig(r=4, lora_alpha=8),
    LoraConfig(r=4, lora_alpha=8, use_dora=True, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    LoraConfig(r=4, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3}, layers_to_transform=[1]),
    LoraConfig(r=4, modules_to_save=["lm_head"]),
    LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"], bias="lora_only"),
    IA3Config(),
    PromptTuningConfig(num_virtual_tokens=5),
    PTuningConfig(num_virtual_tokens=5, encoder_hidden_size=12),
]  # fmt: skip


def test_adapters_have_the_same_logits_in_an_older_peft(older, tmp_path):
    """Adapters as written by a run and as exported for other tools give the same logits."""
    base, ids, asked, want = tmp_path / "base", tokens(2, 20), [], []
    make_hf(Case("llama", "llama", {"attention_bias": True}), base)
    for number, config in enumerate(ADAPTERS):
        method, folder = method_of(config), tmp_path / f"adapter-{number}"
        model, params = load(base, lambda root, method=method, config=config: method.attach(root, config))
        params |= start_adapter(model, params, config, one_device(), 0, lambda text: [5, 6, 7])
        rng = np.random.default_rng(number)
        for path, spec in model.trainable.items():
            params[path] = params[path] + rng.normal(size=spec.shape).astype(np.float32) * 0.1
        folder.mkdir()
        write_adapter(folder, model, params, config, "base")
        written = [folder]
        if config == ADAPTERS[0]:
            export(folder, tmp_path / "portable", portable=True)
            written.append(tmp_path / "portable")
        for one in written:
            asked.append({"folder": str(base), "ids": ids.tolist(), "texts": [], "adapter": str(one)})
            want.append(logits(model, params, ids))
    answers = ask(older, tmp_path, asked)
    pairs = zip(answers, want, strict=True)
    apart = [float(np.abs(np.array(a["logits"]) - b).max()) if "logits" in a else a for a, b in pairs]
    assert [one for one in apart if not isinstance(one, float) or one > 1e-4] == []
