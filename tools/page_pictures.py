"""Pictures of the web page for the docs: python -m tools.page_pictures MODEL, from the root of the repository.

The page is the one that the tests drive, on a server in this process. MODEL: as of `mnemic serve`, trained on prose.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from mnemic.cli.stream import open_model, tokenizer_for
from mnemic.serving.app import create_app
from mnemic.serving.config import Settings
from mnemic.serving.requests import Limits
from mnemic.serving.store import open_store
from tests.serving.browser import browser
from tests.serving.http_tests import address_of

FOLDER = Path(__file__).parents[1] / "docs" / "images"
DOCUMENT = Path(__file__).parents[1] / "docs" / "concepts.md"
READY = "!document.getElementById('send').disabled"
SAID = ("Tell me about the garden.", "And what did she say then?")


def main(name: str) -> None:
    model = open_model(name, None, None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = Settings(name="lm2", limits=Limits(max_tokens=60))
        app = create_app(model, tokenizer_for(name, model, None), open_store(folder / "store"), settings)
        with address_of(app) as address, browser(folder) as tab:
            tab.open(f"{address}/")
            tab.until(READY)
            tab.choose("#document-file", DOCUMENT)
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
    main(sys.argv[1])
