# SPDX-License-Identifier: Apache-2.0
"""The section `train` of a recipe."""

import os
from typing import ClassVar, Literal

import pydantic

from shared.config import StageConfig, identity, operational

RANK_VARIABLE = "RANK"  # as torchrun and accelerate set it


def rank() -> int:
    """This process's number among those that train together; 0 where it trains alone."""
    return int(os.environ.get(RANK_VARIABLE) or 0)


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
        "target_train",
        "aux_layers",
        "max_length_tokens",
        "draft_vocab_size",
        "seed",
    )

    epochs: int = identity(2, "Passes over the training samples.", ge=1)
    batch_tokens: int = identity(
        16384, "Tokens of one optimizer step, of all ranks and micro-batches together.", ge=8
    )
    learning_rate: float = identity(1e-4, "Peak learning rate of AdamW.", gt=0)
    warmup_fraction: float = identity(0.02, "Share of the steps that warm up.", ge=0, lt=1)
    schedule: Literal["cosine", "linear"] = identity("cosine", "How the learning rate decays.")
    min_lr_fraction: float = identity(0.1, "Share of the peak that decay ends at.", ge=0, le=1)
    beta1: float = identity(0.9, "AdamW's first beta.", ge=0, lt=1)
    beta2: float = identity(0.95, "AdamW's second beta.", ge=0, lt=1)
    weight_decay: float = identity(0.0, "AdamW's weight decay.", ge=0)
    max_grad_norm: float = identity(1.0, "Gradients are clipped to this norm.", gt=0)
    ttt_steps: int = identity(4, "TTT steps: how deep a chain is trained.", ge=1)
    loss_decay: float = identity(0.9, "Weight of step k's loss is loss_decay**k.", gt=0, le=1)
    intermediate_size: int | None = identity(None, "The head's MLP width; default the target's.")
    num_layers: int = identity(1, "Decoder layers of the head; only 1 is served.", ge=1)
    init_from: str | None = identity(
        None, "Warm start: an exported head whose weights and vocabulary are taken over."
    )
    train_lm_head: bool = identity(True, "Train lm_head from the target's rows; else keep them.")
    mixed_precision: Literal["no", "bf16"] = identity(
        "no", "bf16 runs matrix products in bfloat16."
    )
    max_samples: int | None = identity(
        None, "Train on at most so many samples; the same ones are held out whatever it is.", ge=1
    )
    holdout_fraction: float = identity(0.05, "Share of the samples kept for the walk.", ge=0, lt=1)
    max_holdout_samples: int = identity(128, "Most samples kept for the walk.", ge=1)
    walk_tokens: int = identity(3, "Draft length K of the walked acceptance length.", ge=1)
    eval_every_steps: int = identity(
        100, "Steps between two walks; the best walk is exported.", ge=1
    )

    dump_of: str | None = operational(
        None,
        "Another run of this workspace whose finished dump to train on. Links to its dump and synth "
        "are made in this run's folder; then ops run --only train,bench.",
    )
    micro_batch_tokens: int | None = operational(
        None, "Tokens of one forward pass on one rank; less takes less memory, never other results."
    )
    distributed: Literal["ddp", "fsdp2"] = operational(
        "ddp", "How several ranks share a step: each holds the whole state, or a part of it."
    )
    recompute_activations: bool = operational(
        False, "Compute the layer's activations again in the backward pass: slower, less memory."
    )
    checkpoint_every_steps: int = operational(100, "Steps between two checkpoints.", ge=1)
    keep_checkpoints: int = operational(2, "Newest checkpoints kept, beside the best one.", ge=1)
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = operational(
        (), "Trackers that get loss, accuracies and walks."
    )
    profile_ranges: bool = operational(False, "Name the parts of a step for a CUDA profiler.")
    export_dtype: Literal["bfloat16", "float32"] = identity("bfloat16", "Type of the export.")

    @pydantic.field_validator("num_layers")
    @classmethod
    def _one_layer(cls, num_layers: int) -> int:
        if num_layers != 1:
            raise ValueError(
                "a draft head has one layer: `midlayer.*`, the layout that vLLM, SGLang and "
                "TensorRT-LLM all load, names one, and each further layer would be paid for at "
                "every drafted token"
            )
        return num_layers

    @property
    def process_name(self) -> str:
        """Ranks other than the first log beside it, under a name of their own."""
        return f"train-rank{rank()}" if rank() else "train"


class VocabConfig(TrainConfig):
    """Makes the draft vocabulary from dump's token counts and tells what share of answers it holds.

    In:  <workspace>/<run>/dump/token_freq.pt.
    Out: <workspace>/<run>/train/d2t.npy and t2d.npy. A later `train` uses the same ones.
    """


class ExportConfig(TrainConfig):
    """Exports a checkpoint of a training, finished or not, in a layout of your choice.

    In:  <workspace>/<run>/train/checkpoints/ and d2t.npy.
    Out: the folder --output; an earlier export there is replaced.
    """

    checkpoint: str = operational("best", "best, latest, or the path of a checkpoint.")
    format: Literal["hf", "speculators"] = operational(
        "hf", "hf is what vLLM, SGLang and TensorRT-LLM load; speculators that library's layout."
    )
    output: str | None = operational(
        None, "The folder to write; default <workspace>/<run>/export-<format>."
    )
    push_to: str | None = operational(None, "Upload it to this hub repository, as a private one.")
