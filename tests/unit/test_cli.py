# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl as a user meets it, without driver, daemon or VM."""

from __future__ import annotations

import grp
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import pyumem
from pyumem import checks, runtime
from pyumem.cli import status
from pyumem.cli.display import show_report
from pyumem.cli.main import COMMANDS, main
from pyumem.report import Report, State, take_arrival

Umemctl = Callable[..., Result]


@pytest.fixture
def umemctl(tmp_path: Path) -> Umemctl:
    def run(*words: str) -> Result:
        return CliRunner().invoke(main, words, env={"UMEM_RUNTIME_DIR": str(tmp_path)})

    return run


def test_version(umemctl: Umemctl) -> None:
    assert umemctl("--version").output.strip() == f"umemctl, version {pyumem.__version__}"


def test_help_names_every_command_and_status(umemctl: Umemctl) -> None:
    text = umemctl("--help").output
    for name in COMMANDS:
        assert f"  {name} " in text
    for word in ("Exit status:", "  4 ", "UMEM_RUNTIME_DIR", "completion"):
        assert word in text


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_an_example(umemctl: Umemctl, name: str) -> None:
    result = umemctl(name, "--help")
    assert result.exit_code == 0
    assert f"umemctl {name}" in result.output and "Example" in result.output


@pytest.mark.parametrize(
    ("words", "status", "what"),
    [
        (["migrate", "--precopy-rounds", "3", "tcp:a:1"], 2, "goes with -p"),
        (["migrate", "-n", "tcp:a:1"], 2, "-n is about post-copy"),
        (["migrate", "--hybrid", "--no-postcopy", "tcp:a:1"], 2, "--no-postcopy excludes"),
        (["migrate", "-p", "unix:/x", "--qmp", "/x"], 2, "only tcp: addresses"),
        (["migrate", "-p", "tcp::1", "--qmp", "/x"], 2, "no host to connect to"),
        (["migrate", "-p", "tcp:a:1"], 2, "which VM"),
        (["migrate", "-p", "tcp:a:1", "--qmp", "/x", "--vm", "y"], 2, "exclude each other"),
        (["migrate", "-p", "tcp:a:1", "--vm", "../y"], 2, "cannot be a VM's name"),
        (["migrate", "-p", "tcp:[::1]:1", "--qmp", "/nowhere"], 1, "/nowhere: No such file"),
        (["migrate"], 2, "Missing argument"),
        (["serve", "--token-file", "/nowhere"], 2, "no such file"),
        (["background", "vm1"], 1, "vm1.sock"),
        (["background", "vm1", "--off", "--max-bandwidth", "1G"], 1, "vm1.sock"),
        (["background", "vm1", "--max-bandwidth", "0"], 2, "out of range"),
        (["background", "vm1", "--max-bandwidth", "9999999999999G"], 2, "out of range"),
        (["background", "vm1", "--max-bandwidth", "fast"], 2, "no rate such as"),
        (["background", "vm1", "--max-bandwidth", "-5M"], 2, "no rate such as"),
        (["background", "vm1", "--max-bandwidth", ""], 2, "no rate such as"),
        (["status"], 1, "no `umemctl serve` answers"),
        (["list"], 1, "is umem.ko loaded?"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_errors_are_a_line_and_a_status(
    umemctl: Umemctl, words: list[str], status: int, what: str
) -> None:
    if words == ["list"] and Path("/dev/umem").exists():
        pytest.skip("the driver is loaded")
    result = umemctl(*words)
    assert (result.exit_code, what in result.output) == (status, True), result.output
    assert "Traceback" not in result.output


def test_status_for_programs(umemctl: Umemctl) -> None:
    result = umemctl("status", "--json")
    assert json.loads(result.stdout) == {"serve": None, "migrations": [], "kept": []}
    assert result.exit_code == 1


def test_status_shows_a_vm_that_needs_memory_which_nobody_serves(
    umemctl: Umemctl, tmp_path: Path
) -> None:
    (tmp_path / "migrate").mkdir()
    record = tmp_path / "migrate" / "vm1.json"
    ram = [{"id": "ram0", "path": "/dev/shm/umem/vm1/ram0"}]
    record.write_text(json.dumps({"vm": "vm1", "destination": "tcp:a:1", "ram": ram}))
    (tmp_path / "migrate" / "vm2.json").write_text("{")
    result = umemctl("status", "--json")
    assert result.exit_code == 0
    first, second = json.loads(result.stdout)["kept"]
    assert first == {
        "name": "vm1",
        "state": "postcopy-paused",
        "destination": "tcp:a:1",
        "ram": ["/dev/shm/umem/vm1/ram0"],
        "record": str(record),
    }
    assert (second["name"], second["ram"]) == ("vm2", [])
    text = umemctl("status").output
    assert "vm1: postcopy-paused at tcp:a:1, not served" in text
    assert "kept in /dev/shm/umem/vm1/ram0" in text


def test_every_number_of_the_report_has_its_unit() -> None:
    units = ("_ms", "_s", "_us", "_bytes")
    for name, value in Report("vm1", "tcp:a:1", "0", State.COMPLETED).to_json().items():
        if isinstance(value, int | float):
            counted = name in ("requests", "recoveries") or name.startswith(
                ("pages_", "bytes_", "faults_")
            )
            assert counted or name.endswith(units), name


def test_the_report_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("vm1", "tcp:a:1", "0", State.COMPLETED, downtime_ms=42.25, ram_bytes=1 << 28)
    report.downtime_parts_ms = {"drain": 2.2, "device_state": 40.05}
    report.demand_latency_p50_us = 200.0
    report.bytes_sent_by_lane = {"urgent-0": 1024, "control": 1024}
    show_report(report)
    text = capsys.readouterr().out
    for word in (
        "42.2 ms",
        "drain 2 ms, device state 40 ms",
        "256.0 MiB",
        "completed",
        "200 us / - / -",
        "2.0 KiB",
    ):
        assert word in text


# --- check ---


def test_check_names_the_fix(umemctl: Umemctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "DEVICE", "/dev/no-umem")
    result = umemctl("check", "--qemu", "/nowhere/qemu", "--json")
    assert result.exit_code == 3
    told = json.loads(result.stdout)
    by_name = {one["what"]: one for one in told["checks"]}
    assert told["ok"] is False
    assert by_name["driver"]["level"] == "bad" and "modprobe umem" in by_name["driver"]["fix"]
    assert by_name["qemu"]["level"] == "bad" and "apt-get install" in by_name["qemu"]["fix"]
    assert all(one["fix"] for one in told["checks"] if one["level"] != "ok")
    text = umemctl("check", "--qemu", "/nowhere/qemu")
    assert "fix: modprobe umem" in text.output and "not ready: driver, qemu" in text.output


def test_check_asks_qemu(tmp_path: Path) -> None:
    qemu = tmp_path / "qemu"
    answers = (
        '{"QMP": {}}',
        '{"return": {}}',
        '{"return": {"qemu": {"major": 7, "minor": 2, "micro": 1}}}',
        '{"return": [{"capability": "x-ignore-shared", "state": false},'
        '{"capability": "late-block-activate", "state": false},'
        '{"capability": "events", "state": false}%s]}',
        '{"return": {}}',
    )
    for more, level in (
        (',{"capability": "pause-before-switchover", "state": false}', checks.Level.OK),
        ("", checks.Level.BAD),
    ):
        text = "\n".join(answers) % more
        qemu.write_text(f"#!/bin/sh\ncat >/dev/null\ncat <<'E'\n{text}\nE\n")
        qemu.chmod(0o755)
        finding = checks.qemu(str(qemu))
        assert finding.level is level and "7.2.1" in finding.text
    qemu.write_text("#!/bin/sh\nexit 1\n")
    assert "does not answer on QMP" in checks.qemu(str(qemu)).text


@pytest.mark.parametrize(
    ("gid", "mode", "fix"),
    [
        (0, 0o660, "chgrp kvm /dev/umem && chmod 660 /dev/umem"),
        (grp.getgrall()[-1].gr_gid, 0o600, "chgrp kvm"),
        (grp.getgrall()[-1].gr_gid, 0o660, f"usermod -aG {grp.getgrall()[-1].gr_name} "),
        (4711, 0o660, "usermod -aG 4711 "),
    ],
)
def test_check_names_the_group_of_a_device(
    gid: int, mode: int, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = os.stat_result((stat.S_IFCHR | mode, 0, 0, 1, 0, gid, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda _path: status)
    assert checks._let_in(Path("/dev/umem")).startswith(fix)


def test_check_looks_at_the_runtime_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path / "run"))
    assert checks.sockets().level is checks.Level.OK
    assert not (tmp_path / "run").exists(), "looked at, not made"
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    finding = checks.sockets()
    assert finding.level is checks.Level.BAD and "can be written by others" in finding.text
    monkeypatch.delenv("UMEM_RUNTIME_DIR")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setattr(runtime, "OF_HOST", tmp_path / "none")
    assert checks.sockets().level is checks.Level.BAD
    assert checks.area_files().level is checks.Level.NOTE


def test_check_names_the_mount_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UMEM_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    point = tmp_path / "areas"
    assert f"mount -t umem umem {point}" in checks.area_files().fix
    monkeypatch.setattr(checks, "mounts", lambda: {point: 1})
    assert checks.area_files().level is checks.Level.OK


# --- text of a peer ---


def test_brackets_and_control_characters_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """An IPv6 address is no markup of rich's, and a reason cannot steer the terminal."""
    address = "tcp:[fd00::1]:4444"
    migration = {"state": "failed", "peer": "[fe80::1]:40000", "reason": "no[/x]\x1b[2J"}
    vm = {"name": "vm1", "state": "failed", "listen": address, "areas": [], "migration": migration}
    serve = {"pid": 1, "vms": [vm], "history": [{**migration, "name": "vm0"}]}
    counts = dict.fromkeys(
        ("pages_done", "pages_total", "pages_demand", "pages_background", "pages_zero"), 1
    )
    running = {"name": "vm2", "destination": address, "state": "device", "bytes_moved": 1, **counts}
    status._show(serve, [running], [])
    report = Report("vm1", address, "0", State.COMPLETED, guest_ended="[/x]\x1b")
    show_report(report)
    text = capsys.readouterr().out.replace("\n", "")
    for word in (address, "from [fe80::1]:40000", "no[/x]", "[/x]\N{REPLACEMENT CHARACTER}"):
        assert word in text, word
    assert "\x1b" not in text


@pytest.mark.parametrize("value", [10**400, "x", True, None, -1, [1]])
def test_a_destination_that_tells_nonsense(value: object) -> None:
    report = Report("vm1", "tcp:a:1", "0", State.COMPLETED)
    take_arrival(report, {"demand_latency_p50_us": value, "requests": value, "guest_ended": value})
    json.dumps(report.to_json())


# --- completion ---


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(umemctl: Umemctl, shell: str) -> None:
    result = umemctl("completion", shell)
    assert result.exit_code == 0 and f"_UMEMCTL_COMPLETE={shell}_complete" in result.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("umemctl rec", ["recover"]),
        ("umemctl completion ", ["bash", "zsh", "fish"]),
        ("umemctl migrate --vm ", ["here-1", "here.2"]),
        ("umemctl migrate --resume --vm ", ["left"]),
        ("umemctl background l", ["leaving"]),
        ("umemctl recover ", ["leaving", "other"]),
    ],
)
def test_names_of_vms_are_completed(tmp_path: Path, words: str, expected: list[str]) -> None:
    for name in ("vm/here-1/qmp.sock", "vm/here.2/qmp.sock", "vm/starting/lock"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "migrate").mkdir()
    for name in ("left.json", "leaving.sock", "other.sock"):
        (tmp_path / "migrate" / name).touch()
    env = {
        "UMEM_RUNTIME_DIR": str(tmp_path),
        "_UMEMCTL_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    result = CliRunner().invoke(main, [], env=env, prog_name="umemctl")
    found = [line.partition(",")[2] for line in result.output.splitlines()]
    assert found == expected
