"""Writes the demo's data: messages to a shop, each with the one JSON object that a clerk would fill in.

    python scripts/make_demo_data.py [FOLDER]       # default: ftjax/demo/data

Every run writes the same bytes. One row, as an example:

    user       hi there, can I order three red desk lamps by Friday? thanks, Anna Keller
    assistant  {"action":"order","item":"desk lamp","quantity":3,"color":"red","day":"friday","name":"Anna Keller"}

The rules of the form: `action` is order, return, exchange or cancel; `item` is singular; `quantity` is a number, even if it was
written as a word; `color`, `day` and `name` are null if the message does not say. No filled form of validation or test occurs
in train, so no message does either; some of their items and names never occur in train.

few.jsonl has 42 rows of train, to begin from where the rest is learned from rewards: 12 of them have no name. Without enough of
those a model that invents a name does so every time, and rewards teach only what is tried now and then.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SIZES = {"train": 480, "validation": 50, "test": 50}
FEW = {True: 30, False: 12}  # rows of few.jsonl, by whether the message has a name
SYSTEM = "Extract the order as JSON."

ITEMS = (
    "desk lamp", "coffee mug", "notebook", "backpack", "water bottle", "umbrella", "wall clock", "candle", "picture frame",
    "towel", "pillow", "blanket", "office chair", "bookcase", "phone case", "keyboard", "mouse pad", "headset", "charger",
    "power bank", "rain jacket", "wool scarf", "sun hat", "belt", "wallet", "t-shirt", "hoodie", "apron", "frying pan",
    "tea pot", "salad bowl", "lunch box", "cutting board", "flower pot", "garden hose", "watering can", "tool box",
    "bike helmet", "bike lock", "yoga mat", "tent", "sleeping bag", "hammock", "suitcase", "door mat", "curtain",
    "laundry basket", "storage bin", "bed sheet", "table cloth", "camping stove", "soup spoon", "dog collar", "cat bed",
)  # fmt: skip
NEW_ITEMS = ("floor lamp", "shower curtain", "travel pillow", "bar stool", "paint roller", "ski helmet")  # not in train
COLORS = ("red", "blue", "green", "black", "white", "yellow", "grey", "brown", "pink", "purple", "orange")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
FIRST = (
    "Anna", "Tom", "Maria", "David", "Julia", "Peter", "Sarah", "Mark", "Emma", "Paul", "Laura", "James", "Nina", "Robert",
    "Clara", "Simon", "Eva", "Daniel", "Lisa", "Martin", "Helen", "Oscar", "Grace", "Victor", "Alice", "Henry", "Rosa", "Adam",
    "Ruth", "Felix", "Diana", "George", "Irene", "Leo", "Monica", "Nathan", "Olivia", "Philip", "Rachel", "Samuel",
)  # fmt: skip
LAST = (
    "Keller", "Baker", "Santos", "Miller", "Brown", "Fischer", "Young", "Clark", "Lopez", "Evans", "Moore", "Hughes", "Walker",
    "Schmidt", "Rossi", "Novak", "Turner", "Price", "Reed", "Foster", "Gray", "Hall", "Wood", "Bennett", "Ward", "Marsh",
    "Weber", "Klein", "Lang", "Stone", "Hart", "Fox", "Lambert", "Morgan", "Parker", "Russell", "Spencer", "Wagner", "Adams",
    "Barnes", "Carter", "Dixon", "Ellis", "Fuller", "Grant", "Hudson", "Jensen", "King", "Lewis", "Mason",
)  # fmt: skip
NEW_LAST = ("Castle", "Porter", "Winter", "Silva", "Archer", "Berg", "Coleman", "Duncan")  # not in train
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

REQUESTS = {
    "order": (
        "I'd like {things}", "please send me {things}", "can I order {things}?", "I need {things}", "we want to buy {things}",
        "could you ship {things} to me?", "I would like to order {things}", "put me down for {things}", "I'll take {things}",
        "can you get me {things}?", "looking to buy {things}", "I want {things}",
    ),
    "return": (
        "I want to return {things}", "I'm sending back {things}", "please take back {things}, I want a refund",
        "{things} arrived broken, I want my money back", "I'd like a refund for {things}", "can I give back {things}?",
        "how do I return {things}?", "I need to send back {things}", "not happy with {things}, refund please",
    ),
    "exchange": (
        "I'd like to exchange {things} for another size", "can I swap {things}?", "please swap {things} for a new set",
        "I need to exchange {things}", "could you replace {things} with a bigger size?",
        "I want to swap {things} for other ones", "is it possible to exchange {things}?",
        "wrong size, please exchange {things}",
    ),
    "cancel": (
        "please cancel {things}", "I don't need {things} anymore", "cancel my order of {things}", "I want to cancel {things}",
        "can you cancel {things} for me?", "please stop the order for {things}", "no longer need {things}, please cancel",
        "I changed my mind about {things}, cancel please",
    ),
}  # fmt: skip
WHEN = {
    "order": ("by {day}", "for {day}", "I need it on {day}", "please deliver on {day}", "{day} would be best"),
    "return": ("you can pick it up on {day}", "I will drop it off on {day}", "I can come by on {day}", "{day} works for me"),
    "exchange": ("I can come by on {day}", "{day} works for me", "I will be in the shop on {day}", "if possible on {day}"),
    "cancel": ("it was meant for {day}", "the delivery was set for {day}", "it should have come on {day}"),
}
GREETINGS = ("", "", "", "hi", "hello", "hey", "good morning", "hi there", "hello team", "dear shop", "good evening")
ASIDES = (
    "", "", "", "", "", "hope you are well", "love your shop", "my order number is {number}", "sorry for the trouble",
    "I was in the shop last week", "it is a gift", "the delivery was fast last time", "order {number}", "let me know",
)  # fmt: skip
SIGNED = (
    "thanks, {name}", "{name}", "- {name}", "my name is {name}", "this is {name}", "best, {name}", "it's for {name}",
    "{name} here",
)  # fmt: skip
UNSIGNED = ("", "thanks", "thank you", "cheers", "bye")
TYPOS = {
    "please": "plese", "thanks": "thx", "would": "woud", "order": "oder", "exchange": "exchnage", "return": "retrun",
    "cancel": "cancle", "possible": "posible",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """The object that a message is turned into; its fields have the order of the JSON."""

    action: str
    item: str
    quantity: int
    color: str | None
    day: str | None
    name: str | None

    def text(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


class Writer:
    """Draws forms and writes messages for them. Only `Random.random` is used: its sequence is the same in all versions of
    Python."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def one(self, pool: Sequence[str]) -> str:
        return pool[int(self._random.random() * len(pool))]

    def form(self, new: bool) -> Form:
        """Return a filled form; with `new`, some items and names are not in train."""
        item = self.one(NEW_ITEMS) if new and self.chance(0.2) else self.one(ITEMS)
        last = self.one(NEW_LAST) if new and self.chance(0.3) else self.one(LAST)
        return Form(
            action=self.one(tuple(REQUESTS)),
            item=item,
            quantity=1 + int(self._random.random() * 12) if self.chance(0.7) else 1,
            color=self.one(COLORS) if self.chance(0.65) else None,
            day=self.one(DAYS) if self.chance(0.6) else None,
            name=f"{self.one(FIRST)} {last}" if self.chance(0.85) else None,
        )

    def message(self, form: Form) -> str:
        """Return an ordinary message from which the form can be filled."""
        request = self.one(REQUESTS[form.action]).format(things=self._things(form))
        parts = [self.one(GREETINGS), request]
        when = self.one(WHEN[form.action]).format(day=form.day.capitalize()) if form.day else ""
        aside = self.one(ASIDES).format(number=10000 + int(self._random.random() * 90000))
        parts += [aside, when] if self.chance(0.3) else [when, aside]
        parts.append(self.one(SIGNED).format(name=form.name) if form.name else self.one(UNSIGNED))
        return self._punctuated([part for part in parts if part])

    def _things(self, form: Form) -> str:
        noun = f"{form.color} {form.item}" if form.color else form.item
        if form.quantity == 1:
            article = "an" if noun[0] in "aeiou" else "a"
            return f"{self.one((article, article, 'one', '1', article if form.action == 'order' else 'my'))} {noun}"
        words = [NUMBERS[form.quantity - 1], NUMBERS[form.quantity - 1], str(form.quantity), str(form.quantity)]
        words += {2: ["a pair of"], 6: ["half a dozen"], 12: ["a dozen"]}.get(form.quantity, [])
        return f"{self.one(words)} {noun}s"

    def _punctuated(self, parts: list[str]) -> str:
        """Join the parts with full stops, commas or line breaks, in sentence case or lower case, with a few typos."""
        small = self.chance(0.35)
        stop = self.one((". ", ". ", ", ", "\n"))
        text = ""
        for part in parts:
            if not small:
                part = part[0].upper() + part[1:]
            if self.chance(0.08):
                part = " ".join(TYPOS.get(word, word) for word in part.split(" "))
            text += part if not text else (stop if text[-1] != "?" else " ") + part
        return text if small or text[-1] in ".?" else text + self.one(("", ".", "!"))


def rows(seed: int = 20) -> dict[str, list[dict]]:
    """Return the three splits; test is drawn first, so that its size does not depend on the others."""
    writer = Writer(seed)
    taken: set[str] = set()
    splits: dict[str, list[dict]] = {}
    for split in ("test", "validation", "train"):
        splits[split] = []
        while len(splits[split]) < SIZES[split]:
            form = writer.form(new=split != "train")
            message = writer.message(form)
            if form.text() in taken:
                continue
            taken.add(form.text())
            turns = (("system", SYSTEM), ("user", message), ("assistant", form.text()))
            splits[split].append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return splits


def few(train: Sequence[dict]) -> list[dict]:
    """Return the first rows of train with a name, and the first without, in the order of train."""
    left, chosen = dict(FEW), []
    for row in train:
        named = json.loads(row["messages"][-1]["content"])["name"] is not None
        if left[named]:
            left[named] -= 1
            chosen.append(row)
    return chosen


def write(folder: Path) -> None:
    """Write train.jsonl, validation.jsonl, test.jsonl and few.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = rows()
    for split, examples in {**splits, "few": few(splits["train"])}.items():
        text = "".join(json.dumps(row) + "\n" for row in examples)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Write the demo's train, validation and test messages, and the few of train to begin from."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("ftjax/demo/data"))
    write(parser.parse_args().folder)
