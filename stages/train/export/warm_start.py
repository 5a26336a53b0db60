# SPDX-License-Identifier: Apache-2.0
"""`init_from`: a training starts from the weights of a finished head.

Any one-layer EAGLE-3, EAGLE-3.1 or P-EAGLE head that vLLM serves can be started from, in our layout, NVIDIA
ModelOpt's or the speculators library's; what train does not make is refused by name. This is no
resume: step, optimizer and data position start anew. The head's own shape, norms and rotary embedding
are kept, and so is its vocabulary, since it says what the rows of lm_head mean. `init_vocabulary: redraw`
draws one of the same size for the new answers; a token of both vocabularies keeps its row.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.contracts.head_folder import (
    DROPPED_WITHOUT_LOSS,
    MASK_HIDDEN,
    Head,
    draft_token_ids,
    read_head,
    require_mask,
    weight_files,
)
from shared.contracts.head_variant import HeadVariant, named_variant, read_variant
from shared.contracts.rope import not_kept
from shared.errors import UserError
from shared.io import files
from shared.target import model as target
from stages.train.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from shared.contracts.head_config import HeadConfig
    from stages.train.model import DraftHead

# What train makes: a head whose config says otherwise has other maths.
_MADE: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "is_causal": True,
    "logit_scale": 1.0,
    "use_aux_hidden_state": True,  # of eagle_config, where alone engines look for it
}

# Of transformers' LlamaConfig, where a head's config.json leaves it out.
_DEFAULTS = {"max_position_embeddings": 2048}

logger = logging.getLogger(__name__)


def _folder(config: TrainConfig) -> Path:
    return target.locate(
        str(config.init_from),
        config.workspace,
        revision=None,
        label="train.init_from",
        is_head=True,
    )


def fingerprint(config: TrainConfig) -> dict[str, str]:
    """The hash of the head that is taken over, as an input of the artifact.

    Raises:
        UserError: no such folder, or it holds no head.
    """
    if config.init_from is None:
        return {}
    folder = _folder(config)
    digest = hashlib.sha256()
    for path in (folder / "config.json", *weight_files(folder)):
        digest.update(files.sha256(path).encode())
    return {"init_from": digest.hexdigest()}


def load(
    config: TrainConfig,
    embed_tokens: "Tensor",
    lm_head: "Tensor",
    aux_layers: Sequence[int],
    default_aux_layers: Sequence[int],
) -> "DraftHead":
    """The head of `init_from`.

    Args:
        embed_tokens: [V, H] the target's.
        lm_head: [V, H] the target's, for a head without its own.
        aux_layers: whose states the run dumped, in vLLM's numbering.
        default_aux_layers: the layers of a head that names none.

    Raises:
        UserError: it is no head for this target and these states, of a variant that train does not
            make, or for another size of vocabulary.
    """
    import torch

    from shared.contracts.head_config import HeadConfig
    from stages.train.model import DraftHead

    head = read_head(_folder(config))
    _require_made(head)
    require_mask(head)
    _require_aux_layers(head, list(aux_layers), list(default_aux_layers))
    shape = HeadConfig.from_json(
        _DEFAULTS | head.config,
        aux_layers=tuple(aux_layers),
        draft_vocab_size=head.draft_vocab_size,
        variant=read_variant(head.config),
        where=head.folder / "config.json",
    )
    _require_rope(head, shape)
    _require_variant(head, shape.variant, config)
    _require_depth(head, shape.variant, config)
    _require_sizes(head, shape, config, *embed_tokens.shape)
    tensors = _own_tensors(head, embed_tokens, lm_head)
    _require_tensors(head, shape, tensors)
    # Ours ascend; a head with the same rows in another order drafts the same.
    ids, order = torch.tensor(draft_token_ids(head, shape.vocab_size)).sort()
    d2t = None
    if "d2t" in tensors:
        d2t = tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
    warm = DraftHead(shape, embed_tokens=embed_tokens, d2t=d2t)
    warm.load_state_dict(tensors, strict=False)  # t2d follows from d2t
    return warm


def token_ids(config: TrainConfig, own: "Tensor", counts: "Tensor") -> "Tensor":
    """[D] target ids, ascending: the draft vocabulary to train with.

    Redrawn, it holds the answers' tokens by their count, of equally frequent ones first those that the
    head has already; what is left goes to the head's other tokens, the lower ids first.

    Worked example, V = 6, D = 3, the head's ids [0, 1, 2]: counts [0, 0, 4, 0, 0, 7] give [0, 2, 5].

    Args:
        own: [D] the head's, ascending.
        counts: [V] int64, how often each token occurs in the answers.
    """
    from shared.contracts import vocab

    if config.init_vocabulary == "keep":
        return own
    known = vocab.from_token_ids(own, len(counts))
    logger.info(
        "train.init_from: the head's own vocabulary holds %.2f %% of the answers",
        100 * vocab.coverage(known, counts),
    )
    return vocab.from_counts(2 * counts + known.t2d, len(own)).token_ids


def copy_weights(warm: "DraftHead", head: "DraftHead") -> None:
    """Copy the weights into `head`, which has the same shape and maybe another vocabulary.

    A row of lm_head goes with its token; the rows of tokens that `warm` lacks stay as they are, the
    target's.
    """
    import torch

    per_token = ("lm_head.weight", "d2t", "t2d")
    rest = {n: tensor for n, tensor in warm.state_dict().items() if n not in per_token}
    head.load_state_dict(rest, strict=False)
    ours, theirs = head.token_ids(), warm.token_ids()
    is_common = torch.isin(ours, theirs)  # both ascend
    with torch.no_grad():
        rows = torch.searchsorted(theirs, ours[is_common])
        head.lm_head.weight[is_common] = warm.lm_head.weight[rows]


def _unfit(head: Head, problem: str, remedy: str = "Start from another head.") -> UserError:
    return UserError(
        f"train.init_from: {head.folder}: {problem}.",
        code="warm-start-unfit",
        remedy=remedy,
        facts={"head": str(head.folder)},
    )


def _require_made(head: Head) -> None:
    uses_aux = head.nested.get("use_aux_hidden_state", True)
    stated = {**_MADE, **head.config, "use_aux_hidden_state": uses_aux}
    # A null is no to vLLM, which takes a default only for a key that is left out.
    other = {
        name: stated[name]
        for name, made in _MADE.items()
        if (stated[name] or None) != (made or None)
    }
    if other:
        raise _unfit(head, f"it is a kind of head that train does not make: {other}")


def _require_rope(head: Head, shape: "HeadConfig") -> None:
    """The head's rotary embedding is one that a new head may have, so that it is kept."""
    if not (found := not_kept(_DEFAULTS | head.config, shape.head_dim)):
        return
    remedy = "Start from another head."
    if found.keys() == {"mrope_section"} and shape.rope_scaling is None:
        remedy = (
            "Without mrope_section in its config.json it drafts texts as before: remove it from a copy, "
            "or start from another head."
        )
    elif "max_position_embeddings" in found and float(found.get("factor", 0)) > 1:
        rows = int(float(found["factor"]) * int(found["original_max_position_embeddings"]))
        remedy = (
            f"Set max_position_embeddings in a copy of its config.json to {rows}, the positions that "
            "engines have in its table, or start from another head."
        )
    raise _unfit(
        head,
        "expected a rotary embedding that train makes (of the whole width; default, linear, dynamic, "
        f"llama3, or yarn for all positions), found {found}",
        remedy,
    )


def _require_variant(head: Head, found: HeadVariant, config: TrainConfig) -> None:
    """The head is what the settings of its kind ask for, where they ask."""
    parallel = found.parallel if config.parallel_drafting is None else config.parallel_drafting
    asked = named_variant(config.variant, config.layer, config.draft_window, parallel)
    names = [] if config.variant is None else ["norm_before_fc", "fc_norm", "norm_output"]
    names += [] if config.layer is None else ["qk_norm"]
    names += [] if config.draft_window is None else ["window"]
    names += [] if config.parallel_drafting is None else ["parallel"]
    other = {
        name: value for name in names if (value := getattr(found, name)) != getattr(asked, name)
    }
    if other:
        raise _unfit(
            head,
            f"it has {other}, which train.variant {config.variant}, train.layer {config.layer}, "
            f"train.draft_window {config.draft_window} and train.parallel_drafting "
            f"{config.parallel_drafting} do not make",
            "Leave them out: the head keeps its own.",
        )


def _require_depth(head: Head, variant: HeadVariant, config: TrainConfig) -> None:
    """The window shows every step its whole chain, and a mask is trained."""
    deepest, window = max(config.ttt_steps, config.walk_tokens), variant.window
    if window is not None and window <= deepest:
        raise _unfit(head, f"its window of {window} positions is not above {deepest} steps")
    if variant.parallel and config.ttt_steps < 2:
        raise _unfit(head, "it drafts in parallel", "Set train.ttt_steps above 1.")


def _require_sizes(
    head: Head, shape: "HeadConfig", config: TrainConfig, vocab_size: int, hidden_size: int
) -> None:
    """The head's sizes are the target's and the run's."""
    expected = {"vocabulary": vocab_size, "hidden size": hidden_size}
    found = {"vocabulary": shape.vocab_size, "hidden size": shape.hidden_size}
    expected["run.draft_vocab_size"] = config.run.draft_vocab_size
    found["run.draft_vocab_size"] = shape.draft_vocab_size
    if config.intermediate_size is not None:
        expected["train.intermediate_size"] = config.intermediate_size
        found["train.intermediate_size"] = shape.intermediate_size
    if found != expected:
        raise _unfit(head, f"it has {found}, and this run {expected}", "Set the run to the head's.")


def _require_aux_layers(head: Head, ours: list[int], default: list[int]) -> None:
    """The head's layers are the run's; in `eagle_config` alone either numbering may be meant.

    Worked example: alone in `eagle_config`, [2, 4, 5] are the run's [2, 4, 5] or [3, 5, 6]; at the top, or
    where no layers are named and those are the default, [2, 4, 5] only.
    """
    theirs = head.aux_layers or head.nested_aux_layers or default
    meant = [theirs]
    if not head.aux_layers and head.nested_aux_layers:
        meant.append([layer + 1 for layer in theirs])
    if ours not in meant:
        raise _unfit(
            head,
            f"it reads the aux layers {theirs}, and dump captured {ours}",
            f"Set run.aux_layers to {theirs} and dump again, or start from another head.",
        )


def _require_tensors(head: Head, shape: "HeadConfig", tensors: "dict[str, Tensor]") -> None:
    """Its tensors are those that its config.json asks for, and finite.

    Before a module is built: the file's sizes bound its memory, whatever config.json says.
    """
    from shared.contracts.exported_head import expected_tensors

    wanted = {n: list(size) for n, size in expected_tensors(shape).items() if n != "t2d"}
    given = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if wrong := sorted(n for n in wanted.keys() | given.keys() if wanted.get(n) != given.get(n)):
        lines = [f"{name}: {given.get(name)}, expected {wanted.get(name)}" for name in wrong]
        raise _unfit(
            head, f"its tensors are not those that its config.json asks for ({'; '.join(lines)})"
        )
    if broken := sorted(n for n, tensor in tensors.items() if not tensor.float().isfinite().all()):
        raise _unfit(head, f"{', '.join(broken)}: NaN or infinity")


def _own_tensors(head: Head, embed_tokens: "Tensor", lm_head: "Tensor") -> "dict[str, Tensor]":
    import torch

    tensors = {
        name: tensor
        for name, tensor in head.tensors().items()
        if not any(part in name for part in DROPPED_WITHOUT_LOSS)
    }
    if MASK_HIDDEN in tensors:  # [1, 1, A*H] elsewhere
        tensors[MASK_HIDDEN] = tensors[MASK_HIDDEN].reshape(1, -1)
    own = tensors.pop("embed_tokens.weight", None)
    if own is not None and not (
        own.shape == embed_tokens.shape
        and torch.allclose(own.float(), embed_tokens.float(), atol=1e-2)
    ):
        logger.warning(
            "train.init_from: %s has embeddings of its own; the target's replace them", head.folder
        )
    if "lm_head.weight" not in tensors and head.draft_vocab_size == len(lm_head):
        tensors["lm_head.weight"] = lm_head
    return tensors
