"""Restaurants in E2E's form, to try things without the data.

    python NLG/generate_e2e.py DIR [--train 2000] [--validation 100] [--test 100] [--seed 0]

writes trainset.csv, devset.csv and testset_w_refs.csv: meaning representations over E2E's eight attributes, with one
reference each in the training part and three in the others. Sentences come from a small grammar (which attribute is
said where, and how), so that a model can learn all of it; a representation is in one part only.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from vblora.io import replacing
from vblora_experiments import commands

NAMES = (
    "The Copper Kettle",
    "Blue Lantern",
    "The Old Mill",
    "Casa Verde",
    "Harbour House",
    "The Walnut Tree",
    "Saffron",
    "The Red Barn",
    "Marigold",
    "The Twelve Bells",
    "Chez Amélie",
    "North Star",
    "The Green Man",
    "Luna",
)
NEAR = ("the station", "Market Hall", "King's Bridge", "the Old Library", "Café Rosa", "Riverside Park")
VALUES: dict[str, tuple[str, ...]] = {
    "eatType": ("pub", "coffee shop", "restaurant"),
    "food": ("English", "French", "Italian", "Indian", "Japanese", "Chinese", "Fast food"),
    "priceRange": ("cheap", "moderate", "high", "less than £20", "£20-25", "more than £30"),
    "customer rating": ("low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"),
    "area": ("city centre", "riverside"),
    "familyFriendly": ("yes", "no"),
    "near": NEAR,
}
REFERENCES = {"trainset.csv": 1, "devset.csv": 3, "testset_w_refs.csv": 3}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=2000, help="representations for training")
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write(options.folder, options.train, options.validation, options.test, options.seed)
    print(f"{options.folder}: {', '.join(REFERENCES)}")


def write(folder: str | Path, train: int, validation: int, test: int, seed: int) -> None:
    """Write the three files; the same seed gives the same files.

    Raises:
        ValueError: a size below 1.
    """
    sizes = dict(zip(REFERENCES, (train, validation, test), strict=True))
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} needs at least 1 representation, not {size}")
    rng = random.Random(seed)
    seen: set[str] = set()
    for name, size in sizes.items():
        rows = []
        for _ in range(size):
            slots = _new_slots(rng, seen)
            rows += [(representation(slots), sentence(slots, rng)) for _ in range(REFERENCES[name])]
        with (
            replacing(Path(folder) / name) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerow(("mr", "ref"))
            writer.writerows(rows)


def _new_slots(rng: random.Random, seen: set[str]) -> dict[str, str]:
    """Attributes of a restaurant that no part has yet: a name and two to seven others."""
    while True:
        names = [name for name in VALUES if rng.random() < 0.6]
        slots = {"name": rng.choice(NAMES)} | {name: rng.choice(VALUES[name]) for name in names}
        if len(names) >= 2 and representation(slots) not in seen:
            seen.add(representation(slots))
            return slots


def representation(slots: dict[str, str]) -> str:
    """E2E's form: name[...], eatType[...], ..."""
    return ", ".join(f"{name}[{value}]" for name, value in slots.items())


def sentence(slots: dict[str, str], rng: random.Random) -> str:
    """One way of saying all of it."""
    kind = slots.get("eatType", "place")
    food = slots.get("food", "")
    what = f"{food.lower() if food == 'Fast food' else food} {kind}".strip()
    first = f"{slots['name']} is {_article(what)} {what}"
    where = [f"in the {slots['area']}"] if "area" in slots else []
    where += [f"near {slots['near']}"] if "near" in slots else []
    more = [_price(slots["priceRange"])] if "priceRange" in slots else []
    more += [_rating(slots["customer rating"])] if "customer rating" in slots else []
    if "familyFriendly" in slots:
        more.append("it is family friendly" if slots["familyFriendly"] == "yes" else "it is not family friendly")
    opening = " ".join([first, *where])
    if where and rng.random() < 0.4:
        opening = f"{_capital(' '.join(where))} there is {_article(what)} {what} called {slots['name']}"
    rng.shuffle(more)
    if not more:
        return opening + "."
    if len(more) > 1 and rng.random() < 0.5:
        more = [f"{more[0]} and {more[1]}", *more[2:]]
    return ". ".join([opening, *map(_capital, more)]) + "."


def _price(value: str) -> str:
    return f"meals cost {value}" if "£" in value else f"its prices are {value if value != 'cheap' else 'low'}"


def _rating(value: str) -> str:
    return f"customers rate it {value}"


def _article(text: str) -> str:
    return "an" if text[0].lower() in "aeiou" else "a"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    commands.run(main, "generate_e2e")
