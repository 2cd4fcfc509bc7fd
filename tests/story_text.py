"""Short stories from a small grammar: English that a tiny model learns in some hundred updates.

Whether a story is about a girl or a boy is said in its first sentence and decides the pronouns of all that follow. So a model
that continues a story correctly has learned more than which word follows which.
"""

import random
import re

SENTENCES = (
    "Once upon a time, there was a little {kind} named {name}.",
    "{She} loved to play with {her} {adjective} {thing}.",
    "One day, {she} went to the {place} with {her} {parent}.",
    "There {she} saw a {adjective} {thing} and ran to it.",
    '"Can I have it?" {she} asked {her} {parent}.',
    "{Her} {parent} said yes, and {she} was very {feeling}.",
    "So {she} took the {thing} home and showed it to {her} friends.",
    "They all played with {her} {thing} until the sun went down.",
)
WORDS = {
    "adjective": ("big", "red", "little", "shiny", "old", "soft"),
    "thing": ("ball", "box", "car", "hat", "cake", "cat", "dog", "bird"),
    "place": ("park", "zoo", "shop", "beach", "garden", "forest"),
    "parent": ("mom", "dad"),
    "feeling": ("happy", "glad", "proud"),
}
KINDS = {
    "girl": {"name": ("Lily", "Mia", "Anna", "Sue", "Amy"), "she": "she", "She": "She", "her": "her", "Her": "Her"},
    "boy": {"name": ("Tom", "Tim", "Ben", "Max", "Sam"), "she": "he", "She": "He", "her": "his", "Her": "His"},
}


def write_story(rng: random.Random) -> str:
    kind = rng.choice(sorted(KINDS))
    words = WORDS | KINDS[kind] | {"kind": kind}

    def choose(slot: re.Match) -> str:
        choices = words[slot[1]]
        return choices if isinstance(choices, str) else rng.choice(choices)

    return re.sub(r"\{(\w+)\}", choose, " ".join(SENTENCES))


def write_stories(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [write_story(rng) for _ in range(count)]


def is_story(text: str, kind: str) -> bool:
    """Return whether the text is a whole story about a girl or a boy, with the right word in each place."""
    words = WORDS | KINDS[kind] | {"kind": kind}
    pattern = re.escape(" ".join(SENTENCES))
    for slot, choices in words.items():
        choices = (choices,) if isinstance(choices, str) else choices
        pattern = pattern.replace(re.escape(f"{{{slot}}}"), f"(?:{'|'.join(choices)})")
    return re.fullmatch(pattern, text) is not None
