"""Objectives on pairs without a reference model are what TRL's CPOTrainer and ORPOTrainer compute."""

import pytest
from processes import ALL
from trl_oracle import FULL, LORA, PAIRS, Ours, Theirs, compare, make_model

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

METRICS = {
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
}  # fmt: skip
CPO = {
    "defaults": {},
    "sigmoid": {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.2, "cpo_alpha": 0.5},
    "hinge": {"loss_type": "hinge", "beta": 0.3},
    "ipo": {"loss_type": "ipo", "beta": 0.3},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.7},
    "alphapo": {"loss_type": "alphapo", "beta": 2.0, "alpha": 0.2},
    "alpha": {"loss_type": "ipo", "beta": 0.3, "alpha": 0.2, "cpo_alpha": 2.0},  # TRL overflows for sums
    "without nll": {"loss_type": "sigmoid", "cpo_alpha": 0.0},
}  # fmt: skip
SIMPO = {
    "defaults": {},
    "others": {"beta": 2.5, "simpo_gamma": 1.2, "label_smoothing": 0.1},
    "alpha": {"beta": 2.5, "alpha": 0.25},
}  # fmt: skip
ORPO = {"defaults": {}, "beta": {"beta": 0.7}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def ours(model):
    return Ours(model, PAIRS, {"name": "cpo"}, FULL, 0.1)


@pytest.fixture(scope="module")
def cpo(model, ours, tmp_path_factory):
    return Theirs(model, PAIRS, ours, tmp_path_factory.mktemp("out"), "cpo")


@pytest.fixture(scope="module")
def orpo(model, ours, tmp_path_factory):
    return Theirs(model, PAIRS, ours, tmp_path_factory.mktemp("out"), "orpo")


def of_trl(settings: dict) -> dict:
    """TRL turns the name `alphapo` into other settings when a configuration is made, and reads the margin for `simpo` then."""
    found = {"simpo_gamma": 0.5, **settings}
    return {**found, "loss_type": "simpo", "cpo_alpha": 0.0} if settings.get("loss_type") == "alphapo" else found


def test_the_same_tokens(ours, cpo, orpo):
    assert ours.documents() == cpo.documents() == orpo.documents() and len(ours.documents()) == 2 * len(PAIRS)


@pytest.mark.parametrize("name", CPO)
def test_cpo(ours, cpo, name):
    settings, want = CPO[name], cpo(**of_trl(CPO[name]))
    nll = set() if name in ("alphapo", "without nll") else {"nll_loss"}
    for compute in (ours.quick, ours.whole) if ALL or name == "defaults" else (ours.quick,):
        compare(compute(**settings), want, METRICS | nll)
    compare(ours.by_rows(**settings), want, METRICS, gradients=False)


@pytest.mark.parametrize("name", SIMPO)
def test_simpo(ours, cpo, name):
    settings = SIMPO[name]
    want = cpo(**of_trl(settings), loss_type="simpo", cpo_alpha=0.0)
    for compute in (ours.quick, ours.whole) if ALL else (ours.quick,):
        compare(compute(name="simpo", **settings), want, METRICS)


@pytest.mark.parametrize("name", ORPO)
def test_orpo(ours, orpo, name):
    settings, want = ORPO[name], orpo(**ORPO[name])
    names = METRICS | {"nll_loss", "log_odds_ratio", "log_odds_chosen"}
    for compute in (ours.quick, ours.whole) if ALL or name == "defaults" else (ours.quick,):
        compare(compute(name="orpo", **settings), want, names)
    compare(ours.by_rows(name="orpo", **settings), want, names, gradients=False)


# Adapters of other families, with the loss as training computes it.
ADAPTERS = {
    "orpo": ("qwen3", {"head_dim": 8}, {"beta": 0.7}),
    "cpo": ("gemma2", {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 6.0}, {"beta": 0.3}),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS if ALL else [*ADAPTERS][:1])
def test_adapters(name, tmp_path):
    family, values, settings = ADAPTERS[name]
    folder = make_model(tmp_path / "model", family, **values)
    ours = Ours(folder, PAIRS, {"name": name}, LORA, 0.3)
    theirs = Theirs(folder, PAIRS, ours, tmp_path / "out", name)
    compare(ours.whole(**settings), theirs(**settings), METRICS | {"nll_loss"})
