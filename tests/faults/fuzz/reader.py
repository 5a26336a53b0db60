# SPDX-License-Identifier: Apache-2.0
"""What a reader of files is, and the small model that all their files are of."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io import files

LAYERS, SIZE, VOCAB, AUX = 8, 8, 16, (2, 4, 5)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": SIZE,
    "vocab_size": VOCAB,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


@dataclasses.dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        make: writes a whole file, and what must lie beside it, below a folder; returns its path.
        read: reads it; raises one of `refusals` where it is damaged, or takes what is left of it.
        form: what the file is, for damage that knows (`mutate.damage`).
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    form: str = "bytes"
    refusals: tuple[type[Exception], ...] = (UserError,)
    names_file: bool = True


def written(path: Path, value: Any) -> Path:
    files.write_json(path, value)
    return path
