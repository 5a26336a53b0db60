# SPDX-License-Identifier: Apache-2.0
"""The measurement as report.json, page and terminal tables, and its gates."""
