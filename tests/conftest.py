"""Shared by the tests: the command line of a script, small data sets, and weights rebuilt from their names."""
import contextlib
import functools
import importlib
import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
PATH = {**os.environ, "PYTHONPATH": str(ROOT)}  # environment of a process that finds the scripts
sys.path.insert(0, str(ROOT))

from wsss.crf import CRF_LABELS, dense_crf  # noqa: E402, found by the line above


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a card")


def run_process(module, *flags, status=0):
    """Run `python -m MODULE` as a user does, in a process of its own. -> what it printed on both streams"""
    done = subprocess.run([sys.executable, "-m", *module.split(), *map(str, flags)], capture_output=True, text=True,
                          env=PATH)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def run(module, *flags, status=0):
    """The same command line in this process, which saves the seconds of importing torch."""
    printed, code, argv = io.StringIO(), 0, sys.argv
    sys.argv = [module, *map(str, flags)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            importlib.import_module(module).main()
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):  # as Python does: to stderr, with status 1
            printed.write(f"{code}\n")
            code = 1
    finally:
        sys.argv = argv
    assert code == status, printed.getvalue()
    return printed.getvalue()


def make_set(root, ids=("a", "b"), size=(20, 30)):
    """A data set of black photos, all of class "cat", without masks."""
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for name in ids:
        Image.new("RGB", size).save(root / "JPEGImages" / f"{name}.jpg")
    (root / "classes.txt").write_text("cat\ndog\n")
    (root / "labels.txt").write_text("".join(f"{name} cat\n" for name in ids))
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("".join(f"{name}\n" for name in ids))
    return root


@functools.lru_cache(1)
def rebuilt(keys):
    """The weights of the reference values: each tensor drawn by a generator seeded by its name (golden/README.md)."""
    state = {}
    for name, shape in json.loads((GOLDEN / f"{keys}_keys.json").read_text()).items():
        r = np.random.RandomState(zlib.crc32(name.encode()))
        x = r.standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            x = np.zeros(shape)
        elif name.endswith("running_var"):
            x = 0.5 + r.random_sample(shape)
        elif name.endswith("running_mean"):
            x = 0.1 * x
        elif len(shape) == 1:
            x = 1 + 0.1 * x if name.endswith("weight") else 0.05 * x
        else:
            x = x / np.sqrt(np.prod(shape[1:]))
        state[name] = torch.from_numpy(np.asarray(x, np.float32))
    return state


def drawn_image(seed, n, h, w):
    """The input images of the reference values. -> (n, 3, h, w)"""
    r = np.random.RandomState(seed)
    low = torch.from_numpy(r.standard_normal((n, 3, 8, 8)).astype(np.float32))
    noise = torch.from_numpy(r.standard_normal((n, 3, h, w)).astype(np.float32))
    # rounded in this order: AdamW takes a last bit of the image to the fourth digit of the second loss
    return F.interpolate(low, (h, w), mode="bicubic", align_corners=False) + 0.1 * noise


def plain_crf(photo, labels, num_classes):
    """All labels, as published. photo: uint8 (H, W, 3), labels: uint8 (H, W)  ->  Q (S, H, W)"""
    is_label, sure = labels == np.arange(num_classes)[:, None, None], CRF_LABELS["sure"]
    scores = np.where(is_label, sure, (1 - sure) / (num_classes - 1)).astype(np.float32)
    return dense_crf(photo, scores, CRF_LABELS["gauss"], CRF_LABELS["bilateral"], CRF_LABELS["steps"])


def largest_difference(ours, theirs):
    """Relative to their largest absolute value."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


from small_run import finished, here  # noqa: E402, F401, fixtures of all tests, which run what stands above
