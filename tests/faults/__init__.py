# SPDX-License-Identifier: Apache-2.0
"""Faults on purpose: stages that are disturbed recover, damaged files are refused by name (README.md)."""
