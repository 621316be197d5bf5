"""The losses of Table 5, a row each, over random seeds: all stages, by the commands that a user would type; the tables.

    python results.py    -> OUT/rows/ROW-seedN/, and the tables of `report.py tables`

A row's stage that is done says so and is not run again. Nothing here is part of the method.
"""
import shlex
import shutil
import subprocess
import sys
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
PUBLISHED = {"labels": {"--foreground": 0.60, "--background": 0.25}, "walk": {"--background-score": 0.42}}


def results(args):
    """Run all stages of each row and seed; a stage that is done says so. Then the tables."""
    from_warm = []
    if args.warm_start:
        warm = args.out / "rows" / "warm"
        call("bnr.py", "train", *common(args, warm, 0, "warm"), "--pretrained", args.warm_start, gpus=args.gpus)
        from_warm = ["--pretrained", warm / "classifier.pth"]
    for seed in args.seeds:
        for row in args.rows:
            goes_on = row in args.further and seed in (args.further_seeds or args.seeds)
            split = [] if goes_on else ["--split", "train"]
            more = {"train": [*from_warm, *LOSSES[row]], "cams": ["--plain", *split]}
            run_row(args, row, seed, list(STEPS) if goes_on else ["train", "cams"], more)
            if goes_on and args.shifted:
                run_shifted(args, row, seed)
    more = {"train": [*from_warm, *START], "cams": ["--plain", *["--eigen"] * bool(from_warm), "--split", "train"]}
    run_row(args, "start", 0, ["train", "cams"], more)
    if args.true_masks:
        masks = ["--train-list", "train", "--labels", args.data / "SegmentationClass"]
        run_row(args, "true-masks", args.seeds[0], ["seg", "predict"], {"seg": masks})
    tables(args)


def common(args, out, seed, preset):
    """Flags of every stage of a run."""
    return ["--data", args.data, "--out", out, "--preset", preset, "--seed", seed, "--device", args.device, "--workers",
            args.workers, "--amp" if args.amp else "--no-amp", *["--deterministic"] * args.deterministic,
            *["--fresh"] * args.fresh]


def run_row(args, row, seed, steps, more):
    """Stages of one row, each by its own command line -> OUT/rows/ROW-seedN/. more: {step: its own flags}"""
    shared = common(args, args.out / "rows" / f"{row}-seed{seed}", seed, args.preset)
    for step in steps:
        flags = [*shlex.split(getattr(args, f"{step}_flags")), *more.get(step, ())]
        call(*STEPS[step], *shared, *flags, gpus=args.gpus if step != "labels" else 1)
    call("evaluate.py", *shared)


def run_shifted(args, row, seed):
    """PSA once more on a row's seeds, all three thresholds moved by the best threshold of the seeds less 0.42."""
    source, to = (args.out / "rows" / f"{name}-seed{seed}" for name in (row, f"{row}-shifted"))
    to.mkdir(parents=True, exist_ok=True)
    for name in ("classifier.json", "classifier.pth", "cams.json"):
        shutil.copy2(source / name, to / name)
    shutil.copytree(source / "cams", to / "cams", dirs_exist_ok=True)
    by = seed_threshold(source, None) - PUBLISHED["walk"]["--background-score"]
    more = {step: [part for flag, value in flags.items() for part in (flag, f"{value + by:.2f}")]
            for step, flags in PUBLISHED.items()}
    run_row(args, f"{row}-shifted", seed, ["labels", "affinity", "walk"], more)


def call(script, *flags, gpus=1):
    """Run one of our scripts, on several GPUs by torchrun; InputError where it fails, which it has told itself."""
    flags = list(map(str, flags))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    print("\n$ python " + shlex.join([*launch, script, *flags]), flush=True)
    done = subprocess.run([sys.executable, *launch, Path(__file__).with_name(script), *flags])
    if done.returncode:
        raise stage.InputError(f"{shlex.join([script, *flags])} ended with status {done.returncode}")


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
                     help="train one TransCAM classifier from it first, by the preset warm; all rows go on from that")
    parser.add_argument("--shifted", action="store_true",
                     help="further rows: PSA also with thresholds moved to the seeds' best, chosen by looking")
    parser.add_argument("--true-masks", action="store_true",
                        help="also a segmenter trained on the masks of train, a ceiling")
    parser.add_argument("--gpus", type=whole(1), default=1, help="processes of torchrun")
    for step, command in STEPS.items():
        parser.add_argument(f"--{step}-flags", default="", metavar="FLAGS",
                         help=f'more flags of {" ".join(command)}, one string after =')
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2], help="random seeds of the runs")
    parser.add_argument("--into", type=Path, metavar="FILE", help="write the tables into it")
    commands.run()


if __name__ == "__main__":
    main()
