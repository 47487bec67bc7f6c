# SPDX-License-Identifier: GPL-2.0-or-later
"""A failed test of a migration shows what every program and every guest said."""

from collections.abc import Generator

import pytest

from tests.migration.world import WORLDS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Also where a world serves all tests of a file, and outlives the one that failed."""
    report = yield
    if report.failed:
        report.sections += [("world", world.told()) for world in WORLDS]
    return report
