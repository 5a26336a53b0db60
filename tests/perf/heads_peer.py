# SPDX-License-Identifier: Apache-2.0
"""speculators' own `train` command on the states of our dump, in an environment that holds it.

    python -m tests.perf.heads_peer DUMP TARGET VOCABULARY OUTPUT --batch-tokens N --epochs N

Everything is its default (model, loss, TTT steps, optimizers, rates, schedule, packing, a validation and
a checkpoint after each epoch), except for what a machine without an accelerator and a fair table ask
for: float32 unless told otherwise, sdpa attention and the loss without Triton, our draft vocabulary, and
our dump's training and held-out samples in place of its own files. The last line is JSON: what was
trained, and where the checkpoint is that it calls the best.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from speculators.train import cli, dataloader, trainer
from speculators.train.config import TrainConfig
from speculators.train.data import BaseDataset, BatchType

from shared.contracts.hidden_states import read_data_config
from stages.train.data.dataset import Dataset, Sample

HELD_OUT = {"holdout_fraction": 0.05, "max_holdout_samples": 128}  # train's defaults
SAMPLED = ("input_ids", "hidden_states", "verifier_last_hidden_states", "loss_mask")


class States(BaseDataset):
    """Samples of a dump as its own loader hands them out."""

    def __init__(
        self, dataset: Dataset, samples: list[Sample], batch_tokens: int, dtype: torch.dtype
    ) -> None:
        self.dataset, self.samples = dataset, samples
        super().__init__(batch_tokens, dtype)

    def __len__(self) -> int:
        return len(self.samples)

    def _compute_approx_lengths(self) -> list[int]:
        return [sample.num_tokens for sample in self.samples]

    def _get_raw_data(self, index: int) -> BatchType:
        sample = self.samples[index]
        shard = self.dataset.shards[sample.shard]
        states = shard.states(sample.rows)  # [T, A+1, H]
        values = (
            shard.input_ids[sample.rows].long(),
            states[:, :-1].flatten(1),
            states[:, -1],
            shard.loss_mask[sample.rows].bool(),
        )
        return dict(zip(SAMPLED, values, strict=True))


class OnCpu(trainer.Trainer):
    """Its trainer with a clock; it takes the rank for the device."""

    seconds, steps = 0.0, 0

    def run_training(self) -> None:
        started_s = time.monotonic()
        super().run_training()
        OnCpu.seconds, OnCpu.steps = time.monotonic() - started_s, self.global_step


def read(dump: Path) -> Dataset:
    """The dump, split as our training splits it."""
    names = [path.name for path in dump.glob("shard_*.pt")]
    return Dataset(dump, read_data_config(dump), names, **HELD_OUT)


def settings(options: argparse.Namespace) -> TrainConfig:
    """What its command line makes of the flags; all others are its defaults."""
    layers = read_data_config(options.dump)["hidden_states"]["aux_layer_ids"]
    flags = {
        "verifier-name-or-path": options.target,
        "target-layer-ids": layers,
        "d2t-path": options.vocabulary / "d2t.npy",
        "t2d-path": options.vocabulary / "t2d.npy",
        "mask-token-id": 0,  # EAGLE-3 has none; without it the tokenizer is asked
        "total-seq-len": options.batch_tokens,
        "epochs": options.epochs,
        "hidden-states-dtype": options.dtype,
        "draft-attn-impl": "sdpa",
        "loss-implementation": "eager",
        "save-path": options.output,
        "log-freq": 10**9,
    }
    if options.max_steps:
        flags["max-steps"] = options.max_steps
    words: list[str] = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return TrainConfig.resolve(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("dump", "target", "vocabulary", "output"):
        parser.add_argument(name, type=Path)
    for name in ("--batch-tokens", "--epochs", "--max-steps"):
        parser.add_argument(name, type=int)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    dataset = read(options.dump)
    hidden_size = dataset.shards[0].states(slice(0, 1)).shape[-1]

    def loaders(**_: object) -> tuple[object, object]:
        made = [
            dataloader._setup_dataloader(
                States(dataset, samples, options.batch_tokens, getattr(torch, options.dtype)),
                options.batch_tokens,
                hidden_size,
                num_workers=0,
                preprocess=cli.shift_batch,
                seed=config.seed,
            )
            for samples in (dataset.training, dataset.held_out)
        ]
        return made[0], made[1]

    config = settings(options)
    cli.create_train_val_loaders = loaders
    cli.Trainer = OnCpu
    trainer.get_local_rank = lambda: "cpu"
    torch.accelerator.synchronize = lambda *_: None
    cli.main(config)
    tokens = sum(sample.num_tokens for sample in dataset.training)
    best = (options.output / "checkpoint_best").resolve()
    found = {
        "steps": OnCpu.steps,
        "seconds": round(OnCpu.seconds, 1),
        "epoch_tokens": tokens,
        "head": str(best),
    }
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
