"""Every field of a config.json means what it means in transformers, or is refused (T22)."""

import json
import shutil

import numpy as np
import pytest
from cases import ONE_OF_EACH
from oracle import TINY, hf_logits, load, logits, make_hf, tokens
from transformers import AutoModelForCausalLM

from ftjax.errors import UserError
from ftjax.models.facts import INERT
from ftjax.models.registry import FAMILIES

OTHER = {"hidden_act": "relu", "hidden_activation": "relu"}


def changed(name, value):
    """Another legal value for a field."""
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 if value else 3
    if isinstance(value, float):
        return value * 1.5 + 0.25
    if isinstance(value, dict) and "rope_theta" in value:
        return {**value, "rope_theta": value["rope_theta"] * 3 + 7}
    if isinstance(value, dict):
        return {key: changed(key, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return value[::-1]
    return "something-else" if isinstance(value, str) else 5


@pytest.fixture(scope="module", params=ONE_OF_EACH, ids=str)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    hf = make_hf(request.param, folder)
    ids = tokens(1, 24, vocab=TINY["vocab_size"])
    return folder, hf, ids, logits(*load(folder), ids)


def test_every_field_means_what_it_means_in_transformers(family, tmp_path):
    """With any one field changed, a model is refused, or gives the logits that transformers gives with that change."""
    folder, hf, ids, _ = family
    stored = hf.config.to_dict()
    wrong, accepted = [], 0
    for name, value in stored.items():
        if name in INERT:
            continue
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text(json.dumps({**stored, name: changed(name, value)}))
        try:
            ours = logits(*load(tmp_path / "model"), ids)
        except UserError:
            continue
        accepted += 1
        theirs = hf_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), ids)
        if np.abs(ours - theirs).max() > 1e-4:
            wrong.append(name)
    assert not wrong, f"with these fields changed, the logits are not those of transformers: {wrong}"
    assert accepted >= 2


def test_unknown_field_is_refused(family, tmp_path):
    folder, hf, _, _ = family
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**hf.config.to_dict(), "attention_twist": 0.5}))
    with pytest.raises(UserError, match=r"attention_twist = 0\.5"):
        load(tmp_path / "model")


def test_inert_fields_are_inert_in_transformers(family):
    """What ftjax ignores, transformers' model ignores too."""
    _, hf, ids, _ = family
    before = hf_logits(hf, ids)
    for name in ("use_cache", "initializer_range", "bos_token_id"):
        old = getattr(hf.config, name, None)
        setattr(hf.config, name, changed(name, old))
        np.testing.assert_array_equal(hf_logits(hf, ids), before, err_msg=name)
        setattr(hf.config, name, old)


def test_unsupported_type_lists_the_families(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(UserError) as error:
        load(tmp_path)
    for word in ("'bert'", *FAMILIES):
        assert word in str(error.value)


def test_old_folders_keep_their_rope(tmp_path):
    """`rope_theta` and `rope_scaling`, as transformers 4 wrote them, mean what `rope_parameters` means."""
    from cases import LLAMA3_ROPE
    from oracle import Case

    make_hf(Case("llama3.1", "llama", {"rope_parameters": LLAMA3_ROPE}), tmp_path)
    ids = tokens(1, 30)
    want = logits(*load(tmp_path), ids)
    stored = json.loads((tmp_path / "config.json").read_text())
    rope = stored.pop("rope_parameters")
    stored |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    np.testing.assert_array_equal(logits(*load(tmp_path), ids), want)
    del stored["rope_scaling"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert np.abs(logits(*load(tmp_path), ids) - want).max() > 1e-3
