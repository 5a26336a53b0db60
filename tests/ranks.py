# SPDX-License-Identifier: Apache-2.0
"""One rank of a training on random states: `python -m tests.ranks FOLDER ddp|fsdp2`.

Writes for each case the step's loss, counts, unclipped gradients and new weights, gathered.
"""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch.distributed.tensor import DTensor

from shared.contracts.head_config import HeadConfig
from shared.contracts.head_variant import named_variant
from shared.runtime import process
from shared.runtime.children import held_port
from shared.target.tensors import FinalNorm
from stages.train.data.batch import Batch
from stages.train.data.dataset import Sample, split_step
from stages.train.loop import distributed
from stages.train.loop.optimizer import make_optimizer
from stages.train.loop.step import TrainingStep, train_step
from stages.train.model import DraftHead
from stages.train.objective.target_output import TargetOutput

CONFIG = HeadConfig(
    hidden_size=16,
    target_hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=30,
    draft_vocab_size=21,
    rms_norm_eps=1e-5,
    rope_theta=50.0,
    max_position_embeddings=128,
    aux_layers=(1, 2, 4),
)
P_EAGLE = dataclasses.replace(
    CONFIG, variant=named_variant("eagle3.1", parallel=True), mask_token=29
)
NUM_STEPS = 3
# Lengths of the documents of one step, and tokens of a micro-batch.
CASES = {
    "uneven": ((31, 5, 17, 2, 9), 200),
    "micro-batches": ((31, 5, 17, 2, 9, 12), 20),
    "more ranks than documents": ((23,), 200),
    "p-eagle": ((23,), 200),  # a rank whose batch is silent has a gradient of the mask too
}
CONFIGS = dict.fromkeys(CASES, CONFIG) | {"p-eagle": P_EAGLE}


class Documents:
    """Random documents with the dataset's face."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(len(lengths))
        self.samples = [Sample(f"row-{i}", i, slice(0, n)) for i, n in enumerate(lengths)]
        self.documents = [
            Batch(
                input_ids=torch.randint(0, 30, (n,), generator=generator),
                loss_mask=torch.rand(n, generator=generator) < 0.8,
                aux_states=torch.randn(n, 48, generator=generator),
                final_states=torch.randn(n, 16, generator=generator),
                offsets=torch.tensor([0, n]),
                in_vocab=torch.rand(n, generator=generator) < 0.8,
                sample_ids=(f"row-{i}",),
            )
            for i, n in enumerate(lengths)
        ]

    def batch(self, samples: list[Sample]) -> Batch:
        chosen = [self.documents[sample.shard] for sample in samples]
        lengths = torch.tensor([0, *(len(document.input_ids) for document in chosen)])
        tensors = ("input_ids", "loss_mask", "aux_states", "final_states", "in_vocab")
        return Batch(
            **{name: torch.cat([getattr(d, name) for d in chosen]) for name in tensors},
            offsets=lengths.cumsum(0),
            sample_ids=(),
        )


_held = contextlib.ExitStack()


def free_port() -> int:
    """A port that nobody else gets for as long as this process lives."""
    return _held.enter_context(held_port())


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_case(accelerator: Accelerator, how: str, case: str, folder: Path) -> None:
    lengths, micro_tokens = CASES[case]
    documents = Documents(lengths)
    parts = split_step(
        documents.samples, num_ranks=accelerator.num_processes, micro_tokens=micro_tokens
    )[accelerator.process_index]
    micros = [
        documents.batch(part) if part else documents.batch(documents.samples[:1]).silent()
        for part in parts
    ]
    device = accelerator.device
    micros = [micro.planned(NUM_STEPS).to(device) for micro in micros]
    torch.manual_seed(0)
    head = DraftHead(CONFIGS[case], embed_tokens=torch.randn(30, 16), d2t=torch.full((21,), 4))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    norm = FinalNorm((torch.rand(16) + 0.5).to(device), 1e-5)
    target = TargetOutput(norm, torch.randn(21, 16).to(device))
    step = TrainingStep(head, target, num_steps=NUM_STEPS, decay=0.8)
    module = distributed.joined(accelerator, step, how)
    optimizer = make_optimizer(module, learning_rate=1e-2, muon=torch.float32)
    loss, sums = train_step(
        accelerator, module, optimizer, micros, num_steps=NUM_STEPS, max_grad_norm=1e9
    )
    in_vocab_slots = accelerator.reduce(sums.in_vocab_slots)
    total = accelerator.reduce(loss)
    named = distributed.head_of(module).named_parameters()
    gradients = {name: full(parameter.grad).clone() for name, parameter in named}
    own_tokens = sum(sample.num_tokens for part in parts for sample in part)
    tokens = gather_object([own_tokens])
    state = distributed.gather_state(module, optimizer)
    if accelerator.is_main_process:
        found = {
            "loss": total.item(),
            "in_vocab_slots": in_vocab_slots.tolist(),
            "gradients": gradients,
        }
        torch.save({**found, "weights": state["weights"]}, folder / f"{case}.pt")
        (folder / f"{case}-tokens.json").write_text(json.dumps(tokens))


def main() -> None:
    folder, how = Path(sys.argv[1]), sys.argv[2]
    accelerator = Accelerator(
        cpu=os.environ["ACCELERATE_USE_CPU"] == "true",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    for case in CASES:
        run_case(accelerator, how, case, folder)
    accelerator.end_training()
    process.expect_threads_to_outlive_the_work()
    process.leave(0)


if __name__ == "__main__":
    main()
