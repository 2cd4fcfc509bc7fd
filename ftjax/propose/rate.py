"""Learning rates to begin with, from method, objective and model size, each with the source of its rule."""

BASE, LORA, WIDTH = 5e-5, 10.0, 2000
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
HIGHEST = 1e-3  # of adapters in use; the rule was fitted to models of a billion parameters and more, and grows without end
SOURCE = "Schulman et al. 2025, 'LoRA Without Regret' (thinkingmachines.ai/blog/lora)"
# TRL's defaults for all weights; LoRA takes ten times as much.
TRL = {"dpo": 1e-6, "kto": 1e-6}
REWARD = 1e-4


def learning_rate(objective: str, method: str, family: str, width: int) -> tuple[float, str]:
    """Return a learning rate with two digits, and the rule that it follows.

    LoRA: `5e-5 * 10 * (2000 / hidden_size) ** p` with p of the model's family, and lora_alpha 32, whatever the rank; all
    weights: a tenth of it.

    Args:
        family: `model_type` in config.json.
        width: size of the hidden states.
    """
    times = LORA if method == "lora" else 1.0
    if objective in TRL:
        return _two_digits(
            TRL[objective] * times
        ), f"TRL's default for {objective} is {TRL[objective]:g} for all weights; LoRA takes ten times as much"
    if objective == "reward":
        return _two_digits(REWARD / LORA * times), "TRL's default for reward models with LoRA is 1e-4"
    known = next((name for name in EXPONENTS if family.startswith(name)), None)
    power = EXPONENTS[known] if known else min(EXPONENTS.values())
    exact = BASE * times * (WIDTH / width) ** power
    rate = _two_digits(min(exact, HIGHEST * times / LORA))
    rule = f"5e-5{' * 10 for LoRA' if times > 1 else ''} * (2000 / {width})^{power:g}, {SOURCE}"
    rule += "" if known else "; the exponent of Qwen, as the more careful one of the two families that were fitted"
    return rate, rule + (f"; at most {rate:g}, since the rule was not tried on models so small" if exact > rate * 1.1 else "")


def _two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")
