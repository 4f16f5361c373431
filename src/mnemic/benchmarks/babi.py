"""bAbI stories: the released files, an own generator for qa1-qa3, and a solver that checks both.

Paper: Weston et al., Towards AI-Complete Question Answering, 2015 (arXiv 1502.05698). The surface (verbs, "there",
question forms) is that of release v1.2, which every paper and BABILong use, not of the later Lua rewrite.

World of the generator: Mary, John, Daniel and Sandra, six places, three objects. People move to a place where they
are not; they get an object that lies free where they are; they drop what they hold. Everybody and everything has a
place from the start that is never told. Facts come in pairs, a question may follow each pair, a story has five
questions, and a sample keeps one of them together with all facts (not questions) before it.

Choices where the rules leave room, fitted to the released qa1-qa3 files:

- The next fact is a MOVE with probability 0.6; otherwise one of the possible GETs and DROPs, all equally likely, or
  again a MOVE if there is none. This yields the released shares (qa2: MOVE .64, GET .20, DROP .16).
- A held object is asked about only if it was carried somewhere since the last GET, and qa3 asks only about places of
  that last carry: in the release the supporting moves of qa3 all follow the last GET.
- A question considers only the object handled last (qa2 half of the time, qa3 mostly) or all answerable ones. Measured
  means of facts before a question: qa2 14 (release 15), qa3 about 50 (51); about the object handled last: .75 (.76)
  and .7 (.72); about a dropped one: .64 (.68) and .6 (.79, not reached).
"""

import hashlib
import random
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ..core.errors import DataError, InputError, UnknownNameError

T = TypeVar("T")

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
GENERATED_TASKS = ("qa1", "qa2", "qa3")
SPLITS = ("train", "validation", "test")
FACTS_PER_QUESTION = 2
QUESTIONS_PER_STORY = 5

ACTORS = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
MOVE_VERBS = ("went", "journeyed", "travelled", "moved", "went back")
GET_VERBS = ("got", "grabbed", "took", "picked up")
DROP_VERBS = ("dropped", "discarded", "left", "put down")

_MOVE_SHARE = 0.6
_LAST_HANDLED_SHARE = {"qa2": 0.5, "qa3": 0.8}  # how often only the object handled last is considered
_LAST_PLACE_SHARE = 0.7  # qa3: how often the final place is considered; otherwise all places of the carry alike
_GET_THERE = {"qa2": 1.0, "qa3": 0.2}  # share of GETs that end in "there"
_DROP_THERE = 0.2


@dataclass(frozen=True, slots=True)
class BabiSample:
    """One question with all facts told before it.

    Attributes:
        task: "qa1" .. "qa20".
        facts: the sentences, in story order, as in the file.
        question: as in the file; most v1.2 questions end in "? " with a blank.
        answer: as in the file; several words are joined by ",".
        supporting: indices into `facts`, in the order in which the file lists them.
        provenance: where the sample comes from, for reports.
    """

    task: str
    facts: tuple[str, ...]
    question: str
    answer: str
    supporting: tuple[int, ...]
    provenance: str


# ---------------------------------------------------------------------------------------------------- released files


def read(path: str | Path, task: str, split: str = "test", size: str = "en") -> tuple[BabiSample, ...]:
    """Samples of a released file, in file order: one per question.

    Args:
        path: the released zip (tasks_1-20_v1-2_en.zip), the folder it unpacks to or one that contains either, or a
            data folder that contains babi-v1.2/.
        task: "qa1" .. "qa20".
        split: "train" or "test". The release has no validation part.
        size: "en" (1,000 training questions a task) or "en-10k". The test files of both are equal.

    Raises:
        UnknownNameError: unknown task, split or size.
        DataError: nothing there, the file is not part of it, or a line does not follow the format.
    """
    _check("bAbI task", task, FILES)
    _check("split of the bAbI release", split, ("train", "test"))
    _check("size of the bAbI release", size, ("en", "en-10k"))
    where = _locate(Path(path))
    return _read(str(where), where.stat().st_mtime_ns, f"{size}/{FILES[task]}_{split}.txt", task)


def sizes(path: str | Path, task: str, split: str) -> tuple[str, ...]:
    """The sizes, of "en" and "en-10k", in which a copy of the release has this file; some lack en-10k/qa3 train.

    Raises:
        UnknownNameError: unknown task or split.
        DataError: no release there, or the file in neither size.
    """
    _check("bAbI task", task, FILES)
    _check("split of the bAbI release", split, ("train", "test"))
    where = _locate(Path(path))
    name = f"{FILES[task]}_{split}.txt"
    if where.is_dir():
        found = tuple(size for size in ("en", "en-10k") if (where / size / name).is_file())
    else:
        with zipfile.ZipFile(where) as archive:
            entries = archive.namelist()
        found = tuple(size for size in ("en", "en-10k") if any(e.endswith(f"/{size}/{name}") for e in entries))
    if not found:
        raise DataError(f"{where} has no {name}. Expected a file of the bAbI release v1.2; get a complete copy.")
    return found


def _check(kind: str, name: str, known: Sequence[str] | dict) -> None:
    if name not in known:
        raise UnknownNameError.of(kind, name, known)


def _locate(path: Path) -> Path:
    """The zip or the folder that holds en/ and en-10k/."""
    way_out = (
        "Expected the bAbI release v1.2: tasks_1-20_v1-2_en.zip or the folder tasks_1-20_v1-2 with en/ inside. "
        'Point to it, or use generated stories (facts="generated"), which need no files.'
    )
    if not path.exists():
        raise DataError(f"{path} does not exist. {way_out}")
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is not a zip file. {way_out}")
        return path
    for folder in (path, path / "babi-v1.2"):
        for candidate in (folder, folder / "tasks_1-20_v1-2"):
            if (candidate / "en").is_dir() or (candidate / "en-10k").is_dir():
                return candidate
        for candidate in sorted(folder.glob("tasks_1-20_v1-2*.zip")):
            return candidate
    raise DataError(f"{path} holds no bAbI stories. {way_out}")


@lru_cache(maxsize=8)
def _read(path: str, _mtime: int, name: str, task: str) -> tuple[BabiSample, ...]:
    where = Path(path)
    if where.is_dir():
        if not (where / name).is_file():
            raise DataError(f"{where} has no {name}. Expected a file of the bAbI release v1.2; unpack it completely.")
        text = (where / name).read_text("utf-8")
    else:
        with zipfile.ZipFile(where) as archive:
            entries = [entry for entry in archive.namelist() if entry.endswith("/" + name)]
            if not entries:
                raise DataError(
                    f"{where} has no {name}. Expected a file of the bAbI release v1.2; some copies leave out "
                    'en-10k/qa3 train: use size="en" or generated stories.'
                )
            text = archive.read(entries[0]).decode("utf-8")
    samples = tuple(_parse(text, task, f"{where.name}:{name}"))
    if not samples:
        raise DataError(
            f"{where}: {name} has no question. Expected lines 'ID question<TAB>answer<TAB>IDs'; some copies of bAbI "
            "v1.2 replaced the tabs: get an unchanged one."
        )
    return samples


def _parse(text: str, task: str, source: str) -> Iterator[BabiSample]:
    facts: list[str] = []
    index: dict[int, int] = {}  # line ID -> index into facts
    for number, line in enumerate(text.splitlines(), 1):
        head, _, rest = line.partition(" ")
        fields = rest.split("\t")
        if not head.isdigit() or not rest or len(fields) not in (1, 3):
            raise DataError(
                f"{source}, line {number}: {line!r} is neither 'ID fact' nor 'ID question<TAB>answer<TAB>IDs'. "
                "Some copies replaced the tabs; get an unchanged copy of bAbI v1.2."
            )
        if head == "1":
            facts, index = [], {}
        if len(fields) == 1:
            index[int(head)] = len(facts)
            facts.append(rest)
            continue
        try:
            supporting = tuple(index[int(i)] for i in fields[2].split())
        except (KeyError, ValueError):
            raise DataError(f"{source}, line {number}: supporting IDs {fields[2]!r} are no earlier facts.") from None
        yield BabiSample(task, tuple(facts), fields[0], fields[1], supporting, f"{source}:{number}")


# --------------------------------------------------------------------------------------------------------- generator


def generate(task: str, seed: int, split: str, count: int) -> list[BabiSample]:
    """The first `count` samples of `stream(task, seed, split)`."""
    if count < 0:
        raise InputError(f"count must be 0 or more; got {count}.")
    return list(islice(stream(task, seed, split), count))


def stream(task: str, seed: int, split: str = "train") -> Iterator[BabiSample]:
    """Endless generated samples of qa1, qa2 or qa3.

    Equal arguments give equal samples, on every platform. Samples of different splits are never equal, whatever the
    seeds: the hash of facts and question says which split a sample belongs to.

    Raises:
        UnknownNameError: a task without generator, or a split other than "train", "validation", "test".
    """
    _check("generated bAbI task", task, GENERATED_TASKS)
    _check("split", split, SPLITS)
    return _stream(task, seed, split)


def _stream(task: str, seed: int, split: str) -> Iterator[BabiSample]:
    rng = random.Random(f"mnemic.babi|{task}|{seed}|{split}")
    wanted = SPLITS.index(split)
    number = 0
    while True:
        for facts, question, answer, supporting in _story(task, rng):
            digest = hashlib.sha256("\n".join((*facts, question)).encode()).digest()
            if digest[0] % len(SPLITS) == wanted:
                provenance = f"generated {task} (v1.2 surface), seed {seed}, {split}, sample {number}"
                yield BabiSample(task, facts, question, answer, supporting, provenance)
                number += 1


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """A uniform choice that uses only `rng.random()`, whose sequence no Python release changes."""
    return items[int(rng.random() * len(items))]


@dataclass(slots=True)
class _Thing:
    """An object of the world: where it really is, and what the told facts say about it."""

    place: str
    holder: str | None = None
    handled: int = -1  # fact of the last GET or DROP
    told: tuple[str, int] | None = None  # known place and the MOVE that told it, once GET or DROP made it known
    carry: list[tuple[str, int]] = field(default_factory=list)  # MOVEs of the holder since the last GET


def _story(task: str, rng: random.Random) -> Iterator[tuple[tuple[str, ...], str, str, tuple[int, ...]]]:
    """Facts, question, answer and supporting facts of the questions of one story."""
    place = {actor: pick(rng, PLACES) for actor in ACTORS}
    told: dict[str, tuple[str, int]] = {}  # last told place of an actor and the index of that fact
    things = {name: _Thing(pick(rng, PLACES)) for name in OBJECTS}
    facts: list[str] = []
    questions = 0
    while questions < QUESTIONS_PER_STORY:
        for _ in range(FACTS_PER_QUESTION):
            facts.append(_act(task, rng, place, told, things, len(facts)))
        asked = _ask_actor(rng, told) if task == "qa1" else _ask_object(task, rng, things)
        if asked is not None:
            questions += 1
            yield (tuple(facts), *asked)


def _act(
    task: str, rng: random.Random, place: dict[str, str], told: dict[str, tuple[str, int]], things: dict[str, _Thing],
    now: int,
) -> str:  # fmt: skip
    """Changes the world by one action and returns the sentence that tells it."""
    options = []
    if task != "qa1" and rng.random() >= _MOVE_SHARE:
        options = [(thing.holder, "drop", name) for name, thing in things.items() if thing.holder is not None]
        options += [
            (actor, "get", name)
            for name, thing in things.items()
            for actor in ACTORS
            if thing.holder is None and thing.place == place[actor]
        ]
    if not options:
        actor = pick(rng, ACTORS)
        place[actor] = pick(rng, [other for other in PLACES if other != place[actor]])
        told[actor] = (place[actor], now)
        for thing in things.values():
            if thing.holder == actor:
                thing.place = place[actor]
                thing.carry.append(told[actor])
        return f"{actor} {pick(rng, MOVE_VERBS)} to the {place[actor]}."
    actor, kind, name = pick(rng, options)
    thing = things[name]
    thing.handled = now
    thing.told = told.get(actor)
    if kind == "get":
        thing.holder, thing.carry = actor, []
        there = " there" if rng.random() < _GET_THERE[task] else ""
        return f"{actor} {pick(rng, GET_VERBS)} the {name}{there}."
    thing.holder = None
    there = " there" if rng.random() < _DROP_THERE else ""
    return f"{actor} {pick(rng, DROP_VERBS)} the {name}{there}."


def _ask_actor(rng: random.Random, told: dict[str, tuple[str, int]]) -> tuple[str, str, tuple[int, ...]]:
    actor = pick(rng, sorted(told))
    return f"Where is {actor}? ", told[actor][0], (told[actor][1],)


def _ask_object(
    task: str, rng: random.Random, things: dict[str, _Thing]
) -> tuple[str, str, tuple[int, ...]] | None:  # fmt: skip
    """A question about one object, or None if what was considered cannot be answered from the told facts."""
    known = {name: where for name in OBJECTS if (where := _known(task, things[name])) is not None}
    answerable = list(known)
    if rng.random() < _LAST_HANDLED_SHARE[task]:
        last = max(things, key=lambda key: things[key].handled)
        answerable = [name for name in answerable if name == last]
    if not answerable:
        return None
    name = pick(rng, answerable)
    thing = things[name]
    if task == "qa2":
        where, line = known[name]
        return f"Where is the {name}? ", where, (thing.handled, line)
    asked = thing.carry[-1][0]
    if rng.random() >= _LAST_PLACE_SHARE:
        asked = pick(rng, thing.carry[1:])[0]
    at = max(i for i, (where, _) in enumerate(thing.carry) if where == asked)
    answer, before = thing.carry[at - 1]
    return f"Where was the {name} before the {asked}? ", answer, (thing.handled, thing.carry[at][1], before)


def _known(task: str, thing: _Thing) -> tuple[str, int] | None:
    """Place and line that a question about the object can use: the told place (qa2), the end of a path (qa3)."""
    if task == "qa2" and thing.holder is None:
        return thing.told
    return thing.carry[-1] if len(thing.carry) >= (1 if task == "qa2" else 2) else None


# ------------------------------------------------------------------------------------------------------------ oracle

_FACT = re.compile(
    rf"(?P<actor>\w+) (?:(?P<move>{'|'.join(MOVE_VERBS)}) to the (?P<place>\w+)"
    rf"|(?:(?P<get>{'|'.join(GET_VERBS)})|(?P<drop>{'|'.join(DROP_VERBS)})) the (?P<object>\w+)(?: there)?)\."
)
_QUESTIONS = {
    "qa1": re.compile(r"Where is (\w+)\?"),
    "qa2": re.compile(r"Where is the (\w+)\?"),
    "qa3": re.compile(r"Where was the (\w+) before the (\w+)\?"),
}


def oracle(task: str, facts: Sequence[str], question: str) -> str:
    """The answer of a rule-based reader of qa1, qa2 or qa3 that sees nothing but the sentences.

    It follows actors and objects, and for every object the sequence of distinct consecutive places where it was
    while carried; qa3 takes the last occurrence of the named place and answers with the entry before it.

    Raises:
        UnknownNameError: another task.
        InputError: a sentence or question outside the task's language, or a question the facts do not answer.
    """
    _check("bAbI task with an oracle", task, _QUESTIONS)
    asked = _QUESTIONS[task].fullmatch(question.strip())
    if asked is None:
        raise InputError(f"{question!r} is not a question of {task}; expected {_QUESTIONS[task].pattern!r}.")
    at: dict[str, str] = {}
    holder: dict[str, str] = {}
    path: dict[str, list[str]] = {}
    for fact in facts:
        match = _FACT.fullmatch(fact)
        if match is None:
            raise InputError(f"{fact!r} is not a fact of {task}.")
        actor, thing = match["actor"], match["object"]
        if match["move"]:
            at[actor] = match["place"]
            touched = [o for o, who in holder.items() if who == actor]
        else:
            holder[thing] = actor
            touched = [thing]
        for o in touched:
            seen = path.setdefault(o, [])
            if actor in at and seen[-1:] != [at[actor]]:
                seen.append(at[actor])
        if match["drop"]:
            del holder[thing]
    name = asked[1]
    if task == "qa1":
        if name in at:
            return at[name]
    elif task == "qa2":
        if path.get(name):
            return path[name][-1]
    else:
        places = path.get(name, [])
        hits = [i for i, where in enumerate(places) if where == asked[2] and i > 0]
        if hits:
            return places[hits[-1] - 1]
    raise InputError(f"The facts do not answer {question!r}.")
