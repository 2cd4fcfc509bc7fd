"""Tests tokenizers written as GGUF keys: what stands in them, that they read back to the same ids, and what is refused."""

import json
import random
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from story_text import write_stories
from tiny_tokenizer import CHAT, make_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ftjax.errors import UserError
from ftjax.hub.gguf.modelfile import frame_of, write_modelfile
from ftjax.hub.gguf.pretokenizer import SPLITTINGS, names_of
from ftjax.hub.gguf.scores import piece_scores
from ftjax.hub.gguf.tokenizer import build_tokenizer
from ftjax.hub.gguf.tokenizer_keys import Kind, model_name, tokenizer_keys

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ROWS = 720


def byte_level(name: str = "gpt-2", **options) -> PreTrainedTokenizerFast:
    """Return a small byte-level BPE that splits text as llama.cpp's `name`."""
    splitting = SPLITTINGS[name]
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitting.ignore_merges))
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = splitting.pre_tokenizer(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(write_stories(200, seed=0), trainer)
    tokenizer.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], **options)


def changed(tokenizer: PreTrainedTokenizerFast, change, **options) -> PreTrainedTokenizerFast:
    """Return the tokenizer with `change` applied to its tokenizer.json."""
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    change(made)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(made)), **options)


def keys_of(tokenizer, rows: int = ROWS, ends=(), folder: Path | None = None, bos=None) -> tuple[dict, list[str]]:
    notes: list[str] = []
    keys = tokenizer_keys(tokenizer, rows, ends, bos, folder, notes.append)
    return {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in keys.items()}, notes


def texts(count: int = 200) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choice("abeht \n\t\U0001f600é漢0123,.'<>|") for _ in range(rng.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("name", sorted(SPLITTINGS))
def test_splitting_has_its_name_by_its_pattern(name):
    steps = json.loads(SPLITTINGS[name].pre_tokenizer().__getstate__())
    assert name in names_of(steps["pretokenizers"])


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "gpt-4o", "tekken"])
def test_bytes(name):
    tokenizer = byte_level(name)
    keys, notes = keys_of(tokenizer)
    assert keys["model"] == "gpt2" and SPLITTINGS[keys["pre"]] == SPLITTINGS[name] and not notes
    vocabulary = tokenizer.get_vocab()
    assert len(keys["tokens"]) == len(keys["token_type"]) == ROWS
    for token, index in vocabulary.items():
        assert keys["tokens"][index] == token
    kinds = dict(zip(keys["tokens"], keys["token_type"], strict=True))
    assert {kinds[one] for one in SPECIAL} == {Kind.CONTROL} and kinds["<think>"] == Kind.USER_DEFINED
    assert kinds["a"] == Kind.NORMAL and keys["tokens"][-1] == f"[PAD{ROWS - 1}]" and keys["token_type"][-1] == Kind.UNUSED
    again = build_tokenizer(Path("x"), keys)
    for text in texts():
        assert again(text).input_ids == tokenizer(text).input_ids, text


def test_special_tokens():
    tokenizer = byte_level(bos_token=SPECIAL[1])
    keys, _ = keys_of(tokenizer, ends={2})
    assert not keys["add_bos_token"] and not keys["add_eos_token"]
    assert {name: keys.get(f"{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding", "unknown")} == {
        "bos": 1, "eos": 2, "eot": None, "eom": None, "padding": 0, "unknown": None
    }  # fmt: skip
    special = list(zip(SPECIAL, range(3), strict=True))
    around = processors.TemplateProcessing(single=f"{SPECIAL[1]} $A {SPECIAL[2]}", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = around
    keys, _ = keys_of(tokenizer)
    assert keys["add_bos_token"] and keys["add_eos_token"]
    after = processors.TemplateProcessing(single=f"$A {SPECIAL[0]}", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = after
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        keys_of(tokenizer)
    keys, _ = keys_of(byte_level())
    assert keys["bos_token_id"] == 2  # llama.cpp would take token 11
    assert [keys_of(byte_level(), bos=bos)[0]["bos_token_id"] for bos in (0, ROWS)] == [0, 2]


def test_ends():
    """The tokenizer's EOS comes first; beyond three, those are named that llama.cpp does not know by their text."""
    tokenizer = byte_level()
    keys, notes = keys_of(tokenizer, ends={0, 2, 7})
    assert (keys["eos_token_id"], keys["eot_token_id"], keys["eom_token_id"]) == (2, 0, 7) and not notes
    _, notes = keys_of(tokenizer, ends={0, 2, 7, 9})
    assert len(notes) == 1 and tokenizer.convert_ids_to_tokens(9) in notes[0]


def test_chat_templates():
    tokenizer = byte_level(chat_template=CHATML)
    assert keys_of(tokenizer)[0]["chat_template"] == CHATML
    tokenizer.chat_template = {"default": CHATML, "tool_use": "x"}
    keys, _ = keys_of(tokenizer)
    assert (keys["chat_template"], keys["chat_template.tool_use"]) == (CHATML, "x")


def test_whole_tokens(tmp_path):
    """Whether whole tokens are taken without merges only matters if merges do not lead to one."""
    tokenizer = changed(byte_level("dbrx"), lambda made: made["model"].update(ignore_merges=True), eos_token=SPECIAL[2])
    assert keys_of(tokenizer)[0]["pre"] == "llama-bpe"
    tokenizer = changed(byte_level("gpt-4o"), lambda made: made["model"].update(ignore_merges=True), eos_token=SPECIAL[2])
    assert keys_of(tokenizer)[0]["pre"] == "gpt-4o"

    def odd(made):
        made["model"]["ignore_merges"] = True
        made["model"]["vocab"]["zqzqzq"] = len(made["model"]["vocab"]) + 1

    with pytest.raises(UserError, match=r"whole tokens without merges.*'zqzqzq'"):
        keys_of(changed(byte_level("gpt-4o"), odd, eos_token=SPECIAL[2]))


def test_refused():
    with pytest.raises(UserError, match="of type WordLevel"):
        keys_of(make_tokenizer())
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0)))
    with pytest.raises(UserError, match="of type Unigram"):
        keys_of(unigram)
    with pytest.raises(UserError, match=r"it has the id \d+, and the model 300 rows"):
        keys_of(byte_level(), rows=300)
    tokenizer = byte_level()
    parts = [
        pre_tokenizers.Split(Regex(r"\p{Lu}+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    with pytest.raises(UserError, match=r"no name that ftjax knows for how it splits text \(Split, ByteLevel, \\p\{Lu\}\+\)"):
        keys_of(tokenizer)
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match=r"splits text \(Lowercase, ByteLevel\)"):
        keys_of(tokenizer)


def test_spaces_beside_special_tokens():
    """llama.cpp knows of them in Phi-3 only, by the model's name."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|x|>", rstrip=True, special=True)]})
    assert "keeps spaces beside <|x|>" in keys_of(tokenizer)[1][0]
    assert model_name("my-phi-3-mini", tokenizer) == "my-Phi 3-mini" and model_name("mine", tokenizer) == "mine"
    phi = make_tokenizer()
    phi.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]})
    for token in ("</s>", "<pad>"):
        phi.add_tokens([AddedToken(token, rstrip=True, special=True, normalized=False)], special_tokens=True)
    assert model_name("mine", phi) == "Phi-3 mine" and model_name("Phi-3-mini", phi) == "Phi-3-mini"


# SentencePiece


def test_sentencepiece(llama):
    """Scores are the model's; without it, any that give the same merges. The ids are the same."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    pieces = SentencePieceProcessor(str(llama / "tokenizer.model"))
    found = [keys_of(tokenizer, 512, {2}, folder)[0] for folder in (llama, None)]
    scores = [pieces.get_score(index) for index in range(512)]
    assert found[0]["scores"] == pytest.approx(scores, rel=1e-6)
    for keys in found:
        assert (keys["model"], keys["pre"], keys["add_space_prefix"], keys["add_bos_token"]) == ("llama", "default", True, True)
        assert keys["token_type"][:4] == [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, Kind.BYTE]
        again = build_tokenizer(Path("x"), keys)
        for text in [*texts(), "x <s> y</s>z", ""]:
            assert again(text).input_ids == tokenizer(text).input_ids, text


def test_a_space_before_the_first_word_alone(llama):
    """llama.cpp puts a space after every special token or nowhere: what is right through the chat template is taken."""

    def first(made):
        made["normalizer"] = None
        made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}

    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT}
    keys, notes = keys_of(changed(AutoTokenizer.from_pretrained(llama), first, **options), 512)
    assert keys["add_space_prefix"] is False and "not for plain text such as" in notes[0]
    keys, notes = keys_of(changed(AutoTokenizer.from_pretrained(llama), first, **{**options, "chat_template": None}), 512)
    assert keys["add_space_prefix"] is True and notes == ["llama.cpp gives the same ids but for texts such as ' a'"]


def test_no_space_before_the_first_word(llama):
    """Gemma's tokenizer replaces spaces and adds none."""

    def gemmas(made):
        made["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}

    tokenizer = changed(AutoTokenizer.from_pretrained(llama), gemmas, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    keys, notes = keys_of(tokenizer, 512, folder=llama)
    assert keys["add_space_prefix"] is False and not notes
    again = build_tokenizer(Path("x"), keys)
    for text in texts():
        assert again(text).input_ids == tokenizer(text).input_ids, text


def test_runs_of_one_character_may_have_one_score():
    """The merges of Gemma's runs of spaces alternate, since their scores are the same."""
    tokens = ["a", "aa", "aaa", "aaaa", "b", "ab"]
    merges = [("aaa", "a"), ("aa", "aa"), ("aa", "a"), ("a", "aaa"), ("a", "aa"), ("a", "a"), ("a", "b")]
    kinds = [Kind.NORMAL] * len(tokens)
    assert piece_scores(merges, tokens, kinds, None) == [-4.0, -1.0, 0.0, 0.0, -4.0, -2.0]
    assert piece_scores(merges[1:], tokens, kinds, None) is None  # SentencePiece would merge these, too
    other = ["a", "b", "c", "ab", "bc", "abc"]
    assert piece_scores([("ab", "c"), ("b", "c"), ("a", "bc"), ("a", "b")], other, kinds, None) is None


def test_merges_without_scores_are_refused(llama):
    def shuffled(made):
        random.Random(0).shuffle(made["model"]["merges"])

    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    with pytest.raises(UserError, match="do not follow from a score of each token"):
        keys_of(changed(AutoTokenizer.from_pretrained(llama), shuffled, **options), 512, folder=llama)


# Modelfile


def test_modelfile(tmp_path):
    tokenizer = byte_level(chat_template=CHATML)
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    write_modelfile(tmp_path / "m.Modelfile", tmp_path / "m.gguf", tokenizer=tokenizer, stops=["<|im_end|>"], settings=settings)
    assert (tmp_path / "m.Modelfile").read_text() == (
        '# ollama create m -f m.Modelfile\nFROM ./m.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}'
        "<|im_end|>\n{{ else }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ end }}'
        '{{ if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}'
        "{{ end }}<|im_start|>assistant\n"
        '"""\nPARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.6\nPARAMETER top_p 0.9\n'
    )
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}"
    assert frame_of(tokenizer) is None
    write_modelfile(tmp_path / "m.Modelfile", tmp_path / "m.gguf", tokenizer=tokenizer)
    assert "TEMPLATE" not in (tmp_path / "m.Modelfile").read_text()
    write_modelfile(tmp_path / "a.Modelfile", tmp_path / "a.gguf")
    assert "FROM ./base.gguf\nADAPTER ./a.gguf\n" in (tmp_path / "a.Modelfile").read_text()


def test_bos_is_left_to_llama_cpp():
    tokenizer = make_tokenizer(chat=True)
    frame = frame_of(tokenizer)
    assert frame is not None and frame.user == ("[u]", "</s>") and frame.assistant == ("[a]", "</s>") and frame.default == ""
