"""Tests the tokenizer files of outputs: the base's own, or files that transformers 4 and 5 read alike."""

import json
import shutil

import pytest
from gguf_writing import hub_folder, sentencepiece_keys, write_llama
from qwen_tokenizer import SPECIAL, qwen
from tiny_tokenizer import CHAT, make_tokenizer
from transformers import AutoTokenizer

from ftjax.config import ModelConfig
from ftjax.hub.tokenizer.files import write_tokenizer
from ftjax.hub.tokenizer.load import load_tokenizer

OTHER = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEXTS = ["once upon a  time", "héllo<|im_end|> <tool_call>\n\n x"]


def written(tmp_path, base, whole=True, **settings):
    """Return `(the folder, what transformers 5 loads from it, what the run used)`."""
    out = tmp_path / "out"
    out.mkdir()
    if whole:
        (out / "config.json").write_text((base / "config.json").read_text() if (base / "config.json").is_file() else "{}")
    model = ModelConfig(path=str(base), **settings)
    tokenizer = load_tokenizer(model)
    write_tokenizer(out, tokenizer, model, base)
    for file in out.iterdir():
        if file.suffix in (".json", ".jinja"):
            found = [word for word in ("TokenizersBackend", "is_local", "local_files_only") if word in file.read_text()]
            assert not found, file.name
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert not isinstance(config.get("extra_special_tokens"), list)
    if not (out / "config.json").is_file() or (out / "config.json").read_text() == "{}":
        (out / "config.json").unlink(missing_ok=True)
    again = AutoTokenizer.from_pretrained(out)
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert again.special_tokens_map == tokenizer.special_tokens_map and again.chat_template == tokenizer.chat_template
    return out, config, tokenizer


def names(folder):
    return {file.name for file in folder.iterdir()} - {"config.json"}


def same_bytes(base, out):
    return {
        file.name
        for file in base.iterdir()
        if (out / file.name).is_file() and file.read_bytes() == (out / file.name).read_bytes()
    }


@pytest.mark.parametrize("whole", [True, False], ids=["model", "adapter"])
@pytest.mark.parametrize("settings", [{}, {"add_tokens": [SPECIAL[3]]}, {"chat_template": CHAT.replace("bos_token", "''")}])
def test_nothing_was_added(tmp_path, whole, settings):
    """The folder has exactly the base's files, byte for byte."""
    base = qwen(tmp_path / "base")
    (base / "added_tokens.json").write_text("{}")
    (base / "other.py").write_text("")
    out, _, _ = written(tmp_path, base, whole, **settings)
    assert names(out) == same_bytes(base, out) == names(base) - {"other.py"}


def test_another_chat_template(tmp_path):
    """The template is written to the file that readers use; the rest stays."""
    base = qwen(tmp_path / "base")
    out, config, _ = written(tmp_path, base, chat_template=OTHER)
    assert config["chat_template"] == (out / "chat_template.jinja").read_text() == OTHER
    assert same_bytes(base, out) == names(base) - {"tokenizer_config.json"}
    theirs = json.loads((base / "tokenizer_config.json").read_text())
    assert {**config, "chat_template": theirs["chat_template"]} == theirs


def test_a_template_in_a_file_of_its_own(tmp_path):
    base = qwen(tmp_path / "base", chat_template="left out")
    (base / "chat_template.jinja").write_text(OTHER)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    out, _, tokenizer = written(tmp_path, base)
    assert tokenizer.chat_template == {"default": OTHER, "tool_use": "{{ tools }}"}
    assert names(out) == names(base)
    shutil.rmtree(out)
    out, _, tokenizer = written(tmp_path, base, chat_template="tool_use")
    assert (out / "chat_template.jinja").read_text() == "{{ tools }}" and not (out / "additional_chat_templates").exists()


def test_tokens_were_added(tmp_path):
    """The files name one class for all versions, and list the tokens with their kinds for older readers."""
    base = qwen(tmp_path / "base")
    out, config, tokenizer = written(tmp_path, base, add_tokens=["kilogram"], add_special_tokens=["<call>"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"] and "extra_special_tokens" not in config
    kinds = {token["content"]: token["special"] for token in config["added_tokens_decoder"].values()}
    assert kinds == {**{t: t != SPECIAL[3] for t in SPECIAL}, "kilogram": False, "<call>": True}
    assert config["model_input_names"] == ["input_ids", "attention_mask"] and config["model_max_length"] == 512
    ids = tokenizer("a kilogram<call>").input_ids
    assert AutoTokenizer.from_pretrained(out)("a kilogram<call>").input_ids == ids
    assert AutoTokenizer.from_pretrained(out).decode(ids, skip_special_tokens=True) == "a kilogram"


def test_a_token_becomes_special(tmp_path):
    _, config, _ = written(tmp_path, qwen(tmp_path / "base"), add_special_tokens=[SPECIAL[3]])
    assert all(token["special"] for token in config["added_tokens_decoder"].values())


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True},
        {"extra_special_tokens": ["<|im_start|>"]},
        {"local_files_only": True},
    ],
    ids=["class", "list", "place"],
)
def test_what_transformers_5_has_saved(tmp_path, changes):
    """tokenizer.json stays; the configuration gets names that transformers 4 knows."""
    base = tmp_path / "base"
    AutoTokenizer.from_pretrained(qwen(tmp_path / "older")).save_pretrained(base)
    saved = {**json.loads((base / "tokenizer_config.json").read_text()), **changes}
    (base / "tokenizer_config.json").write_text(json.dumps(saved))
    out, config, _ = written(tmp_path, base)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "tokenizer.json" in same_bytes(base, out)


def test_an_adapter_names_the_class(tmp_path):
    """If the configuration names no class, that of config.json is written, which an adapter's folder lacks."""
    base = qwen(tmp_path / "base", tokenizer_class="left out")
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    out, config, _ = written(tmp_path, base, whole=False)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    shutil.rmtree(out)
    out, _, _ = written(tmp_path, base)
    assert names(out) == same_bytes(base, out) - {"config.json"} == names(base)


def test_of_a_gguf_file(llama, tmp_path):
    config, tensors = hub_folder(llama)
    keys = sentencepiece_keys(llama / "tokenizer.model", bos=1, eos=2, unknown=0)
    path = write_llama(tmp_path / "model.gguf", config, tensors, tokenizer=keys)
    _, config, _ = written(tmp_path, path, whole=False)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_of_a_sentencepiece_model(pieces, tmp_path):
    out, config, _ = written(tmp_path, pieces, whole=False)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "tokenizer.model" in same_bytes(pieces, out)
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize("added", [[], ["<call>"]], ids=["alone", "added"])
def test_the_sentencepiece_model_beside_it(llama, tmp_path, added):
    """llama.cpp's converter reads it, and the tokens that are not in it from the configuration."""
    out, config, tokenizer = written(tmp_path, llama, add_special_tokens=added)
    assert "tokenizer.model" in same_bytes(llama, out)
    assert ("tokenizer.json" in same_bytes(llama, out)) == (not added)
    assert (str(len(tokenizer) - 1) in config["added_tokens_decoder"]) == bool(added)


def test_a_sentencepiece_model_of_another_tokenizer(llama, tmp_path):
    """It would make other tokens of a text."""
    make_tokenizer().save_pretrained(tmp_path / "other")
    out, _, _ = written(tmp_path, llama, tokenizer=str(tmp_path / "other"))
    assert "tokenizer.model" not in names(out)


def test_the_base_has_what_an_adapters_tokenizer_lacks(llama, tmp_path):
    """A folder that transformers 5 saved lost its SentencePiece model."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    out, _, _ = written(tmp_path, llama, tokenizer=str(tmp_path / "adapter"))
    assert "tokenizer.model" in same_bytes(llama, out)
