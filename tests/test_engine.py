"""The training loop, weight files, and the pool of processes."""
import argparse
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bnr
import data
import engine
import stage
from stage import InputError


class Rows(torch.utils.data.TensorDataset):
    """Takes the loader's (index, seed) as `data.Images` does; `seed` adds noise, as a random crop would."""

    def __getitem__(self, index):
        torch.manual_seed(index[1])
        photo, label = super().__getitem__(index[0])
        return photo + 0.1 * torch.randn_like(photo), label


def rows(count=15):
    generator = torch.Generator().manual_seed(0)
    photos = torch.randn(count, 4, generator=generator)
    return Rows(photos, torch.rand(count, 3, generator=generator).round())


def fit(out, epochs, grows=None, **flags):
    """Train a small network with dropout on 15 rows, 3 steps an epoch, as a stage does. -> its checkpoint"""
    settings = {"seed": 0, "micro_batch": 0, "batch_size": 5, "amp": False, "precision": "float32", "lr": 0.5, **flags}
    args = argparse.Namespace(out=Path(out), data=Path("data"), preset="toy", device=torch.device("cpu"), workers=0,
                              fresh=False, parser=argparse.ArgumentParser(), epochs=epochs, **settings)
    run = stage.Stage(args, "classifier", grows="epochs", ignore=("precision",))
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5),
                              torch.nn.Linear(8, 3))
    if args.micro_batch:
        net = torch.nn.Sequential(net[0], net[3])  # neither statistics nor dropout of a part are those of the whole
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)
    batches = data.Batches(rows(), args)

    def loss_of(part, labels):
        loss = bnr.soft_margin_loss(net(part[0]), part[1]) * len(part[0]) / len(labels)
        return loss, {"L": loss}

    run.start()
    engine.fit(run, net, optimizer, batches, loss_of, epochs * batches.per_epoch, {"classes": ["a", "b", "c"]})
    run.finish()
    return torch.load(args.out / "classifier.pth", weights_only=True)


def assert_same(one, other):
    """Two checkpoints, bit for bit: weights, and the optimizer's moments."""
    assert one["step"] == other["step"]
    for name in one["model"]:
        assert torch.equal(one["model"][name], other["model"][name]), name
    for key, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(value, other["optimizer"]["state"][key][name]) for name, value in moments.items())


class Killed(BaseException):
    pass


def kill_at(monkeypatch, step):
    """Let each step write a checkpoint, and the process end after the one of this step."""
    write = engine.write

    def killed(path, save, sync=False):
        write(path, save, sync)
        if path.suffix == ".pth" and torch.load(path, weights_only=True)["step"] == step:
            raise Killed

    monkeypatch.setattr(engine, "SAVE_SECONDS", 0)
    monkeypatch.setattr(engine, "LOG_STEPS", 1)
    monkeypatch.setattr(engine, "write", killed)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_micro_batches_have_the_gradient_of_the_batch(tmp_path):
    whole = fit(tmp_path / "0", 2, micro_batch=5)
    for micro in (2, 4, 7):
        parts = fit(tmp_path / str(micro), 2, micro_batch=micro)
        for name, value in whole["model"].items():
            torch.testing.assert_close(parts["model"][name], value)
        assert [line["L"] for line in log(tmp_path / str(micro))] == pytest.approx(
            [line["L"] for line in log(tmp_path / "0")], rel=1e-5)


@pytest.mark.parametrize("step", [1, 3, 4])  # within the first epoch, between epochs, within the second
def test_a_killed_run_goes_on_and_equals_one_that_never_stopped(tmp_path, monkeypatch, step):
    whole = fit(tmp_path / "whole", 2)
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            fit(tmp_path / "killed", 2)
    assert not (tmp_path / "killed/classifier.pth").exists()  # an unfinished result has another name
    assert_same(fit(tmp_path / "killed", 2), whole)
    logged = [line["step"] for line in log(tmp_path / "killed")]
    assert logged[:step] == list(range(1, step + 1))
    assert logged[step:] == ([3, 6] if step < 3 else [6])  # none of the steps twice


@pytest.mark.parametrize("world, steps", [(1, [7, 14, 15]), (2, [10, 15])])
def test_one_process_writes_a_checkpoint_without_waiting_for_a_line_of_the_log(tmp_path, monkeypatch, world, steps):
    saved, plain, clock = [], engine.write, itertools.count(0, 40)  # seconds from look to look: 300 within 7 steps

    def write(path, save, sync=False):
        plain(path, save, sync)
        saved.append(torch.load(path, weights_only=True)["step"])

    monkeypatch.setattr(engine, "time", SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr(engine, "write", write)
    monkeypatch.setattr(engine, "WORLD", world)
    fit(tmp_path, 1, batch_size=1, micro_batch=1)
    assert saved == steps == [line["step"] for line in log(tmp_path)]


def test_more_epochs_of_a_finished_run_go_on_from_it(tmp_path, monkeypatch):
    whole = fit(tmp_path / "whole", 3)
    first = fit(tmp_path / "grown", 2)
    with monkeypatch.context() as patch:
        kill_at(patch, 8)  # also where it is killed on the way
        with pytest.raises(Killed):
            fit(tmp_path / "grown", 3)
    kept = torch.load(tmp_path / "grown/classifier.pth", weights_only=True)
    assert_same(kept, first)  # until the third epoch is done
    assert_same(fit(tmp_path / "grown", 3), whole)
    assert [line["step"] for line in log(tmp_path / "grown")][:3] == [3, 6, 7]
    with pytest.raises(InputError, match="made with other settings: epochs 3 -> 2: take another OUT="):
        fit(tmp_path / "grown", 2)
    with pytest.raises(InputError, match="made with other settings: epochs 3 -> 4, lr 0.5 -> 0.25"):
        fit(tmp_path / "grown", 4, lr=0.25)


def test_a_run_begun_without_a_loss_scale_goes_on_with_one(tmp_path, monkeypatch):
    assert not fit(tmp_path, 1)["scaler"]
    monkeypatch.setattr(engine, "amp_dtype", lambda device: torch.float16)
    resumed = fit(tmp_path, 2, precision="fp16")
    assert resumed["step"] == 6 and resumed["scaler"]["scale"] > 1


def test_the_log_names_stage_step_loss_rate_and_precision(tmp_path):
    fit(tmp_path, 2)
    first, second = log(tmp_path)
    assert first["stage"] == "classifier" and (first["step"], first["steps"], second["step"]) == (3, 6, 6)
    assert first["loss"] == first["L"] and first["lr"] == pytest.approx(0.05) and first["precision"] == "float32"
    assert first["images_s"] > 0 and first["gb"] > 0


def test_a_loss_that_is_not_finite_names_step_and_photos(tmp_path, monkeypatch):
    monkeypatch.setattr(bnr, "soft_margin_loss", lambda z, labels: z.sum() * float("nan"))
    monkeypatch.setattr(data.Batches, "names", lambda self, step: ["a", "b"])
    with pytest.raises(InputError, match="the loss of classifier is nan at step 1 of 3, photos a b: try a lower --lr"):
        fit(tmp_path, 1)


def test_a_weight_that_is_not_finite_names_step_and_photos(tmp_path, monkeypatch):
    monkeypatch.setattr(data.Batches, "names", lambda self, step: [f"photo{step}"])
    monkeypatch.setattr(engine, "_sum_gradients", lambda model: next(model.parameters()).data.fill_(float("inf")))
    with pytest.raises(InputError, match="weight of classifier is not finite after step 1, photos photo0: try a lower"):
        fit(tmp_path, 1, batch_size=15, micro_batch=15)


# ---------------------------------------------------------------- weight files

def test_weights_must_fit_and_what_stays_fresh_is_listed(capsys):
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    state = {"0.weight": torch.ones(3, 2), "0.bias": torch.zeros(3),
             "1.weight": torch.ones(9, 3), "1.bias": torch.ones(9)}
    with pytest.raises(InputError, match=r"file does not fit.*1.weight \(file \(9, 3\), network \(4, 3\)\)"):
        engine.load_weights(net, state, "file")
    assert engine.load_weights(net, state, "file", heads=("1",)) == ["1.weight", "1.bias"]
    assert "fresh: 1 (2)" in capsys.readouterr().out and net[0].weight.sum() == 6
    del state["0.bias"]
    with pytest.raises(InputError, match="1 missing, first 0.bias"):
        engine.load_weights(net, state, "file", heads=("1",))
    assert "0.bias" in engine.load_weights(net, state, "file", heads=("1",), partial=True)
    state["0.weight"][0, 0] = float("inf")
    with pytest.raises(InputError, match="0.weight has values that are not finite"):
        engine.load_weights(net, state, "file", heads=("1",), partial=True)


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_a_file_that_is_no_weight_file_is_refused(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError, match="w.pth is damaged, or holds more than tensors"):
        engine.read_weights(tmp_path / "w.pth")


# ---------------------------------------------------------------- pool

@pytest.mark.parametrize("workers", [0, 2])
def test_every_job_of_a_pool_comes_back_in_order(workers):
    jobs = ((n, 2) for n in range(20))
    assert list(engine.in_processes(pow, jobs, workers, 20, "squares")) == [n * n for n in range(20)]


def test_a_card_without_a_number_is_the_first_one(monkeypatch):
    """torch.cuda.set_device wants a number."""
    chosen = []
    monkeypatch.setattr(engine.torch, "ones", lambda *size, device: torch.zeros(size))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    for name in (None, "cuda", "cuda:1"):
        assert engine.pick_device(name) == chosen[-1]
    assert [device.index for device in chosen] == [0, 0, 1]
