# SPDX-License-Identifier: Apache-2.0
"""Our side of the benchmark: the stage's own step, on the stage's own classes."""

import torch
from accelerate import Accelerator

from shared.contracts.head_config import HeadConfig
from shared.target.tensors import FinalNorm
from stages.train.data.batch import Batch
from stages.train.loop.optimizer import make_optimizer
from stages.train.loop.step import TrainingStep, train_step
from stages.train.model import DraftHead
from stages.train.objective.target_output import TargetOutput
from tests.perf import problem, switches
from tests.perf.problem import Shape


class Ours:
    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, without: str
    ) -> None:
        self.shape = shape
        precision = {torch.float32: "no", torch.bfloat16: "bf16"}[dtype]
        self.accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
        tensors = problem.weights(shape)
        target = {name: tensors.pop(name) for name in list(tensors) if name.startswith("target.")}
        head = DraftHead(
            head_config(shape), embed_tokens=target["target.embed_tokens"], d2t=tensors.pop("d2t")
        )
        head.load_state_dict(tensors, strict=False)
        rows = target["target.lm_head"].to(device, dtype)
        norm = FinalNorm(target["target.norm"].to(device), problem.EPS)
        output = TargetOutput(norm, rows)
        if without:
            switches.switch_off(without)
        step = TrainingStep(head, output, num_steps=shape.ttt_steps, decay=problem.DECAY)
        self.module = step.to(device)
        fused = without != "optimizer"
        self.optimizer = make_optimizer(head, learning_rate=1e-4, fused=fused)
        self.batches: dict[float, Batch] = {}

    def batch(self, share: float) -> Batch:
        if share not in self.batches:
            row = problem.row(self.shape, share)
            size = self.shape.document_tokens
            batch = Batch(
                input_ids=row.input_ids,
                loss_mask=row.loss_mask,
                aux_states=row.aux_states,
                final_states=row.final_states,
                offsets=torch.arange(0, len(row.input_ids) + 1, size),
                in_vocab=torch.ones_like(row.loss_mask),
                sample_ids=("row",),
            )
            if self.accelerator.device.type != "cpu":  # as the loader hands it to the step
                batch = batch.planned(self.shape.ttt_steps, blocks=False)
            self.batches[share] = batch.to(self.accelerator.device)
        return self.batches[share]

    def step(self, share: float) -> None:
        train_step(
            self.accelerator,
            self.module,
            self.optimizer,
            [self.batch(share)],
            num_steps=self.shape.ttt_steps,
            max_grad_norm=1.0,
        )

    def gradients(self, share: float) -> tuple[float, dict[str, torch.Tensor]]:
        with self.accelerator.autocast():
            loss, _ = self.module(self.batch(share))
        self.accelerator.backward(loss)
        grads = {
            name: p.grad for name, p in self.module.head.named_parameters() if p.grad is not None
        }
        return loss.item(), grads

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def head_config(shape: Shape) -> HeadConfig:
    return HeadConfig(
        hidden_size=shape.hidden,
        target_hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        draft_vocab_size=shape.draft_vocab,
        rms_norm_eps=problem.EPS,
        rope_theta=problem.ROPE_THETA,
        max_position_embeddings=4096,
        aux_layers=tuple(range(2, 2 + problem.NUM_AUX)),
    )
