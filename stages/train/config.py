# SPDX-License-Identifier: Apache-2.0
"""The section `train` of a recipe."""

from typing import ClassVar, Literal

from shared.config import StageConfig, identity, operational


class TrainConfig(StageConfig):
    """Trains an EAGLE-3 draft head on dump's hidden states and exports it for vLLM.

    In:  <workspace>/<run>/dump/.
    Out: <workspace>/<run>/train/ (vocabulary, checkpoints, history.jsonl, manifest.json) and
         <workspace>/<run>/export/ (config.json, model.safetensors, README.md, manifest.json).
    """

    section: ClassVar[str] = "train"
    consumes: ClassVar[tuple[str, ...]] = (
        "target",
        "target_revision",
        "aux_layers",
        "max_length_tokens",
        "draft_vocab_size",
        "seed",
    )

    epochs: int = identity(2, "Passes over the training samples.", ge=1)
    batch_tokens: int = identity(16384, "Tokens packed into one step.", ge=8)
    learning_rate: float = identity(1e-4, "Peak learning rate of AdamW.", gt=0)
    warmup_fraction: float = identity(0.02, "Share of the steps that warm up.", ge=0, lt=1)
    min_lr_fraction: float = identity(
        0.1, "Share of the peak that cosine decay ends at.", ge=0, le=1
    )
    beta1: float = identity(0.9, "AdamW's first beta.", ge=0, lt=1)
    beta2: float = identity(0.95, "AdamW's second beta.", ge=0, lt=1)
    weight_decay: float = identity(0.0, "AdamW's weight decay.", ge=0)
    max_grad_norm: float = identity(1.0, "Gradients are clipped to this norm.", gt=0)
    ttt_steps: int = identity(4, "TTT steps: how deep a chain is trained.", ge=1)
    loss_decay: float = identity(0.9, "Weight of step k's loss is loss_decay**k.", gt=0, le=1)
    intermediate_size: int | None = identity(None, "The head's MLP width; default the target's.")
    train_lm_head: bool = identity(True, "Train lm_head from the target's rows; else keep them.")
    mixed_precision: Literal["no", "bf16"] = identity(
        "no", "bf16 runs matrix products in bfloat16."
    )
    holdout_fraction: float = identity(0.05, "Share of the samples kept for the walk.", ge=0, lt=1)
    max_holdout_samples: int = identity(128, "Most samples kept for the walk.", ge=1)
    walk_tokens: int = identity(3, "Draft length K of the walked acceptance length.", ge=1)
    eval_every_steps: int = identity(
        100, "Steps between two walks; the best walk is exported.", ge=1
    )

    checkpoint_every_steps: int = operational(100, "Steps between two checkpoints.", ge=1)
    export_dtype: Literal["bfloat16", "float32"] = identity("bfloat16", "Type of the export.")


class VocabConfig(TrainConfig):
    """Makes the draft vocabulary from dump's token counts and tells what share of answers it holds.

    In:  <workspace>/<run>/dump/token_freq.pt.
    Out: <workspace>/<run>/train/d2t.npy and t2d.npy. A later `train` uses the same ones.
    """
