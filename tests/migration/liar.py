# SPDX-License-Identifier: GPL-2.0-or-later
"""A source that has the token and lies: greets like one, then sends what no source may send.

    python -m tests.migration.liar HOST PORT HEX

HEX is what goes out on the urgent lane once every lane is welcome.  Prints what the destination
says on the control lane.
"""

import asyncio
import secrets
import sys

from pyumem import wire
from pyumem.address import Address
from pyumem.greeting import AsyncLink, introduce
from pyumem.hello import AreaSpec, Hello, Lane

SIZE = 128 << 20


async def lie(address: Address, data: bytes) -> None:
    session = secrets.token_hex(16)
    links = []
    for lane in (Lane.CONTROL, Lane.URGENT, Lane.BACKGROUND):
        hello = Hello(
            lane=lane,
            session=session,
            vm="liar",
            nonce=secrets.token_hex(32),
            software="liar",
            background_lanes=1,
            areas=(AreaSpec("ram0", SIZE, 4096),) if lane is Lane.CONTROL else (),
        )
        link = await AsyncLink.connect(address)
        await introduce(link, b"secret", hello)
        links.append(link)
    control, urgent, _ = links
    await urgent.send(data)
    async with asyncio.timeout(60):
        while (frame := await control.receive()) is not None:
            header, payload = frame
            print(header.kind.name, wire.unpack_json(header.kind, payload), flush=True)
    print("closed")


if __name__ == "__main__":
    asyncio.run(lie(Address(sys.argv[1], int(sys.argv[2])), bytes.fromhex(sys.argv[3])))
