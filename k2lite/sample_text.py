"""A short text of several kinds, for who wants to see a model route and has named none: prose, code, numbers, a
dialogue, another language. Written for k2lite; it means nothing."""

SAMPLE_TEXT = """\
The harbour wakes before the town does. Boats come in with their lamps still lit, and the first crates stand on the
quay when the baker opens his shutters. Nobody hurries: the tide decides when there is work.

def moving_average(values, width):
    total = sum(values[:width])
    yield total / width
    for old, new in zip(values, values[width:]):
        total += new - old
        yield total / width

A train leaves at 9:40 and needs 2 hours and 35 minutes; it arrives at 12:15. Of 384 shelves 8 are used at a time, which
is one in 48. Seven times six is forty-two, and 1024 divided by 16 is 64.

- Could you send a letter to Ms. Rossi in Torino?
- Certainly. Which address shall I use, and when must it be there?
- Via Garibaldi 12, before Friday.

Die Bibliothek ist groß, doch gelesen werden immer nur wenige Bände zugleich. Wer weiß, welche als nächste verlangt
werden, legt sie bereit; wer es nicht weiß, merkt sich wenigstens, welche gestern auf dem Tisch lagen.

{"name": "get_weather", "arguments": {"city": "Bergen", "unit": "celsius"}}
"""
