# SPDX-License-Identifier: Apache-2.0
"""The peers, where they are installed; where not, a message that says how."""

import pytest
import torch

from diffusers_dq.benchmark import peers


@pytest.mark.parametrize("convert", [peers.torchao_int8, peers.torchao_float8, peers.sdnq_int8])
def test_a_peer_that_is_not_installed_names_the_extra(convert, monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr(peers, "import_module", absent)
    with pytest.raises(ImportError, match=r"not usable here .*pip install 'diffusers-dq\[benchmark\]'"):
        convert(torch.nn.Linear(2, 2), {})


@torch.no_grad()
def test_torchao_takes_every_linear_on_the_cpu():
    pytest.importorskip("torchao")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).bfloat16()
    converted = peers.torchao_int8(model, {"0": 2})
    assert type(converted[0].weight) is not torch.nn.Parameter
    assert converted(torch.randn(2, 64).bfloat16()).isfinite().all()
