"""Warns of valid values that are almost always mistakes."""

from ftjax.config import Config

HIGH = 0.1  # a learning rate of weights; 1e-6 to 1e-2 is usual
HIGH_OF_PROMPTS = 1.0  # of virtual tokens, which are usually trained at 1e-3 to 0.5
PROMPTS = ("prompt_tuning", "prefix_tuning", "p_tuning")


def unusual(config: Config) -> list[str]:
    """Return warnings about unusual values."""
    optimizer, high = config.optimizer, HIGH_OF_PROMPTS if config.method.name in PROMPTS else HIGH
    rates = {"optimizer.learning_rate": optimizer.learning_rate}
    rates |= {f"optimizer.groups.{number}.learning_rate": group.learning_rate for number, group in enumerate(optimizer.groups)}
    found = [
        f"{key} is {rate:g}, and training diverges at such a rate; usual are 1e-5 for full fine-tuning to 1e-3 for adapters"
        for key, rate in rates.items()
        if rate is not None and rate >= high
    ]
    if optimizer.weight_decay >= 1:
        found.append(f"optimizer.weight_decay is {optimizer.weight_decay:g}; usual are 0 to 0.1")
    return found
