"""A data set on disk: its lists and image labels, photos, masks, transforms, and the loader.

A data set is a folder in PASCAL VOC layout: JPEGImages/ID.jpg, SegmentationClass/ID.png (for scoring only),
ImageSets/Segmentation/{train_aug,train,val}.txt, classes.txt (optional, VOC's 20 names otherwise), image labels
from labels.txt ("ID name name ...") or else from Annotations/ID.xml. Or any folder of photos with a labels.txt.
"""
import functools
import hashlib
import os
import struct
import xml.etree.ElementTree as ElementTree
from multiprocessing import get_all_start_methods
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms import InterpolationMode, v2
from torchvision.utils import draw_segmentation_masks

from engine import WORLD, seed_of
from stage import RANK, FlagError, InputError, NoDataSet, read_lines, read_text, write

VOID = 255  # mask value that never counts
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, of RGB in [0, 1]
MEAN_COLOUR = tuple(round(255 * m) for m in MEAN)
PHOTOS = (".jpg", ".jpeg", ".png", ".webp")  # endings, in either case
VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)  # of Pillow


# ---------------------------------------------------------------- data set

class DataSet:
    """A folder in VOC layout, or one of photos with a labels.txt, whose lines then are train_aug and name the classes.

    Class 0 is background; `classes` names the K foreground classes 1..K. An id is a photo's path below the folder, less
    its ending. problems: a list that takes what is wrong with lines of labels.txt, which is an InputError without it.
    """

    def __init__(self, root, problems=None):
        self.root = Path(root)
        voc, labels, names = self.root / "JPEGImages", self.root / "labels.txt", self.root / "classes.txt"
        if not (voc.is_dir() or labels.is_file()):
            raise NoDataSet(f"{self.root} is no data set: it has neither JPEGImages nor, beside photos, a labels.txt"
                            f' (the toy set is drawn by "python prepare.py toy")')
        self.photos = voc if voc.is_dir() else self.root
        self._labels = {}
        for line in read_lines(labels) if labels.is_file() else ():
            text, *classes = line.split()
            try:
                name = photo_id(text, labels)
                if set(self._labels.setdefault(name, classes)) != set(classes):
                    raise InputError(f"{labels} names {name} twice, with other classes")
            except InputError as error:
                if problems is None:
                    raise
                problems.append(str(error))
        if names.is_file():
            self.classes = read_lines(names)
            if bad := next((name for name in self.classes if len(name.split()) > 1), None):
                raise InputError(f"{names}: {bad!r} has a space: write {'_'.join(bad.split())}, in {labels.name} too")
        else:
            self.classes = VOC_CLASSES if voc.is_dir() else sorted(set().union(*self._labels.values()))
        if not self.classes or len(set(self.classes)) < len(self.classes) or len(self.classes) >= VOID:
            raise InputError(f"{self.root} names {len(self.classes)} classes: 1 to {VOID - 1} are needed, each once")
        if wrong := next(filter(leads_out, self.classes), None):  # `export` names files so
            raise InputError(f"{self.root} has the class {wrong!r}, which would lead out of a folder")
        self.num_classes = 1 + len(self.classes)

    def list_file(self, split):
        """The file of a list, or None; a folder of photos with a labels.txt has that for train_aug and train."""
        files = [self.root / "ImageSets" / "Segmentation" / f"{split}.txt"]
        if split == "train_aug":
            files.append(files[0].with_name("trainaug.txt"))
        if self.photos == self.root and split in ("train_aug", "train"):
            files.append(self.root / "labels.txt")
        return next((file for file in files if file.is_file()), None)

    def ids(self, split, required=True):
        """Ids of a list. Its lines are "ID" or "/JPEGImages/ID.jpg /.../ID.png"."""
        path = self.list_file(split)
        if path is None:
            if required:
                raise InputError(f"{self.root}/ImageSets/Segmentation has no {split}.txt: one image id a line")
            return []
        own = path == self.root / "labels.txt"
        ids = list(self._labels) if own else [photo_id(line.split()[0], path) for line in read_lines(path)]
        if required and not ids:
            raise InputError(f"{path} is empty: one image id a line")
        if len(set(ids)) < len(ids):
            twice = next(name for n, name in enumerate(ids) if name in ids[:n])
            raise InputError(f"{path} names {len(ids) - len(set(ids))} ids twice, first {twice}")
        require([self.image(name) for name in ids], "photos")
        return ids

    def ids_of_seeds(self):
        """Of the photos that need seeds: to train on, and to score them on."""
        return list(dict.fromkeys(self.ids("train_aug") + self.ids("train", required=False)))

    def image(self, name):
        path = self.photos / f"{name}.jpg"
        return path if path.is_file() else self.photo_of.get(name, path)

    @functools.cached_property
    def photo_of(self):
        """Every photo of the folder, links followed. -> id: path"""
        found = {}
        for path in find_photos(self.photos):
            name = photo_id(path.relative_to(self.photos).as_posix(), self.photos)
            if name in found:
                raise InputError(f"two photos have the id {name}: {found[name]} and {path}")
            found[name] = path
        return found

    def mask(self, name):
        return self.root / "SegmentationClass" / f"{name}.png"

    def labels(self, ids):
        """Image-level labels. ids -> float32 (len(ids), K) of 0 and 1."""
        number = {name: n for n, name in enumerate(self.classes)}
        out = torch.zeros(len(ids), len(self.classes))
        for row, name in enumerate(ids):
            for label in self.names(name):
                if label not in number:
                    raise InputError(f'{self.root}: the label "{label}" of {name} is none of its {len(number)} classes')
                out[row, number[label]] = 1
        return out

    def names(self, name):
        """Its labels as class names."""
        if name not in self._labels:
            path = self.root / "Annotations" / f"{name}.xml"
            try:  # the standard library's parser fetches nothing, and refuses entities that grow without end
                objects = ElementTree.fromstring(read_text(path)).findall("object")
            except (InputError, ElementTree.ParseError) as error:
                where = f"not in {self.root}/labels.txt, and {path}: {error}"
                raise InputError(f"no image labels of {name}: {where}") from None
            labels = [found.findtext("name", "").strip() for found in objects]
            if not all(labels):
                raise InputError(f"{path} has an object without a name")
            self._labels[name] = labels
        return self._labels[name]

    @functools.cached_property
    def digest(self):
        """Of classes, train_aug and its labels: what a training depends on, wherever the folder lies."""
        return self.digest_of("train_aug")

    def digest_of(self, split):
        known = [(name, sorted(set(self.names(name)))) for name in self.ids(split, required=False)]
        return hashlib.sha256(repr((self.classes, known)).encode()).hexdigest()[:16]


def leads_out(name):
    """Whether a file of this name would lie outside the folder that it is written into."""
    return name.startswith("/") or "\0" in name or ".." in Path(name).parts


def photo_id(text, source="the list"):
    """ "/JPEGImages/ID.jpg", "ID.jpg" or "ID"  ->  "ID"; InputError where a file of that name would lie elsewhere. """
    name = text.split("JPEGImages/")[-1].lstrip("/") if "JPEGImages/" in text else text
    stem, _, ending = name.rpartition(".")
    name = stem if f".{ending.lower()}" in PHOTOS else name
    if not name or leads_out(name):
        raise InputError(f"{source} has the id {text!r}, which would lead out of the folder")
    return name


def find_photos(folder):
    """Paths of all photos below a folder, in order; links are followed, once."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()  # a link back
            continue
        seen.add(real)
        paths = (Path(place, name) for name in names if name.lower().endswith(PHOTOS) and not name.startswith("."))
        found += [path for path in paths if path.is_file()]  # neither fifos nor devices
    return sorted(found)


def require(paths, what, remedy=""):
    """Raise InputError unless all files exist."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        count = f"{len(missing)} of {len(paths)} {what}"
        raise InputError(f"{missing[0].parent} lacks {count}, first {missing[0].name}{remedy}")


# ---------------------------------------------------------------- photos and masks

def read_image(path):
    """An image file of any mode -> PIL RGB, turned as its EXIF entry says."""
    require([Path(path)], "photos")
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut, not scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except UNREADABLE as error:
        raise InputError(f"cannot read {path}: {error}") from None


def header_size(path, is_photo):
    """(H, W) of an image file without reading its pixels; of a photo after the turn that its EXIF entry asks for."""
    try:
        with Image.open(path) as image:
            turned = is_photo and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return image.size if turned else image.size[::-1]
    except UNREADABLE as error:
        raise InputError(f"cannot read {path}: {error}") from None


def require_labels(dataset, ids, folder, what, again=""):
    """InputError unless each photo has a label FOLDER/ID.png of its size. again: what makes them anew"""
    paths, wrong = [folder / f"{name}.png" for name in ids], []
    require(paths, what, again and f": {again}")
    for name, path in zip(ids, paths):
        (h, w), (H, W) = header_size(path, False), header_size(dataset.image(name), True)
        if (h, w) != (H, W):
            wrong.append(f"{path} is {w}x{h}, its photo {W}x{H}")
    if wrong:
        raise InputError(f"{wrong[0]}, the first of {len(wrong)} {what} of another size than their photos"
                         + (again and f": delete them and {again}"))


def read_mask(path, num_classes=None, size=None):
    """An index PNG -> uint8 (H, W). Colours of PASCAL VOC's palette become their index, with a line saying so.

    num_classes: values must lie below it, or be VOID; size: (H, W) that the mask must have.
    """
    require([Path(path)], "masks")
    try:
        mask = Image.open(path)
        mode, values = mask.mode, np.array(mask)
    except UNREADABLE as error:
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
    if num_classes and (worst := int(values[values != VOID].max(initial=0))) >= num_classes:
        raise InputError(f"{path} has value {worst}, but there are {num_classes} classes with background")
    if size and values.shape != tuple(size):
        raise InputError(f"{path} is {values.shape[1]}x{values.shape[0]}, its photo {size[1]}x{size[0]}")
    return values.astype(np.uint8)


@functools.lru_cache
def note(line):
    """Print a line the first time it is said."""
    print(line, flush=True)


@functools.lru_cache
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


# ---------------------------------------------------------------- transforms and loader

def rescale(image, factor):
    """Both sides of a PIL image times `factor`, at least one pixel each (Pillow bicubic, antialiased)."""
    size = [max(1, round(side * factor)) for side in image.size[::-1]]
    return v2.functional.resize(image, size, InterpolationMode.BICUBIC)


def random_long_side(image, low, high):
    """The longer side becomes a random length in [low, high] pixels."""
    return rescale(image, int(torch.randint(low, high + 1, ())) / max(image.size))


def to_tensor():
    """PIL RGB -> float32 (3, H, W), ImageNet mean and deviation. A mask beside it stays as it is."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def square(side):
    """PIL photo -> float32 (3, side, side), resized"""
    return v2.Compose([v2.Resize((side, side), InterpolationMode.BICUBIC), to_tensor()])


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
        name = self.ids[index]
        return self.item(name, read_image(self.path(name)))


def loader(images, args, **how):
    """torch's DataLoader, with workers where a GPU waits; on the CPU the network takes all cores."""
    gpu = args.device.type == "cuda"
    workers = args.workers if gpu and "fork" in get_all_start_methods() else 0  # only a fork passes closures on
    return torch.utils.data.DataLoader(images, num_workers=workers, pin_memory=gpu,
                                       multiprocessing_context="fork" if workers else None, **how)


@functools.lru_cache(2)
def _order(count, seed, epoch):
    return np.random.default_rng(seed_of(0, seed, epoch)).permutation(count)


class Batches:
    """The images of each training step: a new order each epoch, an incomplete last batch dropped.

    All follows from the run's seed and the step's number. Under torchrun `load` gives a process its share.
    """

    def __init__(self, images, args):
        self.images, self.args, self.batch_size = images, args, args.batch_size
        self.per_epoch = len(images) // self.batch_size
        if not self.per_epoch:
            raise InputError(f"{len(images)} training images are fewer than --batch-size {self.batch_size}")
        if self.batch_size % WORLD:
            raise FlagError(f"--batch-size {self.batch_size} is no multiple of {WORLD} processes")

    def __len__(self):
        """Images a step of this process."""
        return self.batch_size // WORLD

    def indices(self, step):
        epoch, n = divmod(step, self.per_epoch)
        order = _order(len(self.images), self.args.seed, epoch)
        return order[n * self.batch_size:(n + 1) * self.batch_size].tolist()

    def names(self, step):
        return [self.images.ids[index] for index in self.indices(step)]

    def load(self, start, stop):
        """The batches of these steps, one after the other."""
        own = slice(RANK * len(self), (RANK + 1) * len(self))
        steps = ([(index, seed_of(1, self.args.seed, step, index)) for index in self.indices(step)[own]]
                 for step in range(start, stop))
        return loader(self.images, self.args, batch_sampler=steps)
