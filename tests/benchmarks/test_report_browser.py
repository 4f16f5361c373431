"""The page of a report in headless Chromium: nothing on the console, and headers that sort."""

import re
import shutil
import subprocess

import pytest

from mnemic.benchmarks.report import page
from tests.benchmarks.report_cases import model, results, score

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"),
)
CLICKS = """<script>
const orders = [];
const click = (column) => {
  const button = document.querySelectorAll(".sortable th[aria-sort] button")[column];
  button.click();
  const names = [...button.closest("table").querySelectorAll("tbody th")].map((cell) => cell.dataset.value);
  orders.push(names.join(" ") + " " + button.parentElement.getAttribute("aria-sort"));
};
%s
const sorted = document.querySelectorAll('[aria-sort="ascending"], [aria-sort="descending"]').length;
document.body.dataset.orders = orders.join(";") + ";" + sorted;
</script>"""


@pytest.fixture(scope="module")
def browser():
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is in PATH")
    return found


@pytest.fixture
def opened(browser, tmp_path):
    """Opens text as a page: its document after all scripts, and what was said on the console."""

    def open_(text):
        file = tmp_path / "page.html"
        file.write_text(text, encoding="utf-8")
        command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
        assert "</html>" in done.stdout
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_


def report():
    scores = {"low": 0.2, "high": 0.9, "middle": 0.5, "partial": 1.0}
    parameters = {"low": 9_000, "high": 8_000}
    made = results(
        *(score(name, "qa1", "1k", value) for name, value in scores.items()),
        *(score(name, "qa1", "4k", 1 - value / 2) for name, value in scores.items() if name != "partial"),
        models=(
            *(model(name, parameters=parameters.get(name, 10)) for name in scores),
            model("absent", parameters=None, note="not run: reason"),
        ),
    )
    return page(made, [])


def test_the_console_is_silent_and_headers_sort(opened):
    text = report()
    # Headers in the order of the document: model, mean; below them 1k, 4k. In the next table: model, parameters, ...
    clicks = "[0, 0, 2, 2, 3, 1, 5].forEach(click);"
    document, console = opened(text.replace("</body>", CLICKS % clicks + "</body>"))
    assert console == []
    assert document.count("<svg") == text.count("<svg") >= 2
    orders = re.search(r'data-orders="([^"]+)"', document)
    assert orders
    assert orders[1].split(";") == [
        "absent high low middle partial ascending",
        "partial middle low high absent descending",
        "partial high middle low absent descending",
        "low middle high partial absent ascending",
        "low middle high partial absent descending",
        "high middle low partial absent descending",
        "low high middle partial absent descending",
        "2",
    ]


def test_a_page_that_fails_is_found_out(opened):
    broken = {
        "<script>nowhere();</script>": "nowhere is not defined",
        "<script>console.error('planted');</script>": "planted",
        '<img src="https://example.invalid/image.png">': "Content Security Policy",
    }
    _, console = opened(report().replace("</body>", f"{''.join(broken)}</body>"))
    for said in broken.values():
        assert any(said in line for line in console), said
