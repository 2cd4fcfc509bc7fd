"""`objective: {name: dpo}` is what TRL's DPOTrainer computes: tokens, losses, metrics and gradients."""

import pytest
import torch
from processes import ALL
from trl_oracle import FULL, LORA, PAIRS, Ours, Theirs, compare, make_model, messages

# TRL sets a field of transformers that was renamed; TRL's and transformers' affair.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

METRICS = {
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
}  # fmt: skip
SMOOTH = ("robust", "exo_pair", "aot", "aot_unpaired")  # losses that take label_smoothing
ALONE = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
CASES = {
    **{name: {"loss_type": [name], **({"label_smoothing": 0.2} if name in SMOOTH else {})} for name in ALONE},
    "defaults": {},
    "smooth-0": {"loss_type": ["aot", "aot_unpaired", "robust"]},
    "weights": {"loss_type": ["sigmoid", "sft", "bco_pair", "aot"], "loss_weights": [0.8, 0.3, 1.5, -0.2], "ld_alpha": 0.5},
    "forward_kl": {"f_divergence_type": "forward_kl", "loss_type": ["sigmoid", "ipo"]},
    "js_divergence": {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid", "hinge", "ipo", "discopop"]},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "loss_type": ["sigmoid", "sigmoid_norm"]},
    "alpha-2": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0, "beta": 0.03},
    "alpha-1": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0, "loss_type": ["sigmoid"]},
    "ld_alpha": {"ld_alpha": 0.3},
    "ld_alpha-0": {"ld_alpha": 0.0, "loss_type": ["ipo"]},
}  # fmt: skip

# It takes e to the power of a sum of log-probabilities near 100, where neighbours in float32 are 8e-6 apart.
ROUNDED = {"alpha-2": 5e-5}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sides(llama, tmp_path_factory):
    ours = Ours(llama, PAIRS, {"name": "dpo"}, LORA, 0.3)
    return ours, Theirs(llama, PAIRS, ours, tmp_path_factory.mktemp("out"), "dpo")


def test_the_same_tokens(sides):
    """And the same of them are trained: those of the answers, with the end."""
    ours, theirs = sides
    assert ours.documents() == theirs.documents() and len(ours.documents()) == 2 * len(PAIRS)


@pytest.mark.parametrize("name", CASES)
def test_losses(sides, name):
    (ours, theirs), settings = sides, {"beta": 0.3, **CASES[name]} if CASES[name] else {}
    want = theirs(**settings)
    for compute in (ours.quick, ours.whole) if ALL else (ours.quick,):
        compare(compute(**settings), want, METRICS, rtol=ROUNDED.get(name, 1e-5))


@pytest.mark.parametrize("name", ["defaults", "sft", "weights"])
def test_evaluation_in_batches(sides, name):
    """Losses that are means over tokens, too: the loss of a data set is not the mean of those of its batches."""
    (ours, theirs), settings = sides, {**CASES[name]}
    if name == "weights":  # without `aot`, which compares the pairs of a batch
        settings = {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [0.8, 0.3, 1.5]}
    compare(ours.by_rows(**settings), theirs(**settings), METRICS, gradients=False)


def test_reference_free(sides):
    """As if the reference gave every answer the probability 1."""
    ours, theirs = sides
    none = {f"ref_{kind}_logps": torch.zeros(len(PAIRS)) for kind in ("chosen", "rejected")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "batch", {**theirs.batch, **none})
        want = theirs(precompute_ref_logps=True, beta=0.01)
    compare(ours.quick(reference_free=True, beta=0.01), want, METRICS)


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
# Families, methods, how far the weights are moved, and rows: texts, conversations, conversations that repeat their prompt.
MODELS = {
    "llama-lora": ("llama", {}, LORA, 0.3, PAIRS),
    "llama-full": ("llama", {"tie_word_embeddings": True}, FULL, 0.1, PAIRS),
    "gemma2-lora": ("gemma2", {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 6.0}, LORA, 0.3, PAIRS),
    "qwen3-full": ("qwen3", {"head_dim": 8}, FULL, 0.1, [messages(row) for row in PAIRS]),
    "gpt2-full": ("gpt2", GPT2, FULL, 0.1, [messages(row, implicit=True) for row in PAIRS]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models(name, tmp_path):
    """The loss as training computes it, of adapters and of whole models."""
    family, values, method, step, rows = MODELS[name]
    folder = make_model(tmp_path / "model", family, chat=rows is not PAIRS, **values)
    ours = Ours(folder, rows, {"name": "dpo"}, method, step)
    theirs = Theirs(folder, rows, ours, tmp_path / "out", "dpo")
    assert ours.documents() == theirs.documents()
    settings = (
        {"beta": 0.3} if name.endswith("lora") else {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [2, 0.5]}
    )
    compare(ours.whole(**settings), theirs(**settings), METRICS)
