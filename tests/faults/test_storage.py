# SPDX-License-Identifier: Apache-2.0
"""Disks that are full, folders that cannot be written to, no network, inputs that are no numbers: a clear error, and
the model and the files of before as they were."""

import contextlib
import os
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors.torch import save_file
from support import CALLS

import diffusers_dq as dq
from diffusers_dq import files

STEPS = 4


@pytest.fixture
def pipe(dit_folder):
    return DiTPipeline.from_pretrained(dit_folder)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 64 kB, too small for any file here."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not allowed here; test_a_file_that_cannot_grow stands for it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def no_room(file_size_limit):
    return lambda: file_size_limit(2000)


def assert_unchanged(model, before, outputs, run_dit):
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(run_dit(model), outputs)
    assert not getattr(model, "is_quantized", False)


def test_statistics_on_a_full_disk(dit_statistics, small_disk):
    with pytest.raises(OSError, match=r"cannot write .*s\.safetensors: .*(No space left|os error 28)"):
        dit_statistics.save(small_disk / "s.safetensors")
    assert list(small_disk.iterdir()) == []


def test_a_file_that_cannot_grow_leaves_the_one_before(dit_statistics, tmp_path, no_room):
    path = tmp_path / "s.safetensors"
    dit_statistics.save(path)
    before = path.read_bytes()
    with no_room(), pytest.raises(OSError, match="cannot write .*What was there before is there still"):
        dit_statistics.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_calibration_without_room_for_its_checkpoint_resumes_once_there_is(pipe, tmp_path, no_room):
    path = tmp_path / "checkpoint"
    hooks = sum(len(module._forward_pre_hooks) for module in pipe.transformer.modules())
    dq.calibrate(pipe, CALLS[:1], num_inference_steps=STEPS, progress=False, checkpoint=path)
    path.unlink()
    with no_room(), pytest.raises(OSError, match="cannot write"):
        dq.calibrate(pipe, CALLS, num_inference_steps=STEPS, progress=False, checkpoint=path)
    assert sum(len(module._forward_pre_hooks) for module in pipe.transformer.modules()) == hooks
    assert not path.exists()
    assert (
        dq.calibrate(pipe, CALLS, num_inference_steps=STEPS, progress=False, checkpoint=path).about["calls_done"] == 2
    )


def test_weights_that_find_no_room_to_wait_leave_the_model_as_it_was(
    pipe, dit_statistics, run_dit, small_disk, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    monkeypatch.setattr("diffusers_dq.conversion._WORTH_A_FILE", 1)
    monkeypatch.setattr("diffusers_dq.conversion._mapped", _without_room(small_disk))
    model = pipe.transformer
    before, outputs = {name: tensor.clone() for name, tensor in model.state_dict().items()}, run_dit(model)
    with pytest.raises(OSError, match="temporary file .*No space left.*The model is as it was"):
        dq.quantize(pipe, dq.DQConfig("htg"), statistics=dit_statistics, progress=False)
    assert_unchanged(model, before, outputs, run_dit)


def _without_room(folder):
    """The disk is filled by the time that the first weight is to wait there."""
    from diffusers_dq.conversion import _mapped

    def mapped(tensor):
        filler = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with contextlib.suppress(OSError):
            while True:
                os.write(filler, bytes(4096))
        os.close(filler)
        return _mapped(tensor)

    return mapped


def test_adaround_without_room_for_its_checkpoint_leaves_the_model_as_it_was(
    pipe, dit_statistics, run_dit, tmp_path, no_room
):
    config = dq.DQConfig("ptq4dit", weight_bits=4, rounding="adaround", reconstruction={"iterations": 1})
    model = pipe.transformer
    before, outputs = {name: tensor.clone() for name, tensor in model.state_dict().items()}, run_dit(model)
    with no_room(), pytest.raises(OSError, match="cannot write"):
        dq.quantize(pipe, config, statistics=dit_statistics, progress=False, checkpoint=tmp_path / "c")
    assert_unchanged(model, before, outputs, run_dit)
    assert list(tmp_path.iterdir()) == []


def test_saving_a_model_without_room_is_an_error_and_it_saves_elsewhere(pipe, tmp_path, no_room, run_dit):
    dq.quantize(pipe, dq.DQConfig("rtn", weight_bits=4), progress=False)
    outputs = run_dit(pipe.transformer)
    with no_room(), pytest.raises(Exception, match="os error|File too large|No space"):
        pipe.transformer.save_pretrained(tmp_path / "full")
    with pytest.raises((OSError, ValueError)):
        DiTTransformer2DModel.from_pretrained(tmp_path / "full")
    pipe.transformer.save_pretrained(tmp_path / "full")
    assert torch.equal(run_dit(DiTTransformer2DModel.from_pretrained(tmp_path / "full")), outputs)


# Folders


def as_nobody():
    """Root writes anywhere."""
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


@pytest.fixture
def locked_folder():
    """Not below tmp_path, where nobody but its owner may look."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        yield Path(name)
        Path(name).chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folder_that_cannot_be_written_to_is_named_before_any_work(
    pipe, dit_statistics, locked_folder, forked, monkeypatch
):

    def steps(*args, **kwargs):
        raise AssertionError("it has begun to work")

    def calibrate():
        as_nobody()
        dq.calibrate(pipe, CALLS, num_inference_steps=STEPS, progress=False, checkpoint=locked_folder / "c")

    def save():
        as_nobody()
        dit_statistics.save(locked_folder / "s")

    def learn():
        as_nobody()
        config = dq.DQConfig("ptq4dit", rounding="adaround", reconstruction={"iterations": 1})
        dq.quantize(pipe, config, statistics=dit_statistics, progress=False, checkpoint=locked_folder / "c")

    monkeypatch.setattr(type(pipe), "__call__", steps)
    monkeypatch.setattr("diffusers_dq.reconstruction.Reconstructor.run", steps)
    for work in (calibrate, save, learn):
        ended = forked(work)
        assert isinstance(ended, str) and ended.startswith("PermissionError: "), ended
        assert f"{locked_folder} cannot be written to" in ended
    assert list(locked_folder.iterdir()) == []


def test_the_errors_of_files_that_are_not_there_say_so(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        dq.calibrate(pipe, CALLS, num_inference_steps=STEPS, checkpoint=tmp_path / "nowhere" / "c", progress=False)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dq.quantize(pipe, dq.DQConfig("htg", statistics=str(tmp_path / "nowhere.safetensors")), progress=False)


def test_without_a_network_nothing_is_missed(dit_folder, dit_statistics, tmp_path, monkeypatch, run_dit):
    """Local files need none: sockets are refused."""

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    pipe = DiTPipeline.from_pretrained(dit_folder)
    pipe.set_progress_bar_config(disable=True)
    dit_statistics.save(tmp_path / "s")
    dq.quantize(pipe, dq.DQConfig("htg"), statistics=tmp_path / "s", progress=False)
    pipe.save_pretrained(tmp_path / "saved")
    loaded = DiTPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(run_dit(loaded.transformer), run_dit(pipe.transformer))
    with pytest.raises(OSError):
        DiTPipeline.from_pretrained("nobody/has-this-model")


# Values


def test_activations_that_are_no_numbers_are_named_and_nothing_is_kept(pipe, tmp_path, run_dit):
    model = pipe.transformer
    outputs, before = run_dit(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "c"

    def spoil(module, args):
        spoil.calls += 1
        return tuple(x * torch.nan for x in args) if spoil.calls > STEPS + 2 else args

    spoil.calls = 0
    handle = model.transformer_blocks[1].ff.net[2].register_forward_pre_hook(spoil)
    with pytest.raises(
        ValueError, match=r"transformer_blocks\.1\.ff\.net\.2 received NaN or infinite values at step 2"
    ):
        dq.calibrate(pipe, CALLS, num_inference_steps=STEPS, progress=False, checkpoint=path)
    handle.remove()
    assert dq.Statistics.load(path).about["calls_done"] == 1, "the sound call before it"
    dq.Statistics.load(path).check_finite()
    assert_unchanged(model, before, outputs, run_dit)


def test_statistics_that_are_no_numbers_do_not_quantize(pipe, dit_statistics_path, tmp_path, run_dit):
    header, tensors = files.read_tensors(dit_statistics_path)
    name = "transformer_blocks.1.ff.net.2/max"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 5] = torch.inf
    files.write_tensors(tmp_path / "s", tensors, header)
    model = pipe.transformer
    before, outputs = {key: tensor.clone() for key, tensor in model.state_dict().items()}, run_dit(model)
    with pytest.raises(ValueError, match="NaN or infinite values at step 3"):
        dq.quantize(pipe, dq.DQConfig("htg"), statistics=tmp_path / "s", progress=False)
    assert_unchanged(model, before, outputs, run_dit)


def test_a_foreign_safetensors_file_is_no_statistics(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "s")
    with pytest.raises(ValueError, match="not one of statistics"):
        dq.Statistics.load(tmp_path / "s")
    assert Path(tmp_path / "s").exists()
