"""Post-tuning, ExVideo section 3.3: only the temporal blocks learn, DeepSpeed shards what they need (ZeRO-2), and an
exponential moving average (EMA) of them is kept.

    deepspeed train.py                                              # the toy, on clips made on the fly; CPU or GPU
    deepspeed train.py --model svd_xt.safetensors --data videos/    # the paper's recipe, on all GPUs of this machine
    deepspeed --num_accelerators 2 train.py                         # two ranks, on a machine without GPUs too
    deepspeed --hostfile hosts train.py --model ... --data ...      # several nodes; --out on a file system they share
    python train.py                                                 # one process, the same code

The recipe is the paper's (section 3.3, abstract, Figure 6): 8 A100 GPUs, 128 frames of 512x512, 40,258 clips, lr 1e-5,
batch 1 per GPU, 64,000 steps shown, one week. What it leaves open comes from SVD's formulation, public training
codes or ourselves; beside it the script released with the paper (in DiffSynth-Studio):

    choice               here                                     released script, and other sources
    ------------------   --------------------------------------   ----------------------------------------------------
    optimiser            AdamW                                    AdamW
    precision            bf16; fp32 masters, moments and EMA      fp16
    clips                anywhere in a video, at its frame rate   always its first 128 frames
    fps id               the clip's own rate - 1                  29 for every clip
    loss                 EDM's, (s^2+1)/s^2 |D - x|^2             sqrt(s^2+1)/s |D - 1.01 x|^2 (--loss exvideo)
    noise levels         ln s ~ N(0.7, 1.6^2), as SVD_Xtend and   uniform on 1,000 Karras sigmas (--loss exvideo);
                         animate-anything                         Vista: ln s ~ N(1.0, 1.6^2)
    noise on the image   ln a ~ N(-3.0, 0.5^2), the third id      none; SVD_Xtend's is ours
    image dropout        0.1, latents and CLIP together (ours)    none
    clipping             gradient norm 1.0 (ours)                 none
    motion bucket        0..127 by deviation over time            the same
    EMA                  0.9999 a step, warm-up (1+n)/(10+n)      0.9 per epoch file, averaged afterwards: about 0.9999
                         (ours)                                   per step at its 1,000 steps an epoch
    weight decay         0.01 on matrices and convolutions only   0.01 on everything

A run folder (--out) holds
    state-<step>/               what resuming needs: each rank's part of masters, moments and EMA; position, checksums
    exvideo-<step>.safetensors  the EMA in float16 with the names of the ExVideo release, for --extension. Where more
                                than the temporal blocks was trained: a whole model, model-<step>
    log.csv                     loss, loss by noise level, gradient norm, lr, seconds, memory, every --log-every steps
    progress.png                a row per sample, at most 32: frames 0, T/8, ... T-1; sample-<step>.mp4 are the videos
    data.log                    the files that are not used or could not be read later, and why
    run.json, source/           settings, versions, commit, code
States, weights and samples are pruned to the last --keep; weights and samples of every --keep-every steps stay for
ever. When the disk is full the run goes on, both are tried again at the next interval, and nothing older goes before
both are written.

The same command resumes from the newest state that is undamaged. What a step draws (clip, noise level, noise, dropout)
depends on --seed and the number of the video alone, so a run that was killed, in the middle of a save too, ends in the
same bits as one that was not (on CUDA: with --deterministic).
Another number of ranks continues too, exactly, from where the others stopped: the parts are cut anew, and no video is
seen twice; --batch must stay, --accumulate may make up for ranks that are gone. Several nodes:

    deepspeed --hostfile hosts train.py --model ... --data ... --out /shared/run     # by ssh; or on each node k of 2:
    deepspeed --hostfile hosts --no_ssh --node_rank k --master_addr HOST train.py ...
    torchrun --nnodes 2 --node_rank k --nproc_per_node 8 --master_addr HOST --master_port 29500 train.py ...
    srun --nodes 2 --ntasks-per-node 1 bash -c 'torchrun --nnodes 2 --node_rank $SLURM_NODEID --nproc_per_node 8 ...'

A node that is gone ends the others with one line: at once if its connections break, else within --lost-after seconds.

To stop early and lose nothing, send SIGTERM or SIGUSR1 to one training process (rank 0 prints its id) or to all: the
ranks agree, save and leave. What launchers do with a signal to themselves (tried on one node, DeepSpeed 0.19.8, torch
2.13): `deepspeed` ends alone and its ranks go on; torchrun passes SIGTERM on and kills after 30 s, and on SIGUSR1 ends
its ranks unsaved. Slurm (not tried): scancel and --signal=TERM@300 reach all tasks of a step.
"""

import argparse
import csv
import dataclasses
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
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import data
import exsvd
import sample

HERE = os.path.dirname(os.path.abspath(__file__))
TOY = os.path.join(HERE, "assets", "toy.safetensors")

# By family of the model: the recipe of the paper, and the toy's.
DEFAULTS = {
    "SVD": dict(frames=128, size=(512, 512), steps=64000, lr=1e-5, checkpoint="memory", save_every=500, keep_every=5000,
                sample_every=0, warmup=0, ema=0.9999, drop=0.1),
    # never trained without its image, nor sampled with guidance; an average of 200 steps is a short one
    "toy": dict(frames=40, size=(128, 128), steps=200, lr=1e-3, checkpoint="none", save_every=100, keep_every=100,
                sample_every=50, warmup=10, ema=0.98, drop=0.0),
}
# Flags that --deepspeed_config may set too: the key there, and what holds if neither does (lr: see DEFAULTS).
DEEPSPEED_KEYS = {
    "lr": ("optimizer.params.lr", None),
    "weight_decay": ("optimizer.params.weight_decay", 0.01),
    "clip": ("gradient_clipping", 1.0),
    "batch": ("train_micro_batch_size_per_gpu", 1),
    "accumulate": ("gradient_accumulation_steps", 1),
    "offload": ("zero_optimization.offload_optimizer.device", False),
}
SIGMA_BINS = (0.7, 2.0, 6.0)  # the loss is logged apart between these: about the quartiles of the default noise levels
SAMPLING = {"SVD": sample.DEFAULTS["ExVideo"], "toy": sample.DEFAULTS["toy"]}  # settings of samples during training
BUCKET = 50_000_000           # gradients that DeepSpeed gathers on the GPU at a time, 2 bytes each; it would take 10x
PROGRESS_ROWS = 32            # of progress.png, at most
BAD_STEPS = 5                 # steps in a row with non-finite gradients that stop the run


# ----------------------------------------------------------------------------------------------------------------------
# Settings


whole = partial(sample.at_least, kind=int)


def bucket(text):
    return text if text == "exvideo" else float(text)


def expression(text):
    try:
        re.compile(text)
    except re.error as e:
        raise argparse.ArgumentTypeError(f"{text}: neither temporal nor all nor a regular expression ({e})") from None
    return text


def json_file(path):
    try:
        with open(path) as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError) as e:
        raise argparse.ArgumentTypeError(f"{path}: not readable as JSON ({e})") from None


def parse(argv=None):
    """-> (arguments, "SVD" or "toy"). What neither a flag nor --deepspeed_config says is the default of that family."""
    p = argparse.ArgumentParser(description="Post-tune SVD for long videos. Defaults depend on the model: SVD / toy.")

    def shown(key):
        values = [d[key] for d in DEFAULTS.values()]
        return " / ".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)

    add = p.add_argument_group("what").add_argument
    add("--model", default=TOY, help="single file or diffusers folder [the toy in assets/]")
    add("--native", type=whole(1), metavar="N",
        help="frames the model was trained on: 14 for svd.safetensors, which does not say so [as its file says, or 25]")
    add("--extension", help="ExVideo release or own extension to continue from [none: extended afresh]")
    add("--data", help="folder of videos, .txt/.csv/.json list, folder written by `data.py encode`, or synthetic "
                       "[the toy: synthetic]")
    add("--out", default="runs/exvideo", help="run folder: states, weights, log; the same one resumes [runs/exvideo]")
    add("--train", default="temporal", type=expression, metavar="WHAT",
        help="temporal: the temporal attention blocks, as the paper does; all: UNet and CLIP; or a regular expression "
             "on names such as unet.down.1.attn.temporal.attn1.to_q.weight [temporal]")
    add("--frames", type=whole(1), help=f"per clip; beyond its native length a model is extended [{shown('frames')}]")
    add("--size", type=sample.frame_size, help=f"WIDTHxHEIGHT, multiples of 64 [{shown('size')}]")
    add("--short-clips", type=sample.at_least(0, 1), default=0.0, metavar="SHARE",
        help="share of passes on clips of the native length, so that what the base could is not forgotten [0: paper's]")
    add("--stride", type=whole(1), default=1, help="take every k-th frame of a video [1]")
    add("--fps", type=sample.at_least(1e-3), help="take frames at this rate instead of a stride")
    add("--motion", type=bucket, default="exvideo",
        help="exvideo: motion buckets 0..127 by the measure ExVideo's release was tuned with; or a number, the bucket "
             "of every clip. SVD's own scale runs to 255, and how it was measured was not published [exvideo]")
    add("--skip-static", type=sample.at_least(0, 1), default=0.0, metavar="CHANGE",
        help="leave out shots whose neighbouring frames differ by less, 0 to 1; a still picture: about 0.002 [0: none]")

    add = p.add_argument_group("how").add_argument
    add("--steps", type=whole(1), help=f"optimiser steps in all [{shown('steps')}]")
    add("--batch", type=whole(1), help="videos per GPU and pass [1, the paper's]")
    add("--accumulate", type=whole(1), help="passes per step; gradients add up in fp32, with --offload in 16 bits [1]")
    add("--lr", type=sample.at_least(0, 1), help=f"AdamW's learning rate [{shown('lr')}]")
    add("--warmup", type=whole(0), help=f"steps over which lr rises from 0 [{shown('warmup')}]")
    add("--weight-decay", type=sample.at_least(0), help="AdamW's [0.01, PyTorch's default and ExVideo's script's]")
    add("--clip", type=sample.at_least(0), help="gradient norm limit, 0: none [1.0: ours, the sources clip nothing]")
    add("--ema", type=sample.at_least(0, 1), help=f"decay of the average, after a warm-up [{shown('ema')}]")
    add("--loss", choices=("edm", "exvideo"), default="edm", help="SVD's (section 3.3), or the released script's [edm]")
    add("--share-noise", type=whole(0), default=0, metavar="BLOCK",
        help="noise whose means over BLOCK x BLOCK latents are the same in all frames, as sample.py's [0: off]")
    add("--drop", type=sample.at_least(0, 1),
        help=f"share of videos that lose image and CLIP latents, so that guidance keeps working [{shown('drop')}]")
    add("--seed", type=whole(0), default=0, help="of everything that is drawn [0]")

    # what --deepspeed_config may say too has no default here: see DEEPSPEED_KEYS
    add = p.add_argument_group("machine").add_argument
    add("--dtype", choices=("bfloat16", "float16", "float32"),
        help="of the weights; float16 comes with loss scaling [what the device is good at, see exsvd.best_dtype]")
    add("--offload", action="store_true", default=None, help="optimiser, masters, moments and EMA on the CPU")
    add("--deepspeed_config", type=json_file, metavar="FILE",
        help='JSON, merged over the settings in this file. TensorBoard: {"tensorboard": {"enabled": true, '
             '"output_path": "runs"}}; Weights & Biases: {"wandb": {"enabled": true, "project": "exvideo"}}')
    add("--checkpoint", choices=("memory", "speed", "none"),
        help=f"kept for the way back: least; twice that, for a sixth less work; or all [{shown('checkpoint')}]")
    add("--workers", type=whole(0), default=2, help="processes per rank that read clips [2]")
    add("--lost-after", type=sample.at_least(1), default=300, metavar="SECONDS",
        help="end when nothing was heard of another rank for so long, since its node may be gone [300]")
    add("--deterministic", action="store_true", help="bit-for-bit repeatable on CUDA too, slower")
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it

    add = p.add_argument_group("output").add_argument
    add("--save-every", type=whole(1), help=f"steps between states and weights [{shown('save_every')}]")
    add("--keep", type=whole(1), default=2, help="how many of the last states, weights and samples stay [2]")
    add("--keep-every", type=whole(1), metavar="N",
        help=f"weights and samples that stay too, in steps [{shown('keep_every')}]")
    add("--log-every", type=whole(1), default=10, help="steps per row of log.csv [10]")
    add("--sample-every", type=whole(0), metavar="N",
        help="sample a video from the EMA before the first and after every N-th step, with the settings of sample.py, "
             f"always from the same image and noise; 0: never [{shown('sample_every')}]")
    add("--sample-image", metavar="FILE",
        help="sample from this image [the first clip's first frame; of synthetic clips: assets/img.png]")
    a = p.parse_args(argv)

    for flag, (path, default) in DEEPSPEED_KEYS.items():
        value = look_up(a.deepspeed_config, path)
        if flag == "offload" and value is not None:
            value = value == "cpu"
        given = getattr(a, flag)
        if value is None:
            setattr(a, flag, default if given is None else given)
        elif given in (None, value):
            setattr(a, flag, value)
        else:
            p.error(f"--{flag.replace('_', '-')} {given} contradicts {path} in --deepspeed_config")
    toy = exsvd.open_model(a.model)[0]["unet"].meta.get("family") == "toy"
    family = "toy" if toy else "SVD"
    for key, value in DEFAULTS[family].items():
        if getattr(a, key) is None:
            setattr(a, key, value)
    if a.data is None and not toy:
        p.error("--data is needed with --model: a folder of videos, for example")
    a.data = a.data or "synthetic"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a.dtype = a.dtype or str(exsvd.best_dtype(device, training=True)).removeprefix("torch.")
    if a.sample_image:
        data.read_image(a.sample_image)  # what cannot be read is to be known before a run of days begins
    return a, family


def look_up(tree, path):
    """The value at a path such as "fp16.enabled" in nested dicts, or None."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def deepspeed_config(a):
    """DeepSpeed's settings: ours, and the user's merged over them. Exits at those that Shards can't follow."""
    allowed = {
        "zero_optimization.stage": ((2,), "the sharded EMA is written for stage 2"),
        "zero_optimization.round_robin_gradients": ((False,), "the sharded EMA does not follow it"),
        "zero_optimization.offload_optimizer.device": (("cpu", "none"), "the sharded EMA needs the masters in memory"),
        "bf16.enabled": ((a.dtype == "bfloat16",), "--dtype says what the weights are"),
        "fp16.enabled": ((a.dtype == "float16",), "--dtype says what the weights are"),
    }
    for path, (values, why) in allowed.items():
        found = look_up(a.deepspeed_config, path)
        if found is not None and found not in values:
            sys.exit(f"train.py: {path} = {found} in --deepspeed_config: {why}")
    ours = {
        "train_micro_batch_size_per_gpu": a.batch,
        "gradient_accumulation_steps": a.accumulate,
        "gradient_clipping": a.clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": a.lr, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": a.weight_decay,
                "torch_adam": not a.offload,  # no compiler needed. On the CPU DeepSpeed's own is several times faster
            },
        },
        "zero_optimization": {"stage": 2, "round_robin_gradients": False},
    }
    if a.dtype == "bfloat16":
        ours["bf16"] = {"enabled": True}
    if a.dtype == "float16":
        ours["fp16"] = {"enabled": True, "min_loss_scale": 1}
    if a.offload:
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    else:  # with --offload too DeepSpeed would keep these sums on the GPU, 4 bytes per parameter
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    return merge(ours, a.deepspeed_config or {})


def merge(ours, theirs):
    for key, value in theirs.items():
        both = isinstance(value, dict) and isinstance(ours.get(key), dict)
        ours[key] = merge(ours[key], value) if both else value
    return ours


def fixed_settings(a, model_id):
    """What must not change within a run; lr, the number of ranks and where things are kept may."""
    keys = ("native", "frames", "size", "stride", "fps", "train", "batch", "loss", "drop", "motion", "seed", "dtype",
            "ema", "short_clips", "share_noise")
    settings = {key: getattr(a, key) for key in keys} | {"model_id": model_id}
    return json.loads(json.dumps(settings))  # as it will be read again: tuples become lists


# ----------------------------------------------------------------------------------------------------------------------
# What trains


class Loss(nn.Module):
    """What DeepSpeed wraps: the UNet, and CLIP where it is trained too."""

    def __init__(self, unet, clip, kind):
        super().__init__()
        self.unet, self.clip = unet, clip
        self.loss = {"edm": exsvd.edm_loss, "exvideo": exsvd.exvideo_loss}[kind]

    def forward(self, x, sigma, noise, cond, ctx, ids, keep):
        """x, noise (B,T,4,h,w), cond (B,1,4,h,w), ctx (B,1,D) or CLIP's input (B,3,224,224), keep (B,) 0, 1 -> (B,)"""
        if self.clip is not None:
            ctx = self.clip(ctx)[:, None]
        return self.loss(self.unet, x, sigma, noise, cond * keep.view(-1, 1, 1, 1, 1), ctx * keep.view(-1, 1, 1), ids)


def choose(module, what):
    """Sets requires_grad as --train says. -> ({name: parameter} that it names, the same of those that get gradients)"""
    pattern = re.compile({"temporal": r"\.attn\.temporal\.", "all": ""}.get(what, what))
    chosen = {name: p for name, p in module.named_parameters() if pattern.search(name)}
    if not chosen:
        sys.exit(f"train.py: --train {what} names no parameter; names look like "
                 "unet.down.1.attn.temporal.attn1.to_q.weight")
    trained = {name: p for name, p in chosen.items() if not exsvd.IDLE.search(name)}  # these get no gradient, so they
    for name, p in module.named_parameters():                                         # must not decay either
        p.requires_grad_(name in trained)
    return chosen, trained


def parameter_groups(trained):
    """For AdamW: what decays, and what does not. Decay pulls towards 0, which is neutral for matrices and convolutions,
    but not for norms, biases, tables of positions and the identity convolution, whose neutral value is the identity."""
    positions = re.compile(r"frame_table|frame_conv|positional_embedding")
    decaying, exempt = [], []
    for name, p in trained.items():
        if p.ndim > 1 and not positions.search(name):
            decaying.append(p)
        else:
            exempt.append(p)
    groups = [{"params": decaying}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Shards:
    """The part of the trained parameters that a rank keeps in fp32: DeepSpeed's master weights and moments, and our
    moving average (EMA) of the masters, sharded alike: 1/N of the work and memory.

    The one place that knows DeepSpeed's insides. ZeRO-2 keeps every parameter group as one flat tensor (in the order of
    round_robin_bit16_groups, each parameter at round_robin_bit16_offsets, zeros at the end) cut into equal parts, one
    per rank; the fp32 master of our part is single_partition_of_fp32_groups. Not a documented API: hence the pinned
    minor version.
    """
    ENGINE_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")

    def __init__(self, engine, names, decay):
        self.engine, self.zero = engine, engine.optimizer
        name_of = {id(p): name for name, p in engine.module.named_parameters()}
        self.masters = self.zero.single_partition_of_fp32_groups
        groups = zip(self.zero.round_robin_bit16_groups, self.zero.round_robin_bit16_offsets)
        self.layout = [[(name_of[id(p)], p.shape, offset) for p, offset in zip(*group)] for group in groups]
        self.rank, self.world, self.decay, self.device = dist.get_rank(), dist.get_world_size(), decay, engine.device
        for master, flat, group in zip(self.masters, self.zero.bit16_groups_flat, self.layout):
            _, shape, offset = group[-1]
            size = master.numel() * self.world
            assert master.dtype == torch.float32 and size == flat.numel() >= offset + shape.numel(), \
                f"DeepSpeed cut {flat.numel()} parameters into {self.world} parts of {master.numel()}"
        self.names = sorted(name for group in self.layout for name, _, _ in group)
        assert self.names == sorted(names), f"DeepSpeed trains {len(self.names)} tensors, {len(names)} were meant"
        self.elements = sum(shape.numel() for group in self.layout for _, shape, _ in group)
        self.average = [m.detach().clone() for m in self.masters]
        self.updates = 0

    def pieces(self, rank):
        """Where a rank's parts and parameters overlap: (group, slice of part, name, slice of parameter, shape)"""
        for i, group in enumerate(self.layout):
            size = self.masters[i].numel()
            for name, shape, offset in group:
                lo, hi = max(offset, rank * size), min(offset + shape.numel(), (rank + 1) * size)
                if lo < hi:
                    yield i, slice(lo - rank * size, hi - rank * size), name, slice(lo - offset, hi - offset), shape

    @torch.no_grad()
    def start_from(self, state):
        """Set masters and average to fp32 weights. DeepSpeed made its masters from the half-precision copies."""
        for i, part, name, whole, _ in self.pieces(self.rank):
            self.masters[i].data[part] = state[name].flatten()[whole].to(self.masters[i])
        self.average = [m.detach().clone() for m in self.masters]

    @torch.no_grad()
    def update_average(self):
        """After a step that was applied. Half-life at decay d: ln 2 / (1 - d) steps, 6,931 of them at 0.9999."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [m.detach() for m in self.masters], 1 - decay)
        self.updates += 1

    def gather_average(self):
        """The whole average, {name: fp32 tensor on the CPU}, on rank 0 and {} elsewhere. Every rank must call it."""
        state = {}
        for rank in range(self.world):
            parts = [(s if rank == self.rank else torch.empty_like(s)).to(self.device) for s in self.average]
            for part in parts:
                dist.broadcast(part, rank)
            for i, part, name, whole, shape in self.pieces(rank) if self.rank == 0 else ():
                state.setdefault(name, torch.empty(shape)).view(-1)[whole] = parts[i][part].cpu()
        return state

    def optimizer_state(self):
        """Per group, what the optimiser keeps: ({key: tensor like the master}, {key: number}, AdamW's step for one)."""
        for i, master in enumerate(self.masters):
            state = self.zero.optimizer.state[master]
            tensors = {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == master.shape}
            yield tensors, {k: float(v) for k, v in state.items() if k not in tensors}

    def save(self, path):
        """Write this rank's parts. -> what resuming needs beside them, the same on all ranks, for JSON"""
        tensors, numbers = {}, []
        for i, (moments, others) in enumerate(self.optimizer_state()):
            parts = {"master": self.masters[i].detach(), "average": self.average[i]} | moments
            tensors |= {f"{i}.{key}": t.cpu().contiguous() for key, t in parts.items()}
            numbers.append(others)
        save_file(tensors, path)
        return {
            "updates": self.updates,
            "numbers": numbers,
            "loss_scaler": {k: v for k, v in vars(self.zero.loss_scaler).items() if type(v) in (bool, int, float)},
            "engine": {key: getattr(self.engine, key) for key in self.ENGINE_COUNTERS},
            "scheduler": self.engine.lr_scheduler.state_dict() if self.engine.lr_scheduler else None,
            "lr": [group["lr"] for group in self.zero.optimizer.param_groups],  # which the scheduler's state has not
        }

    @torch.no_grad()
    def load(self, paths, saved):
        """Continue from the files of all ranks of a run, however many they were: the flat tensors are cut anew."""
        files = [safe_open(path, "pt") for path in paths]
        of_torch = type(self.zero.optimizer).__module__.startswith("torch.")  # steps: a tensor there, else a number
        for i, master in enumerate(self.masters):
            state = self.zero.optimizer.state[master]
            for name in files[0].keys():
                group, _, key = name.partition(".")
                if group == str(i):
                    own = {"master": master.data, "average": self.average[i]}
                    target = own[key] if key in own else state.setdefault(key, torch.zeros_like(master.data))
                    read_range(files, name, self.rank * master.numel(), target)
            for key, value in saved["numbers"][i].items():
                state[key] = torch.tensor(value) if of_torch else int(value)
        self.updates = saved["updates"]
        for target, values in ((self.zero.loss_scaler, saved["loss_scaler"]), (self.engine, saved["engine"])):
            for key, value in values.items():
                setattr(target, key, value)
        if self.engine.lr_scheduler and saved["scheduler"]:
            self.engine.lr_scheduler.load_state_dict(saved["scheduler"])
            for group, lr in zip(self.zero.optimizer.param_groups, saved["lr"]):
                group["lr"] = lr
        self.zero.update_lp_params()  # the model's half-precision weights, from the masters


def read_range(files, name, begin, out):
    """Read a flat tensor, of which each file has an equal part, from element `begin` on into `out`; 0 after its end."""
    out.zero_()
    end = begin + out.numel()
    size = files[0].get_slice(name).get_shape()[0]
    for r, file in enumerate(files):
        lo, hi = max(begin, r * size), min(end, (r + 1) * size)
        if lo < hi:
            out[lo - begin:hi - begin] = file.get_slice(name)[lo - r * size:hi - r * size]


# ----------------------------------------------------------------------------------------------------------------------
# States and weights. A state is a folder that is complete or not there, and says itself whether it is undamaged.

STATE = re.compile(r"state-(\d+)")
DAMAGED = re.compile(r"damaged-(\d+)")  # a state that was passed over; it goes when there is a new one
WEIGHTS = re.compile(r"(?:exvideo|model)-(\d+)\.safetensors")
SAMPLE = re.compile(r"sample-(\d+)\.mp4")
ROW = re.compile(r"(\d+)\.png")       # of progress.png


def saved_steps(out, pattern):
    """{step: path} of what a run folder holds of a kind, in order of steps."""
    matches = [m for m in map(pattern.fullmatch, os.listdir(out)) if m]
    return {int(m[1]): os.path.join(out, m[0]) for m in sorted(matches, key=lambda m: int(m[1]))}


def remove(path):
    """A file or folder; it gets another name first, so that a state is never half there, not even while it goes."""
    os.rename(path, path + ".tmp")
    discard(path + ".tmp")


def discard(path):
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def checksum(path):
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as f:
        while block := f.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value):
    return hashlib.blake2b(value if isinstance(value, bytes) else repr(value).encode(), digest_size=8).hexdigest()


def of_all_ranks(value):
    """[what each rank gives]; pickled, so for small things."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(f, *args):
    """f(*args) on every rank. -> its result; OSError on all ranks if it failed on one, which no other must wait for."""
    result = problem = None
    try:
        result = f(*args)
    except (OSError, SafetensorError, exsvd.WeightsError) as e:
        problem = str(e)
    for problem in of_all_ranks(problem):
        if problem is not None:
            raise OSError(problem)
    return result


def on_rank_0(f, *args):
    """The same, of f on rank 0 alone."""
    def idle(*_):
        pass

    return together(f if dist.get_rank() == 0 else idle, *args)


def is_extension(unet, trained):
    """Whether weights are saved as an extension: nothing but temporal blocks of an extended UNet is trained."""
    return unet.max_frames is not None and all(".attn.temporal." in name for name in trained)


def bytes_to_save(a, shards):
    """Of a state (master, two moments, average: fp32) and, at most, of the weights (fp16)."""
    state = weights = shards.elements
    if not is_extension(shards.engine.module.unet, shards.names):  # the whole model, and what extended it
        for file in set(exsvd.open_model(a.model)[0].values()):
            weights += sum(math.prod(file.shape(name)) for name in file.names)
    return 16 * state, 2 * weights


def has_disk_space(folder, need):
    """Whether `need` bytes fit, once what killed saves left is removed."""
    for name in os.listdir(folder):
        if name.endswith(".tmp"):
            discard(os.path.join(folder, name))
    return shutil.disk_usage(folder).free > need


def save(a, shards, position, settings, write_weights, sizes):
    """Weights and state of a step. Every rank must call it. Raises OSError, on all alike; what was there then still is.

    position: "step" and what else a resumed run must know. write_weights(average) is called on rank 0. sizes: see
    bytes_to_save().
    """
    def check_room():
        need = 1.05 * sum(sizes) + 2**20
        if not has_disk_space(a.out, need):
            raise OSError(f"{a.out} has no room for {need / 1e9:.2f} GB")

    on_rank_0(check_room)
    # weights before the state: a run that resumes from it does not write them again
    on_rank_0(write_weights, shards.gather_average())
    save_state(a, shards, position, settings)
    if shards.rank == 0:
        try:
            prune(a)
        except OSError as e:  # all is saved: nothing to end a run for
            print(f"warning: what is not kept could not be removed ({e})", file=sys.stderr)


def prune(a):
    """Remove damaged states, and states, weights and samples that --keep and --keep-every do not keep."""
    damaged = list(saved_steps(a.out, DAMAGED).values())
    for path in damaged + list(saved_steps(a.out, STATE).values())[:-a.keep]:
        remove(path)
    for pattern in (WEIGHTS, SAMPLE):
        for step, path in list(saved_steps(a.out, pattern).items())[:-a.keep]:
            if step % a.keep_every:
                remove(path)


def save_state(a, shards, position, settings):
    """Write --out/state-<step>. Raises OSError. Killed in the middle it leaves a .tmp that nothing reads."""
    final = os.path.join(a.out, f"state-{position['step']:08d}")
    part = os.path.join(a.out, f"saving-{position['step']:08d}.tmp")

    def write_own():
        path = os.path.join(part, f"rank-{shards.rank}.safetensors")
        os.makedirs(part, exist_ok=True)
        saved = shards.save(path)
        sync(path)
        sync(part)  # every rank, since each node must flush what it wrote
        return saved, checksum(path)

    def finish():
        files = {f"rank-{r}.safetensors": c for r, c in enumerate(checksums)}
        info = json.loads(json.dumps(position | {"shards": saved, "settings": settings, "files": files}))
        with open(os.path.join(part, "state.json"), "w") as f:
            json.dump(info | {"checksum": fingerprint(json.dumps(info))}, f, indent=1)
        sync(f.name)
        os.rename(part, final)
        sync(a.out)

    try:
        saved, own = together(write_own)
        checksums = of_all_ranks(own)
        on_rank_0(finish)
    except OSError:
        if shards.rank == 0:
            discard(part)
        raise


def read_state(folder, rank, world):
    """-> its state.json. Raises OSError if it is damaged; each rank checks its share of the files, see together()."""
    try:
        with open(os.path.join(folder, "state.json")) as f:
            info = json.load(f)
        if info.pop("checksum") != fingerprint(json.dumps(info)):
            raise ValueError("state.json is not as it was written")
        for name in list(info["files"])[rank::world]:
            if checksum(os.path.join(folder, name)) != info["files"][name]:
                raise ValueError(f"{name} is not as it was written")
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise OSError(str(e)) from None
    return info


def newest_state(a, rank, world, say):
    """-> (folder, its state.json) of the newest undamaged state, or (None, None) where a run begins. Newer ones, which
    are damaged, get another name."""
    candidates = [list(saved_steps(a.out, STATE).values())]
    dist.broadcast_object_list(candidates)  # rank 0's: all ranks look at the same
    unseen = sum(of_all_ranks([folder for folder in candidates[0] if not os.path.isdir(folder)]), [])
    if unseen:  # another rank's disk, and not a damaged state
        sys.exit(f"train.py: a rank does not see {unseen[0]}: put --out on a file system that all nodes share")
    damaged = []
    for folder in reversed(candidates[0]):
        try:
            info = together(read_state, folder, rank, world)
        except OSError as e:
            say(f"warning: {folder} is damaged and passed over ({e})", file=sys.stderr)
            damaged.append(folder)
            continue
        for path in damaged if rank == 0 else ():
            os.rename(path, os.path.join(a.out, os.path.basename(path).replace("state", "damaged")))
        return folder, info
    if damaged:
        sys.exit(f"train.py: no state in {a.out} is undamaged: to begin anew, remove its folders state-*, with "
                 "--extension to start from weights that are there")
    return None, None


def save_weights(a, step, average, module, untrained, settings, family):
    """In float16: the temporal blocks in the layout of the ExVideo release, or the whole model where more was trained.

    average: {name: fp32 tensor} of what is trained. untrained: the same of the other parameters of the temporal blocks.
    """
    unet, meta = module.unet, {"step": step, "settings": settings}
    if is_extension(unet, average):
        path = os.path.join(a.out, f"exvideo-{step:06d}.safetensors")
        blocks = {name.removeprefix("unet."): t.half() for name, t in (untrained | average).items()}
        exsvd.save_extension(path, unet, blocks, **meta)
        return path
    path = os.path.join(a.out, f"model-{step:06d}.safetensors")
    svd = exsvd.load(a.model, a.extension)  # read again for the fp32 values of what was not trained
    set_native(svd.unet, a.native)
    if unet.max_frames:
        exsvd.extend(svd.unet, unet.max_frames)
    for name, t in average.items():
        network, _, name = name.partition(".")
        getattr(svd, network).get_parameter(name).data.copy_(t)
    if family == "toy":
        meta["family"] = family
    exsvd.save_model(path, svd.unet, svd.vae, svd.clip, torch.float16, **meta)
    return path


def set_native(unet, frames):
    """Frames the base was trained on, where --native says what its file does not."""
    if frames:
        unet.config = dataclasses.replace(unet.config, native_frames=frames)


# ----------------------------------------------------------------------------------------------------------------------
# What is kept of a run beside its weights


def keep_sources(a, config):
    """What a run was made by: sources, versions, settings, beside its results."""
    folder = os.path.join(a.out, "source")
    os.makedirs(folder, exist_ok=True)
    for name in ("exsvd.py", "train.py", "data.py", "sample.py"):
        shutil.copy(os.path.join(HERE, name), folder)
    import deepspeed
    commit = None
    if git := shutil.which("git"):
        commit = subprocess.run([git, "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "deepspeed": deepspeed.__version__}
    with open(os.path.join(a.out, "run.json"), "w") as f:
        json.dump({"arguments": vars(a), "deepspeed": config, "commit": commit, "versions": versions}, f, indent=1)


class Log:
    """log.csv: a row every --log-every steps. Resuming drops rows beyond the state: those steps come again."""
    BINS = [f"loss_sigma_{low}_{high}" for low, high in zip((0, *SIGMA_BINS), (*SIGMA_BINS, "inf"))]
    COLUMNS = ["step", "videos", "loss", *BINS, "grad_norm", "lr", "seconds_per_step", "frames_per_second",
               "peak_memory_GB"]

    def __init__(self, a, step):
        self.path = os.path.join(a.out, "log.csv")
        rows = []
        if os.path.exists(self.path):
            with open(self.path, newline="") as f:
                rows = [row for row in list(csv.reader(f))[1:] if row and int(row[0]) <= step]
        with open(self.path + ".tmp", "w", newline="") as f:
            csv.writer(f).writerows([self.COLUMNS, *rows])
        os.replace(self.path + ".tmp", self.path)

    def row(self, step, videos, sums, grad_norm, lr, seconds_per_step, frames_per_second, device):
        """sums: see add_losses()"""
        loss = [f"{total / n:.5f}" if n else "" for total, n in zip(*sums.tolist())]
        norm = "" if grad_norm is None else f"{grad_norm:.4f}"
        memory = sample.peak_memory(device).split()[0]
        speed = f"{seconds_per_step:.3f}", f"{frames_per_second:.1f}"
        with open(self.path, "a", newline="") as f:
            csv.writer(f).writerow([step, videos, *loss, norm, f"{lr:.3g}", *speed, memory])


# ----------------------------------------------------------------------------------------------------------------------
# The videos of a pass, and what is drawn for them


def videos_of(rank, world, batch, videos):
    """The numbers of the videos this rank sees from number `videos` on, a pass at a time, without end."""
    while True:
        yield [videos + rank * batch + i for i in range(batch)]
        videos += world * batch


class TwoLengths(torch.utils.data.Dataset):
    """Item n is of `short` or of `long`, drawn from (seed, number of its pass): videos of a pass have one length."""

    def __init__(self, long, short, share, seed, per_pass):
        self.long, self.short, self.share, self.seed, self.per_pass = long, short, share, seed, per_pass

    def __getitem__(self, n):
        drawn = np.random.default_rng([self.seed, 2, n // self.per_pass]).random()
        return (self.short if drawn < self.share else self.long)[n]


def ignore_signals(_):
    for number in STOP_SIGNALS:  # in the readers: launchers signal them too, and their rank still needs them
        signal.signal(number, signal.SIG_IGN)


def draw(a, n, shape):
    """Of the n-th video: sigma, noise (T,4,h,w), 1 if its conditioning stays or 0. From (seed, n), on the CPU."""
    seed = np.random.SeedSequence([a.seed, n]).generate_state(1)[0]  # hashed: torch's generator uses 32 bits of a seed
    g = torch.Generator().manual_seed(int(seed))
    sigma, noise = exsvd.draw_sigmas(a.loss, 1, g)[0], torch.randn(shape, generator=g)
    keep = (torch.rand((), generator=g) >= a.drop).float()
    return sigma, sample.shared_noise(noise[None], a.share_noise)[0], keep


@torch.no_grad()
def encode(vae, clip, item, clip_trains):
    """Clips to latents (B,T,4,h,w), cond (B,4,h,w), both unscaled, and ctx (B,1,D), or CLIP's input if that trains."""
    device = next(vae.parameters()).device
    latents, conds, ctxs = [], [], []
    for video, aug, noise in zip(item["video"], item["aug"], item["aug_noise"]):
        latents.append(data.encode_frames(vae, video))
        if clip_trains:
            conds.append(vae.encode((video[:1] + aug * noise).to(device))[0])
            ctxs.append(exsvd.preprocess_clip(video[:1].to(device), clip.config.image)[0])
        else:
            cond, ctx = data.encode_condition(vae, clip, video[0], aug, noise)
            conds.append(cond)
            ctxs.append(ctx[None])
    return torch.stack(latents), torch.stack(conds), torch.stack(ctxs)


def inputs(item, vae, clip, clip_trains, device):
    """What the model sees of a batch, fp32 on the device: x (B,T,4,h,w), scaled; cond (B,1,4,h,w); ctx; ids (B,3)."""
    if "video" in item:
        x, cond, ctx = encode(vae, clip, item, clip_trains)
    else:
        x, cond, ctx = item["latents"].to(device), item["cond"].to(device), item["ctx"].to(device)[:, None]
    ids = torch.stack([item["fps"] - 1, item["motion"], item["aug"]], dim=1).to(device)
    return x.float() * exsvd.VAE_SCALE, cond[:, None].float(), ctx.float(), ids


def sum_over_ranks(sums):
    total = sums.clone()
    dist.all_reduce(total)
    return total


def add_losses(sums, loss, sigma):
    """sums (2, bins + 1): losses and how many they are, in all and per bin of sigma. loss and sigma (B,)"""
    bins = torch.bucketize(sigma, torch.tensor(SIGMA_BINS, device=sigma.device)) + 1
    for where in (torch.zeros_like(bins), bins):
        sums.index_add_(1, where, torch.stack([loss, torch.ones_like(loss)]).double())


# ----------------------------------------------------------------------------------------------------------------------
# Samples during training


def sample_start(a, family, dataset, networks):
    """What samples start from: an image (3,H,W) in [-1,1], frames per second, motion bucket. networks() -> VAE, CLIP"""
    s = SAMPLING[family]
    path = a.sample_image
    if path is None and a.data == "synthetic":
        path = os.path.join(HERE, "assets", "img.png")
    if path:
        img = data.fit_image(data.read_image(path), *a.size)
        fps, motion = a.fps or s["fps"], s["motion"]
    else:
        item = dataset[0]
        fps, motion = float(item["fps"]), float(item["motion"])
        if dataset.pixels:
            img = item["video"][0]
        else:
            vae, _ = networks()
            img = vae.decode(item["latents"][None, :1].to(next(vae.parameters())))[0, 0].float().clamp(-1, 1).cpu()
    return img, fps, motion if a.motion == "exvideo" else a.motion


@torch.no_grad()
def sample_video(a, family, unet, vae, clip, start, device):
    """Frames (T,3,H,W), about -1 to 1, as sample.py makes them with the same --seed. start: see sample_start()"""
    img, fps, motion = start
    s = SAMPLING[family] | dict(seed=a.seed, frames=a.frames, round=a.frames, overlap=0, schedule="karras",
                                cfg_interval=None, fps=fps, motion=motion)
    latents = sample.make_latents(exsvd.SVD(unet, vae, clip, {}, None), img, s, device)
    return torch.cat(list(sample.decode(vae, latents / exsvd.VAE_SCALE, s["decode_chunk"])))


@contextmanager
def weights_replaced(module, state):
    """The module with other values, {name: tensor}, in evaluation mode; then as it was."""
    parameters = dict(module.named_parameters())
    own = {name: parameters[name].detach().to("cpu", copy=True) for name in state}
    for name, t in state.items():
        parameters[name].data.copy_(t)
    module.eval()
    try:
        yield
    finally:
        for name, t in own.items():
            parameters[name].data.copy_(t)
        module.train()


def add_progress(out, step, frames):
    """Frames 0, T/8, ... T-1 of a sample, uint8 (T,H,W,3), as the last row of progress.png. A resumed run goes on from
    rows that are kept apart. Of more than PROGRESS_ROWS every second one goes: a week's picture is no larger."""
    T = len(frames)
    chosen = sorted({T * i // 8 for i in range(8)} | {T - 1})
    every = math.ceil(frames.shape[1] / 256)  # small enough to look at
    folder = os.path.join(out, "progress")
    os.makedirs(folder, exist_ok=True)
    row = torch.cat([frames[i, ::every, ::every] for i in chosen], dim=1)  # (H, 9 W, 3)
    data.write_png(os.path.join(folder, f"{step:06d}.png"), row)
    rows = [path for number, path in saved_steps(folder, ROW).items() if number <= step]
    if len(rows) > PROGRESS_ROWS:
        for path in rows[1:-1:2]:
            os.remove(path)
            rows.remove(path)
    data.write_png(os.path.join(out, "progress.png"), torch.cat([data.read_image(path) for path in rows]))


def save_sample(a, family, step, frames, start):
    """Write sample-<step>.mp4 and its row of progress.png. -> {name: what was measured}, a line to print

    Motion score: change over time, 0 if nothing moves. Arrival, in the toy's own world: how much of its way to the last
    frame the camera has flown there.
    """
    img, fps, motion = start
    pixels, name = sample.to_pixels(frames), f"sample-{step:06d}.mp4"
    with data.VideoWriter(os.path.join(a.out, name), fps) as video:
        video.write(pixels)
    add_progress(a.out, step, pixels)
    measured = {"motion_score": data.motion_score(frames.clamp(-1, 1))}
    line = f"step {step}: {name} and a row of progress.png, motion score {measured['motion_score']:.4f}"
    if family == "toy" and a.data == "synthetic" and motion > 0 and a.size[0] == a.size[1]:
        from toy import measure
        path = measure.camera_path(frames.clamp(-1, 1), img)
        measured["arrival"] = float(measure.way(path, motion, fps)[-1])
        line += f"; the camera has flown {measured['arrival']:.0%} of its way"
    return measured, line


# ----------------------------------------------------------------------------------------------------------------------
# The run

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def join_ranks(a, family):
    """Find the other ranks; a process without a launcher is a world of one. -> rank, how many there are, device"""
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
    # An optional op for sums between CPU ranks, compiled at start under a lock file: a run killed there would leave the
    # lock behind, and every later one would wait for it without end. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if a.dtype == "float16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        sys.exit("train.py: --dtype float16: DeepSpeed finds no fp16 on this machine")
    # not its 10 minutes: rank 0 may index many videos, or sample a long one
    deepspeed.init_distributed(timeout=timedelta(hours=12))
    rank, world = dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        return rank, world, device
    if family == "toy":
        threads = 1  # networks this small lose more to threads that wait for each other than they gain
    else:
        threads = max(1, min(torch.get_num_threads(), os.cpu_count() // world))  # ranks share the cores
    torch.set_num_threads(threads)
    return rank, world, torch.device("cpu")


def watch_ranks(rank, world, limit):
    """Start a thread that ends this process with one line when another rank was silent for `limit` seconds: if its node
    is gone, collectives go on waiting. -> a function that ends the watch, to be called by all ranks together."""
    if world == 1:
        return lambda: None
    # a connection of its own to the store at which the ranks met: one that waits there would hold up this one
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                          wait_for_workers=False, timeout=timedelta(seconds=limit))
    over = threading.Event()
    keys = [f"alive/{r}" for r in range(world)]
    store.set(keys[rank], "0")
    dist.barrier()

    def end(who):
        print(f"train.py: rank {rank}: nothing was heard of {who} for {limit:.0f} seconds. The same command goes on "
              "from the newest state", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may wait in a collective that never ends

    def watch():
        last, heard, beats = [None] * world, [time.monotonic()] * world, 0
        while not over.wait(limit / 10):
            beats += 1
            try:
                store.set(keys[rank], str(beats))
                found = store.multi_get(keys)
            except RuntimeError:
                end("the store at rank 0")
            now = time.monotonic()
            for r in range(world):
                if found[r] != last[r]:
                    last[r], heard[r] = found[r], now
                elif now - heard[r] > limit:
                    end(f"rank {r}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def finish():
        dist.barrier()
        over.set()
        thread.join()
        dist.barrier()  # the store goes with rank 0: nobody asks it any more

    return finish


def open_clips(a, rank, native):
    """-> (clips of --frames, what to train on: these or, with --short-clips, a mixture)"""
    options = dict(size=a.size, stride=a.stride, fps=a.fps, seed=a.seed, motion=a.motion, skip_static=a.skip_static,
                   log=os.path.join(a.out, "data.log"))
    if rank == 0:  # it builds the index, the others then find it
        dataset = data.open_dataset(a.data, a.frames, **options)
    dist.barrier()
    if rank > 0:
        dataset = data.open_dataset(a.data, a.frames, **options)
    if not a.short_clips:
        return dataset, dataset
    return dataset, TwoLengths(dataset, data.open_dataset(a.data, native, **options), a.short_clips, a.seed, a.batch)


def load_model(a, dataset, native):
    """SVD in fp32, extended to --frames; VAE and CLIP if clips are encoded on the fly. Exits if the data don't fit."""
    svd = exsvd.load(a.model, a.extension, parts=("unet", "vae", "clip") if dataset.pixels else ("unet",))
    set_native(svd.unet, a.native)
    if a.frames > (svd.unet.max_frames or native):
        exsvd.extend(svd.unet, a.frames)
    svd.unet.checkpointing = None if a.checkpoint == "none" else a.checkpoint
    if not dataset.pixels and a.train == "all":
        sys.exit(f"train.py: {a.data} holds CLIP embeddings, but to train CLIP needs the videos themselves")
    if not dataset.pixels and dataset.settings["ctx"] != svd.unet.config.context_dim:
        sys.exit(f"train.py: {a.data} holds CLIP embeddings of {dataset.settings['ctx']} numbers, this model takes "
                 f"{svd.unet.config.context_dim}: encode again with --model {a.model}")
    return svd


def million(parameters):
    return f"{sum(p.numel() for p in parameters) / 1e6:,.1f} M"


def readable(n):
    return f"{n / 1e9:.1f} GB" if n > 1e9 else f"{n / 1e6:.1f} MB"


def say_needs(a, module, shards, sizes, say):
    """What the run will hold in memory and on the disk, with a warning if the disk is too small for it."""
    weights = 2 * sum(p.numel() for p in module.parameters())
    shared = 20 * shards.elements / shards.world  # masters, two moments, average, gradients: 4 bytes each
    state, small = sizes
    states, files = a.keep + 1, a.keep + 1 + a.steps // a.keep_every  # the oldest goes when the newest is there
    place = " (these in CPU memory)" if a.offload else ""
    say(f"each rank holds {readable(weights)} of weights and {readable(shared)} of masters, moments, average and "
        f"gradients{place}, beside activations; the disk up to {states} states of {readable(state)} and {files} "
        f"weights of {readable(small)}")
    need, free = states * state + files * small, shutil.disk_usage(a.out).free
    for folder, _, names in os.walk(a.out):  # what is there already is among them
        for name in names:
            with suppress(OSError):  # a file that is being replaced
                need -= os.path.getsize(os.path.join(folder, name))
    if need > free:
        say(f"warning: that takes {readable(need)} more in {a.out}, which has room for {readable(free)}: lower --keep, "
            "raise --keep-every, or make room", file=sys.stderr)


def resume(a, config, shards, settings, data_id, say):
    """Go on from the newest state, if there is one. -> step, videos seen, sums of losses since log.csv's last row"""
    step = videos = 0
    sums = torch.zeros(2, len(SIGMA_BINS) + 2, dtype=torch.float64, device=shards.device)  # see add_losses()
    folder, info = newest_state(a, shards.rank, shards.world, say)
    if folder:
        other = [f"{key} {value} (now {settings.get(key)})" for key, value in info["settings"].items()
                 if settings.get(key) != value]
        if other:
            sys.exit(f"train.py: {folder} was made with {', '.join(other)}: use the same settings, or another --out "
                     "with --extension to start from its weights")
        shards.load([os.path.join(folder, name) for name in info["files"]], info["shards"])
        step, videos = info["step"], info["videos"]
        if shards.rank == 0:
            sums += torch.tensor(info["sums"], device=shards.device)
        say(f"resumed from {folder}: step {step}, {videos} videos seen")
        if info["data"] != data_id:
            say(f"warning: {a.data} holds other clips than when that was saved; from here on they come in another "
                "order", file=sys.stderr)
    elif shards.rank == 0:
        keep_sources(a, config)
    dist.barrier()
    if not os.path.exists(os.path.join(a.out, "run.json")):
        sys.exit(f"train.py: rank {shards.rank} does not see what rank 0 wrote to {a.out}: put --out on a file system "
                 "that all nodes share")
    return step, videos, sums


def main(argv=None):
    a, family = parse(argv)
    config = deepspeed_config(a)

    # Ranks
    rank, world, device = join_ranks(a, family)
    master = rank == 0
    end_watch = watch_ranks(rank, world, a.lost_after)

    def say(*words, **options):
        if master:
            print(*words, **options, flush=True)

    def leave(reason):  # on all ranks
        sys.exit(f"train.py: {reason}" if master else 1)

    # Data
    os.makedirs(a.out, exist_ok=True)
    native = a.native or exsvd.open_model(a.model)[1][0].native_frames
    dataset, clips = open_clips(a, rank, native)
    say(dataset.describe() + (f"; {a.short_clips:.0%} of the passes on clips of {native}" if a.short_clips else ""))
    data_id = fingerprint(dataset.usable)
    if len(set(of_all_ranks(data_id))) > 1:
        sys.exit(f"train.py: the ranks find different clips in {a.data}: let no file change while a run starts")

    # What trains
    svd = load_model(a, dataset, native)
    vae, clip = svd.vae, svd.clip
    settings = fixed_settings(a, fingerprint(svd.unet.conv_out.weight.detach().numpy().tobytes()))
    module = Loss(svd.unet, clip, a.loss)
    chosen, trained = choose(module, a.train)
    clip_trains = any(name.startswith("clip.") for name in chosen)
    if not clip_trains:
        module.clip = None
    idle = million(p for name, p in chosen.items() if name not in trained)
    say(f"UNet of {million(svd.unet.parameters())} parameters; trained: {million(chosen.values())} in {len(chosen)} "
        f"tensors, {idle} of them idle while the context is one token" + (", CLIP among them" if clip_trains else ""))
    # the fp32 values of what trains (for the masters) and of what is saved with it; then half precision for all
    start = {name: p.detach().clone() for name, p in trained.items()}
    untrained = {name: p.detach().clone() for name, p in module.named_parameters()
                 if ".attn.temporal." in name and name not in trained}
    module.to(getattr(torch, a.dtype)).train()
    if dataset.pixels:  # frozen: fp32 targets from the VAE; CLIP, which is large, in half precision on a GPU
        vae.requires_grad_(False).to(device)
        if not clip_trains:
            clip.requires_grad_(False).to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    del svd

    # Engine
    bucket = min(BUCKET, sum(p.numel() for p in trained.values()))  # all of it is allocated, however little trains
    config["zero_optimization"].setdefault("reduce_bucket_size", bucket)
    import deepspeed
    engine, *_ = deepspeed.initialize(model=module, model_parameters=parameter_groups(trained), config=config)
    if a.dtype == "float16":  # its own exception at the smallest scale would name no clips
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    shards = Shards(engine, trained, a.ema)
    shards.start_from(start)
    del start

    # Where the run goes on
    step, videos, sums = resume(a, config, shards, settings, data_id, say)
    loader = iter(torch.utils.data.DataLoader(
        clips, batch_sampler=videos_of(rank, world, a.batch, videos), num_workers=a.workers,
        worker_init_fn=ignore_signals, pin_memory=device.type == "cuda"))
    sizes = bytes_to_save(a, shards)
    say_needs(a, module, shards, sizes, say)
    log = Log(a, step) if master else None
    stop = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: stop.append(number))
    say(f"{world} ranks, rank 0 is process {os.getpid()}: send SIGTERM to it, or any other rank, to save and leave")

    # Samples and weights along the way
    def networks():  # for samples: kept only where training needs them
        if dataset.pixels:
            return vae, module.clip if clip_trains else clip
        loaded = exsvd.load(a.model, parts=("vae", "clip"), device=device)
        return loaded.vae, loaded.clip

    if a.sample_every and master:
        sampled_from = sample_start(a, family, dataset, networks)

    def monitor(values):
        try:
            # over the videos seen, as what DeepSpeed itself writes there: W&B drops values whose number goes back
            engine.monitor.write_events([(name, value, videos) for name, value in values.items()])
        except OSError as e:
            say(f"warning: step {step} is missing in DeepSpeed's monitors ({e})", file=sys.stderr)

    def take_sample():
        average = shards.gather_average()
        if master:
            try:
                with weights_replaced(module, average):
                    frames = sample_video(a, family, module.unet, *networks(), sampled_from, device)
                measured, line = save_sample(a, family, step, frames, sampled_from)
            except (OSError, data.MediaError, exsvd.WeightsError, RuntimeError) as e:  # a full disk or memory, for one
                if isinstance(e, RuntimeError) and not sample.is_out_of_memory(e):
                    raise
                measured, line = {}, f"warning: there is no sample of step {step} ({e})"  # no reason to end a run
            monitor({f"sample/{key}": value for key, value in measured.items()})
            say(line)
        dist.barrier()

    def write_weights(average):
        say(f"step {step}: saved {save_weights(a, step, average, module, untrained, settings, family)}")

    # The loop
    if a.sample_every and step == 0:
        if master:  # rows of a run that ended before its first state
            discard(os.path.join(a.out, "progress"))
        take_sample()
    bar = tqdm(total=a.steps, initial=step, desc="training", unit="step", disable=not master)
    bad = []  # names of the clips of each of the last steps that could not be applied
    first = logged = step
    frames, begin = 0, time.perf_counter()
    while step < a.steps:
        # 1. forward and backward, --accumulate times
        if a.warmup:
            for group in engine.optimizer.param_groups:
                group["lr"] = a.lr * min(1, (step + 1) / a.warmup)
        names = []
        for _ in range(a.accumulate):
            item = next(loader)
            names += item["name"]
            x, cond, ctx, ids = inputs(item, vae, clip, clip_trains, device)
            numbers = range(videos + rank * a.batch, videos + (rank + 1) * a.batch)
            sigma, noise, keep = (torch.stack(t).to(device) for t in zip(*(draw(a, n, x.shape[1:]) for n in numbers)))
            loss = engine(x, sigma, noise, cond, ctx, ids, keep)
            engine.backward(loss.mean())
            engine.step()  # reduces gradients; updates on the last of --accumulate calls
            add_losses(sums, loss.detach(), sigma)
            videos += world * a.batch
            frames += world * a.batch * x.shape[1]
        step += 1

        # 2. the average follows steps that were applied. DeepSpeed decides that on all ranks alike
        if engine.was_step_applied():
            shards.update_average()
            bad = []
        elif a.dtype != "float16" or engine.optimizer.loss_scale <= getattr(engine.optimizer.loss_scaler, "min_scale", math.inf):
            bad += [names]  # above its smallest scale fp16 only looks for a scale by overflowing: that is no failure
        if len(bad) == BAD_STEPS:
            names = ", ".join(sum(of_all_ranks(sum(bad, [])), []))
            leave(f"{BAD_STEPS} steps in a row with non-finite gradients, on these clips: {names}")

        # 3. log, sample, save; leave together
        flag = torch.tensor(len(stop), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        leaving = bool(flag) or step == a.steps
        bar.update()
        if step % a.log_every == 0 or step == a.steps:
            total = sum_over_ranks(sums)
            if master:
                seconds = time.perf_counter() - begin
                norm, lr = engine.get_global_grad_norm(), engine.optimizer.param_groups[0]["lr"]
                try:
                    log.row(step, videos, total, norm, lr, seconds / (step - logged), frames / seconds, device)
                except OSError as e:  # a full disk must not end the run
                    say(f"warning: step {step} is missing in log.csv ({e})", file=sys.stderr)
                mean = float(total[0, 0] / total[1, 0])
                monitor({"train/loss": mean, "train/lr": lr})
                bar.set_postfix(loss=f"{mean:.4f}")
                if logged == first:
                    pace = seconds / (step - first)
                    say(f"{pace:.2f} s a step: {timedelta(seconds=round((a.steps - step) * pace))} to go")
            sums.zero_()
            logged, frames, begin = step, 0, time.perf_counter()
        if a.sample_every and (step % a.sample_every == 0 or step == a.steps):
            take_sample()
        if step % a.save_every == 0 or leaving:
            position = {"step": step, "videos": videos, "data": data_id, "sums": sum_over_ranks(sums).tolist()}
            try:
                save(a, shards, position, settings, write_weights, sizes)
                bar.set_description("training")
            except OSError as e:
                bar.set_description("training, LAST SAVE FAILED")
                problem = f"step {step} could not be saved ({e})"
                if leaving:
                    leave(f"{problem}. What was saved before is still there: make room, and the same command goes on")
                say(f"warning: {problem}; tried again every {a.save_every} steps", file=sys.stderr)
        if leaving:
            break
    bar.close()
    end_watch()
    deepspeed.comm.destroy_process_group()


# What collectives raise when another rank is gone: gloo, NCCL, and the store at which ranks meet
LOST_RANK = re.compile(r"Connection (closed|reset) by peer|Broken pipe|gloo.*[Tt]imed out|NCCL|TCPStore", re.DOTALL)

if __name__ == "__main__":
    try:
        main()
    except (exsvd.WeightsError, data.MediaError, SafetensorError, OSError) as e:
        sys.exit(f"train.py: {e}")
    except RuntimeError as e:
        if not LOST_RANK.search(str(e)):
            raise
        print(f"train.py: rank {os.environ['RANK']}: another rank is gone ({str(e).splitlines()[0]}). The same command "
              "goes on from the newest state", file=sys.stderr, flush=True)
        os._exit(1)  # without waiting for it
