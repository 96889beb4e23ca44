"""Questions with checkable answers: sums and differences, look-up in a given text, sorting, dates, units, and a few
words of greeting."""

from __future__ import annotations

import random
from dataclasses import dataclass

from . import words

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
UNITS = (
    ("decades", "years", 10),
    ("centimeters", "millimeters", 10),
    ("centuries", "years", 100),
    ("meters", "centimeters", 100),
    ("dollars", "cents", 100),
    ("kilometers", "meters", 1000),
    ("kilograms", "grams", 1000),
    ("seconds", "milliseconds", 1000),
)
THINGS = "apples pears coins books keys cups stones cards plates shells pens eggs".split()
GREETINGS = (
    ("Hello", "Hello! How can I help you?"),
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Who are you?", "I am the demo model of k2lite, a very small Kimi-K2."),
    ("What can you do?", "I can add small numbers, look things up in a text, and call tools."),
    ("Thank you", "You are welcome."),
    ("Goodbye", "Goodbye!"),
)


@dataclass(frozen=True)
class Question:
    kind: str
    question: str
    answer: str


def question(rng: random.Random, *, held_out: bool, kind: str | None = None) -> Question:
    kind = kind or rng.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
    text, answer = KINDS[kind][0](rng, held_out)
    return Question(kind, text, answer)


def _arithmetic(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """Sums and differences of two numbers from 10 to 49, worked out column by column as on paper."""
    operation = rng.choice(("plus", "minus"))
    while True:
        a, b = words.pair(rng, operation, 10, 49, held_out=held_out)
        if operation == "plus" or a >= b:
            break
    sign = "+" if operation == "plus" else "-"
    form = rng.choice((f"What is {a} {operation} {b}?", f"What is {a} {sign} {b}?", f"{a} {sign} {b} ="))
    return form, (added if operation == "plus" else subtracted)(a, b)


def added(a: int, b: int) -> str:
    ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    tens = f"{a // 10} + {b // 10}{' + 1' if carry else ''} = {a // 10 + b // 10 + carry}"
    return f"{a % 10} + {b % 10} = {ones}, {tens}, so {a + b}."


def subtracted(a: int, b: int) -> str:
    borrowed = a % 10 < b % 10
    upper, tens = a % 10 + 10 * borrowed, a // 10 - borrowed
    return f"{upper} - {b % 10} = {upper - b % 10}, {tens} - {b // 10} = {tens - b // 10}, so {a - b}."


def _lookup(rng: random.Random, held_out: bool) -> tuple[str, str]:
    people = [words.word(rng, held_out=held_out) for _ in range(rng.randint(2, 5))]
    facts = {name: (rng.randint(2, 99), rng.choice(THINGS)) for name in people}
    text = " ".join(f"{name} has {count} {thing}." for name, (count, thing) in facts.items())
    name = rng.choice(list(facts))
    count, thing = facts[name]
    asked = rng.choice((f"How many {thing} does {name} have?", f"What does {name} have?"))
    return f"{text} {asked}", f"{name} has {count} {thing}."


def _sorting(rng: random.Random, held_out: bool) -> tuple[str, str]:
    while True:
        numbers = rng.sample(range(1, 100), rng.randint(2, 4))
        if words.is_held_out(f"sort:{numbers}", 0.1) == held_out:
            break
    return f"Sort these numbers: {', '.join(map(str, numbers))}", ", ".join(map(str, sorted(numbers)))


def _dates(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """Counted one by one, the last one being the answer."""
    while True:
        days = rng.random() < 0.6
        names = DAYS if days else MONTHS
        place, steps = rng.randrange(len(names)), rng.randint(1, 6)
        if words.is_held_out(f"date:{names[place]},{steps}", 0.1) == held_out:
            break
    unit = ("day" if days else "month") + ("s" if steps > 1 else "")
    counted = [f"{step} {names[(place + step) % len(names)]}" for step in range(1, steps + 1)]
    return f"What comes {steps} {unit} after {names[place]}?", ", ".join(counted) + "."


def _units(rng: random.Random, held_out: bool) -> tuple[str, str]:
    while True:
        large, small, factor = rng.choice(UNITS)
        count = rng.randint(2, 99)
        if words.is_held_out(f"unit:{large},{count}", 0.1) == held_out:
            break
    return f"How many {small} are {count} {large}?", f"{count * factor} {small}."


def _greeting(rng: random.Random, held_out: bool) -> tuple[str, str]:  # noqa: ARG001
    return rng.choice(GREETINGS)


KINDS = {
    "arithmetic": (_arithmetic, 55),
    "look-up": (_lookup, 30),
    "sorting": (_sorting, 5),
    "dates": (_dates, 4),
    "units": (_units, 4),
    "greeting": (_greeting, 2),
}
