"""Image to video.

    python sample.py assets/img.png                                     # the toy that ships with the repository
    python sample.py photo.jpg --model svd_xt.safetensors --extension model.fp16.safetensors --size 512x512
    python sample.py --decode-only out/photo.latents.safetensors        # once more from saved latents

In order: the image is read and fitted, encoded by CLIP and the VAE, noise is carried down the sigmas by a sampler, the
latents are saved, decoded in overlapping chunks and streamed to a video file. Arithmetic on latents is float32.
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import exsvd

HERE = os.path.dirname(os.path.abspath(__file__))

# What a run uses where no flag says otherwise. area: width x height, kept at the image's own aspect ratio.
DEFAULTS = {
    # as diffusers runs SVD and SVD-XT; frames: the native length
    "SVD": dict(area=1024 * 576, steps=25, sampler="euler", eta=0.0, share_noise=0, cfg=(1.0, 3.0),
                fps=7, motion=127, aug=0.02, decode_chunk=14),
    # as the ExVideo authors run their release; frames: the rows of its table
    "ExVideo": dict(area=512 * 512, steps=50, sampler="euler", eta=0.0, share_noise=0, cfg=(2.0, 2.0),
                    fps=30, motion=127, aug=0.02, decode_chunk=16),
    # fresh noise at every step corrects earlier ones: the tint of frames trembles less
    "toy": dict(area=128 * 128, steps=25, sampler="ddim", eta=1.0, share_noise=8, cfg=(1.0, 1.2),
                fps=8, motion=20, aug=0.02, decode_chunk=16),
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


SAMPLERS = {"euler": ddim, "ddim": ddim, "heun": heun}


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


def adjust(z, match, contrast):
    """What the official tool does to the latents of the released ExVideo weights: (1,T,4,h,w) -> (1,T,4,h,w).

    match: every frame gets the mean and deviation of the whole video. contrast: a factor, 1.2 there.
    Both counter a video that greys with time. The likely cause, read off that code and not confirmed: its training
    targets were scaled by 0.13025, SDXL's constant, instead of 0.18215, so the weights aim at too little contrast.
    """
    if match:
        mean = z.mean(dim=(2, 3, 4), keepdim=True)
        std = z.std(dim=(2, 3, 4), keepdim=True)
        z = (z - mean) / std * z.std() + z.mean()
    return z * contrast


# ----------------------------------------------------------------------------------------------------------------------
# From latents to frames


def is_out_of_memory(error):
    """Of any device: only CUDA's allocator has an exception type, neither the CPU's nor those of cuDNN and cuBLAS."""
    words = ("allocate memory", "ALLOC_FAILED")
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
    weight 0. Of one or two common frames each is at an edge, and the errors of both chunks partly cancel.
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
    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= most:
            what = "a whole number" if kind is int else "a number"
            limit = f"at least {low}, and below 2^63" if most == 2**63 - 1 else f"at least {low} and at most {most}"
            raise argparse.ArgumentTypeError(f"{text}: must be {what} of {limit}")
        return value
    return convert


def frame_size(text):
    """An argparse type: WxH -> (W, H), multiples of 64."""
    try:
        W, H = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write it as WIDTHxHEIGHT, for example 512x512") from None
    if W < 64 or H < 64 or W % 64 or H % 64:
        near = "x".join(str(max(64, round(n / 64) * 64)) for n in (W, H))
        raise argparse.ArgumentTypeError(f"{text}: both must be multiples of 64; the nearest is {near}")
    return W, H


def parse(argv):
    p = argparse.ArgumentParser(
        usage="sample.py IMAGE... [options], --help lists them",
        description="Image to video with SVD and ExVideo. Defaults depend on the model: SVD / ExVideo / toy.",
        epilog="Real weights: see README.md, section Weights.")
    add = p.add_argument

    def shown(key):
        return "[" + " / ".join(str(default[key]) for default in DEFAULTS.values()) + "]"

    add("images", nargs="*", metavar="IMAGE",
        help="pictures (PNG, JPEG, WebP, GIF, ...) or videos, whose first frame is used")
    add("--model",
        help="single .safetensors file or diffusers folder [weights/svd_xt.safetensors if there, else the toy]")
    add("--extension", help="ExVideo release or own extension "
                            "[with the default model: weights/exvideo.safetensors if there; the toy: its own]")
    add("--native", type=at_least(1, kind=int), metavar="N",
        help="frames the base was trained on [25, or what the model's files say; 14 for svd.safetensors]")
    add("--frames", type=at_least(1, kind=int), metavar="N",
        help="frames to make [all rows of the extension's table, or the native length]")
    add("--size", type=frame_size, metavar="WxH",
        help="multiples of 64 [the family's area at the image's own aspect ratio]")
    add("--steps", type=at_least(1, kind=int), metavar="N", help=f"noise levels {shown('steps')}")
    add("--sampler", choices=tuple(SAMPLERS), help=f"euler and ddim are the same, heun costs twice {shown('sampler')}")
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
                                           f"0..127, the toy on 20 alone {shown('motion')}")
    add("--aug", type=at_least(0), help=f"noise added to the image, which frees the motion from it {shown('aug')}")
    add("--seed", type=at_least(0, kind=int), default=0,
        help="of all noise, drawn on the CPU: the same on every device [0]")
    add("--decode-chunk", type=at_least(1, kind=int), metavar="N",
        help=f"frames decoded at once; fewer need less memory {shown('decode_chunk')}")
    add("--match-stats", action=argparse.BooleanOptionalAction,
        help="give every frame's latents the mean and deviation of the video's "
             "[only with the published ExVideo weights]")
    add("--contrast", type=at_least(0), help="factor on the latents [1.2 with the published ExVideo weights, else 1]")
    add("--decode-only", metavar="FILE",
        help="decode latents saved by an earlier run, instead of sampling. --fps, --decode-chunk, --match-stats, "
             "--contrast and --dtype may differ from that run's")
    add("--out", default="out/{name}.mp4",
        help=".mp4, .webm, .gif or a folder of PNGs; {name} is the image's name [out/{name}.mp4]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[cuda if there is one, else cpu]")
    add("--offload", action="store_true", help="for small cards: CLIP and VAE, then the UNet, then the VAE are on the "
                                               "device, the others wait in CPU memory")
    add("--compile", action="store_true",
        help="torch.compile of the UNet's blocks; the first step takes minutes, and a compiler is needed")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the networks [bfloat16; the toy on the CPU: float32]")
    a = p.parse_args(argv)

    if bool(a.images) == bool(a.decode_only):
        p.error("give at least one image, such as assets/img.png, or --decode-only FILE, and not both")
    if a.cfg_interval and a.cfg_interval[0] >= a.cfg_interval[1]:
        p.error(f"--cfg-interval {a.cfg_interval[0]:g} {a.cfg_interval[1]:g}: LOW must be below HIGH")
    if a.eta and SAMPLERS[a.sampler or "ddim"] is not ddim:
        p.error(f"--eta {a.eta:g}: {a.sampler} adds no fresh noise; use --sampler ddim, or leave --eta out")
    try:
        torch.zeros(1, device=a.device).cpu()
    except (RuntimeError, AssertionError) as e:
        p.error(f"--device {a.device}: {str(e).splitlines()[0]}")
    names = [os.path.splitext(os.path.basename(path))[0] for path in a.images]
    if a.decode_only:
        names = [os.path.basename(a.decode_only).removesuffix(".safetensors").removesuffix(".latents")]
    a.outs = [a.out.replace("{name}", name) for name in names]
    if len(set(a.outs)) < len(a.outs):
        p.error("two images would be written to the same file: put {name} into --out, and give images of other names")
    return a


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
    homes = [next(network.parameters()).device for network in networks]

    def move(*places):
        with torch.inference_mode(False):  # parameters that moved in inference mode could never be trained again
            for network, place in zip(networks, places):
                network.to(place)

    move(*[device] * len(networks))
    try:
        yield
    finally:
        move(*homes)
        if device.type == "cuda" and homes[0].type == "cpu":
            torch.cuda.empty_cache()  # or the memory stays reserved in blocks that the next network does not fit


@torch.inference_mode()
def make_latents(svd, img, s, device):
    """One image (3,H,W) in [-1,1] to scaled latents (1,T,4,H/8,W/8) on the device. s: the settings, all of them."""
    H, W = img.shape[1:]
    generator = torch.Generator().manual_seed(s["seed"])

    def draw():  # on the CPU: a seed means one video, whatever the device
        noise = torch.randn(1, s["frames"], 4, H // 8, W // 8, generator=generator)
        return shared_noise(noise, s["share_noise"]).to(device)

    noise = draw()
    with on_device(device, svd.clip, svd.vae):
        image_noise = torch.randn(1, 3, H, W, generator=generator)
        image_latents, ctx = condition(svd, img, s["aug"], image_noise, device)
    ids = torch.tensor([[s["fps"] - 1, s["motion"], s["aug"]]], device=device)
    denoise = guided(svd.unet, image_latents, ctx, ids, s["cfg"], s["frames"], s["cfg_interval"])
    sigmas = exsvd.karras_sigmas(s["steps"])  # on the CPU, so that no step waits for the device to compare them
    passes = 2 * s["steps"] - 1 if s["sampler"] == "heun" else s["steps"]
    with on_device(device, svd.unet), tqdm(total=passes, desc="sampling", unit="step") as bar:
        def counted(x, sigma):
            D = denoise(x, sigma)
            bar.update()
            return D

        start = noise * (sigmas[0] ** 2 + 1).sqrt()
        return SAMPLERS[s["sampler"]](counted, start, sigmas, s["eta"], draw)


@torch.inference_mode()
def write_video(vae, latents, s, out):
    """Scaled latents (1,T,4,h,w) to a video file, chunk by chunk."""
    z = adjust(latents, s["match_stats"], s["contrast"]) / exsvd.VAE_SCALE
    with (on_device(latents.device, vae), data.VideoWriter(out, s["fps"], s) as video,
          tqdm(total=z.shape[1], desc="decoding", unit="frame") as bar):
        for frames in decode(vae, z, s["decode_chunk"]):
            video.write(to_pixels(frames))
            bar.update(len(frames))


def settings_of(a, family, extension, config, max_frames, img):
    """Every number that shapes the video: flags, and the family's defaults where there are none. No paths, no times."""
    chosen = DEFAULTS[family] | {flag: value for flag, value in vars(a).items() if value is not None}
    if a.sampler and a.eta is None:
        chosen["eta"] = 0.0  # the default belongs to the default sampler
    native = a.native or config.native_frames
    frames = a.frames or max_frames or native
    if max_frames and frames > max_frames:
        raise exsvd.WeightsError(f"--frames {frames}: the extension was made for {max_frames}, the most it can do")
    if not max_frames and frames > native:
        print(f"warning: --frames {frames}, but this model without extension knows {native}: expect motion that "
              "jitters or fades after those (--extension for longer videos, --native N if the model's is another)",
              file=sys.stderr)
    width, height = a.size or data.default_size(img.shape[1], img.shape[0], chosen["area"])
    published = extension == {}  # names of the ExVideo release and none of our metadata: only that is corrected
    return dict(
        family=family,
        frames=frames,
        width=width,
        height=height,
        steps=chosen["steps"],
        sampler=chosen["sampler"],
        eta=chosen["eta"],
        share_noise=chosen["share_noise"],
        cfg=list(chosen["cfg"]),
        cfg_interval=a.cfg_interval,
        fps=chosen["fps"],
        motion=chosen["motion"],
        aug=chosen["aug"],
        seed=a.seed,
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


def decode_again(a, model, toy, device):
    """--decode-only: a video from the latents that an earlier run saved."""
    file = exsvd.Tensors(a.decode_only)
    s = file.meta.get("settings")
    shape = tuple(file.shape("latents")) if "latents" in file.names else None
    if not isinstance(s, dict) or shape != (1, s.get("frames"), 4, s.get("height", 0) // 8, s.get("width", 0) // 8):
        raise exsvd.WeightsError(f"{a.decode_only} holds no latents saved by sample.py, "
                                 "whose names end in .latents.safetensors")
    if toy != (s["family"] == "toy"):
        raise exsvd.WeightsError(f"{a.decode_only} was made by a model of the {s['family']} family: "
                                 "give the same --model")
    latents = file.get("latents").to(device)
    if not latents.isfinite().all():
        raise exsvd.WeightsError(f"{a.decode_only}: the latents are not finite; sample again, "
                                 "with --dtype bfloat16 or float32")
    for flag in ("fps", "decode_chunk", "match_stats", "contrast", "dtype"):
        if getattr(a, flag) is not None:
            s[flag] = getattr(a, flag)
    vae = exsvd.load(model, None, getattr(torch, s["dtype"]), device, parts=("vae",)).vae
    write_video(vae, latents, s, a.outs[0])
    print(f"{a.outs[0]}: {s['frames']} frames of {s['width']}x{s['height']} at {s['fps']:g} fps, "
          f"{peak_memory(device)} at the peak")


def load(a, model, extension, toy, device):
    """The three networks, ready to sample, and the family they belong to."""
    a.dtype = a.dtype or ("float32" if toy and device.type == "cpu" else "bfloat16")
    svd = exsvd.load(model, extension, getattr(torch, a.dtype), "cpu" if a.offload else device)
    if a.compile:
        exsvd.compile_blocks(svd.unet)
    family = "toy" if toy else "ExVideo" if svd.unet.max_frames else "SVD"
    parameters = sum(p.numel() for p in svd.unet.parameters())
    print(f"{family}: {parameters / 1e6:.1f} M parameters in the UNet, {a.dtype} on {device}")
    return svd, family


def make_video(svd, img, s, device, out):
    """One image (H,W,3), uint8, to a video file, and its latents to a file beside it."""
    begin = time.perf_counter()
    latents = make_latents(svd, data.fit_image(img, s["width"], s["height"]), s, device)
    sampled = time.perf_counter()
    if not latents.isfinite().all():
        raise exsvd.WeightsError(f"{out}: the latents are not finite; weights and --dtype {s['dtype']} "
                                 "do not go together")
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    exsvd.save(latents_path(out), {"latents": latents}, {"settings": s})  # an hour's work, should the decoder fail
    try:
        write_video(svd.vae, latents, s, out)
    except BaseException:
        print(f"the latents are safe: go on with --decode-only '{latents_path(out)}'", file=sys.stderr)
        raise
    print(f"{out}: {s['frames']} frames of {s['width']}x{s['height']} at {s['fps']:g} fps, "
          f"{(sampled - begin) / s['steps']:.2f} s per step, {time.perf_counter() - sampled:.1f} s to decode, "
          f"{peak_memory(device)} at the peak")


def main(argv=None):
    """The command. Raises WeightsError, MediaError and OSError for what the caller can mend."""
    a = parse(argv)
    for out in a.outs:
        check_writable(out, a.fps or 1)
    device = torch.device(a.device)
    model, extension = default_model(a)
    toy = exsvd.open_model(model)[0]["unet"].meta.get("family") == "toy"
    if toy and device.type == "cpu":
        torch.set_num_threads(1)  # networks this small lose more to threads that wait for each other than they gain
    if a.decode_only:
        decode_again(a, model, toy, device)
        return

    svd, failed = None, []
    for path, out in zip(a.images, a.outs):
        try:
            img = data.read_image(path)
        except data.MediaError as e:  # one picture out of many: the others are made all the same
            if len(a.images) == 1:
                raise
            print(f"sample.py: {e}", file=sys.stderr)
            failed.append(path)
            continue
        if svd is None:
            svd, family = load(a, model, extension, toy, device)
        s = settings_of(a, family, svd.extension, svd.unet.config, svd.unet.max_frames, img)
        make_video(svd, img, s, device, out)
    if failed:
        raise data.MediaError(f"{len(failed)} of {len(a.images)} images could not be read: {', '.join(failed)}")


def command(argv=None):
    """main(), for a shell: what the user can mend is one line and exit code 1."""
    try:
        main(argv)
    except (exsvd.WeightsError, data.MediaError, OSError) as e:
        sys.exit(f"sample.py: {e}")
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        sys.exit("sample.py: out of memory; lower --frames or --size, or --decode-chunk if it was decoding "
                 "(then see --decode-only)")


if __name__ == "__main__":
    command()
