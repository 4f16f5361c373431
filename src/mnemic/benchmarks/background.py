"""Background texts: the haystack between the facts of long-context tasks.

Three sources, each as a tuple of `Document`s with provenance: `books` (public-domain novels in local files), `prose`
(the default: English text that every Python installation carries, so it needs no network and no files) and `pg19`
(the source BABILong uses; streamed from the Hugging Face Hub).

Deviation: BABILong splits sentences with NLTK's Punkt, which learns abbreviations from the text it is given. NLTK is
not a dependency here, so `sentence_spans` is a regular expression with a fixed list of abbreviations. It decides from
the neighbourhood of a boundary alone; therefore a document can be split once and any window of it be read later.
"""

import gzip
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..core.errors import DataError, MissingExtraError, UnknownNameError
from .babi import SPLITS

MIN_SENTENCES = 5  # shorter documents cannot fill a window


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `provenance` says where it comes from, for reports."""

    name: str
    text: str
    provenance: str


# --------------------------------------------------------------------------------------------------------- sentences

_BOUNDARY = re.compile(r"[.!?]+['\"”’)\]]*(?=\s+['\"“‘(\[_]*[A-Z0-9])")
_LAST_WORD = re.compile(r"[\w.]*$")
_ABBREVIATIONS = {
    "mr", "mrs", "ms", "dr", "st", "messrs", "mme", "mlle", "prof", "rev", "hon", "capt", "col", "gen", "lieut",
    "sergt", "esq", "jr", "sr", "vs", "etc", "viz", "cf", "e.g", "i.e", "no", "vol", "chap", "fig", "p", "pp",
    "a.m", "p.m",
}  # fmt: skip


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) character offsets of the sentences of `text`, without the white space around them.

    A sentence ends with ".", "!" or "?" and closing quotes or brackets, before white space and a capital or digit,
    unless the word is an abbreviation or a single initial. Line breaks do not end a sentence.
    """
    spans = []
    start = 0
    for match in _BOUNDARY.finditer(text):
        if match[0][0] == "." and text[match.start() : match.start() + 2] != "..":
            word = _LAST_WORD.search(text, max(0, match.start() - 12), match.start())
            word = word[0].lower() if word else ""
            if word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word != "i"):
                continue
        spans.append((start, match.end()))
        start = match.end()
    spans.append((start, len(text)))
    stripped = []
    for begin, end in spans:
        piece = text[begin:end]
        body = piece.strip()
        if body:
            begin += len(piece) - len(piece.lstrip())
            stripped.append((begin, begin + len(body)))
    return stripped


# ------------------------------------------------------------------------------------------------------------- books


def books(path: str | Path, split: str = "train") -> tuple[Document, ...]:
    """Novels from books_train.jsonl.gz and books_test.jsonl.gz, one JSON object {id, title, author, year, text} a line.

    Args:
        path: the folder with the two files, or a data folder that contains gutenberg-books/.
        split: "test" is the test file; "validation" the last book of the training file; "train" the other books.

    Raises:
        UnknownNameError: unknown split.
        DataError: no such files, or a line that is not such an object.
    """
    _check_split(split)
    folder = Path(path)
    if (folder / "gutenberg-books").is_dir():
        folder = folder / "gutenberg-books"
    file = folder / f"books_{'test' if split == 'test' else 'train'}.jsonl.gz"
    if not file.is_file():
        raise DataError(
            f"{file} does not exist. Expected gzipped JSON lines {{id, title, author, year, text}}. Point to "
            'the folder that has it, or use background="prose", which needs no files.'
        )
    documents = _read_books(str(file), file.stat().st_mtime_ns)
    if split == "test":
        return documents
    return documents[-1:] if split == "validation" else documents[:-1]


@lru_cache(maxsize=4)
def _read_books(file: str, _mtime: int) -> tuple[Document, ...]:
    documents = []
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                book = json.loads(line)
                provenance = f"{book['author']}, {book['title']} ({book['year']}), Project Gutenberg {book['id']}"
                documents.append(Document(book["title"], book["text"], provenance))
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}, line {len(documents) + 1}: {error!r}. Expected gzipped JSON lines {{id, title, author, year, "
            'text}}; get the file again, or use background="prose".'
        ) from error
    if len(documents) < 2:
        raise DataError(f"{file} holds {len(documents)} books; expected at least 2.")
    return tuple(documents)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UnknownNameError.of("split", split, SPLITS)


# ------------------------------------------------------------------------------------------------------------- prose

_SHARES = {"train": 0.6, "validation": 0.1, "test": 0.3}
_NOT_PROSE = re.compile(r"::=|>>>|\+[-=]{2}|\||==|--|\.\.\.|[{}<>\\]|\w\(\w*, ?\w|\bself\b|__")
_LIST_MARK = re.compile(r"^(?:[*•-]|\d+\.|\[\d+\])\s+")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2}|``)(?=\S)(.+?)(?<=\S)\1(?![\w*])")
_FOOTNOTE = re.compile(r"\s\[\d+\]")
_COMMON = {
    "a", "an", "and", "are", "as", "be", "by", "can", "for", "from", "if", "in", "is", "it", "not", "of", "on",
    "or", "that", "the", "then", "this", "to", "when", "with",
}  # fmt: skip


def prose(split: str = "train") -> tuple[Document, ...]:
    """English prose that comes with Python: the language reference in `pydoc_data.topics`, without code and tables.

    Paragraphs are unwrapped; program text, grammar, tables, headings, version notes and signatures are left out, as
    are paragraphs that an earlier topic had already, so no text is in two splits. Topics go to train, validation and
    test (about 60, 10, 30% of the characters) by size and name. It is small (about 20,000 words in all), so long
    contexts repeat it, and the text differs between Python versions: the provenance names the version.

    Raises:
        UnknownNameError: unknown split.
        DataError: this Python was installed without `pydoc_data`.
    """
    _check_split(split)
    return _prose()[split]


@lru_cache(maxsize=1)
def _prose() -> dict[str, tuple[Document, ...]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "This Python has no module pydoc_data.topics, the text of background='prose'. Install the complete "
            "standard library, or give a folder of books."
        ) from None
    source = f"Python {platform.python_version()}, pydoc_data.topics"
    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        paragraphs = []
        for block in re.split(r"\n\s*\n", topics[name]):
            text = _prose_paragraph(block)
            if text and text not in seen:
                seen.add(text)
                paragraphs.append(text)
        text = "\n\n".join(paragraphs)
        if len(sentence_spans(text)) >= MIN_SENTENCES:
            documents.append(Document(name, text, f"{source}[{name!r}]"))
    documents.sort(key=lambda document: (-len(document.text), document.name))
    total = sum(len(document.text) for document in documents)
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        # The largest gap to the wanted share takes the next document.
        gaps = {s: _SHARES[s] - sum(len(d.text) for d in parts[s]) / total for s in SPLITS}
        parts[max(SPLITS, key=gaps.__getitem__)].append(document)
    return {split: tuple(sorted(part, key=lambda document: document.name)) for split, part in parts.items()}


def _prose_paragraph(block: str) -> str:
    """The block as one line if it is English sentences, else ""."""
    lines = [line.strip() for line in block.strip().splitlines()]
    text = re.sub(r"(?<=\w)- (?=[a-z])", "-", " ".join(lines))
    text = _FOOTNOTE.sub("", _LIST_MARK.sub("", re.sub(r"\s+", " ", text)))
    text = _EMPHASIS.sub(r"\2", text)
    if not text[:1].isupper() or not text.endswith(".") or _NOT_PROSE.search(text):
        return ""
    if text.startswith(("New in", "Changed in", "Added in", "Deprecated", "Removed in", "Source code", "See also")):
        return ""
    words = re.findall(r"[A-Za-z][A-Za-z'’-]*", text)
    letters = sum(map(len, words))
    common = sum(word.lower() in _COMMON for word in words)
    if len(words) < 8 or letters < 0.72 * len(text) or common < 0.2 * len(words):
        return ""
    return text


# -------------------------------------------------------------------------------------------------------------- PG-19


def pg19(split: str = "train", limit: int = 50, repository: str = "emozilla/pg19") -> tuple[Document, ...]:
    """The first `limit` books of PG-19, streamed through `datasets`; the background that BABILong uses.

    Raises:
        UnknownNameError: unknown split.
        MissingExtraError: `datasets` is not installed.
        DataError: the Hub cannot be reached or does not have the set.
    """
    _check_split(split)
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtraError("background='pg19' needs the package datasets: pip install 'mnemic[train]'.") from None
    documents = []
    try:
        for row in load_dataset(repository, split=split, streaming=True):
            title = row["short_book_title"]
            documents.append(Document(title, row["text"], f"PG-19 ({repository}, {split}): {title}"))
            if len(documents) == limit:
                break
    except Exception as error:  # the Hub, HTTP and fsspec clients share no base class
        raise DataError(
            f"PG-19 could not be read from {repository}: {type(error).__name__}: {error}. It needs the network (and "
            "HF_HUB_OFFLINE unset). Offline, use background='prose' or a folder of books."
        ) from error
    if not documents:
        raise DataError(f"{repository} has no documents in {split!r}; expected the books of PG-19.")
    return tuple(documents)


def named(background: str, split: str, data: Path | None) -> Sequence[Document]:
    """Documents of "auto", "books", "prose" or "pg19". "auto" is books where there is a data folder, else prose."""
    if background == "auto":
        background = "prose" if data is None else "books"
    if background == "prose":
        return prose(split)
    if background == "pg19":
        return pg19(split)
    if background == "books":
        if data is None:
            raise DataError(
                "background='books' needs a data folder with gutenberg-books/: give data or set MNEMIC_DATA; "
                "background='prose' needs none."
            )
        return books(data, split)
    raise UnknownNameError.of("background", background, ("auto", "books", "prose", "pg19"))
