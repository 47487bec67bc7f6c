# SPDX-License-Identifier: GPL-2.0-or-later
"""Write the man pages, from the text that `--help` prints: umemctl(1), a page for each of its
commands, umem-qemu(1).

docutils writes them.  click-man and sphinx-click know neither commands that are imported late nor
the blocks that are to stay as they are.

    python scripts/make_man.py DIRECTORY
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from docutils.core import publish_string

import pyumem
from pyumem.cli.main import COMMANDS, main
from pyumem.launcher import USAGE

_KEEP: Final = "\b"
"""click's word for: this paragraph stays as it is."""
_OTHERS: Final = ("umemctl", "umem-qemu", *(f"umemctl-{name}" for name in sorted(COMMANDS)))


def _text(words: str) -> str:
    """Return prose as reStructuredText: backquotes make a literal, and nothing else is special."""
    parts = words.split("`")
    for at, part in enumerate(parts):
        parts[at] = f"``{part}``" if at % 2 else re.sub(r"([^\w\s])", r"\\\1", part)
    return "".join(parts)


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" if line else "\n" for line in text.splitlines())


def _section(title: str, body: str) -> str:
    return f"{title}\n{'=' * len(title)}\n\n{body.rstrip()}\n\n"


def _list(pairs: Iterator[tuple[str, str]]) -> str:
    return "".join(f"{_text(term)}\n{_indented(_text(what))}\n" for term, what in pairs)


def _prose(text: str) -> str:
    """Return the paragraphs of a help text; one that is to stay, with a title, is a section."""
    said, sections = "", ""
    for paragraph in text.split("\n\n"):
        if not paragraph.startswith(_KEEP):
            said += f"{_text(paragraph)}\n\n"
            continue
        title, _, kept = paragraph.removeprefix(_KEEP).lstrip("\n").partition(":\n")
        sections += _section(title.upper(), f"::\n\n{_indented(kept)}")
    return said + sections


def _page(name: str, short: str, synopsis: str, body: str) -> str:
    others = ", ".join(f"{_text(other)}\\(1)" for other in _OTHERS if other != name)
    return (
        f"{name}\n{'#' * len(name)}\n\n{_text(short)}\n{'*' * len(_text(short))}\n\n"
        f":Manual section: 1\n:Manual group: umem\n:Version: {pyumem.__version__}\n\n"
        + _section("SYNOPSIS", _text(synopsis))
        + body
        + _section("SEE ALSO", others)
    )


def _of_click(command: click.Command, ctx: click.Context, short: str) -> str:
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    body = ""
    options = (param for param in command.get_params(ctx) if isinstance(param, click.Option))
    records = (option.get_help_record(ctx) for option in options)
    body += _section("OPTIONS", _list(record for record in records if record))
    if command is main:
        names = ((f"umemctl {name}", what) for name, what in sorted(COMMANDS.items()))
        body += _section("COMMANDS", _list(names))
    # Examples and the like come behind the options.
    prose, _, kept = inspect.cleandoc(command.help or "").partition(f"\n\n{_KEEP}\n")
    body = _section("DESCRIPTION", _prose(prose)) + body
    for more in (kept and f"{_KEEP}\n{kept}", inspect.cleandoc(command.epilog or "")):
        body += _prose(more) if more else ""
    return _page(ctx.command_path.replace(" ", "-"), short, usage, body)


def _of_launcher() -> str:
    usage, short, options, *about = USAGE.strip().split("\n\n")
    *prose, examples = about[:-1]
    pairs = (line.strip().split("  ", 1) for line in options.splitlines())
    body = (
        _section("DESCRIPTION", _text(short))
        + _section("OPTIONS", _list((term, what.strip()) for term, what in pairs))
        + "".join(f"{_text(paragraph)}\n\n" for paragraph in prose)
        + _section("EXAMPLES", f"::\n\n{_indented(examples.partition(chr(10))[2])}")
    )
    what = "run stock QEMU so that its VM can move by post-copy"
    return _page("umem-qemu", what, usage.removeprefix("Usage: "), body)


def pages() -> Iterator[tuple[str, str]]:
    """Give name and reStructuredText of each page."""
    top = click.Context(main, info_name="umemctl", **main.context_settings)
    yield "umemctl", _of_click(main, top, "post-copy live migration of QEMU VMs")
    for name, short in COMMANDS.items():
        command = main.get_command(top, name)
        assert command is not None
        ctx = click.Context(command, info_name=name, parent=top)
        yield f"umemctl-{name}", _of_click(command, ctx, short)
    yield "umem-qemu", _of_launcher()


def write(directory: Path) -> None:
    """Write all of them.  docutils.utils.SystemMessage for text that is no reStructuredText."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"halt_level": 2, "report_level": 2, "output_encoding": "unicode"}
    for name, text in pages():
        roff = publish_string(text, writer="manpage", settings_overrides=settings)
        (directory / f"{name}.1").write_text(roff)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
