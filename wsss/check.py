"""`python -m wsss.prepare check`: what in a data set would break a stage, or make its scores doubtful."""
import os

from wsss.data import DataSet, classes_in, contradictions
from wsss.images import read_image, require
from wsss.pool import in_processes
from wsss.stage import InputError

LISTED = 20  # problems that are told at most
LARGE = 1000  # pixels of a photo's longer side, twice VOC's, above which it is noted
CHUNK = 100  # photos that a process reads at a time


def images_a_class(dataset, labels):
    """labels: (n, K) of 0 and 1  ->  "images a class: cat 3, dog 2" """
    return "images a class: " + ", ".join(f"{name} {int(n)}" for name, n in zip(dataset.classes, labels.sum(0)))


def collect(problems, work, *arguments):
    """What `work` returns; None where it raises InputError, which is one problem more."""
    try:
        return work(*arguments)
    except InputError as error:
        problems.append(str(error))


def look_at(files, num_classes):
    """Read photos and masks whole. [(photo, mask), ...] -> of each: problems, (H, W) or None, classes (S,) or None"""
    found = []
    for photo, mask in files:
        problems, shown = [], None
        image = collect(problems, read_image, photo)
        size = image and image.size[::-1]
        if mask.is_file():
            shown = collect(problems, classes_in, mask, num_classes, size)
        found.append((problems, size, shown))
    return found


def check(args):
    """Count a data set's files and name what would break a stage; exit status 1 if something would."""
    problems, unlike, large = [], [], []
    dataset = DataSet(args.data, problems)
    print(f"{len(dataset.photo_of)} photos in {dataset.photos}")
    print(f"{dataset.num_classes} classes with background: {' '.join(dataset.classes)}")
    splits = {}
    for split in ("train_aug", "train", "val"):
        required = split == "train_aug" or dataset.list_file(split) is not None
        splits[split] = collect(problems, dataset.ids, split, required) or []
    names = sorted(set().union(*splits.values()))
    labelled = {name for name in names if collect(problems, dataset.labels, [name]) is not None}
    for split, ids in splits.items():
        if dataset.list_file(split) is None:
            continue
        known = [name for name in ids if name in labelled]
        labels, masks = dataset.labels(known), [dataset.mask(name) for name in ids]
        bare = [name for name, row in zip(known, labels) if not row.any()]
        there = sum(mask.is_file() for mask in masks)
        print(f"{split}: {len(ids)} images, {there} masks, {len(bare)} without any label; "
              + images_a_class(dataset, labels))
        is_negative = (dataset.root / "labels.txt").is_file() and len(bare) < len(known)
        if split == "train_aug" and bare and not is_negative:
            problems.append(f"{len(bare)} of {len(ids)} photos in {split} have no label, first {bare[0]}")
        if split != "train_aug" and (dataset.root / "SegmentationClass").is_dir():
            collect(problems, require, masks, f"masks of {split}")
    if seen := dataset.trained_on(splits["val"]):
        problems.append(f"{len(seen)} of {len(splits['val'])} photos in val stand in train_aug or train too, first "
                        f"{seen[0]}: scores of val would be of photos that were trained on")

    files = [(dataset.image(name), dataset.mask(name)) for name in names]
    jobs = [(files[at:at + CHUNK], dataset.num_classes) for at in range(0, len(files), CHUNK)]
    workers = min(8, os.cpu_count() or 1) if len(jobs) > 10 else 0  # which take seconds to start
    results = in_processes(look_at, jobs, workers, len(jobs), f"photos, by {CHUNK}")
    shown = {}  # photo: the classes in its mask
    for (told, size, classes), name in zip((found for chunk in results for found in chunk), names):
        problems += told
        if size and max(size) > LARGE:
            large.append(f"{name}: {size[1]}x{size[0]}")
        if classes is not None:
            shown[name] = classes
            seen = [label for label, is_there in zip(dataset.classes, classes[1:]) if is_there]
            if name in labelled and set(seen) != set(dataset.names(name)):
                unlike.append(f"{name}: mask {' '.join(seen) or '-'}, labels {' '.join(dataset.names(name)) or '-'}")
    looked = [[]]
    for split, ids in splits.items():
        ids = [name for name in ids if name in shown]
        if ids not in looked:
            looked.append(ids)
            problems += [f"{split}: {line}" for line in contradictions(dataset, ids, [shown[name] for name in ids])]
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
