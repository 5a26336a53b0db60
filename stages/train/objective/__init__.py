# SPDX-License-Identifier: Apache-2.0
"""What is minimised, and the walked acceptance length."""
