"""Builds a tokenizer of 96 tokens: letters, digits and punctuation, one character each, with BOS and EOS."""

import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def make_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    characters = string.ascii_letters + string.digits + " .,!?:;'\"()[]{}-+*/=<>_\n@#"
    vocab = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    assert len(vocab) <= 96
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    if chat:
        fast.chat_template = CHAT
    return fast


def save_tokenizer(folder: Path, chat: bool = False) -> None:
    make_tokenizer(chat).save_pretrained(folder)
