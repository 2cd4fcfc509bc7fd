"""Models and tokenizers that the tests of generation share."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast


def words(vocab: int = 96, **special) -> PreTrainedTokenizerFast:
    """A tokenizer as small as the models: the word `t7` is token 7."""
    model = WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)
