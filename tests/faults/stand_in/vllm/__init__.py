# SPDX-License-Identifier: Apache-2.0
"""A stand-in for vLLM, found first where this folder's parent leads $PYTHONPATH: its server alone."""
