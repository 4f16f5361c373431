"""The web page in headless Chromium, against a server on a socket: chat, documents, sessions, keys, memory."""

import time
from contextlib import contextmanager

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mnemic.serving.auth import Tenant, hash_of, new_key
from mnemic.serving.requests import Limits
from tests.serving.browser import browser, browser_path
from tests.serving.http_tests import address_of, app_of
from tests.serving.serving_models import served_model
from tests.tiny import VOCABULARY

LONGEST = 40
PAUSE = {"seconds": 0.0}
READY = "!document.getElementById('send').disabled"
ANSWER = "[...document.querySelectorAll('article.assistant .text')].at(-1)"

pytestmark = pytest.mark.skipif(browser_path() is None, reason="no browser: no Chromium or Chrome is in PATH")


def html_tokenizer():
    """Words of a model that would like to write HTML."""
    names = ["[PAD]", "[BOS]", "[EOS]", *(f"<b>w{i}</b>" for i in range(3, VOCABULARY))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="[PAD]")


@pytest.fixture(scope="module")
def model():
    return served_model()


@pytest.fixture(scope="module")
def app(model, tmp_path_factory):
    limits = Limits(max_tokens=LONGEST, prefill_tokens=64)
    app = app_of(tmp_path_factory.mktemp("page"), model, tokenizer=html_tokenizer(), limits=limits)
    app.state.server.observers.append(lambda record: time.sleep(PAUSE["seconds"]))
    return app


@pytest.fixture(scope="module")
def address(app):
    with address_of(app) as address:
        yield address


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def tab(opened, address):
    opened.console.clear()
    opened.requests.clear()
    opened.open(f"{address}/")
    opened.until(READY)
    yield opened
    assert opened.console == []
    assert [one for one in opened.requests if not one.startswith((f"{address}/", "data:", "blob:"))] == []


def say(tab, text):
    tab.type(text)
    tab.press("Enter")


def said(tab, text):
    """The answer."""
    say(tab, text)
    tab.until(f"{ANSWER} && {ANSWER}.parentElement.getAttribute('aria-busy') === null && {READY}")
    return tab.value(f"{ANSWER}.textContent")


def facts(tab):
    return tab.text("#facts")


@contextmanager
def slowly():
    """Steps of the model that last long enough to watch and to stop, however busy the machine is."""
    PAUSE["seconds"] = 0.25
    try:
        yield
    finally:
        PAUSE["seconds"] = 0.0


def until(true):
    end = time.monotonic() + 45
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def drop(tab):
    """A document of 1,600 tokens."""
    tab.value(
        "(() => { const data = new DataTransfer();"
        " data.items.add(new File(['<b>w5</b> <b>w6</b>\\n'.repeat(800)], 'notes.txt'));"
        " const dropped = new DragEvent('drop', {bubbles: true, dataTransfer: data});"
        " document.getElementById('log').dispatchEvent(dropped); })()"
    )


def test_a_conversation_by_keyboard_alone(tab, app):
    # The first thing that the keyboard reaches leads to the message, where one starts.
    assert tab.value("document.activeElement.id") == "message"
    tab.type("one")
    tab.press("Enter", shift=True)
    assert tab.value("document.getElementById('message').value") == "one\n"
    with slowly():
        say(tab, "<b>w5</b>")
        # It comes while it is made.
        tab.until(f"{ANSWER} && {ANSWER}.parentElement.getAttribute('aria-busy') === 'true' && {ANSWER}.textContent")
        first = tab.value(f"{ANSWER}.textContent")
    assert tab.value("document.getElementById('log').getAttribute('aria-live')") == "polite"
    tab.until(READY)
    whole = tab.value(f"{ANSWER}.textContent")
    assert whole.startswith(first)
    assert len(whole) > len(first)
    assert "version 1" in facts(tab)
    seen, engine = facts(tab), app.state.server.engine
    with slowly():
        say(tab, "<b>w6</b>")
        tab.until(f"document.querySelectorAll('article').length === 4 && {ANSWER}.textContent")
        tab.press("Escape")
        tab.until(READY)
        assert "has read neither" in tab.text("article:last-child")
        # Long before its forty tokens.
        until(lambda: engine.stats().decoding == 0)
    assert engine.stats().cancelled == 1
    assert facts(tab) == seen
    # What could not be sent is there to be sent again, and the focus never left.
    assert tab.value("document.getElementById('message').value") == "<b>w6</b>"
    tab.press("Enter")
    tab.until(f"document.querySelectorAll('article').length === 6 && {READY}")
    assert "version 2" in facts(tab)
    # On to the buttons: Send, the document, and back.
    reached = []
    for _ in range(3):
        tab.press("Tab")
        reached.append(tab.value("document.activeElement.id"))
        assert tab.value("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert reached[:2] == ["send", "document"]


def test_html_is_text(tab, tmp_path):
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    answer = said(tab, evil)
    assert tab.value("document.querySelector('article.user .text').textContent") == evil
    assert "<b>w" in answer
    file = tmp_path / "<img src=x onerror=document.title=3>.txt"
    file.write_text("<b>w5</b> <i>w6</i>\n")
    tab.choose("#document-file", file)
    tab.until(f"document.querySelector('article.note') && {READY}")
    assert file.name in tab.text("article.note")
    assert tab.value("document.querySelectorAll('#log :is(b, i, img, script)').length") == 0
    assert tab.value("document.title") == "mnemic"


def test_a_document_is_dropped_and_versions_are_forked_rolled_back_and_deleted(tab, tmp_path):
    with slowly():
        drop(tab)
        tab.until("!document.getElementById('progress').hidden")
        tab.press("Escape")
        tab.until(READY)
    assert "stopped, nothing of it is remembered" in tab.text("article.note")
    assert facts(tab).startswith("0 tokens read")
    with slowly():
        drop(tab)
        progress = "document.getElementById('progress-text').textContent"
        on_the_way = tab.until(f"/^notes.txt: [1-9][0-9,]* tokens, /.exec({progress})?.input")
        assert 0 < int(on_the_way.split()[1].replace(",", "")) < 1600
        assert 0 < tab.value("document.getElementById('progress-bar').value") <= 1
    tab.until(READY)
    assert tab.text("article.note:last-child") == "notes.txt: 1,600 tokens read."
    assert tab.value("document.getElementById('progress').hidden")
    original = tab.text("#session-title")
    said(tab, "<b>w7</b>")
    assert "version 2" in facts(tab)

    tab.click("#fork")
    tab.until(f"document.getElementById('session-title').textContent !== '{original}' && {READY}")
    twin = tab.text("#session-title")
    assert f"forked from {original}" in facts(tab)
    assert tab.value("document.querySelectorAll('article').length") == 4

    tab.click(".session:not([aria-current])")
    tab.until(f"document.getElementById('session-title').textContent === '{original}' && {READY}")
    tab.click("#versions summary")
    tab.click("[aria-label='Roll back to version 1']")
    tab.until(f"document.getElementById('facts').textContent.includes('version 3') && {READY}")
    assert facts(tab).startswith("1,600 tokens read")
    assert tab.value("document.querySelectorAll('article').length") == 2

    tab.click("#delete")
    assert original in tab.text("#confirm-text")
    # Escape and the first button keep it.
    assert tab.value("document.activeElement.id") == "confirm-no"
    tab.press("Enter")
    tab.until("!document.getElementById('confirm').open")
    assert tab.text("#session-title") == original
    tab.click("#delete")
    tab.click("#confirm-yes")
    tab.until(f"document.getElementById('session-title').textContent === 'New session' && {READY}")
    assert original not in tab.text("#session-list")
    assert twin in tab.text("#session-list")


def test_a_session_is_saved_to_a_file_and_taken_in_from_it(tab, tmp_path):
    said(tab, "<b>w5</b> <b>w6</b>")
    session, seen = tab.text("#session-title"), facts(tab)
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.click("#export")
    file = tmp_path / f"{session}.mnemic"
    until(file.exists)
    tab.until(READY)
    tab.choose("#import-file", file)
    tab.until(f"document.getElementById('session-title').textContent !== '{session}' && {READY}")
    assert facts(tab).partition(" · ")[0] == seen.partition(" · ")[0]
    # The address names the session.
    twin = tab.text("#session-title")
    tab.call("Page.reload")
    tab.until(f"document.getElementById('session-title')?.textContent === '{twin}' && {READY}")
    assert "its text is not kept" in tab.text("#log")
    # What the server says of a file that is none is shown as it says it.
    broken = tmp_path / "broken"
    broken.write_bytes(b"no stream")
    tab.choose("#import-file", broken)
    tab.until(f"!document.getElementById('error').hidden && {READY}")
    assert tab.text("#error").startswith("The imported state")
    assert [one for one in tab.console if "status of 400" not in one] == []
    tab.console.clear()


def test_the_memory_is_drawn_and_as_a_table(tab, tmp_path):
    assert "Nothing has been read" in tab.text("#view")
    said(tab, "<b>w5</b> <b>w6</b>")
    said(tab, "<b>w7</b>")
    session = tab.text("#session-title")
    maps = tab.value("[...document.querySelectorAll('#view canvas')].map((one) => one.getAttribute('aria-label'))")
    assert [one.partition(":")[0] for one in maps[:2]] == ["bank", "bank"]
    assert "change since version 1" in maps[1]
    assert "Read in the last" in maps[2]
    # Two blocks have been painted over eight slots each, in more than one colour.
    colours = tab.value(
        "(() => { const one = document.querySelectorAll('#view canvas')[2];"
        " const data = new Uint32Array(one.getContext('2d').getImageData(0, 0, one.width, one.height).data.buffer);"
        " return new Set(data).size; })()"
    )
    assert colours > 4
    tab.click("#view figure summary")
    tab.until("document.querySelector('#view figure table') !== null")
    shown = tab.value("[...document.querySelectorAll('#view figure td')].map((one) => one.textContent)")
    view = tab.value(f"fetch('v1/sessions/{session}/memory').then((answer) => answer.json())")
    assert [float(one) for one in shown] == pytest.approx(view["maps"][0]["norms"][0], rel=5e-3)
    gates = tab.text("#view [aria-label^=Gates]")
    assert "block 1" in gates
    assert f"{view['diagnostics']['block1/gate_in']:.3g}"[:4] in gates


def test_a_key_is_asked_for_where_one_is_needed_and_forgotten_with_the_tab(opened, model, tmp_path):
    key, hashed = new_key()
    app = app_of(tmp_path, model, tenants={"alice": Tenant(name="alice", keys=[hashed])}, limits=Limits(max_tokens=4))
    assert hash_of(key) == hashed
    with address_of(app) as address:
        opened.console.clear()
        opened.open(f"{address}/")
        opened.until("!document.getElementById('key-form').hidden")
        assert opened.text("#error") == "This server needs a key: send the header `Authorization: Bearer KEY`."
        assert opened.value("document.activeElement.id") == "key"
        say(opened, "wrong")
        opened.until("document.getElementById('error').textContent === 'The key is not known.'")
        say(opened, key)
        opened.until(f"document.getElementById('key-form').hidden && {READY}")
        assert opened.value("document.getElementById('error').hidden")
        opened.click("#message")
        assert said(opened, "w5 w6")
        kept = opened.value("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert kept == [[key], [], ""]
        # The browser says itself that two requests were refused.
        assert [one for one in opened.console if "status of 401" not in one] == []
        assert len(opened.console) == 2
