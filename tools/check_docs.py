"""Check that README.md and docs/ tell the truth.

1. Examples: every ``mnemic`` command of a ```console or ```bash block runs and exits with 0, every ``make`` target
   exists, every ```python block of README.md runs. The commands of one page share one temporary folder, in order.
   ``<!-- docs-check: skip REASON -->`` right before a block leaves it out.
2. Tables between ``<!-- generated: NAME -->`` and ``<!-- /generated -->`` equal the output of their command.
   ``--write`` rewrites them (and does nothing else).
3. Relative links lead to files, and their anchors to headings.

Exit status 1 if anything is wrong, with one entry a problem.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

GENERATED = {
    "systems": "mnemic systems --markdown",
    **{
        name: f"python tools/tables.py {name}"
        for name in (
            *("leaderboard", "demo", "bench", "babilong", "aligned", "built", "unbuilt"),
            *("retrieval", "replay", "unbiased", "babi", "babi_transfer", "tasks", "babilong_build"),
            *("transformer_xl_study", "rmt_1m", "recurrent", "recurrent_text", "recurrent_stories"),
            *(
                "lm2_claims",
                "lm2_main",
                "lm2_margins",
                "lm2_design",
                "lm2_tasks",
                "lm2_tasks_margins",
                "lm2_blocks",
                "lm2_changes",
                "lm2_bind",
                "lm2_retention",
                "lm2_planted",
                "lm2_binding",
                "lm2_norm_scale",
                "lm2_trials",
                "lm2_search",
            ),
        )
    },
}
# Run when they stand beside mnemic on a line: a pipe, a redirection.
HELPERS = {"cat", "echo", "head", "ls", "mkdir", "printf", "tail"}
# May be shown, never run.
SHOWN = {"cd", "git", "pip"}
TIMEOUT = 600
BACKSLASH = "\\"

BEGIN = re.compile(r"<!-- generated: (\S+) -->")
END = "<!-- /generated -->"
FENCE = re.compile(r"( *)(`{3,}|~{3,}) *([\w+-]*)[^`]*")
SKIP = re.compile(r"<!-- docs-check: skip\b *(.*?) *-->")
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]: *(\S+)")
HEADING = re.compile(r"#{1,6} +(.+?)(?: +#+)?$")


@dataclass(frozen=True)
class Block:
    """A fenced block: where its fence opens, its language, its lines, and whether it is left out."""

    line: int
    language: str
    lines: list[str]
    skip: bool


@dataclass
class Page:
    """A Markdown page: its prose (blanked inside fences, so that line numbers stay), its blocks and its faults."""

    prose: list[str]
    blocks: list[Block]
    faults: list[tuple[int, str]]


def parse(text: str) -> Page:
    page = Page([], [], [])
    fence, indent, block, skip_line = "", 0, None, 0
    for number, line in enumerate(text.splitlines(), 1):
        if block is not None:
            page.prose.append("")
            if line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                page.blocks.append(block)
                block = None
            else:
                block.lines.append(line[indent:] if not line[:indent].strip() else line)
            continue
        opening = FENCE.fullmatch(line)
        page.prose.append("" if opening else line)
        if opening:
            indent, fence = len(opening[1]), opening[2]
            block = Block(number, opening[3], [], skip=bool(skip_line))
            skip_line = 0
        elif skip := SKIP.fullmatch(line.strip()):
            skip_line = number
            if not skip[1]:
                page.faults.append((number, "docs-check: skip gives no reason"))
        elif skip_line and line.strip():
            page.faults.append((skip_line, "docs-check: skip stands before no block"))
            skip_line = 0
    if block is not None:
        page.faults.append((block.line, "block is never closed"))
    if skip_line:
        page.faults.append((skip_line, "docs-check: skip stands before no block"))
    return page


def commands(block: Block) -> list[tuple[int, str]]:
    """The commands of a block with their line numbers; in a console block they stand behind ``$``."""
    found: list[tuple[int, str]] = []
    continued = False
    for number, line in enumerate(block.lines, block.line + 1):
        text = line.strip()
        if continued:
            first, head = found[-1]
            rest = text.removeprefix("> ") if block.language == "console" else text
            found[-1] = (first, f"{head} {rest.removesuffix(BACKSLASH).strip()}")
        elif block.language == "console" and not text.startswith("$ "):
            continue
        elif text and not text.startswith("#"):
            found.append((number, text.removeprefix("$ ").removesuffix(BACKSLASH).strip()))
        else:
            continue
        continued = text.endswith(BACKSLASH)
    return found


def programs(command: str) -> list[list[str]]:
    """The words of each program that a command line starts, without assignments in front and redirections behind."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if word in {"|", "||", "&&", ";", "&"}:
            parts.append([])
        elif parts[-1] or not re.match(r"\w+=", word):
            parts[-1].append(word)
    return [part for part in parts if part]


class Checker:
    """All checks of one tree. ``bin`` is the folder in which ``mnemic`` is installed."""

    def __init__(self, root: Path, bin: Path) -> None:
        self.root = root
        self.problems: list[str] = []
        self.environment = os.environ | {
            "PATH": f"{bin}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.readme = root / "README.md"
        self.pages = [self.readme, *sorted((root / "docs").rglob("*.md"))]

    def report(self, path: Path, line: int, message: str) -> None:
        self.problems.append(f"{path.relative_to(self.root)}:{line}: {message}")

    def check(self) -> None:
        if not self.readme.is_file():
            self.problems.append("README.md: missing")
            self.pages.remove(self.readme)
        for path in self.pages:
            page = parse(path.read_text("utf-8"))
            for line, message in page.faults:
                self.report(path, line, message)
            with tempfile.TemporaryDirectory() as folder:
                for block in page.blocks:
                    if not block.skip:
                        self.check_block(path, block, folder)
            self.tables(path, write=False)
        for path in dict.fromkeys([*self.pages, *sorted(self.root.glob("*.md"))]):
            self.check_links(path)

    def check_block(self, path: Path, block: Block, folder: str) -> None:
        if block.language == "python" and path == self.readme:
            self.execute(path, block.line, "python block", [sys.executable, "-c", "\n".join(block.lines)], folder)
        elif block.language in {"console", "bash"}:
            for line, command in commands(block):
                self.check_command(path, line, command, folder)

    def check_command(self, path: Path, line: int, command: str, folder: str) -> None:
        try:
            started = programs(command)
        except ValueError as error:
            return self.report(path, line, f"can not read `{command}`: {error}")
        names = {words[0] for words in started}
        if unknown := names - HELPERS - SHOWN - {"mnemic", "make"}:
            return self.report(path, line, f"`{min(unknown)}` is not a command that the docs may show")
        for words in started:
            if words[0] == "make":
                self.check_targets(path, line, words[1:])
        if "mnemic" in names:
            if beside := names - HELPERS - {"mnemic"}:
                return self.report(path, line, f"give mnemic a line of its own, without `{min(beside)}`")
            self.execute(path, line, f"`{command}`", ["bash", "-euo", "pipefail", "-c", command], folder)

    def check_targets(self, path: Path, line: int, words: list[str]) -> None:
        makefile = self.root / "Makefile"
        rules = makefile.read_text("utf-8") if makefile.is_file() else ""
        targets = {name for names in re.findall(r"^([\w -]+):(?!=)", rules, re.MULTILINE) for name in names.split()}
        for word in words:
            if not word.startswith("-") and "=" not in word and word not in targets:
                self.report(path, line, f"the Makefile has no target `{word}`")

    def execute(self, path: Path, line: int, name: str, arguments: list[str], folder: str) -> str | None:
        """Run a program; its output, or None after reporting that it failed."""
        try:
            done = subprocess.run(
                arguments,
                cwd=folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return self.report(path, line, f"{name} ran for more than {TIMEOUT} s")
        if done.returncode:
            output = (done.stdout + done.stderr).strip()
            return self.report(path, line, f"{name} exits with {done.returncode}\n{output}")
        return done.stdout

    def tables(self, path: Path, write: bool) -> None:
        """Compare the generated tables of a page with what their commands print, or rewrite them."""
        text = path.read_text("utf-8")
        # Markers shown in an example are not markers: look for them in the prose.
        lines, prose = text.splitlines(), parse(text).prose
        result: list[str] = []
        position = 0
        while position < len(lines):
            result.append(lines[position])
            begin = BEGIN.fullmatch(prose[position].strip())
            position += 1
            if begin is None:
                continue
            end = next((at for at in range(position, len(lines)) if prose[at].strip() == END), None)
            if end is None or any(BEGIN.fullmatch(line.strip()) for line in prose[position:end]):
                self.report(path, position, f"table `{begin[1]}` is not closed by {END}")
                continue
            body = lines[position:end]
            result += self.table(path, position, begin[1], body, write)
            position = end
        if write and result != lines:
            path.write_text("\n".join(result) + "\n", "utf-8")
            print(f"{path.relative_to(self.root)}: rewritten")

    def table(self, path: Path, line: int, name: str, body: list[str], write: bool) -> list[str]:
        """What belongs between the markers; ``body`` again where that is not known."""
        if name not in GENERATED:
            self.report(path, line, f"there is no generated table `{name}`, only: {', '.join(GENERATED)}")
            return body
        output = self.execute(path, line, f"`{GENERATED[name]}`", shlex.split(GENERATED[name]), str(self.root))
        if output is None:
            return body
        fresh = output.strip().splitlines()
        if not write and "\n".join(body).strip() != "\n".join(fresh):
            self.report(path, line, f"table `{name}` is out of date; run: python tools/check_docs.py --write")
        return fresh

    def check_links(self, path: Path) -> None:
        for number, line in enumerate(parse(path.read_text("utf-8")).prose, 1):
            for found in LINK.finditer(re.sub(r"`[^`]*`", "``", line)):
                link = found[1] or found[2]
                target, _, anchor = link.partition("#")
                if re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.IGNORECASE):
                    continue
                file = path.parent / target if target else path
                if not file.exists():
                    self.report(path, number, f"link to {target}, which does not exist")
                # An anchor with a dot is a Python name in the generated reference: mkdocs checks those.
                elif anchor and "." not in anchor and file.suffix == ".md" and anchor not in anchors(file):
                    self.report(path, number, f"link to {link}, but no heading there has that anchor")


def anchors(path: Path) -> set[str]:
    headings = (HEADING.fullmatch(line) for line in parse(path.read_text("utf-8")).prose)
    return {re.sub(r"[^\w\- ]", "", heading[1]).strip().lower().replace(" ", "-") for heading in headings if heading}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the examples, tables and links of README.md and docs/.")
    parser.add_argument("--write", action="store_true", help="rewrite the generated tables, check nothing else")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the tree to check")
    parser.add_argument("--bin", type=Path, default=Path(sys.executable).parent, help="folder of the mnemic command")
    options = parser.parse_args()
    checker = Checker(options.root.resolve(), options.bin.absolute())
    if options.write:
        for path in checker.pages:
            if path.is_file():
                checker.tables(path, write=True)
    else:
        checker.check()
    for problem in checker.problems:
        print(problem, file=sys.stderr)
    return 1 if checker.problems else 0


if __name__ == "__main__":
    sys.exit(main())
