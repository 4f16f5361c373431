"""Long texts that language models are measured on: WikiText, PG-19 and enwik8 from local files.

Words are counted as each data set counts them: WikiText's tokens with one end of line a line, PG-19's white-space
split of the raw file. WikiText-2 and WikiText-103 hold out the same articles with other rare words replaced, and
lm-evaluation-harness scores WikiText-2 with its tokens glued together again: three numbers that do not compare.
"""

import gzip
import hashlib
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UnknownNameError

ENWIK8_BYTES = 100_000_000
ENWIK8_SPLITS = {"train": (0, 90_000_000), "validation": (90_000_000, 95_000_000), "test": (95_000_000, ENWIK8_BYTES)}
_TITLE = re.compile(rb" = (?!= ).* = ")


@dataclass(frozen=True)
class LongTexts:
    """Documents of one data set.

    documents: raw bytes. words: of each document, by the data set's own counting. unit: what its published numbers are
    per: "word" or "byte".
    """

    name: str
    unit: str
    documents: tuple[bytes, ...] = field(repr=False)
    words: tuple[int, ...] = field(repr=False)

    @property
    def bytes(self) -> int:
        return sum(len(document) for document in self.documents)

    @property
    def sha256(self) -> str:
        """Of all documents in order."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document)
        return digest.hexdigest()

    def encode(self, tokenizer: Any = None) -> list[list[int]]:
        """Token ids of each document, without special tokens; without a tokenizer the bytes themselves.

        Raises:
            DataError: a document is not UTF-8.
        """
        if tokenizer is None:
            return [list(document) for document in self.documents]
        found = []
        for number, document in enumerate(self.documents, 1):
            try:
                text = document.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self.name}, document {number}: {error}; expected UTF-8. Give the file of the release, or score "
                    "bytes (no tokenizer)."
                ) from error
            found.append(list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
        return found


def wikitext(path: str | Path) -> LongTexts:
    """A held-out or training file of WikiText (wiki.test.tokens, or gzipped), an article a document.

    Raises:
        DataError: no such file, or no WikiText.
    """
    path = Path(path)
    lines = _content(path, "a .tokens file of WikiText-103 or WikiText-2").splitlines(keepends=True)
    blank = [not line.strip() for line in lines]
    titles = [
        i
        for i in range(1, len(lines) - 1)
        if blank[i - 1] and blank[i + 1] and _TITLE.fullmatch(lines[i].rstrip(b"\r\n"))
    ]
    if not titles:
        raise DataError(
            f"{path} has no article titles (' = Title = ' between blank lines); expected WikiText's tokens."
        )
    borders = [0, *(title - 1 for title in titles[1:]), len(lines)]
    articles = [lines[a:b] for a, b in pairwise(borders)]
    words = tuple(sum(len(line.split()) + line.endswith(b"\n") for line in article) for article in articles)
    return LongTexts(path.name, "word", tuple(b"".join(article) for article in articles), words)


def pg19(folder: str | Path) -> LongTexts:
    """The books of a split of PG-19, a folder of .txt files, a book a document.

    Raises:
        DataError: no such folder, or no .txt in it.
    """
    folder = Path(folder)
    files = sorted([*folder.glob("*.txt"), *folder.glob("*.txt.gz")])
    if not files:
        raise DataError(f"{folder} has no .txt files; expected the books of one split, such as PG-19's test/.")
    return books(folder.name, [_content(file, "a book") for file in files])


def books(name: str, documents: Sequence[str | bytes]) -> LongTexts:
    """Any texts under PG-19's rules: a document each, words by white space."""
    raw = tuple(d.encode() if isinstance(d, str) else d for d in documents)
    return LongTexts(name, "word", raw, tuple(len(d.decode("utf-8", "replace").split()) for d in raw))


def enwik8(path: str | Path, split: str = "test") -> LongTexts:
    """A split of enwik8 (the raw file, or its .zip), one document: 90, 5 and 5 million bytes.

    Raises:
        UnknownNameError: no such split. DataError: no such file, or not 10^8 bytes.
    """
    if split not in ENWIK8_SPLITS:
        raise UnknownNameError.of("split of enwik8", split, ENWIK8_SPLITS)
    data = _content(Path(path), "enwik8, the first 10^8 bytes of a dump of Wikipedia")
    if len(data) != ENWIK8_BYTES:
        raise DataError(f"{path} holds {len(data):,} bytes, enwik8 has {ENWIK8_BYTES:,}; get the file again.")
    data = data[slice(*ENWIK8_SPLITS[split])]
    return LongTexts(f"enwik8 {split}", "byte", (data,), (len(data.split()),))


def _content(path: Path, expected: str) -> bytes:
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected {expected}. Download it and give its path.")
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                [name] = archive.namelist()
                return archive.read(name)
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}); expected {expected}. Get the file again.") from error
