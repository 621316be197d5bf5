"""A data set on disk: its lists, image labels and classes, and how its masks contradict them.

A data set is a folder in PASCAL VOC layout: JPEGImages/ID.jpg, SegmentationClass/ID.png (for scoring only),
ImageSets/Segmentation/{train_aug,train,val}.txt, classes.txt (optional, VOC's 20 names otherwise), image labels
from labels.txt ("ID name name ...") or else from Annotations/ID.xml. Or any folder of photos with a labels.txt.
"""
import contextlib
import functools
import hashlib
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch

from wsss.images import VOID, header_size, other_size, read_image, read_mask, require
from wsss.stage import InputError, read_lines, read_text

PHOTOS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # endings, in either case
NO_CLASSES = ("background", "_background_", "bg", "__ignore__", "void", "unlabeled")
VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()


# ---------------------------------------------------------------- data set

class DataSet:
    """A folder in VOC layout, or one of photos with a labels.txt, whose lines then are train_aug and name the classes.

    Class 0 is background; `classes` names the K foreground classes 1..K. An id is a photo's path below the folder, less
    its ending. problems: a list that takes what is wrong with photos and lines of text, an InputError without it.
    """

    def __init__(self, root, problems=None):
        self.root, self._problems = Path(root), problems
        voc, labels, names = self.root / "JPEGImages", self.root / "labels.txt", self.root / "classes.txt"
        if not (voc.is_dir() or labels.is_file()):
            raise InputError(f"{self.root} is not a data set: it has neither JPEGImages nor, beside photos, a "
                             'labels.txt (the toy set is drawn by "python -m wsss.prepare toy")')
        self.photos = voc if voc.is_dir() else self.root
        self._labels = {}
        for text, classes, where in read_entries(labels) if labels.is_file() else ():
            with self._telling():
                self._read_labels(text, classes.split(), where)
        if names.is_file():
            self.classes = read_lines(names)
            if bad := next((name for name in self.classes if len(name.split()) > 1), None):
                raise InputError(f"{names}: {bad!r} has a space: write {'_'.join(bad.split())}, in {labels.name} too")
        else:
            self.classes = VOC_CLASSES if voc.is_dir() else sorted(set().union(*self._labels.values()))
        if not self.classes or len(set(self.classes)) < len(self.classes) or len(self.classes) >= VOID:
            raise InputError(f"{self.root} names {len(self.classes)} classes: 1 to {VOID - 1} are needed, each once")
        if wrong := next((name for name in self.classes if name.lower() in NO_CLASSES), None):
            raise InputError(f"{names if names.is_file() else labels} names the class {wrong!r}: background is class 0 "
                             f"already and void is {VOID}, leave both out")
        if wrong := next(filter(leads_out, self.classes), None):  # `export` names files so
            raise InputError(f"{self.root} has the class {wrong!r}, which would lead out of a folder")
        self.num_classes = 1 + len(self.classes)

    def _read_labels(self, text, classes, where):
        """A line of labels.txt: an id, then classes."""
        if wrong := next((name for name in classes if "," in name or name.lower().endswith(PHOTOS)), None):
            raise InputError(f"{where} names the class {wrong!r}: write ID CLASS CLASS, with blanks between, and a tab "
                             "behind an id that has a blank")
        name = self.find_id(text, where)
        if (self.photos == self.root or "," in text) and not self.image(name).is_file():
            raise InputError(f"{where}: there is no photo {text} in {self.photos}")
        if set(self._labels.setdefault(name, classes)) != set(classes):
            raise InputError(f"{where} names {name} a second time, with other classes")

    @contextlib.contextmanager
    def _telling(self):
        """What is wrong inside goes to the list of problems, where there is one."""
        try:
            yield
        except InputError as error:
            if self._problems is None:
                raise
            self._problems.append(str(error))

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
        entries, found, twice = read_entries(path), {}, []
        if required and not entries:
            raise InputError(f"{path} is empty: one image id a line")
        if path == self.root / "labels.txt":
            return list(self._labels)
        for text, mask, where in entries:
            with self._telling():
                if mask and "/" not in mask:
                    raise InputError(f"{where}: put a tab behind an id that has a blank")
                name = self.find_id(text, where)
                twice += [name] * (name in found)
                found[name] = where
        with self._telling():
            if twice:
                raise InputError(f"{path} names {len(twice)} ids twice, first {twice[0]}")
        there = [name for name in found if self.image(name).is_file()]
        if len(there) < len(found):
            lost = next(where for name, where in found.items() if not self.image(name).is_file())
            with self._telling():
                require([self.image(name) for name in found], "photos", f": {lost}")
        return there

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
        if self.image(name + ending).is_file():  # an id that ends like a photo: "x.jpg" of x.jpg.jpg
            return name + ending
        if path.is_file():
            raise InputError(f"{where} names {text}, but the photo is {path.name}")
        return name

    def trained_on(self, ids):
        """Those of the ids that stand in train_aug or train too."""
        seen = {*self.ids("train_aug", required=False), *self.ids("train", required=False)}
        return [name for name in ids if name in seen]

    def image(self, name):
        path = self.photos / f"{name}.jpg"
        return path if path.is_file() else self.photo_of.get(name, path)

    @functools.cached_property
    def photo_of(self):
        """Every photo of the folder, links followed. -> id: path"""
        found = {}
        for path in find_photos(self.photos, leave_out=self.root / "SegmentationClass"):
            name = photo_id(path.relative_to(self.photos).as_posix(), self.photos)
            with self._telling():
                if found.setdefault(name, path) != path:
                    raise InputError(f"two photos have the id {name}: {found[name]} and {path}")
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
                    raise InputError(f'{self.root}: the label "{label}" of {name} is not one of its {len(number)} '
                                     "classes")
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

    def is_that_of(self, record):
        """Whether a stage with this record was made from the lists, labels and classes of today."""
        settings = record["settings"]
        return settings["data_set"] == self.digest_of(settings.get("train_list", "train_aug"))

    @functools.cache
    def digest_of(self, split):
        """Of classes, a list and its labels: what a stage depends on, wherever the folder lies."""
        known = [(name, sorted(set(self.names(name)))) for name in self.ids(split, required=False)]
        return hashlib.sha256(repr((self.classes, known)).encode()).hexdigest()[:16]


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
    return name


def read_entries(path):
    """Its lines, each an id, which ends at a tab or else the first blank, the rest, and what errors call the line."""
    entries = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        text, _, rest = line.strip(" ").partition("\t" if "\t" in line else " ")
        if text or rest.strip():
            entries.append((text.strip(), rest.strip(), f"{path}, line {number} ({line.strip(' ')!r})"))
    return entries


def find_photos(folder, leave_out=None):
    """Paths of all photos below a folder, in order; links are followed, once. leave_out: a folder not looked into"""
    found, seen = [], {os.path.realpath(leave_out)} if leave_out else set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()  # a link back
            continue
        seen.add(real)
        paths = (Path(place, name) for name in names if name.lower().endswith(PHOTOS) and not name.startswith("."))
        found += [path for path in paths if path.is_file()]  # neither fifos nor devices
    return sorted(found)


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


# ---------------------------------------------------------------- masks against photos and labels

def require_labels(dataset, ids, folder, what, again=""):
    """InputError unless each photo has a label FOLDER/ID.png of its size. again: what makes them again"""
    paths, wrong = [folder / f"{name}.png" for name in ids], []
    require(paths, what, again and f": {again}")
    for name, path in zip(ids, paths):
        (h, w), (H, W) = header_size(path, False), header_size(dataset.image(name), True)
        if (h, w) != (H, W):
            wrong.append(other_size(path, (h, w), (H, W)))
    if wrong:
        raise InputError(f"{wrong[0]}, the first of {len(wrong)} {what} of another size than their photos"
                         + (again and f": delete them and {again}"))


def classes_in(path, num_classes, size=None):
    """The classes in a mask, of (H, W) where that is given. -> bool (S,)"""
    return np.bincount(read_mask(path, num_classes, size).ravel(), minlength=256)[:num_classes] > 0


def contradictions(dataset, names, presence):
    """How the masks of these photos contradict their image labels, a line each; that a few differ is normal.

    presence: (n, S), `classes_in` of each photo's mask; photos without known labels say nothing
    """
    shown, told, known = np.asarray(presence).reshape(len(names), -1)[:, 1:], [], []
    for n, name in enumerate(names):
        with contextlib.suppress(InputError):
            told.append(dataset.labels([name])[0].numpy() > 0)
            known.append(n)
    if len(names) and not shown.any() and (not told or np.any(told)):
        return [f"none of {len(names)} masks shows a class: they hold 0 (background) and {VOID} (void) alone, where "
                f"classes are 1 to {dataset.num_classes - 1}"]
    if not told:
        return []
    shown, told, lines = shown[known], np.array(told), []
    both, count = told & shown, told.sum(0)
    for n, name in enumerate(dataset.classes):
        if count[n] and not both[:, n].any():
            where = "only in masks of photos without that label" if shown[:, n].any() else "in none of the masks"
            lines.append(f"{name}: labelled in {count[n]} photos, {where}")
    labelled, without = told.any(1), told.any(1) & ~both.any(1)
    if without.sum() > labelled.sum() / 2:
        lines.append(f"{without.sum()} of {labelled.sum()} masks show none of their photo's labels, first "
                     f"{names[known[int(without.argmax())]]}")
    return lines
