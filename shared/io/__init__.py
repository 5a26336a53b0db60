# SPDX-License-Identifier: Apache-2.0
"""Files read and written: whole or not at all, and nothing executed."""
