# SPDX-License-Identifier: Apache-2.0
"""The head of a training: new, from `init_from`, or from a checkpoint."""

from pathlib import Path

from shared.contracts import hidden_states, layers, vocab
from shared.contracts.head_config import HeadConfig
from shared.contracts.head_variant import named_variant
from shared.errors import UserError
from shared.target.model import TargetConfig
from shared.target.tensors import TargetTensors, read_tensors
from stages.train.config import TrainConfig
from stages.train.export import warm_start
from stages.train.loop import checkpoint
from stages.train.model import DraftHead
from stages.train.objective import vocabulary


def build(
    config: TrainConfig, target_config: TargetConfig, tensors: TargetTensors, folder: Path
) -> DraftHead:
    """A new head with the target's embeddings and lm_head rows, or the weights of init_from.

    Args:
        folder: of the training, where the draft vocabulary is or will be.
    """
    counts = hidden_states.read_token_freq(config.paths.stage("dump"), target_config.vocab_size)
    num_layers = target_config.num_layers
    aux_layers = layers.resolve_aux_layers(config.run.aux_layers, num_layers)
    warm = None
    if config.init_from:
        default = layers.resolve_aux_layers(None, num_layers)
        warm = warm_start.load(config, tensors.embed_tokens, tensors.lm_head, aux_layers, default)
        token_ids = warm_start.token_ids(config, warm.token_ids(), counts)
        vocabulary.take_over(folder, token_ids, target_config.vocab_size)
    draft = vocabulary.load_or_make(folder, counts, config.run.draft_vocab_size)
    raw = dict(target_config.settings)
    if config.intermediate_size is not None:
        raw["intermediate_size"] = config.intermediate_size
    head_config = (
        warm.config
        if warm
        else HeadConfig.from_json(
            raw,
            aux_layers=aux_layers,
            draft_vocab_size=draft.size,
            variant=named_variant(
                config.variant, config.layer, config.draft_window, config.parallel_drafting
            ),
            where=target_config.folder / "config.json",
        )
    )
    vocab.check(draft)
    head = DraftHead(
        head_config,
        embed_tokens=tensors.embed_tokens,
        d2t=draft.d2t if draft.size < target_config.vocab_size else None,
        lm_head=tensors.lm_head[draft.token_ids].float(),
    )
    if warm is not None:
        warm_start.copy_weights(warm, head)
    return head


def of_checkpoint(
    config: TrainConfig, target_config: TargetConfig, folder: Path, path: Path
) -> tuple[DraftHead, int]:
    """The head of a checkpoint, and its step.

    Raises:
        UserError: there is no such checkpoint, or it is of another head.
    """
    state = checkpoint.load(path)
    if state is None:
        raise UserError(
            f"expected a checkpoint at {path}, found none.",
            code="checkpoint-missing",
            remedy="Train first, or give --checkpoint the path of an existing file.",
            facts={"file": str(path)},
        )
    head = build(config, target_config, read_tensors(target_config), folder)
    try:
        head.load_state_dict(state["weights"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: expected the weights of this head, found: {str(error)[:500]}.",
            code="checkpoint-weights",
            remedy="Give a checkpoint of this recipe.",
            facts={"file": str(path)},
        ) from error
    return head, int(state["step"])
