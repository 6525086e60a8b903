"""Does ExVideo work? The question is asked in the toy's world, where the future of a first picture
is known.

    python toy/study.py  # -> runs/study/{tables.md,figure.png,strip.png}; needs matplotlib
    python toy/study.py --quick  # fewer rows, 100 steps, one seed, two pictures

    1. Rows       what is compared: untuned and post-tuned extensions, ablations, a model from
                  scratch, the alternatives
    2. Training   train.py, as anybody would call it, from assets/toy.safetensors
    3. Samples    40 frames of each picture, and how they compare with the true flight
    4. Report     tables, the figure, a strip of frames

The same command resumes: it keeps what is there, so another --steps needs another --out. The base
knows 8 frames. Everything is judged on 40 frames of 128x128, of pictures that nothing was trained
on: synthetic ones, assets/img.png and photographs of toy/photographs.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from glob import glob
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data
import exsvd
import sample
from toy import measure, pretrain, world

BASE = os.path.join(ROOT, "assets", "toy.safetensors")
T, SIZE, SHORT = 40, 128, world.SHORT
MOTION = 40.0
SEEDS = (0, 2, 3)                   # of training clips too: 1 is pretrain.HELD_OUT's
SIGMAS = (0.2, 1.0, 5.0, 25.0)      # noise levels at which losses are compared
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}

# --------------------------------------------------------------------------------------------------
# 1. Rows

TABLES = {  # positions, known to the base or not, that the frame tables start from
    "fold": exsvd.fold_positions(SHORT, T),
    "stretch": torch.linspace(0, SHORT - 1, T),
    "sinusoid": range(T),
    "random": None,
}
UNTUNED = ("fold", "sinusoid")
ABLATIONS = {                       # train.py's flags beside the common ones
    "no identity convolution": ["--train", r"\.attn\.temporal\.(?!frame_conv)"],
    "everything": ["--train", "^unet"],
    "no EMA": ["--ema", "0"],
}
SCRATCH = "from scratch, five times the steps"
ALTERNATIVES = ("chained windows", "interpolated", "interpolated from 1.6 fps")


def slug(name):
    return "".join(c if c.isalnum() else "-" for c in name)


def runs(a):
    """{name of a training run: (starting table, seed, train.py's extra arguments)}; the paper's way
    comes first."""
    found = {f"fold, seed {seed}": ("fold", seed, []) for seed in SEEDS[:a.seeds]}
    if a.quick:
        return found
    found |= {f"{table} table": (table, 0, []) for table in TABLES if table != "fold"}
    return found | {name: ("fold", 0, extra) for name, extra in ABLATIONS.items()}


def rows(a):
    """{row: (model, extension)}, None for the alternatives, which are made by the base."""
    def out(*parts):
        return os.path.join(a.out, *parts)

    found = {"base, asked for 40 frames": (BASE, None)}
    for table in UNTUNED:
        found[f"untuned: {table}"] = (BASE, out("start", f"{table}.safetensors"))
    for name in runs(a):
        quarters = (1, 2, 4) if name.startswith("fold") else (4,)
        for k in quarters:
            step = a.steps * k // 4
            label = f"post-tuned: {name}" + ("" if k == 4 else f", {25 * k} %")
            if name == "everything":
                found[label] = (out("runs", slug(name), f"model-{step:06d}.safetensors"), None)
            else:
                found[label] = (BASE, out("runs", slug(name), f"exvideo-{step:06d}.safetensors"))
    if not a.quick:
        found[SCRATCH] = (out("runs", "scratch", f"model-{5 * a.steps:06d}.safetensors"), None)
    return found | dict.fromkeys(ALTERNATIVES)


# --------------------------------------------------------------------------------------------------
# 2. Training


def start(a, table):
    """The untuned extension whose frame tables begin with the positions of TABLES; its path."""
    path = os.path.join(a.out, "start", f"{table}.safetensors")
    if not os.path.exists(path):
        torch.manual_seed(0)
        unet = exsvd.extend(exsvd.load(BASE, parts=("unet",)).unet, T)
        for block in unet.temporal_blocks():
            C = block.frame_table.shape[1]
            if table == "random":  # sinusoids have a mean square of 1/2
                block.frame_table.data = torch.randn(T, C) * 0.5**0.5
            else:
                block.frame_table.data = exsvd.sinusoid(torch.as_tensor(list(TABLES[table])), C)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        exsvd.save_extension(path, unet)
    return path


def scratch(a):
    """A model for 40 frames that has learned nothing, with the toy's VAE and CLIP; its path."""
    path = os.path.join(a.out, "start", "scratch.safetensors")
    if not os.path.exists(path):
        torch.manual_seed(0)
        svd = exsvd.load(BASE)
        unet = pretrain.init(exsvd.UNet(replace(svd.unet.config, native_frames=T)))
        exsvd.save_model(path, unet, svd.vae, svd.clip, dtype=torch.float16,
                         defaults=svd.meta["defaults"])
    return path


def train(a, name, *arguments):
    """One run of train.py, resumed where it stopped; nothing happens if it has ended."""
    out = os.path.join(a.out, "runs", slug(name))
    os.makedirs(out, exist_ok=True)
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--out", out, "--workers", "1",
               "--sample-every", "0", "--data", os.path.join(ROOT, "toy", "world.py"),
               "--frames", str(T), "--size", f"{SIZE}x{SIZE}", *arguments]
    with open(os.path.join(out, "output.txt"), "a") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True, env=ONE_THREAD)


def train_all(a, pool):
    jobs = []
    if not a.quick:  # the longest goes first
        longer = ["--steps", str(5 * a.steps), "--weights-every", str(5 * a.steps)]
        jobs.append(pool.submit(
            train, a, "scratch", "--model", scratch(a), "--train", "^unet", *longer))
    quarter = ["--steps", str(a.steps), "--weights-every", str(max(1, a.steps // 4))]
    for name, (table, seed, extra) in runs(a).items():
        common = ["--model", BASE, "--extension", start(a, table), "--seed", str(seed)]
        jobs.append(pool.submit(train, a, name, *common, *quarter, *extra))
    for job in jobs:
        job.result()


# --------------------------------------------------------------------------------------------------
# 3. Samples


def pictures(a):
    """{name: (3,PICTURE,PICTURE) in [-1,1]}, none of them trained on."""
    files = sorted(glob(os.path.join(ROOT, "toy", "photographs", "*.jpg")))
    files.append(os.path.join(ROOT, "assets", "img.png"))
    size, found = world.PICTURE, {}
    for file in files[-a.pictures:]:
        found[os.path.basename(file)] = data.fit_image(data.read_image(file), size, size)
    for i in range(a.pictures):
        found[f"synthetic {i}"] = world.picture(pretrain.HELD_OUT, i)
    return found


def generate(svd, first, frames, fps=world.FPS, overlap=None):
    """What a model makes of a first frame (3,S,S): (frames,3,S,S) in [-1,1]. overlap: in rounds,
    which share frames."""
    return sample.generate(svd, first, size=(SIZE, SIZE), frames=frames, motion=MOTION, fps=fps,
                           overlap=overlap)


def imitate(svd, how, first):
    """40 frames by a base that knows 8: the alternatives of the paper's introduction."""
    if how == "chained windows":
        return generate(svd, first, T, overlap=1)
    fps = 1.6 if how.endswith("1.6 fps") else world.FPS  # at 1.6 the 8 frames are further apart
    key = generate(svd, first, SHORT, fps).flatten(1).T[None]                     # (1, pixels, 8)
    video = F.interpolate(key, T, mode="linear", align_corners=True)[0].T         # (T, pixels)
    return video.unflatten(1, (3, SIZE, SIZE))


@torch.no_grad()
def losses(svd, frames, count=8):
    """EDM's loss on held-out clips, per noise level of SIGMAS: a list."""
    torch.manual_seed(0)
    clips, found = world.clips(frames, (SIZE, SIZE), pretrain.HELD_OUT), []
    for i in range(count):
        item = clips[i]
        video = data.to_float(item["video"])
        x = data.encode_frames(svd.vae, video)[None] * exsvd.VAE_SCALE
        first = video[:1]
        cond, ctx = data.encode_condition(
            svd.vae, svd.clip, first, torch.zeros(1), torch.zeros_like(first))
        ids, noise = exsvd.unet_ids(svd.unet.config.ids, item | {"aug": 0.0}), torch.randn(x.shape)
        given = x, noise, cond[None], ctx[None], ids
        found.append([loss_at(svd.unet, sigma, *given) for sigma in SIGMAS])
    return torch.tensor(found).mean(0).tolist()


def loss_at(unet, sigma, x, noise, *conditions):
    loss, sigma = exsvd.LOSSES["edm"], torch.tensor([sigma])
    return exsvd.training_loss(unet, loss, x, sigma, noise, *conditions).item()


def measure_row(a, row):
    """Measures a row and writes the numbers to --out/rows, with the frames of its first picture."""
    path = os.path.join(a.out, "rows", slug(row) + ".json")
    if os.path.exists(path):
        return
    torch.set_num_threads(1)
    model = rows(a)[row]
    svd = exsvd.load(*(model or (BASE, None)))
    found = {"losses": model and losses(svd, T), "pictures": {}, "short": {}}
    for i, (name, picture) in enumerate(pictures(a).items()):
        first = F.avg_pool2d(picture, world.PICTURE // SIZE)
        video = generate(svd, first, T) if model else imitate(svd, row, first)
        found["pictures"][name] = measure.measure(video, picture, MOTION, world.FPS)
        if i == 0:
            pixels = {"video": sample.to_pixels(video)}
            exsvd.save(path.replace(".json", ".safetensors"), pixels, {})
        if model:
            video = generate(svd, first, SHORT)
            found["short"][name] = measure.measure(video, picture, MOTION, world.FPS)
    with exsvd.written_whole(path) as temporary:
        Path(temporary).write_text(json.dumps(found))


# --------------------------------------------------------------------------------------------------
# 4. Report


def mean(values):
    return sum(values) / len(values)


def summary(row):
    """A row's measurements, averaged over pictures: {column: value}."""
    good = row["pictures"].values()
    curve = torch.tensor([m["psnr"] for m in good]).mean(0)
    short = [mean(m["psnr"]) for m in row["short"].values()]
    names = {"arrival": "arrival", "RMS": "rms", "back": "back", "flicker": "flicker"}
    columns = {column: mean([m[name] for m in good]) for column, name in names.items()}
    columns |= {f"PSNR {t}": curve[t].item() for t in (7, 20, 39)}
    columns["PSNR of 8 frames"] = mean(short) if short else None
    return columns | {f"loss {s:g}": v for s, v in zip(SIGMAS, row["losses"] or [])}


def table(found):
    """Markdown of {row: {column: value}}."""
    def cell(v):
        if v is None:
            return ""
        return f"{v:.1f}" if abs(v) >= 10 else f"{v:.3f}"

    columns = list(max(found.values(), key=len))
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row, values in found.items():
        lines.append(f"| {row} | " + " | ".join(cell(values.get(c)) for c in columns) + " |")
    return "\n".join(lines)


def compared(a):
    """The rows that pictures show beside the fold's."""
    return ALTERNATIVES if a.quick else (*ALTERNATIVES, SCRATCH)


def figure(a, found):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    tuned = "post-tuned: fold, seed 0"
    untuned = [row for row in found if row.startswith("untuned")]
    others = ["untuned: fold", f"{tuned}, 25 %", f"{tuned}, 50 %", tuned, *compared(a)]
    panels = (("untuned: where the camera goes", [*untuned, "true"]),
              ("the fold post-tuned, and the alternatives", [*others, "true"]))

    def over_frames(row, key):
        return torch.tensor([m[key] for m in found[row]["pictures"].values()]).mean(0)

    plots = plt.figure(figsize=(15, 4.5)).subplots(1, 3)
    for axes, (title, names) in zip(plots, panels):
        for name in names:
            path = torch.linspace(0, 1, T) if name == "true" else over_frames(name, "path")
            axes.plot(path, "k--" if name == "true" else "-", label=name)
        axes.set(title=title, xlabel="frame", ylabel="share of the camera's way")
    for name in others:
        plots[2].plot(over_frames(name, "psnr"), label=name)
    plots[2].set(title="low-passed PSNR against the true flight", xlabel="frame", ylabel="dB")
    for axes in plots:
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    plt.tight_layout()
    plt.savefig(os.path.join(a.out, "figure.png"), dpi=90)


def strip(a):
    """Frames 0, 5, ... 39 of the first picture; rows: true, untuned, post-tuned, compared()."""
    shown = [0, 5, 10, 15, 20, 25, 30, 35, 39]
    picture = next(iter(pictures(a).values()))
    videos = [sample.to_pixels(world.flight(picture, world.scales(MOTION, world.FPS, T), SIZE))]
    for row in ("untuned: fold", "post-tuned: fold, seed 0", *compared(a)):
        path = os.path.join(a.out, "rows", slug(row) + ".safetensors")
        videos.append(exsvd.Tensors(path).get("video"))
    strips = [torch.cat(list(video[shown]), 1) for video in videos]
    data.write_png(os.path.join(a.out, "strip.png"), torch.cat(strips, 0))


def report(a):
    found = {}
    for row in rows(a):
        with open(os.path.join(a.out, "rows", slug(row) + ".json")) as f:
            found[row] = json.load(f)
    text = table({row: summary(values) for row, values in found.items()})
    seeds = [summary(found[f"post-tuned: fold, seed {seed}"]) for seed in SEEDS[:a.seeds]]
    spread = []
    for column in seeds[0]:
        values = [seed[column] for seed in seeds]
        spread.append(f"{column} {min(values):.3f} to {max(values):.3f}")
    text += f"\n\nThe fold, post-tuned, least to most of its seeds: {', '.join(spread)}.\n"
    with open(os.path.join(a.out, "tables.md"), "w") as f:
        f.write(text)
    figure(a, found)
    strip(a)
    print(text)


def main():
    p = argparse.ArgumentParser(description="Study ExVideo in the toy's world.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default=os.path.join(ROOT, "runs", "study"))
    p.add_argument("--steps", type=int, default=200, help="of post-tuning")
    p.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1),
                   help="how many of SEEDS")
    p.add_argument("--pictures", type=int, default=3,
                   help="of assets/img.png and toy/photographs, and as many synthetic ones")
    p.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    p.add_argument("--quick", action="store_true",
                   help="100 steps, 1 seed, 1 + 1 pictures, fewer rows, other folder")
    p.add_argument("--row", help=argparse.SUPPRESS)  # measure it, in a process of its own
    a = p.parse_args()
    if a.quick:
        a.steps, a.seeds, a.pictures, a.out = 100, 1, 1, a.out + "-quick"
    os.makedirs(os.path.join(a.out, "rows"), exist_ok=True)
    if a.row:
        return measure_row(a, a.row)
    for name in UNTUNED:
        start(a, name)
    with ThreadPoolExecutor(a.jobs) as pool:
        train_all(a, pool)
        command = [sys.executable, *sys.argv, "--row"]
        jobs = [pool.submit(subprocess.run, [*command, row], check=True, env=ONE_THREAD)
                for row in rows(a)]
        for job in jobs:
            job.result()
    report(a)


if __name__ == "__main__":
    main()
