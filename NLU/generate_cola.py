"""Write a small data set in the raw form of CoLA, for trying the project without a network.

    python NLU/generate_cola.py DIR [--train N] [--dev N] [--seed S] [--phenomena NAME ...]

DIR receives train.tsv, dev_in_domain.tsv and dev_out_of_domain.tsv: four tab-separated columns without a
header (source, label, mark, sentence), half of the rows acceptable (label 1) and half not (label 0, mark
"*").

Every sentence comes as one half of a minimal pair built by one of the phenomena below, such as "The key near
the cabinets is old" and "*The key near the cabinets are old". Each phenomenon is arranged so that no single
word speaks for or against a sentence: what is right in one sentence is wrong in another, so word counts do
not help and a model has to look at how the words go together. The out-of-domain part uses nouns, verbs,
adjectives, names and opening phrases that train.tsv never does.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Pair = tuple[str, str]  # an acceptable sentence, and the unacceptable one made from it


# ---------------------------------------------------------------------------------------------- words


class Noun(NamedTuple):
    singular: str
    plural: str
    gender: str = "n"  # "m", "f", or "n": not said by the word

    def form(self, plural: bool) -> str:
        return self.plural if plural else self.singular


class Verb(NamedTuple):
    base: str
    third: str
    past: str
    participle: str
    ing: str

    def present(self, plural: bool) -> str:
        return self.base if plural else self.third


def _add_s(word: str) -> str:
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeou":
        return word[:-1] + "ies"
    return word + "s"


def _noun(spec: str, gender: str = "n") -> Noun:
    """``lamp`` is regular; ``man:men`` is given whole."""
    singular, _, plural = spec.partition(":")
    return Noun(singular, plural or _add_s(singular), gender)


def _verb(spec: str) -> Verb:
    """``repair`` is regular; ``buy:bought`` and ``give:gave:given`` say past and participle.

    A verb that doubles its last consonant says so through its past form: ``admit:admitted``.
    """
    base, *irregular = spec.split(":")
    stem = base[:-1] if base.endswith("e") else base
    regular = base[:-1] + "ied" if base.endswith("y") and base[-2] not in "aeou" else stem + "ed"
    past = irregular[0] if irregular else regular
    doubled = past == base + base[-1] + "ed"
    ing = base + base[-1] + "ing" if doubled else stem + "ing"
    return Verb(base, _add_s(base), past, irregular[1] if len(irregular) > 1 else past, ing)


def _nouns(text: str, gender: str = "n") -> tuple[Noun, ...]:
    return tuple(_noun(word, gender) for word in text.split())


def _verbs(text: str) -> tuple[Verb, ...]:
    return tuple(_verb(word) for word in text.split())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True)
class Lexicon:
    """The open-class words of one domain. Two domains share none of them."""

    women: tuple[Noun, ...]
    men: tuple[Noun, ...]
    people: tuple[Noun, ...]
    female_names: tuple[str, ...]
    male_names: tuple[str, ...]
    things: tuple[Noun, ...]
    masses: tuple[str, ...]  # nouns without a plural
    person_adjectives: tuple[str, ...]
    thing_adjectives: tuple[str, ...]
    comparatives: tuple[str, ...]  # "tall:taller"
    use: tuple[Verb, ...]  # a person does it to a thing, which must be named
    use_without_goal: tuple[Verb, ...]  # the same, and "to the boy" cannot follow
    social: tuple[Verb, ...]  # a person does it to a person
    reflexive: tuple[Verb, ...]  # a person does it to a person, or to himself
    intransitive: tuple[Verb, ...]
    dative: tuple[Verb, ...]  # "gave the boy the lamp"
    to_dative: tuple[Verb, ...]  # "described the lamp to the boy", not "described the boy the lamp"
    takes_infinitive: tuple[Verb, ...]  # "decided to go", not "decided going"
    takes_gerund: tuple[Verb, ...]  # "enjoyed going", not "enjoyed to go"
    near: tuple[str, ...]
    openings: tuple[str, ...]
    times: tuple[str, ...]
    all_people: tuple[Noun, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "all_people", self.women + self.men + self.people)


# The words of each kind, of the training domain and of the other one.
WORDS: dict[str, tuple[str, str]] = {
    "women": (
        "girl queen aunt niece waitress woman:women",
        "mother sister daughter princess actress",
    ),
    "men": (
        "boy king uncle nephew waiter man:men",
        "father brother son prince actor",
    ),
    "people": (
        "teacher student doctor neighbor artist lawyer farmer guest driver singer pilot child:children",
        "professor nurse dentist engineer poet soldier tourist painter baker guard",
    ),
    "female_names": (
        "Mary Susan Anna Linda Helen",
        "Julia Emma Laura Karen Alice",
    ),
    "male_names": (
        "John Peter David Robert Thomas",
        "Frank Henry Paul Steven Kevin",
    ),
    "things": (
        "chair lamp camera bicycle clock radio guitar toy computer mirror basket ladder ring suitcase blanket "
        "painting key cabinet",
        "table violin telescope necklace tent bracelet sofa piano scooter kettle umbrella printer phone wallet boat",
    ),
    "masses": (
        "furniture equipment machinery",
        "luggage clothing jewelry",
    ),
    "person_adjectives": (
        "tired angry hungry polite famous nervous friendly busy",
        "lonely proud quiet brave sick thirsty",
    ),
    "thing_adjectives": (
        "old new broken dirty expensive small green",
        "heavy cheap large beautiful useful strange",
    ),
    "comparatives": (
        "tall:taller fast:faster rich:richer happy:happier kind:kinder",
        "short:shorter young:younger lazy:lazier strong:stronger smart:smarter",
    ),
    "use": (
        "repair damage examine touch receive carry grab:grabbed take:took:taken buy:bought find:found",
        "destroy purchase discover inspect restore fetch obtain ruin",
    ),
    "use_without_goal": (
        "repair damage examine touch find:found",
        "destroy discover inspect ruin",
    ),
    "social": (
        "invite visit thank ignore admire watch",
        "hire greet follow support tease rescue",
    ),
    "reflexive": (
        "admire praise blame trust defend",
        "criticize respect protect hate understand:understood",
    ),
    "intransitive": (
        "laugh arrive smile sneeze cough disappear sleep:slept fall:fell:fallen",
        "yawn vanish shiver faint blush snore tremble weep:wept",
    ),
    "dative": (
        "give:gave:given send:sent lend:lent show:showed:shown",
        "offer hand sell:sold",
    ),
    "to_dative": (
        "describe mention explain donate",
        "reveal demonstrate surrender",
    ),
    "takes_infinitive": (
        "decide hope promise agree refuse",
        "threaten expect pretend manage",
    ),
    "takes_gerund": (
        "enjoy avoid finish suggest deny",
        "postpone admit:admitted imagine risk",
    ),
    "near": (
        "near; behind; beside",
        "next to; in front of",
    ),
    "openings": (
        "I think that; everyone knows that; it is clear that; someone said that; my boss said that",
        "we believe that; it is obvious that; people say that; they claimed that; the newspaper claimed that",
    ),
    "times": (
        "yesterday; last week; in the morning",
        "last night; on Monday; two days ago",
    ),
}
GENDERS = {"women": "f", "men": "m"}


def _read(kind: str, text: str) -> tuple[Any, ...]:
    """The words of one kind, from how they are written in WORDS."""
    if kind in ("women", "men", "people", "things"):
        return _nouns(text, GENDERS.get(kind, "n"))
    if kind in ("near", "openings", "times"):
        return tuple(text.split("; "))
    verbs = (
        "use",
        "use_without_goal",
        "social",
        "reflexive",
        "intransitive",
        "dative",
        "to_dative",
        "takes_infinitive",
        "takes_gerund",
    )
    return _verbs(text) if kind in verbs else _words(text)


IN_DOMAIN, OUT_OF_DOMAIN = (Lexicon(**{k: _read(k, texts[at]) for k, texts in WORDS.items()}) for at in (0, 1))


# ------------------------------------------------------------------------------------------- phrases


class Person(NamedTuple):
    text: str  # "Mary", "the boys"
    plural: bool
    gender: str


PRONOUNS = (("he", "him"), ("she", "her"), ("they", "them"))
REFLEXIVES = {"m": "himself", "f": "herself", "plural": "themselves"}


class Words:
    """Draws words and phrases of one lexicon.

    Only ``random.Random.random`` is used: its sequence for a seed is promised to stay the same in every
    version of Python, and that of ``choice`` or ``shuffle`` is not.
    """

    def __init__(self, lexicon: Lexicon, rng: random.Random) -> None:
        self.lexicon = lexicon
        self.rng = rng

    def chance(self, probability: float = 0.5) -> bool:
        return self.rng.random() < probability

    def pick(self, options: Sequence[T], besides: Sequence[T] = ()) -> T:
        left = [option for option in options if option not in besides]
        return left[int(self.rng.random() * len(left))]

    def noun(self, nouns: Sequence[Noun], plural: bool | None = None, determiner: str = "the") -> Person:
        plural = self.chance() if plural is None else plural
        noun = self.pick(nouns)
        return Person(f"{determiner} {noun.form(plural)}", plural, noun.gender)

    def name(self, gender: str | None = None) -> Person:
        gender = gender or ("f" if self.chance() else "m")
        return Person(self.pick(self.lexicon.female_names if gender == "f" else self.lexicon.male_names), False, gender)

    def person(self, besides: Sequence[str] = (), plural: bool | None = None) -> Person:
        """A name or a noun phrase; ``besides`` are texts it must not be."""
        while True:
            named = plural is not True and self.chance(0.4)
            person = self.name() if named else self.noun(self.lexicon.all_people, plural)
            if person.text not in besides:
                return person

    def gendered(self, gender: str, plural: bool) -> Person:
        """A person whose reflexive is known: "Mary", "the king", "the girls"."""
        if not plural and self.chance(0.3):
            return self.name(gender)
        return self.noun(self.lexicon.women if gender == "f" else self.lexicon.men, plural)

    def thing(self, plural: bool | None = None) -> str:
        if self.chance(0.4):
            return self.noun(self.lexicon.things, plural, f"the {self.pick(self.lexicon.thing_adjectives)}").text
        return self.noun(self.lexicon.things, plural).text

    def time(self) -> str:
        """Nothing, or something like " yesterday"."""
        return " " + self.pick(self.lexicon.times) if self.chance(0.4) else ""

    def claim(self, good: str, bad: str) -> Pair:
        """Both as a sentence; one in three inside "I think that ...", the same for both."""
        opening = self.pick(self.lexicon.openings) + " " if self.chance(0.35) else ""
        return _sentence(opening + good), _sentence(opening + bad)


def _sentence(text: str, mark: str = ".") -> str:
    return text[0].upper() + text[1:] + mark


# ----------------------------------------------------------------------------------------- phenomena


def agreement(w: Words) -> Pair:
    """The verb agrees with its subject, not with a nearer noun: "The keys near the cabinet are old"."""
    lexicon, plural = w.lexicon, w.chance()
    of_things = w.chance()
    nouns = lexicon.things if of_things else lexicon.all_people
    head = w.pick(nouns)
    attractor = w.pick(nouns, besides=(head,)).form(not plural if w.chance(0.7) else plural)
    adjective = w.pick(lexicon.thing_adjectives if of_things else lexicon.person_adjectives)
    verb = w.pick(lexicon.intransitive)
    predicates = [(f"is {adjective}", f"are {adjective}"), (f"was {adjective}", f"were {adjective}")]
    if not of_things:
        predicates += [(verb.third, verb.base), (f"has {verb.participle}", f"have {verb.participle}")]
    singular, plural_form = w.pick(predicates)
    subject = f"the {head.form(plural)}"
    if w.chance(0.7):
        subject += f" {w.pick(lexicon.near)} the {attractor}"
    good, bad = (plural_form, singular) if plural else (singular, plural_form)
    return w.claim(f"{subject} {good}", f"{subject} {bad}")


def reflexive(w: Words) -> Pair:
    """A reflexive is bound by the subject of its own clause: "Mary said that the king admired himself"."""
    gender, plural = w.pick("mf"), w.chance(0.4)
    other_gender = "f" if gender == "m" else "m"
    other_plural = w.chance() if not plural else False
    head, other = w.gendered(gender, plural), w.gendered(other_gender, other_plural)
    good = REFLEXIVES["plural" if plural else gender]
    bad = REFLEXIVES["plural" if other_plural else other_gender]
    verb = w.pick(w.lexicon.reflexive).past
    kind = w.rng.random()
    if kind < 0.35:
        clause = f"{other.text} said that {head.text} {verb}"
    elif kind < 0.7:
        head = w.noun(w.lexicon.women if gender == "f" else w.lexicon.men, plural)
        clause = f"{head.text} {w.pick(w.lexicon.near)} {other.text} {verb}"
    else:
        clause = f"{head.text} {verb}"
    time = w.time()
    return w.claim(f"{clause} {good}{time}", f"{clause} {bad}{time}")


def determiner_noun(w: Words) -> Pair:
    """A determiner and its noun have the same number: "those dirty lamps", "too much furniture"."""
    lexicon = w.lexicon
    subject, verb, time = w.person().text, w.pick(lexicon.use).past, w.time()
    if w.chance(0.3):
        mass, thing = w.pick(lexicon.masses), w.pick(lexicon.things).plural
        good, bad = (
            (("too much", mass), ("too many", mass)) if w.chance() else (("too many", thing), ("too much", thing))
        )
    else:
        plural = w.chance()
        determiner = w.pick(("these", "those", "several", "two") if plural else ("this", "that", "every", "one"))
        noun = w.pick(lexicon.things)
        good, bad = (determiner, noun.form(plural)), (determiner, noun.form(not plural))
    adjective = w.pick(lexicon.thing_adjectives) + " " if w.chance() else ""
    good_object, bad_object = (f"{determiner} {adjective}{noun}" for determiner, noun in (good, bad))
    return w.claim(f"{subject} {verb} {good_object}{time}", f"{subject} {verb} {bad_object}{time}")


def word_order(w: Words) -> Pair:
    """The same words in another order."""
    lexicon = w.lexicon
    subject, verb, noun = w.person().text, w.pick(lexicon.use), w.pick(lexicon.things).singular
    adjective, time = w.pick(lexicon.thing_adjectives), w.time()
    near, place = w.pick(lexicon.near), w.pick(lexicon.things).plural
    past = f"{subject} {verb.past}"
    mood = f"{w.name().text} was", w.pick(lexicon.person_adjectives)
    good, bad = w.pick(
        (
            (f"{past} the {adjective} {noun}{time}", f"{past} the {noun} {adjective}{time}"),
            (f"{past} the {adjective} {noun}{time}", f"{past} {adjective} the {noun}{time}"),
            (f"{past} the {noun}{time}", f"{subject} the {noun} {verb.past}{time}"),
            (f"{past} the {noun}{time}", f"{verb.past} {subject} the {noun}{time}"),
            (f"{subject} will {verb.base} the {noun}", f"{subject} {verb.base} will the {noun}"),
            (
                f"the {noun} {near} the {place} was {adjective}",
                f"the {noun} the {place} {near} was {adjective}",
            ),
            (f"{mood[0]} very {mood[1]}{time}", f"{mood[0]} {mood[1]} very{time}"),
        )
    )
    return w.claim(good, bad)


def verb_form(w: Words) -> Pair:
    """Each auxiliary asks for one form of the verb: "has repaired", "is repairing", "will repair"."""
    verb, subject, thing = w.pick(w.lexicon.use), w.person(plural=False).text, w.thing()
    wanted = {
        "has": verb.participle,
        "had": verb.participle,
        "is": verb.ing,
        "was": verb.ing,
        "will": verb.base,
        "can": verb.base,
        "did not": verb.base,
    }
    auxiliary = w.pick(tuple(wanted))
    wrong = w.pick((verb.participle, verb.ing, verb.base), besides=(wanted[auxiliary],))
    return w.claim(f"{subject} {auxiliary} {wanted[auxiliary]} {thing}", f"{subject} {auxiliary} {wrong} {thing}")


def question(w: Words) -> Pair:
    """A main question inverts subject and auxiliary, an embedded one does not."""
    lexicon = w.lexicon
    subject, verb, auxiliary = w.person().text, w.pick(lexicon.use), w.pick(("will", "can", "should", "must"))
    thing = w.pick(lexicon.things).singular
    asked = w.pick(("what", f"which {thing}", "when", "why"))
    rest = f"{verb.base} the {thing}" if asked in ("when", "why") else verb.base
    inverted, straight = f"{asked} {auxiliary} {subject} {rest}", f"{asked} {subject} {auxiliary} {rest}"
    if w.chance():
        return _sentence(inverted, "?"), _sentence(straight, "?")
    asker = w.pick(("I wonder", f"{w.person(besides=(subject,)).text} wondered", "we do not know"))
    return _sentence(f"{asker} {straight}"), _sentence(f"{asker} {inverted}")


def filler_gap(w: Words) -> Pair:
    """A wh-word and a gap need each other: "I know what Mary bought", "I know that Mary bought it"."""
    lexicon = w.lexicon
    subject, verb, thing = w.person().text, w.pick(lexicon.use), w.thing()
    knower = w.pick(("I know", "we know", f"{w.person(besides=(subject,)).text} knew", "you forgot"))
    filler = w.pick(("what", f"which {w.pick(lexicon.things).singular}"))
    with_gap, without_gap = f"{subject} {verb.past}", f"{subject} {verb.past} {thing}"
    kind = w.rng.random()
    if kind < 0.35:
        return _sentence(f"{knower} {filler} {with_gap}"), _sentence(f"{knower} {filler} {without_gap}")
    if kind < 0.7:
        return _sentence(f"{knower} that {without_gap}"), _sentence(f"{knower} that {with_gap}")
    if kind < 0.85:
        return (
            _sentence(f"{filler} did {subject} {verb.base}", "?"),
            _sentence(f"{filler} did {subject} {verb.base} {thing}", "?"),
        )
    return (
        _sentence(f"did {subject} {verb.base} {thing}", "?"),
        _sentence(f"did {subject} {verb.base}", "?"),
    )


def argument_structure(w: Words) -> Pair:
    """Some verbs need an object and some take none; some take two."""
    lexicon = w.lexicon
    subject, thing, time = w.person().text, w.thing(), w.time()
    transitive, intransitive = w.pick(lexicon.use).past, w.pick(lexicon.intransitive).past
    kind = w.rng.random()
    if kind < 0.3:
        return w.claim(f"{subject} {transitive} {thing}{time}", f"{subject} {transitive}{time}")
    if kind < 0.6:
        return w.claim(f"{subject} {intransitive}{time}", f"{subject} {intransitive} {thing}{time}")
    receiver = w.person(besides=(subject,)).text
    dative, to_dative = w.pick(lexicon.dative).past, w.pick(lexicon.to_dative).past
    if kind < 0.7:
        return w.claim(
            f"{subject} {dative} {receiver} {thing}{time}", f"{subject} {to_dative} {receiver} {thing}{time}"
        )
    if kind < 0.8:
        return w.claim(
            f"{subject} {to_dative} {thing} to {receiver}{time}",
            f"{subject} {to_dative} {receiver} {thing}{time}",
        )
    good = w.pick((dative, to_dative))
    return w.claim(
        f"{subject} {good} {thing} to {receiver}{time}",
        f"{subject} {w.pick(lexicon.use_without_goal).past} {thing} to {receiver}{time}",
    )


def polarity(w: Words) -> Pair:
    """The words "any" and "ever" need a negation above them, not just one somewhere in the sentence."""
    lexicon = w.lexicon
    one = w.pick(lexicon.all_people)
    two = w.pick(lexicon.all_people, besides=(one,))
    verb, time = w.pick(lexicon.social), w.time()
    if w.chance():
        return w.claim(
            f"the {one.plural} did not {verb.base} any {two.plural}{time}",
            f"any {one.plural} did not {verb.base} the {two.plural}{time}",
        )
    plural = w.chance()
    has, adjective = ("have" if plural else "has"), w.pick(lexicon.person_adjectives)
    rest = w.pick((f"{has} ever been {adjective}", f"{has} ever {w.pick(lexicon.intransitive).participle}"))
    return w.claim(
        f"no {one.form(plural)} that the {two.plural} {verb.past} {rest}",
        f"the {one.form(plural)} that no {two.plural} {verb.past} {rest}",
    )


def pronoun_case(w: Words) -> Pair:
    """ "She", "he" and "they" are subjects; "her", "him" and "them" are objects."""
    lexicon = w.lexicon
    verb, time, person = w.pick(lexicon.social).past, w.time(), w.person().text
    one = w.pick(PRONOUNS)
    two = w.pick(PRONOUNS, besides=(one,))
    kind = w.rng.random()
    if kind < 0.34:
        return w.claim(f"{one[0]} {verb} {two[1]}{time}", f"{two[1]} {verb} {one[0]}{time}")
    if kind < 0.67:
        return w.claim(f"{one[0]} {verb} {person}{time}", f"{one[1]} {verb} {person}{time}")
    return w.claim(f"{person} {verb} {one[1]}{time}", f"{person} {verb} {one[0]}{time}")


def complement(w: Words) -> Pair:
    """Some verbs take an infinitive and some a gerund: "decided to repair", "enjoyed repairing"."""
    lexicon = w.lexicon
    subject, verb, thing = w.person().text, w.pick(lexicon.use), w.thing()
    if w.chance():
        head, good, bad = w.pick(lexicon.takes_infinitive), f"to {verb.base}", verb.ing
    else:
        head, good, bad = w.pick(lexicon.takes_gerund), verb.ing, f"to {verb.base}"
    return w.claim(f"{subject} {head.past} {good} {thing}", f"{subject} {head.past} {bad} {thing}")


def comparative(w: Words) -> Pair:
    """ "Taller than" and "as tall as"; not "taller as" or "as tall than"."""
    adjective, _, more = w.pick(w.lexicon.comparatives).partition(":")
    subject = w.person()
    other = w.person(besides=(subject.text,)).text
    be = w.pick(("are", "were") if subject.plural else ("is", "was"))
    good, bad = w.pick(
        (
            (f"{more} than", f"{more} as"),
            (f"{more} than", f"{adjective} than"),
            (f"as {adjective} as", f"as {adjective} than"),
            (f"as {adjective} as", f"as {more} as"),
        )
    )
    return w.claim(f"{subject.text} {be} {good} {other}", f"{subject.text} {be} {bad} {other}")


PHENOMENA: dict[str, Callable[[Words], Pair]] = {
    "agreement": agreement,
    "reflexive": reflexive,
    "determiner": determiner_noun,
    "order": word_order,
    "verb_form": verb_form,
    "question": question,
    "filler_gap": filler_gap,
    "argument": argument_structure,
    "polarity": polarity,
    "case": pronoun_case,
    "complement": complement,
    "comparative": comparative,
}


# --------------------------------------------------------------------------------------------- files


class Row(NamedTuple):
    source: str
    label: int
    sentence: str

    def line(self) -> str:
        return f"{self.source}\t{self.label}\t{'' if self.label else '*'}\t{self.sentence}\n"


def _draw(words: Words, size: int, used: dict[str, int], names: Sequence[str]) -> list[Row]:
    """``size`` rows, taking the phenomena in turn; ``used`` says which sentences there are already."""
    rows: list[Row] = []
    attempts = 0
    while len(rows) < size:
        attempts += 1
        if attempts > 100 * size + 1000:
            raise ValueError(f"{size} different sentences are more than the generator has")
        source = names[len(rows) // 2 % len(names)]
        good, bad = PHENOMENA[source](words)
        if used.get(good) == 0 or used.get(bad) == 1:
            raise AssertionError(f"judged both ways: {good!r} / {bad!r}")
        if good in used or bad in used:
            continue
        used.update({good: 1, bad: 0})
        rows += [Row(source, 1, good), Row(source, 0, bad)]
    return rows


def _shuffled(rows: list[Row], rng: random.Random) -> list[Row]:
    return [row for _, row in sorted((rng.random(), row) for row in rows)]


def generate(
    train: int = 2000, dev: int = 500, seed: int = 0, phenomena: Sequence[str] | None = None
) -> dict[str, list[Row]]:
    """The rows of each file. ``dev`` is divided 3 to 2 between the two development files; all sizes become
    even. ``phenomena`` are names from PHENOMENA; all of them unless given."""
    names = list(PHENOMENA if phenomena is None else phenomena)
    unknown = sorted(set(names) - set(PHENOMENA))
    if unknown or not names:
        raise ValueError(f"unknown phenomenon {', '.join(unknown)!r}; known: {', '.join(PHENOMENA)}")
    in_domain = dev * 3 // 5
    sizes = {"train.tsv": train, "dev_in_domain.tsv": in_domain, "dev_out_of_domain.tsv": dev - in_domain}
    rng = random.Random(seed)
    used: dict[str, int] = {}
    files = {}
    for name, size in sizes.items():
        lexicon = OUT_OF_DOMAIN if name.startswith("dev_out") else IN_DOMAIN
        files[name] = _shuffled(_draw(Words(lexicon, rng), size, used, names), rng)
    return files


def write(
    folder: str | Path, train: int = 2000, dev: int = 500, seed: int = 0, phenomena: Sequence[str] | None = None
) -> list[Path]:
    """Write the three files into ``folder``; each appears whole or not at all."""
    if train < 2 or dev < 8:
        raise ValueError(f"at least --train 2 and --dev 8 are needed, not {train} and {dev}")
    from vblora.io import replacing  # takes seconds, as torch does

    folder = Path(folder)
    files = generate(train, dev, seed, phenomena)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in files.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes("".join(row.line() for row in rows).encode())
        paths.append(folder / name)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a small generated data set in the raw form of CoLA.")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--train", type=int, default=2000, help="rows of train.tsv (default 2000)")
    parser.add_argument("--dev", type=int, default=500, help="rows of both development files (default 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phenomena", nargs="+", metavar="NAME", help=f"some of: {', '.join(PHENOMENA)} (default all)")
    options = parser.parse_args(arguments)
    try:
        paths = write(options.folder, options.train, options.dev, options.seed, options.phenomena)
    except (OSError, ValueError) as error:
        print(f"generate_cola.py: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
