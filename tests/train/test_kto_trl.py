"""`objective: {name: kto}` is what TRL's KTOTrainer computes, its pairs for the KL divergence included."""

import pytest
from processes import ALL
from trl_oracle import FULL, LORA, PAIRS, Ours, Theirs, compare, make_model

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

# More rows are wanted than not, and all prompts differ: the answers that are exchanged are then those of neighbours, as in TRL.
ROWS = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in PAIRS]
ROWS += [{"prompt": f"{row['prompt']}x", "completion": row["rejected"], "label": False} for row in PAIRS[:4]]
METRICS = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
WEIGHTS = {"beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.6}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def sides(model, tmp_path_factory):
    """The batch size is the number of rows: TRL exchanges the answers of a batch, ftjax those of 256 rows."""
    ours = Ours(model, ROWS, {"name": "kto"}, LORA, 0.3)
    return ours, Theirs(model, ROWS, ours, tmp_path_factory.mktemp("out"), "kto")


def test_the_same_tokens(sides):
    """Of the answers, and of the answers to other prompts."""
    ours, theirs = sides
    assert ours.documents() == theirs.documents() and len(ours.documents()) == 2 * len(ROWS)


@pytest.mark.parametrize("settings", [{}, WEIGHTS], ids=["defaults", "weights"])
def test_kto(sides, settings):
    ours, theirs = sides
    want = theirs(**settings)
    assert want.metrics["kl"] > 0.1, "cut off at 0, so no KL divergence was compared"
    for compute in (ours.quick, ours.whole) if ALL or not settings else (ours.quick,):
        compare(compute(**settings), want, METRICS | {"kl"})


def test_a_kl_divergence_below_zero_is_zero(model, tmp_path):
    """As it is estimated; of a whole model."""
    ours = Ours(model, ROWS, {"name": "kto"}, FULL, -0.03)
    want = Theirs(model, ROWS, ours, tmp_path / "out", "kto")(beta=0.3)
    assert want.metrics["kl"] == 0
    compare(ours.whole(beta=0.3), want, METRICS | {"kl"})


def test_apo_zero_unpaired(model, tmp_path):
    """Without documents for the KL divergence."""
    ours = Ours(model, ROWS, {"name": "kto", "loss_type": "apo_zero_unpaired"}, LORA, 0.3)
    theirs = Theirs(model, ROWS, ours, tmp_path / "out", "kto", loss_type="apo_zero_unpaired")
    assert ours.documents() == theirs.documents() and len(ours.documents()) == len(ROWS)
    compare(ours.quick(loss_type="apo_zero_unpaired", **WEIGHTS), theirs(**WEIGHTS), METRICS)
