"""Does ExVideo work? A 40-frame toy from an 8-frame one, with the ablations the paper left out, from nothing to tables and figures.

    python toy/reproduce.py                    # the study: under 3 hours on 2 cores -> runs/study/{tables.md,figure.png,strip.png}
    python toy/reproduce.py --quick            # the same with few steps and scenes, under 15 minutes: shows that it runs, no more

    1. Runs      toy/pretrain.py makes videos and the VAE, data.py latents of them, train.py everything else; ablations start
                 from other extension files, or train something else
    2. Samples   of each model, from the first frames of scenes it has not seen
    3. Measures  against scenes whose truth is known: do objects persist, how smooth are their track and the camera's, how much
                 flickers, how far does it go, does motion die out or come back
    4. Report    tables, figure, strips of frames

The same command goes on where an earlier one stopped. The figure needs matplotlib. Everything runs on the CPU.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data
import exsvd
import sample
from pretrain import SIZE, blurred, init, simple_scene

SHORT, LONG = 8, 40                # frames of the base and of the extended model, 64x64 pixels each
CHANNELS = 32                      # of the UNet: 2.2 M parameters
BATCH = 2                          # videos of 40 frames per step; five times as many of 8
HELD_OUT = 1_000_000               # seed of the scenes that are measured; videos to train on have seed 0
SIGMAS = (0.2, 1.0, 5.0)           # noise levels of the losses

# ----------------------------------------------------------------------------------------------------------------------
# 1. Runs. Base N steps of 10 clips of 8 frames; scratch N steps of 2 clips of 40; post-tuning N / 5 of those.

TABLES = {  # other initialisations of the frame table (40, C) than the cyclic fold
    "stretch": lambda C: exsvd.sinusoid(torch.linspace(0, SHORT - 1, LONG), C),
    "extrapolate": lambda C: exsvd.sinusoid(torch.arange(LONG), C),
    "random": lambda C: torch.randn(LONG, C, generator=torch.Generator().manual_seed(0)) * 0.5**0.5,  # as large as a sinusoid
}
ABLATIONS = {  # name: (what is different from post-tuning, flags of train.py)
    "stretch": ("frame table starts as a linear stretch", []),
    "extrapolate": ("frame table starts as the sinusoid, which goes on", []),
    "random": ("frame table starts random", []),
    "no-conv": ("identity convolution not trained, which equals none", ["--train", r"\.attn\.temporal\.(?!frame_conv)"]),
    "positions": ("only frame table and its embedding trained", ["--train", r"\.attn\.temporal\.frame_(table|embed)"]),
    "everything": ("whole UNet trained", ["--train", r"^unet\."]),
    "no-ema": ("no EMA", ["--ema", "0"]),
    "mixed": ("half of the steps on clips of 8 frames", ["--short-clips", "0.5"]),
}


def run(a, log, *command):
    """A script of this repository in a process of its own; its output goes to a file."""
    with open(os.path.join(a.out, log), "a") as f:
        code = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=f, stderr=subprocess.STDOUT,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "20", "CUDA_VISIBLE_DEVICES": ""}).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} failed: see {log} in {a.out}")


def train(a, name, steps, rate, flags, clips):
    """train.py, unless it is done; the last quarter of the steps at a fifth of the learning rate."""
    out, begun = os.path.join(a.out, name), time.time()
    done = lambda: max((int(f[6:]) for f in os.listdir(out) if re.fullmatch(r"state-\d+", f)), default=0) if os.path.isdir(out) else 0
    for last, lr in ((steps - steps // 4, rate), (steps, rate / 5)):
        if done() < last:
            run(a, f"{name}.txt", "train.py", "--data", os.path.join(a.out, clips), "--size", f"{SIZE}x{SIZE}", "--steps", str(last), "--lr", str(lr),
                "--checkpoint", "none", "--workers", "1", "--keep", "1", "--out", out, *flags)
            if done() < last:  # train.py saves and leaves when it is told to terminate
                raise RuntimeError(f"{name} stopped at step {done()} of {last}; the same command goes on from there")
            print(f"{name}: {last} steps, {time.time() - begun:.0f} s", flush=True)


def together(a, function, jobs):
    """function(a, *job) of every job, some at once. The first that fails cancels those that wait."""
    with ThreadPoolExecutor(a.jobs) as pool:
        futures = [pool.submit(function, a, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def untrained(a, seed, frames):
    """A UNet that knows nothing, as one made for so many frames; beside the VAE and CLIP of all runs. Returns its file."""
    path = f"{a.out}/untrained-{seed}-{frames}.safetensors"
    if not os.path.exists(path):
        svd = exsvd.load(f"{a.out}/start.safetensors")
        torch.manual_seed(seed)
        exsvd.save_model(path, init(exsvd.UNet(replace(svd.unet.config, native_frames=frames))), svd.vae, svd.clip, family="toy")
    return path


def all_runs(a):
    N, P = a.steps, a.steps // 5
    begin, start, videos = (os.path.join(a.out, name) for name in ("begin.safetensors", "start.safetensors", "videos"))
    if not os.path.exists(videos):
        run(a, "videos.txt", "toy/pretrain.py", "--simple", "--videos", f"{videos}.tmp", "--frames", "48", "--clips", str(a.clips), "--threads", str(a.jobs))
        os.rename(f"{videos}.tmp", videos)
    if not os.path.exists(begin):
        run(a, "vae.txt", "toy/pretrain.py", "--simple", "--channels", str(CHANNELS), "--vae-steps", str(a.vae_steps), "--clips", str(4 * a.vae_steps), "--out", begin)
    if not os.path.exists(start):  # CLIP learns beside a UNet that is then forgotten, and stays as it is: embeddings are stored with the latents
        train(a, "clip", a.clip_steps, 1e-3, ["--model", begin, "--train", "all", "--frames", str(SHORT), "--batch", "5", "--save-every", str(N)], "videos")
        svd, clip = exsvd.load(begin), exsvd.load(f"{a.out}/clip/model-{a.clip_steps:06d}.safetensors", parts=("clip",)).clip
        exsvd.save_model(start, svd.unet, svd.vae, clip, family="toy")
    together(a, run, [(f"latents-{T}.txt", "data.py", "encode", "--model", start, "--data", videos, "--frames", str(T), "--size", f"{SIZE}x{SIZE}",
                       "--out", f"{a.out}/latents-{T}") for T in (SHORT, LONG)])

    def from_nothing(kind, seed, frames):  # base or scratch: as many frames per step
        return (f"{kind}-{seed}", N, 3e-3, ["--model", untrained(a, seed, frames), "--seed", str(seed), "--train", r"^unet\.", "--frames", str(frames),
                "--batch", str(BATCH * LONG // frames), "--warmup", str(min(60, N // 5)), "--ema", "0.99", "--save-every", str(N)], f"latents-{frames}")

    def post_tuning(name, seed, every, *flags):
        return (name, P, 3e-3, ["--model", base_path(a, seed), "--seed", str(seed), "--frames", str(LONG), "--batch", str(BATCH), "--warmup", str(min(10, P)),
                "--ema", "0.95", "--save-every", str(max(1, every)), *flags], "videos" if name == "mixed" else f"latents-{LONG}")

    seeds = range(a.seeds)
    together(a, train, [from_nothing(kind, s, T) for kind, T in (("base", SHORT), ("scratch", LONG)) for s in seeds])
    for name, table in TABLES.items():
        unet = exsvd.extend(exsvd.load(base_path(a, 0), parts=("unet",)).unet, LONG)
        for block in unet.temporal_blocks():
            block.frame_table.data.copy_(table(block.frame_table.shape[1]))
        exsvd.save_extension(f"{a.out}/{name}.safetensors", unet)
    extension = lambda name: ["--extension", f"{a.out}/{name}.safetensors"] if name in TABLES else []
    together(a, train, [post_tuning(f"tuned-{s}", s, P // 8) for s in seeds] +
             [post_tuning(name, 0, P, *extension(name), *flags) for name, (_, flags) in ABLATIONS.items()])


# ----------------------------------------------------------------------------------------------------------------------
# 2. Samples. A row of the tables is a model and a way to make 40 frames (or 8) with it.

ALTERNATIVES = ("sliding", "nearest", "blend")  # ways to make 40 frames with the base's 8


def base_path(a, seed):
    return f"{a.out}/base-{seed}/model-{a.steps:06d}.safetensors"


def load(a, row):
    """The networks of a row."""
    N, P = a.steps, a.steps // 5
    name, _, rest = row.partition(" ")
    kind, _, seed = name.partition("-")
    base = base_path(a, seed if seed.isdigit() else 0)
    if kind == "base" or name in ("true", *ALTERNATIVES):
        return exsvd.load(base)
    if kind == "untuned":
        svd = exsvd.load(base)
        exsvd.extend(svd.unet, LONG)
        return svd
    if kind == "scratch":
        return exsvd.load(f"{a.out}/{name}/model-{N:06d}.safetensors")
    if name == "everything":
        return exsvd.load(f"{a.out}/everything/model-{P:06d}.safetensors")
    return exsvd.load(base, f"{a.out}/{name}/exvideo-{int((rest or '8/8')[0]) * P // 8:06d}.safetensors")


def scenes(n):
    """n held-out scenes: videos uint8 (n,40,H,W,3), and the paths of camera and ball, (n,40,2) each."""
    return [torch.stack(part) for part in zip(*(simple_scene(HELD_OUT, i, LONG) for i in range(n)))]


def to_model(videos):
    return videos.permute(0, 1, 4, 2, 3).float() / 127.5 - 1                              # (n,T,3,H,W)


def told(svd, first, score):
    """What the model is told: image latents (n,1,4,h,w), ctx (n,1,D), ids (n,3). first (n,3,H,W), score: motion of each clip."""
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(HELD_OUT))
    cond, ctx = (torch.stack(t)[:, None] for t in zip(*(data.encode_condition(svd.vae, svd.clip, f, 0.02, n) for f, n in zip(first, noise))))
    return cond, ctx, torch.tensor([[data.SYNTHETIC_FPS - 1, data.motion_bucket(s), 0.02] for s in score])


def generate(svd, first, score, frames, steps, seed=0):
    """(n,T,3,H,W) in [-1,1]: Euler steps without guidance, the clips decoded at once."""
    image_latents, ctx, ids = told(svd, first, score)
    noise = torch.randn(len(first), frames, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed))
    sigmas = exsvd.karras_sigmas(steps)
    latents = sample.ddim(sample.guided(svd.unet, image_latents, ctx, ids, (1.0, 1.0), frames), noise * (sigmas[0] ** 2 + 1).sqrt(), sigmas)
    return svd.vae.decode(latents / exsvd.VAE_SCALE).clamp(-1, 1)


def imitate(svd, how, first, score, frames, steps):
    """Samples of so many frames, from first frames (n,3,H,W) and motion scores."""
    if how not in ALTERNATIVES:
        return generate(svd, first, score, frames, steps)
    video = generate(svd, first, score, SHORT, steps)
    if how == "sliding":  # each window begins with the frame that ended the one before
        for seed in range(1, -(-(LONG - SHORT) // (SHORT - 1)) + 1):
            video = torch.cat([video, generate(svd, video[:, -1], score, SHORT, steps, seed)[:, 1:]], dim=1)
        return video[:, :LONG]
    t = torch.linspace(0, SHORT - 1, LONG)
    if how == "nearest":
        return video[:, t.round().long()]
    return torch.lerp(video[:, t.long()], video[:, t.ceil().long()], t.frac().view(-1, 1, 1, 1))


@torch.no_grad()
def losses(svd, z, first, score):
    """EDM loss per noise level, of clips with latents z (n,T,4,h,w)."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(HELD_OUT))
    image_latents, ctx, ids = told(svd, first, score)
    return {sigma: torch.cat([exsvd.edm_loss(svd.unet, *args) for args in zip(
        *(t.split(4) for t in (z, torch.full((len(z),), sigma), noise, image_latents, ctx, ids)))]).mean().item() for sigma in SIGMAS}


# ----------------------------------------------------------------------------------------------------------------------
# 3. Measures, of videos (n,T,3,H,W) in [-1,1]


def objects(x):
    """Where the magenta object is: found (n,T) bool and its centre (n,T,2) in pixels. Found is one blob: magenta specks all over
    the frame are not an object."""
    mask = (data.magenta((x.movedim(2, -1) + 1) / 2) - 0.15).clamp(min=0)                  # (n,T,H,W)
    v, u = torch.meshgrid(*(torch.arange(n) + 0.5 for n in mask.shape[2:]), indexing="ij")
    total, area = mask.sum((2, 3)).clamp(min=1e-6), (mask > 0).sum((2, 3))
    centre = torch.stack([(mask * u).sum((2, 3)) / total, (mask * v).sum((2, 3)) / total], -1)
    apart = (u - centre[..., 0, None, None]) ** 2 + (v - centre[..., 1, None, None]) ** 2
    spread = (mask * apart).sum((2, 3)) / total                                           # of a full disc: area / 2 pi
    return (area >= 12) & (spread * 2 * math.pi < 2 * area), centre


def camera(x):
    """Motion of the background from frame to frame, in pixels at the image's centre: (n,T-1,2).

    The similarity that maps one frame to the next best, by Gauss-Newton from coarse to fine; magenta pixels do not count."""
    n, T, _, H, W = x.shape
    keep = (data.magenta((x.movedim(2, -1) + 1) / 2) < 0.1).float()                       # (n,T,H,W)
    keep = -F.max_pool2d(-keep, 9, 1, 4)                                                  # the rim of the object neither
    v, u = torch.meshgrid(*(torch.arange(k) + 0.5 - k / 2 for k in (H, W)), indexing="ij")
    p = torch.zeros(n * (T - 1), 4)  # shift in x and y, growth, turn
    for blur in (8, 4, 2):
        smooth = blurred(x.flatten(0, 1), blur / 2, 2 * blur).view(x.shape)
        a, b = smooth[:, :-1].flatten(0, 1), smooth[:, 1:].flatten(0, 1)                  # (pairs,3,H,W)
        w = (keep[:, :-1] * keep[:, 1:]).view(-1, H, W)
        for _ in range(8):
            c, s = 1 + p[:, 2, None, None], p[:, 3, None, None]
            X, Y = c * u - s * v + p[:, 0, None, None], s * u + c * v + p[:, 1, None, None]
            warped = F.grid_sample(b, torch.stack([2 * X / W, 2 * Y / H], -1), padding_mode="border", align_corners=False)
            inside = (((X.abs() < W / 2 - 1) & (Y.abs() < H / 2 - 1)) * w)[:, None].expand_as(a).flatten(1)
            dy, dx = torch.gradient(warped, dim=(2, 3))
            J = torch.stack([dx, dy, dx * u + dy * v, dy * u - dx * v], -1).flatten(1, 3)    # (pairs, colours and pixels, 4)
            A = torch.einsum("npi,np,npj->nij", J, inside, J) + 1e-3 * torch.eye(4)
            g = torch.einsum("npi,np,np->ni", J, inside, (warped - a).flatten(1))
            p = p - torch.linalg.solve(A, g)
    return p[:, :2].view(n, T - 1, 2)


def measure(x):
    """Means over clips: each a number."""
    T, lag, n = x.shape[1], SHORT - 1, x.shape[1] // 4
    found, centre = objects(x)
    pan, change = camera(x), (x[:, 1:] - x[:, :-1]).abs().mean((2, 3, 4)) * 127.5         # (n,T-1,2) pixels, (n,T-1) of 255
    jerk = centre.diff(n=3, dim=1).norm(dim=-1)[found.unfold(1, 4, 1).all(-1)]            # where it is found; nan if nowhere
    moved = (centre[:, lag:] - centre[:, :-lag]).norm(dim=-1)[found[:, lag:] & found[:, :-lag]]
    panned = pan.unfold(1, lag, 1).sum(-1).norm(dim=-1)                                   # (n,T-lag); trembling sums to nothing
    out = {
        "found": found.float().mean(),                                                    # share of frames with the object
        "flicker": change.mean(),                                                         # of 255. VBench's score: 1 - flicker / 255
        "object jerk": jerk.mean(),                                                       # pixels / frame^3
        "camera jerk": pan.diff(n=2, dim=1).norm(dim=-1).mean(),
        "object displacement": moved.mean(),                                              # pixels in 7 frames
        "camera displacement": panned.mean(),
    }
    if T == LONG:
        out["late"] = panned[:, -n:].mean() / panned[:, :n].mean()                        # last quarter over first: below 1 motion dies out
        # how close a late frame comes to one at least 10 earlier, over how far those are on average: 0 is a loop
        small = F.avg_pool2d(x.flatten(0, 1), 4).reshape(len(x), T, -1)
        apart = torch.cdist(small, small, p=1)
        out["return"] = torch.stack([apart[:, t, :t - 9].amin(1) / apart[:, t, :t - 9].mean(1).clamp(min=1e-6) for t in range(20, T)]).mean()
    return {k: v.item() for k, v in out.items()}


def write_json(path, value):
    """Under a temporary name first: a run that is killed leaves no half of it."""
    with open(path + ".tmp", "w") as f:
        json.dump(value, f, indent=1)
    os.replace(path + ".tmp", path)


def row_path(a, row, ending):
    return os.path.join(a.out, "rows", row.translate({ord(" "): "-", ord("/"): "of"}) + ending)


@torch.no_grad()
def evaluate(job):
    """All figures of a row, cached in a file."""
    a, row = job
    path, settings = row_path(a, row, ".json"), [a.steps, a.scenes, a.sample_steps]
    if os.path.exists(path):
        with open(path) as f:
            if json.load(f).get("settings") == settings:
                return
    torch.set_num_threads(1)
    begun, result = time.time(), {}
    name, _, progress = row.partition(" ")
    svd, x = load(a, row), to_model(scenes(a.scenes)[0])
    z = torch.stack([svd.vae.encode(v) for v in x]) * exsvd.VAE_SCALE
    # What was trained on 8 frames is told how much those move: 40 move more than any clip it has seen
    knows_only_short = name in ALTERNATIVES or name.startswith(("base", "untuned"))
    for T in (SHORT, LONG):
        score = [data.motion_score(v[:SHORT if knows_only_short else T]) for v in x]
        if name not in ("true", *ALTERNATIVES):
            result[f"loss {T}"] = losses(svd, z[:, :T], x[:, 0], score)
        if T == SHORT and (name in ALTERNATIVES or progress not in ("", "8/8")):
            continue
        made = svd.vae.decode(z[:, :T] / exsvd.VAE_SCALE).clamp(-1, 1) if name == "true" else imitate(svd, name, x[:, 0], score, T, a.sample_steps)
        result[f"samples {T}"] = measure(made)
    save_file({"video": torch.stack([sample.to_pixels(v) for v in made])}, row_path(a, row, ".safetensors"))
    write_json(path, result | {"settings": settings, "seconds": round(time.time() - begun)})
    print(f"{row}: {time.time() - begun:.0f} s", flush=True)


def all_rows(a):
    seeds = range(a.seeds)
    return ["true", *(f"{kind}-{s}" for s in seeds for kind in ("base", "untuned", "scratch")), *(f"tuned-{s} 8/8" for s in seeds),
            *(f"tuned-0 {k}/8" for k in range(1, 8)), *ALTERNATIVES, *ABLATIONS]


# ----------------------------------------------------------------------------------------------------------------------
# 4. Report


def check_measures(a):
    """What the measures say of clips whose truth is known, on the frames themselves: the share of frames in which the object is
    found, the errors of its centre (pixels) and of the camera (pixels per frame)."""
    videos, cameras, balls = scenes(a.scenes)
    x, pan = to_model(videos), -cameras.diff(dim=1)                                       # where what is in the centre goes
    found, centre = objects(x)
    return {"found": found.float().mean().item(), "object error": (centre - balls).norm(dim=-1)[found].mean().item(),
            "camera error": (camera(x) - pan).norm(dim=-1).mean().item(), "camera speed": pan.norm(dim=-1).mean().item()}


COLUMNS = {  # measure: (heading, digits)
    "found": ("object found", 2), "flicker": ("flicker", 2), "object jerk": ("jerk of the object", 1), "camera jerk": ("jerk of the camera", 1),
    "object displacement": ("displacement of the object", 2), "camera displacement": ("displacement of the camera", 2), "late": ("late", 2),
    "return": ("return", 2),
}
LEGEND = f"""Losses: EDM's, mean over noise levels {', '.join(map(str, SIGMAS))}. The rest is of samples. Object found: share of frames. All others are
over those of true clips through the same VAE, whose own are in the first row: flicker, the mean absolute change from frame to
frame, of 255 (VBench's score is 1 - flicker / 255; what moves changes too, so 1 is right, not 0); jerk, pixels per frame^3 (true
cameras have none: theirs is the error of the measure); displacement, pixels in {SHORT - 1} frames; late, displacement of the camera
in the last quarter over that in the first; return, how close late frames come to earlier ones, 0 in a loop. Figures of the object
count where it is found. Cells: mean over the seeds, with several (least to most)."""


def report(a):
    rows = {}
    for row in all_rows(a):
        with open(row_path(a, row, ".json")) as f:
            rows[row] = json.load(f)
    true = rows["true"]
    loss = lambda row, T: sum(rows[row][f"loss {T}"].values()) / len(SIGMAS) if f"loss {T}" in rows[row] else None

    def figure_of(row, key, T=LONG):
        value = rows[row][f"samples {T}"][key]
        return value if key == "found" or row == "true" else value / (true[f"samples {T}"][key] or math.nan)

    def cell(values, digits):
        values = [v for v in values if v is not None]
        spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
        return f"{sum(values) / len(values):.{digits}f}{spread}" if values else ""

    def table(headings, lines):
        return ["| | " + " | ".join(headings) + " |", "|" + " --- |" * (len(headings) + 1), *(f"| {label} | {' | '.join(cells)} |" for label, cells in lines), ""]

    def results(lines, T=LONG):
        keys = [key for key in COLUMNS if key in true[f"samples {T}"]]
        return table([f"loss at {LONG} frames", f"loss at {SHORT}", *(COLUMNS[key][0] for key in keys)],
                     [(label, [cell([loss(r, k) for r in of], 3) for k in (LONG, SHORT)] +
                       [cell([figure_of(r, key, T) for r in of], COLUMNS[key][1]) for key in keys]) for label, of in lines])

    N, P = a.steps, a.steps // 5
    seeds = {kind: [f"{kind}-{s}" + (" 8/8" if kind == "tuned" else "") for s in range(a.seeds)] for kind in ("base", "untuned", "tuned", "scratch")}
    both = [("true clips through the VAE", ["true"]), (f"base, {N} steps at {SHORT} frames", seeds["base"]), ("extended, untuned", seeds["untuned"]),
            (f"post-tuned, {P} steps at {LONG} frames", seeds["tuned"]), (f"from scratch, {N} steps at {LONG} frames", seeds["scratch"])]
    others = [(f"post-tuned, the first {k * P // 8} steps (seed 0)", [f"tuned-0 {k}/8"]) for k in (2, 4)] + [
        (f"sliding windows of {SHORT} (seed 0)", ["sliding"]), (f"{SHORT} frames slowed to {LONG}, nearest (seed 0)", ["nearest"]),
        (f"{SHORT} frames slowed to {LONG}, blend (seed 0)", ["blend"])]
    mean = lambda kind, f: sum(map(f, seeds[kind])) / a.seeds
    over = lambda key: mean("tuned", lambda row: figure_of(row, key))
    short, long = (lambda row: loss(row, SHORT)), (lambda row: loss(row, LONG))
    goals = [  # what, value, least, most
        (f"loss at {LONG}, post-tuned over scratch", mean("tuned", long) / mean("scratch", long), 0, 1.15),
        ("flicker", over("flicker"), 0.9, 1.1),
        ("jerk of the object", over("object jerk"), 0.9, 1.1),
        ("jerk of the camera", over("camera jerk"), 0.9, 1.1),
        ("displacement of the object", over("object displacement"), 0.8, 1.2),
        ("displacement of the camera", over("camera displacement"), 0.8, 1.2),
        (f"loss at {SHORT}, post-tuned over base", mean("tuned", short) / mean("base", short), 0, 1.05),
        (f"the same, half of the steps on {SHORT} frames (seed 0)", short("mixed") / short("base-0"), 0, 1.05),
    ]
    checks = check_measures(a)
    text = [f"`python {' '.join(sys.argv)}`: {a.scenes} held-out scenes, seeds 0 to {a.seeds - 1}; {a.hardware}.", "", *LEGEND.split("\n"), "",
            *results(both + others), f"## Samples of {SHORT} frames", "", *results(both, SHORT), "## Ablations, one run each, seed 0", "",
            *results([("post-tuned", ["tuned-0 8/8"]), *((what, [name]) for name, (what, _) in ABLATIONS.items())]), "## Goals, by means over the seeds", "",
            *table(["measured", "goal", ""], [(what, [f"{value:.3f}", f"{low} to {high}", "met" if low <= value <= high else "missed"]) for what, value, low, high in goals]),
            "## Loss per noise level", "",
            *table([f"{T} frames, {s:g}" for T in (SHORT, LONG) for s in SIGMAS],
                   [(row, [f"{rows[row][f'loss {T}'][str(s)]:.4f}" for T in (SHORT, LONG) for s in SIGMAS]) for row in rows if loss(row, LONG)]),
            f"The measures on true clips, before the VAE: object found in {checks['found']:.1%} of frames, its centre off by {checks['object error']:.3f} pixels, "
            f"camera by {checks['camera error']:.3f} pixels per frame at a mean speed of {checks['camera speed']:.2f}."]
    with open(os.path.join(a.out, "tables.md"), "w") as f:
        f.write("\n".join(text) + "\n")
    print("\n".join(text))
    strip(a, ["true", "untuned-0", "tuned-0 8/8", "scratch-0", "sliding"])
    figure(a, loss, figure_of)


def strip(a, names):
    """Frames 0, 5, ... 35, 39 of the first held-out scene, a row per name."""
    videos = [load_file(row_path(a, name, ".safetensors"))["video"][0] for name in names]  # (T,H,W,3) each
    data.write_png(os.path.join(a.out, "strip.png"), torch.cat([torch.cat(list(v[[*range(0, 40, 5), 39]]), dim=1) for v in videos]))


def figure(a, loss, figure_of):
    """Loss, and flicker, jerk and displacement of samples, over post-tuning."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    P, names = a.steps // 5, ["untuned-0", *(f"tuned-0 {k}/8" for k in range(1, 9))]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    steps = [k * P / 8 for k in range(9)]
    axes[0].plot(steps, [loss(n, LONG) for n in names], "o-", label=f"post-tuned, {LONG} frames")
    axes[0].plot(steps, [loss(n, SHORT) for n in names], "s--", label=f"the same, {SHORT} frames")
    axes[0].axhline(loss("scratch-0", LONG), color="k", lw=1, ls=":", label=f"from scratch, {a.steps} steps")
    axes[0].set(xlabel="post-tuning steps", ylabel="loss", ylim=(0, None))
    axes[1].plot(steps, [figure_of(n, "flicker") for n in names], "o-", label="flicker")
    axes[1].plot(steps, [figure_of(n, "object jerk") for n in names], "^-", label="jerk of the object")
    axes[1].plot(steps, [figure_of(n, "object displacement") for n in names], "v-", label="displacement of the object")
    axes[1].axhline(1, color="k", lw=1, ls=":", label="true clips")
    axes[1].set(xlabel="post-tuning steps", ylabel="over that of true clips", yscale="log", ylim=(0.2, 200))
    for ax in axes:
        ax.axvspan(0.75 * P, P, color="k", alpha=0.06, lw=0, label="learning rate over 5")
        ax.legend(loc="upper right", frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(os.path.join(a.out, "figure.png"), dpi=130)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="one seed, few steps and scenes")
    p.add_argument("--out", help="[runs/study, with --quick runs/study-quick]")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once, each on one thread [all cores]")
    p.add_argument("--steps", type=int, help="N, a multiple of 40 [1000, with --quick 40]")
    p.add_argument("--seeds", type=int, help="[3, with --quick 1]")
    p.add_argument("--scenes", type=int, help="held-out scenes to measure [8, with --quick 4]")
    a = p.parse_args()
    a.steps, a.seeds, a.scenes = a.steps or (40 if a.quick else 1000), a.seeds or (1 if a.quick else 3), a.scenes or (4 if a.quick else 8)
    a.clips, a.vae_steps, a.clip_steps, a.sample_steps = (40, 300, 4, 10) if a.quick else (400, 1000, 160, 25)
    if a.steps % 40:
        p.error(f"--steps {a.steps}: must be a multiple of 40, for post-tuning takes a fifth and is measured in eighths")
    if not importlib.util.find_spec("matplotlib"):
        p.error("the figure needs matplotlib: pip install matplotlib")
    a.out = os.path.abspath(a.out or os.path.join(ROOT, "runs", "study-quick" if a.quick else "study"))
    os.makedirs(os.path.join(a.out, "rows"), exist_ok=True)
    settings, path = {"steps": a.steps, "clips": a.clips, "vae_steps": a.vae_steps, "clip_steps": a.clip_steps}, os.path.join(a.out, "settings.json")
    if os.path.exists(path):
        with open(path) as f:
            theirs = json.load(f)
        if theirs != settings:
            p.error(f"{a.out} holds a study with {theirs}, not {settings}: choose another --out")
    else:
        write_json(path, settings)
    a.hardware = f"{a.jobs} processes of one thread on {os.cpu_count()} cores, torch {torch.__version__}"
    all_runs(a)
    with get_context("spawn").Pool(a.jobs) as pool:
        pool.map(evaluate, [(a, row) for row in all_rows(a)], chunksize=1)
    report(a)


if __name__ == "__main__":
    main()
