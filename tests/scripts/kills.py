"""Kill every stage at random moments, run it again, and look whether anything was lost.

    python tests/scripts/kills.py --trials 20 --seed 0                  a table: kills and failures of each stage
    python tests/scripts/kills.py --trials 1 --stages train cams        some stages

After the last run the result must be that of a run which nobody disturbed, byte for byte; no temporary file, no
unfinished folder and no worker process may be left. A trial counts once a kill has met the stage at work. Checkpoints
are written after every step here, so that many kills meet one. The stages run in forks of this process, which saves
the seconds of importing torch.
"""
import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import bnr
import psa
import segment
from wsss import prepare, training

TRAIN = ("--crop", 64, "--batch-size", 4)
STAGES = {  # name: (script, flags, what it makes in OUT), in order; the toy set is drawn into OUT itself
    "drawing": (prepare, ("toy", "--train", 12, "--val", 4), None),
    "train": (bnr, ("train", *TRAIN, "--epochs", 3, "--long-side", 64, 96), "classifier"),
    "cams": (bnr, ("cams", "--scales", 0.5, 1, "--batch-size", 2), "cams"),
    "labels": (psa, ("labels",), "affinity_labels"),
    "affinity": (psa, ("train", *TRAIN, "--width", 2, "--epochs", 2), "affinitynet"),
    "walk": (psa, ("walk",), "pseudo_labels"),
    "segmenter": (segment, ("train", *TRAIN, "--width", 2, "--iterations", 6), "segmenter"),
    "predict": (segment, ("predict", "--scales", 0.5), "segmentation")}
POOLED = ("labels", "walk", "predict")  # in every fifth trial with two workers
OFTEN = 20  # times that a trial may miss the stage


def start(name, data, out, workers):
    """The stage in a fork of this process, the first of a session of its own. -> its process id"""
    script, flags, makes = STAGES[name]
    where = ("--data", data, "--out", out, "--preset", "toy", "--device", "cpu", "--workers", workers)
    if child := os.fork():
        return child
    os.setsid()
    status = 1
    try:
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        training.SAVE_SECONDS, training.LOG_STEPS = 0, 1
        sys.argv = [script.__file__, *map(str, flags), *map(str, where if makes else ("--root", out))]
        script.main()
        status = 0
    except SystemExit as stop:
        status = 0 if stop.code is None else 1
        print(stop.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def complete(name, data, out, workers=0):
    """Run the stage to its end. -> seconds"""
    begun = time.monotonic()
    _, status = os.waitpid(start(name, data, out, workers), 0)
    if status:
        raise SystemExit(f"{name} failed:\n{Path(f'{out}.log').read_text()}")
    return time.monotonic() - begun


def living(session):
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def outcome(name, out):
    """What the stage made, to be compared: bytes of files, values of tensors, no id."""
    folder = out / (STAGES[name][2] or "")
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    kept = {key: path.read_bytes() for key, path in found.items() if path.suffix in (".npz", ".png", ".jpg", ".txt")}
    if (path := folder / "model.pth").is_file() and STAGES[name][2]:
        model = torch.load(path, weights_only=True)["model"]
        kept.update({key: tensor.numpy().tobytes() for key, tensor in model.items()})
    return kept


def kill(name, data, out, moment, workers):
    """Start the stage and kill it after so many seconds. -> whether it was still at work, what is wrong in words"""
    child = start(name, data, out, workers)
    time.sleep(moment)
    met = os.waitpid(child, os.WNOHANG)[0] == 0
    if met:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for _ in range(50):  # workers look once a second whether their parent is there, 10 s is for a busy machine
        if not (left := living(child)):
            break
        time.sleep(0.2)
    for process in left:
        os.kill(process, signal.SIGKILL)
    return met, [f"workers outlive their parent: {left}"] if left else []


def trial(name, data, before, whole, out, seconds, rng, workers):
    """Kill the stage once or twice, then complete it. -> kills, what is wrong in words"""
    for _ in range(OFTEN):
        if before:
            shutil.copytree(before, out)
        moments = [rng.uniform(0, 0.95 * seconds) for _ in range(rng.choice([1, 1, 2]))]
        each = [kill(name, data, out, moment, workers) for moment in moments]
        kills, wrong = sum(met for met, _ in each), [line for _, lines in each for line in lines]
        if kills:
            break
        shutil.rmtree(out, ignore_errors=True)
    complete(name, data, out)
    if outcome(name, whole) != outcome(name, out):
        wrong.append("the result is another one")
    litter = [path.name for path in out.rglob("*") if path.name.endswith((".wsss", ".part", ".earlier"))]
    if litter:
        wrong.append(f"left over: {litter}")
    shutil.rmtree(out)
    return kills, [f"{name}, killed after {moments}: {line}" for line in wrong]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, failures = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        data, whole, out = Path(folder, "drawn"), Path(folder, "whole"), Path(folder, "out")
        last = max(list(STAGES).index(name) for name in args.stages)
        for name in list(STAGES)[:last + 1]:
            makes, before = STAGES[name][2], None
            if makes:
                whole.mkdir(exist_ok=True)
                before = Path(folder, f"before_{name}")
                shutil.copytree(whole, before)
            undisturbed = whole if makes else data
            seconds = {0: complete(name, data, undisturbed)}
            if name not in args.stages:
                continue
            killed, failed = 0, []
            if name in POOLED and args.trials >= 5:
                shutil.copytree(before, out)
                seconds[2] = complete(name, data, out, workers=2)
                if outcome(name, whole) != outcome(name, out):
                    failed.append(f"{name}: other bytes of two workers")
                shutil.rmtree(out)
            for n in range(args.trials):
                workers = 2 if n % 5 == 4 and name in POOLED else 0
                kills, wrong = trial(name, data, before, undisturbed, out, seconds[workers], rng, workers)
                killed += kills
                failed += wrong if kills else [*wrong, f"{name}: no kill met it in {OFTEN} tries"]
            counts = f"{args.trials:4} trials {killed:4} kills within {seconds[0]:5.1f} s, {len(failed)} failures"
            print(f"{name:10} {counts}", flush=True)
            print("".join(f"  {line}\n" for line in failed), end="", flush=True)
            failures += len(failed)
    sys.exit(f"{failures} failures" if failures else None)


if __name__ == "__main__":
    main()
