"""Names, values and tool parts that dialogues are made of, split into trained and held-out ones by hash.

A held-out tool is a verb-noun pair that training never pairs; a held-out name or value is never seen in training.
"""

from __future__ import annotations

import random

from .text_sources import is_held_out

VERBS = """add book build call cancel check clean close copy count create delete draw fetch find fix get hide
install join list load lock mark measure move open order paint park pause plan play print pull push read rename rent
reset save scan search sell send share show sort start stop test track update watch write""".split()
NOUNS = """account alarm album article badge bag ball banner basket battery bike bill board boat book bottle box bridge
bus button cable cake camera car card chair channel chart clock cloud coat coin contact contract cup curtain desk device
dish document door dress drone engine event farm fence field file film filter flag flight flower folder game garden
gift glass group guitar hammer hotel house image invoice job key kitchen ladder lamp lesson letter license light link
list lock machine map meal medal meeting message mirror model movie note office package page painting parcel part
password path phone photo piano plant plate player playlist poem pool poster printer project puzzle radio recipe record
report ring road robot room rope route salad scale school screen seat sensor server ship shirt shoe shop sign song
sound space star station stone store story street suit survey table tank task taxi team tent test ticket tool tower toy
track trade train tree trip truck vase video visa wall wallet watch wheel window wire""".split()
STRING_PARAMETERS = "city name owner color title user street place brand team label topic".split()
INTEGER_PARAMETERS = "count size level days hours price age amount speed weight".split()
ENUM_PARAMETERS = {
    "mode": "fast slow quiet normal".split(),
    "unit": "meter foot mile inch".split(),
    "style": "plain bold round flat".split(),
    "priority": "low high urgent medium".split(),
}
BOOLEAN_PARAMETERS = "private notify repeat public".split()
PARAMETERS = [*STRING_PARAMETERS, *INTEGER_PARAMETERS, *ENUM_PARAMETERS, *BOOLEAN_PARAMETERS]
ENUM_VALUES = [value for values in ENUM_PARAMETERS.values() for value in values]
RESULT_FIELDS = "status code total score result rating number place owner level".split()
_STARTS = "b br d dr f g gr h j k kl l m n p pr r s st t tr v w z".split()
_VOWELS = "a e i o u ai ea oo".split()
_ENDS = ["", "n", "r", "l", "s", "m", "t", "x"]


def word(rng: random.Random, *, held_out: bool) -> str:
    """A made-up name of two or three syllables: copying it takes reading, not memory."""
    while True:
        count = rng.choice((2, 2, 3))
        made = "".join(rng.choice(_STARTS) + rng.choice(_VOWELS) for _ in range(count)) + rng.choice(_ENDS)
        if is_held_out("word:" + made, 0.1) == held_out:
            return made.capitalize()


def pair(rng: random.Random, kind: str, first: int, last: int, *, held_out: bool) -> tuple[int, int]:
    """Two numbers whose pairing is trained or held out."""
    while True:
        a, b = rng.randint(first, last), rng.randint(first, last)
        if is_held_out(f"{kind}:{a},{b}", 0.1) == held_out:
            return a, b


def verb_noun(rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    while True:
        verb, noun = rng.choice(VERBS), rng.choice(NOUNS)
        if is_held_out(f"tool:{verb}_{noun}", 0.1) == held_out:
            return verb, noun
