# SPDX-License-Identifier: Apache-2.0
"""The section `train` of a recipe."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic

from shared.config import StageConfig, identity, number_from, operational

# As torchrun and accelerate set them.
RANK_VARIABLE = "RANK"
LOCAL_RANK_VARIABLE = "LOCAL_RANK"
RANKS_VARIABLE = "WORLD_SIZE"


def rank() -> int:
    """The rank of this process; 0 if it trains alone."""
    return number_from(RANK_VARIABLE)


def num_ranks() -> int:
    """The ranks of this training, over all nodes."""
    return number_from(RANKS_VARIABLE, 1, least=1)


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
    groups: ClassVar[Mapping[str, str]] = {
        "Data": "dump_of follow patience_s max_samples holdout_fraction max_holdout_samples",
        "Model": "variant layer draft_window parallel_drafting ttt_steps loss loss_decay "
        "intermediate_size num_layers init_from init_vocabulary train_lm_head",
        "Optimization": "epochs max_steps batch_tokens optimizer learning_rate warmup_steps plateau_fraction "
        "schedule min_lr_fraction beta1 beta2 weight_decay max_grad_norm",
        "Speed": "mixed_precision micro_batch_tokens distributed recompute_activations "
        "profile_ranges",
        "Output": "walk_tokens eval_every_steps checkpoint_every_minutes checkpoint_every_steps "
        "keep_checkpoints trackers export_dtype",
    }

    epochs: int = identity(
        2,
        "Passes over the training samples, at most; see plateau_fraction. With follow: 1 by default.",
        ge=1,
    )
    max_steps: int | None = identity(
        None,
        "Largest number of optimizer steps, whatever the epochs; the learning rate decays until there.",
        ge=1,
    )
    batch_tokens: Annotated[int, pydantic.Field(ge=8)] | Literal["auto"] = identity(
        "auto",
        "Tokens per optimizer step, over all ranks and micro-batches; auto: by the tokens of the dump "
        "and the epochs, 512 to 16,384.",
    )
    optimizer: Literal["adamw", "muon"] = identity(
        "muon",
        "muon: Muon for the matrices of fc and of the layer, AdamW for lm_head and the norms; adamw: "
        "AdamW for all.",
    )
    learning_rate: Annotated[float, pydantic.Field(gt=0)] | Literal["auto"] = identity(
        "auto",
        "Peak learning rate; auto: by the hidden size and the optimizer, lower for a warm start.",
    )
    warmup_steps: int | None = identity(
        None,
        "Steps over which the learning rate rises to its peak; default: 2 % of the steps, at most "
        "1,000.",
        ge=0,
    )
    plateau_fraction: float | None = identity(
        0.25,
        "Stop when no walk was better over this share of all steps, and at least over five walks; null: "
        "train all epochs.",
        gt=0,
        lt=1,
    )
    schedule: Literal["cosine", "linear"] = identity(
        "cosine", "Decay of the learning rate after its peak."
    )
    min_lr_fraction: float = identity(
        0.1, "Final learning rate, as a share of the peak.", ge=0, le=1
    )
    beta1: float = identity(0.9, "Beta 1 of AdamW.", ge=0, lt=1)
    beta2: float = identity(0.95, "Beta 2 of AdamW.", ge=0, lt=1)
    weight_decay: float = identity(0.0, "Weight decay, of Muon too.", ge=0)
    max_grad_norm: float = identity(
        1.0, "Gradients are clipped to this norm; a large one, such as 1e9, clips nothing.", gt=0
    )
    ttt_steps: int = identity(
        3, "TTT steps: depth of the trained chain. At least the draft length to be served.", ge=1
    )
    loss: Literal["cross_entropy", "lk", "tv", "lk_hybrid"] = identity(
        "cross_entropy",
        "lk: -log of the chance that a sampled token is accepted; tv: 1 minus that chance; lk_hybrid: "
        "cross_entropy while little is accepted, tv later.",
    )
    loss_decay: float = identity(
        0.9, "The loss of TTT step k has the weight loss_decay**k.", gt=0, le=1
    )
    intermediate_size: int | None = identity(
        None, "Width of the head's MLP; default: the target's.", ge=1
    )
    variant: Literal["eagle3", "eagle3.1"] | None = identity(
        None,
        "eagle3.1: a norm for each aux state, and the normed output fed to the next step (vLLM 0.32 "
        "or later); eagle3: neither, for other engines; default: eagle3.1 (with parallel_drafting "
        "eagle3), or what init_from is.",
    )
    layer: Literal["llama", "qwen3"] | None = identity(
        None,
        "qwen3: norms over queries and keys, as vLLM reads them; default: llama, or what "
        "init_from is.",
    )
    draft_window: int | None = identity(
        None,
        "Positions that the head's attention sees, for texts longer than it was trained on; default: "
        "all, or what init_from has.",
        ge=16,
    )
    parallel_drafting: bool | None = identity(
        None,
        "true: P-EAGLE: one forward pass drafts all tokens (vLLM alone, given parallel_drafting too); "
        "default: false, or what init_from does.",
    )
    num_layers: int = identity(1, "Decoder layers of the head; engines serve only 1.", ge=1)
    init_from: str | None = identity(
        None,
        "Warm start: an exported head, a folder or a hub id, whose weights and vocabulary to begin with.",
    )
    init_vocabulary: Literal["keep", "redraw"] = identity(
        "keep",
        "redraw: a warm start keeps the size of the head's vocabulary; the answers' tokens come "
        "first, the head's own fill the rest.",
    )
    train_lm_head: bool = identity(
        True, "true: train lm_head, starting from the target's rows; false: keep those rows."
    )
    mixed_precision: Literal["auto", "no", "bf16"] = identity(
        "auto",
        "bf16: matrix products in bfloat16, weights in float32; no: all in float32; auto: bf16 on a "
        "GPU that has it, on a CPU the faster one, measured once per training.",
    )
    max_samples: int | None = identity(
        None, "Largest number of training samples; the held-out ones do not depend on it.", ge=1
    )
    holdout_fraction: float = identity(
        0.05, "Share of the samples held out to measure the walked acceptance length.", ge=0, lt=1
    )
    max_holdout_samples: int = identity(128, "Largest number of held-out samples.", ge=1)
    walk_tokens: int = identity(3, "Draft length K of the walked acceptance length (tokens).", ge=1)
    eval_every_steps: int = identity(
        100, "Steps between two walks; the head with the best walk is exported.", ge=1
    )

    follow: bool = identity(
        False,
        "Train beside a dump with dump.window_shards: shards are read as they are made, each whole "
        "before the next. epochs is 1 by default, since each further one is another prefill.",
    )
    patience_s: float = operational(
        300.0, "With follow: seconds to wait for a dump that is not at work; then exit 75.", gt=0
    )
    dump_of: str | None = operational(
        None,
        "Another run of this workspace whose finished dump to train on. Links to its dump and synth "
        "are made in this run's folder; then ops run --only train,bench.",
    )
    micro_batch_tokens: int | None = operational(
        None,
        "Tokens per forward pass of a rank; fewer need less memory, with the same result.",
        ge=8,
    )
    distributed: Literal["ddp", "fsdp2"] = operational(
        "ddp", "ddp: each rank holds the whole training state; fsdp2: each holds a part of it."
    )
    recompute_activations: bool = operational(
        False, "Recompute the layer's activations in the backward pass: less memory, slower."
    )
    checkpoint_every_minutes: float = operational(
        5.0, "Minutes between two checkpoints; the head of a new best walk is saved at once.", gt=0
    )
    checkpoint_every_steps: int | None = operational(
        None, "Steps between two checkpoints, instead of minutes.", ge=1
    )
    keep_checkpoints: int = operational(
        2, "Number of newest checkpoints to keep, besides the best one.", ge=1
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = operational(
        (), "Experiment trackers to log loss, accuracy and walks to."
    )
    profile_ranges: bool = operational(
        False, "Mark the parts of a step with NVTX ranges for a CUDA profiler."
    )
    export_dtype: Literal["bfloat16", "float32"] = operational(
        "bfloat16", "dtype of the exported weights; changing it exports again without training."
    )

    def identity(self) -> dict[str, Any]:
        """As every stage's; `follow` is part of it only where it changes the order of the samples."""
        keys = super().identity()
        if not self.follow:
            del keys[f"{self.section}.follow"]
        return keys

    @pydantic.model_validator(mode="after")
    def _follows_its_own_dump(self) -> Self:
        if self.follow and self.dump_of is not None:
            raise ValueError("follow and dump_of exclude each other: a window is one run's own")
        if self.follow and "epochs" not in self.model_fields_set:
            object.__setattr__(self, "epochs", 1)
        return self

    @pydantic.field_validator("num_layers")
    @classmethod
    def _one_layer(cls, num_layers: int) -> int:
        if num_layers != 1:
            raise ValueError(
                "a draft head has one layer: vLLM, SGLang and TensorRT-LLM load the layout "
                "`midlayer.*`, which has one, and every drafted token would pay for more"
            )
        return num_layers

    @pydantic.model_validator(mode="after")
    def _window_over_steps(self) -> "TrainConfig":
        if self.draft_window and self.draft_window <= max(self.ttt_steps, self.walk_tokens):
            raise ValueError("draft_window must be above ttt_steps and walk_tokens")
        return self

    @pydantic.model_validator(mode="after")
    def _masked_steps(self) -> "TrainConfig":
        if self.parallel_drafting and self.ttt_steps < 2:
            raise ValueError(
                "parallel_drafting needs ttt_steps above 1: the first step has no mask"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _redraws_of_a_head(self) -> "TrainConfig":
        if self.init_vocabulary == "redraw" and self.init_from is None:
            raise ValueError("init_vocabulary redraw needs init_from, the head whose it is")
        return self

    @pydantic.model_validator(mode="after")
    def _knows_its_rank(self) -> "TrainConfig":
        if rank() >= num_ranks():
            raise ValueError(
                f"${RANK_VARIABLE}: expected less than ${RANKS_VARIABLE}, {num_ranks()}, found {rank()}"
            )
        number_from(LOCAL_RANK_VARIABLE)
        return self

    @property
    def process_name(self) -> str:
        """Rank 0 logs as `train`, the others as `train-rank<N>`."""
        return f"train-rank{rank()}" if rank() else "train"

    @property
    def is_quiet(self) -> bool:
        """On each node its first rank reports the step of all ranks."""
        return number_from(LOCAL_RANK_VARIABLE) > 0
