# SPDX-License-Identifier: Apache-2.0
"""Failures on purpose, against the real stages and engines: they make triage's recorded logs."""
