"""The losses of Table 5, a row each, over random seeds: all stages, by the commands that a user would type; the tables.

    python results.py    -> OUT/rows/ROW-seedN/, and the tables of `report.py tables`

A row's stage that is done says so and is not run again. Nothing here is part of the method.
"""
import contextlib
import itertools
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import stage  # before torch: from here on Ctrl-C is one line
from commands import Commands, whole
from pictures import seed_threshold
from report import tables

LOSSES = {  # of Table 5, as flags of bnr.py train
    "transcam": ["--loss", "transcam"], "no-noise": ["--loss", "bnr", "--noise", "none"],
    "noise-x1": ["--loss", "bnr", "--noise", "1"], "noise-x2": ["--loss", "bnr", "--noise", "2"]}
START = ["--epochs", "0"]
STEPS = {  # the commands of a row, by the name of the flag that gives them more flags
    "train": ("bnr.py", "train"), "cams": ("bnr.py", "cams"), "labels": ("psa.py", "labels"),
    "affinity": ("psa.py", "train"), "walk": ("psa.py", "walk"), "seg": ("segment.py", "train"),
    "predict": ("segment.py", "predict")}
GRACE = 10  # seconds in which a stopped stage may clean up
PUBLISHED = {"labels": {"--foreground": 0.60, "--background": 0.25}, "walk": {"--background-score": 0.42}}


def results(args):
    """Run all stages of each row and seed; a stage that is done says so. Then the tables."""
    if (args.shifted or args.true_masks) and not (args.data / "SegmentationClass").is_dir():
        raise stage.FlagError(f"--shifted and --true-masks need masks: {args.data} has no SegmentationClass")
    from_warm = []
    if args.warm_start:
        warm = args.out / "rows" / "warm"
        flags = [*common(args, warm, 0, "warm", args.workers), "--pretrained", args.warm_start,
                 *shlex.split(args.warm_flags)]
        run_all([iter([(["bnr.py", "train", *flags], args.gpus, warm)])], jobs=1)
        from_warm = ["--pretrained", warm / "classifier.pth"]
    every = itertools.product(dict.fromkeys(args.seeds), dict.fromkeys(args.rows))
    rows = [run_seed(args, row, seed, from_warm) for seed, row in every]
    more = {"train": [*from_warm, *START], "cams": ["--plain", *["--eigen"] * bool(from_warm), "--split", "train"]}
    rows.append(run_row(args, "start", 0, ["train", "cams"], more))
    if args.true_masks:
        masks = ["--train-list", "train", "--labels", args.data / "SegmentationClass"]
        rows.append(run_row(args, "true-masks", args.seeds[0], ["seg", "predict"], {"seg": masks}))
    run_all(rows, args.jobs)
    tables(args)


def common(args, out, seed, preset, workers):
    """Flags of every stage of a run."""
    return ["--data", args.data, "--out", out, "--preset", preset, "--seed", seed, "--device", args.device, "--workers",
            workers, "--amp" if args.amp else "--no-amp", *["--deterministic"] * args.deterministic,
            *["--fresh"] * args.fresh]


def run_seed(args, row, seed, from_warm):
    """The commands of one loss and random seed, as `run_row`."""
    goes_on = row in args.further and seed in (args.further_seeds or args.seeds)
    steps = ["train", "cams"]
    if goes_on:
        steps += ["labels", "affinity", "walk"] + ([] if args.shifted else ["seg", "predict"])
    split = [] if goes_on else ["--split", "train"]
    yield from run_row(args, row, seed, steps, {"train": [*from_warm, *LOSSES[row]], "cams": ["--plain", *split]})
    if goes_on and args.shifted:
        yield from run_shifted(args, row, seed)


def run_row(args, row, seed, steps, more):
    """Yield the commands of one row's stages -> OUT/rows/ROW-seedN/. more: {step: its own flags}"""
    out = args.out / "rows" / f"{row}-seed{seed}"
    shared = common(args, out, seed, args.preset, -(-args.workers // args.jobs))  # rows side by side share the workers
    for step in steps:
        flags = [*shlex.split(getattr(args, f"{step}_flags")), *more.get(step, ())]
        yield [*STEPS[step], *shared, *flags], args.gpus if step != "labels" else 1, out
    yield ["evaluate.py", *shared], 1, out


def run_shifted(args, row, seed):
    """PSA and segmenter once more on a row's seeds, all thresholds moved by the best one of the seeds less 0.42."""
    source, to = (args.out / "rows" / f"{name}-seed{seed}" for name in (row, f"{row}-shifted"))
    to.mkdir(parents=True, exist_ok=True)
    for name in ("classifier.json", "classifier.pth", "cams.json"):
        shutil.copy2(source / name, to / name)
    shutil.copytree(source / "cams", to / "cams", dirs_exist_ok=True)
    by = seed_threshold(source, None) - PUBLISHED["walk"]["--background-score"]
    more = {step: [part for flag, value in flags.items() for part in (flag, f"{max(value + by, 0):.2f}")]
            for step, flags in PUBLISHED.items()}
    yield from run_row(args, f"{row}-shifted", seed, list(STEPS)[2:], more)


def run_all(rows, jobs):
    """Run the rows' commands, one row's one after the other, `jobs` rows at a time; InputError where one fails."""
    waiting, running = rows[::-1], {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                row = waiting.pop()
                if command := next(row, None):
                    running[row] = start(*command, own_log=jobs > 1)
            ended = [row for row, (process, *_) in running.items() if process.poll() is not None]
            for row in ended:
                process, shown, hint = running.pop(row)
                if process.returncode:
                    raise stage.InputError(f"{shown} ended with status {process.returncode}{hint}")
                waiting.append(row)
            if not ended:
                time.sleep(0.2)
    except SystemExit:  # Ctrl-C reached the others too: a second signal would cut their clean-up short
        until = time.time() + GRACE
        while time.time() < until and any(process.poll() is None for process, *_ in running.values()):
            time.sleep(0.1)
        raise
    finally:  # where one failed or all are stopped, none goes on alone
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.wait()


def start(words, gpus, out, own_log):
    """Start one of our scripts, on several GPUs by torchrun. own_log: it prints into OUT/log.txt

    -> process, its command line, where its error is to be read
    """
    words = list(map(str, words))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    print("\n$ python " + shlex.join([*launch, *words]), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "ab") if own_log else contextlib.nullcontext() as log:
        process = subprocess.Popen([sys.executable, *launch, Path(__file__).with_name(words[0]), *words[1:]],
                                   stdout=log, stderr=log)
    return process, shlex.join(words), f": see {out / 'log.txt'}" if own_log else ""


def main():
    commands = Commands(__doc__, {"voc": {}, "coco": {}, "toy": {}, "small": {"amp": True}})
    parser = commands.only(results)
    rows = list(LOSSES)
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows,
                        help="losses to train; the start is scored too (row start)")
    parser.add_argument("--further", nargs="*", choices=rows, default=["transcam", "noise-x1"],
                        help="those of --rows that go on to pseudo labels and segmenter")
    parser.add_argument("--further-seeds", type=whole(0), nargs="+",
                        help="seeds with which they go on (default: all of --seeds)")
    parser.add_argument("--warm-start", type=Path, metavar="FILE",
                        help="train one TransCAM classifier from it first (preset warm), from which all rows go on")
    parser.add_argument("--warm-flags", default="", metavar="FLAGS",
                        help="more flags of that bnr.py train, one string after =")
    parser.add_argument("--shifted", action="store_true",
                        help="further rows: PSA also with thresholds moved to the seeds' best, chosen by looking; "
                             "their segmenter learns from these pseudo labels alone")
    parser.add_argument("--true-masks", action="store_true",
                        help="also a segmenter trained on the masks of train, a ceiling")
    parser.add_argument("--jobs", type=whole(1), default=1,
                        help="rows at a time, where the card has room; above 1 each prints into its own log.txt")
    parser.add_argument("--gpus", type=whole(1), default=1, help="processes of torchrun")
    for step, command in STEPS.items():
        parser.add_argument(f"--{step}-flags", default="", metavar="FLAGS",
                            help=f'more flags of {" ".join(command)}, one string after =')
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2], help="random seeds of the runs")
    parser.add_argument("--into", type=Path, metavar="FILE", help="write the tables into it")
    commands.run()


if __name__ == "__main__":
    main()
