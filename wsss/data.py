"""A data set on disk: its lists, image labels and classes; its photos, and what makes tensors of them.

A data set is a folder in PASCAL VOC layout: JPEGImages/ID.jpg, SegmentationClass/ID.png (for scoring only),
ImageSets/Segmentation/{train_aug,train,val}.txt, classes.txt (optional, VOC's 20 names otherwise), image labels
from labels.txt ("ID name name ...") or else from Annotations/ID.xml. Or any folder of photos with a labels.txt.
"""
import functools
import hashlib
import math
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2

from wsss.masks import VOID
from wsss.stage import InputError, read_text, require

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, of RGB in [0, 1]
JITTER = 0.3, 0.3, 0.3, 0.1  # of brightness, contrast, saturation, hue (TransCAM)
MEAN_COLOUR = tuple(round(255 * m) for m in MEAN)
PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # endings, in either case
NO_CLASSES = ("background", "_background_", "bg", "__ignore__", "void", "unlabeled")
VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()


def leads_out(name):
    """Whether a file of this name would lie outside the folder that it is written into."""
    return name.startswith("/") or "\0" in name or ".." in Path(name).parts


def photo_id(text, source="the list"):
    """ "/JPEGImages/ID.jpg", "ID.jpg" or "ID"  ->  "ID"; InputError where a file of that name would lie elsewhere. """
    name = text.split("JPEGImages/")[-1].lstrip("/") if "JPEGImages/" in text else text
    ending = Path(name).suffix
    name = name.removesuffix(ending) if ending.lower() in PHOTOS else name
    if not name or leads_out(name):
        raise InputError(f"{source} has the id {text!r}, which would lead out of the folder")
    return Path(name).as_posix()  # less "./"


def read_entries(path):
    """The lines of a file -> (id, rest, how errors name the line). The id ends at a tab, else at the first blank."""
    entries = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        text, _, rest = line.strip(" ").partition("\t" if "\t" in line else " ")
        if text or rest.strip():
            entries.append((text.strip(), rest.strip(), f"{path}, line {number} ({line.strip(' ')!r})"))
    return entries


def find_photos(folder, leave_out=None):
    """Paths of all photos below a folder, in order; links are followed, once. leave_out: a folder not looked into"""
    photos, visited = [], {os.path.realpath(leave_out)} if leave_out else set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()  # a link back
            continue
        visited.add(real)
        paths = (Path(place, name) for name in names if name.lower().endswith(PHOTOS) and not name.startswith("."))
        photos += [path for path in paths if path.is_file()]  # neither fifos nor devices
    return sorted(photos)


def photos_in(paths, leave_out):
    """Of photos, and of folders but for one -> {id: path}; InputError where two have one id."""
    photos = {}
    for start in paths:
        if not (start.is_dir() or start.is_file()):
            raise InputError(f"{start} is neither a photo nor a folder")
        for path in find_photos(start, leave_out) if start.is_dir() else [start]:
            name = photo_id(path.relative_to(start).as_posix() if start.is_dir() else path.name, start)
            if photos.setdefault(name, path) != path:
                raise InputError(f"two photos have the id {name}: {photos[name]} and {path}")
    if not photos:
        raise InputError(f"no photos in {', '.join(map(str, paths))}: of {' '.join(PHOTOS)}")
    return photos


class DataSet:
    """A folder in VOC layout, or one of photos with a labels.txt, whose lines then are train_aug and name the classes.

    Class 0 is background, `classes` names the K others. An id is a photo's path below the folder, less its ending.
    """

    def __init__(self, root):
        self.root = Path(root)
        voc, labels, names = self.root / "JPEGImages", self.root / "labels.txt", self.root / "classes.txt"
        if not (voc.is_dir() or labels.is_file()):
            raise InputError(f"{self.root} is not a data set: it has neither JPEGImages nor, beside photos, labels.txt")
        self.photos = voc if voc.is_dir() else self.root
        self._labels = {}
        if labels.is_file():
            self._read_labels(labels)
        if names.is_file():
            self.classes = [line.strip() for line in read_text(names).splitlines() if line.strip()]
            if bad := next((name for name in self.classes if len(name.split()) > 1), None):
                raise InputError(f"{names}: {bad!r} has a space: write {'_'.join(bad.split())}, in {labels.name} too")
        else:
            self.classes = VOC_CLASSES if voc.is_dir() else sorted(set().union(*self._labels.values()))
        if not self.classes or len(set(self.classes)) < len(self.classes) or len(self.classes) >= VOID:
            raise InputError(f"{self.root} names {len(self.classes)} classes: 1 to {VOID - 1} are needed, each once")
        for name in self.classes:
            if name.lower() in NO_CLASSES:
                raise InputError(f"{self.root} names the class {name!r}: background is class 0 already, void is {VOID}")
            if leads_out(name):  # `export` names files so
                raise InputError(f"{self.root} has the class {name!r}, which would lead out of a folder")
        self.num_classes = 1 + len(self.classes)

    def _read_labels(self, path):
        """Lines of an id, then classes."""
        where_of = {}
        for text, rest, where in read_entries(path):
            classes = rest.split()
            if wrong := next((name for name in classes if "," in name or name.lower().endswith(PHOTOS)), None):
                raise InputError(f"{where}: not a class: {wrong!r}: put blanks between, a tab after an id with one")
            name = self.find_id(text, where)
            if set(self._labels.setdefault(name, classes)) != set(classes):
                raise InputError(f"{where} names {name} a second time, with other classes")
            where_of.setdefault(name, where)
        self._require_photos(where_of)

    def _require_photos(self, where_of):
        """InputError where photos are missing. where_of: {id: the line that names it}"""
        paths = {name: self.image(name) for name in where_of}
        lost = next((name for name, path in paths.items() if not path.is_file()), None)
        if lost is not None:
            require(paths.values(), "photos", f": {where_of[lost]}")

    def list_file(self, split):
        """The file of a list, or None; a folder of photos with a labels.txt has that for train_aug and train."""
        path = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if self.photos == self.root and split in ("train_aug", "train") and not path.is_file():
            path = self.root / "labels.txt"
        return path if path.is_file() else None

    def ids(self, split, required=True):
        """Ids of a list. Its lines are "ID" or "/JPEGImages/ID.jpg /.../ID.png"."""
        path = self.list_file(split)
        if path is None:
            if required:
                raise InputError(f"{self.root}/ImageSets/Segmentation has no {split}.txt: one image id a line")
            return []
        if path == self.root / "labels.txt":
            return list(self._labels)
        where_of = {}
        for text, mask, where in read_entries(path):
            if mask and "/" not in mask:
                raise InputError(f"{where}: put a tab behind an id that has a blank")
            name = self.find_id(text, where)
            if where_of.setdefault(name, where) != where:
                raise InputError(f"{where} names {name} a second time")
        if required and not where_of:
            raise InputError(f"{path} is empty: one image id a line")
        self._require_photos(where_of)
        return list(where_of)

    def ids_of_seeds(self):
        """Of the photos that need seeds: to train on, and to score them on."""
        return list(dict.fromkeys(self.ids("train_aug") + self.ids("train", required=False)))

    def find_id(self, text, where):
        """The id that a list or flag gives with or without its photo's ending; where: the file, for the error."""
        name, ending = photo_id(text, where), Path(text).suffix
        if ending.lower() not in PHOTOS:
            return name
        path = self.image(name)
        if path.is_file() and path.suffix == ending:
            return name
        if path.is_file():
            raise InputError(f"{where} names {text}, but the photo is {path.name}")
        return name

    def trained_on(self, ids, lists=("train_aug", "train")):
        """Those of the ids that stand in a list to train on too."""
        trained = set().union(*(self.ids(split, required=False) for split in lists))
        return [name for name in ids if name in trained]

    def image(self, name):
        path = self.photos / f"{name}.jpg"
        return path if path.is_file() else self.photo_of.get(name, path)

    @functools.cached_property
    def photo_of(self):
        """Every photo of the folder. -> {id: path}"""
        return photos_in([self.photos], leave_out=self.root / "SegmentationClass")

    def mask(self, name):
        return self.root / "SegmentationClass" / f"{name}.png"

    def labels(self, ids):
        """Image-level labels. ids -> float32 (len(ids), K) of 0 and 1."""
        number = {name: n for n, name in enumerate(self.classes)}
        out = torch.zeros(len(ids), len(self.classes))
        for row, name in enumerate(ids):
            for label in self.names(name):
                if label not in number:
                    raise InputError(f"{self.root}: the label {label!r} of {name} is not in classes.txt (or VOC's)")
                out[row, number[label]] = 1
        return out

    def names(self, name):
        """Its labels as class names."""
        if name not in self._labels:
            path = self.root / "Annotations" / f"{name}.xml"
            try:  # the standard library's parser fetches nothing, and refuses entities that grow without end
                objects = ElementTree.parse(path).findall("object")
            except (OSError, ElementTree.ParseError) as error:
                raise InputError(f"no labels of {name}: not in {self.root}/labels.txt, and {path}: {error}") from None
            self._labels[name] = [one.findtext("name", "").strip() for one in objects]
        return self._labels[name]

    def is_that_of(self, record):
        """Whether a stage with this record was made from the lists, labels and classes of today."""
        settings = record["settings"]
        return settings["data_set"] == self.digest_of(settings.get("train_list", "train_aug"))

    @functools.cache
    def digest_of(self, split):
        """Of classes, a list (with train_aug also train) and its labels: what a stage depends on."""
        ids = [self.ids(one, required=False) for one in ((split, "train") if split == "train_aug" else (split,))]
        known = [[(name, sorted(set(self.names(name)))) for name in names] for names in ids]
        return hashlib.sha256(repr((self.classes, known)).encode()).hexdigest()[:16]


def read_image(path):
    """An image file of any mode -> PIL RGB, turned as its EXIF entry says."""
    require([path], "photos")
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode == "F":
            raise ValueError("its pixels are floats: save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut, not scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        raise InputError(f"cannot read {path}: {error}") from None


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


def random_long_side(image, low, high):
    """The longer side becomes a random length in [low, high] pixels (Pillow bicubic, antialiased). PIL -> PIL"""
    factor = int(torch.randint(low, high + 1, ())) / max(image.size)
    size = [max(1, round(side * factor)) for side in image.size[::-1]]
    return v2.functional.resize(image, size, InterpolationMode.BICUBIC)


def to_tensor():
    """PIL RGB -> float32 (3, H, W), ImageNet mean and deviation. A mask beside it stays as it is."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def square(side):
    """PIL photo -> float32 (3, side, side), resized"""
    return v2.Compose([v2.Resize((side, side), InterpolationMode.BICUBIC), to_tensor()])


def jitter_hsv(photo):
    """Random shift of hue by up to 10 of 180, of saturation and value by up to 10 of 255. PIL RGB -> PIL RGB"""
    shift = torch.empty(3).uniform_(-10, 10).numpy() * (256 / 180, 1, 1)  # Pillow's hue has 256 steps
    hsv = np.array(photo.convert("HSV")) + shift
    hsv[..., 0] %= 256
    return Image.fromarray(hsv.clip(0, 255).astype(np.uint8), mode="HSV").convert("RGB")


def scale_like_opencv(image, factor, mode="bicubic"):
    """Both sides times `factor`, as OpenCV's cubic or nearest does it: not antialiased, on the grid of `factor` itself.

    image: float32 (C, H, W)  ->  float32 (C, round(factor H), round(factor W)), at least one pixel each
    """
    height, width = (max(1, round(side * factor)) for side in image.shape[1:])
    more = math.ceil(1 / factor)  # of the border's pixels, so that the grid reaches the rounded size
    padded = F.pad(image[None], (0, more, 0, more), mode="replicate")
    scaled = F.interpolate(padded, scale_factor=factor, mode=mode, recompute_scale_factor=False)
    return scaled[0, :, :height, :width]
