# SPDX-License-Identifier: GPL-2.0-or-later
"""Logs of commands that run for long: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from collections.abc import Callable, Collection
from typing import Any, TextIO, TypeVar

import click

from pyumem.cli.common import quiet_qmp
from pyumem.cli.display import PlainDisplay

_F = TypeVar("_F", bound=Callable[..., Any])


def log_format_option(function: _F) -> _F:
    """Add --log-format."""
    return click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Form of what goes to standard error: text, or one JSON object a line with time, "
        "level, logger, message, and vm where a line is about one.",
    )(function)


class _Handler(logging.StreamHandler[TextIO]):
    """The one that log_to_stderr() has made."""


class JsonFormatter(logging.Formatter):
    """One JSON object for each record."""

    def __init__(self, names: Collection[str]) -> None:
        """Take the names of VMs, also those that are added later."""
        super().__init__()
        self._names = names

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        text = record.getMessage()
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        told = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": text,
        }
        if vm := getattr(record, "vm", "") or self._vm_of(text):
            told["vm"] = vm
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)

    def _vm_of(self, text: str) -> str:
        """Return the name that the text begins with, the longest: one may begin another."""
        begun = [
            name
            for name in tuple(self._names)
            if text.startswith((f"{name}: ", f"{name} ", f"VM {name}: "))
        ]
        return max(begun, key=len, default="")


def is_json() -> bool:
    """Tell whether this process logs JSON."""
    return any(isinstance(each.formatter, JsonFormatter) for each in logging.getLogger().handlers)


def log_to_stderr(
    form: str = "text", *, names: Collection[str] = (), verbose: bool = False
) -> None:
    """Log one line per event to standard error.

    form is "text", to which a journal adds its own time stamps and a terminal gets ours, or "json";
    names are those of VMs, for the latter.
    """
    handler = _Handler(sys.stderr)
    if form == "json":
        handler.setFormatter(JsonFormatter(names))
    else:
        stamp = "%(asctime)s " if sys.stderr.isatty() else ""
        handler.setFormatter(logging.Formatter(f"{stamp}%(levelname)s %(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, _Handler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    quiet_qmp()


class LogDisplay(PlainDisplay):
    """A migration, and its progress each second, in the log."""

    def __init__(self, vms: Collection[str]) -> None:
        """Take where the VM's name is, or will be: every line is about it."""
        self._vms = vms

    def tell(self, text: str) -> None:
        """Log a line."""
        logging.getLogger("umemctl").info("%s", text, extra=self._about())

    def fail(self, text: str) -> None:
        """Log why it failed."""
        logging.getLogger("umemctl").error("%s", text, extra=self._about())

    def _about(self) -> dict[str, str]:
        return {"vm": next(iter(self._vms), "")}
