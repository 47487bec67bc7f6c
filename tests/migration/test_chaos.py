# SPDX-License-Identifier: GPL-2.0-or-later
"""A short one of `make test-chaos`."""

from pathlib import Path

import pytest

from tests.migration.chaos import chaos


@pytest.mark.one_kernel
@pytest.mark.timeout(900)
def test_a_guest_survives_whatever_breaks(tmp_path: Path) -> None:
    with chaos(20111229, tmp_path) as scene:
        for number in range(3):
            print(number, scene.round())
        assert scene.done >= 1
