r"""Post-tuning, ExVideo section 3.3: only the temporal blocks are trained. DeepSpeed shards what
they need (ZeRO-2), and an exponential moving average (EMA) of them is kept.

    deepspeed train.py                                              # the toy, on synthetic clips
    deepspeed train.py --model svd_xt.safetensors --data videos/    # the paper's recipe, all GPUs
    deepspeed train.py --data my_clips.py                           # your own clips, see data.py
    deepspeed --num_accelerators 2 train.py                         # two ranks, on a CPU too
    deepspeed --hostfile hosts train.py --model ... --data ...      # several nodes, shared --out
    python train.py                                                 # one process, the same code

The recipe is the paper's (section 3.3, abstract, Figure 6): 8 A100 GPUs, 128 frames of 512x512,
40,258 clips, lr 1e-5, batch 1 per GPU, 64,000 steps shown, one week. What it leaves open comes from
SVD's formulation, public training codes or ourselves. Beside it the script released with the paper
(in DiffSynth-Studio):

    choice              here                                    released script, and other sources
    -----------------   -------------------------------------   ------------------------------------
    optimiser           AdamW                                   AdamW
    precision           bf16; fp32 masters, moments and EMA     fp16; VAE and CLIP too
    latent scale        0.18215, SVD's                          0.13025, SDXL's
    clips               anywhere in a video, real frame rate    always its first 128 frames
    resizing            antialiased bicubic                     bilinear
    fps id              the clip's own rate - 1                 29 for every clip
    aug id              the noise on the image                  0 for every clip
    loss                EDM's, (s^2+1)/s^2 |D - x|^2            sqrt(s^2+1)/s |D - 1.01 x|^2
                                                                (--loss exvideo)
    noise levels        ln s ~ N(0.7, 1.6^2), as SVD_Xtend      uniform on 1,000 Karras sigmas
                        and animate-anything                    (--loss exvideo)
    noise on the image  ln a ~ N(-3.0, 0.5^2), SVD_Xtend's      none
    image dropout       0.1, latents and CLIP together (ours)   none
    clipping            gradient norm 1.0 (ours)                none
    motion bucket       0..127 by deviation over time           the same
    EMA                 0.9999 a step, warm-up (1+n)/(10+n)     0.9 per epoch file, averaged later:
                        (ours)                                  about 0.9999 a step
    weight decay        0.01 on matrices and convolutions       0.01 on everything

A run folder (--out) holds
    state-<step>.safetensors    what resuming needs: the last two, 12.9 GB each for SVD-XT
    exvideo-<step>.safetensors  the EMA in float16, for --extension; at 128 frames the official code
                                reads it too. Where more is trained: a whole model, model-<step>
    log.csv                     losses (by noise level, of --val), gradient norm, lr, time, memory
    progress.png                a row per sample, frames 0, T/8, ... T-1; sample-<step>.mp4
    run.json                    of each start: time, settings, versions, commit, ranks

The same command resumes from the newest state. What a step draws (clip, noise level, noise,
dropout) depends on --seed and the number of the video alone, so a run that was killed resumes
bit-identically (on CUDA: with --deterministic). Another number of ranks can go on too: each takes
its part of the state, and no video is seen twice. When a save fails, the run warns and goes on.

To stop early and lose nothing, press Ctrl-C once, or send SIGTERM or SIGUSR1 to one training
process (rank 0 prints its id) or to all: the ranks agree, save and leave. `deepspeed` passes only
Ctrl-C on, torchrun SIGTERM too; both kill 30 s later. Several nodes without a hostfile:

    torchrun --nnodes 2 --node_rank K --nproc_per_node 8 --master_addr HOST --master_port 29500 \
        train.py --model ... --data ... --out /shared/run
"""

import argparse
import fcntl
import inspect
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
import exsvd
import sample
from data import frame_size  # by its name alone, since `data` is also a setting
from sample import integer, number, setting

HERE = os.path.dirname(os.path.abspath(__file__))
TOY = os.path.join(HERE, "assets", "toy.safetensors")
TOY_CLIPS = os.path.join(HERE, "toy", "world.py")
TOY_IMAGE = os.path.join(HERE, "assets", "img.png")

SIGMA_BINS = (0.7, 2.0, 6.0)  # the loss is logged apart between these: quartiles of EDM's sigmas
BUCKET = 50_000_000           # gradients that DeepSpeed reduces at once, a tenth of its default
STATES_KEPT = 2               # the last ones
MAX_SKIPPED = 50              # steps in a row without an update that end a run; float16 needs some
VAL_CLIPS = 8                 # held-out clips of --val, and the noise levels of their losses
VAL_SIGMAS = (0.2, 1.0, 5.0, 25.0)
VAL_SEED = 1_000_000          # of these clips and their noise, whatever --seed is
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# --------------------------------------------------------------------------------------------------
# Settings, a line each: flags and run.json are made from them, see sample.py.


def bucket(value):
    """A check: exvideo, or a number."""
    return value if value == "exvideo" else number(0)(value)


def pattern(value):
    """A check: temporal, all, or a regular expression."""
    try:
        re.compile(value)
    except re.error as e:
        raise argparse.ArgumentTypeError(f"{value}: not a valid regular expression ({e})") from e
    return value


# --checkpoint, the fastest first: (UNet.checkpointing, UNet.slice_size, clip maps, slice maps). A
# step keeps at most so many feature maps of the finest level: clip maps of all clips of a pass, and
# slice maps of one slice. activations() turns them into bytes; a test compares these with
# bench/compare.py.
SLICE = exsvd.Slices.size
CHECKPOINTS = {
    "none": (None, SLICE, 670, 0),
    "balanced": ("balanced", 16 * SLICE, 70, 45),  # each slice costs launches and copies
    "balanced-small": ("balanced", 4 * SLICE, 70, 45),
    "memory-large": ("memory", 4 * SLICE, 16, 94),
    "memory": ("memory", SLICE, 16, 94),
}


@dataclass(frozen=True)
class TrainSettings:
    """What shapes a run. The defaults are the paper's; a model's file may hold others."""
    model: str = setting(None, str, "single file or diffusers folder [the toy]")
    extension: list = setting(None, str, "release or own extension, and what was trained over it [none: a new one]",
                              nargs="+")
    data: str = setting(None, str, "folder of videos, .txt/.csv/.json list, encoded latents, or a Python file of clips")
    out: str = setting("runs/exvideo", str, "run folder; a run that is in it is resumed; for the toy runs/toy")
    native: int = setting(None, integer(1), "frames of the base: 14 for svd.safetensors [as its file says, or 25]")
    train: str = setting("temporal", pattern, "temporal: the extension; all: UNet and CLIP; or a regex", in_file=False)
    frames: int = setting(128, integer(1), "frames of a clip; a model that knows fewer is extended")
    size: tuple = setting(((512, 512),), frame_size, "WIDTHxHEIGHT, multiples of 64; of several a video takes the "
                          "nearest in aspect ratio", nargs="+")
    stride: int = setting(1, integer(1), "take every k-th frame of a video")
    fps: float = setting(None, number(1), "take frames at this rate instead of a stride")
    motion: str = setting("exvideo", bucket, "exvideo: the release's buckets, 0..127; or one number for all")
    skip_static: float = setting(0.0, number(0, 1), "leave out shots that change less per frame; 0.002 finds stills")

    steps: int = setting(64000, integer(1), "optimiser steps in all")
    batch: int = setting(1, integer(1), "videos per GPU and pass")
    accumulate: int = setting(1, integer(1), "passes per step; gradients add up in fp32, with --offload in 16 bits")
    lr: float = setting(1e-5, number(0, 1), "learning rate")
    warmup: int = setting(0, integer(0), "steps over which the learning rate rises from 0")
    cooldown: int = setting(0, integer(0), "last steps, over which the learning rate falls to 0")
    weight_decay: float = setting(0.01, number(0), "on matrices and convolutions")
    clip: float = setting(1.0, number(0), "limit of the gradient norm, 0: none")
    ema: float = setting(0.9999, number(0, 1), "decay of the average, after its warm-up")
    loss: str = setting("edm", exsvd.LOSSES, "noise levels and weighting")
    sigma_scale: float = setting(1.0, number(1e-3), "factor on the drawn noise levels; at high ones motion is decided")
    drop: float = setting(0.1, number(0, 1), "share of videos that lose their image, so that guidance keeps working")
    seed: int = setting(0, integer(0, 2**32 - 1), "of all random numbers")

    dtype: str = setting(None, sample.DTYPES, "of the weights; float16 scales the loss [by device: exsvd.best_dtype]")
    offload: bool = setting(False, bool, "optimiser, masters, moments and EMA in CPU memory")
    deepspeed_config: str = setting(None, str, "JSON, merged over our settings", flag="--deepspeed_config")
    checkpoint: str = setting("auto", ["auto", *CHECKPOINTS], "activations to keep for the way back; auto: what fits")
    workers: int = setting(2, integer(0), "processes per rank that read clips")
    timeout: float = setting(30.0, number(0.1), "minutes after which ranks give up waiting for another")
    deterministic: bool = setting(False, bool, "bit-identical on CUDA too, slower")

    save_every: int = setting(500, integer(1), "steps between states")
    weights_every: int = setting(5000, integer(1), "steps between weight files")
    log_every: int = setting(10, integer(1), "steps per row of log.csv")
    val: str = setting(None, str, "held-out clips, as --data: loss of the EMA at fixed noise [none; the toy has some]")
    val_every: int = setting(500, integer(1), "steps between validations, of which the first is at step 0")
    sample_every: int = setting(0, integer(0), "steps between samples of the EMA, from one image and noise; 0: never")
    sample_image: str = setting(None, str, "sample from this image [the first clip's first frame]")


# These may differ when a run is resumed. Everything else must be as it was.
MAY_CHANGE = {
    "model", "extension", "data", "out", "steps", "lr", "warmup", "cooldown", "weight_decay",
    "clip", "accumulate", "deepspeed_config", "checkpoint", "workers", "timeout", "deterministic",
    "save_every", "weights_every", "log_every", "val", "val_every", "sample_every", "sample_image"}


def parse(argv=None):
    """-> TrainSettings: flags, then the defaults in the model's file, then those of the class."""
    p = argparse.ArgumentParser(
        description="Post-tune SVD for long videos. In [brackets]: the default; a model's file may "
                    "hold others.")
    sample.add_flags(p, TrainSettings)
    p.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    given = vars(p.parse_args(argv))
    del given["local_rank"]

    model = TOY if os.path.abspath(given.get("model", TOY)) == TOY else given["model"]
    meta = exsvd.open_model(model)[0]["unet"].meta
    in_file = sample.settings_in_file(TrainSettings, meta, "train", model)
    toy = {}
    if model == TOY:
        toy = {"out": "runs/toy", "sample_image": TOY_IMAGE}
        if "data" not in given:
            toy |= {"data": TOY_CLIPS, "val": TOY_CLIPS, "val_every": 50}
    s = TrainSettings(**(toy | in_file | given | {"model": model}))
    if s.data is None:
        p.error("--data is needed with --model: a folder of videos, for example")
    if len(s.size) > 1 and s.batch > 1:
        p.error("--batch must be 1 with several --size: use --accumulate")
    state = newest_state(saved_states(s.out))
    if state:  # keep what was chosen for the machine on which the run began
        s = replace(s, **{name: value for name, value in state.meta["chosen"].items()
                          if name not in given})
    if s.dtype is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        s = replace(s, dtype=str(exsvd.best_dtype(device, training=True)).removeprefix("torch."))
    if s.sample_image:
        data.read_image(s.sample_image)  # fail now, not at the first sample
    return s


# --------------------------------------------------------------------------------------------------
# Ranks


def join_ranks(s):
    """Take the run folder and find the other ranks; without a launcher there are none. -> this
    rank's device"""
    alone = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0)
    for key, value in alone.items():  # port 0: a free one
        os.environ.setdefault(key, str(value))
    if os.environ["RANK"] == "0":
        lock_folder(s.out)
    if s.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    import deepspeed  # here, so that --help and wrong arguments answer at once
    deepspeed.utils.logger.setLevel("WARNING")
    # An optional op for sums between CPU ranks is compiled at start under a lock file. A run killed
    # there would leave the lock, and later ones would wait for it without end. gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timedelta(minutes=s.timeout))
    if "OMP_NUM_THREADS" not in os.environ:  # else the user or torchrun has said how many
        local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1
        share = max(1, torch.get_num_threads() // int(local))  # of the cores of this machine
        torch.set_num_threads(min(share, sample.idle_cores()))
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def lock_folder(out):
    """Keep other runs out of a run folder until this process ends, however it ends."""
    os.makedirs(out, exist_ok=True)
    lock = os.open(os.path.join(out, "lock"), os.O_WRONLY | os.O_CREAT, 0o666)  # stays open
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"train.py: another run writes to {out}: stop it, or give another --out")
    except OSError:  # the file system has no locks
        pass
    for unfinished in Path(out).glob("*.safetensors*.tmp"):  # of a run that was killed
        unfinished.unlink()


def say(text):
    if dist.get_rank() == 0:
        print(text, flush=True)


def of_all_ranks(value):
    """A list with the value of each rank. Values are pickled: keep them small."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(f):
    """Call f() on rank 0 while the others wait. If it raises OSError, all ranks do. Every rank must
    call it."""
    problem = None
    if dist.get_rank() == 0:
        try:
            f()
        except OSError as e:
            problem = e
    problem = of_all_ranks(problem)[0]
    if problem:
        raise problem


def sum_over_ranks(sums):
    return sum(of_all_ranks(sums.cpu()))


# --------------------------------------------------------------------------------------------------
# What trains


class PostTuning(nn.Module):
    """What DeepSpeed wraps: the UNet and the loss; and CLIP, where it is trained too."""

    def __init__(self, unet, clip=None, loss=None):
        super().__init__()
        self.unet, self.clip, self.loss = unet, clip, loss

    def forward(self, x, sigma, noise, cond, ctx, ids, keep_image):
        """x, noise (B,T,4,h,w), cond (B,1,4,h,w), ctx (B,1,D) or CLIP's input (B,3,224,224),
        keep_image (B,): 0 drops the image, 1 keeps it -> the loss of each video (B,)"""
        if self.clip is not None:
            ctx = self.clip(ctx)[:, None]
        cond = cond * keep_image.view(-1, 1, 1, 1, 1)
        ctx = ctx * keep_image.view(-1, 1, 1)
        return exsvd.training_loss(self.unet, self.loss, x, sigma, noise, cond, ctx, ids)


def in_extension(name):
    """Of names such as unet.down.1.attn.temporal.attn1.to_q.weight"""
    return name.startswith("unet.") and exsvd.is_extension_parameter(name.removeprefix("unet."))


def is_trained(s, name):
    """Whether --train names a parameter. What has no effect (exsvd.WITHOUT_EFFECT) gets no
    gradient, and training would only decay it."""
    if exsvd.WITHOUT_EFFECT.search(name):
        return False
    if s.train == "temporal":
        return in_extension(name)
    return s.train == "all" or re.search(s.train, name) is not None


def trains(network):
    return network is not None and any(p.requires_grad for p in network.parameters())


def load_networks(s, pixels, device):
    """The networks. The UNet is extended if --frames is more than it knows, or if only parameters
    of an extension train and it has none. What trains has requires_grad. It is in fp32, as are the
    extension and the VAE; the rest is in --dtype, and a CLIP that is not trained in the dtype of
    encoding. VAE and CLIP are None if clips are encoded. Exits if nothing trains."""
    def keep_float32(name):
        return is_trained(s, name) or in_extension(name) or name.startswith(("vae.", "clip."))

    def parameters():
        return dict(PostTuning(svd.unet, svd.clip).named_parameters())

    if s.train == "all" and not pixels:
        sys.exit(f"train.py: {s.data} holds CLIP embeddings, but training CLIP needs the videos")
    torch.manual_seed(s.seed)  # of what a modified extend() draws
    parts = ("unet", "vae", "clip") if pixels else ("unet",)
    dtype = getattr(torch, s.dtype)
    svd = exsvd.load(s.model, s.extension, dtype, parts=parts, keep_float32=keep_float32)
    if s.native:
        svd.unet.config = replace(svd.unet.config, native_frames=s.native)
    known = svd.unet.max_frames or svd.unet.config.native_frames
    needs_extension = s.train == "temporal" or not any(is_trained(s, name) for name in parameters())
    if s.frames > known or (needs_extension and svd.unet.max_frames is None):
        exsvd.extend(svd.unet, max(s.frames, known))
    for name, p in parameters().items():
        p.requires_grad_(is_trained(s, name))
    if not trains(svd.unet) and not trains(svd.clip):
        sys.exit(f"train.py: --train {s.train} names no parameter; names look like "
                 "unet.down.1.attn.temporal.attn1.to_q.weight")
    if pixels:
        svd.vae.to(device)
        svd.clip.to(device)
        if not trains(svd.clip):
            svd.clip.to(data.encoding_on(device)[0])  # as for encoded latents
    return svd


def activations(checkpoint, s, unet):
    """About the most bytes that a step of the UNet keeps with this --checkpoint."""
    _, slice_size, clip_maps, slice_maps = CHECKPOINTS[checkpoint]
    cells = max(W * H for W, H in s.size) // 64
    clips = s.batch * s.frames * cells * unet.config.channels[0]
    return unet.conv_out.weight.itemsize * (clip_maps * clips + slice_maps * min(slice_size, clips))


def choose_checkpoint(s, unet, elements, device):
    """-> the fastest of CHECKPOINTS that fits beside weights and optimiser on the GPUs of all
    ranks, and a line that says so. elements: how many numbers are trained, and have gradients."""
    if device.type != "cuda":
        return "none", "nothing is computed again on a CPU"
    free = sample.USABLE * min(of_all_ranks(sample.free_bytes(device)))
    fp32_bytes = 0 if s.offload else 4 / dist.get_world_size()  # of the sum of a gradient, sharded
    gradients = elements * (unet.conv_out.weight.itemsize + fp32_bytes)
    need = {name: activations(name, s, unet) + gradients for name in CHECKPOINTS}
    name = next((name for name in CHECKPOINTS if need[name] <= free), "memory")
    needs, there = (f"{n / 1e9:.1f} GB" for n in (need[name], free))
    return name, f"a step takes about {needs} of the {there} that are free"


# --------------------------------------------------------------------------------------------------
# The optimiser and DeepSpeed


def parameter_groups(trained, s):
    """Groups for the optimiser: what decays, and what does not. Decay pulls towards 0. That is
    neutral for matrices and convolutions, but not for norms, biases, tables of positions and the
    identity convolution."""
    decaying, exempt = [], []
    for name, p in trained.items():
        spared = p.ndim < 2 or re.search("frame_table|frame_conv|positional_embedding", name)
        (exempt if spared else decaying).append(p)
    groups = [{"params": decaying, "weight_decay": s.weight_decay},
              {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(groups, s):
    """The optimiser that DeepSpeed shards: any of torch's interface that works element by element.
    States hold what it keeps of each parameter, not what it keeps in its groups. With --offload it
    must be one of DeepSpeed's for the CPU, which are compiled on first use.

    ZeRO-2 makes a flat tensor of each group, so torch.optim.Muon, which needs matrices, cannot
    work. MuonWithAuxAdam of deepspeed.runtime.zero.muon.muon_optimizer does, with --clip 0."""
    options = dict(lr=s.lr, betas=(0.9, 0.999), eps=1e-8)
    if s.offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        return DeepSpeedCPUAdam(groups, **options)
    return torch.optim.AdamW(groups, **options)


def deepspeed_config(s):
    """DeepSpeed's settings: ours, and those of --deepspeed_config merged over them. Exits with a
    line if DeepSpeed or this file cannot use them."""
    config = {
        "train_micro_batch_size_per_gpu": s.batch,
        "gradient_accumulation_steps": s.accumulate,
        "gradient_clipping": s.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 2, "round_robin_gradients": False, "reduce_bucket_size": BUCKET},
        "bf16": {"enabled": s.dtype == "bfloat16"},
        "fp16": {"enabled": s.dtype == "float16", "min_loss_scale": 1},
        "scheduler": {},
    }
    if s.offload:
        config["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu", "pin_memory": torch.cuda.is_available()}
    else:  # with --offload DeepSpeed would keep these sums on the GPU, 4 bytes per parameter
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if s.deepspeed_config:
        try:
            merge(config, json.loads(Path(s.deepspeed_config).read_text()))
            check_config(s, config)
        except Exception as e:  # DeepSpeed raises many kinds; pydantic's have several lines
            why = " ".join(str(e).split(" [type=")[0].split())
            sys.exit(f"train.py: --deepspeed_config {s.deepspeed_config}: {why}")
    return config


SET_BY_FLAGS = {  # or, of the last two, by Shards, which is written for ZeRO-2
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16.enabled", "fp16.enabled",
    "zero_optimization.stage", "zero_optimization.round_robin_gradients"}


def merge(ours, theirs, path=""):
    """Put their settings in place of ours. "auto" means ours, or else DeepSpeed's default."""
    if not isinstance(theirs, dict):
        raise ValueError(f"{path or 'the file'} must be an object in braces")
    for key, value in theirs.items():
        name = f"{path}.{key}" if path else key
        if value == "auto":
            continue
        if isinstance(value, dict) or isinstance(ours.get(key), dict):
            merge(ours.setdefault(key, {}), value, name)
        elif name in SET_BY_FLAGS and value != ours[key]:
            raise ValueError(f"{name} must be {ours[key]}: see --batch, --accumulate, --dtype")
        else:
            ours[key] = value


def check_config(s, config):
    """Raises an error of any kind for what DeepSpeed does not know and what cannot work here."""
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DeepSpeedConfig
    known = set()

    class Config(dict):  # notes each key that DeepSpeed asks for: it ignores unknown ones
        def get(self, key, default=None):
            known.add(key)
            return super().get(key, default)
        __getitem__ = get

    if "optimizer" in config:
        raise ValueError("take its optimizer out: make_optimizer() in train.py makes the optimiser")
    DeepSpeedConfig(Config(config))
    if not known.issuperset(config):
        raise ValueError(f"DeepSpeed does not know {', '.join(config.keys() - known)}")
    if config["scheduler"]:
        if s.warmup or s.cooldown:
            raise ValueError("its scheduler and --warmup or --cooldown would both set the rate: "
                             "give --warmup 0 --cooldown 0, or take it out")
        scheduler = getattr(lr_schedules, config["scheduler"]["type"])
        params = config["scheduler"].setdefault("params", {})  # a list has an entry per group
        theirs = inspect.signature(scheduler).parameters
        for key, ours in {"total_num_steps": s.steps, "warmup_max_lr": s.lr}.items():
            if key in theirs and theirs[key].default is not None:  # None means the groups' rates
                params.setdefault(key, ours)


class Shards:
    """The part of the trained parameters that a rank keeps in fp32: DeepSpeed's master weights and
    what its optimiser keeps, and our moving average (EMA) of the masters, sharded alike.

    The one place that knows DeepSpeed's insides. ZeRO-2 makes a flat tensor of each parameter group
    and cuts it into equal parts, one per rank. single_partition_of_fp32_groups has the fp32 master
    of our part, and p._hp_mapping where parameter p lies in it, None if nothing of p does. This is
    no documented API, hence the pinned minor version.
    """
    @torch.no_grad()
    def __init__(self, engine, decay, start):
        """start: {name: fp32 tensor} of all that trains, since DeepSpeed made its masters from
        copies in half precision, and of the rest of the extension, which is saved with it."""
        self.engine, self.zero, self.decay = engine, engine.optimizer, decay
        self.masters = self.zero.single_partition_of_fp32_groups
        assert all(master.dtype == torch.float32 for master in self.masters)
        self.updates = 0  # of the average
        # {name: (group, where in our part of it, where in the flattened parameter)}
        self.places = {}
        # and {name: shape}, which must be those of a state
        self.layout = {"optimizer": type(self.zero.optimizer).__name__}
        name_of = {id(p): name for name, p in engine.module.named_parameters()}
        for i, group in enumerate(self.zero.bit16_groups):
            for p in group:
                name, part, piece = name_of[id(p)], slice(0), slice(0)
                if p._hp_mapping:
                    part, piece = (slice(at.start, at.start + at.numel) for at in (
                        p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address))
                self.masters[i].data[part] = start[name].flatten()[piece].to(self.masters[i])
                self.places[name], self.layout[name] = (i, part, piece), list(p.shape)
        self.average = [m.detach().clone() for m in self.masters]
        self.rest_of_extension = {name: t for name, t in start.items() if name not in self.places}

    @torch.no_grad()
    def update_average(self):
        """After a step that was applied. At decay d the half-life is ln 2 / (1 - d) steps: 6,931 at
        0.9999."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [m.detach() for m in self.masters], 1 - decay)
        self.updates += 1

    @contextmanager
    def averaged(self):
        """The model with the average in place of its weights, in evaluation mode; then as it was,
        bit for bit. Takes no memory. Every rank must enter and leave."""
        self._exchange()
        self.engine.module.eval()
        yield  # an error ends the run: the ranks do not meet again, so nothing is put back
        self.engine.module.train()
        self._exchange()

    def _exchange(self):
        for i, master in enumerate(self.masters):
            master.data, self.average[i] = self.average[i], master.data
        self.zero.update_lp_params()  # the model's weights, from the masters

    def kept(self):
        """What is kept of each group: a list of {key: a flat tensor, or a number such as the
        optimiser's count of steps}"""
        return [{"master": master.data, "average": average} | self.zero.optimizer.state[master]
                for master, average in zip(self.masters, self.average)]

    def gather(self, key):
        """What all ranks keep under a key such as "average", put together: {name of a parameter:
        fp32 tensor on the CPU}, {} except on rank 0. Every rank must call it."""
        whole, kept = {}, self.kept()
        for name, (i, part, piece) in self.places.items():
            flat = kept[i].get(key)
            if flat is None:  # optimisers may keep other things of another group
                continue
            assert flat.shape == self.masters[i].shape, f"can't save {key}"
            t = torch.zeros(self.layout[name], device=self.engine.device)
            t.view(-1)[piece] = flat[part].to(t.device)
            dist.reduce(t, 0)  # each element is of one rank, and 0 on the others
            if dist.get_rank() == 0:
                whole[name] = t.cpu()
        return whole

    def state(self):
        """What resuming needs: {"<parameter>.<key>": fp32 tensor}, which is {} except on rank 0,
        and {name: value} for JSON. Every rank must call it. Rank 0 holds all ranks' tensors in CPU
        memory while it writes them: with AdamW 16 bytes per number that is trained, 12.9 GB for
        SVD-XT."""
        numbers, keys = [], set()
        for kept in self.kept():
            numbers.append({key: torch.as_tensor(value).item() for key, value in kept.items()
                            if torch.as_tensor(value).ndim == 0})
            keys |= kept.keys() - numbers[-1].keys()
        tensors = {f"{name}.{key}": t
                   for key in sorted(keys) for name, t in self.gather(key).items()}
        scheduler, scaler = self.engine.lr_scheduler, vars(self.zero.loss_scaler)
        return tensors, {
            "layout": self.layout,
            "numbers": numbers,
            "updates": self.updates,
            "loss_scaler": {k: v for k, v in scaler.items() if type(v) in (bool, int, float)},
            "scheduler": scheduler.state_dict() if scheduler else None,
        }

    @torch.no_grad()
    def load(self, tensors):
        """Go on from a state, an exsvd.Tensors, of any number of ranks."""
        saved, state = tensors.meta, self.zero.optimizer.state
        for master, numbers in zip(self.masters, saved["numbers"], strict=True):
            for key, value in numbers.items():
                state[master][key] = torch.tensor(value) if isinstance(value, float) else value
        for full_name in tensors.file.keys():
            name, key = full_name.rsplit(".", 1)
            i, part, piece = self.places[name]
            if key not in self.kept()[i]:  # the optimiser has not made it yet
                state[self.masters[i]][key] = torch.zeros_like(self.masters[i].data)
            flat = self.kept()[i][key]  # shared with the optimiser
            flat[part] = tensors.file.get_tensor(full_name).flatten()[piece]  # mapped, read in part
        self.updates = saved["updates"]
        vars(self.zero.loss_scaler).update(saved["loss_scaler"])
        scheduler = self.engine.lr_scheduler
        if scheduler and saved["scheduler"]:
            scheduler.load_state_dict(saved["scheduler"])
            scheduler.step(scheduler.last_batch_iteration)  # sets the rates of the groups anew
        self.zero.update_lp_params()  # the model's weights, from the masters


def start_engine(s, svd, config, device):
    """-> Shards, and the settings, in which --checkpoint is chosen"""
    import deepspeed
    module = PostTuning(svd.unet, svd.clip if trains(svd.clip) else None, exsvd.LOSSES[s.loss])
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    start = {name: p.detach() for name, p in module.named_parameters()
             if name in trained or in_extension(name)}  # fp32; the module's are now made --dtype
    module.to(getattr(torch, s.dtype)).train()
    zero, elements = config["zero_optimization"], sum(p.numel() for p in trained.values())
    zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], elements)  # all of it is allocated
    optimizer = make_optimizer(parameter_groups(trained, s), s)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if s.dtype == "float16":  # or DeepSpeed raises before MAX_SKIPPED steps
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    shards = Shards(engine, s.ema, start)
    why = "as given"
    if s.checkpoint == "auto":
        name, why = choose_checkpoint(s, svd.unet, elements, device)
        s = replace(s, checkpoint=name)
    svd.unet.checkpointing, svd.unet.slice_size = CHECKPOINTS[s.checkpoint][:2]
    whole = sum(p.numel() for p in svd.unet.parameters())
    say(f"UNet of {whole:,} parameters; {elements:,} are trained in {s.dtype}, "
        f"{dist.get_world_size()} ranks on {device.type}")
    say(f"--checkpoint {s.checkpoint}: {why}")
    if svd.extension == {}:
        say(f"warning: {s.extension[-1]} has none of our metadata. If it is ExVideo's release, it "
            "was tuned on latents scaled by 0.13025, and training here moves it to 0.18215")
    return shards, s


# --------------------------------------------------------------------------------------------------
# States


def saved_states(out):
    """Paths in order of steps."""
    return sorted(map(str, Path(out).glob("state-*.safetensors")))


def save_state(out, shards, about):
    """Write state-<step>.safetensors, and remove all but the last states. Every rank must call it.
    Raises OSError on all alike. about: {name: value}, for its metadata"""
    path = os.path.join(out, f"state-{about['step']:08d}.safetensors")
    tensors, meta = shards.state()
    meta |= about | {"threads": of_all_ranks(torch.get_num_threads())}

    def write():
        exsvd.save(path, tensors, meta)
        for old in saved_states(out)[:-STATES_KEPT]:
            os.remove(old)

    on_rank_0(write)


def newest_state(paths):
    """-> the last of these states, an exsvd.Tensors, or None. Exits with a line if it cannot be
    read."""
    if not paths:
        return None
    try:
        return exsvd.Tensors(paths[-1])
    except exsvd.WeightsError as e:
        before = f"go on from {paths[-2]}" if paths[1:] else "begin anew"
        sys.exit(f"train.py: {paths[-1]} cannot be read ({e}): remove it to {before}")


def must_match(s, svd):
    """What a resumed run must have too: settings, and checksums of weights that are not trained."""
    same = {key: value for key, value in asdict(s).items() if key not in MAY_CHANGE}
    same |= {"architecture": exsvd.ARCHITECTURE, "ids": svd.unet.config.ids}
    for part in ("unet", "vae", "clip"):
        network, checksum = getattr(svd, part), 0
        for p in network.parameters() if network else ():
            if not p.requires_grad:
                checksum = zlib.crc32(p.cpu().flatten().view(torch.uint8).numpy(), checksum)
        same[f"frozen weights of {part}"] = checksum
    return json.loads(json.dumps(same))  # as it will be read again: tuples become lists


def resume(s, shards, made_with):
    """Go on from the newest state, if there is one. -> step, videos seen, sums of losses since the
    last row of log.csv, see add_losses(). made_with: what states of this run say, to compare"""
    engine = shards.engine
    sums = torch.zeros(2, len(SIGMA_BINS) + 2, dtype=torch.float64, device=engine.device)
    state = newest_state(of_all_ranks(saved_states(s.out))[0])  # others may see a shared disk late
    if state is None:
        return 0, 0, sums
    info, settings, layout = state.meta, made_with["settings"], state.meta["layout"]
    changed = [f"{key} {value} (now {settings[key]})" for key, value in info["settings"].items()
               if settings.get(key, value) != value]  # latents have no VAE
    changed += [f"{key} {layout.get(key)} (now {shards.layout.get(key)})"
                for key in layout | shards.layout if layout.get(key) != shards.layout.get(key)][:1]
    if changed:
        sys.exit(f"train.py: {state.path} was made with {', '.join(changed)}: use what it was made "
                 "with, or another --out (and --extension to start from its weights)")
    shards.load(state)
    rank, step, videos = dist.get_rank(), info["step"], info["videos"]
    if len(info["threads"]) == dist.get_world_size() and engine.device.type == "cpu":
        torch.set_num_threads(info["threads"][rank])  # their number changes the last bits
    engine.global_steps, engine.global_samples = step, videos  # for its own lines and curves
    if rank == 0:
        sums += torch.tensor(info["sums"], dtype=sums.dtype, device=engine.device)
    say(f"resumed from {state.path}: step {step}, {videos} videos seen")
    if info["clips"] != made_with["clips"]:
        say(f"warning: {s.data} holds other clips than when that was saved")
    return step, videos, sums


# --------------------------------------------------------------------------------------------------
# The log


class Log:
    """log.csv, and curves in TensorBoard, W&B, ... of --deepspeed_config. Rank 0 writes them."""
    LOSS = ["loss", *(f"loss_sigma_{low}_{high}"
                      for low, high in zip((0, *SIGMA_BINS), (*SIGMA_BINS, "inf")))]
    VAL = ["val_loss", *(f"val_loss_sigma_{sigma:g}" for sigma in VAL_SIGMAS)]
    COLUMNS = ["step", "videos", *LOSS, "grad_norm", "lr", "seconds_per_step", "frames_per_second",
               "peak_memory_GB", *VAL]

    def __init__(self, out, step, monitor):
        """Resuming drops rows beyond the state: those steps come again."""
        self.path, self.monitor, rows = Path(out, "log.csv"), monitor, []
        if step > 0 and self.path.exists():
            rows = self.path.read_text().splitlines()[1:]
            rows = [row for row in rows if int(row.split(",")[0]) <= step]
        if dist.get_rank() == 0:
            with exsvd.written_whole(self.path) as temporary:
                Path(temporary).write_text("\n".join([",".join(self.COLUMNS), *rows, ""]))

    def add(self, step, videos, values):
        """Append a row of {column: number, None if there is none}; other columns stay empty."""
        values = {column: float(value) for column, value in values.items() if value is not None}
        row = {column: f"{value:.6g}" for column, value in values.items()}
        row |= {"step": str(step), "videos": str(videos)}
        try:
            if dist.get_rank() == 0:
                with open(self.path, "a") as f:
                    f.write(",".join(row.get(column, "") for column in self.COLUMNS) + "\n")
        except OSError as e:
            say(f"warning: step {step} is missing in log.csv ({e})")
        self.plot({column.replace("_", "/", 1) if column in self.VAL else f"train/{column}": value
                   for column, value in values.items()}, videos)

    def plot(self, points, videos):
        """Points of curves {name: value}, over videos, as DeepSpeed itself draws them."""
        self.monitor.write_events([(name, value, videos) for name, value in points.items()])


def add_losses(sums, loss, sigma):
    """sums (2, bins + 1): losses and how many they are, in all and per bin of sigma. loss and sigma
    are (B,)."""
    bins = torch.bucketize(sigma, torch.tensor(SIGMA_BINS, device=sigma.device)) + 1
    for where in (torch.zeros_like(bins), bins):
        sums.index_add_(1, where, torch.stack([loss, torch.ones_like(loss)]).double())


def losses_of(sums):
    """-> {column of log.csv: the mean loss, None if there was none}"""
    return {name: total / n if n else None for name, total, n in zip(Log.LOSS, *sums.tolist())}


def commit():
    """That of this file, with -dirty if files differ from it; None without git."""
    git = shutil.which("git")
    command = [git, "-C", HERE, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return git and subprocess.run(command, capture_output=True, text=True).stdout.strip()


def add_to_run_json(s, step, code, config):
    """Add this start to run.json. code: its commit. config: DeepSpeed's"""
    import deepspeed
    path = Path(s.out, "run.json")
    starts = json.loads(path.read_text()) if step > 0 and path.exists() else []
    versions = {"python": sys.version} | {m.__name__: m.__version__ for m in (torch, deepspeed)}
    starts.append({
        "time": time.strftime("%F %T %z"), "step": step, "ranks": dist.get_world_size(),
        "commit": code, "settings": asdict(s), "deepspeed": config, "versions": versions})
    with exsvd.written_whole(path) as temporary:
        Path(temporary).write_text(json.dumps(starts, indent=1))


# --------------------------------------------------------------------------------------------------
# Clips, and what is drawn for them


def open_clips(s, rank):
    """The dataset, which checks its items. Rank 0 comes first: it builds the index of a folder of
    videos, which the other ranks then find."""
    options = dict(stride=s.stride, fps=s.fps, motion=s.motion, skip_static=s.skip_static)
    if rank > 0:
        dist.barrier()
    model = s.model if rank == 0 else None  # one rank is enough to compare latents with it
    dataset = data.open_dataset(s.data, s.frames, s.size, s.seed, model, **options)
    if rank == 0:
        dist.barrier()
    config = exsvd.open_model(s.model)[1][0]
    return data.Checked(dataset, s.frames, s.size, config.context_dim, config.ids)


def batches(s, dataset, first, device):
    """This rank's batches, from the video numbered `first` of all ranks on, without end."""
    def ignore_signals(_):
        for stop in STOP_SIGNALS:  # in the readers, which launchers and terminals signal too
            signal.signal(stop, signal.SIG_IGN)

    firsts = count(first + dist.get_rank() * s.batch, dist.get_world_size() * s.batch)
    return iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=([*range(n, n + s.batch)] for n in firsts), num_workers=s.workers,
        worker_init_fn=ignore_signals, pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if s.workers else None))  # your clips can't be pickled


def draw(s, n, shape):
    """For the n-th video: sigma, noise of shape (T,4,h,w), and 1 if its image stays, 0 if it is
    dropped. A function of (seed, n), drawn on the CPU."""
    seed = np.random.SeedSequence([s.seed, n]).generate_state(1)[0]  # torch's takes 32 bits
    generator = torch.Generator().manual_seed(int(seed))
    sigma = s.sigma_scale * exsvd.LOSSES[s.loss].draw(1, shape[0], generator)[0]
    noise = torch.randn(shape, generator=generator)
    keep_image = (torch.rand((), generator=generator) >= s.drop).float()
    return sigma, noise, keep_image


@torch.no_grad()
def inputs(s, svd, item):
    """The model's inputs for a batch of clips or latents, fp32 on the device: scaled x (B,T,4,h,w);
    cond (B,1,4,h,w); ctx (B,1,D), or where CLIP is trained its input (B,3,224,224); ids (B,3)"""
    device, item = svd.unet.conv_out.weight.device, dict(item)
    if "video" in item:
        frames = data.to_float(item["video"].to(device))  # (B,T,3,H,W)
        first = frames[:, 0]
        item["aug"], noise = data.draw_conditions(s.seed, item["name"], frames.shape[:2:-1])
        cond, ctx = data.encode_condition(svd.vae, svd.clip, first, item["aug"], noise)
        x = data.encode_frames(svd.vae, frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    else:
        x, cond, ctx = (item[key].to(device) for key in ("latents", "cond", "ctx"))
    ctx = exsvd.preprocess_clip(first, svd.clip.config.image) if trains(svd.clip) else ctx[:, None]
    ids = exsvd.unet_ids(svd.unet.config.ids, item, device)
    return x.float() * exsvd.VAE_SCALE, cond[:, None].float(), ctx.float(), ids


# --------------------------------------------------------------------------------------------------
# Validation, samples and weights along the way


def validation_clips(s, svd, pixels):
    """This rank's share of the first VAL_CLIPS clips of --val, encoded, with their noise: a list of
    what the model takes, (x, noise, cond, ctx, ids), on the CPU."""
    rank, s = dist.get_rank(), replace(s, data=s.val, seed=VAL_SEED)
    dataset, clips = open_clips(s, rank), []
    if ("video" in dataset[0]) != pixels:
        sys.exit("train.py: clips of --val must be encoded if those of --data are, and only then")
    for n in range(rank, VAL_CLIPS, dist.get_world_size()):
        x, *conditions = inputs(s, svd, torch.utils.data.default_collate([dataset[n]]))
        _, noise, _ = draw(s, n, x.shape[1:])
        clips.append([t.cpu() for t in (x, noise[None], *conditions)])
    return clips


@torch.no_grad()
def validate(shards, val_clips, step):
    """The loss of the average on the held-out clips of all ranks: {column of log.csv: loss}. Every
    rank must call it."""
    module, device = shards.engine.module, shards.engine.device
    sums = torch.zeros(len(VAL_SIGMAS), dtype=torch.float64, device=device)
    keep_image = torch.ones(1, device=device)
    with shards.averaged():
        for clip in val_clips:
            x, noise, *conditions = (t.to(device) for t in clip)
            for i, level in enumerate(VAL_SIGMAS):
                sigma = torch.full((1,), level, device=device)
                sums[i] += module(x, sigma, noise, *conditions, keep_image)[0].double()
    losses = sum_over_ranks(sums) / VAL_CLIPS
    say(f"step {step}: validation loss {losses.mean():.4f}")
    return dict(zip(Log.VAL, [losses.mean().item(), *losses.tolist()]))


def with_decoders(s, svd):
    """SVD with VAE and CLIP, for samples and whole models. If clips are latents, they are read
    anew."""
    if svd.vae is None:
        device = svd.unet.conv_out.weight.device
        svd = replace(exsvd.load(s.model, parts=("vae", "clip"), device=device), unet=svd.unet)
    return svd


def own_sampling(s, svd):
    """How what is trained is to be sampled: as the model and extension that it began with, at the
    (first) size it is trained at."""
    sampling = {}
    for meta in (svd.meta, svd.extension or {}):
        sampling |= meta.get("defaults", {}).get("sample", {})
    return sampling | {"size": s.size[0]}


def add_progress(out, step, frames):
    """Frames 0, T/8, ... T-1 of a sample, uint8 (T,H,W,3), as the last row of progress.png, below
    those of earlier steps."""
    T, path = len(frames), Path(out, "progress.png")
    chosen = sorted({T * i // 8 for i in range(8)} | {T - 1})
    every = math.ceil(frames.shape[1] / 256)  # small enough to look at
    row = torch.cat([frames[i, ::every, ::every] for i in chosen], dim=1)
    above = sum(int(p.stem[7:]) < step for p in Path(out).glob("sample-*.mp4"))
    if above and path.exists():
        row = torch.cat([data.read_image(path)[:above * len(row)], row])
    data.write_png(path, row)


def start_image(s, svd, dataset):
    """The image that samples start from, (3,H,W) in [-1,1]"""
    if s.sample_image:
        return data.fit_image(data.read_image(s.sample_image), *s.size[0])
    clip = dataset[0]
    if "video" in clip:
        return data.to_float(clip["video"][0])
    z = clip["latents"][None, :1].to(svd.unet.conv_out.weight.device)
    return svd.vae.decode(z)[0, 0].float().clamp(-1, 1).cpu()


@torch.no_grad()
def take_sample(s, svd, dataset, step):
    """Write sample-<step>.mp4 with the model's own settings and a row of progress.png, for rank 0.
    -> {name: what was measured}. If disk or memory is full, the run warns and goes on."""
    path = os.path.join(s.out, f"sample-{step:06d}.mp4")
    own = {"defaults": {"sample": own_sampling(s, svd)}}
    try:
        with sample.full_memory("out of memory"):
            svd = replace(with_decoders(s, svd), extension=own)
            image = start_image(s, svd, dataset)
            given = dict(seed=s.seed, frames=s.frames, size=tuple(image.shape[:0:-1]))
            settings = sample.settings_for(svd, given, s.model)
            frames = sample.generate(svd, image, settings, svd.unet.conv_out.weight.device)
            pixels = sample.to_pixels(frames)
        with data.VideoWriter(path, settings.fps, asdict(settings)) as video:
            video.write(pixels)
        add_progress(s.out, step, pixels)
    except (OSError, MemoryError) as e:
        say(f"warning: there is no sample of step {step} ({e})")
        return {}
    measured = {"motion_score": data.motion_score(pixels)}
    if hasattr(dataset, "measure"):
        measured |= dataset.measure(frames, image, settings.fps, settings.motion)
    values = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
    say(f"step {step}: {path} and a row of progress.png, at motion {settings.motion:g} and "
        f"{settings.fps:g} fps: {values}")
    return measured


def only_extension_trains(svd):
    """Whether all that trains belongs to the extension. Then an extension file is saved, otherwise
    a whole model."""
    trained = [name for name, p in svd.unet.named_parameters() if p.requires_grad]
    in_file = all(map(exsvd.is_extension_parameter, trained))
    return in_file and svd.unet.max_frames is not None and not trains(svd.clip)


def save_weights(s, svd, shards, path, **about):
    """Write the networks with the average in place of their own weights, in float16. In a whole
    model, what is not trained was rounded to --dtype before. about: goes into the file's metadata.
    Every rank must call it. Raises OSError on all alike."""
    weights = shards.rest_of_extension | shards.gather("average")

    def write():
        defaults = {"sample": own_sampling(s, svd)}
        if only_extension_trains(svd):
            state = {name.removeprefix("unet."): t for name, t in weights.items()}
            exsvd.save_extension(path, svd.unet, state, torch.float16, s.extension or (),
                                 defaults=defaults, **about)
        else:
            whole, defaults = with_decoders(s, svd), svd.meta.get("defaults", {}) | defaults
            exsvd.save_model(path, whole.unet, whole.vae, whole.clip, torch.float16, weights,
                             defaults=defaults, **about)

    on_rank_0(write)


def try_saving(s, svd, shards):
    """Write the weights once as they will be written, and load them without their values, as
    sample.py will. What cannot be saved or loaded ends the run now, and not after a day."""
    path = os.path.join(s.out, "trial.safetensors.tmp")
    save_weights(s, svd, shards, path)
    if dist.get_rank() == 0:
        if only_extension_trains(svd):
            exsvd.load(s.model, [*(s.extension or ()), path], parts=("unet",), device="meta")
        else:
            exsvd.load(path, device="meta")
        os.remove(path)


def save(s, svd, shards, about, sums, with_weights):
    """Weights and state of a step. Every rank must call it. Raises OSError on all alike. about:
    {name: value}, for the metadata of both"""
    if with_weights:  # before the state: a run that resumes from it does not write them again
        name = "exvideo" if only_extension_trains(svd) else "model"
        path = os.path.join(s.out, f"{name}-{about['step']:06d}.safetensors")
        save_weights(s, svd, shards, path, **about)
        say(f"step {about['step']}: saved {path}")
    save_state(s.out, shards, about | {"sums": sum_over_ranks(sums).tolist()})


# --------------------------------------------------------------------------------------------------
# The loop


def rate(s, step):
    """The learning rate of a step (0 is the first), as a fraction of --lr."""
    return min(1, (step + 1) / max(1, s.warmup), (s.steps - step) / max(1, s.cooldown))


def not_finite(clip_losses):
    """Why a step was not applied: "loss" and the clips whose loss is not finite; or "gradients" and
    all its clips, if every loss is finite. Every rank must call it. clip_losses: (names, losses) of
    each pass"""
    losses = [pair for names, loss in clip_losses for pair in zip(names, loss.tolist())]
    losses = sum(of_all_ranks(losses), [])
    bad = [name for name, loss in losses if not math.isfinite(loss)]
    return "loss" if bad else "gradients", ", ".join(bad or [name for name, _ in losses])


def note_signals():
    """-> a list, to which signals that ask for an early end are appended"""
    received = []

    def note(stop, _):
        received.append(stop)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    for stop in STOP_SIGNALS:
        signal.signal(stop, note)
    say(f"rank 0 is process {os.getpid()}: send SIGTERM to it, or another rank, to stop early")
    return received


@sample.full_memory("out of memory. From what costs least: --checkpoint memory, --offload, more "
                    "GPUs, fewer --frames, a smaller --size")
def main(argv=None):
    s = parse(argv)
    device = join_ranks(s)
    rank, world = dist.get_rank(), dist.get_world_size()
    config = deepspeed_config(s)
    dataset = open_clips(s, rank)
    pixels = "video" in dataset[0]
    if hasattr(dataset, "describe"):
        say(dataset.describe())
    svd = load_networks(s, pixels, device)
    shards, s = start_engine(s, svd, config, device)
    engine = shards.engine
    learning_rates = [group["lr"] for group in engine.optimizer.param_groups]
    made_with = {"settings": must_match(s, svd), "clips": getattr(dataset, "id", ""),
                 "data": s.data, "commit": commit(),
                 "chosen": {"dtype": s.dtype, "checkpoint": s.checkpoint}}
    step, videos, sums = resume(s, shards, made_with)
    if rank == 0:
        add_to_run_json(s, step, made_with["commit"], engine.config)
    try_saving(s, svd, shards)
    val_clips = validation_clips(s, svd, pixels) if s.val else None
    loader = batches(s, dataset, videos, device)
    log = Log(s.out, step, engine.monitor)

    def due(every):
        return step % every == 0 or step == s.steps

    def evaluate():
        """Validate and sample, where it is time to. -> what validate() returns, or {}"""
        if s.sample_every and due(s.sample_every):
            with shards.averaged():
                measured = take_sample(s, svd, dataset, step) if rank == 0 else {}
            log.plot({f"sample/{name}": value for name, value in measured.items()}, videos)
        return validate(shards, val_clips, step) if s.val and due(s.val_every) else {}

    validated = evaluate() if step == 0 else {}
    if validated:
        log.add(step, videos, validated)
    received = note_signals()
    bar = tqdm(total=s.steps, initial=step, desc="training", unit="step", disable=rank > 0)
    skipped = 0  # steps in a row that were not applied, since gradients were not finite
    logged, began, row = step, time.perf_counter(), {}
    while step < s.steps:
        # 1. forward and backward, --accumulate times
        if engine.lr_scheduler is None:  # else that sets the rate, when a step ends
            for group, lr in zip(engine.optimizer.param_groups, learning_rates):
                group["lr"] = lr * rate(s, step)
        lr = engine.optimizer.param_groups[0]["lr"]
        clip_losses = []
        for _ in range(s.accumulate):
            item = next(loader)
            x, cond, ctx, ids = inputs(s, svd, item)
            numbers = range(videos + rank * s.batch, videos + (rank + 1) * s.batch)
            drawn = zip(*(draw(s, n, x.shape[1:]) for n in numbers))
            sigma, noise, keep_image = (torch.stack(t).to(device) for t in drawn)
            loss = engine(x, sigma, noise, cond, ctx, ids, keep_image)
            engine.backward(loss.mean())
            engine.step()  # reduces gradients; updates on the last of --accumulate calls
            add_losses(sums, loss.detach(), sigma)
            clip_losses.append((item["name"], loss.detach()))
            videos += world * s.batch
        step += 1
        bar.update()

        # 2. the average follows steps that were applied, on which all ranks agree
        skipped = 0 if engine.was_step_applied() else skipped + 1
        if skipped == 0:
            shards.update_average()
        else:
            what, names = not_finite(clip_losses)
            if what == "loss" or s.dtype != "float16":  # which skips steps to find its loss scale
                say(f"warning: step {step} is left out: no finite {what} on {names}")
            if skipped == MAX_SKIPPED:
                sys.exit(f"train.py: no finite gradients in {skipped} steps, on {names}")

        # 3. sample, validate, log, save; leave together
        leaving = step == s.steps or any(of_all_ranks(bool(received)))
        seconds = (time.perf_counter() - began) / (step - logged)
        validated = evaluate()
        if due(s.log_every) or validated:
            row = losses_of(sum_over_ranks(sums)) | {
                "grad_norm": engine.get_global_grad_norm(), "lr": lr, "seconds_per_step": seconds,
                "frames_per_second": s.accumulate * world * s.batch * s.frames / seconds,
                "peak_memory_GB": sample.peak_memory(device)}
            log.add(step, videos, row | validated)
            bar.set_postfix(loss=f"{row['loss']:.4f}")
            sums.zero_()
            logged, began = step, time.perf_counter()
        with_weights = due(s.weights_every) or leaving
        if due(s.save_every) or with_weights:
            about = made_with | {"step": step, "videos": videos, "lr": lr, "loss": row.get("loss")}
            try:
                save(s, svd, shards, about, sums, with_weights)
            except OSError as e:
                if leaving:
                    sys.exit(f"train.py: step {step} could not be saved ({e}). Make room: the same "
                             "command goes on from the last state")
                say(f"warning: step {step} could not be saved ({e}); the next save is tried")
        if leaving:
            break
    bar.close()
    import deepspeed
    deepspeed.comm.destroy_process_group()


if __name__ == "__main__":
    try:
        sample.run("train.py", main)
    finally:  # readers ignore SIGTERM, so Python would wait for them without end
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which PyTorch reports readers that die
        for reader in multiprocessing.active_children():
            reader.kill()
