"""Weight files: read without running code from them, loaded with every name accounted for, fetched from torchvision."""
import collections
import re
from pathlib import Path

import torch
import torchvision

from wsss.stage import STAGES, InputError, read_record


def read_weights(path, hint=""):
    """A .pth file, without unpickling code. -> tensors by name, and what rebuilds the network where the file is ours

    Tensors may lie inside "model" or "state_dict", their names may begin with "module."
    """
    if not Path(path).is_file():
        raise InputError(f"no weight file {path}{hint}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a foreign file, and advises to load it unsafely
        kind = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds more than tensors ({kind[1]})" if kind else "is damaged"
        raise InputError(f"{path} {what}, and is not read{hint}") from None
    network = state.get("network") if isinstance(state, dict) else {}
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, not named tensors{hint}")
    tensors = {str(k).removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return tensors, network if isinstance(network, dict) else {}


def read_trained(out, name):
    """OUT/NAME/model.pth, the one that its record tells of. -> tensors by name, what rebuilds the network"""
    record, path = read_record(out, name), out / name / "model.pth"
    state, network = read_weights(path, f': run "make {STAGES[name][1]}"')
    if network.get("id") != record["id"]:
        raise InputError(f'{path} does not belong to the record beside it: delete it and run "make {STAGES[name][1]}"')
    return state, {key: value for key, value in network.items() if key != "id"}


def load_weights(model, state, path, heads=(), partial=False, hint=""):
    """Load `state` strictly: whatever is left out is listed by name.

    heads: prefixes of names whose tensors may be missing or of another shape, and then start fresh.
    partial: the file may lack more than that. Returns the names left fresh.
    """
    needed = model.state_dict()
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    known = {k: v for k, v in state.items() if k in needed and v.shape == needed[k].shape}
    fresh = [k for k in needed if k not in known and not k.endswith("num_batches_tracked")]
    wrong = [k for k in state if k not in known and not k.startswith(tuple(heads))]
    lacking = [k for k in fresh if not k.startswith(tuple(heads))]
    if wrong or not known or (lacking and not partial):
        example = (wrong or lacking or fresh)[0]
        theirs, ours = (tuple(d[example].shape) if example in d else "absent" for d in (state, needed))
        counts = f"{len(wrong)} tensors too many or of another shape, {len(lacking)} missing"
        raise InputError(f"{path} does not fit: {counts}, first {example} (file {theirs}, network {ours}){hint}")
    if bad := next((k for k, v in known.items() if not v.float().isfinite().all()), None):
        raise InputError(f"{path}: {bad} has values that are not finite{hint}")
    model.load_state_dict({**needed, **{k: v.float() for k, v in known.items()}})
    if fresh:
        groups = collections.Counter(".".join(name.rsplit(".", 1)[0].split(".")[:2]) for name in fresh)
        print(f"{path}: {len(known)} tensors loaded; fresh: " + ", ".join(f"{g} ({n})" for g, n in groups.items()))
    return fresh


def fetch(name):
    """torchvision's ImageNet weights of a network, from torch's cache or downloaded. -> tensors by name"""
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        return weights.get_state_dict(check_hash=True)
    except Exception as error:  # no network, or not the file that its name promises: torch raises many kinds
        raise InputError(f"cannot fetch {weights.url} ({error}): name a file instead of {name}") from None
