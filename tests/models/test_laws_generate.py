"""Tests generation of every family: it answers as transformers does, and the cache does not change the logits."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CASES, ONE_OF_EACH
from generate.words import words
from oracle import assert_cached_is_uncached, hf_logits, load, make_hf, one_device, tokens
from processes import ALL

from ftjax.config import MeshConfig
from ftjax.generate.session import Generator
from ftjax.mesh import make_mesh

NEW = 30
LENGTHS = (7, 24, 16)  # shorter and longer than the windows of the cases; 24 + NEW is past every original length


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request, tmp_path_factory):
    """Return (case, transformers' model, ftjax's model, ftjax's parameters) of one case."""
    folder = tmp_path_factory.mktemp("hf")
    hf = make_hf(request.param, folder)
    return request.param, hf, *load(folder)


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


def test_greedy_text_is_transformers(pair):
    """The tokens of one batch are those of transformers, prompt by prompt.

    What a variant of a family changes is proved by its logits, with and without a cache; only a RoPE that depends on the length
    of the text changes what a batch of rows must do. `make test-all` generates with every variant.
    """
    case, hf, model, params = pair
    if not (ALL or case in ONE_OF_EACH or "dynamic" in str(case)):
        pytest.skip("`make test-all` generates with every variant of a family")
    want = [hf_generate(hf, prompt) for prompt in prompts()]
    answers = generator(model, params).generate(prompts(), max_new_tokens=NEW)
    assert [answer.tokens for answer in answers] == want


def test_cached_is_uncached(pair):
    """Several tokens at once and one by one, each row at its own pace, give the logits of one uncached pass."""
    _, _, model, params = pair
    rope = str(model.config.get("rope_parameters"))
    part = 7 if "longrope" in rope or "dynamic" in rope else 19  # their cache is valid only up to the switch at 16
    ids = tokens(2, 40)[:, : 2 * part + 2]
    portions = ((part, part - 2), (1, 1), (0, 1), (1, 1), (part, part - 1))
    assert_cached_is_uncached(model, params, ids, portions, 2 * part + 5)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_eight_devices_answer_as_one(case, tmp_path):
    make_hf(case, tmp_path)
    want = generator(*load(tmp_path)).generate(prompts(), max_new_tokens=NEW)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4 // case.tensor, tensor=case.tensor))
    got = generator(*load(tmp_path, mesh=mesh), mesh).generate(prompts(), max_new_tokens=NEW)
    assert [answer.tokens for answer in got] == [answer.tokens for answer in want]
