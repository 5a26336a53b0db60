# SPDX-License-Identifier: Apache-2.0
"""What heads are held to: the demo's target, by transformers."""

import pytest

from tests.engine.conftest import Demo
from tests.engine.train.references import Reference, make_references


@pytest.fixture(scope="session")
def references(demo: Demo) -> list[Reference]:
    return make_references(demo.target)
