"""The proposal: every setting with its reason, from the data, the model and the machine."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftjax.config import Config
from ftjax.config.load import config_of
from ftjax.hub.fetch import resolve_config
from ftjax.hub.load import read_hf_config
from ftjax.hub.tokenizer.load import load_tokenizer
from ftjax.objectives import objective_of
from ftjax.propose.fit import Fit, facts, fit
from ftjax.propose.goals import settings as of_goal
from ftjax.propose.lengths import Lengths, measure
from ftjax.propose.machine import Machine
from ftjax.propose.rate import learning_rate
from ftjax.propose.seen import MOST, Seen

RANK, ALPHA = 16, 32
EXAMPLES = 32  # of one update, if the data has enough of them
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # rows of a device in one update; they divide into microbatches
UPDATES = 30  # of one epoch, that small sets should give
FILLED = 0.9  # share of a packed row that documents fill, roughly
EPOCHS = ((1000, 3.0), (10_000, 2.0), (math.inf, 1.0))  # rows: epochs of supervised training
MANY = 0.1  # share of documents that is too much to leave out
FEWEST = 20  # rows of which some are held out
HELD_OUT = 500  # most rows that are held out for validation
EVALUATIONS = 5
# For a model without a chat template and rows of messages: plain text, with the end token after each answer.
TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Setting:
    """A setting. Attributes: key: dotted; why: a sentence for the file."""

    key: str
    value: Any
    why: str


@dataclass(frozen=True)
class Proposal:
    """A configuration as settings in the order of the file.

    Attributes:
        warnings: what to know before training.
    """

    settings: list[Setting]
    seen: Seen
    goal: str
    lengths: Lengths
    fit: Fit
    updates: int
    warnings: list[str]


def propose(
    seen: Seen, goal: str, model: tuple[str, str], machine: Machine, *, output_dir: str, tell: Callable[[str], None]
) -> Proposal:
    """Return the proposal.

    Args:
        model: its name, and why it was chosen.
        tell: called with what is done now.

    Raises UserError if the model or its tokenizer cannot be read, or a row of the data cannot.
    """
    name, why = model
    tell(f"reading config.json and tokenizer of {name}")
    hf_config = read_hf_config(resolve_config(name, None))
    found: dict[str, tuple[Any, str]] = {"model.path": (name, why)}
    if machine.cpu:
        found["model.dtype"] = ("float32", "CPUs are slow in bfloat16")
        found["model.compute_dtype"] = ("float32", "the same")
    found["method.name"] = ("lora", "an adapter: little memory, and little is forgotten; docs/methods.md compares the methods")
    found["method.r"] = (RANK, "rank of the update; more for much data that is unlike what the model knows")
    found["method.lora_alpha"] = (ALPHA, "as in the rule of the learning rate below, whatever the rank")
    found["data.train"] = (seen.path, f"format {seen.format}, {_count(seen.rows)} rows")
    if seen.columns:
        guess = "a guess from their order: look whether it is right; " if seen.in_order else ""
        found["data.columns"] = (dict(seen.columns), f"{guess}what the columns mean: our name: the file's")
    found |= of_goal(seen, goal)
    config = _config(found)
    tokenizer = load_tokenizer(config.model)
    if not tokenizer.chat_template and _messages(seen):
        found["model.chat_template"] = (TEMPLATE, "this model has none, and messages need one")
        config = _config(found)
        tokenizer = load_tokenizer(config.model)
    tell(f"tokenising {seen.path}")
    config = objective_of(config).complete(config)
    lengths = measure(config, tokenizer)
    parameters, width, positions, packs = facts(config, hf_config)
    found["model.path"] = (name, f"{parameters / 1e6:,.4g} million parameters; {why}")
    warnings = _rows(found, seen, goal, lengths, positions, packs)
    _batch(found, lengths, packs, goal, len(machine.devices))
    rate, rule = learning_rate(config.objective.name, "lora", str(hf_config.get("model_type", "")), width)
    found["optimizer.learning_rate"] = (rate, rule)
    found["optimizer.lr_scheduler_type"] = ("cosine", "falls to zero at the end")
    found["optimizer.warmup_ratio"] = (0.03, "a short rise, so that the first updates do no harm")
    tell("planning the memory of a step")
    chosen = fit(objective_of(config).complete(_config(found)), hf_config, machine)
    if chosen.quantization:
        found["model.quantization"] = (chosen.quantization, "otherwise the frozen weights leave too little memory")
    if chosen.microbatches > 1:
        found["training.gradient_accumulation_steps"] = (chosen.microbatches, "so many microbatches take less memory")
    size, words = found["training.global_batch_size"]
    found["training.global_batch_size"] = (size, f"{words}. A step {chosen.described(machine)}")
    if not chosen.fits:
        warnings.append(f"this model is too large for {machine.words}: a step {chosen.described(machine)}")
    updates = _steps(found, seen, lengths, packs)
    found["output_dir"] = (output_dir, "folder of the run; an unfinished run there is resumed")
    order = list(Config.model_fields)
    settings = [Setting(key, *value) for key, value in found.items()]
    settings.sort(key=lambda one: order.index(one.key.partition(".")[0]))
    return Proposal(settings, seen, goal, lengths, chosen, updates, warnings)


def tree_of(settings: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    """Return settings as a configuration file has them."""
    tree: dict[str, Any] = {}
    for key, (value, _) in settings.items():
        section, _, name = key.partition(".")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[key] = value
    return tree


def _config(found: Mapping[str, tuple[Any, str]]) -> Config:
    return config_of(tree_of(found), source="the proposal")


def _count(rows: int) -> str:
    return f"{rows:,}{' or more' if rows >= MOST else ''}"


def _messages(seen: Seen) -> bool:
    """Return whether rows have messages, which only a chat template can render."""
    if seen.format in ("messages", "conversations", "unpaired_messages"):
        return True
    return any(isinstance(value, list) for name in ("prompt", "chosen", "completion") for value in seen.values(name)[:8])


def _rows(
    found: dict[str, tuple[Any, str]], seen: Seen, goal: str, lengths: Lengths, positions: int | None, packs: bool
) -> list[str]:
    """Add the length of a row, what becomes of longer documents, and validation data; return warnings."""
    length, longer = lengths.row(positions)
    unit = "pairs" if found["objective.name"][0] in ("dpo", "reward") else "documents"
    found["data.max_length"] = (length, f"the {unit} have {lengths.described()}")
    warnings = []
    if longer:
        share = f"{longer:,} of {len(lengths.tokens):,} {unit} ({longer / len(lengths.tokens):.1%})"
        policy, words = _truncation(seen, goal, longer / len(lengths.tokens))
        found["data.truncation"] = (policy, f"{share} are longer and {words}")
        if positions is not None and length >= positions:
            warnings.append(f"{share} are longer than the {positions:,} tokens that the model was made for")
    if not packs:
        found["data.packing"] = (False, "layers of this model would carry what they remember into the next document")
    if "validation" in seen.beside:
        found["data.validation"] = (seen.beside["validation"], "found beside the training data")
    elif seen.rows >= FEWEST and (lengths.different is None or lengths.different >= FEWEST):
        split = 0.1 if seen.rows <= 10 * HELD_OUT else HELD_OUT
        found["data.validation_split"] = (split, "held out, to see whether the model learns more than its data")
    else:
        rows = f"{seen.rows:,} rows" if seen.rows < FEWEST else f"{lengths.different:,} different rows of {seen.rows:,}"
        warnings.append(f"{rows} are too few to hold some out, so nothing will show when it only memorises them")
    return warnings


def _truncation(seen: Seen, goal: str, share: float) -> tuple[str, str]:
    """Return what to do with documents that are too long, and that in words."""
    if goal == "text":
        return "split", "are split"
    if share == 1 or (share > MANY and seen.format in ("messages", "conversations")):
        return "right", "keep their beginning; drop would leave them out"
    return "drop", "are left out; right would keep their beginning, often without the answer"


def _kept(found: Mapping[str, tuple[Any, str]], lengths: Lengths) -> np.ndarray:
    """Return the lengths of the documents that are trained, after truncation."""
    length, (policy, _) = found["data.max_length"][0], found.get("data.truncation", ("drop", ""))
    return lengths.tokens[lengths.tokens <= length] if policy == "drop" else np.minimum(lengths.tokens, length)


def _batch(found: dict[str, tuple[Any, str]], lengths: Lengths, packs: bool, goal: str, devices: int) -> None:
    """Add epochs and rows of an update."""
    length = found["data.max_length"][0]
    kept = _kept(found, lengths)
    count = len(kept)
    if goal in ("preference", "reward", "text"):
        found["training.num_train_epochs"] = (1.0, "more than one is rarely better here")
    else:
        epochs = next(epochs for most, epochs in EPOCHS if count < most)
        found["training.num_train_epochs"] = (epochs, "small sets are seen more often; watch eval/loss, and best/ is kept")
    per_row = max(1.0, FILLED * length / float(kept.mean())) if packs else 1.0
    wanted = min(EXAMPLES, max(4.0, count / UPDATES)) / per_row / devices
    rows = devices * min(SIZES, key=lambda size: abs(size - wanted))
    found["training.global_batch_size"] = (rows, f"rows of one update: about {rows * per_row:.3g} examples")


def _steps(found: dict[str, tuple[Any, str]], seen: Seen, lengths: Lengths, packs: bool) -> int:
    """Add when to evaluate, save and log; return the number of updates, roughly."""
    length, rows = found["data.max_length"][0], found["training.global_batch_size"][0]
    kept = _kept(found, lengths)
    share = seen.rows / max(lengths.rows, 1)
    per_epoch = float(kept.sum()) / (FILLED * length) if packs else float(len(kept))
    updates = max(1, math.ceil(share * per_epoch * found["training.num_train_epochs"][0] / rows))
    every = max(1, updates // EVALUATIONS)
    if "data.validation" in found or "data.validation_split" in found:
        found["training.eval_steps"] = (every, f"{EVALUATIONS} times in about {updates:,} updates")
    found["training.save_steps"] = (every, "updates between two checkpoints, from which a stopped run goes on")
    found["training.logging_steps"] = (max(1, min(10, updates // 20)), "updates between two rows of metrics")
    return updates


def stem(path: str) -> str:
    """Return a name for the run: `reviews` for `data/reviews.csv`, and `sentiment` for `sentiment/train.csv`."""
    location = Path(path.rstrip("/"))
    name = location.name.split(".")[0]
    generic = {"train", "training", "data", ""}
    return (location.parent.name if name.lower() in generic else name) or "default"
