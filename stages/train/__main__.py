# SPDX-License-Identifier: Apache-2.0
"""`python -m stages.train`: train a draft head on dump's hidden states."""

from shared.cli import launch
from stages.train.commands import CheckHeadConfig, CurveConfig, ExportConfig, VocabConfig
from stages.train.config import TrainConfig

if __name__ == "__main__":
    launch(
        "train",
        {
            "run": (TrainConfig, "stages.train.run:run"),
            "export": (ExportConfig, "stages.train.run:run_export"),
            "check-head": (CheckHeadConfig, "stages.train.export.check:run"),
            "curve": (CurveConfig, "stages.train.curve:run"),
            "vocab": (VocabConfig, "stages.train.run:run_vocab"),
        },
        unlogged=("check-head",),
    )
