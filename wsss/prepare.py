"""Makes a folder a data set: the toy set drawn, VOC and COCO with lists, labels and masks; and checks any data set.

    python -m wsss.prepare toy                draws the toy set into data/toy
    python -m wsss.prepare voc --root DIR     PASCAL VOC 2012 with SBD's lists: train_aug.txt and labels.txt
    python -m wsss.prepare coco --root DIR    MS COCO 2014: links to its photos, masks, labels and lists; it goes on
    python -m wsss.prepare check --data DIR   counts, and what would break a stage; exit status 1 if something would

The layout is the one that wsss/data.py reads. Masks are for scoring alone.
"""
import json
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from wsss.cli import TOY, Commands, whole
from wsss.data import DataSet, photo_id, read_entries, read_image
from wsss.masks import VOID, classes_in, contradictions, write_mask
from wsss.pool import in_processes
from wsss.stage import (TEMPORARY, InputError, is_whole, read_json, read_text, require, write, write_json,
                        write_lines)
from wsss.toy import TOY_CLASSES, toy_picture

VOC_SIZES = {"train_aug": 10582, "train": 1464, "val": 1449, "test": 1456}
COCO_SPLITS = {"train_aug": "train2014", "val": "val2014"}
COCO_SIZES = {"train_aug": 82081, "val": 40137}  # photos with an instance


def toy(args):
    """Draw the toy set: a data set in VOC layout, the same pixels for the same seed."""
    root, full = args.root, args.root.resolve()  # "." has no name
    settings = {"seed": args.seed, "train": args.train, "val": args.val, "classes": list(TOY_CLASSES)}
    if (root / "toy.json").is_file():
        if read_json(root / "toy.json") != settings:
            raise InputError(f"{root} holds another drawing: take another --root, or remove it")
        return print(f"{root} is drawn already")
    if root.exists() and any(root.iterdir()):
        raise InputError(f"{root} holds something else: not drawing over it")
    part = full.with_name(f".{full.name}{TEMPORARY}")
    shutil.rmtree(part, ignore_errors=True)  # of a drawing that was interrupted
    names, labels = [f"toy_{n:04d}" for n in range(args.train + args.val)], []
    for n, name in enumerate(tqdm(names, desc="toy set", unit="img")):
        picture, mask = toy_picture(np.random.RandomState([args.seed, n]))
        write(part / "JPEGImages" / f"{name}.jpg", lambda file: picture.save(file, format="JPEG", quality=95))
        write_mask(part / "SegmentationClass" / f"{name}.png", mask)
        labels.append(" ".join([name] + [TOY_CLASSES[c - 1] for c in np.unique(mask) if 0 < c < VOID]))
    write_lines(part / "labels.txt", labels)
    write_lines(part / "classes.txt", TOY_CLASSES)
    train, val = names[:args.train], names[args.train:]
    for split, chosen in (("train_aug", train), ("train", train), ("val", val)):
        write_lines(part / f"ImageSets/Segmentation/{split}.txt", chosen)
    write_json(part / "toy.json", settings)
    os.replace(part, full)
    print(f"{root}: {len(train)} train, {len(val)} val pictures")


def check_sizes(root, lists, sizes, what):
    """Print the sizes of the lists just written; InputError where they are not those published."""
    print(f"{root}: " + ", ".join(f"{split} {len(names)}" for split, names in lists.items()))
    wrong = [f"{split} has {len(lists[split])} ids, {what}'s {size}" for split, size in sizes.items()
             if len(lists[split]) != size and (lists[split] or split != "test")]  # VOC's test photos come apart
    if wrong:
        raise InputError("written, but " + "; ".join(wrong))


def voc(args):
    """Prepare VOC 2012: train_aug.txt = (SBD train + SBD val + VOC train) - VOC val, and labels.txt from the XML.

    --root is the devkit's VOC2012 folder, or one that holds VOCdevkit/VOC2012. Of SBD only two lists are read.
    """
    sbd = args.sbd or args.root / "benchmark_RELEASE" / "dataset"
    require([sbd / "train.txt", sbd / "val.txt"], "lists of SBD", ": take them from benchmark_RELEASE/dataset of its "
            "archive, --sbd DIR names their folder")
    root = args.root / "VOCdevkit" / "VOC2012"  # as VOCtrainval_11-May-2012.tar unpacks
    root = root if root.is_dir() else args.root
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


def decode(segmentation, height, width):
    """An instance of COCO, polygons or run lengths, as a mask. -> bool (H, W)"""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        segmentation = [polygon for polygon in segmentation if len(polygon) > 4]  # four would be taken for a box
        if not segmentation:
            return np.zeros((height, width), bool)
        runs = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    else:
        is_plain = isinstance(segmentation["counts"], list)
        runs = coco_mask.frPyObjects(segmentation, height, width) if is_plain else segmentation
    return coco_mask.decode(runs).astype(bool)


def write_coco_mask(path, height, width, instances):
    """Paint [(value, segmentation)]: the smaller lies on top, of two equally large ones the later."""
    mask = np.zeros((height, width), np.uint8)
    try:
        shapes = [(decode(shape, height, width), value) for value, shape in instances]
    except Exception as error:  # pycocotools raises many kinds
        raise InputError(f"an annotation of {path.stem} is damaged: {type(error).__name__} {error}") from None
    for shape, value in sorted(shapes, key=lambda pair: pair[0].sum(), reverse=True):
        mask[shape] = value
    write_mask(path, mask)


def read_instances(path):
    """-> {category: class}, {image: (file name, height, width, [annotation, ...])} of the images with an instance"""
    try:
        content = json.loads(read_text(path))
        categories = sorted(content["categories"], key=lambda category: category["id"])
        classes = {category["id"]: category["name"].replace(" ", "_") for category in categories}
        images, instances = {image["id"]: image for image in content["images"]}, {}
        for one in content["annotations"]:
            value = VOID if one["iscrowd"] else 1 + list(classes).index(one["category_id"])
            instances.setdefault(one["image_id"], []).append((value, one["category_id"], one["segmentation"]))
        photos = {n: (*(images[n][key] for key in ("file_name", "height", "width")), instances[n])
                  for n in sorted(instances)}
        return classes, photos
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {path}: {type(error).__name__} {error}") from None


def coco(args):
    """Make a folder with COCO's train2014, val2014 and annotations a data set: links, masks, labels and lists.

    train_aug = train, and val, are the photos with an instance, crowds among them. Masks that are there stay.
    """
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        raise InputError('pycocotools is missing: run "make coco DATA=DIR", which installs it') from None
    root, lists, labels, categories = args.root, {}, [], set()
    needed = [*COCO_SPLITS.values(), *(f"annotations/instances_{split}.json" for split in COCO_SPLITS.values())]
    if missing := [name for name in needed if not (root / name).exists()]:
        raise InputError(f"{root} lacks {', '.join(missing)} of COCO 2014: put them there")
    for name, split in COCO_SPLITS.items():
        link = root / "JPEGImages" / split
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            link.symlink_to(f"../{split}")
        classes, photos = read_instances(root / "annotations" / f"instances_{split}.json")
        categories.add(tuple(classes.items()))
        if len(categories) > 1:
            raise InputError(f"{root}/annotations/instances_{split}.json has other categories than the other split")
        require([root / split / file for file, *_ in photos.values()], "photos")
        lists[name], jobs = [], []
        for file, height, width, instances in photos.values():
            lists[name].append(f"{split}/{photo_id(file)}")
            present = sorted({category for _, category, _ in instances})
            labels.append(" ".join([lists[name][-1], *(classes[category] for category in present)]))
            if not is_whole(path := root / "SegmentationClass" / f"{lists[name][-1]}.png"):
                jobs.append((path, height, width, [(value, shape) for value, _, shape in instances]))
        list(in_processes(write_coco_mask, jobs, args.workers, len(jobs), f"{split} masks"))
    lists["train"] = lists["train_aug"]
    write_lines(root / "classes.txt", classes.values())
    write_lines(root / "labels.txt", labels)
    for name, ids in lists.items():
        write_lines(root / "ImageSets/Segmentation" / f"{name}.txt", ids)
    check_sizes(root, lists, COCO_SIZES, "COCO 2014")


def collect(problems, work, *arguments):
    """What `work` returns; None where it raises InputError, which is one problem more."""
    try:
        return work(*arguments)
    except InputError as error:
        problems.append(str(error))


def look_at(photo, mask, num_classes):
    """Read a photo and its mask whole. -> problems, bool (S,) of the classes in the mask, or None"""
    problems, shown = [], None
    image = collect(problems, read_image, photo)
    if mask.is_file():
        shown = collect(problems, classes_in, mask, num_classes, image and image.size[::-1])
    return problems, shown


def check(args):
    """Count a data set's files and name what would break a stage; exit status 1 if something would."""
    problems, unlike, splits, shown = [], [], {}, {}
    dataset = DataSet(args.data)
    print(f"{len(dataset.photo_of)} photos in {dataset.photos}")
    print(f"{dataset.num_classes} classes with background: {' '.join(dataset.classes)}")
    for split in ("train_aug", "train", "val"):
        if split != "train_aug" and dataset.list_file(split) is None:
            continue
        ids = collect(problems, dataset.ids, split)
        labels = ids and collect(problems, dataset.labels, ids)
        if labels is None:
            continue
        splits[split], masks = ids, [dataset.mask(name) for name in ids]
        bare = [name for name, row in zip(ids, labels) if not row.any()]
        there = sum(mask.is_file() for mask in masks)
        counts = ", ".join(f"{name} {int(n)}" for name, n in zip(dataset.classes, labels.sum(0)))
        print(f"{split}: {len(ids)} images, {there} masks, {len(bare)} without any label; images a class: {counts}")
        are_negatives = (dataset.root / "labels.txt").is_file() and len(bare) < len(ids)
        if split == "train_aug" and bare and not are_negatives:
            problems.append(f"{len(bare)} of {len(ids)} photos in {split} have no label, first {bare[0]}")
        if split != "train_aug" and (dataset.root / "SegmentationClass").is_dir():
            collect(problems, require, masks, f"masks of {split}")
    val = splits.get("val", [])
    if leaked := collect(problems, dataset.trained_on, val):
        problems.append(f"{len(leaked)} of {len(val)} photos in val stand in train_aug or train too, first {leaked[0]}")
    names = sorted(set().union(*splits.values()))
    jobs = ((dataset.image(name), dataset.mask(name), dataset.num_classes) for name in names)
    results = in_processes(look_at, jobs, min(8, os.cpu_count() or 1), len(names), "photos", pool_from=1000)
    for (told, classes), name in zip(results, names):
        problems += told
        if classes is not None:
            shown[name] = classes
            in_mask = [label for label, is_there in zip(dataset.classes, classes[1:]) if is_there]
            if set(in_mask) != set(dataset.names(name)):
                unlike.append(f"{name}: mask {' '.join(in_mask) or '-'}, labels {' '.join(dataset.names(name)) or '-'}")
    if splits.get("train") == splits.get("train_aug"):  # one list
        splits.pop("train", None)
    for split, ids in splits.items():
        ids = [name for name in ids if name in shown]
        problems += [f"{split}: {line}" for line in contradictions(dataset, ids, [shown[name] for name in ids])]
    if unlike:
        print(f"note: masks and labels of {len(unlike)} photos differ, first {unlike[0]}")
    problems = list(dict.fromkeys(problems))
    for line in problems[:10]:
        print(f"problem: {line}")
    if problems:
        raise InputError(f"{len(problems)} problems in {dataset.root}")
    print("no problems")


def main():
    commands = Commands(__doc__, "prepare")
    parser = commands.add(toy, "draw the toy set", uses_out=False)
    parser.add_argument("--root", type=Path, default=TOY, help="folder to draw into")
    parser.add_argument("--seed", type=whole(0, 2 ** 32 - 1), default=0, help="of the drawings")
    parser.add_argument("--train", type=whole(1), default=320, help="training pictures")
    parser.add_argument("--val", type=whole(1), default=80, help="validation pictures")
    parser = commands.add(voc, "prepare PASCAL VOC 2012", uses_out=False)
    parser.add_argument("--root", type=Path, required=True, help="the devkit's VOC2012, or what holds VOCdevkit")
    parser.add_argument("--sbd", type=Path, help="folder with SBD's train.txt and val.txt")
    parser = commands.add(coco, "prepare MS COCO 2014", uses_out=False)
    parser.add_argument("--root", type=Path, required=True, help="folder with train2014, val2014 and annotations")
    parser.add_argument("--workers", type=whole(0, 256), default=min(8, os.cpu_count() or 1), help="drawing masks")
    parser = commands.add(check, "look for what would break a stage", uses_out=False)
    parser.add_argument("--data", type=Path, default=TOY, help="data set in VOC layout or labels.txt")
    commands.run()


if __name__ == "__main__":
    main()
