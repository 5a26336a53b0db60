# SPDX-License-Identifier: Apache-2.0
"""Capture by TensorRT-LLM."""
