# SPDX-License-Identifier: Apache-2.0
"""Every reader of files: how to make a whole file for it, and how it is read.

A damaged file must end in the reader's own refusal, which names it, and in nothing else.
"""

from tests.faults.fuzz.reader import Reader
from tests.faults.fuzz.readers_of_models import MODELS
from tests.faults.fuzz.readers_of_rows import ROWS
from tests.faults.fuzz.readers_of_runs import RUNS
from tests.faults.fuzz.readers_of_states import STATES

READERS: dict[str, Reader] = {**RUNS, **MODELS, **ROWS, **STATES}
