# SPDX-License-Identifier: Apache-2.0
import pytest
from support import tiny_pipeline

import diffusers_dq as dq


def test_a_folder_is_inspected_as_the_model_is(tmp_path):
    pipe = tiny_pipeline()
    report = dq.quantize(pipe, dq.DQConfig("rtn", weight_bits=4), progress=False)
    pipe.save_pretrained(tmp_path)
    for path in (tmp_path, str(tmp_path), tmp_path / "transformer"):
        assert dq.inspect(path) == report
    assert "W4A8" in str(report)
    assert report.method == "rtn"


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_bytes_are_those_of_the_file(bits):
    pipe = tiny_pipeline()
    report = dq.quantize(pipe, dq.DQConfig("rtn", weight_bits=bits), progress=False)
    row = next(row for row in report.linears if row.name.endswith("blocks.0.ff.net.2"))
    assert row.nbytes == 128 * 32 * bits // 8 + 32 * 4 + 32 * 4  # packed weight, fp32 scales, fp32 bias


def test_what_is_no_quantized_model():
    report = dq.inspect(tiny_pipeline())
    assert not report.quantized
    assert set(report.kept.values()) == {"the model is not quantized"}
    with pytest.raises(FileNotFoundError, match="no folder"):
        dq.inspect("/nothing/here")
