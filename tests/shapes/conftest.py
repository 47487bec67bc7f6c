# SPDX-License-Identifier: GPL-2.0-or-later
"""As in tests/migration: a failed test shows what every program said."""

from tests.migration.conftest import pytest_runtest_makereport as pytest_runtest_makereport
