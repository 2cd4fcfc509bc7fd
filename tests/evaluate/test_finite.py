"""Tests that a model which gives NaN causes an error that names the cause, in every command that runs a model."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from verbs import evaluate, generate

from ftjax.evaluate.likelihood import head_scores
from ftjax.generate.conversation import Conversation
from ftjax.generate.finite import NotFinite
from ftjax.generate.request import Request
from ftjax.generate.session import Generator

NAME = "model.layers.1.mlp.up_proj.weight"
SAYS = f"{NAME} holds NaN or infinite values"


def changed(tiny, folder, change):
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    weights[NAME] = change(weights[NAME])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory):
    return changed(tiny, tmp_path_factory.mktemp("broken") / "model", lambda weight: np.full_like(weight, np.nan))


def test_answers(broken, capsys):
    with pytest.raises(NotFinite, match=f"prompt 1: the model gives NaN instead of probabilities: {SAYS}"):
        generate(str(broken), prompt=["abc"], max_new_tokens=4, dtype="float32")
    assert not capsys.readouterr().out


def test_activations_that_overflow(tiny, tmp_path):
    """Each weight fits into float16, but the activations do not."""
    model = changed(tiny, tmp_path / "model", lambda weight: np.full_like(weight, 6e4))
    with pytest.raises(NotFinite, match="its weights are finite, so its activations overflow; use a dtype with more range"):
        generate(str(model), prompt=["abc"], max_new_tokens=4, dtype="float16")


def test_a_conversation_goes_on_without_the_question(broken):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = Conversation(Generator(str(broken), dtype="float32", chat_template=template), Request())
    with pytest.raises(NotFinite, match="the answer: the model gives NaN"):
        list(chat.ask("abc"))
    assert chat.messages == []


@pytest.mark.parametrize("task", ["loss", "exact_match"])
def test_measures(broken, rows_file, tmp_path, task):
    with pytest.raises(NotFinite, match=SAYS):
        evaluate(str(broken), ["evaluate.max_new_tokens=4"], data=str(rows_file), task=task, out=tmp_path)


def test_scores(broken):
    with pytest.raises(NotFinite, match=f"completion 1: .*{SAYS}"):
        Generator(str(broken), dtype="float32").score(["abc"], ["de"])


def test_a_heads_scores(broken, monkeypatch):
    generator = Generator(str(broken), dtype="float32")
    monkeypatch.setattr(generator.engine, "head", lambda *given: np.full((8, 2), np.nan))
    with pytest.raises(NotFinite, match=f"a text: .*{SAYS}"):
        head_scores(generator, [[5, 6]], 2, 8)
