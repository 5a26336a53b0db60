# SPDX-License-Identifier: Apache-2.0
"""A head made to fit one's own traffic: the traffic's rows, and the run that learns from them."""
