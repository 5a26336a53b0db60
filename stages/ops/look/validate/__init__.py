# SPDX-License-Identifier: Apache-2.0
"""Every artifact of a run opened and checked."""
