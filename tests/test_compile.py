# SPDX-License-Identifier: Apache-2.0
"""One compiled graph serves every step, group and step count."""

import pytest
import torch
from support import CALLS, tiny_pipeline

import diffusers_dq as dq

CONFIGS = {
    "htg-w8a8": dict(method="htg", groups=4),
    "htg-w4a8-online-per-layer": dict(
        method="htg", weight_bits=4, groups=3, online=True, scope="layer", ranges="group"
    ),
    "rtn-w8a8-dynamic": dict(method="rtn"),
}


def inputs(step: int, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return dict(
        hidden_states=torch.randn(batch, 4, 8, 8, generator=generator),
        timestep=torch.full((batch,), step),
        class_labels=torch.zeros(batch, dtype=torch.long),
    )


@pytest.fixture(scope="module")
def statistics():
    return dq.calibrate(tiny_pipeline(), CALLS, num_inference_steps=10, progress=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_break_and_no_recompilation_over_the_steps(name, statistics):
    model = tiny_pipeline().transformer
    dq.quantize(model, dq.DQConfig(**CONFIGS[name]), statistics=statistics, progress=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    groups = set()
    with torch.no_grad():
        compiled(**inputs(900))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in (900, 777, 500, 301, 300, 12, 0):
                output = compiled(**inputs(step)).sample
                groups.add(tuple(model.timestep_groups.index.tolist()))
                assert torch.equal(output, model(**inputs(step)).sample), "the eager backend computes the same"
    if "htg" in name:
        assert len(groups) >= 3, "the steps were of several groups"


def test_a_graph_that_python_numbers_switch_would_be_caught():
    """The check above can fail: an attribute that changes as a Python number does recompile."""
    module = torch.nn.Linear(2, 2)
    module.step = 0
    module.register_forward_pre_hook(lambda m, args: (args[0] * m.step,))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    compiled(torch.ones(1, 2))
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match="[Rr]ecompil"):
        for step in (1, 2, 3):
            module.step = step
            compiled(torch.ones(1, 2))


@pytest.mark.slow
def test_inductor_generates_code_for_the_quantize_step(statistics):
    model = tiny_pipeline().transformer
    dq.quantize(model, dq.DQConfig(method="htg", groups=4), statistics=statistics, progress=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for step in (900, 300, 12):
            expected, output = model(**inputs(step)).sample, compiled(**inputs(step)).sample
            # fusion may flip a rounding: one step of an activation is 1/255 of its range
            assert (output - expected).norm() <= 0.02 * expected.norm()
