"""Post-tuning, ExVideo section 3.3: only the temporal blocks learn, DeepSpeed shards what they need (ZeRO-2), an EMA is kept.

    deepspeed train.py                                                  # the toy on synthetic scenes, 200 steps, CPU or GPU
    deepspeed train.py --model svd_xt.safetensors --data videos/        # the paper's recipe, on all GPUs of this machine
    deepspeed --num_accelerators 2 train.py                             # two ranks, on a machine without GPUs too
    deepspeed --hostfile hosts train.py --model ... --data ...          # several nodes; --out on a file system they share
    python train.py                                                     # one process, the same code

The same command again resumes from the newest complete state in --out. What a step draws (clip, noise level, noise,
dropout) depends on --seed and the number of the video alone, so a resumed run continues as if it had not stopped.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import data
import exsvd
import sample

HERE = os.path.dirname(os.path.abspath(__file__))

# The recipe of the paper (section 3.3: lr 1e-5, batch 1 per GPU, 128 frames, 512x512; Figure 6: 64,000 steps), and the toy's.
DEFAULTS = {
    "SVD": dict(frames=128, size="512x512", steps=64000, lr=1e-5, save_every=500),
    "toy": dict(frames=40, size="128x128", steps=200, lr=3e-4, save_every=100),
}
SIGMA_BINS = (0.7, 2.0, 6.0)  # the loss is logged apart between these: about the quartiles of the default noise levels
BAD_STEPS = 5                 # steps in a row with non-finite gradients that stop the run


def parse(argv=None):
    p = argparse.ArgumentParser(description="Post-tune SVD for long videos. Defaults depend on the model: SVD / toy.")
    shown = lambda key: " / ".join(str(d[key]) for d in DEFAULTS.values())
    g = p.add_argument_group("what")
    g.add_argument("--model", default=os.path.join(HERE, "assets", "toy.safetensors"), help="single file or diffusers folder [the toy in assets/]")
    g.add_argument("--extension", help="ExVideo release or own extension to continue from [none: extended afresh]")
    g.add_argument("--data", default="synthetic", help="folder of videos, .txt/.csv/.json list, folder written by `data.py encode`, or synthetic")
    g.add_argument("--out", default="runs/exvideo", help="run folder: states, weights, log; the same folder resumes [runs/exvideo]")
    g.add_argument("--train", default="temporal", metavar="WHAT", help="temporal: the temporal attention blocks, as the paper does; all: UNet and CLIP; "
                                                                       "or a regular expression on names such as unet.down.1.attn.temporal.attn1.to_q.weight")
    g.add_argument("--frames", type=int, help=f"per clip [{shown('frames')}]; more than the model's native length extends it")
    g.add_argument("--size", help=f"WIDTHxHEIGHT, multiples of 64 [{shown('size')}]")
    g.add_argument("--short-clips", type=float, default=0.0, metavar="SHARE", help="share of passes on clips of the base's native length instead, so that what "
                                                                                   "it could do is not forgotten [0: the paper's]")
    g.add_argument("--stride", type=int, default=1, help="take every k-th frame of a video [1]")
    g.add_argument("--fps", type=float, help="take frames at this rate instead of a stride")
    g.add_argument("--motion", default="exvideo", help="exvideo: motion buckets 0..127 by the measure ExVideo's release was tuned with; or a number, the "
                   "bucket of every clip. SVD's own scale runs to 255, and how it was measured was not published [exvideo]")
    g.add_argument("--skip-static", type=float, default=0.0, metavar="CHANGE", help="leave out shots whose neighbouring frames differ by less, 0 to 1; 0.002 is "
                   "about a still picture [0: keep all]")
    g = p.add_argument_group("how")
    g.add_argument("--steps", type=int, help=f"optimiser steps in all [{shown('steps')}]")
    g.add_argument("--batch", type=int, default=1, help="videos per GPU and pass [1, the paper's]")
    g.add_argument("--accumulate", type=int, default=1, help="passes per step; gradients add up in fp32, with --offload in 16 bits [1]")
    g.add_argument("--lr", type=float, help=f"AdamW [{shown('lr')}]")
    g.add_argument("--warmup", type=int, default=0, help="steps over which lr rises from 0 [0]")
    g.add_argument("--weight-decay", type=float, default=0.01, help="AdamW's [0.01, PyTorch's default and ExVideo's script's]")
    g.add_argument("--clip", type=float, default=1.0, help="gradient norm limit [1.0: our choice, the sources clip nothing]")
    g.add_argument("--ema", type=float, default=0.9999, help="decay of the moving average, reached by warm-up [0.9999: our choice; the paper gives none]")
    g.add_argument("--loss", choices=("edm", "exvideo"), default="edm", help="edm: SVD's, section 3.3; exvideo: that of the released script [edm]")
    g.add_argument("--drop", type=float, default=0.1, help="share of videos that lose image and CLIP latents, so that guidance keeps working [0.1]")
    g.add_argument("--seed", type=int, default=0, help="of everything that is drawn [0]")
    g = p.add_argument_group("machine")
    g.add_argument("--fp16", action="store_true", help="fp16 with loss scaling instead of bf16")
    g.add_argument("--offload", action="store_true", help="masters, moments and EMA in CPU memory, optimiser on the CPU")
    g.add_argument("--deepspeed_config", metavar="FILE", help="JSON, merged over the settings in this file")
    g.add_argument("--checkpoint", choices=("memory", "speed", "none"), default="memory", help="what is kept for the way back: least memory, a sixth less work "
                   "at twice the memory, or everything [memory]")
    g.add_argument("--workers", type=int, default=2, help="processes per rank that read clips [2]")
    g.add_argument("--deterministic", action="store_true", help="bit-for-bit repeatable on CUDA too, slower")
    g.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    g = p.add_argument_group("output")
    g.add_argument("--save-every", type=int, help=f"steps between states [{shown('save_every')}]")
    g.add_argument("--keep", type=int, default=2, help="states kept [2]")
    g.add_argument("--log-every", type=int, default=10, help="steps per row of log.csv [10]")
    g.add_argument("--sample-every", type=int, default=0, help="steps between sample videos from the EMA [0: none]")
    a = p.parse_args(argv)
    unset = object()
    explicit = p.parse_args(argv, argparse.Namespace(**{k: unset for k in vars(a)}))
    a.given = {k for k, v in vars(explicit).items() if v is not unset}

    a.toy = exsvd.open_model(a.model)[0]["unet"].meta.get("family") == "toy"
    for key, value in DEFAULTS["toy" if a.toy else "SVD"].items():
        if getattr(a, key) is None:
            setattr(a, key, value)
    if a.data == "synthetic" and not a.toy and "data" not in a.given:
        p.error("--data is needed with --model: a folder of videos, for example")
    for key in ("frames", "stride", "steps", "batch", "accumulate", "save_every", "keep", "log_every"):
        if getattr(a, key) < 1:
            p.error(f"--{key.replace('_', '-')} {getattr(a, key)}: must be at least 1")
    if not 0 <= a.drop <= 1 or not 0 <= a.short_clips <= 1 or not 0 <= a.ema < 1 or not 0 < a.lr < 1:
        p.error("--drop and --short-clips must lie in 0..1, --ema in 0..1 (1 excluded), --lr between 0 and 1")
    if a.motion != "exvideo":
        try:
            a.motion = float(a.motion)
        except ValueError:
            p.error(f"--motion {a.motion}: give exvideo or a number")
    try:
        re.compile(a.train)
    except re.error as e:
        p.error(f"--train {a.train}: neither temporal nor all nor a regular expression ({e})")
    try:
        a.width, a.height = (int(n) for n in a.size.lower().split("x"))
        assert a.width > 0 and a.height > 0 and a.width % 64 == a.height % 64 == 0
    except (ValueError, AssertionError):
        p.error(f"--size {a.size}: write WIDTHxHEIGHT in multiples of 64, for example 512x512")
    return a


def deepspeed_config(a):
    """DeepSpeed's settings: ours, then the user's file merged over them. A flag that contradicts the file is an error."""
    user = {}
    if a.deepspeed_config:
        try:
            with open(a.deepspeed_config) as f:
                user = json.load(f)
        except (OSError, ValueError) as e:
            sys.exit(f"train.py: --deepspeed_config {a.deepspeed_config}: {e}")

    def theirs(path):
        tree = user
        for key in path.split("."):
            tree = tree.get(key) if isinstance(tree, dict) else None
        return tree

    flags = {"lr": "optimizer.params.lr", "weight_decay": "optimizer.params.weight_decay", "clip": "gradient_clipping", "fp16": "fp16.enabled",
             "batch": "train_micro_batch_size_per_gpu", "accumulate": "gradient_accumulation_steps", "offload": "zero_optimization.offload_optimizer.device"}
    for flag, path in flags.items():
        value = theirs(path)
        if value is None:
            continue
        value = value == "cpu" if flag == "offload" else value
        if flag in a.given and value != getattr(a, flag):
            sys.exit(f"train.py: --{flag.replace('_', '-')} {getattr(a, flag)} contradicts {path} = {theirs(path)} in {a.deepspeed_config}")
        setattr(a, flag, value)  # main() reads these
    for path, allowed, why in (("zero_optimization.stage", (2,), "the sharded EMA is written for stage 2"),
                               ("zero_optimization.round_robin_gradients", (False,), "the sharded EMA does not follow it"),
                               ("zero_optimization.offload_optimizer.device", ("cpu", "none"), "the sharded EMA needs the masters in memory"),
                               ("bf16.enabled", (not a.fp16,), "weights are bf16, or with --fp16 fp16")):
        if theirs(path) is not None and theirs(path) not in allowed:
            sys.exit(f"train.py: {path} = {theirs(path)} in {a.deepspeed_config}: {why}")

    config = {
        "train_micro_batch_size_per_gpu": a.batch,
        "gradient_accumulation_steps": a.accumulate,
        "gradient_clipping": a.clip,
        # torch_adam: no compiler needed. On the CPU (--offload) DeepSpeed's own AdamW is several times faster.
        "optimizer": {"type": "AdamW", "params": {"lr": a.lr, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": a.weight_decay,
                                                  "torch_adam": not a.offload}},
        "zero_optimization": {"stage": 2, "round_robin_gradients": False,
                              **({"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}} if a.offload else {})},
        "data_types": {"grad_accum_dtype": "fp32"},
        **({"fp16": {"enabled": True, "min_loss_scale": 1}} if a.fp16 else {"bf16": {"enabled": True}}),
    }

    def merge(ours, theirs):
        for key, value in theirs.items():
            ours[key] = merge(ours[key], value) if isinstance(value, dict) and isinstance(ours.get(key), dict) else value
        return ours

    return merge(config, user)


# ----------------------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """What DeepSpeed wraps: the UNet, and CLIP where it is trained too."""

    def __init__(self, unet, clip, kind):
        super().__init__()
        self.unet, self.clip = unet, clip
        self.loss = {"edm": exsvd.edm_loss, "exvideo": exsvd.exvideo_loss}[kind]

    def forward(self, x, sigma, noise, cond, ctx, ids, keep):
        """x and noise (B,T,4,h,w), cond (B,1,4,h,w), ctx (B,1,D) or CLIP's input (B,3,224,224), keep (B,) 0 or 1 -> (B,)"""
        if self.clip is not None:
            ctx = self.clip(ctx)[:, None]
        return self.loss(self.unet, x, sigma, noise, cond * keep.view(-1, 1, 1, 1, 1), ctx * keep.view(-1, 1, 1), ids)


class ShardedEMA:
    """Moving average of the trained parameters in fp32, sharded like the optimiser's state: each rank averages its own part
    of DeepSpeed's fp32 master weights, 1/N of the work and memory.

    The one place that knows DeepSpeed's insides. ZeRO-2 keeps every parameter group as one flat tensor (in the order of
    round_robin_bit16_groups, each parameter at round_robin_bit16_offsets) cut into equal parts, one per rank; the fp32
    master of our part is single_partition_of_fp32_groups. Not a documented API: hence the pinned minor version.
    """

    def __init__(self, engine, names, decay):
        zero = engine.optimizer
        name_of = {id(p): name for name, p in engine.module.named_parameters()}
        self.masters = zero.single_partition_of_fp32_groups
        self.layout = [[(name_of[id(p)], p.shape, offset) for p, offset in zip(params, offsets)]
                       for params, offsets in zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets)]
        self.rank, self.world, self.decay, self.device = dist.get_rank(), dist.get_world_size(), decay, engine.device
        for master, flat, group in zip(self.masters, zero.bit16_groups_flat, self.layout):
            _, shape, offset = group[-1]
            assert master.dtype == torch.float32 and master.numel() * self.world == flat.numel() >= offset + shape.numel(), \
                f"DeepSpeed cut {flat.numel()} parameters into {self.world} parts of {master.numel()}"
        found = sorted(name for group in self.layout for name, _, _ in group)
        assert found == sorted(names), f"DeepSpeed trains {len(found)} tensors, {len(names)} were meant"
        self.shards = [m.detach().clone() for m in self.masters]
        self.updates = 0

    def pieces(self, rank):
        """Where a rank's parts and whole parameters overlap: (group, slice of the part, name, slice of the flat parameter, shape)."""
        for i, group in enumerate(self.layout):
            size = self.masters[i].numel()
            for name, shape, offset in group:
                lo, hi = max(offset, rank * size), min(offset + shape.numel(), (rank + 1) * size)
                if lo < hi:
                    yield i, slice(lo - rank * size, hi - rank * size), name, slice(lo - offset, hi - offset), shape

    @torch.no_grad()
    def start_from(self, state):
        """Set masters and average to fp32 weights. DeepSpeed made the masters from the model's half-precision copies."""
        for i, part, name, whole, _ in self.pieces(self.rank):
            self.masters[i].data[part] = state[name].flatten()[whole].to(self.masters[i])
        self.shards = [m.detach().clone() for m in self.masters]

    @torch.no_grad()
    def update(self):
        """After a step that was applied. Half-life at decay d: ln 2 / (1 - d) steps, 6,931 of them at 0.9999."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shards, [m.detach() for m in self.masters], 1 - decay)
        self.updates += 1

    def gather(self):
        """The whole average, {name: fp32 tensor on the CPU}, on rank 0 and {} elsewhere. Every rank must call it."""
        state = {}
        for rank in range(self.world):
            parts = [(s if rank == self.rank else torch.empty_like(s)).to(self.device) for s in self.shards]
            for part in parts:
                dist.broadcast(part, rank)
            for i, part, name, whole, shape in self.pieces(rank) if self.rank == 0 else ():
                state.setdefault(name, torch.empty(shape)).view(-1)[whole] = parts[i][part].cpu()
        return state


# ----------------------------------------------------------------------------------------------------------------------
# The state to resume from: a folder that is complete or not there.


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def room(a, ema):
    """Whether a state and the weights fit on the disk: a full one must not end the run. Removes what killed saves left."""
    if ema.rank == 0:
        for name in os.listdir(a.out):
            path = os.path.join(a.out, name)
            if name.endswith(".tmp"):
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    need = 22 * sum(s.numel() for s in ema.shards) * ema.world  # master, two moments, EMA twice: fp32; weights: 16 bits
    enough = torch.tensor(shutil.disk_usage(a.out).free > 1.05 * need + 2**20, device=ema.device, dtype=torch.int)
    dist.broadcast(enough, 0)
    if not enough and ema.rank == 0:
        print(f"warning: no room in {a.out} to save {need / 1e9:.1f} GB; nothing is saved until there is", file=sys.stderr)
    return bool(enough)


def save_state(engine, ema, a, step, videos, data_id):
    """Write --out/state-<step>: DeepSpeed's checkpoint without frozen parameters, each rank's part of the EMA, the position.

    Killed in the middle it leaves a .tmp folder, which nothing reads and the next save removes.
    """
    final, part = os.path.join(a.out, f"state-{step:08d}"), os.path.join(a.out, f"saving-{step:08d}.tmp")
    engine.save_checkpoint(part, tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
    save_file({str(i): s for i, s in enumerate(ema.shards)}, os.path.join(part, f"ema-rank{ema.rank}.safetensors"))
    dist.barrier()
    for folder, _, files in os.walk(part):  # every rank, since each node must flush what it wrote
        for name in [*files, "."]:
            sync(os.path.join(folder, name))
    dist.barrier()
    if ema.rank == 0:
        with open(os.path.join(part, "state.json"), "w") as f:
            json.dump(dict(step=step, videos=videos, ema_updates=ema.updates, ranks=ema.world, data=data_id, settings=settings(a)), f, indent=1)
        sync(f.name), sync(part)
        os.rename(part, final)
        sync(a.out)
        for name in sorted(n for n in os.listdir(a.out) if re.fullmatch(r"state-\d+", n))[:-a.keep]:
            old = os.path.join(a.out, name)
            os.rename(old, old + ".tmp")  # so that a state is never half there, not even while it goes
            shutil.rmtree(old + ".tmp")
    dist.barrier()


def newest_state(a):
    """(folder, its state.json) of the newest complete state, or (None, None); rank 0 looks, all get the same."""
    found = [(None, None)]
    if dist.get_rank() == 0:
        names = sorted(name for name in os.listdir(a.out) if re.fullmatch(r"state-\d+", name))
        if names:
            folder = os.path.join(a.out, names[-1])
            try:
                with open(os.path.join(folder, "state.json")) as f:
                    found = [(folder, json.load(f))]
            except (OSError, ValueError) as e:
                sys.exit(f"train.py: {folder} is damaged ({e}): remove it, and the same command resumes from the state before")
    dist.broadcast_object_list(found)
    return found[0]


def load_state(engine, ema, folder, info, a):
    """Continue from a state; returns (step, videos). Exits with one line if it belongs to another run."""
    ours = settings(a)
    wrong = [f"{k} {v} (now {ours[k]})" for k, v in info["settings"].items() if ours[k] != v]
    if info["ranks"] != ema.world:
        wrong.insert(0, f"{info['ranks']} ranks (now {ema.world}; the shards of optimiser and EMA are per rank)")
    if wrong:
        sys.exit(f"train.py: {folder} was made with {', '.join(wrong)}: use the same settings, or another --out with --extension to start from its weights")
    engine.load_checkpoint(folder, tag="deepspeed", load_module_strict=False)  # its frozen parameters come from --model
    for group in engine.optimizer.param_groups:  # may change within a run
        group.update(lr=a.lr, weight_decay=a.weight_decay)
    shards = load_file(os.path.join(folder, f"ema-rank{ema.rank}.safetensors"))
    for i, s in enumerate(ema.shards):
        s.copy_(shards[str(i)])
    ema.updates = info["ema_updates"]
    return info["step"], info["videos"]


def settings(a):
    """What must not change within a run."""
    return {k: getattr(a, k) for k in ("frames", "size", "stride", "fps", "train", "batch", "loss", "drop", "motion", "seed", "fp16", "ema", "short_clips",
                                      "model_id")}


# ----------------------------------------------------------------------------------------------------------------------
# Weights to use: small, EMA only, loaded by sample.py, by the official code, and by --extension here.


def save_weights(a, step, ema_state, unet, kept):
    """On rank 0: the temporal blocks in the layout of the ExVideo release, or the whole model where more than they was trained.

    kept: fp32 values of parameters of the temporal blocks that are not trained.
    """
    meta = dict(step=step, settings=settings(a))
    if a.saves_extension:
        path = os.path.join(a.out, f"exvideo-{step:06d}.safetensors")
        exsvd.save_extension(path, unet, {n.removeprefix("unet."): t for n, t in (kept | ema_state).items()}, **meta)
        return path
    path = os.path.join(a.out, f"model-{step:06d}.safetensors")
    svd = exsvd.load(a.model, a.extension)  # read again for the fp32 values of what was not trained
    if unet.max_frames:
        exsvd.extend(svd.unet, unet.max_frames)
    for name, t in ema_state.items():
        network, _, name = name.partition(".")
        getattr(svd, network).get_parameter(name).data.copy_(t)
    exsvd.save_model(path, svd.unet, svd.vae, svd.clip, **({"family": "toy"} if a.toy else {}), **meta)
    return path


@torch.no_grad()
def save_sample(a, step, ema_state, module, cond, ctx, ids):
    """On rank 0: a video from the EMA, conditioned like a training clip; returns its motion score (0: nothing moves)."""
    parameters = dict(module.named_parameters())
    own = {name: parameters[name].detach().cpu() for name in ema_state}
    for name, t in ema_state.items():
        parameters[name].data.copy_(t)
    module.eval()
    defaults = sample.DEFAULTS["toy" if a.toy else "ExVideo"]
    noise = torch.randn(1, a.frames, 4, a.height // 8, a.width // 8, generator=torch.Generator().manual_seed(a.seed)).to(cond.device)
    sigmas = exsvd.karras_sigmas(25).to(cond.device)
    denoise = sample.guided(module.unet, cond, ctx, ids, defaults["cfg"], a.frames)
    latents = sample.ddim(denoise, noise * (sigmas[0] ** 2 + 1).sqrt(), sigmas)
    for name, t in own.items():
        parameters[name].data.copy_(t)
    module.train()
    vae = exsvd.load(a.model, parts=("vae",), device=cond.device).vae  # not kept: it would cost memory all the time
    path = os.path.join(a.out, f"sample-{step:06d}.mp4")
    frames = torch.cat(list(sample.decode(vae, latents / exsvd.VAE_SCALE, defaults["decode_chunk"])))
    with data.VideoWriter(path, max(1, float(ids[0, 0]) + 1)) as video:
        video.write(sample.to_pixels(frames))
    return data.motion_score(frames.clamp(-1, 1))


# ----------------------------------------------------------------------------------------------------------------------
# What is kept of a run beside its weights


def fingerprint(data):
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def keep_sources(a, config):
    """What a run was made by: sources, versions, settings, beside its results."""
    folder = os.path.join(a.out, "source")
    os.makedirs(folder, exist_ok=True)
    for name in ("exsvd.py", "train.py", "data.py", "sample.py"):
        shutil.copy(os.path.join(HERE, name), folder)
    import deepspeed
    git = shutil.which("git")
    commit = git and subprocess.run([git, "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    with open(os.path.join(a.out, "run.json"), "w") as f:
        json.dump(dict(arguments={k: v for k, v in vars(a).items() if k != "given"}, deepspeed=config, commit=commit,
                       versions=dict(python=sys.version.split()[0], torch=torch.__version__, deepspeed=deepspeed.__version__)), f, indent=1)


class Log:
    """log.csv: a row every --log-every steps. After a resume, rows beyond the state are dropped: those steps come again."""
    COLUMNS = ["step", "videos", "loss", *(f"loss_sigma_{lo}_{hi}" for lo, hi in zip((0,) + SIGMA_BINS, SIGMA_BINS + ("inf",))),
               "grad_norm", "lr", "seconds_per_step", "frames_per_second", "peak_memory_GB"]

    def __init__(self, a, step):
        self.a, self.last, self.path = a, step, os.path.join(a.out, "log.csv")
        rows = []
        if os.path.exists(self.path):
            with open(self.path, newline="") as f:
                rows = [row for row in list(csv.reader(f))[1:] if row and int(row[0]) <= step]
        with open(self.path + ".tmp", "w", newline="") as f:
            csv.writer(f).writerows([self.COLUMNS, *rows])
        os.replace(self.path + ".tmp", self.path)

    def row(self, step, videos, sums, grad_norm, lr, seconds, frames_per_second, device):
        loss = [f"{s / n:.5f}" if n else "" for s, n in zip(*sums.tolist())]
        memory = sample.peak_memory(device).split()[0]
        with open(self.path, "a", newline="") as f:
            csv.writer(f).writerow([step, videos, *loss, f"{grad_norm:.4f}" if grad_norm is not None else "", f"{lr:.3g}",
                                    f"{seconds / max(1, step - self.last):.3f}", f"{frames_per_second:.1f}", memory])
        self.last = step


# ----------------------------------------------------------------------------------------------------------------------
# The videos of a pass, and what is drawn for them


def videos_of(rank, world, a, videos):
    """The numbers of the videos this rank sees from number `videos` on, a pass at a time, without end."""
    while True:
        yield [videos + rank * a.batch + i for i in range(a.batch)]
        videos += world * a.batch


class TwoLengths(torch.utils.data.Dataset):
    """Item n is of `short` or of `long`, by a draw from (seed, number of its pass): the videos of a pass are of one length."""

    def __init__(self, long, short, share, seed, per_pass):
        self.long, self.short, self.share, self.seed, self.per_pass = long, short, share, seed, per_pass

    def __getitem__(self, n):
        drawn = np.random.default_rng([self.seed, 2, n // self.per_pass]).random()
        return (self.short if drawn < self.share else self.long)[n]


def ignore_sigterm(_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # in the readers: the launcher signals them too, and their rank still needs them


def draw(a, n, shape):
    """Of the n-th video: sigma, noise (T,4,h,w), and whether its conditioning stays. From (seed, n) alone, on the CPU."""
    seed = np.random.SeedSequence([a.seed, n]).generate_state(1)[0]  # hashed: torch's CPU generator uses 32 bits of a seed
    g = torch.Generator().manual_seed(int(seed))
    return exsvd.draw_sigmas(a.loss, 1, g)[0], torch.randn(shape, generator=g), (torch.rand((), generator=g) >= a.drop).float()


@torch.no_grad()
def encode(vae, clip, item, trains_clip):
    """A batch of clips to latents (B,T,4,h,w) and cond (B,4,h,w), unscaled, and ctx (B,1,D), or CLIP's input if CLIP is trained."""
    device = next(vae.parameters()).device
    latents, conds, ctxs = [], [], []
    for video, aug, noise in zip(item["video"], item["aug"], item["aug_noise"]):
        latents.append(data.encode_frames(vae, video))
        if trains_clip:
            conds.append(vae.encode((video[:1] + aug * noise).to(device))[0])
            ctxs.append(exsvd.preprocess_clip(video[:1].to(device), clip.config.image)[0])
        else:
            cond, ctx = data.encode_condition(vae, clip, video[0], aug, noise)
            conds.append(cond), ctxs.append(ctx[None])
    return torch.stack(latents), torch.stack(conds), torch.stack(ctxs)


# ----------------------------------------------------------------------------------------------------------------------
# The run


def main(argv=None):
    a = parse(argv)

    # One process is a world of one: what the launcher would have set is filled in, and the code below is the same.
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for key, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
        os.environ.setdefault(key, str(value))
    if a.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    import deepspeed  # here, so that --help and wrong arguments answer at once
    deepspeed.utils.logger.setLevel("WARNING")
    # An optional op for sums between CPU ranks, compiled at start under a lock file: a run killed there would leave the lock
    # behind, and every later one would wait for it without end. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = deepspeed_config(a)
    if a.fp16 and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        sys.exit("train.py: --fp16: DeepSpeed finds no fp16 on this machine; leave it out to train in bf16")
    deepspeed.init_distributed(timeout=timedelta(hours=12))  # not its 10 minutes: rank 0 may index many videos, or sample a long one
    rank, world = dist.get_rank(), dist.get_world_size()
    master = rank == 0
    say = print if master else lambda *_, **__: None
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, min(torch.get_num_threads(), os.cpu_count() // world)))  # ranks share the cores
    os.makedirs(a.out, exist_ok=True)

    # Data: rank 0 builds the index, the others then find it
    options = dict(frames=a.frames, size=(a.width, a.height), stride=a.stride, fps=a.fps, seed=a.seed, motion=a.motion, skip_static=a.skip_static)
    if master:
        dataset = data.open_dataset(a.data, **options, log=os.path.join(a.out, "data.log"))
    dist.barrier()
    if not master:
        dataset = data.open_dataset(a.data, **options)
    say(dataset.describe())
    data_id = fingerprint(repr(dataset.usable).encode())

    # Model, and what of it trains
    parts = ("unet",) + (("vae", "clip") if dataset.pixels else ())
    svd = exsvd.load(a.model, a.extension, parts=parts)
    clips, native = dataset, svd.unet.config.native_frames
    if a.short_clips:
        clips = TwoLengths(dataset, data.open_dataset(a.data, **options | {"frames": native}), a.short_clips, a.seed, a.batch)
        say(f"{a.short_clips:.0%} of the passes on clips of {native} frames")
    a.model_id = fingerprint(svd.unet.conv_out.weight.detach().numpy().tobytes())
    trains_clip = a.train == "all" or any(re.search(a.train, f"clip.{name}") for name in (svd.clip.state_dict() if svd.clip else ()))
    if a.frames > (svd.unet.max_frames or native):
        exsvd.extend(svd.unet, a.frames)
    if not dataset.pixels and (trains_clip or dataset.settings["ctx"] != svd.unet.config.context_dim):
        sys.exit(f"train.py: {a.data} holds CLIP embeddings of {dataset.settings['ctx']} numbers, " +
                 ("but to train CLIP needs the videos themselves" if trains_clip else f"this model takes {svd.unet.config.context_dim}: encode again with --model {a.model}"))
    svd.unet.checkpointing = None if a.checkpoint == "none" else a.checkpoint
    module = Loss(svd.unet, svd.clip if trains_clip else None, a.loss)
    if a.train == "temporal":
        exsvd.freeze(svd.unet)
    else:
        for name, p in module.named_parameters():
            p.requires_grad_(a.train == "all" or bool(re.search(a.train, name)))
    chosen = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not chosen:
        sys.exit(f"train.py: --train {a.train} names no parameter; names look like unet.down.1.attn.temporal.attn1.to_q.weight")
    a.saves_extension = svd.unet.max_frames is not None and all(".attn.temporal." in name for name in chosen)
    for name, p in chosen.items():
        p.requires_grad_(not exsvd.IDLE.search(name))  # no gradient ever reaches these, and weight decay must not either
    trained = [name for name, p in chosen.items() if p.requires_grad]
    million = lambda names: f"{sum(chosen[n].numel() for n in names) / 1e6:,.1f} M"
    say(f"UNet of {sum(p.numel() for p in svd.unet.parameters()) / 1e6:,.1f} M parameters; trained: {million(chosen)} in {len(chosen)} tensors, "
        f"{million(set(chosen) - set(trained))} of them idle while the context is one token" + (", CLIP among them" if trains_clip else ""))
    # the fp32 values of what trains (for the masters) and of what is saved with it; then half precision for all
    start = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    kept = {name: p.detach().clone() for name, p in module.named_parameters() if ".attn.temporal." in name and not p.requires_grad}
    module.to(torch.float16 if a.fp16 else torch.bfloat16).train()
    if dataset.pixels:  # frozen: fp32 targets from the VAE; CLIP, which is large, in half precision on a GPU
        vae = svd.vae.requires_grad_(False).to(device)
        clip = svd.clip if trains_clip else svd.clip.requires_grad_(False).to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    del svd

    engine, *_ = deepspeed.initialize(model=module, model_parameters=[p for p in module.parameters() if p.requires_grad], config=config)
    if a.fp16:  # its own exception at the smallest scale would name no clips
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    ema = ShardedEMA(engine, trained, a.ema)
    ema.start_from(start)
    del start
    step = videos = 0
    folder, info = newest_state(a)
    if folder:
        step, videos = load_state(engine, ema, folder, info, a)
        say(f"resumed from {folder}: step {step}, {videos} videos seen")
        if info["data"] != data_id:
            say(f"warning: {a.data} holds other clips than when that was saved; from here on they come in another order", file=sys.stderr)
    elif master:
        keep_sources(a, config)
    dist.barrier()
    if not os.path.exists(os.path.join(a.out, "run.json")):
        sys.exit(f"train.py: rank {rank} does not see what rank 0 wrote to {a.out}: put --out on a file system that all nodes share")

    loader = iter(torch.utils.data.DataLoader(clips, batch_sampler=videos_of(rank, world, a, videos), num_workers=a.workers,
                                              worker_init_fn=ignore_sigterm, pin_memory=device.type == "cuda"))
    log = Log(a, step) if master else None
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append("SIGTERM"))
    say(f"{world} ranks, rank 0 is process {os.getpid()}: send SIGTERM to it, or any other rank, to save and leave")
    bar = tqdm(total=a.steps, initial=step, desc="training", unit="step", disable=not master)
    bad, frames, begin = [], 0, time.perf_counter()  # bad: names of the clips of each of the last steps that could not be applied
    sums = torch.zeros(2, len(SIGMA_BINS) + 2, device=device)  # loss and count, in all and per sigma bin, since the last row

    while step < a.steps:
        # 1. forward and backward, --accumulate times
        if a.warmup:
            for group in engine.optimizer.param_groups:
                group["lr"] = a.lr * min(1, (step + 1) / a.warmup)
        names = []
        for _ in range(a.accumulate):
            item = next(loader)
            names += item["name"]
            numbers = range(videos + rank * a.batch, videos + (rank + 1) * a.batch)
            ids = torch.stack([item["fps"] - 1, item["motion"], item["aug"]], dim=1).to(device)
            if dataset.pixels:
                x, cond, ctx = encode(vae, clip, item, trains_clip)
            else:
                x, cond, ctx = (item[k].to(device) for k in ("latents", "cond", "ctx"))
                ctx = ctx[:, None]
            draws = [draw(a, n, x.shape[1:]) for n in numbers]
            sigma, noise, keep = (torch.stack(t).to(device) for t in zip(*draws))
            loss = engine(x.float() * exsvd.VAE_SCALE, sigma, noise, cond[:, None].float(), ctx.float(), ids, keep)
            engine.backward(loss.mean())
            engine.step()  # reduces gradients; updates on the last of --accumulate calls
            bins = torch.bucketize(sigma, torch.tensor(SIGMA_BINS, device=device)) + 1
            for where in (torch.zeros_like(bins), bins):
                sums.index_add_(1, where, torch.stack([loss.detach().float(), torch.ones_like(loss, dtype=torch.float)]))
            videos += world * a.batch
            frames += world * a.batch * x.shape[1]
        step += 1

        # 2. the average follows steps that were applied. DeepSpeed decides that on all ranks alike
        if engine.was_step_applied():
            ema.update()
            bad = []
        elif not a.fp16 or engine.optimizer.loss_scale <= getattr(engine.optimizer.loss_scaler, "min_scale", math.inf):
            bad += [names]  # above its smallest scale fp16 only looks for a scale by overflowing: that is no failure
        if len(bad) == BAD_STEPS:
            everyone = [None] * world
            dist.all_gather_object(everyone, sum(bad, []))
            say(f"train.py: {BAD_STEPS} steps in a row with non-finite gradients, on these clips: {', '.join(sum(everyone, []))}", file=sys.stderr)
            sys.exit(1)

        # 3. log, sample, save; leave together
        flag = torch.tensor(len(stop), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        leaving = bool(flag) or step == a.steps
        bar.update()
        if step % a.log_every == 0 or leaving:
            dist.all_reduce(sums)
            if master:
                seconds = time.perf_counter() - begin
                log.row(step, videos, sums, engine.get_global_grad_norm(), engine.optimizer.param_groups[0]["lr"], seconds, frames / seconds, device)
                bar.set_postfix(loss=f"{sums[0, 0] / sums[1, 0]:.4f}")
            sums.zero_()
            frames, begin = 0, time.perf_counter()
        if a.sample_every and (step % a.sample_every == 0 or step == a.steps):
            state = ema.gather()
            if master:
                with torch.no_grad():
                    ctx_in = module.clip(ctx)[:, None] if trains_clip else ctx
                score = save_sample(a, step, state, module, cond[:1, None].float(), ctx_in[:1].float(), ids[:1])
                say(f"step {step}: sample-{step:06d}.mp4, motion score {score:.4f} (its clip: bucket {ids[0, 1]:.0f})")
            dist.barrier()
        if step % a.save_every == 0 or leaving:
            if room(a, ema):
                state = ema.gather()
                if master:  # before the state, for a run that resumes from it does not write them again
                    say(f"step {step}: saved {save_weights(a, step, state, module.unet, kept)}")
                dist.barrier()
                save_state(engine, ema, a, step, videos, data_id)
            elif leaving:
                sys.exit(1)
        if leaving:
            break
    bar.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (exsvd.WeightsError, data.MediaError, SafetensorError, OSError) as e:
        sys.exit(f"train.py: {e}")
