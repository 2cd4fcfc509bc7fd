"""Builds tokenizers with merges for tests: byte-level BPE like GPT-2's, and one that puts a space before every text, like Llama
2's; with chat templates like those of published models."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Hello world, how are you today? I am fine, thank you. The answer is 42 and the question is unknown.\n",
    "Once upon a time there was a little girl named Lily. She loved to play with her toys in the park.\n",
    "Question: What is two plus two?\nAnswer: two plus two is four. The world is round, my friends.\n",
    "### Instruction:\nAdd the numbers.\n\n### Response:\nuser assistant system hello there world wide\n",
] * 3

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
WITH_BOS = "{{ bos_token }}" + CHATML
WITHOUT_ENDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL = (  # like templates that omit the assistant's reasoning in earlier turns
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}{{ m.content[:2] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}" + CHATML


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=520, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@cache
def _spaced() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=620, show_progress=False, max_token_length=8,
        special_tokens=["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *(f"<0x{i:02X}>" for i in range(256))],
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # The bytes are ordinary tokens of the vocabulary; only the others are special.
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(made)


def byte_level(template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer that adds no BOS; EOS is also the padding token."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level()), eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    fast.chat_template = template
    return fast


def spaced(template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts BOS and a space before every text; EOS is also the padding token."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_spaced()), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    fast.chat_template = template
    return fast
