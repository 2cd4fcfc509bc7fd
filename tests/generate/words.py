"""Builds models and tokenizers for the tests of generation."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def words(vocab: int = 96, **special) -> PreTrainedTokenizerFast:
    """Return a tokenizer as small as the models: the word `t7` is token 7."""
    model = WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)
