"""bAbI: the released files, the generator, and the oracle that has to agree with both."""

import re
import subprocess
import sys
import zipfile

import pytest

from mnemic.benchmarks import babi, generate, oracle
from mnemic.core import DataError, InputError, UnknownNameError

GENERATED = ("qa1", "qa2", "qa3")
STORY = (
    "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"
    "4 Daniel went back to the hallway.\n5 Sandra moved to the garden.\n6 Where is Daniel? \thallway\t4\n"
    "1 John went to the office.\n2 John moved to the garden.\n3 Where is John? \tgarden\t2\n"
)


def template(sentence):
    sentence = re.sub("|".join(babi.PLACES), "L", re.sub("|".join(babi.OBJECTS), "O", sentence))
    return re.sub("|".join(babi.ACTORS), "P", sentence)


def write_release(folder, text=STORY):
    (folder / "en").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / "en" / f"qa1_single-supporting-fact_{split}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("task", babi.FILES)
def test_reader_gives_a_thousand_test_samples_as_in_the_file(data, task):
    samples = babi.read(data, task)
    assert len(samples) == 1000
    assert [s[:-1] for s in map(_plain, samples)] == [s[:-1] for s in map(_plain, babi.read(data, task, size="en-10k"))]
    archive = next((data / "babi-v1.2").glob("*.zip"))
    with zipfile.ZipFile(archive) as file:
        lines = file.read(f"tasks_1-20_v1-2/en/{babi.FILES[task]}_test.txt").decode().splitlines()
    questions = [line.partition(" ")[2].split("\t") for line in lines if "\t" in line]
    assert [(s.question, s.answer) for s in samples] == [(q, a) for q, a, _ in questions]
    # The supporting sentences are those whose IDs the file gives.
    story, at = {}, 0
    for line in lines:
        head, _, rest = line.partition(" ")
        story = {} if head == "1" else story
        if "\t" not in rest:
            story[int(head)] = rest
            continue
        sample = samples[at]
        assert list(sample.facts) == list(story.values())
        assert [sample.facts[i] for i in sample.supporting] == [story[int(i)] for i in rest.split("\t")[2].split()]
        at += 1


def _plain(sample):
    return sample.facts, sample.question, sample.answer, sample.supporting, sample.provenance


@pytest.mark.parametrize("task", GENERATED)
@pytest.mark.parametrize("split", ["train", "test"])
def test_oracle_answers_every_released_question(data, task, split):
    for sample in babi.read(data, task, split):
        assert oracle(task, sample.facts, sample.question) == sample.answer


@pytest.mark.parametrize("task", GENERATED)
def test_oracle_answers_every_generated_question(task):
    samples = generate(task, 0, "train", 2000)
    assert len(samples) == 2000
    for sample in samples:
        assert oracle(task, sample.facts, sample.question) == sample.answer
        # The supporting facts alone say the same, in story order.
        kept = [sample.facts[i] for i in sorted(sample.supporting)]
        if task == "qa1":
            assert oracle(task, kept, sample.question) == sample.answer
        assert len(sample.supporting) == int(task[-1])
        assert len(sample.facts) % 2 == 0


@pytest.mark.parametrize("task", GENERATED)
def test_generator_uses_the_sentences_of_the_release_and_no_others(data, task):
    released = [s for split in ("train", "test") for s in babi.read(data, task, split)]
    own = generate(task, 1, "train", 1500)
    for pieces in (lambda s: map(template, s.facts), lambda s: [template(s.question)], lambda s: [s.answer]):
        assert {p for s in own for p in pieces(s)} == {p for s in released for p in pieces(s)}


@pytest.mark.parametrize("task, facts, handled_last", [("qa1", 6.0, None), ("qa2", 15.4, 0.76), ("qa3", 50.5, 0.72)])
def test_generator_keeps_the_statistics_of_the_release(task, facts, handled_last):
    samples = generate(task, 2, "train", 2000)
    mean = sum(len(s.facts) for s in samples) / len(samples)
    assert mean == pytest.approx(facts, rel=0.15)
    if handled_last is None:
        return
    hits = 0
    for sample in samples:
        touched = [f for f in sample.facts if any(o in f for o in babi.OBJECTS)]
        hits += next(o for o in babi.OBJECTS if o in sample.question) in touched[-1]
    assert hits / len(samples) == pytest.approx(handled_last, abs=0.07)


def test_nobody_moves_to_the_place_where_they_are():
    for sample in generate("qa1", 3, "train", 300):
        place = {}
        for fact in sample.facts:
            actor, target = fact.split()[0], fact.split()[-1]
            assert place.get(actor) != target
            place[actor] = target


def test_same_seed_same_samples_and_other_processes_agree():
    samples = generate("qa3", 7, "test", 5)
    assert samples == generate("qa3", 7, "test", 5)
    assert samples != generate("qa3", 8, "test", 5)
    code = "from mnemic.benchmarks import generate; print(generate('qa3', 7, 'test', 5))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(p for p in sys.path if p), "PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.stdout.strip() == repr(samples)


@pytest.mark.parametrize("task", GENERATED)
def test_splits_are_disjoint(task):
    parts = [{(s.facts, s.question) for s in generate(task, 0, split, 1000)} for split in babi.SPLITS]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_an_unpacked_folder_and_a_zip_read_alike(tmp_path):
    folder = write_release(tmp_path / "tasks_1-20_v1-2")
    archive = tmp_path / "other" / "tasks_1-20_v1-2_en.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("tasks_1-20_v1-2/en/qa1_single-supporting-fact_test.txt", STORY)
    expected = [("Where is Mary? ", "bathroom", (0,)), ("Where is Daniel? ", "hallway", (2,)),
                ("Where is John? ", "garden", (1,))]  # fmt: skip
    for path in (folder, tmp_path, archive, archive.parent):
        assert [(s.question, s.answer, s.supporting) for s in babi.read(path, "qa1")] == expected
    assert babi.read(folder, "qa1")[1].facts[3] == "Sandra moved to the garden."
    assert babi.sizes(archive, "qa1", "test") == ("en",)


def test_errors_name_the_path_and_the_way_out(tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist.*generated"):
        babi.read(tmp_path / "nowhere", "qa1")
    with pytest.raises(DataError, match="holds no bAbI stories"):
        babi.read(tmp_path, "qa1")
    (tmp_path / "x.zip").write_text("no zip")
    with pytest.raises(DataError, match="not a zip"):
        babi.read(tmp_path / "x.zip", "qa1")
    folder = write_release(tmp_path / "release", STORY.replace("\t", "|"))
    with pytest.raises(DataError, match="is neither"):
        list(babi._parse("1 fact.\n2 Where?\tx", "qa1", "file"))
    with pytest.raises(DataError, match="has no question"):
        babi.read(folder, "qa1")
    with pytest.raises(DataError, match="no en-10k"):
        babi.read(folder, "qa1", size="en-10k")
    with pytest.raises(DataError, match="no earlier facts"):
        list(babi._parse("1 A fact.\n2 Where?\tx\t7", "qa1", "file"))


@pytest.mark.parametrize("call", [
    lambda: babi.read(".", "qa21"), lambda: babi.read(".", "qa1", "validation"), lambda: babi.stream("qa4", 0),
    lambda: babi.stream("qa1", 0, "dev"), lambda: oracle("qa5", [], ""),
])  # fmt: skip
def test_unknown_names(call):
    with pytest.raises(UnknownNameError):
        call()


def test_oracle_rejects_what_it_cannot_read():
    with pytest.raises(InputError, match="not a fact"):
        oracle("qa1", ["Mary flew to the office."], "Where is Mary?")
    with pytest.raises(InputError, match="not a question"):
        oracle("qa1", [], "Who is Mary?")
    with pytest.raises(InputError, match="do not answer"):
        oracle("qa2", ["Mary got the milk there."], "Where is the milk?")
    with pytest.raises(InputError, match="count"):
        generate("qa1", 0, "train", -1)


def test_oracle_takes_the_entry_before_the_last_visit():
    facts = ["Mary moved to the office.", "Mary got the milk.", "Mary went to the garden.", "Mary went to the office.",
             "Mary went to the kitchen.", "Mary went back to the office.", "Mary left the milk there."]  # fmt: skip
    assert oracle("qa3", facts, "Where was the milk before the office? ") == "kitchen"
    assert oracle("qa3", facts, "Where was the milk before the garden? ") == "office"
    assert oracle("qa2", facts, "Where is the milk? ") == "office"
