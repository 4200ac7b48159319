# SPDX-License-Identifier: Apache-2.0
"""Pipelines whose text encoder another backend quantizes."""

from typing import Any

import pytest
import torch
from diffusers import PipelineQuantizationConfig, PixArtSigmaPipeline
from support import PIXART_CALL, tiny_pixart_pipeline
from transformers import T5Config, T5EncoderModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

import diffusers_dq as dq
from diffusers_dq.linear import QuantizedLinear

RTN = dict(method="rtn", weight_bits=4)


def fake_config() -> Any:
    """Of a backend that stands for all others that transformers knows: it halves every linear weight."""

    class HalvingConfig(QuantizationConfigMixin):
        def __init__(self, **kwargs: Any) -> None:
            self.quant_method = "halving"

    class HalvingQuantizer(HfQuantizer):
        requires_calibration = False
        is_trainable = False

        def is_serializable(self, **kwargs: Any) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data /= 2
            return model

    register_quantization_config("halving")(HalvingConfig)
    register_quantizer("halving")(HalvingQuantizer)
    return HalvingConfig()


def torchao_config() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.fixture(params=[fake_config, torchao_config])
def other(request) -> Any:
    yield request.param()
    for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        mapping.pop("halving", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    pipe = tiny_pixart_pipeline()
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=50, dropout_rate=0)
    pipe.register_modules(text_encoder=T5EncoderModel(config).eval())
    path = str(tmp_path_factory.mktemp("pixart"))
    pipe.save_pretrained(path)
    return path


def images(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        prompt = pipe.text_encoder(tokens, attention_mask=torch.ones_like(tokens))[0].float()
    seed = torch.Generator().manual_seed(0)
    call = PIXART_CALL | {"prompt_embeds": prompt}
    return torch.from_numpy(pipe(**call, num_inference_steps=3, generator=seed, output_type="np").images)


def test_each_backend_quantizes_its_part(folder, other, tmp_path):
    plain = PixArtSigmaPipeline.from_pretrained(folder)
    mapping = {"transformer": dq.DQConfig(**RTN), "text_encoder": other}
    both = PixArtSigmaPipeline.from_pretrained(
        folder, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
    )
    assert any(isinstance(module, QuantizedLinear) for module in both.transformer.modules())
    assert not any(isinstance(module, QuantizedLinear) for module in both.text_encoder.modules())
    weights = [pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q.weight for pipe in (plain, both)]
    assert type(weights[0]) is not type(weights[1]) or not torch.equal(*weights)
    ours_alone = PixArtSigmaPipeline.from_pretrained(folder, text_encoder=both.text_encoder)
    dq.quantize(ours_alone, dq.DQConfig(**RTN), progress=False)
    assert torch.equal(images(both), images(ours_alone))
    assert not torch.equal(images(both), images(plain))
    both.transformer.save_pretrained(tmp_path)
    reloaded = PixArtSigmaPipeline.from_pretrained(
        folder, text_encoder=both.text_encoder, transformer=type(both.transformer).from_pretrained(tmp_path)
    )
    assert torch.equal(images(reloaded), images(both))
