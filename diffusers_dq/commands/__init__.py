# SPDX-License-Identifier: Apache-2.0
"""The commands of `diffusers-dq`, each a thin layer over a function of the package. diffusers_dq_cli lists them."""
