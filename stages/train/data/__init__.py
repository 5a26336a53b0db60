# SPDX-License-Identifier: Apache-2.0
"""Hidden states, read and batched."""
