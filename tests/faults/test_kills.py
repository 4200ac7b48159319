# SPDX-License-Identifier: Apache-2.0
"""kill -9 wherever something is written: what is on disk is whole, old or new, or refused, and a rerun completes."""

import os
import shutil
import signal
from itertools import count

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from support import CALLS, tiny_dit

import diffusers_dq as dq
from diffusers_dq import files
from diffusers_dq.search.record import Record

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # 3.12 warns of forks beside threads
]
STEPS = 4
LEARNED = dict(rounding="adaround", reconstruction={"iterations": 2, "unit": "block"})


def watch_writing(killer, monkeypatch):
    """Where a process may die in `files.replacing`: with half a file, before it is on disk, before it is renamed."""
    monkeypatch.setattr(files, "save_file", killer.halfway(files.save_file))
    monkeypatch.setattr(files.os, "fsync", killer.before(os.fsync))
    monkeypatch.setattr(files.os, "replace", killer.before(os.replace))


def killed_at_each_point(forked, killing, monkeypatch, work, after):
    """Run `work` killed at its first point of writing, its second, ..., until it ends by itself; `after` each kill.

    Returns how often it was killed."""
    for at in count():

        def doomed(at=at):
            watch_writing(killing(at), monkeypatch)
            work()

        ended = forked(doomed)
        if ended == "":
            return at
        assert ended == signal.SIGKILL, ended
        after()


def tensors_of(statistics):
    return {
        f"{name}/{key}": tensor for name, site in statistics.sites.items() for key, tensor in site.tensors().items()
    }


def assert_same_tensors(some, others):
    assert some.keys() == others.keys()
    assert all(torch.equal(some[name], others[name]) for name in some)


def test_calibration_resumes_after_a_kill_at_any_point(dit_folder, tmp_path, forked, killing, monkeypatch):
    """Two calls, so two checkpoints: of the half-written file, fsync, rename and fsync of the folder of each."""
    path = tmp_path / "checkpoint"
    pipe = DiTPipeline.from_pretrained(dit_folder)
    whole = dq.calibrate(pipe, CALLS, num_inference_steps=STEPS, progress=False)

    def calibrate():
        return dq.calibrate(pipe, CALLS, num_inference_steps=STEPS, progress=False, checkpoint=path)

    def check():
        if path.exists():
            assert dq.Statistics.load(path).about["calls_done"] in (1, 2)
            seen.add(dq.Statistics.load(path).about["calls_done"])
            assert list(tmp_path.glob(".checkpoint.*.unfinished")) or len(list(tmp_path.iterdir())) == 1
            path.unlink()

    seen = set()
    assert killed_at_each_point(forked, killing, monkeypatch, calibrate, check) == 8
    assert seen == {1, 2}
    path.unlink()

    def interrupted():
        watch_writing(killing(6), monkeypatch)  # the second checkpoint is written, and has not replaced the first
        calibrate()

    assert forked(interrupted) == signal.SIGKILL
    assert dq.Statistics.load(path).about["calls_done"] == 1
    assert_same_tensors(tensors_of(calibrate()), tensors_of(whole))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"], "the rerun clears away what was half done"


@pytest.mark.parametrize("config", [{}, LEARNED], ids=["in one go", "learned"])
def test_quantizing_completes_after_a_kill_at_any_point(
    dit_folder, dit_statistics, tmp_path, forked, killing, monkeypatch, config
):
    """Without a checkpoint nothing is written under a name; with one, AdaRound resumes from it."""
    path = tmp_path / "checkpoint"
    config = dq.DQConfig("ptq4dit", weight_bits=4, **config)

    def quantize():
        pipe = DiTPipeline.from_pretrained(dit_folder)
        dq.quantize(pipe, config, statistics=dit_statistics, progress=False, checkpoint=path)
        return pipe.transformer.state_dict()

    def check():
        if path.exists():
            files.read_tensors(path)  # whole

    whole = quantize()
    if path.exists():
        path.unlink()
    kills = killed_at_each_point(forked, killing, monkeypatch, quantize, check)
    assert (kills > 0) == path.exists() == bool(config.reconstruction)
    assert_same_tensors(quantize(), whole)


def test_a_kill_before_the_layers_are_in_place_leaves_no_file(
    dit_folder, dit_statistics, tmp_path, forked, killing, monkeypatch
):
    """Weights wait in temporary files, which have no name while they do."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("diffusers_dq.conversion._WORTH_A_FILE", 1)

    def doomed():
        monkeypatch.setattr("diffusers_dq.installation.install", killing(0).before(None))
        pipe = DiTPipeline.from_pretrained(dit_folder)
        dq.quantize(pipe, dq.DQConfig("htg"), statistics=dit_statistics, progress=False)

    assert forked(doomed) == signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_search_keeps_its_record_through_kills(tmp_path, forked, killing, monkeypatch):
    path = tmp_path / "record.json"

    def find():
        record = Record(path, {"a": 1})
        return [record.value(str(i), lambda i=i: i / 3) for i in range(3)]

    def check():
        if path.exists():
            assert all(value == int(key) / 3 for key, value in Record(path, {"a": 1}).values.items())

    assert killed_at_each_point(forked, killing, monkeypatch, find, check) > 0
    assert find() == [0, 1 / 3, 2 / 3]


# Saving a model: diffusers' own files, which take their places when all are whole


def quantized(dit_folder, dit_statistics, seed, **config):
    """Another seed, other weights of the same layout; other guard steps, another config.json of the same tensors."""
    model = DiTTransformer2DModel.from_pretrained(dit_folder, subfolder="transformer")
    if seed:
        model.load_state_dict(tiny_dit(seed).state_dict())
        config["method"] = "rtn"
        dq.quantize(model, dq.DQConfig(weight_bits=4, **config), progress=False)
        return model
    dq.quantize(model, dq.DQConfig(weight_bits=4, **config), statistics=dit_statistics, progress=False)
    return model


def watch_saving(killer, monkeypatch):
    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "save_file", killer.halfway(safetensors.torch.save_file))
    monkeypatch.setattr(safetensors.torch, "save_file", killer.before(safetensors.torch.save_file))
    monkeypatch.setattr("diffusers.models.modeling_utils.json.dumps", killer.before(__import__("json").dumps))
    monkeypatch.setattr(DiTTransformer2DModel, "save_config", killer.before(DiTTransformer2DModel.save_config))
    monkeypatch.setattr(files.os, "fsync", killer.before(os.fsync))
    monkeypatch.setattr(files.os, "replace", killer.before(os.replace))


@pytest.mark.parametrize("size", ["10GB", "60KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("change", ["weights", "config"])
def test_saving_over_another_model_leaves_one_of_them_or_is_refused(
    dit_folder, dit_statistics, tmp_path, forked, killing, monkeypatch, run_dit, change, size
):
    if change == "weights":
        old, new = (quantized(dit_folder, dit_statistics, seed) for seed in (1, 2))
    else:
        old, new = (
            quantized(dit_folder, dit_statistics, 0, method="htg", groups=1, guard_steps=(n, n)) for n in (1, 3)
        )
        assert_same_tensors(old.state_dict(), new.state_dict())
    timesteps = (750, 500)  # the third step of ten is guarded in one of them
    outputs = [run_dit(model, timesteps) for model in (old, new)]
    endings = set()
    for at in count():
        folder = tmp_path / str(at)
        old.save_pretrained(folder, max_shard_size=size)

        def doomed(at=at, folder=folder):
            watch_saving(killing(at), monkeypatch)
            new.save_pretrained(folder, max_shard_size=size)

        ended = forked(doomed)
        assert ended in (signal.SIGKILL, ""), ended
        try:
            loaded = run_dit(DiTTransformer2DModel.from_pretrained(folder), timesteps)
        except (ValueError, OSError) as error:
            assert "saved together" in str(error), "every file is whole"
            endings.add("mixed")
            with pytest.raises((ValueError, OSError)):
                dq.inspect(folder)
        else:
            endings.add([torch.equal(loaded, output) for output in outputs].index(True))
        if ended == "":
            break
        new.save_pretrained(folder, max_shard_size=size)
        assert torch.equal(run_dit(DiTTransformer2DModel.from_pretrained(folder), timesteps), outputs[1])
        shutil.rmtree(folder)
    mixed = {"mixed"} if change == "weights" else set()  # tensors are the same in the other case: new is new
    assert endings == {0, 1} | mixed, "the old one, the new one, files of both"
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(at)], "what was half written has gone"


@pytest.mark.parametrize("size", ["10GB", "60KB"], ids=["one file", "shards"])
def test_a_model_saved_to_a_new_folder_is_there_as_a_whole_or_not_at_all(
    dit_folder, dit_statistics, tmp_path, forked, killing, monkeypatch, run_dit, size
):
    model = quantized(dit_folder, dit_statistics, 1)
    output, folder = run_dit(model, (750, 500)), tmp_path / "new"
    for at in count():

        def doomed(at=at):
            watch_saving(killing(at), monkeypatch)
            model.save_pretrained(folder, max_shard_size=size)

        if forked(doomed) == "":
            break
        assert not folder.exists() or torch.equal(
            run_dit(DiTTransformer2DModel.from_pretrained(folder), (750, 500)), output
        )
        if folder.exists():
            shutil.rmtree(folder)
    assert at > 5 and [path.name for path in tmp_path.iterdir()] == ["new"]
    assert torch.equal(run_dit(DiTTransformer2DModel.from_pretrained(folder), (750, 500)), output)
