# SPDX-License-Identifier: Apache-2.0
"""A stand-in for vLLM, found first where this folder's parent leads $PYTHONPATH: its server, and the
answer that every head is good.
"""

import json
import sys
from pathlib import Path

_GOOD = {
    "vllm_version": "stand-in",
    "max_draft_length": 32,
    "unknown_options": [],
    "refused": {},
    "dropped": [],
    "unwritten": {},
    "aux_layers": None,
    "num_aux_states": None,
    "is_quantised": False,
}

if "stages.bench.ask_vllm" in sys.orig_argv:
    Path(sys.orig_argv[-1]).write_text(json.dumps(_GOOD))
    sys.exit(0)
