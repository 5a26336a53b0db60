# SPDX-License-Identifier: Apache-2.0
"""Which versions of foreign engines the stages were tried with."""

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED_VLLM = ">=0.28,<0.33"  # by dump, which reaches into the engine
# By dump; both read in their sources, neither ever run.
SUPPORTED_TENSORRT_LLM = ">=1.2,<1.4"


def is_within(found: str, supported: str) -> bool:
    """Whether version `found` is one of `supported`, by its release: 0.32.0+cpu is 0.32.0."""
    return Version(Version(found).base_version) in SpecifierSet(supported)
