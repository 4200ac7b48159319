# SPDX-License-Identifier: Apache-2.0
"""python -m diffusers_dq_kernels.tune"""

import sys

from ._command import main

sys.exit(main())
