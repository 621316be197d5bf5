"""Makes a folder a data set: the toy set drawn, VOC and COCO with lists, labels and masks; and checks any data set.

    python -m wsss.prepare toy                draws the toy set into data/toy; interrupted, it continues
    python -m wsss.prepare voc --root DIR     PASCAL VOC 2012 with SBD's lists: fetched where missing, lists and labels
    python -m wsss.prepare coco --root DIR    MS COCO 2014: links to its photos, masks, labels and lists; it goes on
    python -m wsss.prepare check --data DIR   counts, and what would break a stage; exit status 1 if something would

The layout is the one that wsss/data.py reads. Masks are for scoring alone.
"""
import wsss  # noqa: F401, must come first: names a package that is not installed
import json
import os
import shutil
import tarfile
from array import array
from http.client import HTTPException
from pathlib import Path

import numpy as np
from torchvision.datasets import VOCSegmentation
from tqdm import tqdm

from wsss.check import check, images_a_class
from wsss.cli import TOY, Commands, whole
from wsss.data import DataSet, photo_id, read_entries
from wsss.images import VOID, read_image, read_mask, require, write_mask
from wsss.pool import in_processes, peak_memory
from wsss.stage import (TEMPORARY, InputError, is_junk, is_whole, read_json, read_text, write, write_json,
                        write_lines)
from wsss.toy import TOY_CLASSES, toy_picture

VOC_SIZES = {"train_aug": 10582, "train": 1464, "val": 1449, "test": 1456}
COCO_SPLITS = {"train_aug": "train2014", "val": "val2014"}
COCO_SIZES = {"train_aug": 82081, "val": 40137}  # photos with an instance
LONGEST = 65535  # pixels of a JPEG's side


# ---------------------------------------------------------------- toy set

def read_drawing(photo, mask):
    """The mask of a toy picture that is there whole, else None."""
    try:
        width, height = read_image(photo).size
        return read_mask(mask, 1 + len(TOY_CLASSES), (height, width))
    except InputError:
        return None


def toy(args):
    """Draw the toy set: a data set in VOC layout, the same pixels for the same seed. What is there whole stays."""
    made, begun = args.root / "toy.json", args.root / "toy.part.json"
    settings = {"seed": args.seed, "train": args.train, "val": args.val, "classes": list(TOY_CLASSES)}
    record = next((read_json(path) for path in (made, begun) if path.is_file()), None)
    if record is None and any(not is_junk(path) for path in args.root.glob("[!.]*")):
        raise InputError(f"{args.root} holds something else: not drawing over it")
    if record not in (None, settings):
        flags = " ".join(f"--{flag} {record.get(flag)}" for flag in ("seed", "train", "val"))
        raise InputError(f"{args.root} holds a drawing of {flags}: take another --root, or remove it")
    if record is None:
        write_json(begun, settings)
    for path in args.root.rglob(f".*{TEMPORARY}"):  # of drawings that were killed
        path.unlink()
    names = [f"toy_{n:04d}" for n in range(args.train + args.val)]
    labels, drawn = [], 0
    for n, name in enumerate(tqdm(names, desc="toy set", unit="img")):
        photo, path = args.root / "JPEGImages" / f"{name}.jpg", args.root / "SegmentationClass" / f"{name}.png"
        mask = read_drawing(photo, path)
        if mask is None:
            picture, mask = toy_picture(np.random.RandomState([args.seed, n]))
            write(photo, lambda file: picture.save(file, format="JPEG", quality=95))
            write_mask(path, mask)
            drawn += 1
        labels.append(" ".join([name] + [TOY_CLASSES[c - 1] for c in np.unique(mask) if 0 < c < VOID]))
    train, val = names[:args.train], names[args.train:]
    lists = {"labels.txt": labels, "classes.txt": TOY_CLASSES}
    for split, chosen in (("train_aug", train), ("train", train), ("val", val)):
        lists[f"ImageSets/Segmentation/{split}.txt"] = chosen
    missing = [file for file in lists if not (args.root / file).is_file()]
    for file in missing:
        write_lines(args.root / file, lists[file])
    if made.is_file() and not drawn and not missing:
        return print(f"{args.root} is drawn already")
    write_json(made, settings)
    begun.unlink(missing_ok=True)
    print(f"{args.root}: {len(train)} train, {len(val)} val pictures, {drawn} of them drawn now")


# ---------------------------------------------------------------- PASCAL VOC 2012

def fetch_devkit(root):
    """Have torchvision download and unpack the devkit; complete, it becomes ROOT/VOCdevkit."""
    part = root / "VOCdevkit.part"
    try:
        part.mkdir(parents=True, exist_ok=True)
        VOCSegmentation(part, year="2012", image_set="train", download=True)
        os.replace(part / "VOCdevkit", root / "VOCdevkit")
        shutil.rmtree(part)
    except (OSError, RuntimeError, HTTPException, tarfile.TarError, EOFError) as error:
        raise InputError(f"{root} lacks VOCdevkit/VOC2012, and it cannot be fetched ({error}): unpack "
                         "VOCtrainval_11-May-2012.tar there by hand") from None


def check_sizes(root, lists, sizes, what):
    """Print the sizes of the lists just written; InputError where they are not those published."""
    print(f"{root}: " + ", ".join(f"{split} {len(names)}" for split, names in lists.items()))
    wrong = [f"{split} has {len(lists[split])} ids, {what}'s {size}" for split, size in sizes.items()
             if len(lists[split]) != size and (lists[split] or split != "test")]  # VOC's test photos come apart
    if wrong:
        raise InputError("written, but " + "; ".join(wrong))


def voc(args):
    """Prepare VOC 2012: train_aug.txt = (SBD train + SBD val + VOC train) - VOC val, and labels.txt from the XML.

    --root is the devkit's VOC2012 folder, or one that holds or gets VOCdevkit/VOC2012. Of SBD only two lists are read.
    """
    places = args.sbd, args.root / "sbd", args.root / "benchmark_RELEASE" / "dataset"
    sbd = next((place for place in places if place and (place / "train.txt").is_file()), None)
    if sbd is None:
        raise InputError(f"{args.sbd or args.root / 'sbd'} lacks SBD's train.txt and val.txt: take them from "
                         "benchmark_RELEASE/dataset of its archive, and name their folder with --sbd DIR")
    root = args.root
    if not (root / "JPEGImages").is_dir():
        root = args.root / "VOCdevkit" / "VOC2012"
        if not root.is_dir():
            fetch_devkit(args.root)
    dataset, more = DataSet(root), set()
    for path in (sbd / "train.txt", sbd / "val.txt"):
        more.update(photo_id(text, where) for text, _, where in read_entries(path))
    lists = {split: dataset.ids(split, required=split != "test") for split in ("train", "val", "test")}
    lists["train_aug"] = sorted(more.union(lists["train"]) - set(lists["val"]))
    require([dataset.image(name) for name in lists["train_aug"]], "photos")
    known = sorted({*lists["train_aug"], *lists["val"]})
    dataset.labels(known)  # an unknown class ends here, before anything is written
    write_lines(root / "ImageSets/Segmentation/train_aug.txt", lists["train_aug"])
    write_lines(root / "labels.txt", [" ".join([name, *dict.fromkeys(dataset.names(name))]) for name in known])
    check_sizes(root, lists, VOC_SIZES, "VOC 2012")


# ---------------------------------------------------------------- MS COCO 2014

def decode(segmentation, height, width):
    """An instance of COCO as a mask. -> bool (H, W)

    segmentation: polygons, each x0, y0, x1, y1, ... in pixels; or {"size": [H, W], "counts": lengths of the runs of 0
    and 1 down the columns, as a list or packed into a string}.
    """
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise InputError(f"no masks of COCO without pycocotools ({error}): "
                         'run "make coco DATA=DIR" or "pip install pycocotools"') from None
    if isinstance(segmentation, dict):
        plain = isinstance(segmentation["counts"], list)
        if segmentation["size"] != [height, width] or plain and sum(segmentation["counts"]) != height * width:
            raise ValueError("run lengths of another size")
        runs = coco_mask.frPyObjects(segmentation, height, width) if plain else segmentation
        return coco_mask.decode(runs).astype(bool)
    polygons = [p for p in segmentation if len(p) > 4]  # fewer enclose nothing, and pycocotools takes four for a box
    if not polygons:
        return np.zeros((height, width), bool)
    if not all(np.abs(polygon).max() <= LONGEST for polygon in polygons):  # nan and infinity crash pycocotools
        raise ValueError("corners far outside the photo")
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def write_coco_mask(path, height, width, instances):
    """Paint [(annotation, value, segmentation)]: the smaller lies on top, of two equally large ones the later."""
    shapes, mask = [], np.zeros((height, width), np.uint8)
    for number, value, segmentation in instances:
        try:
            shapes.append((decode(segmentation, height, width), value))
        except Exception as error:  # pycocotools raises many kinds
            raise InputError(f"annotation {number} for {path} ({height}x{width}) cannot be decoded: {error}") from None
    for shape, value in sorted(shapes, key=lambda pair: pair[0].sum(), reverse=True):
        mask[shape] = value
    write_mask(path, mask)


def compact(entry):
    """What is read of a json object, polygons as arrays: parsing 455 MB then peaks at 1.1 GiB, not at 2.6."""
    if "image_id" in entry:
        shape = entry["segmentation"]
        shape = shape if isinstance(shape, dict) else [array("d", polygon) for polygon in shape]
        return entry["id"], entry["image_id"], entry["category_id"], entry["iscrowd"], shape
    return {key: entry[key] for key in ("id", "file_name", "height", "width")} if "file_name" in entry else entry


def read_instances(path):
    """-> {category: class}, {image: (file name, height, width, [annotation, ...])} of the images with an instance"""
    try:
        found = json.loads(read_text(path), object_hook=compact)
        categories = sorted(found["categories"], key=lambda category: category["id"])
        classes = {category["id"]: category["name"].replace(" ", "_") for category in categories}
        images = {image["id"]: image for image in found["images"]}
        instances = {}
        for number, image, category, crowd, shape in found["annotations"]:
            if image not in images or category not in classes:
                raise InputError(f"{path}: annotation {number} is of image {image}, category {category}, "
                                 "of which one is not listed")
            instances.setdefault(image, []).append((number, category, crowd, shape))
        photos = {}
        for image in sorted(instances):
            file, height, width = (images[image][key] for key in ("file_name", "height", "width"))
            if Path(file).name != file or not (0 < height <= LONGEST and 0 < width <= LONGEST):
                raise InputError(f"{path}: image {image} is refused: name {file!r}, {height}x{width}")
            photos[image] = file, int(height), int(width), instances[image]
        if len({file for file, *_ in photos.values()}) < len(photos):
            raise ValueError("two images of one file name")
        return classes, photos
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {type(error).__name__} {error}") from None


def prepare_split(root, split, workers):
    """Write those masks of a split that are not there yet. -> names of the classes, {photo id: its labels}"""
    classes, photos = read_instances(root / "annotations" / f"instances_{split}.json")
    require([root / split / file for file, *_ in photos.values()], "photos")
    value = {category: n for n, category in enumerate(classes, start=1)}
    labels, todo = {}, {}
    for image, (file, _, _, instances) in photos.items():
        name = f"{split}/{photo_id(file)}"
        labels[name] = [classes[category] for category in sorted({category for _, category, _, _ in instances})]
        if not is_whole(path := root / "SegmentationClass" / f"{name}.png"):
            todo[path] = image

    def job(path):
        _, height, width, instances = photos[todo[path]]
        painted = [(number, VOID if crowd else value[category], shape) for number, category, crowd, shape in instances]
        return path, height, width, painted

    for _ in in_processes(write_coco_mask, map(job, todo), workers, len(todo), f"{split} masks"):
        pass
    return list(classes.values()), labels


def link_photos(folder, splits):
    """JPEGImages with a link to each split's folder beside it; InputError where it holds anything else."""
    try:
        folder.mkdir(exist_ok=True)
        wrong = [path for path in folder.iterdir() if not is_junk(path)
                 and not (path.is_symlink() and os.readlink(path) == f"../{path.name}")]
        if wrong or folder.is_symlink():
            raise InputError(f"{folder} holds more than links to {' and '.join(splits)}: move it away")
        for split in splits:
            if not (folder / split).is_symlink():
                (folder / split).symlink_to(f"../{split}")
    except OSError as error:
        raise InputError(f"cannot link the photos in {folder}: {error}") from None


def coco(args):
    """Make a folder with COCO's train2014, val2014 and annotations a data set: links, masks, labels and lists.

    train_aug = train, and val, are the photos with an instance, crowds among them. Masks that are there stay.
    """
    decode([], 1, 1)  # pycocotools must be there
    root, splits = args.root, COCO_SPLITS.values()
    needed = [*splits, *(f"annotations/instances_{split}.json" for split in splits)]
    if missing := [name for name in needed if not (root / name).exists()]:
        raise InputError(f"{root} lacks {', '.join(missing)} of COCO 2014: put them there")
    link_photos(root / "JPEGImages", splits)
    lists, labels, classes = {}, {}, None
    for name, split in COCO_SPLITS.items():
        found, known = prepare_split(root, split, args.workers)
        if classes and found != classes:
            raise InputError(f"{root}/annotations/instances_{split}.json has other categories than the other split")
        classes, lists[name] = found, list(known)
        labels.update(known)
    lists["train"] = lists["train_aug"]
    write_lines(root / "classes.txt", classes)
    write_lines(root / "labels.txt", [" ".join([name, *known]) for name, known in labels.items()])
    for name, ids in lists.items():
        write_lines(root / "ImageSets/Segmentation" / f"{name}.txt", ids)
    dataset = DataSet(root)
    for name in COCO_SPLITS:
        print(f"{name}: {images_a_class(dataset, dataset.labels(dataset.ids(name)))}")
    print(f"peak memory {peak_memory():.1f} GB, without the workers' own")  # theirs would start from their parent's
    check_sizes(root, lists, COCO_SIZES, "COCO 2014")


def main():
    commands = Commands(__doc__, "prepare")
    parser = commands.add(toy, "draw the toy set", is_run=False)
    parser.add_argument("--root", type=Path, default=TOY, help="folder to draw into")
    parser.add_argument("--seed", type=whole(0, 2 ** 32 - 1), default=0, help="of the drawings")
    parser.add_argument("--train", type=whole(1), default=320, help="training pictures")
    parser.add_argument("--val", type=whole(0), default=80, help="validation pictures")
    parser = commands.add(voc, "prepare PASCAL VOC 2012", is_run=False)
    parser.add_argument("--root", type=Path, required=True, help="the devkit's VOC2012, or where to download to")
    parser.add_argument("--sbd", type=Path, help="folder with SBD's train.txt and val.txt")
    parser = commands.add(coco, "prepare MS COCO 2014", is_run=False)
    parser.add_argument("--root", type=Path, required=True, help="folder with train2014, val2014 and annotations")
    parser.add_argument("--workers", type=whole(0, 256), default=min(8, os.cpu_count() or 1), help="drawing masks")
    parser = commands.add(check, "look for what would break a stage", is_run=False)
    parser.add_argument("--data", type=Path, default=TOY, help="data set in VOC layout or labels.txt")
    commands.run()


if __name__ == "__main__":
    main()
