# SPDX-License-Identifier: Apache-2.0
"""The example page, examples/space_app.py, and two tiny pipelines for it to show."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from support import tiny_pipeline

import diffusers_dq as dq

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
EXAMPLE = Path(__file__).parents[2] / "examples" / "space_app.py"


@pytest.fixture(scope="package")
def app() -> Iterator[Any]:
    """The module."""
    spec = importlib.util.spec_from_file_location("space_app", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["space_app"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["space_app"]


@pytest.fixture(scope="package")
def pair(app: Any) -> Any:
    """Of pictures of 16 x 16, more than SSIM's window; two classes, one of which has two names."""
    reference = tiny_pipeline(sample_size=16)
    reference.labels = {"cat": 1, "dog": 0, "puppy": 0}
    quantized = deepcopy(reference)
    dq.quantize(quantized, dq.DQConfig("rtn", weight_bits=4), progress=False)
    return app.Pair(reference, quantized, "tiny", app.names_of(reference))
