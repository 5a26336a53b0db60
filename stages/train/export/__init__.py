# SPDX-License-Identifier: Apache-2.0
"""The trained head written, read back and pushed."""
