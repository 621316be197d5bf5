"""Kill every stage at random moments, run it again, and look whether anything was lost.

    python tests/kills.py --trials 20 --seed 0                  a table: kills and failures of each stage
    python tests/kills.py --trials 1 --stages train walk        some stages

After the second run the result must be that of a run which nobody disturbed: the same weights and optimizer state bit
for bit, the same bytes of every file; no temporary file and no unfinished folder may be left, and no worker process.
Checkpoints are written after every step here, so that many kills meet one. The stages run in forks of this process,
which saves the seconds of importing torch.
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

sys.path.insert(0, str(Path(__file__).parents[1]))
import stage  # noqa: F401 (in a worker: it ends with its parent from here on)
import torch

import bnr
import engine
import prepare
import psa
import segment

TRAIN = ("--crop", 64, "--batch-size", 4)
STAGES = {  # name: (script, flags, what it makes in OUT), in order; the toy set is drawn into OUT itself
    "drawing": (prepare, ("toy", "--train", 12, "--val", 4), None),
    "train": (bnr, ("train", *TRAIN, "--epochs", 3, "--long-side", 64, 96), "classifier"),
    "cams": (bnr, ("cams", "--scales", 0.5, 1, "--batch-size", 2), "cams"),
    "labels": (psa, ("labels",), "affinity_labels"),
    "affinity": (psa, ("train", *TRAIN, "--width", 2, "--epochs", 2), "affinitynet"),
    "walk": (psa, ("walk",), "pseudo_labels"),
    "segmenter": (segment, ("train", *TRAIN, "--width", 2, "--iterations", 6), "segmenter"),
    "predict": (segment, ("predict", "--scales", 0.5), "segmentation"),
}
POOLED = ("labels", "walk", "predict")  # in every fifth trial with two workers


def start(name, data, out, workers):
    """The stage in a fork of this process, the first of a session of its own. -> its process id"""
    script, flags, makes = STAGES[name]
    where = ("--data", data, "--out", out, "--preset", "toy", "--device", "cpu", "--workers", workers)
    child = os.fork()
    if child:
        return child
    os.setsid()
    status = 1
    try:
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        engine.SAVE_SECONDS, engine.LOG_STEPS = 0, 1
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
    begun = time.time()
    _, status = os.waitpid(start(name, data, out, workers), 0)
    if status:
        raise SystemExit(f"{name} failed:\n{Path(f'{out}.log').read_text()}")
    return time.time() - begun


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
    """What the stage made, to be compared."""
    makes = STAGES[name][2]
    if makes and (out / f"{makes}.pth").is_file():
        saved = torch.load(out / f"{makes}.pth", weights_only=True)
        return {key: saved[key] for key in ("model", "optimizer", "step")}
    folder = out / makes if makes else out
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def trial(name, data, whole, out, moments, workers):
    """Kill the stage at these moments (seconds after its start), then complete it. -> kills, what is wrong in words"""
    wrong, kills = [], 0
    for moment in moments:
        child = start(name, data, out, workers)
        time.sleep(moment)
        kills += os.waitpid(child, os.WNOHANG)[0] == 0
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it was done
        for _ in range(50):  # workers look once a second whether their parent is there, 10 s is for a busy machine
            if not (left := living(child)):
                break
            time.sleep(0.2)
        if left:
            wrong.append(f"workers outlive their parent: {left}")
        for process in left:
            os.kill(process, signal.SIGKILL)
    complete(name, data, out)
    if not equal(outcome(name, whole), outcome(name, out)):
        wrong.append("the result is another one")
    if litter := [path.name for pattern in (".*.tmp", "*.part*", "*.old") for path in out.rglob(pattern)]:
        wrong.append(f"left over: {litter}")
    return kills, wrong


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
        complete("drawing", data, data)
        last = max(list(STAGES).index(name) for name in args.stages)
        for name in list(STAGES)[: last + 1]:
            makes, before = STAGES[name][2], Path(folder, "before")
            shutil.rmtree(before, ignore_errors=True)
            if makes and whole.is_dir():
                shutil.copytree(whole, before)
            elif makes:
                before.mkdir()
            seconds = {0: complete(name, data, whole if makes else data.with_name("again"))}
            if name not in args.stages:
                continue
            killed, failed = 0, []
            if name in POOLED and args.trials >= 5:
                shutil.copytree(before, out)
                seconds[2] = complete(name, data, out, workers=2)
                if not equal(outcome(name, whole), outcome(name, out)):
                    failed.append(f"{name}: other bytes of two workers")
                shutil.rmtree(out)
            for n in range(args.trials):
                if makes:
                    shutil.copytree(before, out)
                workers = 2 if n % 5 == 4 and name in POOLED else 0
                moments = [rng.uniform(0, 0.95 * seconds[workers]) for _ in range(rng.choice([1, 1, 2]))]
                kills, wrong = trial(name, data, whole if makes else data, out, moments, workers)
                killed += kills
                failed += [f"{name}, killed after {moments}: {what}" for what in wrong]
                shutil.rmtree(out, ignore_errors=True)
            print(
                f"{name:10} {args.trials:4} trials {killed:4} kills within {seconds[0]:5.1f} s, {len(failed)} failures",
                flush=True,
            )
            print("".join(f"  {line}\n" for line in failed), end="", flush=True)
            failures += len(failed)
    sys.exit(f"{failures} failures" if failures else None)


if __name__ == "__main__":
    main()
