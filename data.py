"""Data sets, transforms, training loop, seeds and the one evaluation of all stages: what the other scripts share.

    python data.py toy                          draws the toy set into data/toy
    python data.py voc --root DIR               PASCAL VOC 2012 and SBD: fetched where they are missing, lists and labels written
    python data.py coco --root DIR              MS COCO 2014: masks, labels and lists written beside its photos
    python data.py check --data DIR             counts, and what would break a stage
    python data.py eval  --data DIR --out OUT   scores every stage found in OUT, writes OUT/results.json
    python data.py eval  --masks DIR            scores anybody's index PNGs; --seeds DIR class maps
    python data.py report --out OUT             tables over the rows and seeds of "make results"
    python data.py export --out OUT --to DIR    our seeds as DIR/ID/CLASS.npy, float32 (H, W) in [0, 1]

A data set is a folder in PASCAL VOC layout: JPEGImages/ID.jpg, SegmentationClass/ID.png (for scoring only),
ImageSets/Segmentation/{train_aug,train,val}.txt, classes.txt (optional, VOC's 20 names otherwise), image labels
from labels.txt ("ID name name ...") or else from Annotations/ID.xml. Or any folder of photos with a labels.txt.
"""
import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import sys
import time
import uuid
import zlib
import xml.etree.ElementTree as ElementTree
from array import array
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.utils.checkpoint import checkpoint
from torchvision.datasets import SBDataset
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import draw_segmentation_masks, make_grid, save_image
from tqdm import tqdm

VOID = 255  # mask value that never counts
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, of RGB in [0, 1]
LARGE = 1000  # pixels of a photo's longer side, twice VOC's, from which `check` warns
MEAN_COLOUR = tuple(round(255 * m) for m in MEAN)
PHOTOS = (".jpg", ".jpeg", ".png", ".webp")  # endings, in either case
THRESHOLDS = np.arange(60, dtype=np.float32) / 100  # of the seeds: 0.00 ... 0.59
VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()
VOC_SIZES = {"train_aug": 10582, "train": 1464, "val": 1449, "test": 1456}
COCO_SPLITS = {"train_aug": "train2014", "val": "val2014"}
COCO_SIZES = {"train_aug": 82081, "val": 40137}  # photos with an instance
STAGES = {  # record in OUT: (what it holds, the command that makes it)
    "classifier": ("classifier", "train"), "cams": ("seeds", "cams"), "affinity_labels": ("affinity labels", "psa"),
    "affinitynet": ("AffinityNet", "psa"), "pseudo_labels": ("pseudo labels", "psa"),
    "segmenter": ("segmenter", "seg"), "segmentation": ("segmentation", "seg")}


class InputError(Exception):
    """Something the user can mend. Shown as one line, exit status 1."""


# ---------------------------------------------------------------- data set

class DataSet:
    """A folder in VOC layout, or one of photos with a labels.txt, whose lines then are train_aug and name the classes.

    Class 0 is background; `classes` names the K foreground classes 1..K. An id is a photo's path below the folder, less its ending.
    """

    def __init__(self, root):
        self.root = Path(root)
        voc, labels, names = self.root / "JPEGImages", self.root / "labels.txt", self.root / "classes.txt"
        if not (voc.is_dir() or labels.is_file()):
            raise InputError(f'{self.root} is no data set: it has neither JPEGImages nor, beside photos, a labels.txt'
                             f' (the toy set is drawn by "python data.py toy")')
        self.photos = voc if voc.is_dir() else self.root
        lines = [line.split() for line in labels.read_text().splitlines() if line.strip()] if labels.is_file() else []
        self._labels = {photo_id(words[0]): words[1:] for words in lines}
        if names.is_file():
            self.classes = names.read_text().split()
        else:
            self.classes = VOC_CLASSES if voc.is_dir() else sorted(set().union(*self._labels.values()))
        self.num_classes = 1 + len(self.classes)

    def ids(self, split, required=True):
        """Ids of a list in ImageSets/Segmentation. Lines are "ID" or "/JPEGImages/ID.jpg /.../ID.png"."""
        folder = self.root / "ImageSets" / "Segmentation"
        names = [split] + (["trainaug"] if split == "train_aug" else [])
        path = next((p for p in (folder / f"{n}.txt" for n in names) if p.is_file()), None)
        if path is None:
            if self.photos == self.root and split in ("train_aug", "train"):
                path, ids = self.root / "labels.txt", list(self._labels)
            elif required:
                raise InputError(f"{folder} has no {split}.txt: one image id a line")
            else:
                return []
        else:
            ids = [photo_id(line.split()[0]) for line in path.read_text().split("\n") if line.strip()]
        if len(set(ids)) < len(ids):
            twice = next(i for n, i in enumerate(ids) if i in ids[:n])
            raise InputError(f"{path} names {len(ids) - len(set(ids))} ids twice, first {twice}")
        require([self.image(i) for i in ids])
        return ids

    def image(self, id):
        path = self.photos / f"{id}.jpg"
        return path if path.is_file() else self.photo_of.get(id, path)

    @functools.cached_property
    def photo_of(self):
        """Every photo of the folder, links followed. -> id: path"""
        found = {}
        for path in find_photos(self.photos):
            id = photo_id(path.relative_to(self.photos).as_posix())
            if id in found:
                raise InputError(f"two photos have the id {id}: {found[id]} and {path}")
            found[id] = path
        return found

    def mask(self, id):
        return self.root / "SegmentationClass" / f"{id}.png"

    def labels(self, ids):
        """Image-level labels. ids -> float32 (len(ids), K) of 0 and 1."""
        number = {name: n for n, name in enumerate(self.classes)}
        out = torch.zeros(len(ids), len(self.classes))
        for row, id in enumerate(ids):
            for name in self._names(id):
                if name not in number:
                    raise InputError(f'{self.root}: the label "{name}" of {id} is not among its {len(number)} classes')
                out[row, number[name]] = 1
        return out

    def _names(self, id):
        if id not in self._labels:
            path = self.root / "Annotations" / f"{id}.xml"
            try:
                objects = ElementTree.parse(path).getroot().findall("object")
            except (OSError, ElementTree.ParseError) as error:
                raise InputError(f"no image labels of {id}: not in {self.root}/labels.txt, and {path}: {error}") from None
            self._labels[id] = [o.findtext("name").strip() for o in objects]
        return self._labels[id]


def photo_id(name):
    """"/JPEGImages/ID.jpg" or "ID.jpg" or "ID"  ->  "ID" """
    name = name.split("JPEGImages/")[-1].lstrip("/")
    stem, _, ending = name.rpartition(".")
    return stem if f".{ending.lower()}" in PHOTOS else name


def find_photos(folder):
    """Paths of all photos below a folder, in order."""
    return sorted(Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names
                  if name.lower().endswith(PHOTOS) and not name.startswith("."))


def require(paths):
    """Raise InputError unless all files exist."""
    missing = [p for p in paths if not p.is_file()]
    if missing:
        raise InputError(f"{missing[0].parent} lacks {len(missing)} of {len(paths)} images, first {missing[0].name}")


def read_image(path):
    """An image file of any mode -> PIL RGB, turned as its EXIF entry says."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut, not scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from None


def read_mask(path):
    """An index PNG -> uint8 (H, W). Colours of PASCAL VOC's palette become their index, with a line saying so."""
    try:
        mask = Image.open(path)
        mode, values = mask.mode, np.array(mask)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if mode in ("RGB", "RGBA"):
        note(f"masks in {path.parent} are in colours, read as PASCAL VOC's palette")
        table, code = np.full(1 << 24, -1, np.int16), np.array([1 << 16, 1 << 8, 1])
        table[palette() @ code] = np.arange(256)
        values = table[values[..., :3] @ code]
        if values.min() < 0:
            raise InputError(f"{path} has colours that are not of PASCAL VOC's palette")
    elif mode not in ("P", "L") and not mode.startswith("I") or values.max() > 255:
        raise InputError(f"{path} is no index PNG (palette or grey, values up to 255) but {mode}")
    return values.astype(np.uint8)


@functools.lru_cache
def note(line):
    """Print a line the first time it is said."""
    print(line, flush=True)


def palette():
    """PASCAL VOC's colours. -> uint8 (256, 3)"""
    index, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def write_mask(path, mask):
    """uint8 (H, W) -> index PNG with PASCAL VOC's palette."""
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(palette().tobytes())
    write(path, lambda file: image.save(file, format="PNG"))


def overlay(photo, mask, strength=0.75):
    """The photo with each class in its colour. photo: uint8 (3, H, W), mask: uint8 (H, W)  ->  uint8 (3, H, W)"""
    named = [c for c in np.unique(mask).tolist() if 0 < c < VOID]
    if not named:
        return photo
    chosen = torch.stack([torch.from_numpy(mask == c) for c in named])
    return draw_segmentation_masks(photo, chosen, strength, [tuple(palette()[c].tolist()) for c in named])


def write(path, save):
    """`save(file)` into a temporary name, then rename: a file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            save(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_lines(path, lines):
    write(path, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))


# ---------------------------------------------------------------- transforms (PIL image, and mask where there is one)

def rescale(image, factor):
    """Both sides times `factor`, at least one pixel each (Pillow bicubic, antialiased)."""
    return v2.functional.resize(image, [max(1, round(side * factor)) for side in image.size[::-1]], InterpolationMode.BICUBIC)


def random_long_side(image, low, high):
    """The longer side becomes a random length in [low, high] pixels."""
    return rescale(image, int(torch.randint(low, high + 1, ())) / max(image.size))


def to_tensor():
    """PIL RGB -> float32 (3, H, W), ImageNet mean and deviation."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


class Images(torch.utils.data.Dataset):
    """`item(id, PIL image)` for each id, in the loader's workers. `path(id)` is the photo's file."""

    def __init__(self, path, ids, item):
        self.path, self.ids, self.item = path, ids, item

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        if isinstance(index, tuple):  # of a training: the random numbers of this image in this step
            index, seed = index
            torch.manual_seed(seed)
        id = self.ids[index]
        return self.item(id, read_image(self.path(id)))


def seed_of(*numbers):
    """One 32-bit seed of several numbers, as unlike the next one's as can be."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Steps(torch.utils.data.Sampler):
    """Which images the steps from `start` on take, and the seed of each one's augmentation: [(index, seed), ...] a step.

    Each epoch has an order of its own, an incomplete last batch is dropped. All follows from `seed` and the step's number.
    """

    def __init__(self, count, batch, seed, start, stop):
        self.count, self.batch, self.seed, self.start, self.stop = count, batch, seed, start, stop

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        for step in range(self.start, self.stop):
            epoch, n = divmod(step, self.count // self.batch)
            order = np.random.default_rng(seed_of(0, self.seed, epoch)).permutation(self.count)
            yield [(int(i), seed_of(1, self.seed, step, int(i))) for i in order[n * self.batch:(n + 1) * self.batch]]


def loader(images, batch, args, steps=None):
    """DataLoader over `Images`, in order, or by the `Steps` of a training; `batch` None gives single items."""
    gpu = args.device.type == "cuda"  # on the CPU the network takes all cores, and loading in turn is faster
    workers = args.workers if gpu and "fork" in get_all_start_methods() else 0  # `item` may be a closure, which only a fork passes on
    how = {"batch_sampler": steps} if steps is not None else {"batch_size": batch}
    return torch.utils.data.DataLoader(images, **how, num_workers=workers, pin_memory=gpu,
                                       multiprocessing_context="fork" if workers else None, generator=torch.Generator())


def steps_of(images, args):
    """How many steps an epoch has."""
    if len(images) < args.batch_size:
        raise InputError(f"{len(images)} training images are fewer than a batch of {args.batch_size}: see --batch-size")
    return len(images) // args.batch_size


# ---------------------------------------------------------------- seeds

def normalise(cams, eps=1e-5):
    """Scale each class map to [0, 1] (Sec. 3.4; the exact form is TransCAM's).

    cams: (K, H, W), non-negative  ->  (K, H, W)
    """
    low, high = cams.amin((1, 2), keepdim=True), cams.amax((1, 2), keepdim=True)
    cams = torch.where(cams < low + eps, 0, cams)
    return ((cams - low - eps) / (high - low + eps)).clamp(min=0)


def combine_scales(maps, size):
    """Sum of class maps of several scales, resized to the photo, negatives cut, scaled to [0, 1] (Sec. 4.2).

    maps: list of (K, h, w)  ->  (K, H, W), size = (H, W)
    """
    if not len(maps[0]):
        return torch.zeros(0, *size)
    resized = [F.interpolate(m[None], size, mode="bilinear", align_corners=False)[0] for m in maps]
    return normalise(torch.stack(resized).sum(0).clamp(min=0))


def write_seeds(path, classes, size, **maps):
    """An .npz of `classes` (int64, 1..K), `size` (H, W of the photo) and, for each name, one (len(classes), h, w) a scale.

    The low-resolution sums hold everything: resizing and summing are linear, and `read_seeds` does them.
    """
    arrays = {f"{name}_{n}": m for name, scales in maps.items() for n, m in enumerate(scales)}
    write(path, lambda file: np.savez(file, classes=np.asarray(classes), size=np.asarray(size), **arrays))


def read_seeds(path, name="refined"):
    """-> classes (k,) int64 in 1..K, maps float32 (k, H, W) in [0, 1]. `name` is "refined" (M*) or "plain" (M)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            maps = [torch.from_numpy(file[f"{name}_{n}"]) for n in range(len(file.files)) if f"{name}_{n}" in file]
            return file["classes"], combine_scales(maps, tuple(file["size"].tolist())).numpy()
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(f'cannot read {name} seeds from {path}: {error}: run "make cams"') from None


def read_any_seeds(folder, id, names, name):
    """Our FOLDER/ID.npz, or FOLDER/ID/CLASS.npy of anybody, each (H, W); `names` are the K classes. -> as `read_seeds`"""
    if (folder / f"{id}.npz").is_file():
        return read_seeds(folder / f"{id}.npz", name)
    if (folder / f"{id}.npy").is_file():
        raise InputError(f"{folder / id}.npy is a pickle, which can run any code when read. Of files that you trust make DIR/ID/CLASS.npy: "
                         "for id in ids: for k, m in numpy.load(f'{id}.npy', allow_pickle=True).item().items(): "
                         "numpy.save(f'DIR/{id}/{classes[k]}.npy', m)")
    paths = [folder / id / f"{c}.npy" for c in names]
    have = [n for n, path in enumerate(paths) if path.is_file()]
    if not (folder / id).is_dir() or len(have) < len(list((folder / id).glob("*.npy"))):
        raise InputError(f"no class maps of {id} in {folder}: neither {id}.npz nor {id}/CLASS.npy of the classes {' '.join(names)}")
    try:
        maps = [np.load(paths[n], allow_pickle=False).astype(np.float32) for n in have]
        return np.array(have, np.int64) + 1, np.stack(maps) if maps else np.zeros((0, 1, 1), np.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {folder / id}: {error}") from None


def export(args):
    """Write the seeds of every photo as DIR/ID/CLASS.npy, for other people's code."""
    dataset = DataSet(args.data)
    read_record(args.out, "cams")
    for path in tqdm(sorted((args.out / "cams").rglob("*.npz")), unit="img"):
        classes, maps = read_seeds(path)
        folder = args.to / path.relative_to(args.out / "cams").with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        for c, one in zip(classes, maps):
            write(folder / f"{dataset.classes[c - 1]}.npy", lambda file: np.save(file, one))


def hard_threshold(classes, cams, threshold):
    """Class of the largest map where it reaches `threshold`, else background (Sec. 3.4).

    classes: (k,), cams: (k, H, W) in [0, 1]  ->  uint8 (H, W)
    """
    if not len(classes):
        return np.zeros(cams.shape[1:], np.uint8)
    return np.where(cams.max(0) >= np.float32(threshold), classes[cams.argmax(0)], 0).astype(np.uint8)


# ---------------------------------------------------------------- metrics

def confusion(mask, prediction, num_classes):
    """Pixel counts; void of either side is left out. mask, prediction: uint8 (H, W) -> int64 (S, S), rows the mask."""
    seen = (mask != VOID) & (prediction != VOID)
    pairs = mask[seen].astype(np.int64) * num_classes + prediction[seen]
    return np.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def confusion_over_thresholds(mask, classes, cams, num_classes):
    """`confusion` of `hard_threshold` at all THRESHOLDS, from one joint histogram. -> int64 (60, S, S)"""
    T = len(THRESHOLDS)
    seen = mask != VOID
    if len(classes):
        value, winner = (x.numpy()[seen] for x in torch.from_numpy(cams).max(0))  # numpy's takes ten times as long
        label = classes[winner]
    else:
        value, label = np.full(seen.sum(), -1, np.float32), 0
    reached = np.searchsorted(THRESHOLDS, value, side="right")  # at how many thresholds the pixel is foreground
    bins = (reached * num_classes + mask[seen]) * num_classes + label
    counts = np.bincount(bins, minlength=(T + 1) * num_classes ** 2).reshape(T + 1, num_classes, num_classes)
    below = counts.cumsum(0)[:T]  # pixels that are background at threshold t
    out = counts.sum(0) - below
    out[:, :, 0] += below.sum(2)
    return out


def iou(matrix):
    """Intersection over union of each class, nan where it is in neither mask nor prediction. (..., S, S) -> (..., S)"""
    hit = np.diagonal(matrix, axis1=-2, axis2=-1)
    union = matrix.sum(-1) + matrix.sum(-2) - hit
    return np.where(union > 0, hit / np.maximum(union, 1), np.nan)


def mean_average_precision(scores, labels):
    """Mean over the classes that occur. scores, labels: (n, K) -> float"""
    found = []
    for score, label in zip(scores.T, labels.T):
        hits = label[score.argsort(descending=True, stable=True)]
        if hits.sum():
            precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
            found.append((precision * hits).sum() / hits.sum())
    return float(torch.stack(found).mean()) if found else math.nan


# ---------------------------------------------------------------- running a stage

class Commands:
    """argparse with presets: `add(function, help)` gives a sub-command's parser, `run()` calls what the user typed."""

    def __init__(self, doc, presets):
        self.parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.commands = self.parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
        self.presets = presets

    def add(self, function, help, name=None):
        """A sub-command with the flags that all stages share."""
        parser = self.commands.add_parser(name or function.__name__, help=help, description=function.__doc__,
                                          formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        parser.set_defaults(function=function, parser=parser)
        parser.add_argument("--data", type=Path, help="data set in VOC layout (default: that of the run in --out, else data/toy)")
        parser.add_argument("--out", type=Path, help="folder of all results (default: out/NAME OF DATA)")
        parser.add_argument("--preset", choices=self.presets, help="table of defaults (default: of the run in --out, or toy for data/toy, else voc)")
        parser.add_argument("--device", help="cuda or cpu (default: cuda where it works)")
        parser.add_argument("--seed", type=int, default=0, help="of python, numpy, torch and the loader's workers")
        parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that load or run the CRF")
        parser.add_argument("--amp", action=argparse.BooleanOptionalAction, help="mixed precision (default: on cuda)")
        return parser

    def run(self):
        args = self.parser.parse_args()
        try:
            if "preset" in args:
                folder, preset = (args.data, None) if args.data else run_in(args.out)
                preset = args.preset or preset or ("toy" if folder.resolve() == Path("data/toy").resolve() else "voc")
                known = {k: v for k, v in self.presets[preset].items() if k in args}
                args.parser.set_defaults(**known)
                args = self.parser.parse_args()
                args.data, args.preset, args.out = folder, preset, args.out or Path("out") / folder.resolve().name
                args.device = pick_device(args.device)
                args.amp = args.device.type == "cuda" if args.amp is None else args.amp
                random.seed(args.seed)
                np.random.seed(args.seed)
                torch.manual_seed(args.seed)
            args.function(args)
        except torch.cuda.OutOfMemoryError:
            sys.exit(f"error: the card has too little memory after {peak_memory():.1f} GB: try --micro-batch and --recompute in training, "
                     "a smaller --batch-size in cams, smaller photos or --scales in predict")
        except (InputError, OSError) as error:
            # From a loader's worker the message comes with a traceback in front.
            sys.exit("error: " + str(error).strip().splitlines()[-1].removeprefix("data.InputError: "))
        except KeyboardInterrupt:
            sys.exit(130)


def run_in(out):
    """Data set and preset of the run in this folder, those of the toy set where there is none."""
    path = next((p for stage in STAGES if out and (p := out / f"{stage}.json").is_file()), None)
    record = json.loads(path.read_text()) if path else {"settings": {"data": "data/toy"}}
    return Path(record["settings"]["data"]), record.get("preset")


def pick_device(name):
    """The device, printed; with a warning where a GPU is seen but cannot be used."""
    if name and name.partition(":")[0] not in ("cuda", "cpu"):
        raise InputError(f"--device {name} is neither cuda (or cuda:N) nor cpu")
    usable = False
    if not name or name.startswith("cuda"):
        with contextlib.suppress(RuntimeError, AssertionError):  # no GPU, no driver that fits, a torch without kernels for this card
            torch.ones(1, device=name or "cuda").add(1)
            usable = True
        if name and not usable:
            raise InputError(f"--device {name}: torch {torch.__version__} finds no usable GPU")
    device = torch.device(name or ("cuda" if usable else "cpu"))
    print(f"device: {device} ({device_name(device)})", flush=True)
    if not name and not usable and Path("/proc/driver/nvidia/version").exists():
        print(f"warning: a GPU is there, but torch {torch.__version__} cannot use it: compare its CUDA version with the driver's")
    if usable:
        # cuDNN's backward pass read past the end where 1 + N is no multiple of 128 (pytorch/pytorch#169849): flash takes over.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def device_name(device):
    """-> the card's name, or the processor's and how many threads of it torch uses"""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.is_file() else []
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def settings_of(args, *without):
    """What a result depends on: the flags, less those that only say where and how fast."""
    hidden = {"command", "function", "parser", "out", "device", "workers", "preset", "ids", "first", "amp", "recompute", "compile", *without}
    shown = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in sorted(vars(args).items()) if k not in hidden}
    return json.loads(json.dumps(shown))


def read_record(out, stage):
    """The finished record of an earlier stage; InputError naming the command that makes it."""
    path, (what, target) = out / f"{stage}.json", STAGES[stage]
    record = json.loads(path.read_text()) if path.is_file() else {}
    if not record.get("done"):
        raise InputError(f'{"unfinished" if record else "no"} {what} in {out / stage}: run "make {target}"')
    return record


class Stage:
    """One stage of a run: its record OUT/NAME.json of settings, inputs, seconds, peak memory, results, and what of it is done.

    The record of an earlier run stands where settings and inputs are the same: done, or to be gone on with.
    """

    def __init__(self, args, name, reads=(), without=()):
        self.args, self.name, self.path = args, name, args.out / f"{name}.json"
        same = {"settings": settings_of(args, *without), "inputs": {n: read_record(args.out, n)["id"] for n in reads}}
        self.record = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.resumed = all(self.record.get(k) == v for k, v in same.items())
        if not self.resumed:
            self.record = {"id": uuid.uuid4().hex, **same, "preset": args.preset, "started": time.time(), "seconds": 0, "done": False}

    def todo(self, paths):
        """Those of `paths` (id -> file) that this run of the stage has not written yet."""
        return [id for id, path in paths.items() if not path.is_file() or path.stat().st_mtime < self.record["started"]]

    def is_done(self, todo=()):
        if self.record["done"] and not todo:
            print(f"{self.args.out / self.name}: done already")
        return self.record["done"] and not todo

    def start(self):
        """Print the settings, once; from here on the record is on disk."""
        if not self.resumed:
            print(f"{self.name}: " + " ".join(f"{k}={v}" for k, v in self.record["settings"].items()), flush=True)
        self.clock = time.time()
        self.save()

    def save(self):
        now = time.time()
        self.record["seconds"] += now - self.clock
        self.record["peak_gb"] = max(self.record.get("peak_gb", 0), peak_memory())
        self.clock = now
        write_json(self.path, self.record)

    def finish(self, **results):
        self.record.update(results, done=True, device=device_name(self.args.device), precision=precision(self.args))
        self.save()
        print(f"{self.name}: {self.record['seconds']:.0f} s, {self.record['peak_gb']:.1f} GB -> {self.args.out / self.name}", flush=True)


def write_json(path, value):
    write(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


class Bar(tqdm):
    """tqdm that says once, some seconds into a run, what the whole will take: hours, disk, memory.

    writes: the file that the run writes, or the folder of its files, one an item; None where it writes none
    """

    AFTER = 20  # seconds

    def __init__(self, *args, writes=None, initial=0, **kwargs):
        super().__init__(*args, initial=initial, **kwargs)
        self.what, self.writes, self.done, self.first, self.told = kwargs["desc"], writes, initial, None, False

    def update(self, n=1):
        super().update(n)
        self.done += n
        self.first = self.first or (time.time(), self.done)  # what comes before the first item is no part of the pace
        taken, items, left = time.time() - self.first[0], self.done - self.first[1], self.total - self.done
        if not self.told and items and taken > self.AFTER:
            self.told = True
            self.write(f"{self.what}: estimate: {taken / items * left / 3600:.2f} h to go, {peak_memory():.1f} GB of memory"
                       + (self.disk(left) if self.writes else ""))

    def disk(self, left):
        try:
            folder = self.writes.is_dir()
            sizes = [p.stat().st_size for p in (self.writes.rglob("*") if folder else [self.writes]) if p.is_file()]
            more = folder and sum(sizes) / max(1, len(sizes)) * left
            full = ", which is more than is free" if more > shutil.disk_usage(self.writes).free else ""
            return f", {(sum(sizes) + more) / 1e9:.2f} GB of disk{full}"
        except OSError:  # a worker renames a file while it is counted, or none is written yet
            return ""


def peak_memory():
    """GB of the card where it is in use, else of this process without its workers"""
    card = torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_initialized() else 0
    if card > 0.1:
        return card
    status = Path("/proc/self/status")  # Linux's getrusage starts with the peak of whoever started this process
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    if peak:
        return int(peak[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6 / 1.024)


def in_processes(work, jobs, workers, total, what, writes=None):
    """Yield work(*job) of each job, in order, from a pool of processes; `jobs` may be a generator that computes."""
    with Bar(total=total, desc=what, unit="img", writes=writes) as bar:
        for result in itertools.starmap(work, jobs) if workers == 0 or total < 2 else _pooled(work, jobs, workers):
            yield result
            bar.update()


def _pooled(work, jobs, workers):
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        waiting = collections.deque()
        for job in jobs:
            waiting.append(pool.submit(work, *job))
            if len(waiting) >= 2 * workers:  # bounds the memory of what waits
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def amp_dtype(device):
    """bf16 where the device has it natively, else fp16."""
    native = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float16


def precision(args):
    """-> "float32", or "bf16" or "fp16" for mixed precision"""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[amp_dtype(args.device)] if args.amp else "float32"


def autocast(args):
    return torch.autocast(args.device.type, amp_dtype(args.device), enabled=args.amp)


def recompute(blocks):
    """Activation checkpointing: what a block keeps for its gradient is made again in the backward pass. Results are the same."""
    for block in blocks:
        if not any(block.children()):
            continue  # a lone layer saves nothing, and an in-place ReLU would spoil what was kept
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=functools.partial(_passes, block))


def _passes(block):
    """Contexts of a block's two forward passes: BatchNorm's running statistics move in the first alone."""
    @contextlib.contextmanager
    def still():
        norms = [(m, m.momentum) for m in block.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm, _ in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:  # the second pass ends by an exception once it has made all that is needed
            for norm, momentum in norms:
                norm.momentum = momentum
    return contextlib.nullcontext(), still()


def add_memory_flags(parser):
    """Flags of the trainings for cards with little memory."""
    parser.add_argument("--micro-batch", type=int, default=0, help="images at a time through the network, 0: the batch at once")
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=False,
                        help="activation checkpointing: less memory, a third more time")


def fit(stage, model, optimizer, images, loss_of, steps, schedule=lambda done: 1.0, watch=None):
    """Train to `steps` optimizer steps on `images`; a checkpoint each epoch, from which a rerun goes on.

    loss_of(part, batch), lists of tensors on the device -> the part's share of the batch's loss; the parts, --micro-batch
    images each, add up to the gradient of the whole. schedule(share of steps done) -> factor on each group's learning
    rate; watch(step) -> what to print before the first and after each epoch. A step's random numbers follow from its own
    number, so a run that was stopped equals one that never was.
    """
    args, record, path, step = stage.args, stage.record, stage.args.out / f"{stage.name}.pth", 0
    if args.micro_batch < 0:
        raise InputError(f"--micro-batch {args.micro_batch} is no number of images")
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp and amp_dtype(args.device) == torch.float16)
    size, epoch = args.batch_size, steps_of(images, args)

    def save():
        if watch:
            tqdm.write(f"{stage.name}: step {step} of {steps}: {watch(step)}")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step,
                 "id": record["id"], "settings": record["settings"]}
        write(path, lambda file: torch.save(state, file))
        stage.save()

    if path.is_file() and (saved := read_weights(path, quiet=True)).get("id") == record["id"]:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty where the run began without fp16
            scaler.load_state_dict(saved["scaler"])
        step = saved["step"]
    else:
        save()
    model.train()
    total, since = torch.zeros((), device=args.device), 0
    with Bar(total=steps * size, initial=step * size, desc=stage.name, unit="img", smoothing=0.05, writes=path) as bar:
        for batch in loader(images, None, args, Steps(len(images), size, args.seed, step, steps)):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(step / steps)
            batch = [x.to(args.device, non_blocking=True) for x in batch]
            optimizer.zero_grad(set_to_none=True)
            for n, part in enumerate(zip(*(x.split(args.micro_batch or size) for x in batch))):
                torch.manual_seed(seed_of(2, args.seed, step, n * (args.micro_batch or size)))  # of dropout
                with autocast(args):
                    loss = loss_of(part, batch)
                scaler.scale(loss).backward()
                total += loss.detach()
            scaler.step(optimizer)
            scaler.update()
            step, since = step + 1, since + 1
            bar.update(size)
            if step % 10 == 0 or step == steps:
                bar.set_postfix(loss=f"{total.item() / since:.4f}")
            if step % epoch == 0 or step == steps:
                if not torch.isfinite(total):
                    raise InputError(f"the loss of {stage.name} is {total.item()} at step {step} of {steps}: try a lower --lr, or --no-amp")
                save()
                model.train()
                total, since = torch.zeros((), device=args.device), 0


# ---------------------------------------------------------------- weight files

def print_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    print(f"{path}: sha256 {digest.hexdigest()}")


def read_weights(path, hint="", quiet=False):
    """A .pth file without unpickling code; its sha256 is printed. `hint` ends the message of an error: the file that would fit."""
    if not Path(path).is_file():
        raise InputError(f"no weight file {path}{hint}")
    try:
        if not quiet:
            print_sha256(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a foreign file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is no weight file that loads safely: {reason}{hint}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, not named tensors{hint}")
    return state


def load_weights(model, state, path, heads=(), partial=False, hint=""):
    """Load `state` strictly: whatever is left out is listed by name.

    heads: prefixes of names whose tensors may be missing or of another shape, and then start fresh.
    partial: the file may lack more than that. Returns the names left fresh.
    """
    own = model.state_dict()
    state = state.items() if isinstance(state, dict) else ()
    state = {k: v for k, v in state if isinstance(v, torch.Tensor) and not k.endswith("num_batches_tracked")}
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    fresh = [k for k in own if k not in fits and not k.endswith("num_batches_tracked")]
    wrong = [k for k in state if k not in fits and not k.startswith(tuple(heads))]
    lacking = [k for k in fresh if not k.startswith(tuple(heads))]
    if wrong or not fits or (lacking and not partial):
        example = (wrong or lacking)[0]
        shapes = [tuple(d[example].shape) if example in d else "absent" for d in (state, own)]
        raise InputError(f"{path} does not fit: {len(wrong)} tensors too many or of another shape, {len(lacking)} missing, "
                         f"first {example} (file {shapes[0]}, network {shapes[1]}){hint}")
    model.load_state_dict({**own, **{k: v.float() for k, v in fits.items()}})
    if fresh:
        groups = collections.Counter(".".join(name.rsplit(".", 1)[0].split(".")[:2]) for name in fresh)
        print(f"{path}: {len(fits)} tensors loaded; fresh: " + ", ".join(f"{g} ({n})" for g, n in groups.items()))
    return fresh


# ---------------------------------------------------------------- evaluation

def read_mask_within(path, num_classes):
    """`read_mask`, its values below `num_classes` or VOID."""
    mask = read_mask(path)
    worst = int(mask[mask != VOID].max(initial=0))
    if worst >= num_classes:
        raise InputError(f"{path} has value {worst}, but there are {num_classes} classes with background")
    return mask


def _score_seeds(mask_path, folder, id, names, kind):
    mask = read_mask_within(mask_path, 1 + len(names))
    classes, cams = read_any_seeds(folder, id, names, kind)
    if len(classes) and cams.shape[1:] != mask.shape:
        raise InputError(f"the class maps of {id} in {folder} are {cams.shape[1:]}, its mask {mask.shape}")
    return confusion_over_thresholds(mask, classes, cams, 1 + len(names))


def _score_floor(mask_path, id, classes, num_classes):
    """Seeds at random, of the photo's own labels, at THRESHOLDS; last background everywhere. -> (61, S, S)"""
    mask = read_mask_within(mask_path, num_classes)
    maps = np.random.RandomState(zlib.crc32(id.encode())).rand(len(classes), 16, 16)
    at_random = confusion_over_thresholds(mask, classes, combine_scales([torch.from_numpy(maps).float()], mask.shape).numpy(), num_classes)
    return np.concatenate([at_random, confusion(mask, np.zeros_like(mask), num_classes)[None]])


def _score_mask(mask_path, folder, id, names):
    """-> (S+1, S+1), the last column what the prediction leaves void"""
    path, num_classes = folder / f"{id}.png", 1 + len(names)
    if not path.is_file():
        raise InputError(f"no prediction {path}")
    mask, prediction = (read_mask_within(p, num_classes) for p in (mask_path, path))
    if prediction.shape != mask.shape:
        raise InputError(f"{path} is {prediction.shape}, its mask {mask.shape}")
    return confusion(mask, np.where(prediction == VOID, num_classes, prediction), num_classes + 1)


def score(work, jobs, workers, what):
    """Sum of the pixel counts that `work` makes of each job, (mask path, ...)."""
    require([path for path, *_ in jobs])
    return sum(in_processes(work, jobs, workers if len(jobs) > 1000 else 0, len(jobs), what))  # a pool takes seconds to start


def best_of(matrices):
    """The row of the table for confusion matrices (60, S, S) at THRESHOLDS: the best mIoU, and the whole curve."""
    each = iou(matrices)  # (60, S)
    curve = np.nanmean(each, 1)
    best = int(curve.argmax())
    return {"threshold": f"{THRESHOLDS[best]:.2f} (best)", "crf": "no", "iou": each[best].tolist(),
            "miou": 100 * float(curve[best]), "curve": (100 * curve).tolist()}


def score_seeds(dataset, ids, folder, workers, name):
    jobs = [(dataset.mask(id), folder, id, dataset.classes, name) for id in ids]
    return best_of(score(_score_seeds, jobs, workers, f"{name} seeds"))


def score_floor(dataset, ids, workers):
    """-> the rows of seeds at random and of background everywhere"""
    jobs = [(dataset.mask(id), id, own.nonzero()[:, 0].numpy() + 1, dataset.num_classes) for id, own in zip(ids, dataset.labels(ids))]
    matrices = score(_score_floor, jobs, workers, "floor")
    each = iou(matrices[-1])
    return best_of(matrices[:-1]), {"iou": each.tolist(), "miou": 100 * float(np.nanmean(each))}


def score_masks(dataset, ids, folder, workers, what, threshold, crf):
    matrix = score(_score_mask, [(dataset.mask(id), folder, id, dataset.classes) for id in ids], workers, what)
    each, coverage = iou(matrix[:-1, :-1]), float(matrix[:, :-1].sum() / max(1, matrix.sum()))
    return {"threshold": threshold, "crf": crf, "iou": each.tolist(), "miou": 100 * float(np.nanmean(each)), "coverage": coverage}


def evaluate(args):
    """Score every stage found in OUT against the masks, print one table, write OUT/results.json."""
    dataset = DataSet(args.data)
    if args.masks or args.seeds:
        ids, rows = dataset.ids(args.split), []
        for folder, scored in ((args.seeds, lambda: score_seeds(dataset, ids, args.seeds, args.workers, "refined")),
                               (args.masks, lambda: score_masks(dataset, ids, args.masks, args.workers, "masks", "-", "-"))):
            if folder:
                rows.append({"stage": folder.name, "split": args.split, "n": len(ids), **scored()})
        return print_table(rows, ["background", *dataset.classes])
    train, val = dataset.ids("train", required=False), dataset.ids("val", required=False)
    have = {name: json.loads(p.read_text()) for name in STAGES if (p := args.out / f"{name}.json").is_file()}
    done = {name: record["settings"] for name, record in have.items() if record["done"]}
    if not done:
        raise InputError(f'nothing to score in {args.out}: run "make train"')
    rows, masks = [], (dataset.root / "SegmentationClass").is_dir()
    if not masks:
        print(f"{dataset.root} has no SegmentationClass: masks cannot be scored")
        draw_labels(dataset, args.out)

    def add(stage, split, ids, needs, scored):
        if masks and ids and needs in done:
            rows.append({"stage": stage, "split": split, "n": len(ids), **scored(done[needs])})
        else:
            why = "no masks" if not masks else f"no {split}.txt" if not ids else f"not run: make {STAGES[needs][1]}"
            rows.append({"stage": stage, "split": split, "n": len(ids), "note": why})

    if "classifier" in done:
        last = list(have["classifier"]["watched"].values())[-1]["entropy"]  # of each block, after the last epoch
        rows.append({"stage": "classifier", "split": "val", "n": len(val), "note": "mAP", "map": have["classifier"]["map"],
                     "entropy": sum(last) / len(last)})
    if masks and train:
        for name, scored in zip(("random seeds", "background"), score_floor(dataset, train, args.workers)):
            rows.append({"stage": name, "split": "train", "n": len(train), **scored})
    if done.get("cams", {}).get("plain"):
        add("plain CAM", "train", train, "cams", lambda s: score_seeds(dataset, train, args.out / "cams", args.workers, "plain"))
    add("refined seeds", "train", train, "cams", lambda s: score_seeds(dataset, train, args.out / "cams", args.workers, "refined"))
    add("affinity labels", "train", train, "affinity_labels", lambda s: score_masks(
        dataset, train, args.out / "affinity_labels", args.workers, "affinity labels", f"{s['foreground']:.2f}/{s['background']:.2f}", "yes"))
    add("pseudo labels", "train", train, "pseudo_labels", lambda s: score_masks(
        dataset, train, args.out / "pseudo_labels", args.workers, "pseudo labels", f"bg {s['background_score']:.2f}", "yes"))
    add("segmenter", "val", val, "segmentation", lambda s: score_masks(
        dataset, val, args.out / "segmentation", args.workers, "segmenter", "-", "yes" if s["crf"] else "no"))
    write_json(args.out / "results.json", {
        "data": dataset.root.name, "classes": ["background", *dataset.classes], "rows": rows,
        "devices": sorted({record["device"] for record in have.values() if record["done"]}),
        "precision": {name: record["precision"] for name, record in have.items() if record["done"]},
        "seconds": {name: record["seconds"] for name, record in have.items()},
        "settings": done})
    print_table(rows, ["background", *dataset.classes])
    print("seconds: " + ", ".join(f"{n} {r['seconds']:.0f}" for n, r in have.items()) + f" -> {args.out / 'results.json'}")


def draw_labels(dataset, out, first=24):
    """Some photos with what the last stage made of them, to look at where there are no masks -> OUT/labels.png"""
    folder = next((f for f in (out / "segmentation", out / "pseudo_labels") if f.is_dir()), None)
    pictures = []
    for path in sorted(folder.rglob("*.png"))[:first] if folder else ():
        photo = v2.functional.pil_to_tensor(read_image(dataset.image(path.relative_to(folder).with_suffix("").as_posix())))
        pictures.append(v2.functional.center_crop(v2.functional.resize(overlay(photo, read_mask(path)), 160, antialias=True), 160))
    if pictures:
        grid = make_grid(torch.stack(pictures).float() / 255, nrow=6, padding=4, pad_value=1)
        write(out / "labels.png", lambda file: save_image(grid, file, format="png"))
        print(f"{len(pictures)} of {folder} drawn -> {out / 'labels.png'}")


def print_table(rows, classes):
    """The rows of results.json as text, the IoU of each class below."""
    print(f"\n{'stage':16} {'split':6} {'N':>6}  {'threshold':12} {'CRF':4} {'mIoU %':>7}")
    for r in rows:
        value = f"{r['miou']:7.2f}" if "miou" in r else "      -"
        if r.get("map") is not None:
            value = f"{100 * r['map']:7.2f} mAP"
        elif "note" in r:
            value += f" ({r['note']})"
        elif r.get("coverage", 1) < 1:
            value += f" on the {100 * r['coverage']:.1f} % of pixels that are labelled"
        print(f"{r['stage']:16} {r['split']:6} {r['n']:6}  {r.get('threshold', '-'):12} {r.get('crf', '-'):4} {value}")
    if any("best" in r.get("threshold", "") for r in rows):
        print("Thresholds of seeds marked (best) were chosen by looking at the masks, out of 0.00 ... 0.59.")
    print()
    scored = [r for r in rows if "iou" in r]
    if scored:
        print(f"{'IoU %':16}" + "".join(f"{r['stage']:>17}" for r in scored))
        for n, name in enumerate(classes):
            cells = ["absent" if math.isnan(r["iou"][n]) else f"{100 * r['iou'][n]:.2f}" for r in scored]
            print(f"{name:16}" + "".join(f"{c:>17}" for c in cells))
        if any(math.isnan(v) for r in scored for v in r["iou"]):
            print("absent: in neither masks nor predictions, so not part of the mean.")
        print()


def report(args):
    """Mean, deviation (n - 1) and values over --seeds of each row in OUT/rows/ROW-seedN/results.json, as Markdown.

    Runs that are not there are named. Runs are refused whose settings differ in more than loss, noise and seed.
    """
    folder, runs, settings = args.out / "rows", {}, {}
    for path in folder.glob("*-seed*/results.json"):
        row, _, seed = path.parent.name.rpartition("-seed")
        if seed.isdigit() and (int(seed) in args.seeds or row == "untrained"):
            runs.setdefault(row, {})[int(seed)] = json.loads(path.read_text())
    if not runs:
        raise InputError(f'no ROW-seedN/results.json in {folder}: run "make results"')
    runs = {row: dict(sorted(runs[row].items())) for row in sorted(runs)}
    own = {"loss", "noise", "seed", "data"}
    for row, seed, run in ((row, seed, run) for row, seeds in runs.items() for seed, run in seeds.items()):
        for stage, flag, value in ((s, f, v) for s, flags in run["settings"].items() for f, v in flags.items()):
            value = Path(value).name if isinstance(value, str) else value  # a file may lie elsewhere
            if flag not in own and (row, stage, flag) != ("untrained", "classifier", "epochs"):
                first = settings.setdefault(stage, {}).setdefault(flag, (value, f"{row}-seed{seed}"))
                if value != first[0]:
                    raise InputError(f"{folder}: {stage} had --{flag} {value} in {row}-seed{seed}, {first[0]} in {first[1]}: not one table")

    def cell(row, stage, key="miou", digits=2, scale=1):
        found = [r[key] * scale for run in runs.get(row, {}).values() for r in run["rows"] if r["stage"] == stage and r.get(key) is not None]
        if len(found) < 2:
            return f"{found[0]:.{digits}f}" if found else "-" if row in runs and stage == "classifier" else "not run"
        return f"{np.mean(found):.{digits}f} ± {np.std(found, ddof=1):.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in found)})"

    names = list(dict.fromkeys([*args.rows, *runs]))
    columns = "row", "seeds", "mAP, val", "entropy", "plain CAM", "refined seeds", "pseudo labels", "segmenter, val", "hours"
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in names:
        have = list(runs.get(row, {}))
        missing = [s for s in (args.seeds if row != "untrained" else [0]) if s not in have]
        seeds = ", ".join(map(str, have)) + (f" ({', '.join(map(str, missing))} not run)" if missing else "")
        hours = sum(sum(run["seconds"].values()) for run in runs.get(row, {}).values()) / 3600
        lines.append("| " + " | ".join([
            row, seeds, cell(row, "classifier", "map", scale=100), cell(row, "classifier", "entropy", 3),
            *(cell(row, stage) for stage in ("plain CAM", "refined seeds", "pseudo labels", "segmenter")), f"{hours:.2f}" if have else ""]) + " |")
    one = next(iter(next(iter(runs.values())).values()))
    for r in one["rows"]:
        if r["stage"] in ("random seeds", "background"):
            lines.append(f"| {r['stage']} | | | | | {r['miou']:.2f} | | | |")
    shown = range(5, len(THRESHOLDS), 10)
    lines += ["", "mIoU of the refined seeds over thresholds, mean over the seeds:", "",
              "| row | " + " | ".join(f"{THRESHOLDS[t]:.2f}" for t in shown) + " |", "|---" * (1 + len(shown)) + "|"]
    for row in names:
        curves = [r["curve"] for run in runs.get(row, {}).values() for r in run["rows"] if r["stage"] == "refined seeds" and "curve" in r]
        if curves:
            lines.append(f"| {row} | " + " | ".join(f"{v:.2f}" for v in np.mean(curves, 0)[shown]) + " |")
    lines += ["", f"On {', '.join(sorted({d for seeds in runs.values() for run in seeds.values() for d in run['devices']}))}. Settings:"]
    lines += [f"`{stage}` " + " ".join(f"{flag}={value}" for flag, (value, _) in flags.items()) + "." for stage, flags in settings.items()]
    text = "\n".join(lines)
    print(text)
    name, readme = args.data.resolve().name, args.readme.read_text() if args.readme else ""
    begin, end = f"<!-- rows of {name} -->\n", f"<!-- end of {name} -->"
    if begin in readme and end in readme:
        before, rest = readme.split(begin)
        write(args.readme, lambda file: file.write(f"{before}{begin}{text}\n{end}{rest.split(end)[1]}".encode()))


def images_a_class(dataset, labels):
    """labels: (n, K) of 0 and 1  ->  "images a class: cat 3, dog 2" """
    return "images a class: " + ", ".join(f"{c} {int(n)}" for c, n in zip(dataset.classes, labels.sum(0)))


def check(args):
    """Count a data set's files and name what would break a stage; exit status 1 if something would."""
    dataset, problems, unlike, large = DataSet(args.data), [], [], []
    try:
        print(f"{len(dataset.photo_of)} photos in {dataset.photos}")
    except InputError as error:  # two of one id
        problems.append(str(error))
    print(f"{dataset.num_classes} classes with background: {' '.join(dataset.classes)}")
    splits = {name: dataset.ids(name, required=name == "train_aug") for name in ("train_aug", "train", "val")}
    for name, ids in splits.items():
        masks = sum(dataset.mask(id).is_file() for id in ids)
        labels = dataset.labels(ids)
        print(f"{name}: {len(ids)} images, {masks} masks, {int((labels.sum(1) == 0).sum())} without any label; "
              + images_a_class(dataset, labels))
    for id in tqdm(sorted(set().union(*splits.values())), unit="img"):
        try:
            width, height = read_image(dataset.image(id)).size
            if max(width, height) > LARGE:
                large.append(f"{id}: {width}x{height}")
            if dataset.mask(id).is_file():
                mask = read_mask_within(dataset.mask(id), dataset.num_classes)
                if mask.shape != (height, width):
                    problems.append(f"{id}: image {height}x{width}, mask {mask.shape[0]}x{mask.shape[1]}")
                seen = sorted(dataset.classes[c - 1] for c in np.unique(mask).tolist() if 0 < c < VOID)
                if seen != sorted(set(dataset._names(id))):
                    unlike.append(f"{id}: mask {' '.join(seen) or '-'}, labels {' '.join(dataset._names(id)) or '-'}")
        except InputError as error:
            problems.append(str(error))
    if unlike:
        print(f"note: masks and labels of {len(unlike)} photos differ, first {unlike[0]}")
    if large:
        print(f"note: {len(large)} photos are longer than {LARGE} pixels, first {large[0]}: crops, CRF and walk are set for VOC's 500, "
              "and memory grows with the area: better shrink them")
    for line in problems[:20]:
        print(f"problem: {line}")
    if problems:
        raise InputError(f"{len(problems)} problems in {dataset.root}")
    print("no problems")


# ---------------------------------------------------------------- PASCAL VOC 2012

def fetch_archive(source, folder, needs):
    """Download one of torchvision's archives (url, md5) into a folder; InputError that says what to put there by hand."""
    try:
        download_and_extract_archive(source["url"], folder, md5=source["md5"])
    except (OSError, RuntimeError) as error:
        raise InputError(f"{folder} lacks {needs}, and {source['url']} cannot be fetched ({error}): put it there by hand") from None


def voc(args):
    """Prepare VOC 2012 for training: train_aug.txt = (SBD train + SBD val + VOC train) - VOC val, and labels.txt from the XML.

    --root is the devkit's VOC2012 folder, or one that holds or gets VOCdevkit/VOC2012. Of SBD only two lists are read.
    """
    def present(paths, file):
        return next((p for p in paths if p and (p / file).exists()), None)

    places = args.root / "VOCdevkit" / "VOC2012", args.root
    if not present(places, "JPEGImages"):
        fetch_archive(DATASET_YEAR_DICT["2012"], args.root, "VOCdevkit/VOC2012")
    root = present(places, "JPEGImages")
    places = args.sbd, args.root / "sbd", args.root / "benchmark_RELEASE" / "dataset"
    if not present(places, "train.txt"):
        fetch_archive({"url": SBDataset.url, "md5": SBDataset.md5}, args.root, "benchmark_RELEASE/dataset/train.txt of SBD (or --sbd DIR)")
    sbd, dataset = present(places, "train.txt"), DataSet(root)
    more = [photo_id(line.split()[0]) for name in ("train.txt", "val.txt") for line in (sbd / name).read_text().split("\n") if line.strip()]
    lists = {name: dataset.ids(name, required=name != "test") for name in ("train", "val", "test")}
    lists["train_aug"] = sorted({*more, *lists["train"]} - set(lists["val"]))
    require([dataset.image(id) for id in lists["train_aug"]])
    known = sorted({*lists["train_aug"], *lists["val"]})
    dataset.labels(known)
    for path, lines in ((root / "ImageSets/Segmentation/train_aug.txt", lists["train_aug"]),
                        (root / "labels.txt", (" ".join([id, *dict.fromkeys(dataset._names(id))]) for id in known))):
        write_lines(path, lines)
    check_sizes(root, lists, VOC_SIZES, "VOC 2012")


def check_sizes(root, lists, sizes, name):
    """Print the sizes of the lists just written; InputError where they are not those published."""
    print(f"{root}: " + ", ".join(f"{split} {len(ids)}" for split, ids in lists.items()))
    wrong = [f"{split} has {len(lists[split])} ids, {name}'s {size}" for split, size in sizes.items()
             if len(lists[split]) != size and (lists[split] or split != "test")]  # VOC's test photos come apart
    if wrong:
        raise InputError("written, but " + "; ".join(wrong))


# ---------------------------------------------------------------- MS COCO 2014

def decode(segmentation, height, width):
    """An instance of COCO as a mask. -> bool (H, W)

    segmentation: polygons, each x0, y0, x1, y1, ... in pixels; or {"size": [H, W], "counts": lengths of the runs of 0 and 1
    down the columns, as a list or packed into a string}.
    """
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise InputError(f'no masks of COCO without pycocotools ({error}): run "make coco DATA=DIR" or "pip install pycocotools"') from None
    if isinstance(segmentation, dict):
        plain = isinstance(segmentation["counts"], list)
        if segmentation["size"] != [height, width] or plain and sum(segmentation["counts"]) != height * width:
            raise ValueError("run lengths of another size")
        return coco_mask.decode(coco_mask.frPyObjects(segmentation, height, width) if plain else segmentation).astype(bool)
    polygons = [p for p in segmentation if len(p) > 4]  # fewer numbers enclose nothing, and pycocotools takes four for a box
    if not polygons:
        return np.zeros((height, width), bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def _write_coco_mask(path, height, width, instances):
    """Paint [(annotation's id, value, segmentation)] by falling area: the smaller lies on top, of two equal ones the later."""
    shapes, mask = [], np.zeros((height, width), np.uint8)
    for id, value, segmentation in instances:
        try:
            shapes.append((decode(segmentation, height, width), value))
        except Exception as error:  # pycocotools raises many kinds
            raise InputError(f"annotation {id} for {path} ({height}x{width}) cannot be decoded: {error}") from None
    for shape, value in sorted(shapes, key=lambda s: s[0].sum(), reverse=True):
        mask[shape] = value
    write_mask(path, mask)


def _compact(entry):
    """What is read of a json object, polygons as arrays: parsing 455 MB then peaks at 1.1 GiB, not at 2.6."""
    if "image_id" in entry:
        shape = entry["segmentation"]
        shape = [array("d", polygon) for polygon in shape] if isinstance(shape, list) else shape
        return entry["id"], entry["image_id"], entry["category_id"], entry["iscrowd"], shape
    return {key: entry[key] for key in ("id", "file_name", "height", "width")} if "file_name" in entry else entry


def _prepare_split(root, split, workers):
    """Write those masks of a split that are not there yet. -> names of the classes, {id: its labels} of the photos with an instance"""
    path, instances = root / "annotations" / f"instances_{split}.json", {}
    try:
        found = json.loads(path.read_text(), object_hook=_compact)
        names = {c["id"]: c["name"].replace(" ", "_") for c in sorted(found["categories"], key=lambda c: c["id"])}
        images = {i["id"]: i for i in found["images"]}
        for annotation in found["annotations"]:
            id, image, category, _, _ = annotation
            if image not in images or category not in names:
                raise InputError(f"{path}: annotation {id} is of image {image}, category {category}, of which one is not listed")
            instances.setdefault(image, []).append(annotation)
        photos = {f"{split}/{photo_id(images[i]['file_name'])}": images[i] for i in sorted(instances)}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {path}: {type(error).__name__} {error}") from None
    require([root / split / photo["file_name"] for photo in photos.values()])
    number = {category: n for n, category in enumerate(names, start=1)}
    todo = {id: path for id in photos if not (path := root / "SegmentationClass" / f"{id}.png").is_file()}
    jobs = ((path, photos[id]["height"], photos[id]["width"],
             [(n, VOID if crowd else number[category], shape) for n, _, category, crowd, shape in instances[photos[id]["id"]]])
            for id, path in todo.items())
    for _ in in_processes(_write_coco_mask, jobs, workers, len(todo), f"{split} masks", root / "SegmentationClass" / split):
        pass
    return list(names.values()), {id: [names[c] for c in sorted({a[2] for a in instances[photo["id"]]})] for id, photo in photos.items()}


def coco(args):
    """Make a folder with COCO's train2014, val2014 and annotations a data set: links to the photos, masks, labels and lists.

    train_aug = train, and val, are the photos with an instance, crowds among them. Masks that are there are not made again.
    """
    decode([], 1, 1)  # pycocotools must be there
    root, photos, splits = args.root, args.root / "JPEGImages", COCO_SPLITS.values()
    needed = [*splits, *(f"annotations/instances_{split}.json" for split in splits)]
    if missing := [name for name in needed if not (root / name).exists()]:
        raise InputError(f"{root} lacks {', '.join(missing)} of COCO 2014: put them there")
    if photos.is_symlink() or photos.exists() and any(not p.is_symlink() or os.readlink(p) != f"../{p.name}" for p in photos.iterdir()):
        raise InputError(f"{photos} holds more than links to {' and '.join(splits)}: move it away")
    lists, labels, classes = {}, {}, []
    for name, split in COCO_SPLITS.items():
        names, known = _prepare_split(root, split, args.workers)
        if classes and names != classes:
            raise InputError(f"the categories in {root}/annotations/instances_{split}.json are not those of the other split")
        classes, lists[name] = names, list(known)
        labels.update(known)
    lists["train"] = lists["train_aug"]
    photos.mkdir(exist_ok=True)
    for split in splits:
        if not (photos / split).is_symlink():
            (photos / split).symlink_to(f"../{split}")
    for name, lines in {"classes": classes, "labels": (" ".join([id, *names]) for id, names in labels.items()),
                        **{f"ImageSets/Segmentation/{name}": ids for name, ids in lists.items()}}.items():
        write_lines(root / f"{name}.txt", lines)
    dataset = DataSet(root)
    for name in COCO_SPLITS:
        print(f"{name}: {images_a_class(dataset, dataset.labels(dataset.ids(name)))}")
    print(f"peak memory {peak_memory():.1f} GB, without the workers' own")  # theirs would start from their parent's
    check_sizes(root, lists, COCO_SIZES, "COCO 2014")


# ---------------------------------------------------------------- toy set: animals with one shared body, told apart by head and tail

TOY_CLASSES = ("cat", "rabbit", "cow", "bear", "lion")
SCENES = {  # in the order of the classes at home there: the colours of the far half (top, bottom) and of the ground, and the
    # things scattered there, the far ones first: count, whether in the far half, shape, half width, half height, colours
    "room": ((120, 128, 178), (140, 146, 190), (124, 72, 92), (92, 52, 72), []),
    "meadow": ((140, 200, 240), (206, 232, 240), (150, 204, 92), (74, 146, 66), [
        (600, False, "blade", 0, 16, ((62, 134, 58), (62, 134, 58), (172, 218, 104))),
        (26, False, "flower", 8, 7, ((255, 252, 245), (240, 90, 90), (250, 214, 70), (190, 120, 220)))]),
    "river": ((150, 204, 120), (100, 172, 100), (104, 190, 218), (36, 106, 168), [
        (24, True, "oval", 30, 16, ((60, 136, 84), (80, 156, 88), (50, 120, 80))), (90, False, "wave", 18, 7, ((176, 226, 240),)),
        (8, False, "oval", 18, 7, ((66, 160, 100), (86, 176, 104)))]),
    "forest": ((28, 66, 62), (58, 110, 82), (84, 128, 66), (44, 84, 54), [
        (14, True, "trunk", 12, 0, ((72, 54, 60), (92, 70, 70))), (30, True, "oval", 30, 20, ((40, 92, 68), (52, 108, 70))),
        (200, False, "blade", 0, 16, ((116, 164, 78),)), (9, False, "flower", 11, 8, ((214, 62, 54),))]),
    "dunes": ((116, 196, 216), (196, 230, 224), (246, 216, 134), (226, 172, 84), [
        (8, False, "wave", 240, 40, ((204, 150, 74),)),
        (70, False, "oval", 6, 4, ((168, 136, 112), (150, 160, 90), (220, 204, 180)))])}
FURS = (  # of the body, whatever the class
    (200, 150, 110), (228, 214, 190), (168, 170, 178), (150, 112, 92), (118, 116, 132), (206, 170, 160))
COATS = {  # of head and tail
    "cat": (238, 130, 40), "rabbit": (250, 244, 240), "cow": (60, 48, 52), "bear": (126, 70, 36), "lion": (246, 200, 84)}
COAT, WHITE, INK, PINK, GOLD, RUST = None, (255, 252, 245), (44, 34, 38), (246, 142, 160), (250, 200, 60), (176, 62, 30)
# What tells a class: marks behind the head, then on the face, each with its mirror image. The head's centre is (0, 0) and its
# radius 20. Four numbers are an oval (centre, radii), a list of points is a polygon; COAT is that of the class.
MARKS = {
    "cat": ([([(-20, -4), (-19, -33), (-2, -16)], COAT), ([(-17, -9), (-16.5, -27), (-6, -16)], PINK)],
            [((8, -3, 6, 6.5), (70, 190, 80)), ((8, -3, 2, 6), INK), ([(-4, 6), (4, 6), (0, 11)], PINK)]),
    "rabbit": ([((9, -31, 7, 20), COAT), ((9, -30, 4, 16), PINK)],
               [((7, 8, 8.5, 7.5), WHITE), ([(-3, 11), (3, 11), (3, 19), (-3, 19)], WHITE), ((8, -5, 3.5, 4.5), INK),
                ((9, -6.5, 1.3, 1.3), WHITE), ((0, 3, 4, 3), PINK)]),
    "cow": ([((22, -5, 8, 5), COAT), ([(6, -16), (17, -21), (19, -34), (27, -24), (24, -13), (14, -8)], WHITE)],
            [((0, 9, 17, 10), PINK), ((6, 9, 2.5, 3.5), (168, 70, 92)), ((8, -7, 4.5, 4.5), WHITE), ((8, -6.5, 2.7, 3), INK)]),
    "bear": ([((15, -15, 9, 9), COAT), ((15, -15, 5.5, 5.5), INK)],
             [((9, -4, 7, 8), INK), ((8.5, -4, 3, 3), WHITE), ((0, 9, 10, 8), (250, 232, 196)), ((0, 5, 4.5, 3.2), INK)]),
    "lion": ([((20 * np.sin(a), -20 * np.cos(a), 7, 7), (GOLD, RUST)[i % 2]) for i, a in enumerate(np.linspace(0, np.pi, 9))],
             [((8, -5, 3.5, 4.5), INK), ((9, -6.5, 1.3, 1.3), WHITE), ((5, 9, 6, 5), GOLD), ([(-5, 3), (5, 3), (0, 9)], RUST)])}


def oval(draw, x, y, rx, ry, fill):
    """Fill the ellipse with this centre and these radii (in pixels)."""
    draw.ellipse([int(round(v)) for v in (x - rx, y - ry, x + rx, y + ry)], fill=fill)


def paint_fur(rng, size):
    """A square of fur, a base colour with patches, stripes or speckles of a second one, and the base colour."""
    base, second = (FURS[i] for i in rng.permutation(len(FURS))[:2])
    second = tuple((a + 2 * b) // 3 for a, b in zip(base, second))
    fur, pattern = Image.new("RGB", (size, size), base), rng.choice(["patches", "stripes", "speckles"])
    draw = ImageDraw.Draw(fur)
    if pattern == "stripes":
        for x in range(0, size, 30):
            draw.line([(x + int(rng.randint(-6, 7)), y) for y in range(0, size + 1, 40)], second, int(rng.randint(7, 13)))
    for _ in range({"patches": 16, "stripes": 0, "speckles": 170}[pattern]):
        oval(draw, *rng.randint(0, size, 2), *(rng.randint(20, 42, 2) if pattern == "patches" else rng.randint(4, 8, 2)), second)
    return fur, base


def draw_animal(rng, name, extent):
    """An RGBA layer, cropped to the animal, whose longer side is `extent` pixels."""
    fur, colour = paint_fur(rng, 390)
    coat = Image.new("RGB", fur.size, COATS[name])
    layer = Image.new("RGBA", fur.size, (*colour, 0))
    draw = ImageDraw.Draw(layer)

    def part(x0, y0, x1, y1, light=1.0, corner=None, skin=fur):
        """Paste what the skin shows in a round-cornered box (an oval without `corner`), lit from above, with a dark rim."""
        shade = light * np.linspace(1.12, 0.78, y1 - y0)[:, None, None]
        tile = Image.fromarray(np.minimum(np.asarray(skin.crop((x0, y0, x1, y1))) * shade, 255).astype(np.uint8))
        mask, area = Image.new("L", tile.size), (0, 0, x1 - x0 - 1, y1 - y0 - 1)
        for image, fill, rim in ((mask, 255, 255), (tile, None, (84, 62, 58))):
            pen = ImageDraw.Draw(image)
            pen.rounded_rectangle(area, corner, fill, rim, 3) if corner else pen.ellipse(area, fill, rim, 3)
        layer.paste(tile, (x0, y0), mask)

    draw.line([(272, 240), (306, 214), (320, 188)], COATS[name], 24, joint="curve")  # the tail
    part(284, 150, 348, 214, skin=coat)
    for x, foot, light in ((148, 342, 0.8), (222, 342, 0.8), (116, 352, 1.0), (244, 352, 1.0)):  # the far legs, the near ones
        part(x, 256, x + 42, foot, light, 18)
    part(98, 190, 294, 320)
    for on_face, marks in enumerate(MARKS[name]):
        if on_face:
            part(46, 114, 178, 246, 1.04, skin=coat)
        for shape, fill in marks:
            for unit in (-3.3, 3.3):  # pixels; the sign makes the mirror image
                if isinstance(shape, list):
                    draw.polygon([(int(112 + unit * x), int(180 + 3.3 * y)) for x, y in shape], fill or COATS[name])
                else:
                    oval(draw, 112 + unit * shape[0], 180 + 3.3 * shape[1], 3.3 * shape[2], 3.3 * shape[3], fill or COATS[name])
    layer = layer.transpose(Image.FLIP_LEFT_RIGHT) if rng.rand() < 0.5 else layer
    layer = layer.rotate(float(rng.uniform(-9, 9)), Image.BILINEAR)
    layer = layer.crop(layer.getchannel("A").getbbox())
    return layer.resize([round(side * extent / max(layer.size)) for side in layer.size], Image.LANCZOS)


def draw_scene(rng, name, width, height):
    """A background, and the row of its horizon: two colour gradients meet there, under the things that belong to the scene."""
    *colours, things = SCENES[name]
    width, height = 2 * width, 2 * height  # drawn at twice the size
    top, bottom, ground, end = np.array(colours, float)
    horizon = int(height * rng.uniform(0.3, 0.5))
    rows = np.concatenate([np.linspace(top, bottom, horizon), np.linspace(ground, end, height - horizon)])
    image = Image.fromarray(np.repeat(rows[:, None], width, axis=1).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    if name == "room":  # a wall of bricks above planks
        for x, y in ((x, y) for y in range(-4, horizon - 4, 28) for x in range(-60 + 30 * (y // 28 % 2), width, 60)):
            tone = (top + rng.randint(-14, 15)).astype(int)
            draw.rectangle([x + 2, y + 2, x + 57, min(y + 25, horizon)], tuple(tone.tolist()))
        for y in range(horizon, height, 30):
            x = int(rng.randint(0, width))
            draw.line([(0, y), (x, y), (x, y + 30), (x, y), (width, y)], (64, 36, 52), 4)
    for count, far, shape, w, h, fills in things:
        rows = sorted(rng.randint(*((0, horizon) if far else (horizon, height)), count).tolist())  # the farthest first
        for x, y, k in zip(rng.randint(0, width, count).tolist(), rows, rng.randint(0, 12, count).tolist()):
            box, fill = [x - w, y - h, x + w, y + h], fills[k % len(fills)]
            if shape == "blade":
                draw.line([x, y, x + k - 6, y - h - k + 6], fill, 3)
            elif shape == "wave":
                draw.arc(box, 200, 340, fill, 4)
            elif shape == "trunk":
                draw.rectangle([x - w, 0, x + w, horizon + 3 * k], fill)
            else:
                draw.ellipse(box, fill)
            if shape == "flower":
                oval(draw, x, y, 3, 3, GOLD)
    return image.reduce(2), horizon // 2


def toy_picture(rng):
    """One picture (RGB) and its mask: 0 background, 1..5 the class, 255 a void border around every outline."""
    width, height = rng.randint(160, 257, 2).tolist()
    labels = rng.randint(1, 6, rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])).tolist()
    home = labels[0] - 1 if rng.rand() < 0.3 else rng.randint(5)  # with the chance hits, at home in 44 % of the pictures
    picture, horizon = draw_scene(rng, list(SCENES)[home], width, height)
    largest = (0.9, 0.8, 0.65)[len(labels) - 1] * min(width, height)
    extents = [int(np.clip(largest * rng.uniform(0.7, 1), 80, 160)) for _ in labels]
    layers = [draw_animal(rng, TOY_CLASSES[label - 1], extent) for label, extent in zip(labels, extents)]
    shapes = [np.asarray(layer.getchannel("A")) > 127 for layer in layers]
    for attempt in range(150):  # until nobody hides more than a little of anybody; now and then with one animal fewer
        boxes = []
        for h, w in (shape.shape for shape in shapes[:max(1, len(labels) - attempt // 50)]):
            x, y = rng.randint(0, width - w + 1), rng.randint(max(0, horizon + 8 - h), height - h + 1)
            boxes.append((int(x), int(y), int(x + w), int(y + h)))
        order = sorted(range(len(boxes)), key=lambda i: boxes[i][3])  # the nearest last
        owner = np.zeros((height, width), np.uint8)  # 0, or 1 + the index of the animal seen there
        for i in order:
            x0, y0, x1, y1 = boxes[i]
            owner[y0:y1, x0:x1][shapes[i]] = i + 1
        if all((owner == i + 1).sum() >= 0.85 * shapes[i].sum() for i in order):
            break
    for i in order:
        x0, y0, x1, y1 = boxes[i]
        shadow = Image.new("L", picture.size)
        oval(ImageDraw.Draw(shadow), (x0 + x1) / 2, y1 - 4, (x1 - x0) * 0.44, (y1 - y0) * 0.06, 70)
        picture.paste((24, 24, 40), None, shadow)
        picture.paste(layers[i], (x0, y0), layers[i])
    pixels = np.asarray(picture) * rng.uniform(0.92, 1.06, 3) + rng.normal(0, 2, (height, width, 3))
    mask, owner = np.array([0] + labels, np.uint8)[owner], Image.fromarray(owner)
    mask[np.asarray(owner.filter(ImageFilter.MaxFilter(3))) != np.asarray(owner.filter(ImageFilter.MinFilter(3)))] = 255
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), mask


def toy(args):
    """Draw the toy set: a data set in VOC layout, the same pixels for the same seed."""
    made = args.root / "toy.json"
    settings = {"seed": args.seed, "train": args.train, "val": args.val, "classes": TOY_CLASSES}
    if made.is_file() and json.loads(made.read_text()) == json.loads(json.dumps(settings)):
        return print(f"{args.root} is drawn already")
    if args.root.exists() and any(args.root.iterdir()) and not made.is_file():
        raise InputError(f"{args.root} holds something else: not drawing over it")
    ids = [f"toy_{n:04d}" for n in range(args.train + args.val)]
    labels = []
    for n, id in enumerate(tqdm(ids, desc="toy set", unit="img")):
        picture, mask = toy_picture(np.random.RandomState([args.seed, n]))
        write(args.root / "JPEGImages" / f"{id}.jpg", lambda file: picture.save(file, format="JPEG", quality=95))
        write_mask(args.root / "SegmentationClass" / f"{id}.png", mask)
        labels.append(" ".join([id] + [TOY_CLASSES[c - 1] for c in np.unique(mask) if 0 < c < VOID]))
    train, val = ids[:args.train], ids[args.train:]
    texts = {"labels": labels, "classes": TOY_CLASSES, **{f"ImageSets/Segmentation/{name}": split for name, split in
                                                          (("train_aug", train), ("train", train), ("val", val))}}
    for name, lines in texts.items():
        write_lines(args.root / f"{name}.txt", lines)
    write_json(made, settings)
    print(f"{args.root}: {len(train)} train, {len(val)} val pictures")


def main():
    commands = Commands(__doc__, {"toy": {}, "voc": {}, "coco": {}, "small": {}})
    parser = commands.add(evaluate, "score every stage in OUT", name="eval")
    parser.add_argument("--masks", type=Path, help="score this folder of index PNGs instead")
    parser.add_argument("--seeds", type=Path, help="score this folder of class maps instead: ID.npz of ours or ID/CLASS.npy")
    parser.add_argument("--split", default="train", help="list that --masks or --seeds is scored on")
    parser = commands.add(export, "our seeds for other people's code")
    parser.add_argument("--to", type=Path, required=True, help="folder to write ID/CLASS.npy into")
    parser = commands.add(report, "mean and deviation over the seeds of all rows")
    parser.add_argument("--rows", nargs="+", default=[], help="rows to list first, not run or not")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs; missing ones are named")
    parser.add_argument("--readme", type=Path, help="where it has <!-- rows of NAME --> and <!-- end of NAME -->, write the tables between")
    commands.add(check, "look for what would break a stage")
    for function, help in ((toy, "draw the toy set"), (voc, "prepare PASCAL VOC 2012"), (coco, "prepare MS COCO 2014")):
        parser = commands.commands.add_parser(function.__name__, help=help, description=function.__doc__)
        parser.set_defaults(function=function)
        if function is toy:
            parser.add_argument("--root", type=Path, default=Path("data/toy"), help="folder to draw into")
            parser.add_argument("--seed", type=int, default=0, help="of the drawings")
            parser.add_argument("--train", type=int, default=320, help="training pictures")
            parser.add_argument("--val", type=int, default=80, help="validation pictures")
        elif function is voc:
            parser.add_argument("--root", type=Path, required=True, help="the devkit's VOC2012 folder, or where to download to")
            parser.add_argument("--sbd", type=Path, help="folder with SBD's train.txt and val.txt")
        else:
            parser.add_argument("--root", type=Path, required=True, help="folder with train2014, val2014 and annotations")
            parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that draw the masks")
    commands.run()


if __name__ == "__main__":
    main()
