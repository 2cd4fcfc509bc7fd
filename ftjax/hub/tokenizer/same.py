"""Compares two tokenizers: models that learn from each other must mean the same by every token."""

from typing import Any

from ftjax.errors import UserError

SHOWN = 3  # differences that are named
# Spaces, digits, scripts and marks, which tokenizers of the same vocabulary may divide in different ways.
PROBE = "Hello  world!\n\n\tdon't 12345 3.14 foo_bar(x) -> na\u00efve caf\u00e9 \u4f60\u597d \u043f\u0440\u0438 \U0001f600 ..."


def refuse_other_tokenizer(own: Any, other: Any, own_name: str, other_name: str) -> None:
    """Raise UserError, naming what differs, unless two tokenizers have the same tokens, the same ids for them, the same special
    tokens, and divide a text alike."""
    problems = [*_vocabularies(own.get_vocab(), other.get_vocab(), own_name, other_name)]
    for name in ("bos", "eos", "unk"):
        found = [(getattr(one, f"{name}_token"), getattr(one, f"{name}_token_id")) for one in (own, other)]
        if found[0] != found[1]:
            shown = ["none" if token is None else f"{token!r} ({number})" for token, number in found]
            problems.append(f"{name}_token is {shown[0]} in {own_name} and {shown[1]} in {other_name}")
    if not problems and (ids := [one.encode(PROBE, add_special_tokens=False) for one in (own, other)])[0] != ids[1]:
        at = next((n for n, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1]), min(map(len, ids)))
        texts = [one.decode(part[: at + 1]) for one, part in zip((own, other), ids, strict=True)]
        problems.append(f"the same tokens divide a text differently: {texts[0]!r} and {texts[1]!r}")
    if problems:
        raise UserError(
            f"the teacher {other_name} has another tokenizer than {own_name}: "
            + "; ".join(problems)
            + ". Choose a teacher with the same tokenizer, or set objective.use_uld_loss: true to compare texts; if the "
            "vocabularies are the same and only special tokens differ, "
            f"model.tokenizer: {other_name} lets the student use the teacher's"
        )


def _vocabularies(own: dict[str, int], other: dict[str, int], own_name: str, other_name: str) -> list[str]:
    if own == other:
        return []
    problems = []
    if len(own) != len(other):
        problems.append(f"{len(own):,} tokens in {own_name} and {len(other):,} in {other_name}")
    moved = sorted(token for token in own.keys() & other.keys() if own[token] != other[token])
    for what, tokens in (
        (f"only in {own_name}", sorted(own.keys() - other.keys(), key=own.get)),
        (f"only in {other_name}", sorted(other.keys() - own.keys(), key=other.get)),
        ("with different ids", sorted(moved, key=own.get)),
    ):
        if tokens:
            more = ", ..." if len(tokens) > SHOWN else ""
            problems.append(f"{len(tokens):,} {what}: {', '.join(map(repr, tokens[:SHOWN]))}{more}")
    return problems
