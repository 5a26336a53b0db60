# SPDX-License-Identifier: Apache-2.0
"""Which targets vLLM serves an EAGLE-3 head to, as far as a table can say: `hooks.yaml`."""

import functools
from pathlib import Path
from typing import Any

import yaml


@functools.cache
def read_hooks() -> dict[str, Any]:
    """`vllm`, its version; `architectures` with hooks, `without` them, and `removed` from vLLM.

    Of those with hooks, `gpus_only` names what does not run on a CPU; of all, `torchvision` what vLLM
    does not import without it.
    """
    path = Path(__file__).with_name("hooks.yaml")
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
