"""Image to video.

    python sample.py assets/img.png                                     # the toy that ships with the repository
    python sample.py photo.jpg --model svd_xt.safetensors --extension model.fp16.safetensors --size 512x512
    python sample.py photo.jpg --end last.jpg                           # the same picture twice is a loop
    python sample.py photo.jpg --frames 300 --keyframe 200=c.png        # in rounds, past the length the model knows
    python sample.py --video out/photo.mp4 --strength 0.5 --size 1024x1024                      # the same, larger
    python sample.py photos/*.jpg --seeds 5 --shard 0/8                 # a batch, and this GPU's share of it
    python sample.py --decode-only out/photo.latents.safetensors        # once more from saved latents

In order: the image is read and fitted, encoded by CLIP and the VAE, noise is carried down the sigmas by a sampler, the
latents are saved, decoded in overlapping chunks and streamed to a video file. Arithmetic on latents is float32. From
text, by way of any text-to-image pipeline of diffusers: README.md, section More than one image.
"""

import argparse
import functools
import itertools
import math
import os
import signal
import sys
import tempfile
import time
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import exsvd

HERE = os.path.dirname(os.path.abspath(__file__))

# What a run uses where no flag says otherwise. size: what the model was trained on; its area is kept, at the aspect
# ratio of the image. Frames are the rows of the extension's table, or the native length. Outside of the ranges, too, a
# model is far from what it was trained on.
DEFAULTS = {
    # as diffusers runs SVD and SVD-XT; the ranges are those of Stability's script
    "SVD": dict(size=(1024, 576), steps=25, sampler="euler", eta=0.0, share_noise=0, cfg=(1.0, 3.0),
                fps=7, motion=127, aug=0.02, decode_chunk=14, fps_range=(5, 30), motion_range=(0, 255)),
    # as the ExVideo authors run their release, which was trained with 30 fps alone: the range is half and twice that
    "ExVideo": dict(size=(512, 512), steps=50, sampler="euler", eta=0.0, share_noise=0, cfg=(2.0, 2.0),
                    fps=30, motion=127, aug=0.02, decode_chunk=16, fps_range=(15, 60), motion_range=(0, 127)),
    # fresh noise at every step corrects earlier ones: the tint of frames trembles less
    "toy": dict(size=(128, 128), steps=16, sampler="ddim", eta=1.0, share_noise=0, cfg=(1.0, 1.0),
                fps=8, motion=40, aug=0.02, decode_chunk=16, fps_range=(4, 16), motion_range=(0, 80)),
}

# ----------------------------------------------------------------------------------------------------------------------
# Samplers: pure functions of (denoise, x, sigmas, eta, draw). denoise(x, sigma) -> D, the clean latents it expects; x
# carries noise of sigmas[0]; sigmas fall and end in 0; draw() -> standard normal noise like x, needed where eta > 0.
# All arithmetic is in x's dtype and on its device; x is not changed.


def ddim(denoise, x, sigmas, eta=0.0, draw=None):
    """DDIM (Song et al. 2020, eq. 12 and 16) in EDM's variables, alpha-bar = 1/(1 + sigma^2).

    eta 0 is Euler's method (EDM, algorithm 1 without its correction): x moves on the line to D until the noise that is
    left is the next sigma's. eta 1 replaces as much of it by fresh noise as ancestral sampling does.
    """
    for sigma, nxt in zip(sigmas[:-1], sigmas[1:]):
        D = denoise(x, sigma)
        fresh = eta * nxt * (1 - (nxt / sigma) ** 2).sqrt()
        remaining = (nxt**2 - fresh**2).sqrt()
        x = D + (x - D) * (remaining / sigma)
        if eta > 0:
            x = x + fresh * draw()
    return x


def heun(denoise, x, sigmas, eta=0.0, draw=None):
    """EDM, algorithm 1 without fresh noise: a second evaluation corrects each step but the last; twice Euler's cost."""
    for sigma, nxt in zip(sigmas[:-1], sigmas[1:]):
        d = (x - denoise(x, sigma)) / sigma
        x_next = x + (nxt - sigma) * d
        if nxt > 0:
            d = (d + (x_next - denoise(x_next, nxt)) / nxt) / 2
            x_next = x + (nxt - sigma) * d
        x = x_next
    return x


def dpm(denoise, x, sigmas, eta=0.0, draw=None):
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095, algorithm 2): second order at Euler's cost, no fresh noise.

    Euler's step, but towards D as the line through it and the one before, over ln sigma, has it half a step ahead.
    """
    for i, (sigma, nxt) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        D = target = denoise(x, sigma)
        if i > 0 and nxt > 0:
            target = D + (D - D_before) * (sigma / nxt).log() / (sigmas[i - 1] / sigma).log() / 2
        x = target + (x - target) * (nxt / sigma)
        D_before = D
    return x


SAMPLERS = {"euler": ddim, "ddim": ddim, "heun": heun, "dpm++": dpm}

# Align Your Steps (Sabour et al. 2024, arXiv:2404.14507): ten steps for SVD. The last level is 0, as in diffusers.
AYS = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)


def ays_sigmas(steps):
    """AYS for any number of steps, by linear interpolation of ln sigma: (steps + 1,), float32."""
    logs = torch.tensor(AYS, dtype=torch.float64).log()
    at = torch.linspace(0, len(AYS) - 1, steps + 1, dtype=torch.float64)
    left = at.long().clamp(max=len(AYS) - 2)
    sigmas = torch.lerp(logs[left], logs[left + 1], at - left).exp()
    sigmas[-1] = 0
    return sigmas.float()


SCHEDULES = {"karras": exsvd.karras_sigmas, "ays": ays_sigmas}


def shared_noise(noise, block):
    """Noise (B,T,4,h,w) whose means over block x block latents are those of frame 0 in every frame; block 0: as it was.

    Some of the noise's own tint leaks into a frame, so frames that share it do not tremble against each other. Each
    frame alone stays standard normal, exactly: the mean of a block and what is left without it are independent. Noise
    shared by frames: PYoCo (Ge et al. 2023, arXiv:2305.10474, section 4); in low frequencies alone: FreeInit (Wu et al.
    2023, arXiv:2312.07537).
    """
    if block == 0:
        return noise
    h, w = noise.shape[-2:]
    means = F.avg_pool2d(noise.flatten(0, 1), block, ceil_mode=True)  # a last block that sticks out: of what is inside
    means = means.repeat_interleave(block, -2).repeat_interleave(block, -1)[..., :h, :w].unflatten(0, noise.shape[:2])
    return noise - means + means[:, :1]


# ----------------------------------------------------------------------------------------------------------------------
# From an image to latents


def condition(svd, img, aug, noise, device):
    """What the UNet is told about the image (3,H,W) in [-1,1]: image latents (1,1,4,h,w), unscaled, and ctx (1,1,D)."""
    img = img[None].to(device)
    ctx = svd.clip(exsvd.preprocess_clip(img, svd.clip.config.image))[:, None]  # CLIP sees the frame at video size
    return svd.vae.encode(img + aug * noise.to(device))[:, None], ctx


def guided(unet, image_latents, ctx, ids, cfg, frames, interval=None):
    """denoise(x, sigma) for the samplers. Guidance goes linearly over the frames, from cfg[0] on the first to cfg[1].

    A guidance of 1 is none, and where it is 1 on all frames it costs nothing; below 1 it weakens the image's influence.
    interval: guidance only at noise levels in (low, high] (Kynkaanniemi et al. 2024, section 3); the others cost half.
    """
    scale = torch.linspace(*cfg, frames, device=ctx.device).view(1, -1, 1, 1, 1)
    matters = min(cfg) != 1 or max(cfg) != 1

    def denoise(x, sigma):
        inside = interval is None or interval[0] < sigma <= interval[1]
        sigma = sigma.to(x).expand(len(x))
        D = exsvd.denoise(unet, x, sigma, image_latents, ctx, ids)
        if matters and inside:  # one pass after the other: a batch of two would need twice the memory
            D0 = exsvd.denoise(unet, x, sigma, torch.zeros_like(image_latents), torch.zeros_like(ctx), ids)
            D = D0 + scale * (D - D0)
        return D

    return denoise


def fused(forward, backward, frames):
    """denoise(x, sigma) of a video that begins and ends with given images: Time Reversal Fusion (Feng et al. 2024,
    arXiv:2403.14611) without its extra rounds of noise, which fresh noise (eta) stands for.

    forward knows the first image; backward knows the last one, and is shown the frames in reverse order. Their
    estimates are blended: the first frame is forward's alone, the last one backward's.
    """
    def denoise(x, sigma):
        weight = torch.linspace(0, 1, frames, device=x.device).view(1, -1, 1, 1, 1)
        return torch.lerp(forward(x, sigma), backward(x.flip(1), sigma).flip(1), weight)

    return denoise


def held(denoise, known, weight):
    """denoise(x, sigma) that draws frames to known latents (1,T,4,h,w), by weights (T,) from 0 to 1.

    At weight 1 the estimate is the truth, so samplers keep a frame at known + sigma * noise, as masked frames are in
    the official ExVideo code, and end with the truth itself.
    """
    weight = weight.view(1, -1, 1, 1, 1).to(known.device)
    return lambda x, sigma: torch.lerp(denoise(x, sigma), known, weight)


def rounds(frames, length, overlap):
    """A long video in rounds of `length` frames that begin with `overlap` frames of the one before, the last one with
    as many as it takes: [(start, stop), ...]

    Two things are not as one might expect. The image that a round is told of is its own first frame, which the one
    before has made, since that is what SVD was trained on (the same as the last frame made where the overlap is 1).
    And the common frames are held by weights that fall to 0: held firmly to the last of them, the toy's video jumped by
    4.0 of 255 at the join, and with weights that fade by 1.7, where 1.2 is the median between frames.
    """
    starts = [0]
    while starts[-1] + length < frames:
        starts.append(min(starts[-1] + length - overlap, frames - length))
    return [(start, min(start + length, frames)) for start in starts]


def adjust(z, s):
    """What the official tool does to the latents of the released ExVideo weights: (1,T,4,h,w) -> (1,T,4,h,w).

    s["match_stats"]: every frame gets the mean and deviation of the whole video, but for key frames, whose picture is
    given. s["contrast"]: a factor, 1.2 there. Both counter a video that greys with time. The likely cause, read off
    that code and not confirmed: its training targets were scaled by 0.13025, SDXL's constant, instead of 0.18215, so
    the weights aim at too little contrast. What is given in full contrast is divided by the factor beforehand.
    """
    if s["match_stats"]:
        mean = z.mean(dim=(2, 3, 4), keepdim=True)
        std = z.std(dim=(2, 3, 4), keepdim=True)
        matched = (z - mean) / std * z.std() + z.mean()
        given = [number for number in s.get("keyframes", []) if number < z.shape[1]]
        matched[:, given] = z[:, given]
        z = matched
    return z * s["contrast"]


# ----------------------------------------------------------------------------------------------------------------------
# From latents to frames


def is_out_of_memory(error):
    """Of any device: only CUDA's allocator has an exception type, neither the CPU's nor those of cuDNN and cuBLAS."""
    words = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def decode(vae, z, chunk):
    """Decode in time: unscaled latents (1,T,4,h,w) -> yields float32 (n,3,8h,8w) on the CPU, T frames in all.

    Chunks of `chunk` frames overlap by a quarter (at least 4) and are blended by a linear ramp, so memory does not grow
    with T. It is not the same as VAE.decode of everything, whose norms see all frames. Out of memory halves the chunk
    and goes on.
    """
    T, start, tail = z.shape[1], 0, None
    while start < T:
        end = min(start + chunk, T)
        first = max(0, end - chunk)  # the last chunk is as long as the others: its head is decoded again and dropped
        frames = None
        try:
            frames = vae.decode(z[:, first:end])[0, start - first:].float().cpu()         # (end - start, 3, 8h, 8w)
        except RuntimeError as e:
            if not is_out_of_memory(e) or chunk == 1:
                raise
        if frames is None:  # handled out here, where the exception no longer keeps the tensors of the attempt alive
            chunk //= 2
            print(f"out of memory: decoding goes on with chunks of {chunk} frames", file=sys.stderr)
            if z.is_cuda:
                torch.cuda.empty_cache()
            if tail is not None and chunk <= len(tail):  # too short to blend with what the larger chunk left
                yield tail
                start, tail = start + len(tail), None
            continue
        if tail is not None:
            n = len(tail)
            blended = torch.lerp(tail, frames[:n], blending(n).view(-1, 1, 1, 1))
            frames = torch.cat([blended, frames[n:]])
        overlap = 0
        if end < T:
            overlap = max(chunk // 4, min(4, chunk // 2))  # below 4 frames the seams of small chunks show
        yield frames[:len(frames) - overlap]
        start, tail = end - overlap, frames[len(frames) - overlap:]


def blending(n):
    """Weights of the later of two chunks in the n frames that both have decoded: (n,).

    A chunk's outermost frame saw zero padding in every temporal convolution where its neighbour should be, so it gets
    weight 0. Of one or two common frames each is at an edge, and the errors of both chunks partly cancel. With random
    weights (full size; measured on a CPU) it makes little difference: the largest error is 18.7 of 255, and 18.9 with
    weights of i / (n + 1).
    """
    if n < 3:
        return torch.arange(1, n + 1) / (n + 1)
    return torch.linspace(0, 1, n)


def to_pixels(frames):
    """float (n,3,H,W) in [-1,1] -> uint8 (n,H,W,3)"""
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


# ----------------------------------------------------------------------------------------------------------------------
# The command


def at_least(low, most=2**63 - 1, kind=float):
    """An argparse type: a number of low to most, nan not among them."""
    what = "a whole number" if kind is int else "a number"
    limit = "below 2^63" if most == 2**63 - 1 else f"at most {most}"

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be {what} of at least {low}, and {limit}")
        return value
    return convert


def frame_size(text):
    """An argparse type: WxH -> (W, H), multiples of 64."""
    W, H = data.frame_size(text)
    if W < 64 or H < 64 or W % 64 or H % 64:
        near = "x".join(str(max(64, round(n / 64) * 64)) for n in (W, H))
        raise argparse.ArgumentTypeError(f"{text}: both must be multiples of 64; the nearest is {near}")
    return W, H


def keyframe(text):
    """An argparse type: NUMBER=IMAGE -> (number, path)."""
    number, _, path = text.partition("=")
    if not number.isdigit() or not path:
        raise argparse.ArgumentTypeError(f"{text}: write it as NUMBER=IMAGE, for example 64=photo.png")
    return int(number), path


def shard(text):
    """An argparse type: I/N -> (i, n)."""
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(f"{text}: write it as I/N with I from 0 to N - 1, for example 0/8")
    return int(i), int(n)


def parse(argv):
    p = argparse.ArgumentParser(
        usage="sample.py IMAGE... [options], --help lists them",
        description="Image to video with SVD and ExVideo. Defaults depend on the model: SVD / ExVideo / toy.",
        epilog="One line warns where --size (of a picture), --fps, --motion or --frames are far from the training. "
               "Out of memory: --dtype bfloat16, --offload, fewer --frames, a smaller --size, in this order. README.md "
               "has real weights (section Weights) and text to video (More than one image).")
    add = p.add_argument

    def shown(key):
        return "[" + " / ".join(str(default[key]) for default in DEFAULTS.values()) + "]"

    add("images", nargs="*", metavar="IMAGE",
        help="pictures (PNG, JPEG, WebP, GIF, ...) or videos, whose first frame is used")
    add("--model", help="single .safetensors file or diffusers folder [weights/svd_xt.safetensors, or the toy]")
    add("--extension", help="ExVideo release or own extension "
                            "[with the default model: weights/exvideo.safetensors if there; the toy: its own]")
    add("--native", type=at_least(1, kind=int), metavar="N",
        help="frames the base was trained on [25, or what the model's files say; 14 for svd.safetensors]")
    add("--frames", type=at_least(1, kind=int), metavar="N",
        help="frames to make, in rounds where an extension has fewer [all rows of its table, or the native length]")
    add("--overlap", type=at_least(1, kind=int), metavar="N",
        help="frames that a round shares with the one before [an eighth of a round; without extension no rounds]")
    add("--end", metavar="IMAGE", help="what the video ends with; the first IMAGE again makes a loop. Twice the time")
    add("--keyframe", type=keyframe, action="append", default=[], metavar="NUMBER=IMAGE",
        help="what the frame of that number shows, counted from 0; may be given more than once")
    add("--video", metavar="FILE",
        help="refine a video, or *.latents.safetensors of the same size, instead of making one from noise. Where they "
             "are not given, IMAGE is its first frame, and --size, --frames and --fps are its own. It is encoded whole")
    add("--strength", type=at_least(0, 1), default=0.5,
        help="of the refinement: the share of the steps that are made; 0.5 keeps structure and motion [0.5]")
    add("--size", type=frame_size, metavar="WxH",
        help="multiples of 64 [the family's area at the image's own aspect ratio]")
    add("--steps", type=at_least(1, kind=int), metavar="N", help=f"noise levels {shown('steps')}")
    add("--schedule", choices=tuple(SCHEDULES), default="karras",
        help="ays: Align Your Steps, made for 10 steps of SVD [karras]")
    add("--sampler", choices=tuple(SAMPLERS),
        help=f"euler and ddim are the same, heun costs twice, dpm++ needs fewer steps {shown('sampler')}")
    add("--eta", type=at_least(0, 1), help="share of the noise that euler and ddim replace by fresh noise at each step "
                                           f"{shown('eta')}, 0 where --sampler is given")
    add("--share-noise", type=at_least(0, kind=int), metavar="BLOCK",
        help="noise whose means over BLOCK x BLOCK latents are the same in all frames, against tints that tremble; "
             f"0: off {shown('share_noise')}")
    add("--cfg", type=at_least(0), nargs=2, metavar=("FIRST", "LAST"),
        help=f"guidance on the first and the last frame, 1 is none {shown('cfg')}")
    add("--cfg-interval", type=at_least(0), nargs=2, metavar=("LOW", "HIGH"),
        help="guide only where the noise level lies in (LOW, HIGH]; the other steps cost half "
             "[all; noise falls from 700 to 0.002]")
    add("--fps", type=at_least(1), help=f"frames per second, told to the model and written to the file {shown('fps')}")
    add("--motion", type=at_least(0), help="amount of motion. SVD's scale is 0..255; ExVideo's release was trained on "
                                           f"0..127, the toy on 0..80 {shown('motion')}")
    add("--aug", type=at_least(0), help=f"noise added to the image, which frees the motion from it {shown('aug')}")
    add("--seed", type=at_least(0, kind=int), default=0,
        help="of all noise, drawn on the CPU: the same on every device [0]")
    add("--seeds", type=at_least(1, kind=int), default=1, metavar="N",
        help="videos of each image, with seeds from --seed on: <name>-0.mp4, <name>-1.mp4, ... [1]")
    add("--shard", type=shard, default=(0, 1), metavar="I/N",
        help="make every N-th video of the list alone, from the I-th on (0 to N - 1): one shard for each GPU, which "
             "CUDA_VISIBLE_DEVICES or --device cuda:I chooses")
    add("--overwrite", action="store_true", help="make videos again that are there; [of several they are skipped]")
    add("--decode-chunk", type=at_least(1, kind=int), metavar="N",
        help=f"frames decoded at once; fewer need less memory {shown('decode_chunk')}")
    add("--match-stats", action=argparse.BooleanOptionalAction,
        help="give every frame's latents the mean and deviation of the video's [only with published ExVideo weights]")
    add("--contrast", type=at_least(0.01),
        help="factor on the latents [1.2 with the published ExVideo weights, else 1]")
    add("--decode-only", metavar="FILE",
        help="decode latents saved by an earlier run, instead of sampling. --fps, --decode-chunk, --match-stats, "
             "--contrast and --dtype may differ from that run's")
    add("--out", help=".mp4, .webm, .gif or a folder of PNGs; {name} is the image's name and {seed} the seed "
                      "[out/{name}.mp4; with --video out/{name}-refined.mp4]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[cuda if there is one, else cpu]")
    add("--offload", action="store_true", help="for small cards: CLIP and VAE, then the UNet, then the VAE are on the "
                                               "device (the UNet two blocks at a time), the others wait in CPU memory")
    add("--compile", action="store_true",
        help="torch.compile of the UNet's blocks; the first step takes minutes, and a compiler is needed")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the networks [bfloat16; the toy on the CPU: float32]")
    a = p.parse_args(argv)

    if bool(a.images or a.video) == bool(a.decode_only):
        p.error("give at least one image, such as assets/img.png, or --decode-only FILE, and not both")
    if a.video and len(a.images) > 1:
        p.error("--video refines one video: give one IMAGE, or none")
    if a.cfg_interval and a.cfg_interval[0] >= a.cfg_interval[1]:
        p.error(f"--cfg-interval {a.cfg_interval[0]:g} {a.cfg_interval[1]:g}: LOW must be below HIGH")
    if len(dict(a.keyframe)) < len(a.keyframe):
        p.error("--keyframe: two images for the same frame")
    if a.eta and SAMPLERS[a.sampler or "ddim"] is not ddim:
        p.error(f"--eta {a.eta:g}: {a.sampler} adds no fresh noise; use --sampler ddim, or leave --eta out")
    try:
        torch.zeros(1, device=a.device).cpu()
    except (RuntimeError, AssertionError) as e:
        p.error(f"--device {a.device}: {str(e).splitlines()[0]}")
    decoding = ("decode_only", "images", "model", "out", "device", "fps", "decode_chunk", "match_stats", "contrast",
                "dtype")
    given = [flag for flag, value in vars(a).items() if value is not None and value != p.get_default(flag)]
    idle = [flag for flag in given if flag not in decoding]
    if a.decode_only and idle:
        p.error(f"--decode-only samples nothing: leave out --{', --'.join(idle).replace('_', '-')}")
    if not a.video and "strength" in given:
        p.error("--strength: only with --video")
    jobs = jobs_of(a)
    a.batch = len(jobs) > 1
    a.jobs = jobs[a.shard[0]::a.shard[1]]
    outs = [out for _, _, out in jobs]
    if len(set(outs)) < len(outs):
        p.error("two images would be written to the same file: put {name} into --out, and give images of other names")
    read = [*a.images, *(path for _, path in a.keyframe), *filter(None, (a.video, a.end, a.decode_only))]
    if a.video:
        read.append(latents_path(a.video))  # an hour's work too
    written = outs if a.decode_only else outs + [latents_path(out) for out in outs]
    written = {Path(out).resolve() for out in written}
    for path in map(Path, read):
        if not written.isdisjoint([path.resolve(), *path.resolve().parents]):  # an output may be a folder of PNGs
            p.error(f"{path} would be overwritten: choose another --out")
    return a


def jobs_of(a):
    """What is to be made, one video after the other: [(image, seed, output)]."""
    out = a.out or ("out/{name}-refined.mp4" if a.video else "out/{name}.mp4")
    if a.seeds > 1 and "{seed}" not in out:
        stem, extension = (out.rstrip("/"), "/") if out.endswith("/") else os.path.splitext(out)
        out = stem + "-{seed}" + extension
    jobs = []
    for image in a.images or [a.video or a.decode_only]:
        name = os.path.splitext(os.path.basename(image.rstrip(os.sep)))[0].removesuffix(".latents")
        for seed in range(a.seed, a.seed + a.seeds):
            jobs.append((image, seed, out.replace("{name}", name).replace("{seed}", str(seed))))
    return jobs


def default_model(a):
    """--model and --extension where they are not given; one line says so when it is the toy."""
    if a.model:
        return a.model, a.extension
    weights = os.path.join(HERE, "weights")
    model, extension = (os.path.join(weights, name) for name in ("svd_xt.safetensors", "exvideo.safetensors"))
    if os.path.exists(model):
        return model, a.extension or (extension if os.path.exists(extension) else None)
    toy, tuned = (os.path.join(HERE, "assets", name) for name in ("toy.safetensors", "toy-exvideo.safetensors"))
    print("no weights/svd_xt.safetensors: using the toy model in assets/. For the real one, put stabilityai/"
          "stable-video-diffusion-img2vid-xt's svd_xt.safetensors (its own licence; 1.1 is gated) and ECNU-CILab/"
          "ExVideo-SVD-128f-v1's model.fp16.safetensors (as exvideo.safetensors), both on Hugging Face, into weights/",
          file=sys.stderr)
    return toy, a.extension or tuned


def peak_memory(device):
    """Peak memory, for the closing line: what torch allocated on a GPU, or what the process held."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB of GPU memory"
    try:
        import resource  # not on Windows
    except ImportError:
        return "memory not measured"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB of memory"


@contextmanager
def on_device(device, *networks):
    """Networks on the device for a while, then back where they wait. Nothing moves where that is the same place."""
    networks = [network for network in networks if getattr(network, "stream", None) is None]  # else it moves by itself
    homes = [next(network.parameters()).device for network in networks]
    with torch.inference_mode(False):  # parameters that moved in inference mode could never be trained again
        for network in networks:
            network.to(device)
    try:
        yield
    finally:
        with torch.inference_mode(False):
            for network, home in zip(networks, homes):
                network.to(home)
        if device.type == "cuda" and homes and homes[0].type == "cpu":
            torch.cuda.empty_cache()  # or the memory stays reserved in blocks that the next network does not fit


@torch.inference_mode()
def make_latents(svd, img, s, device, video=None, end=None, keyframes={}):
    """One image (3,H,W) in [-1,1] to scaled latents (1,T,4,H/8,W/8) on the device. s: the settings, all of them.

    video: scaled latents to start from instead of noise, like the result. end, keyframes {number: image}: images that
    the last frame and others show.
    """
    H, W = img.shape[1:]
    generator = torch.Generator().manual_seed(s["seed"])
    length = min(s["round"], s["frames"])
    sigmas = SCHEDULES[s["schedule"]](s["steps"])  # on the CPU, so that no step waits for the device to compare them
    if video is not None:
        sigmas = sigmas[-1 - max(1, round(s["strength"] * s["steps"])):]
    parts = rounds(s["frames"], length, s["overlap"])
    steps = len(sigmas) - 1
    passes = len(parts) * (2 * steps - 1 if s["sampler"] == "heun" else steps)
    ids = torch.tensor([[s["fps"] - 1, s["motion"], s["aug"]]], device=device)

    def draw():  # on the CPU: a seed means one video, whatever the device
        noise = torch.randn(1, length, 4, H // 8, W // 8, generator=generator)
        return shared_noise(noise, s["share_noise"]).to(device)

    def told(img, own_latents=None):  # a denoiser that knows the image
        image_noise = torch.randn(1, 3, H, W, generator=generator)
        image_latents, ctx = condition(svd, img, s["aug"], image_noise, device)
        if own_latents is not None:  # decoded and encoded again they would lose contrast, round by round
            image_latents = own_latents
        return guided(svd.unet, image_latents, ctx, ids, s["cfg"], length, s["cfg_interval"])

    z = torch.zeros(1, s["frames"], 4, H // 8, W // 8, device=device) if video is None else video.clone()
    fixed = torch.zeros(s["frames"])  # 1 for key frames, whose latents z holds
    made = 0                          # frames that earlier rounds have made
    with tqdm(total=passes, desc="sampling", unit="pass") as bar:
        for start, stop in parts:
            noise = draw()
            with on_device(device, svd.clip, svd.vae):
                if start == 0:
                    for number, frame in keyframes.items():
                        shown = svd.vae.encode(frame[None].to(device)) * exsvd.VAE_SCALE
                        z[:, number] = shown / s["contrast"]  # adjust() puts it back
                        fixed[number] = 1
                    denoise = told(img)
                else:  # told of its own first frame, as a viewer sees it, not of the last one made: see rounds()
                    shown = adjust(z[:, :made], s)
                    img = decoded_frame(svd.vae, shown, start, s["decode_chunk"])
                    denoise = told(img, shown[:, start:start + 1] / exsvd.VAE_SCALE)
                if end is not None and stop == s["frames"]:
                    denoise = fused(denoise, told(end), length)
            weight = fixed[start:stop].clone()
            ramp = torch.linspace(1, 0, max(0, made - start) + 1)[:-1]  # fades out: see rounds()
            weight[:len(ramp)] = torch.maximum(weight[:len(ramp)], ramp)
            if weight.any():
                denoise = held(denoise, z[:, start:stop].clone(), weight)

            def counted(x, sigma):
                D = denoise(x, sigma)
                bar.update()
                return D

            level = (sigmas[0] ** 2 + 1).sqrt() if video is None else sigmas[0]  # latents have a variance of about 1
            with on_device(device, svd.unet):
                x = z[:, start:stop] + level * noise
                z[:, start:stop] = SAMPLERS[s["sampler"]](counted, x, sigmas, s["eta"], draw)
            made = stop
    return z


def decoded_frame(vae, z, number, chunk):
    """One frame (3,H,W) of scaled latents (1,T,4,h,w), decoded with its neighbours."""
    first = max(0, number - chunk // 2)
    nearby = z[:, first:first + chunk] / exsvd.VAE_SCALE
    return torch.cat(list(decode(vae, nearby, chunk)))[number - first].clamp(-1, 1)


@torch.inference_mode()
def write_video(vae, latents, s, out):
    """Scaled latents (1,T,4,h,w) to a video file, chunk by chunk."""
    z = adjust(latents, s) / exsvd.VAE_SCALE
    with (on_device(latents.device, vae), data.VideoWriter(out, s["fps"], s) as video,
          tqdm(total=z.shape[1], desc="decoding", unit="frame") as bar):
        for frames in decode(vae, z, s["decode_chunk"]):
            video.write(to_pixels(frames))
            bar.update(len(frames))


@functools.cache
def warn(text):
    """Once per text, however many videos are made."""
    print(f"warning: {text}", file=sys.stderr)


def settings_of(a, family, svd, img, seed, video=None):
    """Every number that shapes the video: flags, and the family's defaults where there are none. No paths, no times.

    img (H,W,3); video: a Video to refine. Warns of what the model was not trained on.
    """
    chosen = DEFAULTS[family] | {flag: value for flag, value in vars(a).items() if value is not None}
    if a.sampler and a.eta is None:
        chosen["eta"] = 0.0  # the default belongs to the default sampler
    native = a.native or svd.unet.config.native_frames
    length = svd.unet.max_frames or native
    frames = a.frames or (len(video.latents) if video else length)
    if frames > length and not svd.unet.max_frames and not a.overlap:
        warn(f"{frames} frames, but this model without extension knows {native}: expect motion that jitters or fades "
             "after those (--extension for longer videos, --overlap for rounds, --native N if the model's is another)")
        length = frames
    overlap = a.overlap or max(1, length // 8)
    if frames > length and overlap >= length:
        raise data.MediaError(f"--overlap {overlap}: must be less than a round, which is {length} frames")
    for number, _ in a.keyframe:
        if number >= frames:
            raise data.MediaError(f"--keyframe {number}: the video has the frames 0 to {frames - 1}")
    if video and a.fps is None:
        chosen["fps"] = max(1.0, video.fps * frames / len(video.latents))  # as fast as it was
    trained = DEFAULTS[family]["size"]
    area = math.prod(trained)
    if video:
        height, width = (8 * n for n in video.latents.shape[2:])
    else:
        width, height = a.size or data.default_size(img.shape[1], img.shape[0], area)
    if a.offload and a.decode_chunk is None:  # about 3 GB: 4 frames of 1024x1024 at once, 16 of 512x512
        chosen["decode_chunk"] = max(4, min(chosen["decode_chunk"], 2**22 // (width * height)))
    longest = max(width / height, height / width)
    if not video and not (area / 2 <= width * height <= area * 2 and longest <= 2):
        warn(f"{width}x{height}, but {family} was trained on {trained[0]}x{trained[1]}: expect repetition or blur "
             "(make it at that size, and then larger: --video FILE --size WxH)")
    for key in ("fps", "motion"):
        low, high = chosen[f"{key}_range"]
        if not low <= chosen[key] <= high:
            warn(f"{key} {chosen[key]:g}, but {family} was trained on {low} to {high}: expect artefacts")
    published = svd.extension == {}  # names of the ExVideo release and none of our metadata: only that is corrected
    return dict(
        family=family,
        frames=frames,
        round=length,
        overlap=overlap,
        width=width,
        height=height,
        steps=chosen["steps"],
        schedule=a.schedule,
        sampler=chosen["sampler"],
        eta=chosen["eta"],
        share_noise=chosen["share_noise"],
        cfg=list(chosen["cfg"]),
        cfg_interval=a.cfg_interval,
        fps=chosen["fps"],
        motion=chosen["motion"],
        aug=chosen["aug"],
        seed=seed,
        strength=a.strength if video else None,
        end=bool(a.end),
        keyframes=[number for number, _ in a.keyframe],
        dtype=a.dtype,
        decode_chunk=chosen["decode_chunk"],
        match_stats=chosen.get("match_stats", published),
        contrast=chosen.get("contrast", 1.2 if published else 1.0),
    )


def latents_path(out):
    """Where the latents of a video are kept: beside it."""
    stem = out.rstrip("/") if out.endswith("/") else os.path.splitext(out)[0]
    return stem + ".latents.safetensors"


def check_writable(out, fps):
    """Better to fail now than after an hour: tried out in the output's folder, or where that is going to be made."""
    data.VideoWriter(out, fps)  # writes nothing yet, but refuses names it can't write
    folder = os.path.dirname(os.path.abspath(out))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise data.MediaError(f"{out}: {folder} cannot be written to ({e.strerror}); choose another --out") from None


def saved_latents(path, toy):
    """What an earlier run saved: scaled latents (1,T,4,h,w) and the settings they were made with. toy: whether the
    model is one now, whose latents are no other's."""
    file = exsvd.Tensors(path)
    s = file.meta.get("settings")
    shape = tuple(file.shape("latents")) if "latents" in file.names else None
    needed = {"family", "frames", "width", "height", "fps", "dtype", "decode_chunk", "match_stats", "contrast"}
    if not isinstance(s, dict) or needed - s.keys() or shape != (1, s["frames"], 4, s["height"] // 8, s["width"] // 8):
        raise exsvd.WeightsError(f"{path} holds no latents saved by sample.py, whose names end in .latents.safetensors")
    if toy != (s["family"] == "toy"):
        raise exsvd.WeightsError(f"{path} was made by a model of the {s['family']} family: give its --model")
    latents = file.get("latents")
    if not latents.isfinite().all():
        raise exsvd.WeightsError(f"{path}: the latents are not finite; sample again, with --dtype bfloat16 or float32")
    return latents, s


def decode_again(a, model, toy, device):
    """--decode-only: a video from the latents that an earlier run saved."""
    latents, s = saved_latents(a.decode_only, toy)
    out = a.jobs[0][2]
    if a.contrast:
        latents[:, s.get("keyframes", [])] *= s["contrast"] / a.contrast  # their pictures stay as they are given
    for flag in ("fps", "decode_chunk", "match_stats", "contrast", "dtype"):
        if getattr(a, flag) is not None:
            s[flag] = getattr(a, flag)
    vae = exsvd.load(model, None, getattr(torch, s["dtype"]), device, parts=("vae",)).vae
    write_video(vae, latents.to(device), s, out)
    print(f"{out}: {s['frames']} frames of {s['width']}x{s['height']} at {s['fps']:g} fps, "
          f"{peak_memory(device)} at the peak")


# A video to refine, as it is seen. latents: scaled (n,4,h,w), on the CPU; first: its first frame, uint8 (H,W,3)
Video = namedtuple("Video", "latents fps first")


@torch.inference_mode()
def open_video(a, saved, vae, device):
    """--video, at --size or its own. saved: what check_video() gave."""
    if saved:
        latents, s = saved
        shown = adjust(latents, s)
        with on_device(device, vae):
            first = decoded_frame(vae, shown.to(device), 0, s["decode_chunk"])
        return Video(shown[0], s["fps"], to_pixels(first[None])[0])
    latents, times, first = [], [], None
    with on_device(device, vae), tqdm(desc="encoding", unit="frame") as bar:
        for frame, seconds, declared in data.video_frames(a.video):  # one by one: the whole of it may not fit memory
            if first is None:
                H, W = frame.shape[:2]
                first, size = frame, a.size or data.default_size(W, H, W * H)
            fitted = data.fit_image(frame, *size)[None].to(device)
            latents.append(vae.encode(fitted)[0].float().cpu() * exsvd.VAE_SCALE)
            times.append(seconds)
            bar.update()
    return Video(torch.stack(latents), data.frame_rate(times, declared), first)


def check_video(a, toy):
    """Before the networks are loaded: whether --video can be read, and has the --size if it is latents. -> these and
    their settings, None of a video itself"""
    if not a.video.endswith(".safetensors"):
        if len(list(itertools.islice(data.video_frames(a.video), 2))) < 2:
            raise data.MediaError(f"{a.video}: holds a single picture: give it as IMAGE, without --video")
        return None
    latents, s = saved_latents(a.video, toy)
    width, height = a.size or (s["width"], s["height"])
    if (width, height) != (s["width"], s["height"]):
        raise data.MediaError(f"--size {width}x{height}: the latents are of {s['width']}x{s['height']}; give the "
                              "video itself to --video, or leave --size out")
    return latents, s


def resampled(latents, frames):
    """So many of a video's latents (n,4,h,w), evenly spaced: (1,frames,4,h,w)."""
    return latents[torch.linspace(0, len(latents) - 1, frames).round().long()][None]


def load(a, model, extension, toy, device):
    """The three networks, ready to sample, and the family they belong to."""
    a.dtype = a.dtype or ("float32" if toy and device.type == "cpu" else "bfloat16")
    svd = exsvd.load(model, extension, getattr(torch, a.dtype), "cpu" if a.offload else device)
    if a.offload:
        svd.unet.stream = exsvd.Stream(svd.unet, device)
    if a.compile:
        exsvd.compile_blocks(svd.unet)
    family = "toy"
    if not toy:
        family = "ExVideo" if svd.unet.max_frames else "SVD"
    parameters = sum(p.numel() for p in svd.unet.parameters())
    print(f"{family}: {parameters / 1e6:.1f} M parameters in the UNet, {a.dtype} on {device}")
    return svd, family


def make_video(svd, img, s, device, out, video=None, end=None, keyframes={}):
    """One image (H,W,3), uint8, to a video file, and its latents to a file beside it. The rest as in make_latents().

    Raises FloatingPointError if the latents are not finite.
    """
    def fit(picture):
        return data.fit_image(picture, s["width"], s["height"])

    begin = time.perf_counter()
    start = video and resampled(video.latents, s["frames"]).to(device) / s["contrast"]  # adjust() puts it back
    latents = make_latents(svd, fit(img), s, device, start,
                           None if end is None else fit(end), {i: fit(frame) for i, frame in keyframes.items()})
    sampled = time.perf_counter()
    if not latents.isfinite().all():
        raise FloatingPointError(f"{out}: the latents are not finite; try another --dtype than {s['dtype']}")
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    exsvd.save(latents_path(out), {"latents": latents}, {"settings": s})  # an hour's work, should the decoder fail
    try:
        write_video(svd.vae, latents, s, out)
    except BaseException:
        print(f"the latents are safe: go on with --decode-only '{latents_path(out)}'", file=sys.stderr)
        raise
    print(f"{out}: {s['frames']} frames of {s['width']}x{s['height']} at {s['fps']:g} fps, "
          f"{sampled - begin:.1f} s to sample, {time.perf_counter() - sampled:.1f} s to decode, "
          f"{peak_memory(device)} at the peak")


def main(argv=None):
    """The command. Raises WeightsError, MediaError, FloatingPointError and OSError for what the caller can mend."""
    a = parse(argv)
    warn.cache_clear()
    for _, _, out in a.jobs:
        check_writable(out, a.fps or 1)
    device = torch.device(a.device)
    model, extension = default_model(a)
    toy = exsvd.open_model(model)[0]["unet"].meta.get("family") == "toy"
    if toy and device.type == "cpu":
        torch.set_num_threads(1)  # networks this small lose more to threads that wait for each other than they gain
    if a.decode_only:
        decode_again(a, model, toy, device)
        return

    saved = check_video(a, toy) if a.video else None
    end = data.read_image(a.end) if a.end else None
    keyframes = {number: data.read_image(path) for number, path in a.keyframe}
    svd, video, failed = None, None, []

    def fail(out, error):  # the others of a batch are made all the same
        if not a.batch:
            raise error
        print(f"sample.py: {error}", file=sys.stderr)
        failed.append(out)

    for image, seed, out in a.jobs:
        if a.batch and os.path.exists(out) and not a.overwrite:
            print(f"{out}: is there, and skipped (--overwrite makes it again)")
            continue
        try:
            img = data.read_image(image) if a.images else None
        except data.MediaError as e:
            fail(out, e)
            continue
        if svd is None:
            svd, family = load(a, model, extension, toy, device)
        if a.video and video is None:
            video = open_video(a, saved, svd.vae, device)
        if img is None:
            img = video.first
        s = settings_of(a, family, svd, img, seed, video)
        check_writable(out, s["fps"])  # once more: a video to refine may be too fast for a GIF
        try:
            make_video(svd, img, s, device, out, video, end, keyframes)
        except FloatingPointError as e:
            fail(out, e)
    if failed:
        raise data.MediaError(f"{len(failed)} of {len(a.jobs)} videos were not made: {', '.join(failed)}")


# What to try where memory runs out, cheapest first.
OUT_OF_MEMORY = """out of memory. While sampling, from what costs least to what costs most:
    --dtype bfloat16    half of what --dtype float32 takes
    --offload           only the network at work is on the device: some seconds more per video
    --frames 64         fewer frames: a shorter video
    --size 512x320      fewer pixels: less detail
While decoding, which went down to one frame at a time by itself: --decode-only FILE (no UNet in memory), or --size."""


def command(argv=None):
    """main(), for a shell: what the user can mend is one line and exit code 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("sample.py: terminated"))  # an exception, which leaves no rubbish
    try:
        main(argv)
    except (exsvd.WeightsError, data.MediaError, FloatingPointError, OSError) as e:
        sys.exit(f"sample.py: {e}")
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped")
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        sys.exit(f"sample.py: {OUT_OF_MEMORY}")


if __name__ == "__main__":
    command()
