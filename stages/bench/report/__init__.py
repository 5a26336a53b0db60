# SPDX-License-Identifier: Apache-2.0
"""What was measured, told: report.json, the page, the terminal, the gates."""
