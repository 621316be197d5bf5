"""Whether memory and open files stay level: thousands of training steps and of exports at toy size.

    python tests/scripts/soak.py               2,000 steps of each training, 2,000 photos through each export
    python tests/scripts/soak.py --count 200 --stages train cams

Prints resident memory and the number of open files at each quarter of each stage; exit status 1 where the memory of the
last quarter is more than 5 % and 20 MB above that of the second.
"""
import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
import bnr
import psa
import segment
from wsss import prepare, training

PICTURES = 20  # are drawn; the list names each many times over, by links
COMMON = ("--preset", "toy", "--device", "cpu", "--workers", 0)
TINY = ("--crop", 32, "--batch-size", 2)
STAGES = {  # name: script, command, flags, the flag of how many steps
    "train": (bnr, "train", (*TINY, "--long-side", 32, 48), "--epochs"),
    "cams": (bnr, "cams", ("--scales", 1, "--batch-size", 2), None),
    "labels": (psa, "labels", (), None),
    "affinity": (psa, "train", (*TINY, "--width", 2), "--epochs"),
    "walk": (psa, "walk", ("--log-steps", 2), None),
    "segmenter": (segment, "train", (*TINY, "--width", 2), "--iterations"),
    "predict": (segment, "predict", ("--scales", 0.3, "--split", "train_aug"), None),
}


def run(script, *flags):
    sys.argv = [script.__file__, *map(str, flags)]
    script.main()


def draw(data, count):
    """A toy set of a third of the size, whose lists name `count` photos, links to a few."""
    run(prepare, "toy", "--root", data, "--train", PICTURES, "--val", 1)
    labels = dict(line.split(maxsplit=1) for line in (data / "labels.txt").read_text().splitlines())
    for path in (data / "JPEGImages").iterdir():
        picture = Image.open(path)
        picture.reduce(3).save(path)
    names, lines = [], []
    for n in range(count):
        old, new = f"toy_{n % PICTURES:04d}", f"link_{n:05d}"
        (data / "JPEGImages" / f"{new}.jpg").symlink_to(f"{old}.jpg")
        names.append(f"{new}\n")
        lines.append(f"{new} {labels[old]}\n")
    (data / "labels.txt").write_text("".join(lines) + f"toy_{PICTURES:04d} {labels[f'toy_{PICTURES:04d}']}\n")
    for split in ("train_aug", "train"):
        (data / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(names))


def watch(samples, done):
    """Seconds, resident MB and open files of this process, ten times a second."""
    begun = time.monotonic()
    while not done.wait(0.1):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        samples.append(
            (time.monotonic() - begun, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd")))
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="steps, and photos")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args()
    training.SAVE_SECONDS, report, grown = 5, [], False
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "data"), Path(folder, "out")
        draw(data, args.count)
        for name in args.stages:
            script, command, flags, steps = STAGES[name]
            flags = (*flags, *((steps, args.count if steps == "--iterations" else 2) if steps else ()))
            samples, done = [], threading.Event()
            watcher = threading.Thread(target=watch, args=(samples, done))
            watcher.start()
            try:
                run(script, command, *flags, "--data", data, "--out", out, *COMMON)
            finally:
                done.set()
                watcher.join()
            quarters = [np.array(part) for part in np.array_split(samples, 4)]
            memory = [part[:, 1].mean() for part in quarters]
            grown |= memory[3] > 1.05 * memory[1] and memory[3] > memory[1] + 20
            report.append(
                f"{name:10} {args.count} {'steps' if steps else 'photos':6} in {samples[-1][0]:5.0f} s; MB of each "
                f"quarter {' '.join(f'{m:.0f}' for m in memory)}; open files "
                f"{' '.join(f'{np.median(part[:, 2]):.0f}' for part in quarters)}"
            )
            print(f"\n{report[-1]}", flush=True)
        shutil.rmtree(out)
    print("\n" + "\n".join(report))
    sys.exit("memory grows" if grown else None)


if __name__ == "__main__":
    main()
