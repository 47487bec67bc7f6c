# SPDX-License-Identifier: GPL-2.0-or-later
"""Logs for programs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pyumem.cli import logs
from pyumem.cli.main import main


@pytest.fixture(autouse=True)
def clean_logging() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    for handler in root.handlers[:]:
        if isinstance(handler, logs._Handler):
            root.removeHandler(handler)
    root.setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    text = capsys.readouterr().err
    assert "\x1b" not in text
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    names: set[str] = set()
    logs.log_to_stderr("json", names=names)
    log = logging.getLogger("pyumem.serve")
    log.info("ready on %s", "/run/x")
    names |= {"vm1", "vm1:2"}
    log.warning("%s: two\nlines \x1b", "vm1")
    log.debug("not told")
    first, second = lines(capsys)
    assert (first["level"], first["logger"], first["message"]) == (
        *("info", "pyumem.serve"),
        "ready on /run/x",
    )
    assert "vm" not in first
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert second["vm"] == "vm1" and second["message"] == "vm1: two\nlines \x1b"
    assert second["level"] == "warning"


@pytest.mark.parametrize(
    ("text", "vm"),
    [
        ("vm1: x", "vm1"),
        ("vm1 runs at tcp:a:1", "vm1"),
        ("vm1:2: x", "vm1:2"),
        ("VM vm1: x", "vm1"),
        ("vm10: x", None),
        ("SIGTERM: stopping", None),
        ("127.0.0.1:4000: vm1", None),
    ],
)
def test_the_vm_that_a_line_is_about(
    text: str, vm: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.log_to_stderr("json", names=["vm1", "vm1:2"])
    logging.getLogger("x").info("%s", text)
    assert lines(capsys)[0].get("vm") == vm


def test_a_traceback_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.log_to_stderr("json")
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("x").exception("an error of ours")
    (one,) = lines(capsys)
    assert one["level"] == "error" and one["traceback"].endswith("ValueError: no")


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.log_to_stderr(names=["vm1"])
    logging.getLogger("x").info("vm1: x")
    assert capsys.readouterr().err == "INFO vm1: x\n"


def test_a_migration_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    logs.log_to_stderr("json")
    with logs.LogDisplay(["vm1"]) as display:
        display.tell("postcopy-active: 1/2 pages")
        display.fail("vm1: lost")
    assert [(one["level"], one["vm"]) for one in lines(capsys)] == [
        ("info", "vm1"),
        ("error", "vm1"),
    ]


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["migrate", "-p", "tcp:localhost:1", "--qmp", "/nowhere"], 1),
        (["migrate", "-p", "tcp:localhost:1"], 2),
        (["serve", "--insecure", "--tls-creds", "/nowhere"], 2),
    ],
)
def test_the_last_word_is_json_too(words: list[str], status: int, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, [*words, "--log-format", "json"], env={"UMEM_RUNTIME_DIR": str(tmp_path)}
    )
    assert result.exit_code == status
    told = [json.loads(line) for line in result.stderr.splitlines()]
    assert told[-1]["level"] == "error" and told[-1]["message"]
