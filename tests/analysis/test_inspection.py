"""Inspections and their page: reports that apply, one page without outside requests, figures, errors."""

import re
from html.parser import HTMLParser

import pytest
import torch

import mnemic
from mnemic.analysis import REPORTS, CapacityPoint, applying, inspect, lacking, require
from mnemic.analysis.drawing import save_drawings
from mnemic.analysis.page import drawings, inspection_page
from mnemic.core.errors import InputError, UnknownNameError, UnsupportedError
from mnemic.core.registry import memory_names
from tests.contract.encoders import build
from tests.tiny import random_ids, tiny_host

POINTS = [CapacityPoint(n, 64, 1 / n, 0.5 / n, min(1.0, 1.5 / n), 0.125) for n in (1, 2, 4)]


def _inspected(name="lm2", reports=None, capacity=POINTS, segment=8, **options):
    torch.manual_seed(1)
    options = {"num_slots": 6, "identity_start": False, **options} if name == "lm2" else options
    model = mnemic.attach(tiny_host(), name, segment=segment, **options).eval()
    ids = random_ids(3, 37).tolist()
    return inspect(
        model, ids[0][:-2], ids[0][-2:], lambda i: f"<w{i}>", more=ids[1:], reports=reports, capacity=capacity
    )


@pytest.fixture(scope="module")
def found():
    return _inspected()


class Addresses(HTMLParser):
    """Everything that a browser would load."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action") and v]


def test_all_reports_of_a_memory_with_slots(found):
    assert found.made == set(REPORTS)
    assert found.missing == {}
    assert found.slots is not None
    assert found.slots.block == found.block
    assert found.tokens == 3 * 37
    assert found.maps is not None
    assert found.maps.ids.tolist() == list(found.ids[8:35])
    assert {name: one.bank for name, one in found.importance.items()} == {
        "read odds x 0.1": "bank/0", "content zeroed": "bank/0",
    }  # fmt: skip
    assert all(one.change.shape == (6, 2) for one in found.importance.values())
    assert len(found.explanations) == 6
    scores = [one.score for one in found.explanations if one.score is not None]
    assert scores == sorted(scores, reverse=True)


def test_the_page_needs_nothing_else_and_escapes_what_it_is_given(found):
    page = inspection_page(found, "Inside <b>", {"read": "<script>"})
    seen = Addresses()
    seen.feed(page)
    assert seen.found
    assert all(address.startswith(("#", "data:")) for address in seen.found)
    assert not re.search(r"@import|url\((?!#)", page)
    assert {"script", "link"} & set(seen.tags) == {"link"}
    assert "<w" not in page.replace("<wbr", "")
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert page.count('role="img"') == len(drawings(found)) == 7
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_figures_as_files(found, tmp_path):
    made = drawings(found)
    assert [one.name for one in made] == ["usage", "writes", "read-maps", "rank", "gates", "importance", "capacity"]
    (path,) = save_drawings(made[2:3], tmp_path)
    assert path.name == "read-maps.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_memory_without_slots_says_what_is_missing():
    found = _inspected("armt")
    assert found.made == {"gates", "capacity"}
    assert set(found.missing) == set(REPORTS) - found.made
    page = inspection_page(found, "ARMT", {})
    assert page.count('role="img"') == 2
    assert "its state holds no slots" in page


def test_slots_without_reads_can_be_zeroed():
    found = _inspected("rmt", capacity=())
    assert found.made == {"zeroing", "rank"}
    assert list(found.importance) == ["content zeroed"]
    assert "no facts" in found.missing["capacity"]


def test_only_what_is_asked_for_is_made():
    found = _inspected(reports=("slots",))
    assert found.made == {"slots"}
    assert (found.maps, found.importance, found.explanations, found.missing) == (None, {}, (), {})
    assert [one.name for one in drawings(found)] == ["usage", "writes"]
    page = inspection_page(found, "LM2", {})
    assert page == inspection_page(_inspected(reports=("slots",)), "LM2", {})
    assert page.count('role="img"') == 2


def test_texts_shorter_than_a_segment():
    found = _inspected(segment=64)
    assert found.look.commits == ()
    assert set(found.missing) == {"gates", "rank"}
    assert "no commit in 37 tokens (every 64)" in found.missing["rank"]


@pytest.mark.parametrize("name", [n for n in memory_names() if mnemic.core.memory_class(n).hosts != {"encoder"}])
def test_every_memory_has_reports(name):
    kind = mnemic.core.memory_class(name)
    memory = kind.__new__(kind)
    torch.nn.Module.__init__(memory)
    memory.config = kind.config_class()
    missing = lacking(memory)
    assert "capacity" not in missing
    assert set(applying(memory)) == set(REPORTS) - set(missing)
    for report in missing:
        with pytest.raises(UnsupportedError, match=rf"{name}.*These apply: .*capacity"):
            require(memory, report)


def test_an_encoder_is_refused():
    model = build("memformer")
    with pytest.raises(UnsupportedError, match=r"Bert.* reads no streams"):
        inspect(model, [3, 4, 5], [6])


def test_errors_name_the_reports_that_apply():
    with pytest.raises(UnsupportedError, match=r"No report 'slots' of the memory 'rmt'.*zeroing, rank, capacity"):
        _inspected("rmt", reports=("slots",))
    with pytest.raises(UnknownNameError, match="slots"):
        _inspected(reports=("slot",))
    model = mnemic.attach(tiny_host(), "rmt", segment=8)
    with pytest.raises(InputError, match="got 3 and 0"):
        inspect(model, [3, 4, 5], [])
