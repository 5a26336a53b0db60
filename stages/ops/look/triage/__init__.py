# SPDX-License-Identifier: Apache-2.0
"""What failed, why, and what to type next, from logs."""
