# SPDX-License-Identifier: Apache-2.0
"""A running stage: its log, status, processes and processor."""
