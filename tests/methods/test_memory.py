"""Tests in the compiled step that frozen weights have neither gradients nor moments."""

from functools import cache

import jax
import pytest
from oracle import ONE, Case, make_hf
from tiny_run import make_config

from ftjax.train.setup import compile_steps, prepare

# Nearly all memory is weights: the activations of a row of eight tokens are smaller than any one of them.
SIZES = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_hf(Case("llama", "llama", {**SIZES, "attention_bias": True, "tie_word_embeddings": True}), folder)
    return folder


METHODS = {
    "lora": {"name": "lora", "r": 2},
    "tokens": {"name": "lora", "r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 2000]},
    "ia3": {"name": "ia3"},
    "last layer": {"name": "full", "last_layers": 1},
    "full": {"name": "full"},
}
OBJECTIVES = {None: None, "sigmoid": {"name": "dpo"}, "aot": {"name": "dpo", "loss_type": "aot"}}


@pytest.fixture(scope="module")
def plan(base):
    """Return a function to `(bytes of frozen weights, of trained ones, arguments, temporaries)` of a step, which is
    compiled once for the same arguments."""

    @cache
    def of(method: str, objective: str | None = None, microbatches: int = 1):
        steps = {"global_batch_size": microbatches, "gradient_accumulation_steps": microbatches}
        config = make_config(base, method=METHODS[method], objective=OBJECTIVES[objective], **steps)
        setup = prepare(config.model_copy(update={"data": config.data.model_copy(update={"max_length": 8})}), ONE)
        step, _, optimizer, _ = compile_steps(setup, 10)
        with jax.set_mesh(setup.mesh):
            memory = step.lower(*setup.abstract_inputs(optimizer)).compile().memory_analysis()
        frozen, trained = (sum(leaf.nbytes for leaf in found.values()) for found in (setup.frozen, setup.params))
        return frozen, trained, memory.argument_size_in_bytes, memory.temp_size_in_bytes

    return of


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_frozen_weights_have_no_gradient_and_no_moments(plan, name):
    frozen, trained, arguments, temporaries = plan(name)
    assert arguments < frozen + 3 * trained + 20_000, "beside weights, masters and two moments there is a batch"
    made_of_trained = 3 * trained  # its gradient, and the optimizer's update
    assert temporaries < made_of_trained + frozen / 4, "a gradient of what is frozen would take as much as it does"


def test_what_trains_has_them(plan):
    """The same figures do show gradients and moments, where there are any."""
    frozen, trained, arguments, temporaries = plan("full")
    assert frozen == 0 and arguments > 3 * trained and temporaries > trained


@pytest.mark.parametrize("loss_type, microbatches", [pytest.param("sigmoid", 1, marks=pytest.mark.sweep), ("aot", 2)])
def test_an_adapters_reference_is_the_base(plan, loss_type, microbatches):
    """Beside next-token training, a comparison with the model before training has no other array of the size of the base."""
    frozen, _, arguments, temporaries = plan("lora", loss_type, microbatches)
    same, _, fewest, least = plan("lora", microbatches=microbatches)
    assert frozen == same and arguments < fewest + frozen / 100
    assert temporaries < least + frozen / 4


def test_a_whole_models_reference_is_a_copy(plan):
    """Which the same figures do show; it has neither gradient nor moments."""
    frozen, trained, arguments, temporaries = plan("full", "sigmoid")
    _, _, fewest, least = plan("full")
    assert frozen == trained and fewest + 0.99 * trained < arguments < fewest + 1.01 * trained
    assert temporaries < least + trained / 4
