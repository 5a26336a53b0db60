# SPDX-License-Identifier: Apache-2.0
"""Which of the target's hidden states feed the draft head, and in whose numbering.

The same physical state has two numbers in the field. Ours is vLLM's, the *boundary* number: id i is
the state that ENTERS layer i, so id 0 is the embedding and id L is the state after the last layer,
before the final norm. SGLang and TensorRT-LLM count the layer whose OUTPUT it is: i - 1.

Worked example, L = 8 layers: the default ids are (2, 4, 5). HF's `hidden_states[2]` is the same
state as our id 2 (it enters layer 2), SGLang calls it 1 (it leaves layer 1). Our id 8 is the final
state before the norm, whereas HF's `hidden_states[8]` comes after the norm.
"""

import itertools
from collections.abc import Sequence

from shared.errors import UserError

LAYER_ID_CONVENTION = (
    "boundary: id i is the state entering layer i; id L is the final state, prenorm"
)
MIN_LAYERS_FOR_DEFAULT = 7
STATE_BYTES = 2  # bfloat16


def default_aux_layers(num_layers: int) -> tuple[int, int, int]:
    """The three ids every peer trains on: near the start, the middle and near the end.

    Below seven layers they would not be distinct (L = 6 gives 2, 3, 3).

    Raises:
        UserError: the target has fewer than seven layers.
    """
    if num_layers < MIN_LAYERS_FOR_DEFAULT:
        raise UserError(
            f"the default aux layers need a target of at least {MIN_LAYERS_FOR_DEFAULT} layers, "
            f"found {num_layers}.",
            code="aux-layers-no-default",
            remedy="Set run.aux_layers in the recipe, for example [1, 2, 3].",
            facts={"num_layers": num_layers},
        )
    return (2, num_layers // 2, num_layers - 3)


def resolve_aux_layers(requested: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """The checked ids: `requested`, or the default where it is None.

    vLLM sorts and merges bad ids in silence, so they must be strictly ascending and below L here.

    Raises:
        UserError: ids repeat, descend, or lie outside 0 <= id < L.
    """
    if requested is None:
        return default_aux_layers(num_layers)
    ids = tuple(int(layer) for layer in requested)
    ascending = all(low < high for low, high in itertools.pairwise(ids))
    if not ids or not ascending or ids[0] < 0 or ids[-1] >= num_layers:
        raise UserError(
            f"run.aux_layers: expected distinct ids in ascending order, each 0 <= id < {num_layers} "
            f"(the target's layers), found {list(ids)}.",
            code="aux-layers-invalid",
            remedy="Correct them, or leave them out for the default.",
            facts={"aux_layers": list(ids), "num_layers": num_layers},
        )
    return ids


def to_output_ids(aux_layers: Sequence[int]) -> list[int]:
    """Our ids in the numbering of SGLang and TensorRT-LLM: the layer whose output it is."""
    return [layer - 1 for layer in aux_layers]


def state_bytes(
    num_tokens: int, num_aux: int, hidden_size: int, state_dtype: str = "bfloat16"
) -> int:
    """Bytes of the stored states of `num_tokens` tokens: A aux layers and the final state.

    bfloat16: T * (A+1) * H * 2. fp8: the aux layers take H bytes and a scale of two each.
    """
    aux_bytes = (
        hidden_size * STATE_BYTES if state_dtype == "bfloat16" else hidden_size + STATE_BYTES
    )
    return num_tokens * (num_aux * aux_bytes + hidden_size * STATE_BYTES)
