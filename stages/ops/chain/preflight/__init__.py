# SPDX-License-Identifier: Apache-2.0
"""Would this chain fail for a reason that can be seen now? checks.py asks, by subject."""
