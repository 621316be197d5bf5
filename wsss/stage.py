"""A stage's folder: its record, what of it is done, changed or stale. Files written whole, text read in clear words.

A stage (classifier, cams, ...) works in OUT/NAME.part/, which becomes OUT/NAME/ when it is complete; an earlier result
stays until then. record.json in it tells settings, inputs and seconds. Only the stage itself changes its folder.
"""
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
import zipfile
from pathlib import Path

STAGES = {  # folder in OUT: (what it holds, the make target that makes it)
    "classifier": ("classifier", "train"), "cams": ("seeds", "cams"), "affinity_labels": ("affinity labels", "psa"),
    "affinitynet": ("AffinityNet", "psa"), "pseudo_labels": ("pseudo labels", "psa"),
    "segmenter": ("segmenter", "seg"), "segmentation": ("segmentations", "seg")}
TRAININGS = ("classifier", "affinitynet", "segmenter")
RECORD = "record.json"
EARLIER = ".earlier"  # folder in the new result that holds the old one until that is deleted
TEMPORARY = ".wsss"  # ending of a file that is being written
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_ERRORS = {*NO_ROOM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST}
OF_SYSTEMS = (".DS_Store", "Thumbs.db", "._")  # beginnings of names that file browsers leave behind
DENIED = {errno.EACCES, errno.EPERM}
ANOTHER = "take another OUT= (--out)"
PNG_END = b"IEND\xaeB`\x82"


class InputError(Exception):
    """Something the user can mend. Shown as one line, exit status 1."""


class FlagError(InputError):
    """Flags that do not go together. Exit status 2."""


def disk_remedy(error):
    first = "allow it, or " if error.errno in DENIED else "make room there, or " if error.errno in NO_ROOM else ""
    return f"{first}take another folder"


def write(path, save, sync=False):
    """`save(file)` into a temporary name, then rename: a file is there whole or not at all. sync: on the disk first."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            save(file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save makes the one of the other
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"cannot write {path}: {cause.strerror or cause}: {disk_remedy(cause)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def require(paths, what, remedy=""):
    """Raise InputError unless all files exist."""
    if missing := [path for path in map(Path, paths) if not path.is_file()]:
        count = f"{len(missing)} of {len(paths)} {what}"
        raise InputError(f"{missing[0].parent} lacks {count}, first {missing[0].name}{remedy}")


def write_lines(path, lines):
    write(path, lambda file: file.writelines(f"{line}\n".encode() for line in lines), sync=True)


def write_json(path, value):
    write(path, lambda file: file.write(json.dumps(value, indent=1).encode()), sync=True)


def read_text(path):
    """A UTF-8 file, with or without a byte order mark."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise UnicodeError  # UTF-16 without a byte order mark
        return text
    except UnicodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def read_json(path, keys=()):
    """A JSON object that has these keys."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not set(keys) <= value.keys():
        raise InputError(f"{path} is damaged or not one of ours: move it away")
    return value


def is_whole(path):
    """Whether a file is there and not cut short, by its size and its end."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".png":
                file.seek(-len(PNG_END), os.SEEK_END)
                return file.read() == PNG_END
            return zipfile.is_zipfile(file)
    except OSError:
        return False


def digest(path):
    """Of a file's bytes. -> 16 hexadecimal digits"""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def find_record(out, name):
    """The record in OUT/NAME, or None."""
    if (path := out / name / RECORD).is_file():
        return read_json(path, ("id", "done", "seconds", "data", "preset", "settings", "inputs"))
    if (out / f"{name}.json").is_file():
        raise InputError(f"{out} was made by an older version ({name}.json): {ANOTHER}")


def read_record(out, name):
    """The record of a complete stage; InputError naming the command that makes it."""
    record = find_record(out, name)
    if record is None:
        what, target = STAGES[name]
        state = "unfinished" if (out / f"{name}.part").is_dir() else "no"
        raise InputError(f'{state} {what} in {out / name}: run "make {target}"')
    return record


def require_same(out, name, preset, dataset=None):
    """The record of a complete stage; InputError where another preset, or other lists, labels or classes made it."""
    record = read_record(out, name)
    if record["preset"] != preset:
        raise InputError(f"{out / name} is of another preset: add PRESET={record['preset']} (--preset), or {ANOTHER}")
    if dataset and not dataset.is_that_of(record):
        raise InputError(f"{out / name} was made from other lists, labels or classes: {ANOTHER} or FRESH=1 (--fresh)")
    return record


def older_than(out, name):
    """Why a stage is out of date: an earlier one was made again since, whole or for a photo. -> a line, or None"""
    record = read_record(out, name)
    for source, source_id in record["inputs"].items():
        newest = find_record(out, source) or {"id": None}
        again = newest.get("again", {}).items() - record.get("seen", {}).items()
        if newest["id"] != source_id or any((out / name / f"{photo}.png").is_file() for photo, _ in again):
            return f"older than the {STAGES[source][0]}: make {STAGES[name][1]}"
        if older := older_than(out, source):
            return older
    return None


def note_if_older(out, name):
    if older := older_than(out, name):
        print(f"note: the {STAGES[name][0]} in {out}: {older}")


def _refuse_foreign(folder):
    """InputError where a folder of a stage's name could not be replaced, or is somebody else's."""
    if folder.is_symlink() or os.path.ismount(folder):
        raise InputError(f"{folder} is a link or a mount, which cannot be replaced: remove it, or {ANOTHER}")
    if not folder.exists():
        return
    others = not folder.is_dir() or [name for name in os.listdir(folder)
                                     if not name.endswith(TEMPORARY) and not name.startswith(OF_SYSTEMS)]
    if others and not (folder / RECORD).is_file():
        raise InputError(f"{folder} is not a result of ours, it has no {RECORD}: move it away, or {ANOTHER}")
    if not os.access(folder, os.W_OK | os.X_OK) or not os.access(folder.parent, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be replaced: allow writing there, or {ANOTHER}")


class Stage:
    """One stage of a run: what of it is done, and where it works until it is complete. One process at a time has it.

    settings: what its result depends on; dataset, preset: what made it; reads: stages whose results it takes
    folder: where its files go; complete: the result is there with these settings; resumed: a part of it is
    """

    def __init__(self, out, name, settings, dataset, preset, reads=(), fresh=False):
        self.name, self.out = name, out
        self.what = STAGES.get(name, (name,))[0]
        self.done, self.part = out / name, out / f"{name}.part"
        self.resumed = self.complete = False
        inputs, self.again, self.seen = {}, [], {}  # seen: {photo: how often its seed was made again alone}
        for source in reads:
            source_record = require_same(out, source, preset, dataset)
            if older := older_than(out, source):
                raise InputError(f"{STAGES[source][0]} in {out}: {older}")
            inputs[source] = source_record["id"]
            self.seen.update(source_record.get("again", {}))
        out.mkdir(parents=True, exist_ok=True)
        self.lock = open(out / f".{name}.lock", "w")  # goes with the process, however that ends, or with this object
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is at work in {self.part}: wait for it, or {ANOTHER}") from None
        for folder in (self.done, self.part):
            _refuse_foreign(folder)
        self._settle()
        settings = json.loads(json.dumps(settings, default=str))  # as it comes back from the file
        self.record = {"id": uuid.uuid4().hex, "done": False, "seconds": 0, "data": str(dataset.root.resolve()),
                       "preset": preset, "settings": settings, "inputs": inputs}
        if not fresh:
            self._take_up()
        self.folder = self.done if self.complete else self.part

    def __getstate__(self):  # as it is sent to other processes
        return {**vars(self), "lock": None}

    def _take_up(self):
        """Go on with the finished or unfinished result, or begin anew; InputError where that would lose one."""
        records = [(folder, find_record(self.out, folder.name)) for folder in (self.part, self.done)]
        records = [(folder, record) for folder, record in records if record]
        for folder, record in records:
            if self._changes(record) or record["inputs"] != self.record["inputs"]:
                continue
            model = folder / "model.pth"
            if folder == self.done and self.name in TRAININGS and not is_whole(model):
                print(f"{model} is missing or damaged: made again")
                continue
            self.record, self.complete, self.resumed = record, folder == self.done, folder == self.part
            return
        stale = []
        for folder, record in records:
            if changed := self._changes(record):
                raise InputError(f"{folder} was made with other settings: {changed}: {ANOTHER} or FRESH=1 (--fresh)")
            stale += [STAGES[source][0] for source, new in self.record["inputs"].items()
                      if record["inputs"].get(source) != new]
        if stale:
            print(f"{self.what}: made again, as the {' and the '.join(dict.fromkeys(stale))} changed")

    def _changes(self, record):
        """Settings in which a record differs from what is asked for, as text."""
        old, new = record["settings"], self.record["settings"]
        return ", ".join("the data set has other lists or labels" if key == "data_set" else
                         f"{key} {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value)

    def todo(self, names, ending, is_part=False):
        """Photos whose file is missing, cut short or older than its seed; all photos where the stage starts anew.

        is_part: the names are not all of the stage, whose other files would be lost
        """
        if is_part and not self.complete:
            there = {path.relative_to(self.done).with_suffix("").as_posix() for path in self.done.rglob(f"*{ending}")}
            if lost := there - set(names):
                raise InputError(f'{len(lost)} files of {self.done} would be lost: run "make {STAGES[self.name][1]}" '
                                 "first, and this without --fresh (FRESH=1)")
        if not (self.complete or self.resumed):
            return list(names)
        seen = self.record.get("seen", {})
        self.again = [name for name in names if seen.get(name) != self.seen.get(name)
                      or not is_whole(self.folder / f"{name}{ending}")]
        return self.again

    def start(self):
        """Print the settings once; from here on the record is on disk."""
        self.clock = time.monotonic()
        self.folder.mkdir(exist_ok=True)
        if self.complete:
            print(f"{self.done}: what is missing, damaged or out of date is made again")
            again = self.record.setdefault("again", {})
            again.update({name: again.get(name, 0) + 1 for name in self.again})
        elif not self.resumed:
            print(f"{self.name}: " + " ".join(f"{k}={v}" for k, v in self.record["settings"].items()), flush=True)
            for path in self.folder.iterdir():  # of a run that is not gone on with
                if path.name != RECORD:  # by which it stays ours until the new one is there
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in self.folder.rglob(f".*{TEMPORARY}"):  # of processes that were killed
            path.unlink(missing_ok=True)
        self.save()

    def save(self, name=None, content=None):
        """The record, and before it a file of this stage: content(file) writes it."""
        if name:
            write(self.folder / name, content, sync=True)
        now = time.monotonic()
        self.record["seconds"] += now - self.clock
        self.clock = now
        write_json(self.folder / RECORD, self.record)

    def finish(self, **results):
        """Complete: from here on this is the result, and an earlier one is gone."""
        self.record.update(results, done=True, seen=self.seen)
        self.save()
        self._settle()

    def _settle(self):
        """A complete NAME.part becomes NAME, also where the renaming was interrupted before."""
        if (record := find_record(self.out, self.part.name)) and record["done"]:
            if self.done.exists():
                os.replace(self.done, self.part / EARLIER)
            os.replace(self.part, self.done)
        if (self.done / EARLIER).exists():
            shutil.rmtree(self.done / EARLIER)
