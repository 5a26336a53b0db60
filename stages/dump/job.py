# SPDX-License-Identifier: Apache-2.0
"""What one run of dump works on: the rows' source, the target and the artifact they end in."""

from dataclasses import dataclass
from pathlib import Path

from shared.artifacts.artifact import Artifact
from shared.contracts import layers
from shared.target import model as target
from shared.target.model import TargetConfig
from stages.dump.config import DumpConfig
from stages.dump.sources import RowSource, open_source


@dataclass(frozen=True)
class Job:
    """Everything of a run that its steps share. The plan of its shards comes later."""

    config: DumpConfig
    source: RowSource
    target: TargetConfig
    aux_layers: tuple[int, ...]
    artifact: Artifact

    @property
    def folder(self) -> Path:
        return self.artifact.folder

    @property
    def token_bytes(self) -> int:
        """Bytes that one token's states take on the disk."""
        return layers.state_bytes(
            1, len(self.aux_layers), self.target.hidden_size, self.config.state_dtype
        )


def open_job(config: DumpConfig) -> Job:
    """Read what the recipe names, without writing anything.

    Raises:
        UserError: no finished synth artifact, or a changed target.
    """
    source = open_source(config)
    folder = target.locate_trained(config.run, config.workspace)
    target_config = target.read_config(folder, trust_remote_code=config.run.trust_remote_code)
    aux_layers = layers.resolve_aux_layers(config.run.aux_layers, target_config.num_layers)
    target_hash = target.weights_hash(folder)
    source.require_target(folder, target_hash)
    artifact = Artifact(
        config.paths.stage("dump"),
        config,
        parents=source.parents,
        inputs={"target": target_hash, **source.inputs},
    )
    return Job(config, source, target_config, aux_layers, artifact)
