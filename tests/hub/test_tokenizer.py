"""Tests tokenizers from folders, GGUF files and SentencePiece models."""

import json
import shutil

import pytest
from gguf_writing import hub_folder, sentencepiece_keys, write_llama
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from ftjax.config import ModelConfig
from ftjax.errors import UserError
from ftjax.hub.tokenizer.load import load_tokenizer

TEXTS = [
    "hi",
    " a",
    "  two  spaces   three ",
    "def f(x):\n    return x  # 1\n",
    "héllo 🙂 漢字",
    "\t\n x",
    "10 000",
    "the " * 20,
]


@pytest.fixture
def spm(pieces, tmp_path):
    """A folder with nothing but a SentencePiece model, to be changed."""
    (tmp_path / "spm").mkdir()
    shutil.copyfile(pieces / "tokenizer.model", tmp_path / "spm" / "tokenizer.model")
    return tmp_path / "spm"


def load(path, **settings):
    return load_tokenizer(ModelConfig(path=str(path), **settings))


def test_a_folder_is_what_autotokenizer_loads(llama):
    mine, theirs = load(llama), AutoTokenizer.from_pretrained(llama)
    assert mine.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert mine.special_tokens_map == theirs.special_tokens_map


def test_nothing_is_added_to_it(llama, tmp_path):
    """No pad token, no template, no new id: what is saved is what was loaded."""
    folder = shutil.copytree(llama, tmp_path / "bare")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(folder)
    assert tokenizer.pad_token is None and tokenizer.chat_template is None and len(tokenizer) == 512
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert saved == json.loads((llama / "tokenizer.json").read_text())


def test_of_a_gguf_file(llama, tmp_path):
    config, tensors = hub_folder(llama)
    keys = sentencepiece_keys(llama / "tokenizer.model", bos=1, eos=2, unknown=0)
    path = write_llama(tmp_path / "model.gguf", config, tensors, tokenizer=keys)
    assert load(path)("the cat").input_ids == load(llama)("the cat").input_ids


def test_a_sentencepiece_model_alone_has_its_own_ids(spm, tmp_path):
    original = SentencePieceProcessor(str(spm / "tokenizer.model"))
    tokenizer = load(spm)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert tokenizer(text).input_ids == again(text).input_ids == [1, *original.encode(text)], text
        assert tokenizer.decode(original.encode(text)) == original.decode(original.encode(text))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<unk>",
        None,
    )


def test_a_sentencepiece_model_that_joins_spaces(llama, tmp_path):
    """Its `remove_extra_whitespaces` is honoured."""
    (tmp_path / "spm").mkdir()
    shutil.copyfile(llama / "tokenizer.model", tmp_path / "spm" / "tokenizer.model")
    original = SentencePieceProcessor(str(llama / "tokenizer.model"))
    for text in TEXTS:
        assert load(tmp_path / "spm")(text).input_ids == [1, *original.encode(text)], text


def test_a_sentencepiece_model_with_its_json_files(spm):
    original = SentencePieceProcessor(str(spm / "tokenizer.model"))
    pad = original.get_piece_size()
    end = pad + 1
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True, "model_max_length": 77,
        "bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "<|im_end|>", "pad_token": "<pad>",
        "chat_template": "{{ messages[0]['content'] }}",
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": True},
                                 str(end): {"content": "<|im_end|>", "special": True, "lstrip": False}},
    }  # fmt: skip
    (spm / "tokenizer_config.json").write_text(json.dumps(config))
    (spm / "added_tokens.json").write_text(json.dumps({"<pad>": pad, "<|im_end|>": end}))
    tokenizer = load(spm)
    assert tokenizer("hi").input_ids == [*original.encode("hi"), end]
    assert tokenizer("hi<|im_end|>", add_special_tokens=False).input_ids == [*original.encode("hi"), end]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (end, pad, 77)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    assert tokenizer.decode([*original.encode("hi"), end], skip_special_tokens=True) == "hi"
    (spm / "added_tokens.json").write_text(json.dumps({"<pad>": pad + 5}))
    with pytest.raises(UserError, match=rf"'<\|im_end\|>' has id {end}, but .* leave it {pad}; the files are not of one"):
        load(spm)


def test_another_tokenizer_and_template(untrained, spm, tmp_path):
    count = SentencePieceProcessor(str(spm / "tokenizer.model")).get_piece_size()
    assert len(load(untrained, tokenizer=str(spm))) == count != len(load(untrained))
    assert load(untrained, chat_template="{{ 'inline' }}").chat_template == "{{ 'inline' }}"
    file = tmp_path / "mine.jinja"
    file.write_text("{{ 'from a file' }}\n")
    tokenizer = load(untrained, chat_template=str(file))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "from a file"
    with pytest.raises(UserError, match=r"model\.chat_template: nothing\.jinja: expected a Jinja template or the path"):
        load(untrained, chat_template="nothing.jinja")


def test_no_tokenizer(untrained, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(untrained / name, tmp_path / name)
    with pytest.raises(UserError, match=r"expected a tokenizer .*; found config.json, model.safetensors. .*model.tokenizer"):
        load(tmp_path)


def test_broken_files(untrained, spm, tmp_path):
    folder = shutil.copytree(untrained, tmp_path / "broken")
    text = (folder / "tokenizer.json").read_text()
    lines = text[: len(text) // 2].count("\n") + 1
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=rf"tokenizer\.json:{lines}: not valid JSON .*cut off"):
        load(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unknown"}}')
    with pytest.raises(UserError, match=f"{folder}: the tokenizer cannot be loaded: .*model.tokenizer"):
        load(folder)
    (spm / "tokenizer.model").write_bytes((spm / "tokenizer.model").read_bytes()[:3000])
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model, or cut off \(3,000 bytes\)"):
        load(spm)


def test_code_that_comes_with_a_model_is_never_run(untrained, tmp_path):
    folder = shutil.copytree(untrained, tmp_path / "code")
    mark = tmp_path / "it was run"
    (folder / "tokenization_own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="it needs Python code that comes with the model, which ftjax never runs"):
        load(folder)
    assert not mark.exists()
