# SPDX-License-Identifier: Apache-2.0
"""Versions of the engines that dump supports, since it reaches into them."""

from packaging.specifiers import SpecifierSet
from packaging.version import Version

# Of 0.33, which has no build for a CPU, only the classes around the connector were run.
SUPPORTED_VLLM = ">=0.28,<0.34"
# Both read in their sources, neither ever run.
SUPPORTED_TENSORRT_LLM = ">=1.2,<1.4"


def is_within(found: str, supported: str) -> bool:
    """Whether version `found` is one of `supported`, by its release: 0.32.0+cpu is 0.32.0."""
    return Version(Version(found).base_version) in SpecifierSet(supported)
