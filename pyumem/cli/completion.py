# SPDX-License-Identifier: GPL-2.0-or-later
"""umemctl completion, and what a shell may complete besides options: names of VMs."""

from __future__ import annotations

import contextlib
from typing import Final

import click
from click.shell_completion import CompletionItem, get_completion_class

from pyumem import runtime
from pyumem.errors import UmemError

PROGRAM: Final = "umemctl"
VARIABLE: Final = "_UMEMCTL_COMPLETE"


def _matching(incomplete: str, *patterns: str) -> list[CompletionItem]:
    """Return the names in files of the runtime directory; a shell is not told of errors."""
    names = set()
    with contextlib.suppress(UmemError, OSError):
        for pattern in patterns:
            for path in runtime.runtime_dir().glob(pattern):
                names.add(path.parent.name if path.name == "qmp.sock" else path.stem)
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def vm_here(
    ctx: click.Context,
    param: click.Parameter,  # noqa: ARG001 (click's)
    incomplete: str,
) -> list[CompletionItem]:
    """Complete a VM that umem-qemu runs here; with --resume one that has left."""
    return _matching(incomplete, "migrate/*.json" if ctx.params.get("resume") else "vm/*/qmp.sock")


def vm_leaving(
    ctx: click.Context,  # noqa: ARG001 (click's)
    param: click.Parameter,  # noqa: ARG001 (click's)
    incomplete: str,
) -> list[CompletionItem]:
    """Complete a VM whose `umemctl migrate` runs here."""
    return _matching(incomplete, "migrate/*.sock")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script that has a shell complete umemctl's commands, options and VMs' names.

    \b
    Examples:
      eval "$(umemctl completion bash)"        # in ~/.bashrc; zsh likewise
      umemctl completion fish > ~/.config/fish/completions/umemctl.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, PROGRAM, VARIABLE).source())
