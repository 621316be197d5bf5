"""Makes a folder a data set: the toy set drawn, VOC and COCO with lists, labels and masks; and checks any data set.

    python prepare.py toy                draws the toy set into data/toy; interrupted, it is drawn on
    python prepare.py voc --root DIR     PASCAL VOC 2012 and SBD: fetched where missing, lists and labels written
    python prepare.py coco --root DIR    MS COCO 2014: links to its photos, masks, labels and lists; stopped, it goes on
    python prepare.py check --data DIR   counts, and what would break a stage; exit status 1 if something would

The layout is the one that data.py reads. Masks are for scoring alone.
"""
import json
import os
import tarfile
from array import array
from http.client import HTTPException
from pathlib import Path

import stage  # before torch: from here on Ctrl-C is one line
import numpy as np
from torchvision.datasets import SBDataset
from torchvision.datasets.utils import download_url
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

from commands import Commands, whole
from data import VOID, DataSet, find_photos, leads_out, photo_id, read_image, read_mask, require, write_mask
from engine import in_processes, peak_memory
from stage import InputError, is_whole, read_json, read_lines, read_text, write, write_json, write_lines
from toy import TOY_CLASSES, toy_picture

LISTED = 20  # problems that `check` tells at most
LARGE = 1000  # pixels of a photo's longer side, twice VOC's, from which `check` warns
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
    if record is None and any(args.root.glob("[!.]*")):
        raise InputError(f"{args.root} holds something else: not drawing over it")
    if record not in (None, settings):
        flags = " ".join(f"--{flag} {record.get(flag)}" for flag in ("seed", "train", "val"))
        raise InputError(f"{args.root} holds a drawing of {flags}: take another --root, or remove it")
    if record is None:
        write_json(begun, settings)
    stage.sweep(args.root)
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

def unpack(path, folder):
    """Extract a tar archive; InputError, with nothing written, where a member could lie outside the folder."""
    if not hasattr(tarfile, "data_filter"):
        raise InputError(f"this Python is too old to unpack {path} safely: update it, or unpack it by hand")
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if leads_out(member.name):
                    raise InputError(f"{path} is refused: its member {member.name} is absolute or has .. in its path")
                tarfile.data_filter(member, folder)  # refuses devices, and links that lead out
            path.with_suffix(".unpacking").touch()
            archive.extractall(folder, filter="data")
            path.with_suffix(".unpacking").unlink()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"cannot unpack {path}: {error}") from None


def find_or_fetch(file, places, source, root, needs):
    """The first of these folders that has the file. The last one comes out of an archive of torchvision's (url, md5).

    That is fetched and unpacked into `root` where no folder has the file, or where its unpacking was stopped.
    """
    archive = root / Path(source["url"]).name
    *others, unpacked = places
    for place in others if archive.with_suffix(".unpacking").exists() else places:
        if place and (place / file).exists():
            return place
    try:
        download_url(source["url"], root, md5=source["md5"])
    except (OSError, RuntimeError, HTTPException) as error:
        raise InputError(f"{root} lacks {needs}, and {source['url']} cannot be fetched ({error}): "
                         "put it there by hand") from None
    unpack(archive, root)
    return unpacked


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
    places = args.root, args.root / "VOCdevkit" / "VOC2012"
    root = find_or_fetch("JPEGImages", places, DATASET_YEAR_DICT["2012"], args.root, "VOCdevkit/VOC2012")
    places = args.sbd, args.root / "sbd", args.root / "benchmark_RELEASE" / "dataset"
    source, needs = {"url": SBDataset.url, "md5": SBDataset.md5}, "benchmark_RELEASE/dataset/train.txt of SBD"
    sbd = find_or_fetch("train.txt", places, source, args.root, f"{needs} (or --sbd DIR)")
    dataset, more = DataSet(root), set()
    for path in (sbd / "train.txt", sbd / "val.txt"):
        more.update(photo_id(line.split()[0], path) for line in read_lines(path))
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
        wrong = [path for path in folder.iterdir() if not path.is_symlink() or os.readlink(path) != f"../{path.name}"]
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
    stage.sweep(root / "SegmentationClass")
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


# ---------------------------------------------------------------- check

def images_a_class(dataset, labels):
    """labels: (n, K) of 0 and 1  ->  "images a class: cat 3, dog 2" """
    return "images a class: " + ", ".join(f"{name} {int(n)}" for name, n in zip(dataset.classes, labels.sum(0)))


def collect(problems, work, *arguments):
    """What `work` returns; None where it raises InputError, which is one problem more."""
    try:
        return work(*arguments)
    except InputError as error:
        problems.append(str(error))


def check_list(dataset, split, problems):
    """The ids of a list that can be looked at further: each once, of photos that are there."""
    file = dataset.list_file(split)
    if file is None and split != "train_aug":
        return []
    ids = collect(problems, dataset.ids, split)
    if ids is not None or file is None:
        return ids or []
    lines = collect(problems, read_lines, file) or []
    names = dict.fromkeys(collect(problems, photo_id, line.split()[0], file) for line in lines)
    names.pop(None, None)  # in place of each that is no id
    collect(problems, require, [dataset.image(name) for name in names], "photos")
    return [name for name in names if dataset.image(name).is_file()]


def check(args):
    """Count a data set's files and name what would break a stage; exit status 1 if something would."""
    problems, unlike, large = [], [], []
    dataset = DataSet(args.data, problems)
    if collect(problems, getattr, dataset, "photo_of") is None:  # two of one id; the rest is looked at all the same
        paths = find_photos(dataset.photos)
        dataset.photo_of = {photo_id(path.relative_to(dataset.photos).as_posix()): path for path in paths}
    print(f"{len(dataset.photo_of)} photos in {dataset.photos}")
    print(f"{dataset.num_classes} classes with background: {' '.join(dataset.classes)}")
    splits = {split: check_list(dataset, split, problems) for split in ("train_aug", "train", "val")}
    names = sorted(set().union(*splits.values()))
    labelled = {name for name in names if collect(problems, dataset.labels, [name]) is not None}
    for split, ids in splits.items():
        known = [name for name in ids if name in labelled]
        labels, masks = dataset.labels(known), [dataset.mask(name) for name in ids]
        bare = [name for name, row in zip(known, labels) if not row.any()]
        there = sum(mask.is_file() for mask in masks)
        print(f"{split}: {len(ids)} images, {there} masks, {len(bare)} without any label; "
              + images_a_class(dataset, labels))
        if split == "train_aug" and bare:
            problems.append(f"{len(bare)} of {len(ids)} photos in {split} have no label, first {bare[0]}")
        if split != "train_aug" and (dataset.root / "SegmentationClass").is_dir():
            collect(problems, require, masks, f"masks of {split}")
    for name in tqdm(names, desc="photos", unit="img"):
        photo = collect(problems, read_image, dataset.image(name))
        size = photo.size[::-1] if photo else None  # (H, W)
        if size and max(size) > LARGE:
            large.append(f"{name}: {size[1]}x{size[0]}")
        if not dataset.mask(name).is_file():
            continue
        mask = collect(problems, read_mask, dataset.mask(name), dataset.num_classes, size)
        if mask is not None and name in labelled:
            told, seen = dataset.names(name), {dataset.classes[c - 1] for c in np.unique(mask) if 0 < c < VOID}
            if seen != set(told):
                unlike.append(f"{name}: mask {' '.join(sorted(seen)) or '-'}, labels {' '.join(told) or '-'}")
    if unlike:
        print(f"note: masks and labels of {len(unlike)} photos differ, first {unlike[0]}")
    if large:
        print(f"note: {len(large)} photos are longer than {LARGE} pixels, first {large[0]}: crops, CRF and walk are "
              "set for VOC's 500, and memory grows with the area: better shrink them")
    problems = list(dict.fromkeys(problems))
    for line in problems[:LISTED]:
        print(f"problem: {line}")
    if problems:
        raise InputError(f"{len(problems)} problems in {dataset.root}")
    print("no problems")


def main():
    commands = Commands(__doc__, {})
    parser = commands.add(toy, "draw the toy set", common=False)
    parser.add_argument("--root", type=Path, default=Path("data/toy"), help="folder to draw into")
    parser.add_argument("--seed", type=whole(0, 2 ** 32 - 1), default=0, help="of the drawings")
    parser.add_argument("--train", type=whole(1), default=320, help="training pictures")
    parser.add_argument("--val", type=whole(0), default=80, help="validation pictures")
    parser = commands.add(voc, "prepare PASCAL VOC 2012", common=False)
    parser.add_argument("--root", type=Path, required=True, help="the devkit's VOC2012, or where to download to")
    parser.add_argument("--sbd", type=Path, help="folder with SBD's train.txt and val.txt")
    parser = commands.add(coco, "prepare MS COCO 2014", common=False)
    parser.add_argument("--root", type=Path, required=True, help="folder with train2014, val2014 and annotations")
    parser.add_argument("--workers", type=whole(0, 256), default=min(8, os.cpu_count() or 1), help="drawing masks")
    parser = commands.add(check, "look for what would break a stage", common=False)
    parser.add_argument("--data", type=Path, default=Path("data/toy"), help="data set in VOC layout or labels.txt")
    commands.run()


if __name__ == "__main__":
    main()
