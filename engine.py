"""What carries a run: the device, a pool of processes, the training loop, weight files, several GPUs.

`fit` trains any network here. A step's random numbers follow from its own number, so a run that was stopped and goes on
equals one that never was, bit for bit on the CPU. Under torchrun each process takes its share of the batch and
gradients are summed: the loss is that of one process.
"""
import collections
import contextlib
import json
import os
import platform
import re
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from stage import RANK, STAGES, FlagError, InputError, digest, find_record, is_whole, read_json, write

WORLD = int(os.environ.get("WORLD_SIZE", 1))  # processes under torchrun
SAVE_SECONDS = 300  # between two checkpoints of a training
LOWER = "try a lower --lr, or --no-amp; nothing that was there is lost"
LOG_STEPS = 10  # between two lines of OUT/log.jsonl


# ---------------------------------------------------------------- device

def pick_device(name, card=True):
    """The device, printed; with a warning where a GPU is seen but cannot be used. card: False: it is not for use."""
    if name and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise FlagError(f"--device {name} is neither cuda (or cuda:N) nor cpu")
    device, usable = torch.device("cpu"), False
    if card and (not name or name.startswith("cuda")):
        one = torch.device(name or "cuda")
        if one.index is None or WORLD > 1:  # set_device wants a number
            one = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        try:
            torch.ones(1, device=one).add(1)
            device, usable = one, True
        except (RuntimeError, AssertionError) as error:  # no GPU, driver or kernels that fit
            if "out of memory" in str(error):
                raise InputError(f"{one} has no memory left for another process; --device cpu does without") from None
        if not usable and (name or WORLD > 1 and torch.cuda.device_count()):
            each = f": each of {WORLD} processes needs one" * (WORLD > 1)
            raise InputError(f"--device {one}: torch {torch.__version__} finds no usable GPU{each}")
    if usable:
        torch.cuda.set_device(device)
        # cuDNN's backward pass reads past the end where 1 + N is no multiple of 128 (pytorch/pytorch#169849).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if RANK == 0:
        print(f"device: {device} ({device_name(device)})", flush=True)
        if card and not name and not usable and Path("/proc/driver/nvidia/version").exists():
            print(f"warning: a GPU is there, but torch {torch.__version__} cannot use it: does its CUDA fit?")
    return device


def device_name(device):
    """-> the card's name, or the processor's kind and how many threads of it torch uses"""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def amp_dtype(device):
    """bf16 where the device has it natively, else fp16."""
    native = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float16


def precision(device, amp):
    """-> "float32", or "bf16" or "fp16" for mixed precision"""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[amp_dtype(device)] if amp else "float32"


def autocast(device, amp):
    return torch.autocast(device.type, amp_dtype(device), enabled=amp)


def peak_memory():
    """GB of the card where it is in use, else of this process without its workers."""
    card = torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_initialized() else 0
    if card > 0.1:
        return card
    status = Path("/proc/self/status")  # Linux's getrusage starts with the peak of whoever started this process
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    if peak:
        return int(peak[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6 / 1.024)


# ---------------------------------------------------------------- work in parallel

def bar(total, what, initial=0):
    """A progress bar; in a log, which is no terminal, a line now and then."""
    return tqdm(total=total, desc=what, unit="img", initial=initial, disable=RANK > 0,
                mininterval=0.1 if sys.stderr.isatty() else 60)


def share(run, names):
    """Start a stage, once all processes have seen what of it is there. -> this one's part of the list"""
    if dist.is_initialized():
        dist.barrier()
    run.start()
    if dist.is_initialized():
        dist.barrier()
    return names[RANK::WORLD]


def in_processes(work, jobs, workers, total, what):
    """Yield work(*job) of each job, in order, from a pool of processes; `jobs` may be a generator that computes."""
    with bar(total, what) as progress:
        results = _pooled(work, jobs, workers) if workers and total > 1 else (work(*job) for job in jobs)
        for result in results:
            yield result
            progress.update()


def _pooled(work, jobs, workers):
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (os.getpid(),)) as pool:
        waiting = collections.deque()
        for job in jobs:
            waiting.append(pool.submit(work, *job))
            if len(waiting) >= 2 * workers:  # bounds the memory of what waits
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _start_worker(parent):
    torch.set_num_threads(1)
    if os.getppid() != parent:
        os._exit(1)  # the parent died before `stage.end_with` could note its id


# ---------------------------------------------------------------- training

def seed_of(*numbers):
    """One 32-bit seed of several numbers, as unlike the next one's as can be."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def fit(run, model, optimizer, batches, loss_of, steps, network, schedule=lambda done: 1.0, watch=None):
    """Train to `steps` optimizer steps; a checkpoint every few minutes, from which the same command goes on.

    batches: `data.Batches`; loss_of(part, labels) -> the part's share of the batch's loss, its terms for the log:
    part is a list of tensors on the device, of --micro-batch images, labels those of the whole batch; the shares add up
    to the gradient of the whole. schedule(share of steps done) -> factor on each group's learning rate; network: what
    rebuilds the network from the checkpoint; watch(step) is called before the first and after each epoch.
    """
    args = run.args
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == "fp16")
    step, size = 0, args.micro_batch or len(batches)
    if dist.is_initialized():
        dist.barrier()  # the first process has written its record
        run.record = read_json(run.json)
        if args.device.type == "cuda":
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for path, owner in ((run.pth, run.record["id"]), (run.grown_from, run.record.get("grown_from"))):
        if path and is_whole(path) and (saved := read_weights(path, quiet=True)).get("id") == owner:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if saved["scaler"] and scaler.is_enabled():
                scaler.load_state_dict(saved["scaler"])
            step = saved["step"]
            break

    def save():
        if RANK == 0:
            if bad := next((name for name, value in model.named_parameters() if not value.isfinite().all()), None):
                photos = " ".join(batches.names(step - 1)) if step else "none"
                raise InputError(f"{bad} of {run.name} is not finite after step {step}, photos {photos}: {LOWER}")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                     "step": step, "id": run.record["id"], "settings": run.record["settings"], "network": network}
            write(run.pth, lambda file: torch.save(state, file), sync=True)
            run.save()

    def look():
        if watch and RANK == 0:
            watch(step)
            run.save()
        model.train()

    if step == 0:
        look()
    model.train()
    block, saved_at, block_at = [], time.time(), time.time()
    with bar(steps * batches.batch_size, run.name, step * batches.batch_size) as progress:
        for batch in batches.load(step, steps):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(step / steps)
            batch = [x.to(args.device, non_blocking=True) for x in batch]
            labels, found = _gather(batch[1]), collections.Counter()
            optimizer.zero_grad(set_to_none=True)
            for start in range(0, len(batch[0]), size):
                torch.manual_seed(seed_of(2, args.seed, step, RANK * len(batch[0]) + start))  # of dropout
                with autocast(args.device, args.amp):
                    loss, terms = loss_of([x[start:start + size] for x in batch], labels)
                scaler.scale(loss).backward()
                for name, value in {"loss": loss, **terms}.items():
                    found[name] += value.detach()
            _sum_gradients(model)
            scaler.step(optimizer)
            scaler.update()
            block.append(found)
            step += 1
            progress.update(batches.batch_size)
            ends = step == steps or step % batches.per_epoch == 0
            due = time.time() - saved_at > SAVE_SECONDS
            if not ends and len(block) < LOG_STEPS and (WORLD > 1 or not due):  # several must log at the same step
                continue
            lr = optimizer.param_groups[0]["lr"]
            _log(run, batches, block, step, steps, time.time() - block_at, lr, progress)
            if ends:
                look()
            if step == steps or due:
                save()
                saved_at = time.time()
            block, block_at = [], time.time()
    if not is_whole(run.pth):  # no step was to be taken
        save()


def _gather(labels):
    """Those of the whole batch, of all processes."""
    if not dist.is_initialized():
        return labels
    parts = [torch.empty_like(labels) for _ in range(WORLD)]
    dist.all_gather(parts, labels)
    return torch.cat(parts)


def _sum_gradients(model):
    """Over all processes: each has its share of the batch's loss."""
    if dist.is_initialized():
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))


def _log(run, batches, block, step, steps, seconds, lr, progress):
    """The means of some steps as a line of OUT/log.jsonl; InputError at a loss that is not finite."""
    means = {}
    for name in block[0]:
        values = torch.stack([torch.as_tensor(found[name], dtype=torch.float32) for found in block]).cpu()
        if dist.is_initialized():  # each process has its share of the loss
            values = values.to(run.args.device)
            dist.all_reduce(values)
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            at = step - len(block) + int(bad[0])
            where = f"at step {at + 1} of {steps}, photos {' '.join(batches.names(at))}"
            raise InputError(f"the loss of {run.name} is {values[bad[0]].item()} {where}: {LOWER}")
        means[name] = values.mean().item()
    progress.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
    if RANK == 0:
        line = {"stage": run.name, "id": run.record["id"], "step": step, "steps": steps, **means, "lr": lr,
                "images_s": round(len(block) * batches.batch_size / max(seconds, 1e-9), 1),
                "gb": round(peak_memory(), 2), "precision": run.args.precision}
        with open(run.out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def finish(run, **results):
    """Complete a stage: all processes are done, and the first one says so."""
    if dist.is_initialized():
        dist.barrier()
    peak = max(run.record.get("peak_gb", 0), peak_memory())
    run.finish(**results, device=device_name(run.args.device), precision=run.args.precision, peak_gb=peak)
    if RANK == 0:
        print(f"{run.name}: {run.record['seconds']:.0f} s, {peak:.1f} GB -> {run.out / run.name}", flush=True)


# ---------------------------------------------------------------- weight files

def read_weights(path, hint="", quiet=False):
    """A .pth file without unpickling code; prints the start of its sha256.

    hint: how a message ends that tells which file fits
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no weight file {path}{hint}")
    if not quiet and RANK == 0:
        print(f"{path}: sha256 {digest(path)}...")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds for a foreign file, and advises to load it unsafely
        raise InputError(f"{path} is damaged, or holds more than tensors, and is not read{hint}") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} holds a {type(state).__name__}, not named tensors{hint}")
    return state


def read_trained(path, hint="", network=None):
    """OUT/NAME.pth of a stage, the one that its record tells of; or anybody's, where `network` says what rebuilds it.

    -> tensors by name, what rebuilds the network
    """
    own = f': run "make {STAGES[path.stem][1]}"' if path.stem in STAGES else ""
    saved = read_weights(path, hint or own)
    if network and "network" not in saved:
        return saved.get("model", saved), network
    record = find_record(path.parent, path.stem)
    if saved.get("id") is None or record and record["id"] != saved["id"]:
        raise InputError(f"{path} is not what {path.stem}.json beside it tells of: delete it, and make it again")
    return saved["model"], saved["network"]


def load_weights(model, state, path, heads=(), partial=False, hint=""):
    """Load `state` strictly: whatever is left out is listed by name.

    heads: prefixes of names whose tensors may be missing or of another shape, and then start fresh.
    partial: the file may lack more than that. Returns the names left fresh.
    """
    own = model.state_dict()
    state = state.items() if isinstance(state, dict) else ()
    state = {k: v for k, v in state if isinstance(v, torch.Tensor) and not str(k).endswith("num_batches_tracked")}
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    fresh = [k for k in own if k not in fits and not k.endswith("num_batches_tracked")]
    wrong = [k for k in state if k not in fits and not str(k).startswith(tuple(heads))]
    lacking = [k for k in fresh if not k.startswith(tuple(heads))]
    if wrong or not fits or (lacking and not partial):
        example = (wrong or lacking or fresh)[0]
        shapes = [tuple(d[example].shape) if example in d else "absent" for d in (state, own)]
        counts = f"{len(wrong)} tensors too many or of another shape, {len(lacking)} missing"
        raise InputError(f"{path} does not fit: {counts}, first {example} "
                         f"(file {shapes[0]}, network {shapes[1]}){hint}")
    if bad := next((k for k, v in fits.items() if not v.float().isfinite().all()), None):
        raise InputError(f"{path}: {bad} has values that are not finite{hint}")
    model.load_state_dict({**own, **{k: v.float() for k, v in fits.items()}})
    if fresh and RANK == 0:
        groups = collections.Counter(".".join(name.rsplit(".", 1)[0].split(".")[:2]) for name in fresh)
        print(f"{path}: {len(fits)} tensors loaded; fresh: " + ", ".join(f"{g} ({n})" for g, n in groups.items()))
    return fresh
