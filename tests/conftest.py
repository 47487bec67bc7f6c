# SPDX-License-Identifier: GPL-2.0-or-later
"""What all tests share: those that need the test machine say so outside it."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# On a busy host slow input is no sign of a bad test.
settings.register_profile("umem", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("umem")

TESTS = Path(__file__).parent
IN_VM = ("driver", "migration")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stop when driver or migration tests were started outside the machine.

    They load modules, make network namespaces and kill processes; running them
    on the developer's own system is never what was meant.
    """
    if os.environ.get("UMEM_VM"):
        return
    for item in items:
        path = Path(item.path)
        if path.is_relative_to(TESTS) and path.relative_to(TESTS).parts[0] in IN_VM:
            name = item.nodeid
            raise pytest.UsageError(f"{name} runs in the test machine: make test T={name}")
