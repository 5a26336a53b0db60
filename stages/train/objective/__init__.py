# SPDX-License-Identifier: Apache-2.0
"""The loss, and the walked acceptance length."""
