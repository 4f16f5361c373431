"""Reader of the released files."""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from ...core.errors import DataError, UnknownNameError
from .sample import BabiSample
from .words import FILES


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
    check_name("bAbI task", task, FILES)
    check_name("split of the bAbI release", split, ("train", "test"))
    check_name("size of the bAbI release", size, ("en", "en-10k"))
    where = _locate(Path(path))
    return _read(str(where), where.stat().st_mtime_ns, f"{size}/{FILES[task]}_{split}.txt", task)


def sizes(path: str | Path, task: str, split: str) -> tuple[str, ...]:
    """The sizes, of "en" and "en-10k", in which a copy of the release has this file; some lack en-10k/qa3 train.

    Raises:
        UnknownNameError: unknown task or split.
        DataError: no release there, or the file in neither size.
    """
    check_name("bAbI task", task, FILES)
    check_name("split of the bAbI release", split, ("train", "test"))
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


def check_name(kind: str, name: str, known: Sequence[str] | Mapping[str, object]) -> None:
    """Raises UnknownNameError, which suggests a name, unless `name` is among `known`."""
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
    samples = tuple(parse(text, task, f"{where.name}:{name}"))
    if not samples:
        raise DataError(
            f"{where}: {name} has no question. Expected lines 'ID question<TAB>answer<TAB>IDs'; some copies of bAbI "
            "v1.2 replaced the tabs: get an unchanged one."
        )
    return samples


def parse(text: str, task: str, source: str) -> Iterator[BabiSample]:
    """Samples of the text of a released file; `source` names it in errors (DataError) and in the provenance."""
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
