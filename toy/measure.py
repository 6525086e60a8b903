"""Samples pictures with the toy and compares the samples with the true flight into them.

    python toy/measure.py assets/img.png toy/photographs/*.jpg  # one line each
    python toy/measure.py assets/img.png --size 128x128 --motion 80 --dtype float32  # as sample.py

No video is written, so compression does not affect what is measured. Videos are float32
(T, 3, S, S) and pictures (3, P, P), in [-1, 1]. The first frame shows all of the picture, or its
middle square.
"""

import os
import sys

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data
import exsvd
import sample
from toy import world

LOW = 4             # pixels of 128: what "low-passed" averages over, in each direction


def psnr(a, b):
    """Of each low-passed image in [-1, 1], (n,3,H,W) twice -> dB, (n,)"""
    error = F.avg_pool2d(a.clamp(-1, 1) - b, LOW * a.shape[-1] // 128).square().flatten(1).mean(1)
    return 10 * (4 / error.clamp(min=1e-8)).log10()


def change(video):
    """Mean difference of neighbouring frames, in 255ths."""
    return (video[1:] - video[:-1]).abs().mean().item() * 127.5


def measure(video, picture, motion, fps):
    """{name: value} of a sample at a motion bucket above 0.

    The camera's way, as shares of the true one: "path" at every frame, "arrival" at the last, "rms"
    its distance from the straight path, "back" its longest step back. "flicker": the change from
    frame to frame, over that of a true flight into the sample's own first frame, which is as soft
    as the sample. "flicker_sharp": over that of the true flight into the picture. "psnr":
    low-passed, against the true flight, at every frame, in dB.
    """
    T, S = len(video), video.shape[-1]
    scales = world.scales(motion, fps, T)
    truth = world.flight(picture, scales, S)
    path = world.way(world.camera_path(video, picture), motion, fps)
    straight = torch.linspace(0, 1, T)
    return {
        "path": path.tolist(),
        "arrival": path[-1].item(),
        "rms": (path - straight).square().mean().sqrt().item(),
        "back": (path.cummax(0).values - path).max().item(),
        "flicker": change(video) / change(world.flight(video[0], scales, S)),
        "flicker_sharp": change(video) / change(truth),
        "psnr": psnr(video, truth).tolist(),
    }


def show(m):
    """A measurement as one line."""
    T = len(m["psnr"])
    early, middle, late = (m["psnr"][t] for t in (min(7, T - 1), T // 2, T - 1))
    return (f"arrival {m['arrival']:.2f}, RMS {m['rms']:.3f}, back {m['back']:.2f}, "
            f"flicker {m['flicker']:.2f} against its first frame and "
            f"{m['flicker_sharp']:.2f} against the picture, "
            f"PSNR {early:.1f} / {middle:.1f} / {late:.1f} dB")


def main():
    a, given = sample.parse(None)
    if a.video or a.decode_only or a.end or a.keyframe:
        raise data.MediaError("only samples of one picture are measured: leave out --video, "
                              "--decode-only, --end and --keyframe")
    model, extension = (a.model, a.extension) if a.model else sample.toy_files(a.extension)
    device = torch.device(a.device)
    svd = sample.load(a, given, model, extension, device)
    for name, seed, _ in a.jobs:
        image = data.read_image(name)
        s = sample.complete(svd, given | {"seed": seed}, image.shape[1::-1])
        if s.size[0] != s.size[1]:
            raise data.MediaError("--size: the toy's flights are square, such as 128x128")
        video = sample.generate(svd, image, s, device)
        picture = data.fit_image(image, world.PICTURE, world.PICTURE)
        if s.motion:
            result = show(measure(video, picture, s.motion, s.fps))
        else:
            result = f"the last window is {world.camera_path(video, picture)[-1]:.3f}"
        print(f"{name}, seed {seed}: {result}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (exsvd.WeightsError, data.MediaError) as e:
        sys.exit(f"measure.py: {e}")
