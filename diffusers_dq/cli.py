# SPDX-License-Identifier: Apache-2.0
"""The command `diffusers-dq` as `python -m diffusers_dq.cli`; diffusers_dq_cli says what its commands are."""

from diffusers_dq_cli import app

__all__ = ["app"]

if __name__ == "__main__":
    app()
