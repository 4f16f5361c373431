"""Tables for README and docs, by name: systems (built, unbuilt), evaluations (tasks), and numbers under results/."""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1] / "results"
TESTS = ROOT.parent / "tests" / "memories"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def read(path: str) -> Any:
    return json.loads((ROOT / path).read_text("utf-8"))


def demo() -> str:
    """Accuracy where the fact is two or more segments away, by length of the input."""
    found = read("demo/demo.json")
    trained = found["trained_segments"]
    rows = []
    for name, one in found["memories"].items():
        cells = []
        for segments in (trained, 2 * trained, 4 * trained, 8 * trained):
            counts = [c for d, c in one["scores"][str(segments)].items() if int(d) >= 2]
            cells.append(f"{sum(c[0] for c in counts) / sum(c[1] for c in counts):.1%}")
        rows.append([name, f"{one['parameters']:,}", f"{one['state_bytes']:,}", *cells])
    rows.append(["chance", "", "", *[f"{found['chance']:.1%}"] * 4])
    lengths = [f"{f}x ({f * trained} segments)" for f in (1, 2, 4, 8)]
    return table(["memory", "parameters", "state bytes", *lengths], rows)


def bench() -> str:
    """Time and floating-point operations as ratios to the plain host."""
    rows = [
        [
            f"{row['memory']}, {row['work']}",
            f"{row['time_ratio']:.2f}",
            f"{row['flop_ratio']:.2f}",
            f"{row['time_ratio'] / row['flop_ratio']:.2f}",
        ]
        for row in read("bench.json")["rows"]
    ]
    return table(["memory, work", "time", "operations", "time / operations"], rows)


def babilong(name: str = "results-babilong.json") -> str:
    """Accuracy on BABILong qa1 by length."""
    rows, lengths = [], []
    for path in sorted((ROOT / "babilong").glob(f"*/{name}")):
        scores = json.loads(path.read_text("utf-8"))["scores"]
        log = json.loads((path.parent / "log.json").read_text("utf-8"))
        lengths = [s["length"] for s in scores]
        size = sum(part["total"] for part in log["parameters"].values())
        cells = [f"{s['official']['accuracy']:.1%} ± {s['official']['interval']:.1%}" for s in scores]
        rows.append([path.parent.name, f"{size:,}", f"{log['seconds'] / 60:.0f}", *cells])
    return table(["memory", "parameters", "minutes of training", *[n.upper() for n in lengths]], rows)


def aligned() -> str:
    """The same at lengths that put the question where it stood in training."""
    return babilong("results-babilong-aligned.json")


def retrieval() -> str:
    """Time per token with a large store, and how much of the exact result an index finds."""
    found = read("retrieval.json")
    rows = [
        [
            f"{row['search']}, {row['work']}", f"{row['ms_per_token']:.2f}", f"{row['ratio']:.1f}",
            f"{row['added_over_floor']:.2f}" if "added_over_floor" in row else "–",
            f"{found['faiss_recall']:.3f}" if row["search"] == "faiss" else "1" if row["search"] == "exact" else "–",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    return table(
        ["search, work", "ms a token", "x plain host", "x floor", f"recall@{found['settings']['top_k']}"], rows
    )


def replay() -> str:
    """Peak memory and time of a training step by the number of segments, with replay and without."""
    found = read("replay.json")
    rows = []
    for memory in found["settings"]["memories"]:
        for n in found["settings"]["segments"]:
            full, again = (
                next(r for r in found["rows"] if (r["memory"], r["segments"], r["replay"]) == (memory, n, replay))
                for replay in (False, True)
            )
            cells = [f"{r[what] / 2**20:,.1f}" for what in ("peak", "resident") for r in (full, again)]
            rows.append([f"{memory}, {n} segments", *cells, f"{again['seconds'] / full['seconds']:.2f}"])
    head = ["memory, length", "peak, full", "peak, replay", "process, full", "process, replay", "time, replay / full"]
    return table(head, rows)


def unbiased() -> str:
    """Bias and spread of gradients that keep few encodings, relative to the full gradient."""
    names = {"last": "the last ones: plain truncation", "reservoir": "a reservoir, no weights", "unbiased": "unbiased"}
    rows = []
    for row in read("unbiased.json")["rows"]:
        cells = [f"{row['bias']:.3f}", f"{row['standard_error']:.3f}", f"{row['spread']:.2f}", f"{row['error']:.2f}"]
        rows.append([f"{row['live']}, {names[row['method']]}", *cells])
    return table(["encodings kept", "bias", "of it by chance", "spread", "error of one estimate"], rows)


def transformer_xl_study() -> str:
    """State and bits per held-out character of each schedule, mean of the seeds; copied characters of each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read("transformer_xl_study.json")["rows"]:
        found.setdefault(row["schedule"], []).append(row)
    rows = []
    for name, mine in found.items():
        cells = [f"{sum(r['bits'][part] for r in mine) / len(mine):.2f}" for part in ("all", "copied", "fresh")]
        each = ", ".join(f"{r['bits']['copied']:.2f}" for r in mine)
        rows.append([name, f"{mine[0]['state_bytes']:,}", *cells, each])
    return table(["long memory", "state bytes", "all", "copied", "fresh", "copied, each seed"], rows)


def rmt_1m() -> str:
    """Right answers of RMT-1M's toy by length, with Wilson's interval, and what reading took."""
    from mnemic.benchmarks.results import wilson

    rows = []
    for row in read("rmt_1m/detect.json")["lengths"]:
        low, high = wilson(row["right"] / row["rows"], row["rows"])
        cells = [f"{row[name]:,}" for name in ("tokens", "segments")]
        right = f"{row['right']} of {row['rows']} ({low:.0%} to {high:.0%})"
        rows.append([*cells, right, f"{row['state_bytes_a_row']:,}", f"{row['peak_mb']:.0f}", f"{row['input_mb']:.0f}"])
    return table(["tokens", "segments", "right (95%)", "state bytes a row", "peak MB", "of it ids"], rows)


def babi() -> str:
    """Distance of generated bAbI stories to the released ones, and what chance would leave."""
    rows = [
        [task, *(f"{one['distance'][what]:.3f} ({one['chance'][what]:.3f})" for what in ("answers", "facts", "back"))]
        for task, one in read("babi_distributions.json")["tasks"].items()
    ]
    return table(["task", "answers", "facts before a question", "facts back to a supporting fact"], rows)


def babi_transfer() -> str:
    """Accuracy on released and generated stories of models trained on the released ones."""
    rows = [
        [row["task"], *(f"{row[n]['accuracy']:.1%} ± {row[n]['interval']:.1%}" for n in ("released", "generated"))]
        for row in sorted(read("babi_transfer.json")["rows"], key=lambda row: int(row["task"].removeprefix("qa")))
    ]
    return table(["task", "released test file", "generated"], rows)


def babilong_build() -> str:
    """Growth of the process and tokens a second of building one BABILong sample."""
    names = {"ids": "streamed ids", "text": "streamed text", "whole": "whole"}
    rows = []
    for row in read("babilong_build.json")["rows"]:
        grown = [f"{row[f'{turn}_grown'] / 2**20:,.1f}" for turn in ("cold", "warm")]
        speed = [f"{row['tokens'] / row[f'{turn}_seconds'] / 1e6:.2f} M" for turn in ("cold", "warm")]
        rows.append([f"{names[row['what']]}, {row['length']:,} tokens", *grown, *speed])
    return table(["sample", "grown, cold", "grown, warm", "tokens/s, cold", "tokens/s, warm"], rows)


def tasks() -> str:
    """The catalog of evaluations; tasks that differ in their names alone share a row."""
    from mnemic.benchmarks.catalog import catalog

    alike: dict[tuple[Any, ...], list[str]] = {}
    for one in catalog():
        prefix, line, _ = one.name.partition("_")
        suite = prefix + line if prefix in ("ruler", "longbench", "infinitebench", "lveval", "chomsky") else ""
        unit = "–" if one.unit == "released" else one.unit
        lengths = "–" if one.lengths == ("released",) else ", ".join(one.lengths)
        key = suite, unit, lengths, one.source, one.needs or "–"
        alike.setdefault(key, []).append(one.name.removeprefix(suite))
    lines = [["task", "unit of length", "default lengths", "source", "needs"], ["---"] * 5]
    for (suite, *rest), names in alike.items():
        numbered = names == [f"qa{i}" for i in range(1, len(names) + 1)]
        shown = (
            f"`{names[0]}` to `{names[-1]}`" if numbered else ", ".join(names if suite else map("`{}`".format, names))
        )
        lines.append([f"`{suite}NAME`: {shown}" if suite else shown, *rest])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def leaderboard(folder: str = "leaderboard", tasks: str = "", costs: bool = True, text: bool = False) -> str:
    """Score of each model on each task and length, in percent, what it carries, and how fast it is: tokens a second, or
    where speeds were measured in quiet, times the host without memory in training and decoding.

    tasks: a regular expression for the names of those that are shown, all without. text: with perplexities, too.
    """
    from mnemic.benchmarks.report.board import board
    from mnemic.benchmarks.report.tables import amount, percent, size
    from mnemic.benchmarks.report.text import MEASURES, shown
    from mnemic.benchmarks.report.text import text as held_out

    results = read(f"{folder}/report.json")
    for part in ("scores", "grouped"):
        results[part] = [one for one in results[part] if re.match(tasks, one["task"])]
    made = board(results, [one for one in read(f"{folder}/costs.json") if re.match(tasks, one["task"])])
    perplexities = held_out(results) if text else None
    speeds = {m["model"]: m["speeds"] for m in results["models"] if "speeds" in m}
    heads = [f"{c.task.removeprefix('segment_')} {c.length}" for c in made.columns]
    last = [" / ".join(map(percent, made.chances[c])) for c in made.columns]
    rows = []
    for name in made.scored:
        scores = [(percent(made.entries[name, c].official.mean), (name, c) in made.best) for c in made.columns]
        rows.append([f"`{name}`", *(f"**{score}**" if best else score for score, best in scores)])
        if perplexities:
            for column, measure in itertools.product(perplexities.columns, MEASURES):
                found = shown(perplexities, name, column, measure)
                rows[-1].append("–" if found is None else " ".join((found[0], f"({found[1]})")))
        if costs and speeds:
            fast = [f"{speeds[name][kind]['ratio']:.2f}" for kind in ("train", "decode")]
            rows[-1] += [size(made.state_bytes(name)), *fast]
        elif costs:
            rows[-1] += [size(made.state_bytes(name)), amount(made.costs[name].tokens_per_second)]
    if perplexities:
        heads += list(MEASURES) * len(perplexities.columns)
    if costs:
        heads += ["state", *(["training", "decoding"] if speeds else ["tokens/s"])]
    return table(["memory", *heads], [*rows, ["chance", *last, *[""] * (len(heads) - len(last))]])


def recurrent() -> str:
    """The leaderboard of the recurrent family: recall, and what it costs."""
    return leaderboard("recurrent", "segment_mqar")


def recurrent_text() -> str:
    """Values that change, and held-out text."""
    return leaderboard("recurrent", "rewrite", costs=False, text=True)


def recurrent_stories() -> str:
    """BABILong."""
    return leaderboard("recurrent", "qa", costs=False)


def lm2_claims() -> str:
    """Each claim of LM2's paper, what it prints, and what the reproduction found."""
    from mnemic.benchmarks.reproduction.claims import claims

    return claims(_lm2())


def lm2_main() -> str:
    """The main table of the reproduction, in the paper's layout."""
    return _lm2_board("main")


def lm2_design() -> str:
    """Its ablations: slots, truncation, writes, gates."""
    return _lm2_board("design")


def lm2_margins() -> str:
    """How much better LM2 is than the others."""
    from mnemic.benchmarks.reproduction.tables import margin_table

    return margin_table((_lm2() or {"margins": {}})["margins"])


def lm2_tasks() -> str:
    """All ten tasks of the paper's table."""
    return _lm2_board("tasks")


def lm2_tasks_margins() -> str:
    """How much better LM2 is than the others over all ten."""
    from mnemic.benchmarks.reproduction.tables import margin_table

    found = _lm2()
    return _NOT_RUN if found is None or "tasks" not in found["besides"] else margin_table(found["besides"]["tasks"])


def lm2_blocks() -> str:
    """Held-out text by the number of blocks with memory."""
    from mnemic.benchmarks.reproduction.tables import text_table

    found = _lm2()
    return _NOT_RUN if found is None or "blocks" not in found["text"] else text_table(found["text"]["blocks"])


def lm2_changes() -> str:
    """Perplexities on held-out text, compared piece by piece."""
    from mnemic.benchmarks.reproduction.tables import change_table

    found = _lm2()
    return _NOT_RUN if found is None else change_table(found["text_changes"])


def lm2_bind() -> str:
    """Board bind."""
    return _lm2_board("bind")


def lm2_retention() -> str:
    """Right answers by segments of background read since the facts, and the bank's norm over that after the facts."""
    rows, heads = [], []
    for title in ("open", "closed", "shipped"):
        for name, reading in read(f"lm2/retention-{title}.json")["readings"].items():
            heads = [str(point["segments"]) for point in reading["points"]]
            cells = [f"{100 * point['accuracy']:.0f} (×{point['grown']:.1f})" for point in reading["points"]]
            rows.append([f"{title}: {name}", *cells])
    return table(["LM2: reading", *heads], rows)


def lm2_planted() -> str:
    """Planted facts in the slots of the shipped model, the main table's best LM2."""
    if not (ROOT / "lm2" / "planted.json").is_file():
        return _NOT_RUN
    found = read("lm2/planted.json")
    rows = [
        ["names among the five tokens by which a slot was written most", f"{found['listed']['names']:.0f}%"],
        ["places among them", f"{found['listed']['places']:.0f}%"],
        *(
            [f"right answers with {what} set to zeros", f"{right:.0f}%"]
            for what, right in zip(
                ("nothing", "the four slots that the name reads most", "the four of another name"),
                found["without"].values(),
                strict=True,
            )
        ),
    ]
    return table([f"{found['rows']} samples of four facts", ""], rows)


def lm2_binding() -> str:
    """What helps small models to tie a place to a person, told in telegrams."""
    found = read("lm2/binding.json")["rows"]
    rows = [
        [
            f"{row['model']}: {row['what']}",
            str(row["seed"]),
            str(row["steps"]),
            *(f"{v:.0f}" for v in row["right"].values()),
        ]
        for row in found
    ]
    return table(["telegrams", "seed", "steps", *found[0]["right"]], rows)


def lm2_norm_scale() -> str:
    """How soon LM2 is through with the telegrams of board bind, by what its norm's weights start at."""
    rows = read("lm2/norm_scale.json")["rows"]
    at = ("250", "500", "750", "1000", "1400")
    cells = [[f"{row['loss'][n]:.2f}" if n in row["loss"] else "–" for n in at] for row in rows]
    lines = [[row["what"], str(row["seed"]), *losses] for row, losses in zip(rows, cells, strict=True)]
    return table(["loss at step", "seed", *(f"{int(n):,}" for n in at)], lines)


def lm2_trials() -> str:
    """Settings of board main that were tried on LM2 of two layers: right answers by length, and the input gates."""
    return _lm2_tried("lm2/trials.json", lambda row: row["what"])


def lm2_search() -> str:
    """The same of three layers, beside RMT."""
    return _lm2_tried("lm2/search.json", lambda row: f"{row['model']}, seed {row['seed']}: {row['what']}")


def _lm2_tried(path: str, name: Any) -> str:
    found = read(path)["rows"]
    lengths = list(dict.fromkeys(length for row in found for length in row["scores"]))
    rows = []
    for row in found:
        gates = [f"{value:.3f}" for gate, value in row["gates"].items() if gate.endswith("gate_in")]
        scores = [f"{100 * row['scores'][n]['mean']:.0f}" if n in row["scores"] else "–" for n in lengths]
        rows.append([name(row), *scores, ", ".join(gates) or "–"])
    return table(["board main", *lengths, "input gates"], rows)


_NOT_RUN = "Not run yet."


def _lm2() -> Any:
    """What `mnemic reproduce lm2 --scale cpu` found, or None where it has not been run."""
    return read("lm2/findings.json") if (ROOT / "lm2" / "findings.json").is_file() else None


def _lm2_board(name: str) -> str:
    from mnemic.benchmarks.reproduction.tables import board_table

    found = _lm2()
    return _NOT_RUN if found is None or name not in found["boards"] else board_table(found["boards"][name])


def built() -> str:
    """Every memory, probed; its limits, and the tests of its equations."""
    from mnemic.cli.systems import all_systems

    rows = []
    for one in all_systems():
        tests = sorted(path.stem for path in TESTS.glob(f"test_{one['name'].replace('-', '_')}*.py"))
        holds = [preset for preset, identity in one["identity_at_attach"].items() if identity]
        limits = "; ".join(f"{rule}: {reason}" for rule, reason in one["limits"].items())
        rows.append(
            [
                f"`{one['name']}`", one["family"], one["paper"], ", ".join(one["sites"] or ()) or "–",
                f"`{one['state_size']}`", {True: "constant", False: "grows", None: "?"}[one["constant_state"]],
                ", ".join(holds) or "no", "?" if one["parameters"] is None else f"{one['parameters']:,}", limits or "–",
                ", ".join(tests) or "–",
            ]
        )  # fmt: skip
    head = [
        "memory",
        "family",
        "paper",
        "reads at",
        "state",
        "size",
        "identity",
        "parameters",
        "does not hold",
        "evidence",
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def unbuilt() -> str:
    """Published systems that are known here and have no file yet, by family."""
    from mnemic.core import memory_names
    from mnemic.core.catalogue import catalogue

    families: dict[str, list[str]] = {}
    for entry in sorted(catalogue().values(), key=lambda e: (e.family, e.year, e.name)):
        if entry.name not in memory_names():
            number = f", arXiv {entry.arxiv}" if entry.arxiv else ""
            families.setdefault(entry.family, []).append(f"{entry.system} ({entry.year}{number})")
    lines = [
        ["family", "systems, not built"],
        ["---", "---"],
        *([f, "; ".join(names)] for f, names in families.items()),
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    tables = {
        "demo": demo, "bench": bench, "babilong": babilong, "aligned": aligned, "built": built, "unbuilt": unbuilt,
        "retrieval": retrieval, "replay": replay, "unbiased": unbiased, "babi": babi,
        "babi_transfer": babi_transfer, "tasks": tasks, "babilong_build": babilong_build,
        "leaderboard": leaderboard, "recurrent": recurrent, "recurrent_text": recurrent_text,
        "recurrent_stories": recurrent_stories, "transformer_xl_study": transformer_xl_study,
        "rmt_1m": rmt_1m, "lm2_claims": lm2_claims, "lm2_main": lm2_main, "lm2_margins": lm2_margins,
        "lm2_design": lm2_design, "lm2_blocks": lm2_blocks,
        "lm2_tasks": lm2_tasks, "lm2_tasks_margins": lm2_tasks_margins,
        "lm2_changes": lm2_changes, "lm2_bind": lm2_bind,
        "lm2_retention": lm2_retention, "lm2_planted": lm2_planted,
        "lm2_binding": lm2_binding, "lm2_norm_scale": lm2_norm_scale, "lm2_trials": lm2_trials,
        "lm2_search": lm2_search,
    }  # fmt: skip
    print(tables[sys.argv[1]]())
