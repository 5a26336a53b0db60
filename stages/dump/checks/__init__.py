# SPDX-License-Identifier: Apache-2.0
"""Whether captured states are right, and what they look like when they are not."""
