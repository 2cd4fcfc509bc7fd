"""Tests generation of every family: it answers as transformers does, and the cache does not change the logits."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CASES, FEW, OF_EACH_KIND
from generate.words import words
from oracle import assert_cached_is_uncached, hf_logits, load, make_hf, one_device, tokens
from processes import ALL

from ftjax.config import MeshConfig
from ftjax.generate import separate
from ftjax.generate.session import Generator
from ftjax.mesh import make_mesh

NEW = 30
LENGTHS = (7, 24, 16)  # shorter and longer than the windows of the cases; 24 + NEW is past every original length


# What a variant of a family changes is proved by its logits, with and without a cache; only a RoPE that depends on the length
# of the text changes what a batch of rows must do. `make test-all` generates with every family and variant.
GENERATING = [case for case in CASES if ALL or case in FEW or case.name == "llama-dynamic"]
SCALED = "ministral3"  # its queries are, by their position
LIKE_LLAMA = ("gpt2", "mixtral", "gemma3_text")  # in what they remember
CACHED = [
    case for case in CASES
    if case in GENERATING or case.name == SCALED or (case in OF_EACH_KIND and case.model_type not in LIKE_LLAMA)
]  # fmt: skip
# Families that remember something else than Llama does generate on eight devices, the others on one. Sinks and windows change
# nothing in how it is sharded, and Gemma 4's keys and values are like Llama's.
SHARDED = FEW if ALL else [case for case in FEW if case.model_type not in ("llama", "gpt_oss")]
ON_ONE = [case for case in GENERATING if ALL or case not in SHARDED]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function from a case's name to (folder, transformers' model, ftjax's model, ftjax's parameters), made once."""

    @cache
    def of(name: str):
        folder = tmp_path_factory.mktemp("hf")
        hf = make_hf(next(case for case in CASES if case.name == name), folder)
        return folder, hf, *load(folder)

    return of


def generator(model, params, mesh=None) -> Generator:
    made = Generator.of(model, params, words(), mesh=mesh or one_device(), dtype=jnp.float32)
    made.ends = frozenset()  # random models have no meaningful EOS
    return made


def prompts() -> list[list[int]]:
    return [tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]


def hf_generate(hf, prompt: list[int], **options) -> list[int]:
    hf_logits(hf, np.array([prompt]))  # resets what dynamic RoPE remembers
    hf.generation_config.eos_token_id = None
    hf.generation_config.pad_token_id = 0
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", ON_ONE, ids=str)
def test_greedy_text_is_transformers(case, made):
    """The tokens of one batch are those of transformers, prompt by prompt."""
    _, hf, model, params = made(case.name)
    answers_as_transformers(generator(model, params), hf)


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_greedy_text_on_eight_devices_is_transformers(case, made):
    folder, hf, _, _ = made(case.name)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4 // case.tensor, tensor=case.tensor))
    answers_as_transformers(generator(*load(folder, mesh=mesh), mesh), hf)


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_greedy_text_layer_by_layer_is_transformers(case, made, monkeypatch):
    """On a CPU the layers of large models are called one by one (`ftjax.generate.separate`)."""
    monkeypatch.setattr(separate, "WORTH", 0)
    _, hf, model, params = made(case.name)
    answers_as_transformers(generator(model, params), hf)


def answers_as_transformers(ours: Generator, hf) -> None:
    found = ours.generate(prompts(), max_new_tokens=NEW)
    assert [answer.tokens for answer in found] == [hf_generate(hf, prompt) for prompt in prompts()]


@pytest.mark.parametrize("case", CACHED, ids=str)
def test_cached_is_uncached(case, made):
    """Several tokens at once and one by one, each row at its own pace, give the logits of one pass of transformers."""
    _, hf, model, params = made(case.name)
    rope = str(model.config.get("rope_parameters"))
    part = 7 if "longrope" in rope or "dynamic" in rope else 19  # their cache is valid only up to the switch at 16
    ids = tokens(2, 40)[:, : 2 * part + 2]
    portions = ((part, part - 2), (1, 1), (0, 1), (1, 1), (part, part - 1))
    assert_cached_is_uncached(model, params, ids, portions, 2 * part + 5, want=hf_logits(hf, ids))
