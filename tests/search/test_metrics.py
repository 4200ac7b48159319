# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_dq.search.metrics import (
    LayerMetric,
    default_metrics,
    frame_difference_error,
    guidance_error,
    metric_of,
    output_error,
)


def test_guidance_error_sees_only_what_changes_the_direction():
    reference = torch.randn(4, 4, 8, 8)
    both = torch.randn(2, 4, 8, 8).repeat(2, 1, 1, 1)  # the same change of both halves
    assert guidance_error(reference, reference + both) < 1e-12 < output_error(reference, reference + both)
    one = torch.cat([torch.full((2, 4, 8, 8), 3.0), torch.zeros(2, 4, 8, 8)])
    assert guidance_error(reference, reference + one) == pytest.approx(9, rel=1e-5)


def test_frame_difference_error_sees_only_what_moves():
    reference = torch.randn(1, 4, 5, 8, 8)
    still = torch.randn(1, 4, 1, 8, 8).expand(-1, -1, 5, -1, -1)
    assert frame_difference_error(reference, reference + still) < 1e-12
    ramp = torch.arange(5.0).view(1, 1, 5, 1, 1) * 2
    assert frame_difference_error(reference, reference + ramp) == pytest.approx(4, rel=1e-5)


def test_metrics_refuse_outputs_that_they_say_nothing_of():
    with pytest.raises(ValueError, match="halves of a batch, got a batch of 3"):
        guidance_error(torch.zeros(3, 4), torch.zeros(3, 4))
    for shape in ((2, 4, 8, 8), (2, 4, 1, 8, 8)):
        with pytest.raises(ValueError, match="needs videos"):
            frame_difference_error(torch.zeros(shape), torch.zeros(shape))


NAMES = ["blocks.0.attn1.to_q", "blocks.0.attn2.to_k", "blocks.0.ff.net.2", "temporal_blocks.0.attn1.to_q"]


def test_layers_are_grouped_by_kind_as_far_as_model_and_output_have_it():
    def groups(**output):
        return [metric_of(name, default_metrics(NAMES, **output)).name for name in NAMES]

    looks, text, time = "visual quality", "text alignment", "temporal consistency"
    assert groups(videos=True, guided=True) == [looks, text, looks, time]
    assert groups(videos=False, guided=True) == [looks, text, looks, looks]
    assert groups(videos=False, guided=False) == [looks] * 4
    assert len(default_metrics(NAMES[:1], videos=True, guided=True)) == 1


def test_a_layer_without_a_metric_is_named():
    with pytest.raises(ValueError, match="no metric is for blocks.0.ff.net.2"):
        metric_of("blocks.0.ff.net.2", [LayerMetric("text", ("*attn2*",), guidance_error)])


@pytest.mark.parametrize("wrong", [dict(layers="*attn*"), dict(layers=()), dict(on="pictures")])
def test_a_metric_is_checked(wrong):
    with pytest.raises(ValueError, match="metric 'text'"):
        LayerMetric(**{"name": "text", "layers": ("*",), "metric": output_error, **wrong})
