"""`objective: {name: reward}` is what TRL's RewardTrainer computes."""

import pytest
from processes import ALL
from trl_oracle import FULL, LORA, PAIRS, Ours, Theirs, compare, make_model, messages

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

METRICS = {"accuracy", "margin", "mean_reward"}
MARGINS = [{**row, "margin": margin} for row, margin in zip(PAIRS, (0.5, 1.0, 0.0, 2.5, -0.3, 0.1), strict=True)]
# Family, method, how far the weights are moved, rows, and settings.
MODELS = {
    "lora": ("llama", LORA, 0.3, PAIRS, {}),
    "qwen3": ("qwen3", LORA, 0.3, PAIRS, {}),
    "margins": ("llama", LORA, 0.3, MARGINS, {"center_rewards_coefficient": 0.05}),
    "full": ("llama", FULL, 0.1, [messages(row) for row in PAIRS], {"center_rewards_coefficient": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS if ALL else [name for name in MODELS if name != "qwen3"])
def test_reward(name, tmp_path):
    family, method, step, rows, settings = MODELS[name]
    values = {"head_dim": 8} if family == "qwen3" else {}
    folder = make_model(tmp_path / "model", family, chat=name == "full", **values)
    ours = Ours(folder, rows, {"name": "reward"}, method, step)
    theirs = Theirs(folder, rows, ours, tmp_path / "out", "reward")
    found = ours.documents()
    assert [tokens[:-1] for tokens, _ in found] == [tokens for tokens, _ in theirs.documents()]
    assert all(trained == (0,) * (len(trained) - 1) + (1,) for _, trained in found)
    compare(ours.whole(**settings), theirs(**settings), METRICS)
