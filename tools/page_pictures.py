"""Pictures of the web page for the docs: python -m tools.page_pictures, from the root of the repository.

The page is the one that the tests drive, on a server in this process, with the model that comes with the package. It
reads a story in prose, is asked about it, is told news, and is asked again.
"""

import io
import tempfile
from itertools import islice
from pathlib import Path

from PIL import Image

from mnemic.benchmarks.babilong import open_babilong
from mnemic.benchmarks.demo_asked import NAME
from mnemic.benchmarks.shipped import open_shipped
from mnemic.serving.app import create_app
from mnemic.serving.config import Settings
from mnemic.serving.requests import Limits
from mnemic.serving.store import open_store
from tests.serving.browser import browser
from tests.serving.http_tests import address_of

FOLDER = Path(__file__).parents[1] / "docs" / "images"
READY = "!document.getElementById('send').disabled"
SAID = ("Where is Mary?", "Mary journeyed to the garden. Where is Mary?", "Where is Daniel?")
LENGTH, CHOSEN = "2k", 4
"""The fifth test sample of two thousand words has ten facts, some about Mary."""


def main() -> None:
    known = open_shipped(NAME)
    samples = open_babilong("qa1", LENGTH, known.tokenizer, "test", seed=1)
    story = next(islice(samples, CHOSEN, None)).context
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "story.txt").write_text(story + "\n", encoding="utf-8")
        settings = Settings(name=NAME, limits=Limits(max_tokens=8))
        app = create_app(known.model, known.tokenizer, open_store(folder / "store"), settings)
        with address_of(app) as address, browser(folder) as tab:
            tab.open(f"{address}/")
            tab.until(READY)
            tab.choose("#document-file", folder / "story.txt")
            tab.until(f"document.querySelector('article.note') && {READY}")
            for i, text in enumerate(SAID):
                tab.type(text)
                tab.press("Enter")
                tab.until(f"document.querySelectorAll('article.assistant').length === {i + 1} && {READY}")
            _save("serving-page.png", tab.picture())
            tab.click("#fork")
            tab.until(f"document.getElementById('facts').textContent.includes('forked') && {READY}")
            tab.click(".session:not([aria-current])")
            tab.until(f"!document.getElementById('facts').textContent.includes('forked') && {READY}")
            tab.dark(True)
            tab.click("#versions summary")
            tab.value("document.getElementById('memory').scrollTo(0, 1e6)")
            _save("serving-page-dark.png", tab.picture())


def _save(name: str, png: bytes) -> None:
    """In 256 colours, less than half of the bytes."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(FOLDER / name, optimize=True)


if __name__ == "__main__":
    main()
