# SPDX-License-Identifier: Apache-2.0
"""Shards from an engine: capture, check, write; each shard whole with its sidecar, or not there.

The sidecar, written after the shard, holds its checksum and what the checks found, so that a later
run trusts it without reading gigabytes again.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from shared import files, hidden_states
from shared import target as targets
from shared.target import TargetConfig
from stages.dump.checks import Agreement, check_sample
from stages.dump.config import DumpConfig
from stages.dump.run import ShardPlan, read_sidecar, sidecar

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Yields (index, states [T, A+1, H]) for each row of ids, in any order."""

    def run(self, rows: Sequence[Sequence[int]]) -> Iterable[tuple[int, torch.Tensor]]: ...


@contextlib.contextmanager
def open_engine(
    config: DumpConfig, target_config: TargetConfig, aux_layers: tuple[int, ...]
) -> Iterator[Engine]:
    """The recipe's engine, loaded for the length of the block."""
    if config.engine == "hf":
        from stages.dump.engine_hf import HfCapture

        with HfCapture(
            target=target_config.folder,
            aux_layers=aux_layers,
            num_layers=target_config.num_layers,
            max_length_tokens=config.run.max_length_tokens,
            dtype=config.dtype,
            trust_remote_code=config.run.trust_remote_code,
            max_num_batched_tokens=config.batch_tokens,
        ) as engine:
            yield engine
    else:
        # Read when vLLM is imported. Its own progress would drown the stage's.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from stages.dump.engine_vllm import VllmCapture

        with VllmCapture(
            target=target_config.folder,
            aux_layers=aux_layers,
            num_layers=target_config.num_layers,
            max_length_tokens=config.run.max_length_tokens,
            dtype=config.dtype,
            trust_remote_code=config.run.trust_remote_code,
            tensor_parallel=config.tensor_parallel_size,
            max_num_batched_tokens=config.batch_tokens,
            scratch=config.paths.root / "tmp",
            seed=config.run.seed,
        ) as engine:
            yield engine


class ShardWriter:
    """Writes planned shards into a folder, and remembers what is there."""

    def __init__(
        self,
        folder: Path,
        target_config: TargetConfig,
        aux_layers: tuple[int, ...],
        *,
        min_agreement: float,
    ) -> None:
        self.folder = folder
        self.min_agreement = min_agreement
        self.target_config = target_config
        self.num_states = len(aux_layers) + 1
        self.tensors = targets.read_tensors(target_config)
        self.checksums: dict[str, str] = {}
        self.tokens = 0
        self._hits = 0
        self._asked = 0

    def is_written(self, plan: ShardPlan) -> bool:
        """Whether an earlier run left this very shard."""
        found = read_sidecar(self.folder, plan.index)
        path = self.folder / hidden_states.shard_name(plan.index)
        if found is None or not path.exists() or path.stat().st_size != found["bytes"]:
            return False
        if found["sample_ids"] != plan.sample_ids or found["tokens"] != plan.num_tokens:
            return False
        self._remember(plan, found["sha256"], found["hits"], found["asked"])
        return True

    def write(self, plan: ShardPlan, engine: Engine) -> None:
        """Capture, check and write one shard.

        Raises:
            OutputError: the states fail a check; nothing of the shard is kept.
        """
        states: dict[int, torch.Tensor] = {}
        agreement = Agreement(self.target_config, self.tensors)
        for index, captured in engine.run(plan.input_ids):
            check_sample(
                plan.sample_ids[index],
                captured,
                num_tokens=len(plan.input_ids[index]),
                num_states=self.num_states,
            )
            ids, mask = plan.input_ids[index], plan.loss_masks[index]
            agreement.add(torch.tensor(ids), torch.tensor(mask), captured)
            states[index] = captured
        name = hidden_states.shard_name(plan.index)
        agreement.require(self.min_agreement, name)
        path = self.folder / name
        hidden_states.write_shard(
            path,
            input_ids=plan.input_ids,
            loss_masks=plan.loss_masks,
            states=[states[index] for index in range(len(plan.input_ids))],
            sample_ids=plan.sample_ids,
        )
        digest = files.sha256(path)
        facts = {
            "sha256": digest,
            "bytes": path.stat().st_size,
            "tokens": plan.num_tokens,
            "hits": agreement.hits,
            "asked": agreement.asked,
            "sample_ids": plan.sample_ids,
        }
        files.write_json(sidecar(self.folder, plan.index), facts)
        self._remember(plan, digest, agreement.hits, agreement.asked)
        logger.info("%s: %d samples, agreement %.4f", name, len(plan.sample_ids), agreement.share)

    def _remember(self, plan: ShardPlan, digest: str, hits: int, asked: int) -> None:
        self.checksums[hidden_states.shard_name(plan.index)] = digest
        self.checksums[sidecar(self.folder, plan.index).name] = ""
        self.tokens += plan.num_tokens
        self._hits += hits
        self._asked += asked

    def agreement(self) -> float:
        """Share of answer tokens that the stored states predict, over all shards."""
        return self._hits / self._asked if self._asked else 1.0
