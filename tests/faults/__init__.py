# SPDX-License-Identifier: Apache-2.0
"""Damaged files: every reader refuses them with one message that names the file.

python -m tests.faults.fuzz --executions 50000
"""
