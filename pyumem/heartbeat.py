# SPDX-License-Identifier: GPL-2.0-or-later
"""How the two sides of a committed migration notice within seconds that the other is not there.

TCP alone says nothing of a cable that was pulled, for as long as nobody sends, and for minutes when
somebody does.  So each side says PING on the control lane, and takes silence for an end.
"""

from __future__ import annotations

import asyncio
from typing import Final

from pyumem import wire
from pyumem.errors import LinkError
from pyumem.greeting import AsyncLink
from pyumem.wire import Kind

PING_S: Final = 1.0
SILENCE_S: Final = 10.0
"""Seconds without a byte from the peer after which it is given up.  A false alarm costs a
reconnection; a host that swaps for some seconds should not raise one.
"""


async def beat(link: AsyncLink, *, ping_s: float = PING_S, silence_s: float = SILENCE_S) -> None:
    """Say PING, and listen, until cancelled.

    Only time in which this side could have heard counts: a process that was stopped itself does not
    blame its peer.  Raises LinkError when the peer is silent, or gone.
    """
    silent, heard = 0.0, link.heard
    sending: asyncio.Task[None] | None = None
    try:
        while silent < silence_s:
            # A network that is gone lets send() wait for room for ever.
            if sending is None or sending.done():
                if sending is not None:
                    sending.result()
                sending = asyncio.create_task(link.send(wire.pack(Kind.PING)), name="ping")
            await asyncio.sleep(ping_s)
            silent = 0.0 if link.heard != heard else silent + ping_s
            heard = link.heard
    finally:
        if sending is not None:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    raise LinkError(f"{link.peer}: silent for {silence_s:g} s")
