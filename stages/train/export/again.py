# SPDX-License-Identifier: Apache-2.0
"""When a finished export is made again: only its dtype differs, so the training stays."""

import logging

from shared.artifacts.artifact import Artifact
from shared.artifacts.manifest import MANIFEST, read_manifest
from shared.artifacts.unfinished import IDENTITY
from shared.io import files

logger = logging.getLogger(__name__)


def forget_other_dtype(export: Artifact) -> None:
    """Export again if the finished export differs in dtype alone: no training is lost."""
    manifest = read_manifest(export.folder)
    found = export.config.with_defaults(manifest["identity"] if manifest else {})
    key = "input.export_dtype"
    is_other = found.get(key) not in (None, export.identity[key])
    if is_other and {**found, key: export.identity[key]} == export.identity:
        logger.info("exporting again in %s", export.identity[key])
        files.unlink(export.folder, MANIFEST, IDENTITY)
