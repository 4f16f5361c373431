"""Reports: numbers by hand, equal bytes for equal data, and pages that hold together whatever the names are."""

import copy
import csv
import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from mnemic.analysis.drawing import style
from mnemic.benchmarks.report import check_plots, page, print_report, save_figures, write_report
from mnemic.benchmarks.report.board import Column, board, grouped, length_key
from mnemic.benchmarks.report.charts import _mark, _readable, _ticks
from mnemic.benchmarks.report.figures import drawings
from mnemic.benchmarks.report.tables import scores_csv
from mnemic.core.errors import ConfigError, InputError, MissingExtraError
from tests.benchmarks.report_cases import model, realistic, results, score

VOID = {"meta", "link", "br", "input", "hr", "img"}
ODD_NAMES = ("<script>alert(1)</script>", 'a "b" & c', "$x_{1}$", "_hidden", "[bold]loud[/bold]", "{{ title }}")


def group(name, task, length, by, value, official, count=10, seed=1):
    run = {"model": name, "task": task, "length": length, "train_seed": 0, "seed": seed}
    return {**run, "by": by, "value": value, "count": count, "official": official, "fixed": official}


def cost(name, task="qa1", length="1k", seconds=1.0, speed: float | None = 100.0, peak=2**20):
    run = {"model": name, "task": task, "length": length, "train_seed": 0, "seed": 1}
    return {**run, "seconds": seconds, "tokens_per_second": speed, "peak_bytes": peak}


def printed(data, costs=(), width=100):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_report(data, costs, console)
    return console.file.getvalue()


class Page(HTMLParser):
    """Fails where elements do not nest; keeps elements, ids, addresses, and the text of cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.ids, self.addresses, self.references, self.texts = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "data", "action", "xlink:href", "srcset"):
                self.addresses.append(value)
            self.references += re.findall(r"url\(#([^)]+)\)", value or "")
            self.addresses += re.findall(r"url\((?!#)([^)]+)\)", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def whole():
    """A page with all its sections."""
    data = results(
        score("lm2", "qa1", "1k", 0.9, chance=0.25),
        score("lm2", "mqar", "8", 0.8),
        score("none", "qa1", "1k", 0.3, chance=0.25),
        score("none", "mqar", "8", 0.1),
        grouped=(group("lm2", "qa1", "1k", "depth", 50, 0.9), group("none", "mqar", "8", "distance", 2, 0.1)),
        settings={"steps": 7},
        scale="CPU scale",
    )
    costs = [cost("lm2"), cost("none")]
    return data, costs, page(data, costs)


def test_training_seeds_count_equally_and_sample_seeds_by_their_size():
    scores = (
        score("lm2", "qa1", "1k", 0.8, train_seed=0, seed=1, count=100),
        score("lm2", "qa1", "1k", 0.2, train_seed=0, seed=2, count=300),
        score("lm2", "qa1", "1k", 0.75, train_seed=1, seed=1, count=10, truncated=3),
    )
    entry = board(results(*scores)).entries["lm2", Column("qa1", "1k")]
    # Training seed 0: (0.8 x 100 + 0.2 x 300) / 400 = 0.35.
    assert entry.official == pytest.approx((0.55, 0.35, 0.75))
    assert (entry.spread, entry.seeds, entry.truncated) == ("training seeds", 2, 3)
    entry = board(results(*scores[:2])).entries["lm2", Column("qa1", "1k")]
    assert entry.official == pytest.approx((0.35, 0.2, 0.8))
    assert (entry.spread, entry.seeds) == ("sample seeds", 2)


def test_a_single_run_keeps_its_interval_and_both_rules():
    official, fixed = {"mean": 0.5, "low": 0.4, "high": 0.6}, {"mean": 0.45, "low": 0.35, "high": 0.55}
    data = results(score("lm2", "qa1", "1k", 0.5, official=official, fixed=fixed))
    entry = board(data).entries["lm2", Column("qa1", "1k")]
    assert (entry.official, entry.fixed, entry.spread) == ((0.5, 0.4, 0.6), (0.45, 0.35, 0.55), "interval")
    assert "40.0–60.0" in printed(data)
    assert "fixed 45.0" in printed(data)
    assert "fixed" not in printed(results(score("lm2", "qa1", "1k", 0.5)))


def test_the_best_and_what_is_within_its_range_stand_out():
    column = Column("qa1", "1k")
    data = results(*(score(name, *column, mean) for name, mean in (("a", 0.9), ("b", 0.83), ("c", 0.81))))
    assert board(data).best == {("a", column), ("b", column)}
    # With several training seeds the range is theirs.
    seeds = [score("a", *column, mean, train_seed=i) for i, mean in enumerate((0.89, 0.91))]
    assert board(results(*seeds, score("b", *column, 0.88))).best == {("a", column)}
    assert not board(results(score("a", *column, 0.9))).best


def test_models_are_ordered_by_their_mean_over_all_columns():
    data = results(
        score("short", "qa1", "0k", 1.0), score("low", "qa1", "0k", 0.2), score("low", "qa1", "4k", 0.4),
        score("high", "qa1", "4k", 0.6), score("high", "qa1", "0k", 0.9),
        models=(model("absent", note="not run: reason"), model("short"), model("low"), model("high")),
    )  # fmt: skip
    made = board(data)
    assert made.means == pytest.approx({"low": 0.3, "high": 0.75})
    assert made.names == ["high", "low", "absent", "short"]
    assert made.scored == ["high", "low", "short"]
    assert "absent: not run: reason" in printed(data)


def test_lengths_are_in_the_order_of_their_size():
    lengths = ["released", "16k", "2", "1M", "10", "0k", "4k", "128", "1.5k"]
    assert sorted(lengths, key=length_key) == ["0k", "2", "10", "128", "1.5k", "4k", "16k", "1M", "released"]


def test_costs_are_over_the_time_of_all_runs():
    costs = [cost("lm2", seconds=1, speed=100), cost("lm2", length="4k", seconds=3, speed=200, peak=2**30)]
    costs.append(cost("lm2", length="8k", seconds=5, speed=None))
    made = board(results(score("lm2", "qa1", "1k", 0.5)), costs)
    assert made.costs["lm2"].tokens_per_second == pytest.approx(175)
    assert made.costs["lm2"].peak_bytes == 2**30
    assert made.state_bytes("lm2") == 2**20


def test_groups_are_pooled_over_seeds_by_count():
    data = results(
        score("lm2", "qa1", "1k", 0.5),
        grouped=(
            group("lm2", "qa1", "1k", "depth", 50, 1.0, count=10, seed=1),
            group("lm2", "qa1", "1k", "depth", 50, 0.0, count=30, seed=2),
            group("lm2", "qa1", "1k", "depth", 0, 0.5),
            group("lm2", "qa1", "1k", "distance", 3, 0.5),
        ),
    )
    assert grouped(data, "depth") == {"qa1": {"1k": {"lm2": {0: (0.5, 10), 50: (0.25, 40)}}}}
    assert grouped(data, "distance") == {"qa1": {"1k": {"lm2": {3: (0.5, 10)}}}}


def test_csv_reads_back_to_the_same_numbers():
    third = {"mean": 1 / 3, "low": 0.1 + 0.2, "high": 2 / 3}
    data = results(
        score('a, "b"', "qa1", "1k", 0.5, official=third, chance=1 / 6),
        score("lm2", "qa1", "1k", 0.5, train_seed=None),
    )
    first, second = csv.DictReader(io.StringIO(scores_csv(data), newline=""))
    assert first["model"] == 'a, "b"'
    assert [float(first[f"official{part}"]) for part in ("", "_low", "_high")] == list(third.values())
    assert float(first["chance"]) == 1 / 6
    assert (second["train_seed"], second["chance"], int(second["count"])) == ("", "", 100)


def test_files_hold_the_data_and_equal_data_give_equal_bytes(tmp_path, whole):
    data, costs, text = whole
    paths = write_report(data, costs, tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.csv", "costs.json", "report.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert json.loads(paths[0].read_text()) == data
    assert json.loads(paths[2].read_text()) == costs
    reordered = {key: copy.deepcopy(data[key]) for key in reversed(data)}
    write_report(reordered, [], tmp_path / "again")
    for name in ("report.json", "report.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert paths[3].read_text(encoding="utf-8") == text


def test_the_page_does_not_depend_on_the_style_of_the_user(whole):
    import matplotlib

    data, costs, text = whole
    with matplotlib.rc_context({"axes.facecolor": "red", "svg.fonttype": "path", "font.size": 20}):
        assert page(copy.deepcopy(data), costs) == text
        assert matplotlib.rcParams["font.size"] == 20


def test_the_page_needs_nothing_but_itself(whole):
    _, _, text = whole
    made = Page(text)
    assert "http" not in text.replace("http-equiv", "")
    assert all(address.startswith(("#", "data:,", "data:image/png;base64,")) for address in made.addresses)
    assert "default-src 'none'" in text
    assert len(made.ids) == len(set(made.ids))
    used = {address[1:] for address in made.addresses if address.startswith("#")} | set(made.references)
    assert used <= set(made.ids)
    assert made.names.count("svg") == len(re.findall(r'<svg[^>]+role="img"', text)) == 5
    assert text.count('aria-sort="none"') == (1 + 2 + 1) + (1 + 5)
    for heading in (
        "Task by length",
        "Depth by length",
        "Score by distance",
        "Score against cost",
        "Size and cost",
        "Settings",
    ):
        assert heading in made.texts
    assert "CPU scale" in made.texts


def test_sections_without_data_are_left_out():
    text = page(results(score("lm2", "qa1", "1k", 0.5), models=(model("lm2", state_bytes=None),)), [])
    made = Page(text)
    assert made.names.count("h2") == 3
    assert made.names.count("svg") == 1
    assert not {"badge", "details", "tfoot"} & {*made.names, *re.findall(r'class="(\w+)"', text)}
    assert "tokens/s" not in made.texts


def test_names_are_text_and_nothing_else(tmp_path):
    scores = [score(name, '<b>"task" & $', "</table>", 0.5) for name in ODD_NAMES]
    groups = [
        group(name, '<b>"task" & $', "</table>", by, 1, 0.5) for name in ODD_NAMES for by in ("depth", "distance")
    ]
    made = results(*scores, grouped=tuple(groups), title="</title><script>", settings={"</pre>": "</script>"})
    made["models"][0]["note"] = "<img src=x onerror=alert(1)>"
    costs = [cost(ODD_NAMES[0], '<b>"task" & $', "</table>")]
    write_report(made, costs, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == made
    parsed = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert parsed.names.count("script") == 1
    assert not {"b1", "img"} & set(parsed.names)
    assert parsed.texts.count("</title><script>") == 2
    for name in ODD_NAMES:
        # In the leaderboard and in three figures.
        shown = [part for part in parsed.texts if part.replace("\u200b", "").replace("\n", " ") == name]
        assert len(shown) >= 4, name
        assert name in printed(made, costs)
    assert '"</pre>": "</script>"' in " ".join(parsed.texts)


def test_figures_are_files_of_the_kind_that_was_asked_for(tmp_path):
    scores = score("lm2", "a/b", "1k", 0.5), score("none", "a/b", "1k", 0.5)
    data = results(*scores, grouped=(group("lm2", "a/b", "1k", "depth", 0, 0.5),))
    costs = [cost("lm2", "a/b"), cost("none", "a/b")]
    paths = save_figures(data, costs, tmp_path)
    assert [path.name for path in paths] == ["task-length.png", "depth-a-b.png", "cost.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    data = results(score("lm2", "a/b", "1k", 0.5), models=(model("lm2", state_bytes=None),))
    (once,), (again,) = (save_figures(data, [], tmp_path / folder, ".pdf") for folder in ("once", "again"))
    assert once.read_bytes() == again.read_bytes()
    with pytest.raises(ConfigError, match="gif"):
        save_figures(data, costs, tmp_path, ".gif")


def test_tasks_that_do_not_share_lengths_have_figures_of_their_own():
    tasks = {"qa1": ("0k", "1k"), "mqar": ("2", "4"), "qa2": ("1k", "4k"), "niah": ("4k",)}
    data = results(*(score("lm2", task, length, 0.5) for task, lengths in tasks.items() for length in lengths))
    titles = {made.name: made.title for made in drawings(data, [])}
    assert list(titles) == ["task-length-1", "task-length-2"]
    assert titles["task-length-1"].endswith(": mqar")
    assert titles["task-length-2"].endswith(": qa1, qa2, niah")


def test_heat_maps_show_the_numbers():
    def texts(name):
        figure = next(made for made in drawings(data, []) if made.name == name).draw()
        return {text.get_text() for axes in figure.axes for text in axes.texts}

    depths = [group("lm2", "niah", "1k", "depth", d, 0.0 if d < 50 else 1.0) for d in range(100)]
    data = results(score("lm2", "niah", "1k", 0.256), score("none", "niah", "4k", 0.5), grouped=tuple(depths))
    assert texts("task-length") == {"26", "50"}
    axes = next(made for made in drawings(data, []) if made.name == "depth-niah").draw().axes[0]
    # A hundred depths are drawn in steps of ten.
    assert [text.get_text() for text in axes.texts] == ["0"] * 5 + ["100"] * 5


def test_many_models_differ_from_each_other_in_the_figures():
    data, costs = realistic(tuple(f"memory {i}" for i in range(40)))
    made = board(data, costs)
    marks = {tuple(sorted(_mark(made, name).items())) for name in made.scored}
    assert len(marks) == 40
    with style():
        figure = next(drawing for drawing in drawings(data, costs) if drawing.name == "cost").draw()
        (legend,) = figure.legends
        assert {text.get_text() for text in legend.get_texts()} == set(made.means)
        figure.draw_without_rendering()
    box, frame = legend.get_window_extent(), figure.bbox
    assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
    assert all(box.y1 <= axes.get_tightbbox().y0 for axes in figure.axes)


def test_text_on_colours_is_readable():
    assert _readable((1, 1, 1, 1)) == _readable((0.99, 0.91, 0.14, 1)) == "black"
    assert _readable((0, 0, 0, 1)) == _readable((0.27, 0.0, 0.33, 1)) == "white"


@pytest.mark.parametrize("low, high", [(1, 1), (3, 30_000), (5_000, 5_001), (0.2, 9e9), (64, 64), (100, 100_000)])
@pytest.mark.parametrize("digits, base", [((1, 2, 5), 10), ((1,), 2)])
def test_ticks_frame_the_values(low, high, digits, base):
    ticks = _ticks(low, high, digits, base)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))


def test_the_terminal_is_not_wider_than_it_is():
    data, costs = realistic()
    text = printed(data, costs, width=80)
    assert (
        max(
            map(
                len,
                text.splitlines()[
                    : text.splitlines().index("Percent by the official rule; below a score its 95% interval.")
                ],
            )
        )
        <= 80
    )
    assert text.count("qa1") == 3
    assert "chance" in text
    assert "† 12,345" in text


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda r: r.update(scores=[]), "no scores"),
        (lambda r: r.pop("models"), "'models'"),
        (lambda r: r["scores"][0].pop("count"), r"scores\[0\] has no 'count'"),
        (lambda r: r["scores"][0]["official"].update(mean=float("nan")), "official mean is nan"),
        (lambda r: r["scores"][0]["fixed"].update(high=87.0), "fixed high is 87.0"),
        (lambda r: r["scores"][0].update(count=0), "count is 0"),
        (lambda r: r["scores"][0].update(model="other"), "no such model; the models are lm2"),
        (lambda r: r["scores"].append(dict(r["scores"][0])), "lm2 qa1 1k 0 1 is given twice"),
        (lambda r: r["grouped"][0].update(by="width"), "'width'"),
        (lambda r: r["grouped"][0].update(length="2k"), "at '2k': there is no score of it"),
        (lambda r: r["models"].append(dict(r["models"][0])), "models: lm2 is given twice"),
    ],
)
def test_bad_results_are_refused(tmp_path, change, said):
    data = results(score("lm2", "qa1", "1k", 0.5), grouped=(group("lm2", "qa1", "1k", "depth", 0, 0.5),))
    data = copy.deepcopy(data)
    change(data)
    with pytest.raises(InputError, match=said):
        write_report(data, [], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_settings_that_json_does_not_know_are_refused(tmp_path):
    with pytest.raises(InputError, match="no JSON"):
        write_report(results(score("lm2", "qa1", "1k", 0.5), settings={"clip": float("inf")}), [], tmp_path)


def test_without_matplotlib_the_error_names_the_extra_and_the_data_are_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = results(score("lm2", "qa1", "1k", 0.5))
    for call in (check_plots, lambda: page(data, []), lambda: save_figures(data, [], tmp_path)):
        with pytest.raises(MissingExtraError, match=r"mnemic\[plots\]"):
            call()
    with pytest.raises(MissingExtraError, match=r"report\.csv and costs\.json are written"):
        write_report(data, [], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs.json", "report.csv", "report.json"]
    assert "50.0" in printed(data)
