# SPDX-License-Identifier: Apache-2.0
"""What two stages must agree on, and the plumbing that all of them need. Never a stage, never vllm."""
