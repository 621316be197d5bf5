"""Shared by the tests: the command line of a script, a small toy set, and weights rebuilt from their names."""
import contextlib
import importlib
import io
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydensecrf.densecrf import DenseCRF2D
from pydensecrf.utils import unary_from_labels

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(ROOT))


def run_process(script, *flags, status=0):
    """Run a script as a user does, in a process of its own. -> what it printed on both streams"""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def run(script, *flags, status=0):
    """The same command line in this process, which saves the seconds of importing torch."""
    printed, code, argv = io.StringIO(), 0, sys.argv
    sys.argv = [script, *map(str, flags)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            importlib.import_module(Path(script).stem).main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        printed.write(f"{stop.code}\n")
    finally:
        sys.argv = argv
    assert code == status, printed.getvalue()
    return printed.getvalue()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A toy set of 24 + 8 pictures."""
    root = tmp_path_factory.mktemp("data") / "toy"
    run("data.py", "toy", "--root", root, "--train", 24, "--val", 8)
    return root


def rebuilt(keys):
    """The weights of the reference values: every tensor drawn from a generator seeded by its name (see golden/README.md)."""
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
    noise = torch.from_numpy((0.1 * r.standard_normal((n, 3, h, w))).astype(np.float32))
    return F.interpolate(low, (h, w), mode="bicubic", align_corners=False) + noise


def plain_crf(photo, labels, num_classes):
    """All labels, as published. -> Q (S, H, W)"""
    H, W = labels.shape
    crf = DenseCRF2D(W, H, num_classes)
    crf.setUnaryEnergy(unary_from_labels(labels, num_classes, gt_prob=0.7, zero_unsure=False))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=np.ascontiguousarray(photo), compat=10)
    return np.array(crf.inference(10)).reshape(num_classes, H, W)


def largest_difference(ours, theirs):
    """Relative to their largest absolute value."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
