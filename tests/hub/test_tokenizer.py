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
def mistral(shared, tmp_path):
    """Return a folder with nothing but a SentencePiece model."""
    folder = tmp_path / "mistral"
    folder.mkdir()
    shutil.copyfile(shared / "models" / "tokenizer_mistral_v1" / "tokenizer.model", folder / "tokenizer.model")
    return folder


def load(path, **settings):
    return load_tokenizer(ModelConfig(path=str(path), **settings))


def test_a_folder_is_what_autotokenizer_loads(stories):
    mine, theirs = load(stories), AutoTokenizer.from_pretrained(stories)
    assert mine.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert mine.special_tokens_map == theirs.special_tokens_map


def test_nothing_is_added_to_it(stories, tmp_path):
    """The saved tokenizer is the loaded one, without a new pad token, template or id."""
    folder = shutil.copytree(stories, tmp_path / "bare")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(folder)
    assert tokenizer.pad_token is None and tokenizer.chat_template is None and len(tokenizer) == 512
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert saved == json.loads((stories / "tokenizer.json").read_text())


def test_of_a_gguf_file(stories, tmp_path):
    config, tensors = hub_folder(stories)
    keys = sentencepiece_keys(stories / "tokenizer.model", bos=1, eos=2, unknown=0)
    path = write_llama(tmp_path / "stories.gguf", config, tensors, tokenizer=keys)
    assert load(path)("the cat").input_ids == load(stories)("the cat").input_ids


def test_a_sentencepiece_model_alone_has_its_own_ids(mistral, tmp_path):
    original = SentencePieceProcessor(str(mistral / "tokenizer.model"))
    tokenizer = load(mistral)
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


def test_a_sentencepiece_model_that_joins_spaces(stories, tmp_path):
    """The model's `remove_extra_whitespaces` has its effect."""
    (tmp_path / "spm").mkdir()
    shutil.copyfile(stories / "tokenizer.model", tmp_path / "spm" / "tokenizer.model")
    original = SentencePieceProcessor(str(stories / "tokenizer.model"))
    for text in TEXTS:
        assert load(tmp_path / "spm")(text).input_ids == [1, *original.encode(text)], text


def test_a_sentencepiece_model_with_its_json_files(mistral):
    original = SentencePieceProcessor(str(mistral / "tokenizer.model"))
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True, "model_max_length": 77,
        "bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "<|im_end|>", "pad_token": "<pad>",
        "chat_template": "{{ messages[0]['content'] }}",
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": True},
                                 "32001": {"content": "<|im_end|>", "special": True, "lstrip": False}},
    }  # fmt: skip
    (mistral / "tokenizer_config.json").write_text(json.dumps(config))
    (mistral / "added_tokens.json").write_text(json.dumps({"<pad>": 32000, "<|im_end|>": 32001}))
    tokenizer = load(mistral)
    assert tokenizer("hi").input_ids == [*original.encode("hi"), 32001]
    assert tokenizer("hi<|im_end|>", add_special_tokens=False).input_ids == [*original.encode("hi"), 32001]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (32001, 32000, 77)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    assert tokenizer.decode([*original.encode("hi"), 32001], skip_special_tokens=True) == "hi"
    (mistral / "added_tokens.json").write_text(json.dumps({"<pad>": 32005}))
    with pytest.raises(UserError, match=r"'<\|im_end\|>' has id 32001, but .* leave it 32000; the files are not of one"):
        load(mistral)


@pytest.mark.parametrize("form", [str, lambda token: {"content": token, "lstrip": False}], ids=["text", "object"])
@pytest.mark.parametrize("file", ["special_tokens_map.json", "tokenizer_config.json"])
def test_special_tokens_of_older_folders(mistral, file, form):
    """Before transformers wrote `added_tokens_decoder`, the ids were in one file and the meanings in another."""
    named = {"eos_token": form("<|im_end|>"), "pad_token": form("<pad>"), "additional_special_tokens": [form("<|im_start|>")]}
    if file == "special_tokens_map.json":
        (mistral / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}))
    (mistral / file).write_text(json.dumps(named))
    added = ["<pad>", "<|im_start|>", "<|im_end|>", "<word>"]
    (mistral / "added_tokens.json").write_text(json.dumps({token: 32000 + n for n, token in enumerate(added)}))
    tokenizer = load(mistral)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (32002, 32000, 32004)
    assert {token.content: token.special for token in tokenizer.added_tokens_decoder.values()} == {
        **dict.fromkeys(["<unk>", "<s>", "</s>", *added[:3]], True), "<word>": False,
    }  # fmt: skip
    ids = tokenizer("hi<|im_start|><word><|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "hi<word>"


def test_another_tokenizer_and_template(stories, mistral, tmp_path):
    assert len(load(stories, tokenizer=str(mistral))) == 32000
    assert load(stories, chat_template="{{ 'inline' }}").chat_template == "{{ 'inline' }}"
    file = tmp_path / "mine.jinja"
    file.write_text("{{ 'from a file' }}\n")
    tokenizer = load(stories, chat_template=str(file))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "from a file"
    with pytest.raises(UserError, match=r"model\.chat_template: nothing\.jinja: expected a Jinja template or the path"):
        load(stories, chat_template="nothing.jinja")


def test_no_tokenizer(stories, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(stories / name, tmp_path / name)
    with pytest.raises(UserError, match=r"expected a tokenizer .*; found config.json, model.safetensors. .*model.tokenizer"):
        load(tmp_path)


def test_broken_files(stories, mistral, tmp_path):
    folder = shutil.copytree(stories, tmp_path / "broken")
    text = (folder / "tokenizer.json").read_text()
    lines = text[: len(text) // 2].count("\n") + 1
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=rf"tokenizer\.json:{lines}: not valid JSON .*cut off"):
        load(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Unknown"}}')
    with pytest.raises(UserError, match=f"{folder}: the tokenizer cannot be loaded: .*model.tokenizer"):
        load(folder)
    (mistral / "tokenizer.model").write_bytes((mistral / "tokenizer.model").read_bytes()[:30000])
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model, or cut off \(30,000 bytes\)"):
        load(mistral)


def test_code_that_comes_with_a_model_is_never_run(stories, tmp_path):
    folder = shutil.copytree(stories, tmp_path / "code")
    mark = tmp_path / "it was run"
    (folder / "tokenization_own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="it needs Python code that comes with the model, which ftjax never runs"):
        load(folder)
    assert not mark.exists()
