"""Image to video.

    python sample.py assets/img.png                                # the toy in this repository
    python sample.py photo.jpg --model svd_xt.safetensors --extension model.fp16.safetensors
    python sample.py photo.jpg --end last.jpg                      # the same picture twice: a loop
    python sample.py photo.jpg --frames 300 --keyframe 200=c.png   # in rounds, beyond its length
    python sample.py photo.jpg --video out/photo.mp4 --steps 25 --size 1024x1024    # a second pass
    python sample.py photos/*.jpg --seeds 5                        # a batch; what exists is skipped
    python sample.py images/*.png --out 'videos/{name}.mp4'        # VBench: <prompt>-<0..4>.png
    python sample.py photo.jpg --unet animatelcm_svd.safetensors --sampler lcm --steps 4 --cfg 1 1.2
    python sample.py --decode-only out/photo.latents.safetensors   # decode saved latents again

In this order: the samplers, the settings, the conditioning, sampling, decoding, memory, latents
from files, the command. The image is encoded by CLIP and the VAE, a sampler removes the noise level
by level, the latents are saved, then decoded in overlapping chunks and streamed to a video file.
Arithmetic on latents is float32. On eight GPUs, torchrun --nproc_per_node 8 sample.py ... shares
out the videos.

Stability's own script also adds an invisible watermark and runs a safety filter. This one does
neither.
"""

import argparse
import hashlib
import itertools
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import exsvd

HERE = os.path.dirname(os.path.abspath(__file__))

# --------------------------------------------------------------------------------------------------
# Samplers: pure functions f(denoise, x, sigmas, s, draw) -> clean latents. denoise(x, sigma) -> D,
# the estimate of the clean latents. x carries noise of sigmas[0]; sigmas fall and end in 0; s are
# the Settings; draw() -> standard normal noise of x's shape. A new sampler is a function and its
# entry in SAMPLERS.


def euler(denoise, x, sigmas, s, draw):
    """Euler's method (EDM, algorithm 1 without its correction): x moves on the line to D."""
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        D = denoise(x, sigma)
        x = D + (x - D) * (sigma_next / sigma)
    return x


def ddim(denoise, x, sigmas, s, draw):
    """DDIM (Song et al. 2020, eq. 12 and 16) in EDM's variables, alpha-bar = 1/(1 + sigma^2).

    With s.eta = 0 it is Euler's method. With s.eta = 1 it replaces as much noise by fresh noise as
    ancestral sampling.
    """
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        D = denoise(x, sigma)
        fresh = s.eta * sigma_next * (1 - (sigma_next / sigma) ** 2).sqrt()
        remaining = (sigma_next**2 - fresh**2).sqrt()
        x = D + (x - D) * (remaining / sigma)
        if s.eta > 0:
            x = x + fresh * draw()
    return x


def heun(denoise, x, sigmas, s, draw):
    """EDM, algorithm 1 without fresh noise: a second evaluation corrects each step but the last."""
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        d = (x - denoise(x, sigma)) / sigma
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            d_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2
        x = x_next
    return x


def dpm(denoise, x, sigmas, s, draw):
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095, algorithm 2): second order at the cost of
    Euler's method.

    It is Euler's step towards another D: the one that a line through the last two D, over ln sigma,
    has in mid-step.
    """
    D_before = None
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        D = target = denoise(x, sigma)
        if D_before is not None and sigma_next > 0:
            slope = (D - D_before) / (sigmas[i - 1] / sigma).log()
            target = D + slope * (sigma / sigma_next).log() / 2
        x = target + (x - target) * (sigma_next / sigma)
        D_before = D
    return x


def lcm(denoise, x, sigmas, s, draw):
    """Latent consistency sampling (Luo et al. 2023, arXiv:2310.04378): D itself, with fresh noise
    of the next level."""
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        x = denoise(x, sigma)
        if sigma_next > 0:
            x = x + sigma_next * draw()
    return x


# Align Your Steps (Sabour et al. 2024, arXiv:2404.14507): ten steps for SVD. The last level is 0,
# as in diffusers.
AYS = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)


def ays_sigmas(steps):
    """AYS for any number of steps, by linear interpolation of ln sigma: (steps + 1,), float32."""
    logs = torch.tensor(AYS, dtype=torch.float64).log()
    at = torch.linspace(0, len(AYS) - 1, steps + 1, dtype=torch.float64)
    left = at.long().clamp(max=len(AYS) - 2)
    sigmas = torch.lerp(logs[left], logs[left + 1], at - left).exp()
    sigmas[-1] = 0
    return sigmas.float()


def lcm_sigmas(steps):
    """The levels AnimateLCM-SVD was distilled on: evenly spaced entries of the 40 Karras sigmas,
    then 0: (steps + 1,)"""
    levels, steps = exsvd.karras_sigmas(40), min(steps, 40)
    return torch.cat([levels[[40 * i // steps for i in range(steps)]], levels[-1:]])


class Sampler(NamedTuple):
    function: Callable
    passes: Callable = lambda steps: steps  # through the UNet, in a number of steps
    schedule: str = "karras"                # its own, where --schedule does not say
    eta: bool = False                       # whether it reads s.eta


# steps -> sigmas (steps + 1,)
SCHEDULES = {"karras": exsvd.karras_sigmas, "ays": ays_sigmas, "lcm": lcm_sigmas}
SAMPLERS = {
    "euler": Sampler(euler),
    "ddim": Sampler(ddim, eta=True),
    "heun": Sampler(heun, passes=lambda steps: 2 * steps - 1),
    "dpm++": Sampler(dpm),
    "lcm": Sampler(lcm, schedule="lcm"),
}

# --------------------------------------------------------------------------------------------------
# Settings. A setting is one line: name, default, check, help. The flags of sample.py and train.py
# are made from these lines. What a model's file says is read as if it had been given as flags.


def number(low, high=math.inf, kind=float):
    """A check: a number from low to high. A check turns a flag's text into its value, or raises
    ArgumentTypeError."""
    def check(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value < math.inf):
            what = "a whole number" if kind is int else "a number"
            limit = f", at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text}: must be {what} of at least {low}{limit}")
        return value
    return check


integer = partial(number, kind=int)


def setting(default, check, help, in_file=True, flag=None, **options):
    """A field of a Settings class. check: a function of the flag's text; the names allowed; bool;
    or str for a path. in_file: whether a model's file may hold it; a path never may. options: more
    of argparse's, such as nargs."""
    if check is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif callable(check):
        metavar = {str: "FILE", data.frame_size: "WxH"}.get(check, "N")
        options |= {"type": check, "metavar": metavar}
    else:
        options["choices"] = tuple(check)
    if default is not None and check is not bool:
        help += f" [{' '.join(words(default, options.get('nargs')))}]"
    options |= {"help": help, "default": argparse.SUPPRESS}
    return field(default=default, metadata={
        "in_file": in_file and check is not str, "flag": flag, "options": options})


def add_flags(parser, cls):
    """A flag for each setting of a class. What is not given is not in the parsed namespace."""
    for f in fields(cls):
        flag = f.metadata["flag"] or "--" + f.name.replace("_", "-")
        parser.add_argument(flag, dest=f.name, **f.metadata["options"])


def words(value, nargs=None):
    """A value as on a command line: (8, 2) as 8 2 for a flag of two numbers, else as 8x2."""
    parts = value if isinstance(value, (list, tuple)) else ()
    if parts and (nargs == 2 or isinstance(parts[0], (list, tuple))):
        return [word for part in parts for word in words(part)]
    return ["{}x{}".format(*parts) if len(parts) == 2 else str(value)]


def checked(cls, values, source):
    """Settings {name: value} of a class, checked as if they had been given as flags, without those
    that are None. Raises WeightsError, which names the source, for what a flag would refuse, and
    for a path."""
    settings, known = {}, {f.name: f.metadata for f in fields(cls) if f.metadata["in_file"]}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_flags(parser, cls)
    for name, value in values.items():
        def refuse(message):
            raise exsvd.WeightsError(f"{source}: its setting {name} is not usable: {message}")

        parser.error = refuse
        if value is None:
            continue
        if name not in known:
            refuse("no file may set it")
        argv = [("--no-" if value is False else "--") + name.replace("_", "-")]
        if not isinstance(value, bool):
            argv += words(value, known[name]["options"].get("nargs"))
        value = vars(parser.parse_args(argv))[name]
        settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def settings_in_file(cls, meta, part, path):
    """The settings that a model's file holds in meta["defaults"][part], see checked()."""
    return checked(cls, (meta or {}).get("defaults", {}).get(part, {}), path)


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """What shapes a video. The defaults are those of the ExVideo authors' tool for their
    release."""
    frames: int = setting(None, integer(1), "frames to make, in rounds where the model knows fewer [all it knows]")
    overlap: int = setting(None, integer(1), "frames that a round shares with the one before [an eighth of a round]")
    size: tuple = setting((512, 512), data.frame_size, "multiples of 64 [as many pixels; a model file's is exact]")
    steps: int = setting(50, integer(1), "noise levels")
    sampler: str = setting("euler", SAMPLERS, "heun costs twice, dpm++ needs fewer steps, ddim adds noise (--eta)")
    schedule: str = setting(None, SCHEDULES, "noise levels; ays (Align Your Steps) is for 10 steps [the sampler's]")
    eta: float = setting(0.0, number(0, 1), "share of the noise that ddim replaces by fresh noise at each step")
    share_mean: bool = setting(False, bool, "noise of the same mean in all frames, against a tint that flickers")
    cfg: tuple = setting((2.0, 2.0), number(0), "guidance on the first and the last frame; 1 is none", nargs=2)
    cfg_interval: tuple = setting(None, number(0), "guide at noise levels in (LOW, HIGH] only [0.002 to 700]", nargs=2)
    fps: float = setting(30.0, number(1, 1000), "frames per second, of the conditioning and of the file")
    motion: float = setting(127.0, number(0), "amount of motion: 0 to 255 for SVD, 0 to 127 for ExVideo's release")
    aug: float = setting(0.02, number(0), "noise added to the image, which frees the motion from it")
    seed: int = setting(0, integer(0, 2**32 - 1), "for all noise, drawn on the CPU: the same on every device")
    strength: float = setting(0.5, number(0.01, 1), "with --video: how much is made anew; 1 is everything")
    decode_chunk: int = setting(16, integer(1), "frames decoded at once; fewer need less memory")
    match_stats: bool = setting(False, bool, "give the latents of every frame the mean and deviation of the video")
    contrast: float = setting(1.0, number(0.01), "factor on the latents before they are decoded")
    encode_scale: float = setting(exsvd.VAE_SCALE, number(0.01), "factor on latents of --video and --keyframe")
    native: int = setting(None, integer(1), "frames the base knows: 14 for svd.safetensors [as its file says, or 25]")
    dtype: str = setting(None, DTYPES, "number format of the networks [by device: exsvd.best_dtype]")


# Published files hold no defaults, so theirs are here. SVD without an extension runs as in
# diffusers' pipeline, with the chunks of 14 frames of Stability's script (diffusers decodes all
# frames at once).
SVD_DEFAULTS = dict(size=(1024, 576), steps=25, cfg=(1.0, 3.0), fps=7.0, decode_chunk=14)

# The authors' tool corrects the latents of their release: every frame gets the statistics of the
# whole video, and all are multiplied by 1.2. The likely reason was read off their code and is not
# confirmed: its training targets are scaled by SDXL's 0.13025 instead of 0.18215, so the weights
# aim at too little contrast. Videos and key frames that are given enter at that scale as well.
RELEASE_DEFAULTS = dict(match_stats=True, contrast=1.2, encode_scale=exsvd.EXVIDEO_ENCODE_SCALE)


def defaults_of(meta, extension_meta, model="the model", extension="the extension"):
    """The settings that the files of a model hold, the extension's before the model's: {name:
    value}. meta, extension_meta: of exsvd.SVD. Raises WeightsError, see checked()."""
    in_model = settings_in_file(Settings, meta, "sample", model)
    return in_model | settings_in_file(Settings, extension_meta, "sample", extension)


def settings_for(svd, given=None, model="the model", extension="the extension"):
    """-> Settings of a model: its defaults, then what is given {name: value}. What depends on the
    image may be None, see complete()."""
    published = {}
    if svd.unet.max_frames is None and not svd.meta:
        published = SVD_DEFAULTS
    elif svd.extension == {}:  # an extension without our metadata is the release
        published = RELEASE_DEFAULTS
    in_files = defaults_of(svd.meta, svd.extension, model, extension)
    s = Settings(**(published | in_files | (given or {})))
    dtype = str(svd.unet.conv_out.weight.dtype).removeprefix("torch.")
    return replace(s, native=s.native or svd.unet.config.native_frames, dtype=dtype,
                   schedule=s.schedule or SAMPLERS[s.sampler].schedule)


def complete(svd, given=None, picture=None, video=None, keyframes=()):
    """-> Settings of one video, in which nothing that depends on its image is None: what is given
    {name: value}, then the model's, see settings_for(), then what follows from model and image.

    picture: (W, H) of the image. video: a Video to refine. keyframes: their numbers. Raises
    MediaError if these do not fit together.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    s = settings_for(svd, given)
    known = svd.unet.max_frames or s.native
    frames = given.get("frames") or (len(video.latents) if video else s.frames or known)
    size, fps, chunk, overlap = s.size, s.fps, s.decode_chunk, s.overlap
    if video:
        h, w = video.latents.shape[2:]
        size = 8 * w, 8 * h
        if "fps" not in given:
            fps = max(1.0, video.fps * frames / len(video.latents))  # as fast as it was
    elif picture and "size" not in defaults_of(svd.meta, svd.extension) | given:
        # published models take any aspect ratio
        size = data.default_size(*picture, math.prod(size))
    if svd.unet.stream and "decode_chunk" not in given:  # 3 GB decode 4 frames of 1024x1024
        chunk = max(4, min(chunk, 4_000_000 // math.prod(size)))
    if overlap is None and svd.unet.max_frames:
        overlap = max(1, known // 8)
    if frames > known and overlap is None:
        print(f"warning: {frames} frames, but this model knows {known}: motion may jitter or fade "
              "after those (--extension for longer videos, --overlap for rounds)", file=sys.stderr)
    elif frames > known and overlap >= known:
        raise data.MediaError(f"--overlap {overlap}: must be less than a round of {known} frames")
    if max(keyframes, default=0) >= frames:
        raise data.MediaError(f"--keyframe: the video has the frames 0 to {frames - 1}")
    usual = replace(settings_for(svd), eta=0.0)  # a model's own eta is for its own sampler
    for name, has_effect, where in (
            ("eta", SAMPLERS[s.sampler].eta, "--sampler ddim"), ("strength", video, "--video"),
            ("encode_scale", video or keyframes, "--video or --keyframe"),
            ("cfg_interval", set(s.cfg) != {1}, "--cfg other than 1")):
        if not has_effect and given.get(name) not in (None, getattr(usual, name)):
            print(f"warning: {name} has no effect without {where}", file=sys.stderr)
    return replace(s, frames=frames, size=size, fps=fps, decode_chunk=chunk, overlap=overlap)


# --------------------------------------------------------------------------------------------------
# Conditioning


def condition(svd, img, aug, noise, device):
    """Conditioning on an image (3,H,W) in [-1,1]: image latents (1,1,4,h,w), unscaled, and ctx
    (1,1,D)."""
    img = img[None].to(device)  # CLIP too sees it at the size of the video
    ctx = svd.clip(exsvd.preprocess_clip(img, svd.clip.config.image))[:, None]
    return svd.vae.encode(img + aug * noise.to(device))[:, None], ctx


def guided(unet, image_latents, ctx, ids, cfg, frames, interval=None):
    """denoise(x, sigma) with guidance, which goes linearly over the frames from cfg[0] on the first
    to cfg[1].

    Guidance of 1 on all frames costs nothing; below 1 it weakens the influence of the image.
    interval: guide only at noise levels in (low, high] (Kynkaanniemi et al. 2024, arXiv:2404.07724,
    section 3); the other steps cost half.
    """
    scale = torch.linspace(*cfg, frames, device=ctx.device).view(1, -1, 1, 1, 1)

    def denoise(x, sigma):
        inside = interval is None or interval[0] < sigma <= interval[1]
        sigma = sigma.to(x).expand(len(x))
        D = exsvd.denoise(unet, x, sigma, image_latents, ctx, ids)
        if set(cfg) != {1} and inside:  # in a second pass: a batch of two takes twice the memory
            nothing = torch.zeros_like(image_latents), torch.zeros_like(ctx)
            D0 = exsvd.denoise(unet, x, sigma, *nothing, ids)
            D = D0 + scale * (D - D0)
        return D

    return denoise


def time_reversal_fusion(forward, backward, frames):
    """denoise(x, sigma) of a video that begins and ends with given images (Feng et al. 2024,
    arXiv:2403.14611).

    forward is conditioned on the first image; backward on the last one, and sees the frames in
    reverse order. Their estimates are blended: the first frame is forward's alone, the last one
    backward's. The authors' code draws one noise for both conditioning images and adds rounds of
    noise. Here each image has its own, and there are no rounds.
    """
    def denoise(x, sigma):
        weight = torch.linspace(0, 1, frames, device=x.device).view(1, -1, 1, 1, 1)
        return torch.lerp(forward(x, sigma), backward(x.flip(1), sigma).flip(1), weight)

    return denoise


def with_known_frames(denoise, known, weight):
    """denoise(x, sigma) that draws frames to known latents (1,T,4,h,w), by weights (T,) from 0 to
    1.

    At weight 1 the estimate is the known frame, so samplers keep x at known + sigma * noise, as the
    official ExVideo code does with masked frames, and end with the known frame itself.
    """
    weight = weight.view(1, -1, 1, 1, 1).to(known.device)
    return lambda x, sigma: torch.lerp(denoise(x, sigma), known, weight)


# --------------------------------------------------------------------------------------------------
# Sampling


def round_length(unet, s):
    """Frames of one round: all, or where the model knows fewer, its most. A base makes any number
    in one round, beyond its native length at lower quality, unless s.overlap asks for rounds."""
    if unet.max_frames is None and s.overlap is None:
        return s.frames
    return min(s.frames, unet.max_frames or s.native)


def rounds(frames, length, overlap):
    """A long video in rounds of `length` frames that begin with `overlap` frames of the one before:
    [(start, stop), ...]

    The last round overlaps by as many as it takes. A round is conditioned on its own first frame,
    which the round before has made, since SVD was trained on that. Its overlapping frames are drawn
    to those of the round before by weights that fall to 0: with weights of 1 a join shows more.
    """
    starts = [0]
    while starts[-1] + length < frames:
        starts.append(min(starts[-1] + length - overlap, frames - length))
    return [(start, min(start + length, frames)) for start in starts]


def noise_levels(s, refine):
    """Sigmas (n + 1,) on the CPU, so that no step waits for the device to compare them. refine:
    start from a video.

    The authors' second pass spreads all steps over what s.strength leaves of the Karras ramp
    (DiffSynth's scheduler). Other schedules keep the last s.strength of their levels.
    """
    if refine and s.schedule == "karras":
        low, high = (sigma ** (1 / exsvd.RHO) for sigma in (exsvd.SIGMA_MIN, exsvd.SIGMA_MAX))
        sigma_max = (s.strength * high + (1 - s.strength) * low) ** exsvd.RHO
        return exsvd.karras_sigmas(s.steps, sigma_max=sigma_max)
    sigmas = SCHEDULES[s.schedule](s.steps)
    return sigmas[-1 - max(1, round(s.strength * s.steps)):] if refine else sigmas


def adjust(z, s, keyframes=()):
    """Frame statistics and contrast, see RELEASE_DEFAULTS: (1,T,4,h,w) -> (1,T,4,h,w).

    keyframes: numbers of frames whose statistics stay as they are."""
    if s.match_stats:
        mean = z.mean(dim=(2, 3, 4), keepdim=True)
        std = z.std(dim=(2, 3, 4), keepdim=True)
        matched = (z - mean) / std.clamp(min=1e-6) * z.std() + z.mean()  # a frame may be uniform
        kept = [n for n in keyframes if n < z.shape[1]]
        matched[:, kept] = z[:, kept]
        z = matched
    return z * s.contrast


@torch.inference_mode()
def make_latents(svd, img, s, device, video=None, end=None, keyframes={}):
    """One image (3,H,W) in [-1,1] to latents, scaled by VAE_SCALE: (1,T,4,H/8,W/8) on the device.

    s: Settings as complete() returns them. video: unscaled latents (1,T,4,H/8,W/8) to start from
    instead of noise. end: the image (3,H,W) of the last frame. keyframes: {number: image}.
    """
    H, W = img.shape[1:]
    generator = torch.Generator().manual_seed(s.seed)
    length = round_length(svd.unet, s)
    sigmas = noise_levels(s, video is not None)
    spans = rounds(s.frames, length, s.overlap or 1)
    sampler = SAMPLERS[s.sampler]
    ids = exsvd.unet_ids(svd.unet.config.ids, asdict(s), device)

    def draw():  # on the CPU: a seed gives the same video on every device
        noise = torch.randn(1, length, 4, H // 8, W // 8, generator=generator)
        if s.share_mean:  # frames stay standard normal: a mean and the rest are independent
            mean = noise.mean(dim=(3, 4), keepdim=True)
            noise = noise - mean + mean[:, :1]
        return noise.to(device)

    def conditioned(img, own_latents=None):
        image_noise = torch.randn(1, 3, H, W, generator=generator)
        image_latents, ctx = condition(svd, img, s.aug, image_noise, device)
        if own_latents is not None:  # decoding and encoding them loses contrast in each round
            image_latents = own_latents
        return guided(svd.unet, image_latents, ctx, ids, s.cfg, length, s.cfg_interval)

    if video is None:
        z = torch.zeros(1, s.frames, 4, H // 8, W // 8, device=device)
        level = (sigmas[0]**2 + 1).sqrt()  # latents, here unknown, have a variance of about 1
    else:
        z, level = video.to(device) * s.encode_scale, sigmas[0]
    known = torch.zeros(s.frames)  # 1 for key frames, whose latents z holds
    with on_device(device, *([svd.vae] if keyframes else ())):
        for n, frame in keyframes.items():
            z[:, n] = svd.vae.encode(frame[None].to(device)) * s.encode_scale
            known[n] = 1
    made = 0                       # frames that earlier rounds have made
    passes = len(spans) * sampler.passes(len(sigmas) - 1)
    with tqdm(total=passes, desc="sampling", unit="pass") as bar:
        for start, stop in spans:
            noise, own_latents = draw(), None
            if start > 0:  # on its own first frame as it is shown, without noise whatever s.aug
                shown = adjust(z[:, :made], s, keyframes)
                img = decoded_frame(svd.vae, shown, start, s.decode_chunk)
                own_latents = shown[:, start:start + 1] / exsvd.VAE_SCALE
            with on_device(device, svd.clip, svd.vae):
                denoise = conditioned(img, own_latents)
                if end is not None and stop == s.frames:
                    denoise = time_reversal_fusion(denoise, conditioned(end), length)
            weight = known[start:stop].clone()
            ramp = torch.linspace(1, 0, made - start + 1)[:-1]  # falls to 0: see rounds()
            weight[:len(ramp)] = torch.maximum(weight[:len(ramp)], ramp)
            if start > 0 or keyframes:
                denoise = with_known_frames(denoise, z[:, start:stop].clone(), weight)

            def counted(x, sigma):  # draws no random numbers, so that it can be repeated
                smaller = [n for n in SLICES if n < (svd.unet.slice_size or math.inf)]
                D = unless_full(lambda: denoise(x, sigma), smaller)
                if D is None:
                    svd.unet.slice_size = smaller[0]
                    print(f"out of memory: sampling goes on in slices of {smaller[0]:,} elements",
                          file=sys.stderr)
                    return counted(x, sigma)
                bar.update()
                return D

            with on_device(device, svd.unet):
                x = z[:, start:stop] + level * noise
                z[:, start:stop] = sampler.function(counted, x, sigmas, s, draw)
            made = stop
    return z


# --------------------------------------------------------------------------------------------------
# Decoding


def is_out_of_memory(error):
    """Whether an error means a full memory. The CPU, cuDNN and cuBLAS raise no type of their own,
    so their messages are searched."""
    phrases = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(p in str(error) for p in phrases)


@contextmanager
def full_memory(advice):
    """For `with`, or for a function: a full memory of any device raises MemoryError(advice)."""
    try:
        yield
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        raise MemoryError(advice) from e


def unless_full(work, can_shrink):
    """work(), or None if the memory was full and the work can be cut smaller."""
    try:
        return work()
    except RuntimeError as e:
        if not is_out_of_memory(e) or not can_shrink:
            raise
    torch.cuda.empty_cache()  # out here the exception no longer keeps the work's tensors alive


def decode(vae, z, chunk):
    """Decode in time: unscaled latents (1,T,4,h,w) -> yields float32 (n,3,8h,8w) on the CPU, T
    frames in all.

    Chunks of `chunk` frames overlap by a quarter (at least by 4 frames, or half a chunk if that is
    less) and are blended by a linear ramp, so memory does not grow with T. It is not the same as
    VAE.decode of everything, whose norms see all frames. A full memory halves the chunk.
    """
    T, start, tail = z.shape[1], 0, None
    while start < T:
        end = min(start + chunk, T)
        first = max(0, end - chunk)  # the last chunk is as long as the others, its head is dropped
        frames = unless_full(lambda: vae.decode(z[:, first:end])[0, start - first:].float().cpu(),
                             chunk > 1)
        if frames is None:
            chunk //= 2
            print(f"out of memory: decoding goes on with chunks of {chunk} frames", file=sys.stderr)
            if tail is not None and chunk <= len(tail):  # too short to blend with the larger one
                yield tail
                start, tail = start + len(tail), None
            continue
        if tail is not None:
            # A chunk's outermost frame saw zero padding in place of its neighbour: it has weight 0.
            # Of one or two common frames all are outermost, and the errors partly cancel.
            n = len(tail)
            ramp = torch.linspace(0, 1, n) if n > 2 else torch.arange(1, n + 1) / (n + 1)
            blended = torch.lerp(tail, frames[:n], ramp.view(-1, 1, 1, 1))
            frames = torch.cat([blended, frames[n:]])
        overlap = 0
        if end < T:
            overlap = max(chunk // 4, min(4, chunk // 2))  # below 4 frames seams show
        yield frames[:len(frames) - overlap]
        start, tail = end - overlap, frames[len(frames) - overlap:]


def decoded_frame(vae, z, n, chunk):
    """Frame n, (3,H,W), of scaled latents (1,T,4,h,w), decoded with its neighbours."""
    first = max(0, n - chunk // 2)
    nearby = z[:, first:first + chunk] / exsvd.VAE_SCALE
    with on_device(z.device, vae.decoder):
        return torch.cat(list(decode(vae, nearby, chunk)))[n - first].clamp(-1, 1)


@torch.inference_mode()
def generate(svd, image, settings=None, device=None, **given):
    """From a picture to all frames of its video: (T,3,H,W) in [-1,1], float32 on the CPU.

    image: a path, a Pillow image, uint8 (H,W,3), or float (3,H,W) in [-1,1]. It is scaled and
    cropped to the size of the video. settings: Settings; given: some by name, such as steps=25.
    What they leave open or None is completed as for the command, see complete(); a Settings leaves
    little open, so to change one thing about a model's own settings, give it by name. device: to
    compute on, by default where the UNet is. Raises MediaError.
    """
    pixels = isinstance(image, (torch.Tensor, np.ndarray))
    img = torch.as_tensor(image) if pixels else data.read_image(image)
    in_bytes = img.dtype == torch.uint8
    shape = img.shape if in_bytes else (*img.shape[1:], *img.shape[:1])  # (H, W, 3)
    low, high = (0, 255) if in_bytes else (-1.01, 1.01)
    if len(shape) != 3 or shape[2] != 3 or not low <= img.min() <= img.max() <= high:
        raise data.MediaError("a picture is uint8 (H,W,3), or float (3,H,W) from -1 to 1: got "
                              f"{img.dtype} {tuple(img.shape)} up to {img.max():g}")
    img = img if in_bytes else img.float()
    H, W, _ = shape
    given = checked(Settings, given, "generate()")
    s = complete(svd, (asdict(settings) if settings else {}) | given, (W, H))
    home = svd.unet.stream or next(svd.unet.parameters())
    device = torch.device(device or home.device)
    z = adjust(make_latents(svd, data.fit_image(img, *s.size), s, device), s) / exsvd.VAE_SCALE
    with on_device(device, svd.vae):
        return torch.cat(list(decode(svd.vae, z, s.decode_chunk))).clamp(-1, 1)


def to_pixels(frames):
    """float (n,3,H,W) in [-1,1] -> uint8 (n,H,W,3)"""
    return data.to_uint8(frames.clamp(-1, 1)).permute(0, 2, 3, 1)


def check_finite(x, message):
    if not x.isfinite().all():
        raise FloatingPointError(message)


@torch.inference_mode()
def write_video(vae, latents, s, out, keyframes=()):
    """Scaled latents (1,T,4,h,w) to a video file, chunk by chunk. Raises FloatingPointError if
    frames are not finite."""
    z = adjust(latents, s, keyframes) / exsvd.VAE_SCALE
    with (on_device(latents.device, vae.decoder), data.VideoWriter(out, s.fps, asdict(s)) as video,
          tqdm(total=z.shape[1], desc="decoding", unit="frame") as bar):
        for frames in decode(vae, z, s.decode_chunk):
            check_finite(frames, f"{out}: the frames are not finite in {s.dtype}: decode the saved "
                         f"latents with --decode-only {latents_path(out)} --dtype float32")
            video.write(to_pixels(frames))
            bar.update(len(frames))


# --------------------------------------------------------------------------------------------------
# Memory of a GPU: which networks live there, how the UNet cuts its work, what happens if it is full

SLICES = 4 * exsvd.Slices.size, exsvd.Slices.size, exsvd.Slices.size // 4  # of UNet.slice_size


def what_fits(svd, s, free):
    """-> (whether all three networks can stay in `free` bytes of a GPU, UNet.slice_size for them).

    Larger slices, or none, are faster (the factors are those of bench/compare.py). They change how
    results are rounded: statistics of norms, and kernels that a library chooses by shape.
    """
    unet, vae, clip = (sum(p.nbytes for p in m.parameters()) for m in (svd.unet, svd.vae, svd.clip))
    itemsize, pixels = svd.unet.conv_out.weight.itemsize, math.prod(s.size)
    n = round_length(svd.unet, s) * pixels // 64 * svd.unet.config.channels[0]
    needs = {size: itemsize * (6 * n + 10 * min(n, size or n)) for size in (None, *SLICES[:2])}
    size = next((size for size, need in needs.items() if unet + need <= free), SLICES[1])
    decoding = itemsize * 2 * svd.vae.config.channels[0] * (s.decode_chunk + 1) * pixels
    return unet + vae + clip + max(needs[size], decoding) <= free, size


USABLE = 0.9  # of free memory; the rest is for what PyTorch does not count, and for fragments


def free_bytes(device):
    """What a GPU has for more tensors: free memory, and what PyTorch holds but does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def place_networks(svd, s, device):
    """Before a video on a GPU: moves all networks there or, if they do not fit together, to CPU
    memory, from where on_device() lends them."""
    if device.type == "cuda" and svd.unet.stream is None:
        networks = svd.unet, svd.vae, svd.clip
        ours = sum(p.nbytes for m in networks for p in m.parameters() if p.is_cuda)
        free = free_bytes(device) + ours
        stay, svd.unet.slice_size = what_fits(svd, s, USABLE * free)
        for network in networks:
            network.to(device if stay else "cpu")


@contextmanager
def on_device(device, *modules):
    """Lends modules to a device: parameters elsewhere are replaced by copies for a while."""
    modules = [m for m in modules if getattr(m, "stream", None) is None]  # it moves itself
    at_home = []
    try:
        with torch.inference_mode(False):  # what is made in inference mode can't be trained again
            for module in itertools.chain(*(m.modules() for m in modules)):
                for name, p in list(module.named_parameters(recurse=False)):
                    there = p.to(device)
                    if there is not p:
                        at_home.append((module, name, p))
                        setattr(module, name, torch.nn.Parameter(there, p.requires_grad))
        yield
    finally:
        for module, name, p in at_home:
            setattr(module, name, p)
        if device.type == "cuda" and at_home:
            torch.cuda.empty_cache()  # the next network may not fit the blocks that stay reserved


# --------------------------------------------------------------------------------------------------
# Latents from files: what an earlier run saved, and videos to refine


def split_name(out):
    """-> the name of an output, its extension or final slash"""
    return (out.rstrip("/"), "/") if out.endswith("/") else os.path.splitext(out)


def latents_path(out):
    """Where the latents of a video are kept: beside it."""
    return split_name(out)[0] + ".latents.safetensors"


def saved_latents(path):
    """What an earlier run saved: scaled latents (1,T,4,h,w), their Settings, all metadata. Raises
    WeightsError."""
    file = exsvd.Tensors(path)
    latents, saved, shape = None, file.meta.get("settings"), None
    if "latents" in file.names and isinstance(saved, dict):
        s = Settings(**checked(Settings, saved, path))
        latents, shape = file.get("latents"), (1, s.frames, 4, s.size[1] // 8, s.size[0] // 8)
    if latents is None or latents.shape != shape:
        raise exsvd.WeightsError(f"{path}: holds no latents saved by sample.py")
    if not latents.isfinite().all():
        raise exsvd.WeightsError(f"{path}: the latents are not finite: sample with another --dtype")
    return latents, s, file.meta


def vae_id(model):
    """What tells a model's VAE from others: a hash of its last convolution as the file has it,
    since --dtype rounds what is loaded."""
    tensors = exsvd.open_model(model)[0]["vae"]
    # SVD's file has another decoder, in its conditioner, whose name comes before first_stage_model.
    name = max(name for name in tensors.names if name.endswith("decoder.conv_out.weight"))
    return hashlib.blake2b(tensors.get(name).float().numpy(), digest_size=8).hexdigest()


class Video(NamedTuple):
    """A video to refine."""
    latents: torch.Tensor  # unscaled, (n,4,h,w), on the CPU
    times: torch.Tensor    # of each frame, in seconds, (n,)
    fps: float
    first: torch.Tensor    # the first frame as it is shown: uint8 (H,W,3), or float (3,H,W)


@torch.inference_mode()
def open_video(path, size, vae, device, model):
    """--video at `size`, or at its own where that is None. Latents that sample.py saved have one
    size only, and must be of the VAE of the file `model`."""
    if path.endswith(".safetensors"):
        latents, s, meta = saved_latents(path)
        if size and size != s.size:
            W, H = s.size
            raise data.MediaError(f"{path}: the latents are of {W}x{H}: leave out --size")
        if meta.get("vae") not in (None, vae_id(model)):
            raise exsvd.WeightsError(f"{path}: was made with {meta['model']}, and the VAE of "
                                     f"{model} is another: give that as --model, or the video "
                                     "itself as --video")
        shown = adjust(latents, s, meta.get("keyframes", ()))
        first = decoded_frame(vae, shown.to(device), 0, s.decode_chunk)
        return Video(shown[0] / exsvd.VAE_SCALE, torch.arange(s.frames) / s.fps, s.fps, first)
    latents, times, first = [], [], data.read_image(path)
    H, W = first.shape[:2]
    frames = data.video_frames(path, size or data.default_size(W, H, W * H))
    with on_device(device, vae):
        for frame, seconds, declared in tqdm(frames, desc="encoding", unit="frame"):
            frame = data.to_float(frame.permute(2, 0, 1)[None].to(device))
            latents.append(vae.encode(frame)[0].float().cpu())  # one by one: less memory
            times.append(seconds)
    if len(times) < 2:
        raise data.MediaError(f"{path}: holds a single picture: give it as IMAGE")
    fps = data.frame_rate(times, declared)
    if None in times or times != sorted(times):  # a bare stream
        times = [i / fps for i in range(len(times))]
    return Video(torch.stack(latents), torch.tensor(times, dtype=torch.float64), fps, first)


def resampled(video, frames):
    """Latents of a Video at evenly spaced times, each of the frame nearest in time:
    (1,frames,4,h,w)."""
    at = torch.linspace(video.times[0], video.times[-1], frames, dtype=video.times.dtype)
    return video.latents[torch.bucketize(at, (video.times[1:] + video.times[:-1]) / 2)][None]


# --------------------------------------------------------------------------------------------------
# The command


def keyframe(text):
    """A check: NUMBER=IMAGE -> (number, path)."""
    frame, _, path = text.partition("=")
    if not frame.isdigit() or not path:
        raise argparse.ArgumentTypeError(f"{text}: write it as NUMBER=IMAGE, like 64=photo.png")
    return int(frame), path


def parse(argv):
    """-> arguments, of which .jobs is what to make: [(image, seed, output)]; {name: value} of the
    settings that were given"""
    p = argparse.ArgumentParser(
        usage="sample.py IMAGE... [options], --help lists them",
        description="Image to video. In [brackets]: the default; a model's file may hold others.")
    add = p.add_argument_group("what").add_argument
    add("images", nargs="*", metavar="IMAGE", help="pictures, or videos, whose first frame is used")
    add("--model", help="file or diffusers folder [weights/svd_xt.safetensors, or the toy]")
    add("--extension", nargs="+", metavar="FILE",
        help="ExVideo release or own extension, and what was trained over it [in weights/: "
             "exvideo.safetensors or model.fp16.safetensors; the toy's own]")
    add("--unet", metavar="FILE", help="a UNet in place of the model's, such as AnimateLCM-SVD")
    add("--end", metavar="IMAGE", help="the last frame, in twice the time; IMAGE again: a loop")
    add("--keyframe", type=keyframe, action="append", default=[], metavar="NUMBER=IMAGE",
        help="what a frame shows, counted from 0; may be given several times")
    add("--video", metavar="FILE",
        help="refine a video, or its *.latents.safetensors, instead of starting from noise "
             "[IMAGE is its first frame; --size, --frames and --fps are its own]")
    add("--decode-only", metavar="FILE", help="decode the latents of an earlier run again")
    add("--out", help="a .mp4, .webm or .gif file, or with a final slash a folder of PNGs; {name} "
                      "is the image's, {seed} the seed [out/{name}.mp4, or out/{name}-refined.mp4]")
    add("--seeds", type=integer(1), default=1, metavar="N", help="videos of each image [1]")
    add("--overwrite", action="store_true", help="of several videos, make again those that exist")
    card = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    add("--device", default=card, help="[cuda if there is one, else cpu]")
    add("--offload", action="store_true", help="for small GPUs: the UNet's weights come in blocks")
    add("--compile", action="store_true", help="torch.compile; the first step takes minutes")
    add_flags(p.add_argument_group("settings"), Settings)
    args = p.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}

    if bool(args.images or args.video) == bool(args.decode_only):
        p.error("give at least one image first, such as assets/img.png, or --decode-only FILE")
    if args.video and len(args.images) > 1:
        p.error("--video refines one video: give one IMAGE, or none")
    try:
        torch.zeros(1, device=args.device).cpu()
    except (RuntimeError, AssertionError) as e:
        p.error(f"--device {args.device}: {str(e).splitlines()[0]}")

    out = args.out or ("out/{name}-refined.mp4" if args.video else "out/{name}.mp4")
    if args.seeds > 1 and "{seed}" not in out:
        out = "-{seed}".join(split_name(out))
    args.jobs, first = [], given.get("seed", Settings.seed)
    for image in args.images or [args.video or args.decode_only]:
        name = os.path.splitext(os.path.basename(image.rstrip(os.sep)))[0].removesuffix(".latents")
        for seed in (n % 2**32 for n in range(first, first + args.seeds)):
            path = out.replace("{name}", name).replace("{seed}", str(seed))
            args.jobs.append((image, seed, path))
    return args, given


def check_outputs(args, fps):
    """Raises MediaError before the work of an hour, not after it, for outputs that cannot be
    written, or would overwrite each other or what is read. Makes their folders."""
    outs = [out for _, _, out in args.jobs]
    if len(set(outs)) < len(outs):
        raise data.MediaError("two images would be written to the same file: put {name} into --out")
    read = [*args.images, *(path for _, path in args.keyframe), args.video, args.end]
    read = {Path(path).resolve() for path in read if path}
    for out in outs:
        if not read.isdisjoint(Path(path).resolve() for path in (out, latents_path(out))):
            raise data.MediaError(f"{out}: would overwrite what is read: choose another --out")
        data.VideoWriter(out, fps)  # writes nothing yet, but refuses what it can't write
        probe = f"{latents_path(out)}.{os.getpid()}.tmp"  # the longest name that will be written
        try:
            os.makedirs(os.path.dirname(probe) or ".", exist_ok=True)
            open(probe, "x").close()
            os.remove(probe)
        except OSError as e:
            raise data.MediaError(f"{out}: cannot be written ({e.strerror})") from e


def toy_files(extension=None):
    """The toy's model, and an extension of it: its own, if none is given."""
    model, own = (os.path.join(HERE, "assets", name) for name in
                  ("toy.safetensors", "toy-exvideo.safetensors"))
    return model, extension or [own]


def default_model(args):
    """--model and --extension where they are not given; one line says so when it is the toy."""
    model, *extensions = (os.path.join(HERE, "weights", name) for name in
                          ("svd_xt.safetensors", "exvideo.safetensors", "model.fp16.safetensors"))
    if args.model and os.path.abspath(args.model) != toy_files()[0]:
        return args.model, args.extension
    if not args.model and os.path.exists(model):
        tuned = [path for path in extensions if os.path.exists(path) and not args.unet]
        return model, args.extension or tuned[:1]
    if not args.model:
        print("no weights/svd_xt.safetensors, see README.md: using the toy", file=sys.stderr)
    return toy_files(args.extension)


def load(args, given, model, extension, device):
    """The three networks, ready to sample."""
    meta, top = exsvd.open_model(model)[0]["unet"].meta, extension and extension[-1]
    extension_meta = exsvd.open_extensions(extension)[-1].meta if extension else None
    wanted = (defaults_of(meta, extension_meta, model, top) | given).get("dtype")
    dtype = getattr(torch, wanted) if wanted else exsvd.best_dtype(device)
    home = "cpu" if args.offload or device.type == "cuda" else device  # see place_networks()
    svd = exsvd.load(model, extension, dtype, home, unet=args.unet)
    s = settings_for(svd, given, model, top)
    if args.offload:
        svd.unet.stream = exsvd.Stream(svd.unet, device)
    if args.compile:
        exsvd.compile_blocks(svd.unet)
    millions = sum(p.numel() for p in svd.unet.parameters()) / 1e6
    print(f"{model}: {millions:.1f} M parameters in the UNet, {svd.unet.max_frames or s.native} "
          f"frames, {s.dtype} on {device}")
    return svd


OUT_OF_MEMORY = """out of memory. While sampling these help, what costs least first: --dtype float16
(half of --dtype float32), --offload (some seconds per video), fewer --frames, a smaller --size.
While decoding: --decode-only FILE, without the UNet in memory, or a smaller --size."""


@full_memory(OUT_OF_MEMORY)
def decode_again(args, given, device, out):
    """--decode-only: a video from the latents of an earlier run, by the VAE of its model."""
    latents, s, meta = saved_latents(args.decode_only)
    model = args.model or str(meta.get("model"))
    if not args.model and not (os.path.exists(model) and vae_id(model) == meta.get("vae")):
        raise exsvd.WeightsError(f"{args.decode_only}: was made with {model}, which is not there "
                                 "or has another VAE now: say with --model which is to decode")
    dtype = given.get("dtype") or str(exsvd.best_dtype(device)).removeprefix("torch.")
    s = replace(s, **given | {"dtype": dtype, "frames": s.frames, "size": s.size})
    vae = exsvd.load(model, None, getattr(torch, dtype), device, parts=("vae",)).vae
    write_video(vae, latents.to(device), s, out, meta.get("keyframes", ()))
    print(f"{out}: {s.frames} frames at {s.fps:g} fps, {peak_memory(device):.2f} GB of memory")


def make_video(svd, img, s, device, out, model, video=None, end=None, keyframes={}):
    """One image to a video file, and its latents to a file beside it. Pictures are scaled and
    cropped to s.size. The rest as in make_latents(). Raises FloatingPointError if the latents or
    the frames are not finite."""
    def fit(picture):
        return None if picture is None else data.fit_image(picture, *s.size)

    begin = time.perf_counter()
    place_networks(svd, s, device)
    latents = make_latents(svd, fit(img), s, device, video and resampled(video, s.frames), fit(end),
                           {n: fit(picture) for n, picture in keyframes.items()})
    sampled = time.perf_counter()
    check_finite(latents, f"{out}: the latents are not finite: try another --dtype")
    exsvd.save(latents_path(out), {"latents": latents}, {  # should decoding fail
        "model": model, "vae": vae_id(model), "settings": asdict(s), "keyframes": list(keyframes)})
    print(f"{latents_path(out)}: latents, to decode again with --decode-only")
    write_video(svd.vae, latents, s, out, keyframes)
    print(f"{out}: {s.frames} frames of {s.size[0]}x{s.size[1]} at {s.fps:g} fps, "
          f"{sampled - begin:.1f} s to sample, {time.perf_counter() - sampled:.1f} s to decode, "
          f"{peak_memory(device):.2f} GB of memory at the peak")


def peak_memory(device):
    """GB at the peak: what torch allocated on a GPU, or what the process held. NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return math.nan
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def idle_cores():
    """How many cores have nothing to do. PyTorch waits for its slowest thread, so one on a busy
    core holds up all others."""
    if not os.path.exists("/proc/loadavg"):  # not on Linux
        return os.cpu_count()
    running = []
    for _ in range(10):  # what runs for a moment does not count
        running.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]))
        time.sleep(0.02)
    return max(1, os.cpu_count() - (min(running) - 1))  # without this process


def main(argv=None):
    """The command. Raises WeightsError, MediaError, FloatingPointError, MemoryError and OSError for
    what the caller can mend."""
    args, given = parse(argv)
    check_outputs(args, given.get("fps", 1))
    batch = len(args.jobs) > 1
    jobs, torchrun = args.jobs, "TORCHELASTIC_RUN_ID" in os.environ
    if torchrun:  # each process makes its share of the videos, on a GPU of its own
        jobs = jobs[int(os.environ["RANK"])::int(os.environ["WORLD_SIZE"])]
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), idle_cores()))
    if args.decode_only:
        for _, _, out in jobs:
            decode_again(args, given, device, out)
        return
    model, extension = default_model(args)
    if args.video:  # fail before the networks are loaded
        open(args.video, "rb").close()
    end = data.read_image(args.end) if args.end else None
    keyframes = {n: data.read_image(path) for n, path in args.keyframe}
    svd, video, failed = None, None, []
    for image, seed, out in jobs:
        if batch and os.path.exists(out) and not args.overwrite:
            print(f"{out}: exists and is skipped (--overwrite makes it again)")
            continue
        try:
            with full_memory(OUT_OF_MEMORY):
                img = data.read_image(image) if args.images else None
                svd = svd or load(args, given, model, extension, device)
                if args.video and video is None:
                    video = open_video(args.video, given.get("size"), svd.vae, device, model)
                img = video.first if img is None else img
                s = complete(svd, given | {"seed": seed}, img.shape[1::-1], video, keyframes)
                data.VideoWriter(out, s.fps)  # a video to refine may be too fast for a GIF
                make_video(svd, img, s, device, out, model, video, end, keyframes)
        except (data.MediaError, FloatingPointError, MemoryError) as e:
            if not batch:
                raise
            print(f"sample.py: {e}", file=sys.stderr)  # the others are made all the same
            failed.append(out)
    if torchrun:  # it ends all processes when one has failed, so they wait for each other here
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    if failed:
        names = ", ".join(failed)
        raise data.MediaError(f"{len(failed)} of {len(jobs)} videos were not made: {names}")


def run(name, main, *args):
    """main(*args), for a shell: what the user can mend is one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):  # a file name that they cannot print must not end it
        stream.reconfigure(errors="backslashreplace")
    try:
        main(*args)
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped")
    except (exsvd.WeightsError, data.MediaError, FloatingPointError, OSError, MemoryError) as e:
        sys.exit(f"{name}: {e}")


def command(argv=None):
    """main(), for a shell. SIGTERM is an exception, which removes temporary files."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("sample.py: terminated"))
    run("sample.py", main, argv)


if __name__ == "__main__":
    command()
