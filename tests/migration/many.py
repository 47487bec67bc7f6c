# SPDX-License-Identifier: GPL-2.0-or-later
"""Many `umemctl migrate -p` in one process, since starting each takes seconds under emulation.

As a program, on the source: python -m tests.migration.many HOST NAME:PORT:QMP...
Prints the reports as one JSON object, by name.
"""

import asyncio
import json
import sys
from pathlib import Path

from pyumem.address import parse
from pyumem.cli.common import security_of
from pyumem.source import Migration
from pyumem.source_base import Plan


async def move(host: str, port: str, qmp: str) -> dict[str, object]:
    security = security_of(None, None, insecure=True)
    plan = Plan(
        qmp=Path(qmp), destination=parse(f"tcp:{host}:{port}", listening=False), security=security
    )
    return (await Migration(plan, lambda text: print(text, file=sys.stderr)).run()).to_json()


async def main(host: str, *wanted: str) -> None:
    each = [one.split(":", 2) for one in wanted]
    reports = await asyncio.gather(*(move(host, port, qmp) for _, port, qmp in each))
    print(json.dumps({name: report for (name, *_), report in zip(each, reports, strict=True)}))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
