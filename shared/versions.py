# SPDX-License-Identifier: Apache-2.0
"""Which versions of foreign engines the stages were tried with."""

SUPPORTED_VLLM = ">=0.28,<0.33"  # by dump, which reaches into the engine
# By dump; both read in their sources, neither ever run.
SUPPORTED_TENSORRT_LLM = ">=1.2,<1.4"
