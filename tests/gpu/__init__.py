# SPDX-License-Identifier: Apache-2.0
"""What only a machine with a card can tell: tests, benchmark, profile; `make gpu-check`."""
