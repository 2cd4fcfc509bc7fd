"""Writes a tokenizer folder as transformers 4 did: a class, and files that transformers 5 writes differently or not at all."""

import json
from pathlib import Path

from tiny_tokenizer import CHAT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>")


def qwen(folder: Path, **changes: object) -> Path:
    """Write Qwen's tokenizer with 304 tokens; `changes` apply to tokenizer_config.json, where "left out" removes a key."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["once upon a time there was a little girl " * 3], trainer)
    tokenizer.add_special_tokens(list(SPECIAL[:3]))
    tokenizer.add_tokens([SPECIAL[3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    shape = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_prefix_space": False, "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "model_max_length": 512, "unk_token": None,
        "bos_token": None, "errors": "replace", "split_special_tokens": False, "chat_template": CHAT.replace("bos_token", "''"),
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(t)): {"content": t, "special": t != SPECIAL[3], **shape} for t in SPECIAL
        },
        **changes,
    }  # fmt: skip
    text = json.dumps({name: value for name, value in config.items() if value != "left out"}, indent=3)
    (folder / "tokenizer_config.json").write_text(text)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))
    return folder
