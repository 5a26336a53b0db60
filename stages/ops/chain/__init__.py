# SPDX-License-Identifier: Apache-2.0
"""What the chain is: its stages as processes, what they will take, what stands in their way."""
