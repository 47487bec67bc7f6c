# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections that have not proved yet who they are: few at a time, and none of them can keep
others out.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final

from pyumem.greeting import AsyncLink

log = logging.getLogger(__name__)

MOST: Final = 16


class Strangers:
    """Those of one port.

    When there are too many, the one that has been there longest goes, of the host that has most of
    them: it had its time, and a host that comes once is not driven out by another's many.
    """

    def __init__(self, most: int = MOST) -> None:
        """Know none."""
        self._most = most
        self._links: dict[AsyncLink, str] = {}

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._links)

    def add(self, link: AsyncLink, host: str) -> None:
        """Have one more."""
        if len(self._links) >= self._most:
            ((busiest, count),) = Counter(self._links.values()).most_common(1)
            oldest = next(one for one, of in self._links.items() if of == busiest)
            log.warning("%s: too many strangers, %d of this host: hung up", oldest.peer, count)
            del self._links[oldest]
            oldest.hang_up()  # whoever greets it sees its end
        self._links[link] = host

    def remove(self, link: AsyncLink) -> None:
        """Know that it is no stranger any more, or gone; again is harmless."""
        self._links.pop(link, None)
