# SPDX-License-Identifier: GPL-2.0-or-later
"""Boots the test machine, runs one command in it, judges the kernel log.

The machine is virtme-ng's: the host's own root file system, read-only, under
the kernel that was unpacked to build/kernels/<line>.  Inside, the command is
root, its working directory is the checkout (writable), .venv/bin is first on
PATH, umem.ko is loaded, /tmp, /run and /dev/shm are tmpfs.

What is kept of a run, in build/vm/: <name>.log is the kernel's whole console,
<name>.sh what was run, <name>.status how it ended.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from tests.vm import klog, kvm

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("UMEM_BUILD", ROOT / "build"))
STOCK_QEMU = BUILD / "qemu-10.0" / "qemu-system-x86_64"
MENDED_QEMU = BUILD / "machine-qemu" / "qemu-system-x86_64"
KERNELS = ("6.1", "6.12", "newest", "debug")
"""Those that can be booted; make test takes the first two."""

# Exit statuses of the harness itself, where the command's own is not told.
EXIT_DIRTY_LOG = 86
EXIT_VM_FAILED = 87
EXIT_TIMEOUT = 124

_TRACE_SECONDS = 3.0
"""How long a broken kernel may print its trace."""

# Drivers of the emulated board that no test needs; loading them costs seconds
# under emulation.
_NOT_NEEDED = (
    "ahci,libahci,sr_mod,cdrom,sg,i2c_i801,i2c_smbus,lpc_ich,iTCO_wdt,i6300esb,psmouse,"
    "pcspkr,powernow_k8,acpi_cpufreq,aesni_intel,ghash_clmulni_intel,"
    "crct10dif_pclmul,crc32_pclmul,sha1_ssse3,sha256_ssse3,sha512_ssse3,"
    "joydev,evdev,button,intel_rapl_msr,intel_rapl_common,bochs,rapl,pcc_cpufreq"
)


@dataclass(frozen=True)
class VmConfig:
    """What machine to boot and what to run; see `run`."""

    kernel: str = "6.1"
    command: str | None = None
    """Shell text; None gives an interactive shell."""
    memory: str = "4G"
    cpus: int = 2
    name: str = "vm"
    timeout: float = 3600.0
    """Seconds after which the machine is killed; not for a shell."""
    module: bool = True
    """Load umem.ko before the command."""
    ignore_log: bool = False
    """Report what the kernel log says, but do not fail for it."""
    env: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """The kernel's console."""
        return BUILD / "vm" / f"{self.name}.log"


class VmError(Exception):
    """The machine cannot be started; the text says what to do."""


def kernel_release(line: str) -> str:
    """Return the release that was unpacked for a kernel line such as "6.1"."""
    path = BUILD / "kernels" / line / "release"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        raise VmError(f"no kernel {line} under {path.parent}: run make setup") from None


def prelude(kernel: str) -> str:
    """Return the script that init runs: it readies the file systems, then runs $1.

    Every program that is started over 9p costs, so busybox does it all, from a
    copy in memory, until the disk of scripts/make-vm-image.sh is in place.

    virtme-ng would put the modules below the host's /lib/modules, which a host
    without kernel packages does not have: the disk brings the directory.
    """
    root = shlex.quote(str(ROOT))
    tree = BUILD / "kernels" / kernel
    release = kernel_release(kernel)
    modules = shlex.quote(str(tree / "lib" / "modules" / release))
    venv = shlex.quote(str(ROOT / ".venv"))
    lines = [
        "#!/bin/busybox sh",
        "# Written by tests/vm/harness.py.",
        "/bin/busybox cp /bin/busybox /run/busybox",
        'b() { /run/busybox "$@"; }',
        "b mkdir -p /run/image /run/new-tmp",
        f"/sbin/modprobe -d {shlex.quote(str(tree))} -a virtio_blk ext4 overlay",
        "b mount -t ext4 -o ro,noload /dev/vda /run/image || exit 1",
        f"b mount -t overlay -o lowerdir=/run/image/venv:{venv} venv {venv}",
    ]
    for name in ("qemu-10.0", "guest"):
        lines.append(f"b mount --bind /run/image/{name} {shlex.quote(str(BUILD / name))}")
    lines += [
        "b mount -t overlay -o lowerdir=/run/image/usr:/usr usr /usr",
        "b mount -t tmpfs modules /usr/lib/modules",
        f"b ln -s {modules} /usr/lib/modules/{release}",
        # A fresh /tmp; a checkout that lies under it stays where it is.
        "b mount -t tmpfs -o mode=1777 tmp /run/new-tmp",
    ]
    if str(ROOT).startswith("/tmp/"):
        inside = shlex.quote("/run/new-tmp/" + str(ROOT)[len("/tmp/") :])
        lines += [f"b mkdir -p {inside}", f"b mount --rbind {root} {inside}"]
    lines += [
        "b mount --move /run/new-tmp /tmp",
        f"cd {root} || exit 1",
        'exec /bin/bash "$1"',
    ]
    return "\n".join(line for line in lines if line) + "\n"


def inner_script(config: VmConfig) -> str:
    """Return the shell script that prepares the machine and runs the command."""
    quote = shlex.quote
    module = BUILD / "kmod" / config.kernel / "umem.ko"
    env = {
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{ROOT}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "UMEM_VM": "1",
        "UMEM_KERNEL": config.kernel,
        # How many times as long as elsewhere tests may take.
        "UMEM_SLOW": os.environ.get("UMEM_SLOW", "1"),
        "UMEM_BUILD": str(BUILD),
        "UMEM_QEMU": "/usr/bin/qemu-system-x86_64",
        "UMEM_QEMU10": str(STOCK_QEMU),
        "UMEM_GUEST_KERNEL": str(BUILD / "guest" / "vmlinux"),
        "UMEM_GUEST_INITRD": str(BUILD / "guest" / "initramfs.cpio"),
    }
    if not MENDED_QEMU.exists():
        wrappers = ROOT / "tests" / "vm" / "qemu"
        env |= {"UMEM_QEMU": str(wrappers / "qemu-7"), "UMEM_QEMU10": str(wrappers / "qemu-10")}
    env.update(config.env)
    lines = ["#!/bin/bash", "# Written by tests/vm/harness.py for one run."]
    if config.command is not None:
        lines += ["exec 2>&1"]
    lines += [f"export {key}={quote(value)}" for key, value in env.items()]
    lines += [
        "modprobe -q kvm_amd || modprobe -q kvm_intel",
        "echo 8 >/proc/sys/kernel/printk",
        f"status={quote(str(BUILD / 'vm' / f'{config.name}.status'))}",
    ]
    if config.module:
        lines += [
            f"if ! insmod {quote(str(module))}; then",
            "  echo 'cannot load umem.ko' >&2; echo insmod >$status; exit 1",
            "fi",
        ]
    if config.command is None:
        lines += [
            f"echo 'umem test VM, kernel {config.kernel}; leave it with exit or ctrl-d'",
            "/bin/bash -i",
            "rc=0",
        ]
    else:
        # The port to the host takes 32 KiB at a time, and Python, unbuffered, loses the rest of a
        # longer write: not of one to a pipe.  A program that is left behind may hold that open.
        lines += [
            "pipe=$(mktemp -u); mkfifo $pipe; cat $pipe & cat=$!",
            f"/bin/bash -c {quote(config.command)} >$pipe 2>&1",
            "rc=$?",
            "for _ in {1..50}; do [ -d /proc/$cat ] || break; sleep 0.1; done",
        ]
    lines += [
        # The leak detector of a debug kernel, where there is one.
        "if [ -w /sys/kernel/debug/kmemleak ]; then",
        "  echo scan >/sys/kernel/debug/kmemleak; sleep 6",
        "  echo scan >/sys/kernel/debug/kmemleak",
        "  cat /sys/kernel/debug/kmemleak >/dev/kmsg 2>/dev/null",
        "fi",
        "echo $rc $(cat /proc/sys/kernel/tainted) >$status",
        "sync",
        "exit $rc",
    ]
    return "\n".join(lines) + "\n"


def vm_argv(config: VmConfig, script: Path, accel_kvm: bool) -> list[str]:
    """Return the command line that starts the machine."""
    release = kernel_release(config.kernel)
    image = BUILD / "kernels" / config.kernel / "boot" / f"vmlinuz-{release}"
    argv = [
        str(ROOT / ".venv" / "bin" / "virtme-run"),
        *("--kimg", str(image)),
        *("--mods", "auto"),
        *("--cpus", str(config.cpus)),
        *("--memory", config.memory),
        *("--user", "root"),
        *("--rwdir", str(ROOT)),
        *("--cwd", str(ROOT)),
        *("--overlay-rwdir", "/etc"),
        "--force-9p",
        "--disable-microvm",
        *("--name", "umem-vm"),
    ]
    if BUILD.resolve() != (ROOT / "build").resolve():
        argv += ["--rwdir", str(BUILD)]
    # Not Debian 12's own: before 8.1 an emulated processor could keep running a
    # translation of code that another one had patched meanwhile.  The kernel
    # patches itself (static keys); one that still met the breakpoint of a patch
    # that was over died by "Oops: int3".
    # Where it was built, one whose emulated SVM has been mended: scripts/setup-machine-qemu.sh.
    argv += ["--qemu-bin", str(MENDED_QEMU if MENDED_QEMU.exists() else STOCK_QEMU)]
    if not accel_kvm:
        argv += ["--disable-kvm"]
        # Emulated TSCs agree, but the kernel does not believe it and would read
        # the HPET instead: every look at the clock then is an exit under QEMU's
        # big lock, and on a busy host the timer interrupts eat all there is.
        for option in ("tsc=reliable", "clocksource=tsc", "no_timer_check"):
            argv += ["--kopt", option]
    for option in (
        "loglevel=8",
        "ignore_loglevel",
        "printk.time=1",
        # Not known to the kernel and so part of init's environment.
        f"PATH={ROOT}/tests/vm/bin:/bin:/sbin:/usr/bin:/usr/sbin",
        "net.ifnames=0",
        f"module_blacklist={_NOT_NEEDED}",
        # A node without a CPU has 6.1 warn.
        *(["numa=fake=2"] if config.cpus > 1 else []),
        # It takes pages out of the tables of KVM's guests: testing.rst, Traps of the emulation.
        "numa_balancing=disable",
    ):
        argv += ["--kopt", option]
    if config.command is None:
        argv += ["--shell", str(script.with_suffix(".shell"))]
    else:
        words = shlex.join(["exec", str(script.with_suffix(".init")), str(script)])
        argv += ["--show-boot-console", "--script-sh", words]
    argv += ["--qemu-opts"]
    if not accel_kvm:
        argv += ["-accel", "tcg,thread=multi"]
        # Where the processor says that it copies and clears bytes fast, the kernel does it
        # byte by byte: emulated, that takes longer than all the rest of a page fault.
        argv += ["-cpu", "max,erms=off,fsrm=off"]
    image = BUILD / "vm" / "root.img"
    argv += ["-drive", f"file={image},format=raw,if=virtio,readonly=on,file.locking=off"]
    return argv


def _relay(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy a pipe to a stream as it comes."""
    while chunk := os.read(source.fileno(), 65536):
        target.write(chunk)
        target.flush()


def _relay_console(source: IO[bytes], log: IO[bytes], end: Callable[[], None]) -> None:
    """Copy the console to the log, and END the machine when the kernel broke down.

    After an oops the command may wait for ever, for a lock that nobody will
    give back; the trace gets a few seconds to come out.
    """
    rest = b""
    ending = False
    while chunk := os.read(source.fileno(), 65536):
        log.write(chunk)
        log.flush()
        *lines, rest = (rest + chunk).split(b"\n")
        found = klog.judge(line.decode(errors="replace") for line in lines)
        fatal = [finding for finding in found if finding.kind in klog.FATAL]
        if fatal and not ending:
            ending = True
            _tell(f"the kernel broke down, ending the machine: {fatal[0].text}")
            timer = threading.Timer(_TRACE_SECONDS, end)
            timer.daemon = True
            timer.start()


def _execute(config: VmConfig, argv: list[str]) -> int | None:
    """Run the machine to its end; None when it took too long.

    The machine's standard error is the kernel's console and goes to the log;
    the command's own standard error comes with its standard output.
    """
    shell = config.command is None
    # QEMU opens its standard streams anew through /proc: with a file that
    # means two offsets and lost text, with a pipe it is right.
    with (
        config.log.open("wb") as log,
        subprocess.Popen(
            argv,
            stdin=None if shell else subprocess.DEVNULL,
            stdout=None if shell else subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=not shell,
        ) as process,
    ):
        assert process.stderr is not None

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                if shell:
                    # The whole group is that of the terminal and of ours.
                    subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)
                    process.kill()
                else:
                    os.killpg(process.pid, signal.SIGKILL)

        relays = [
            threading.Thread(target=_relay_console, args=(process.stderr, log, kill), daemon=True)
        ]
        if process.stdout is not None:
            pair = (process.stdout, sys.stdout.buffer)
            relays.append(threading.Thread(target=_relay, args=pair, daemon=True))
        for relay in relays:
            relay.start()
        try:
            status: int | None = process.wait(timeout=None if shell else config.timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                kill()
                process.wait()
        for relay in relays:
            relay.join(timeout=5)
    return status


def _tell(text: str) -> None:
    print(f"==> vm: {text}", file=sys.stderr, flush=True)


def run(config: VmConfig) -> int:
    """Boot, run, judge; return the exit status for the caller.

    It is the command's own, unless that is 0 and the kernel log is bad
    (EXIT_DIRTY_LOG), or the machine did not come to its end (EXIT_VM_FAILED,
    EXIT_TIMEOUT).

    Raises VmError when something that `make setup` makes is missing.
    """
    directory = BUILD / "vm"
    directory.mkdir(parents=True, exist_ok=True)
    module = BUILD / "kmod" / config.kernel / "umem.ko"
    if config.module and not module.exists():
        raise VmError(f"{module} is not there: run make module KERNEL={config.kernel}")
    script = directory / f"{config.name}.sh"
    script.write_text(inner_script(config))
    init = script.with_suffix(".init")
    init.write_text(prelude(config.kernel))
    # The shell's name is all that virtme-run takes, so that it is the first
    # script that knows the second one there.
    shell = script.with_suffix(".shell")
    shell.write_text(f"#!/bin/busybox sh\nexec {shlex.join([str(init), str(script)])}\n")
    for file in (script, init, shell):
        file.chmod(0o755)
    status_file = directory / f"{config.name}.status"
    status_file.unlink(missing_ok=True)
    config.log.unlink(missing_ok=True)
    accel_kvm = kvm.really_works(BUILD)
    _tell(
        f"booting {kernel_release(config.kernel)}, {config.cpus} CPUs, {config.memory}, "
        f"{'KVM' if accel_kvm else 'emulated'}; kernel log in {config.log}"
    )
    started = time.monotonic()
    # Whoever ends the harness ends the machine with it: see _execute's finally.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    vm_status = _execute(config, vm_argv(config, script, accel_kvm))
    _tell(f"ended after {time.monotonic() - started:.0f} s")
    return _verdict(config, vm_status, status_file)


def _verdict(config: VmConfig, vm_status: int | None, status_file: Path) -> int:
    log = config.log.read_text(errors="replace") if config.log.exists() else ""
    lines = log.splitlines()
    findings = klog.judge(lines)
    for finding in findings[:20]:
        _tell(f"kernel log: {finding}")
    if len(findings) > 20:
        _tell(f"kernel log: and {len(findings) - 20} more, see {config.log}")
    told = status_file.read_text().split() if status_file.exists() else []
    if vm_status is None:
        _tell(f"killed: it took longer than {config.timeout:.0f} s")
        return EXIT_TIMEOUT
    if len(told) != 2:
        what = "umem.ko did not load" if told == ["insmod"] else "the command did not end"
        _tell(f"{what} (the machine's own status: {vm_status}); the kernel's last lines:")
        for line in lines[-15:]:
            print(f"    {line}", file=sys.stderr)
        return EXIT_DIRTY_LOG if findings else EXIT_VM_FAILED
    status, taint = int(told[0]), int(told[1])
    bad_taint = klog.judge_taint(taint)
    if bad_taint:
        _tell(f"kernel log: the kernel is tainted by {''.join(bad_taint)} ({taint})")
    if status:
        _tell(f"the command exited with {status}")
        return status
    if (findings or bad_taint) and not config.ignore_log:
        _tell("the command exited with 0, but the kernel log is bad: failed")
        return EXIT_DIRTY_LOG
    return 0
