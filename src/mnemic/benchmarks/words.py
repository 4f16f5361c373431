"""Words for needles and word lists: frozen, so that samples never change; 96 x 105 pairs of an adjective and a noun.

Own lists: RULER takes those of the package wonderwords, whose releases differ, so samples are not bit-identical to the
official ones.
"""

_ADJECTIVES = """
amber ancient arctic azure balmy blank bold brave brief bright brisk calm candid charming clever cloudy coastal
cosmic crimson crisp curious daring dazzling deep distant dusty eager earnest eastern elegant fabled faint famous
fearless festive fierce fluent foggy fragile frosty gentle gilded glossy golden graceful grand hidden hollow honest
humble icy ideal ivory jolly keen lively lonely loyal lucid lunar marble mellow mighty misty modest mossy nimble
noble northern olive pale patient placid polite proud quiet rapid remote royal rustic sandy scarlet serene silent
silver simple sleepy slender smoky solar steady stormy subtle sunny swift tender
"""
_NOUNS = """
acorn anchor antler apron arrow badger bakery ballad bamboo banner barley basket beacon beetle balloon bottle
bridge bucket cabin camel candle canyon carpet castle cavern cedar cello cherry chimney cobra comet compass copper
cotton cradle crystal dagger desert dolphin dragon ember engine falcon feather ferry fiddle forest fossil fountain
garden gazelle glacier goblet guitar hammer harbor harvest hazel helmet heron island jacket jaguar jungle kettle
kitten ladder lagoon lantern turnip lizard magnet mango meadow mirror monkey mountain napkin needle ocean orchard
otter oyster paddle parrot pebble pepper pigeon pillow planet pocket puzzle rabbit ribbon river rocket saddle
salmon shadow spider temple tunnel turtle valley violin
"""
ADJECTIVES: tuple[str, ...] = tuple(_ADJECTIVES.split())
NOUNS: tuple[str, ...] = tuple(_NOUNS.split())
SINGLES = ADJECTIVES + NOUNS
"""No word lies within another one or within a joined pair of two others."""
PAIRS = len(ADJECTIVES) * len(NOUNS)


def pair(number: int, between: str = "-") -> str:
    """One of `PAIRS` words such as "amber-acorn"."""
    return f"{ADJECTIVES[number // len(NOUNS)]}{between}{NOUNS[number % len(NOUNS)]}"
