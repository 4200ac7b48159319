# SPDX-License-Identifier: Apache-2.0
"""Flux ends its blocks of one stream, and itself, with a linear of the same name."""

from tiny_models import MODELS

import diffusers_dq as dq
from diffusers_dq.planning import kept_in_full_precision
from diffusers_dq.specs import spec_of

IN_BLOCKS = {f"single_transformer_blocks.{i}.proj_out" for i in range(2)}


def kept(**config):
    model = MODELS["FluxTransformer2DModel"].build()
    return kept_in_full_precision(model, spec_of(model), dq.DQConfig("rtn", **config))


def test_the_models_proj_out_is_left_and_those_of_its_blocks_are_not():
    names = kept()
    assert "proj_out" in names and not IN_BLOCKS & set(names)
    assert {name.partition(".")[0] for name in names} == {
        "time_text_embed",
        "context_embedder",
        "x_embedder",
        "norm_out",
        "proj_out",
    }


def test_the_users_own_proj_out_means_every_name_that_contains_it():
    assert {"proj_out", *IN_BLOCKS} <= set(kept(modules_to_not_convert=["proj_out"]))
