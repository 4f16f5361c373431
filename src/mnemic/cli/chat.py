"""`mnemic chat`: talk to a session of a server."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

HELP = "A line is answered. /feed FILE  /fork  /rollback N  /commits  /stats  /quit"


def chat(
    server: Annotated[str, typer.Option(metavar="URL", help="Where `mnemic serve` runs.")] = "http://127.0.0.1:8000",
    session: Annotated[str | None, typer.Option(metavar="ID", help="Go on with this one; else a new one.")] = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="MNEMIC_KEY", help="For servers with tenants.")
    ] = None,
    feed: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Read a text file first; repeatable.")] = None,
    ask: Annotated[str | None, typer.Option(metavar="TEXT", help="Print the answer to this, and end.")] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer.")] = 256,
) -> None:
    """Talk to a model that remembers, on a server; come back later with --session.

    Each line of the prompt is answered; /feed FILE, /fork, /rollback N, /commits, /stats, /quit. Answers go to stdout,
    everything else, the session's id first, to stderr. Ctrl-C during an answer stops it, and the session has then
    read neither line nor answer.

    \b
    Examples:
      mnemic chat --server http://127.0.0.1:8000
      mnemic chat --session 5f0c... --feed notes.txt --ask "What is still to do?"

    \b
    Reads:   --feed, stdin.
    Writes:  nothing here; the server keeps the session.
    """
    from ..core.errors import InputError
    from .remote import Remote

    for path in feed or ():
        if not path.is_file():
            raise InputError(f"{path} does not exist or is no file.")
    remote = Remote(server, key)
    model = remote.call("GET", "/v1/models")["data"][0]["id"]
    if session is None:
        session = str(remote.call("POST", "/v1/sessions", {})["id"])
    talk = _Talk(remote, model, session, max_tokens)
    talk.stats()
    for path in feed or ():
        talk.feed(path)
    if ask is not None:
        talk.answer(ask)
    elif sys.stdin.isatty() or not feed:
        talk.prompt()


class _Talk:
    def __init__(self, remote: Any, model: str, session: str, max_tokens: int):
        self.remote, self.model, self.session, self.max_tokens = remote, model, session, max_tokens

    def prompt(self) -> None:
        from ..core.errors import MnemicError

        typer.echo(HELP, err=True)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.answer(line)
            except MnemicError as error:
                typer.echo(f"mnemic: {error}", err=True)
            except KeyboardInterrupt:
                typer.echo("stopped", err=True)

    def answer(self, text: str) -> None:
        try:
            for piece in self.remote.answer(self.model, self.session, text, self.max_tokens):
                print(piece, end="", flush=True)
        finally:
            print(flush=True)

    def feed(self, path: Path) -> None:
        size = max(path.stat().st_size, 1)
        for event in self.remote.feed(self.session, path):
            typer.echo(f"{path}: {event['tokens_read']:,} tokens, {event['bytes_read'] / size:.0%}", err=True)

    def stats(self) -> None:
        record = self.remote.call("GET", f"/v1/sessions/{self.session}")
        typer.echo(
            f"session {record['id']}, version {record['version']}: {record['tokens_seen']:,} tokens read, "
            f"{record['state_bytes']:,} bytes carried",
            err=True,
        )

    def command(self, line: str) -> None:
        from ..core.errors import InputError

        name, _, argument = line.partition(" ")
        argument, path = argument.strip(), f"/v1/sessions/{self.session}"
        if name == "/feed":
            if not Path(argument).is_file():
                raise InputError(f"{argument!r} does not exist or is no file.")
            self.feed(Path(argument))
        elif name == "/fork":
            self.session = self.remote.call("POST", f"{path}/fork", {})["id"]
        elif name == "/rollback":
            if not argument.isdigit():
                raise InputError("/rollback needs the number of a version; /commits shows them.")
            self.remote.call("POST", f"{path}/rollback", {"version": int(argument)})
        elif name == "/commits":
            for commit in self.remote.call("GET", f"{path}/commits")["data"]:
                typer.echo(f"{commit['version']:>6}  {commit['tokens_seen']:>10,} tokens  {commit['note']}", err=True)
            return
        elif name != "/stats":
            raise InputError(f"There is no {name}. {HELP}")
        self.stats()
