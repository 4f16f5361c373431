"""Vocabularies of the released files, v1.2."""

FILES = {
    "qa1": "qa1_single-supporting-fact", "qa2": "qa2_two-supporting-facts", "qa3": "qa3_three-supporting-facts",
    "qa4": "qa4_two-arg-relations", "qa5": "qa5_three-arg-relations", "qa6": "qa6_yes-no-questions",
    "qa7": "qa7_counting", "qa8": "qa8_lists-sets", "qa9": "qa9_simple-negation", "qa10": "qa10_indefinite-knowledge",
    "qa11": "qa11_basic-coreference", "qa12": "qa12_conjunction", "qa13": "qa13_compound-coreference",
    "qa14": "qa14_time-reasoning", "qa15": "qa15_basic-deduction", "qa16": "qa16_basic-induction",
    "qa17": "qa17_positional-reasoning", "qa18": "qa18_size-reasoning", "qa19": "qa19_path-finding",
    "qa20": "qa20_agents-motivations",
}  # fmt: skip
"""File stem of each released task."""

ACTORS = ("Mary", "John", "Daniel", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
"""Actors of qa5."""
TOWNSPEOPLE = ("Bill", "Fred", "Julie", "Mary")
"""Actors of qa10 and qa14."""
MEN = ("Bill", "Daniel", "Fred", "Jeff", "John")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
TOWN_PLACES = ("bedroom", "cinema", "kitchen", "office", "park", "school")
"""Places of qa10 and qa14."""
OBJECTS = ("apple", "football", "milk")

MOVE_VERBS = ("went", "journeyed", "travelled", "moved", "went back")
GET_VERBS = ("got", "grabbed", "took", "picked up")
DROP_VERBS = ("dropped", "discarded", "left", "put down")
GIVE_VERBS = ("gave", "handed", "passed")
AFTERWARDS = ("After that", "Afterwards", "Following that", "Then")

TIMES = ("yesterday", "this morning", "this afternoon", "this evening")
NUMBERS = ("none", "one", "two", "three")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

PLURALS = {"mouse": "mice", "sheep": "sheep", "wolf": "wolves", "cat": "cats"}
PETS = ("Gertrude", "Winona", "Jessica", "Emily")
SPECIES = ("swan", "lion", "frog", "rhino")
COLOURS = ("gray", "green", "white", "yellow")
COLOURED = ("Lily", "Bernhard", "Brian", "Julius", "Greg")
SHAPES = ("triangle", "blue square", "pink rectangle", "red square", "red sphere", "yellow square")
CONTAINERS = ("suitcase", "container", "chest", "box")

NEEDY = ("Jason", "Antoine", "Sumit", "Yann")
NEEDS = {
    "hungry": ("kitchen", "apple"),
    "thirsty": ("kitchen", "milk"),
    "bored": ("garden", "football"),
    "tired": ("bedroom", "pajamas"),
}
"""qa20: where a state sends, and what is fetched there."""
