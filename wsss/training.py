"""The training loop of all three networks: its batches, checkpoints, several GPUs.

A step's random numbers follow from its own number, so a run that was stopped and goes on equals one that never was, bit
for bit on the CPU. Under torchrun each process takes its share of the batch and gradients are summed; the first writes.
"""
import collections
import json
import time

import numpy as np
import torch
import torch.distributed as dist

from wsss.pool import RANK, WORLD, autocast, bar, loader, peak_memory, precision
from wsss.stage import FlagError, InputError

SAVE_SECONDS = 300  # between two checkpoints
LOG_STEPS = 10  # between two lines of log.jsonl
LOWER = "try a lower --lr, or --no-amp; nothing that was there is lost"


def seed_of(*numbers):
    """One 32-bit seed from several numbers; numbers that are close give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def falling_rate(done):
    """Factor on the learning rate after this share of the steps (PSA; DeepLab)."""
    return (1 - done) ** 0.9


class Batches:
    """The images of each training step: a new order each epoch, an incomplete last batch dropped.

    All follows from the seed and the step's number. Under torchrun each process reads its share.
    """

    def __init__(self, images, batch_size, seed, workers):
        self.images, self.batch_size, self.seed, self.workers = images, batch_size, seed, workers
        self.per_epoch = len(images) // batch_size
        if not self.per_epoch:
            raise InputError(f"only {len(images)} training images: lower --batch-size {batch_size}")
        if batch_size % WORLD:
            raise FlagError(f"--batch-size {batch_size} is not a multiple of {WORLD} processes")

    def indices(self, step):
        epoch, n = divmod(step, self.per_epoch)
        order = np.random.default_rng(seed_of(0, self.seed, epoch)).permutation(len(self.images))
        return order[n * self.batch_size:(n + 1) * self.batch_size].tolist()

    def shares(self, start, stop):
        """What the loader is to read for each of these steps: (index, random seed) of this process's images."""
        each = self.batch_size // WORLD
        mine = slice(RANK * each, (RANK + 1) * each)
        for step in range(start, stop):
            yield [(index, seed_of(1, self.seed, step, index)) for index in self.indices(step)[mine]]


def train_step(model, optimizer, batch, loss_of, scaler, seed, mixed, micro_batch=0):
    """One step of the optimizer on a batch, `micro_batch` images at a time. -> the loss and its terms, by name

    batch: list of tensors on the device; loss_of(model, part, labels): the part's share of the batch's loss, and its
    terms by name, where labels are those of the whole batch, of all processes; seed: of dropout; mixed: `autocast`
    """
    labels = batch[1]
    if dist.is_initialized():
        gathered = [torch.empty_like(labels) for _ in range(WORLD)]
        dist.all_gather(gathered, labels)
        labels = torch.cat(gathered)
    sums, size = collections.Counter(), micro_batch or len(batch[0])
    optimizer.zero_grad(set_to_none=True)
    for start in range(0, len(batch[0]), size):
        torch.manual_seed(seed_of(*seed, RANK * len(batch[0]) + start))
        with mixed:
            loss, terms = loss_of(model, [x[start:start + size] for x in batch], labels)
        scaler.scale(loss).backward()
        for name, value in {"loss": loss, **terms}.items():
            sums[name] += value.detach()
    if dist.is_initialized():  # each process has its share of the loss
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))
    scaler.step(optimizer)
    scaler.update()
    return sums


@torch.inference_mode()
def outputs(model, images, compute, batches, device, mixed):
    """compute(model, batch) of all `images`, in order, a batch at a time."""
    model.eval()
    computed = []
    for batch in loader(images, device, batches.workers, batch_size=batches.batch_size):
        with mixed:
            computed.append(compute(model, batch.to(device)).cpu())
    model.train()
    return torch.cat(computed)


def _resume(checkpoint, run, parts):
    """Take up what an interrupted run left. -> steps done"""
    if not checkpoint.is_file():
        return 0
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception:  # cut short; torch raises many kinds
        saved = {}
    if saved.get("id") != run.record["id"]:
        return 0
    for name, part in parts.items():
        if saved[name]:  # a scaler that is off has no state
            part.load_state_dict(saved[name])
    return saved["step"]


def _means(run, steps, step, device):
    """The mean loss and terms of some steps, over all processes; InputError where one is not finite."""
    means = {}
    for name in steps[0]:
        values = torch.stack([torch.as_tensor(sums[name], dtype=torch.float32) for sums in steps]).cpu()
        if dist.is_initialized():  # each process has its share of the loss
            values = values.to(device)
            dist.all_reduce(values)
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            at = step - len(steps) + int(bad[0]) + 1
            raise InputError(f"the loss of {run.name} is {values[bad[0]].item()} at step {at}: {LOWER}")
        means[name] = values.mean().item()
    return means


def fit(run, model, optimizer, batches, loss_of, steps, network, schedule=lambda done: 1.0, amp=False, micro_batch=0,
        validation=None):
    """Train for `steps` steps -> model.pth; a checkpoint every few minutes, from which the same command goes on.

    loss_of: as in `train_step`; schedule(share of steps done): factor on each group's learning rate; network: what
    rebuilds the network from the file; validation: (images, compute, score), after each epoch: score of the `outputs`
    gives results for the record, by name, printed too.
    """
    if RANK == 0:
        run.start()
    if dist.is_initialized():
        dist.barrier()  # the first process has emptied the folder where it begins
    checkpoint = run.folder / "checkpoint.pth"
    device = next(model.parameters()).device
    if dist.is_initialized() and device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device, amp) == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    step = _resume(checkpoint, run, parts)

    def save(name, state):
        if RANK > 0:
            return
        if bad := next((name for name, value in model.named_parameters() if not value.isfinite().all()), None):
            raise InputError(f"{bad} of {run.name} is not finite after step {step}: {LOWER}")
        run.save(name, lambda file: torch.save(state, file))

    model.train()
    unlogged, saved_at, logged_at = [], time.monotonic(), time.monotonic()
    shares = batches.shares(step, steps)
    loaded, mixed = loader(batches.images, device, batches.workers, batch_sampler=shares), autocast(device, amp)
    with bar(steps * batches.batch_size, run.name, step * batches.batch_size) as progress:
        for batch in loaded:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(step / steps)
            batch = [x.to(device, non_blocking=True) for x in batch]
            try:
                seed = 2, batches.seed, step
                unlogged.append(train_step(model, optimizer, batch, loss_of, scaler, seed, mixed, micro_batch))
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise InputError("BatchNorm sees one value: raise --crop, --batch-size or --micro-batch") from None
            step += 1
            progress.update(batches.batch_size)
            epoch_ends = step == steps or step % batches.per_epoch == 0
            due = time.monotonic() - saved_at > SAVE_SECONDS
            if not epoch_ends and len(unlogged) < LOG_STEPS and (WORLD > 1 or not due):  # all log at one step
                continue
            line = {"step": step, "steps": steps, **_means(run, unlogged, step, device),
                    "lr": optimizer.param_groups[0]["lr"],
                    "images_s": round(len(unlogged) * batches.batch_size / (time.monotonic() - logged_at + 1e-9), 1),
                    "gb": round(peak_memory(), 2), "precision": precision(device, amp)}
            progress.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
            if epoch_ends and validation and RANK == 0:
                images, compute, score = validation
                results = score(outputs(model, images, compute, batches, device, mixed))
                progress.write(f"step {step}: " + ", ".join(f"{name} {value}" for name, value in results.items()))
                run.record.update(results)
                line.update(results)
            if RANK == 0:
                with open(run.folder / "log.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
            if due and step < steps:
                state = {name: part.state_dict() for name, part in parts.items()}
                save(checkpoint.name, {**state, "step": step, "id": run.record["id"]})
                saved_at = time.monotonic()
            unlogged, logged_at = [], time.monotonic()
    save("model.pth", {"model": model.state_dict(), "network": {**network, "id": run.record["id"]}})
    if RANK == 0:
        checkpoint.unlink(missing_ok=True)
