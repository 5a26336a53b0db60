# SPDX-License-Identifier: Apache-2.0
"""speculators' side of the benchmark, in an environment that holds it (requirements-peers.txt).

Its own model, loss and AdamW, driven as its Trainer drives them: fp32 weights under autocast,
gradients clipped to 1. Two things are set so that both sides do like work: lm_head is trained, and
each TTT step's mask is ours (the whole chain inside the answer). On a CPU attention is sdpa, since its
default, flex, has no backward there, and the loss eager, since the fused one needs Triton. On a card
both are its defaults.
"""

import torch
from speculators import SpeculatorsConfig
from speculators.config import VerifierConfig
from speculators.losses import resolve_loss_config
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig, core
from speculators.models.eagle3.data import shift_batch
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig

from tests.perf import problem
from tests.perf.problem import Shape


class Speculators:
    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.model = Eagle3DraftModel(config=_config(shape, on_cpu=device.type == "cpu"))
        tensors = problem.weights(shape)
        state = {_their_name(name): tensor for name, tensor in tensors.items()}
        state["embed_tokens.weight"] = state.pop("target.embed_tokens")
        state["verifier_lm_head.weight"] = state.pop("target.lm_head")
        state["verifier_norm.weight"] = state.pop("target.norm")
        state["t2d"] = torch.zeros(shape.vocab, dtype=torch.bool)
        state["t2d"][state["d2t"] + torch.arange(shape.draft_vocab)] = True
        self.model.load_state_dict(state)
        self.model.to(device)
        self.model.train()
        self.model.lm_head.weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.model.named_parameters(), lr=1e-4, weight_decay=0.0)
        self.loss_config = resolve_loss_config(
            "kl_div", "eager" if device.type == "cpu" else "fused"
        )
        self.batches: dict[float, tuple[dict[str, torch.Tensor], torch.Tensor]] = {}
        self.gate = torch.empty(0)  # [K, T-1] bool, of the batch in work
        self._compute_metrics = core.compute_metrics
        core.compute_metrics = self._gated_metrics

    def _gated_metrics(self, logits, targets, loss_mask, prev_correct, step, *more, **options):
        """Their loss with slot t of step k masked by our gate; they index the mask by t + k."""
        own = self.gate[step, : self.gate.shape[1] - step]
        mask = torch.cat((own.new_zeros(step), own))[None]
        return self._compute_metrics(logits, targets, mask, prev_correct, step, *more, **options)

    def batch(self, share: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        if share not in self.batches:
            row = problem.row(self.shape, share)
            shifted = shift_batch(
                {
                    "input_ids": row.input_ids,
                    "hidden_states": row.aux_states,
                    "verifier_last_hidden_states": row.final_states,
                    "loss_mask": row.loss_mask,
                    "lengths": torch.tensor([len(row.input_ids)]),
                    "position_ids": torch.arange(len(row.input_ids)) % self.shape.document_tokens,
                }
            )
            shifted.pop("lengths")
            batch = {name: tensor[None].to(self.device) for name, tensor in shifted.items()}
            place = torch.arange(batch["input_ids"].shape[1], device=self.device)
            batch["document_ids"] = (place // self.shape.document_tokens)[None]
            if self.dtype == torch.float32:  # their loader gives the states in the run's dtype
                states = ("hidden_states", "verifier_last_hidden_states")
                batch |= {name: batch[name].float() for name in states}
            gate = problem.counted(row.loss_mask, self.shape.ttt_steps)[:, :-1].to(self.device)
            self.batches[share] = (batch, gate)
        return self.batches[share]

    def _loss(self, share: float) -> torch.Tensor:
        batch, self.gate = self.batch(share)
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        ):
            _, loss, _ = self.model(
                **batch,
                ttt_steps=self.shape.ttt_steps,
                ttt_step_loss_decay=problem.DECAY,
                loss_config=self.loss_config,
            )
        return loss

    def step(self, share: float) -> None:
        loss = self._loss(share)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def gradients(self, share: float) -> tuple[float, dict[str, torch.Tensor]]:
        total = sum(problem.DECAY**step for step in range(self.shape.ttt_steps))
        loss = self._loss(share) / total  # they add the steps up, we weigh them
        loss.backward()
        named = {
            _our_name(name): parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        return loss.item(), named

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def _their_name(name: str) -> str:
    return name.replace("midlayer.", "layers.0.")


def _our_name(name: str) -> str:
    return name.replace("layers.0.", "midlayer.")


def _config(shape: Shape, *, on_cpu: bool) -> Eagle3SpeculatorConfig:
    layer = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        rms_norm_eps=problem.EPS,
        rope_theta=problem.ROPE_THETA,
        max_position_embeddings=4096,
        pad_token_id=None,
    )
    if on_cpu:
        layer._attn_implementation = "sdpa"
    return Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=shape.draft_vocab,
        norm_before_residual=False,
        eagle_aux_hidden_state_layer_ids=list(range(2, 2 + problem.NUM_AUX)),
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=shape.ttt_steps)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
    )
