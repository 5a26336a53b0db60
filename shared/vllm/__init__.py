# SPDX-License-Identifier: Apache-2.0
"""How vLLM is addressed and which versions are known; nothing here imports it."""
