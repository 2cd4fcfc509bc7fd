"""A small Llama, with its tokenizer, that the suite trains from random weights: a pretrained model without a download."""

import io
import json
import shutil
import string
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from oracle import Case, make_hf, one_device
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from story_text import write_stories
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "initializer_range": 0.02,
}  # fmt: skip


def train_pieces(file: Path, texts: Iterable[str], size: int, **options) -> None:
    """Write a SentencePiece BPE like Llama 2's: byte fallback, digits apart, no normalisation of characters."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=size, byte_fallback=True,
        character_coverage=1.0, split_digits=True, allow_whitespace_only_pieces=True, normalization_rule_name="identity",
        required_chars=string.digits + string.ascii_letters + string.punctuation, self_test_sample_size=0, num_threads=1,
        minloglevel=2, **options,
    )  # fmt: skip
    file.write_bytes(model.getvalue())


def as_tokenizer_json(file: Path) -> Tokenizer:
    """A SentencePiece BPE in the form that published Llamas have in tokenizer.json."""
    pieces = SentencePieceProcessor(str(file))
    vocab = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    special = {piece for piece, i in vocab.items() if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i)}
    pairs = [(piece[:cut], piece[cut:]) for piece in vocab if piece not in special for cut in range(1, len(piece))]
    pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    pairs.sort(key=lambda pair: (-pieces.get_score(vocab["".join(pair)]), vocab[pair[0]], vocab[pair[1]]))
    made = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:0", special_tokens=[("<s>", 1)])
    return made


def write_untrained(folder: Path) -> None:
    """Write a Llama of random weights, with the tokenizer as tokenizer.json and as tokenizer.model."""
    make_hf(Case("stories", "llama", SIZES), folder)
    train_pieces(folder / "tokenizer.model", write_stories(600, seed=0), SIZES["vocab_size"])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=as_tokenizer_json(folder / "tokenizer.model"), **special)
    tokenizer.save_pretrained(folder)


def write_pieces(folder: Path) -> None:
    """Write a SentencePiece model that keeps every space."""
    texts = [text.replace(". ", ".  ") for text in write_stories(600, seed=0)]
    train_pieces(folder / "tokenizer.model", texts, 560, remove_extra_whitespaces=False)


def train_on_stories(base: Path, folder: Path) -> None:
    """Write the model of `base` as it is after 200 updates of 8 stories, which `ftjax train` makes on one device."""
    import ftjax.train.setup as setup
    from ftjax.config import Config
    from ftjax.train.run import train

    with TemporaryDirectory() as work, pytest.MonkeyPatch.context() as patch:
        data, run = Path(work, "stories.jsonl"), Path(work, "run")
        data.write_text("".join(f"{json.dumps({'text': text})}\n" for text in write_stories(1600, seed=1)))
        config = Config.model_validate({
            "model": {"path": str(base), "dtype": "float32", "compute_dtype": "float32", "remat": "none"},
            "method": {"name": "full"},
            "data": {"train": str(data), "max_length": 112},
            "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0.05},
            "training": {"global_batch_size": 8, "save_steps": 1000, "logging_steps": 50, "report_to": []},
            "output_dir": str(run),
        })  # fmt: skip
        patch.setattr(setup, "make_mesh", lambda config, devices=None: one_device())
        train(config)
        shutil.copytree(base, folder, dirs_exist_ok=True)
        shutil.copyfile(run / "final" / "model.safetensors", folder / "model.safetensors")
