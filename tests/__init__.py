# SPDX-License-Identifier: Apache-2.0
"""The tests, flat by tier: quick (no engine) and engine (real vLLM)."""
