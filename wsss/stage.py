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
    "segmenter": ("segmenter", "seg"), "segmentation": ("segmentation", "seg")}
RECORD = "record.json"
EARLIER = ".earlier"  # the result before, inside the new one, between two renames
TEMPORARY = ".wsss"  # ending of a file that is being written
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG, errno.ENOTDIR}
OF_SYSTEMS = (".DS_Store", "Thumbs.db", "._")  # beginnings of names that file browsers leave behind
DENIED = {errno.EACCES, errno.EPERM}
PNG_END = b"IEND\xaeB`\x82"


class InputError(Exception):
    """Something the user can mend. Shown as one line, exit status 1."""


class FlagError(InputError):
    """Flags that do not go together. Exit status 2."""


# ---------------------------------------------------------------- files

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


def disk_remedy(error):
    return "allow it, or take another folder" if error.errno in DENIED else "make room there, or take another folder"


def write_lines(path, lines):
    text = "".join(f"{line}\n" for line in lines)
    write(path, lambda file: file.write(text.encode()), sync=True)


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


def read_lines(path):
    """Its lines that are not empty, stripped."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


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
            return zipfile.is_zipfile(file) if path.suffix in (".npz", ".pth") else file.read(1) != b""
    except OSError:
        return False


def is_junk(path):
    """Whether a file browser left it behind."""
    return path.name.startswith(OF_SYSTEMS)


def digest(path):
    """Of a file's bytes. -> 16 hexadecimal digits"""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()[:16]


# ---------------------------------------------------------------- records

def find_record(out, name):
    """The record of a complete stage, or None."""
    record = _record_in(out / name)
    if record is None and (out / f"{name}.json").is_file():
        raise InputError(f"{out} was made by an older version ({name}.json): take another OUT= (--out)")
    return record if record and record["done"] else None


def _record_in(folder):
    path, keys = folder / RECORD, ("id", "done", "seconds", "data", "preset", "settings", "inputs")
    return read_json(path, keys) if path.is_file() else None


def read_record(out, name):
    """The record of a complete stage; InputError naming the command that makes it."""
    record = find_record(out, name)
    if record is None:
        what, target = STAGES[name]
        state = "unfinished" if (out / f"{name}.part").is_dir() else "no"
        raise InputError(f'{state} {what} in {out / name}: run "make {target}"')
    return record


def require_same(out, name, dataset, preset):
    """The record of a complete stage; InputError where another preset, or other lists, labels or classes made it."""
    record = read_record(out, name)
    if record["preset"] != preset:
        raise InputError(f"{out / name} was made with preset {record['preset']}: add --preset {record['preset']} "
                         f"(PRESET={record['preset']}), or take another OUT= (--out)")
    if not dataset.is_that_of(record):
        raise InputError(f"{out / name} was made from other lists, labels or classes than {dataset.root} has now: "
                         "take another OUT= (--out), or make it again with FRESH=1 (--fresh)")
    return record


def older_than(out, name):
    """Name of an earlier stage that was made again, whole or for a photo, since this one was made from it, or None."""
    record = read_record(out, name)
    for source, source_id in record["inputs"].items():
        found = find_record(out, source)
        if found is None or found["id"] != source_id:
            return source
        again = found.get("again", {}).items() - record.get("seen", {}).items()
        if any((out / name / f"{photo}.png").is_file() for photo, _ in again):
            return source
        if older := older_than(out, source):
            return older
    return None


class Stage:
    """One stage of a run: what of it is done, and where it works until it is complete.

    settings: what its result depends on; dataset, preset: what made it; reads: stages whose results it takes
    folder: where its files go; complete: the result is there with these settings; resumed: a part of it is
    """

    lock = None  # of the folder at work: it goes with the process, however that ends, or with this object

    def __init__(self, out, name, settings, dataset, preset, reads=(), fresh=False):
        self.out, self.name, self.fresh = out, name, fresh
        self.what = STAGES.get(name, (name,))[0]
        self.done, self.part = out / name, out / f"{name}.part"
        self.resumed = self.complete = False
        for folder in (self.done, self.part):
            _refuse_foreign(folder)
        self._settle()
        find_record(out, name)  # an older version's ends here
        inputs, self.again, self.seen = {}, [], {}  # seen: photo: how often its seed was made again alone
        for source in reads:
            found = require_same(out, source, dataset, preset)
            inputs[source] = found["id"]
            self.seen.update(found.get("again", {}))
            if older := older_than(out, source):
                (what, target), earlier = STAGES[source], STAGES[older][0]
                raise InputError(f'{what} in {out}: older than the {earlier}: run "make {target}" first')
        settings = json.loads(json.dumps(settings, default=str))  # as it comes back from the file
        self.record = {"id": uuid.uuid4().hex, "done": False, "seconds": 0, "data": str(dataset.root.resolve()),
                       "preset": preset, "settings": settings, "inputs": inputs}
        self._choose()
        self.folder = self.done if self.complete else self.part

    def _choose(self):
        """Take up the finished or unfinished result, or begin anew; InputError where that would lose one."""
        if self.fresh:
            return
        finished, unfinished = _record_in(self.done), _record_in(self.part)
        for record, state in ((finished, "finished"), (unfinished, "unfinished")):
            if record and not self._changes(record) and record["inputs"] == self.record["inputs"]:
                if state == "finished" and self.name in ("classifier", "affinitynet", "segmenter"):
                    if not is_whole(self.done / "model.pth"):
                        print(f"{self.done / 'model.pth'} is missing or damaged: made again")
                        continue
                self.record = record
                self.complete, self.resumed = state == "finished", state == "unfinished"
                return
        for record, state in ((unfinished, "unfinished"), (finished, "finished")):
            if record and (changed := self._changes(record)):
                raise InputError(f"{self.what} in {self.out} ({state}): made with other settings: {changed}: "
                                 "take another OUT= (--out), or make it again with FRESH=1 (--fresh)")
        for record in filter(None, (finished, unfinished)):
            stale = [STAGES[source][0] for source, new in self.record["inputs"].items()
                     if record["inputs"].get(source) != new]
            if stale:
                return print(f"{self.what}: made again, as the {' and the '.join(stale)} changed")

    def _changes(self, record):
        """Settings in which a record differs from what is asked for, as text."""
        old, new = record["settings"], self.record["settings"]
        shown = [f"{key} {old.get(key)} -> {value}" for key, value in new.items()
                 if key != "data_set" and old.get(key) != value]
        if old.get("data_set") != new.get("data_set"):
            shown.append("the data set has other lists or labels")
        return ", ".join(shown)

    def todo(self, names, ending, is_part=False):
        """Those of the photos whose file is missing, cut short or older than its seed; all where nothing is taken up.

        is_part: the names are not all of the stage, which --fresh would lose
        """
        if self.fresh and is_part and _record_in(self.done):
            there = {path.relative_to(self.done).with_suffix("").as_posix() for path in self.done.rglob(f"*{ending}")}
            if lost := there - set(names):
                raise InputError(f"--fresh with --first, --ids or --split would lose {len(lost)} other files of "
                                 f"{self.done}: leave them out, or take another OUT= (--out)")
        if not (self.complete or self.resumed):
            return list(names)
        seen = self.record.get("seen", {})
        self.again = [name for name in names if seen.get(name) != self.seen.get(name)
                      or not is_whole(self.folder / f"{name}{ending}")]
        return self.again

    def start(self):
        """Lock the folder, print the settings once; from here on the record is on disk."""
        self.clock = time.monotonic()
        expected = self.record if self.complete or self.resumed else None
        self._lock(self.folder)
        if expected and _record_in(self.folder) != expected:
            raise InputError(f"another process was at work in {self.folder}: run this again")
        if self.complete:
            print(f"{self.done}: what is missing, damaged or out of date is made again")
            again = self.record.setdefault("again", {})
            again.update({name: again.get(name, 0) + 1 for name in self.again})
        elif not self.resumed:
            print(f"{self.name}: " + " ".join(f"{k}={v}" for k, v in self.record["settings"].items()), flush=True)
            _empty(self.folder)
        for path in self.folder.rglob(f".*{TEMPORARY}"):  # of processes that were killed
            path.unlink(missing_ok=True)
        self.save()

    def save(self):
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
        if (record := _record_in(self.part)) and record["done"]:
            self._lock(self.part)
            if self.done.exists():
                os.replace(self.done, self.part / EARLIER)
            os.replace(self.part, self.done)
        if (self.done / EARLIER).exists():
            self._lock(self.done)
            shutil.rmtree(self.done / EARLIER)
        self._unlock()

    def _unlock(self):
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    __del__ = _unlock

    def _lock(self, folder):
        """InputError where another process is at work there."""
        if self.lock is not None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(lock), os.stat(folder))  # not renamed by a process that has just ended
        except OSError:
            is_there = False
        if not is_there:
            os.close(lock)
            raise InputError(f"another process is at work in {folder}: wait for it, or take another OUT=")
        self.lock = lock


def _refuse_foreign(folder):
    """InputError where a folder of a stage's name could not be replaced, or is somebody else's."""
    if folder.is_symlink() or os.path.ismount(folder):
        raise InputError(f"{folder} is a link or a mount, which cannot be replaced: remove it, or take another OUT=")
    if not folder.exists():
        return
    others = not folder.is_dir() or [path for path in folder.iterdir()
                                     if not (path.name.endswith(TEMPORARY) or is_junk(path))]
    if others and not (folder / RECORD).is_file():
        raise InputError(f"{folder} is not a result of ours, it has no {RECORD}: move it away, or take another OUT=")
    if not os.access(folder, os.W_OK | os.X_OK) or not os.access(folder.parent, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be replaced: allow writing there, or take another OUT=")


def _empty(folder):
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RECORD):  # last, so that it stays ours till then
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
