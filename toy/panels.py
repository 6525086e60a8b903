"""What ExVideo changes, side by side: the animation at the top of the README.

    python toy/panels.py                               # -> assets/panels.webp, of assets/img.png

Three videos of the same picture and noise: the base asked for 40 frames, extended but not tuned,
post-tuned.
"""

import argparse
import os
import sys

import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data
import exsvd
import sample

MODEL = os.path.join(ROOT, "assets", "toy.safetensors")
EXTENSION = os.path.join(ROOT, "assets", "toy-exvideo.safetensors")


def video(svd, picture, size, frames):
    """uint8 (frames, size, size, 3)"""
    s = sample.settings_for(svd, dict(size=(size, size), frames=frames))
    latents = sample.make_latents(svd, data.fit_image(picture, size, size), s, torch.device("cpu"))
    with torch.inference_mode():
        decoded = torch.cat(list(sample.decode(svd.vae, latents / exsvd.VAE_SCALE, s.decode_chunk)))
    return sample.to_pixels(decoded)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="The README's animation.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--image", default=os.path.join(ROOT, "assets", "img.png"))
    p.add_argument("--out", default=os.path.join(ROOT, "assets", "panels.webp"))
    p.add_argument("--size", type=int, default=128)
    p.add_argument("--frames", type=int, default=40)
    p.add_argument("--quality", type=int, default=85)
    a = p.parse_args()
    picture = data.read_image(a.image)
    base, untuned, tuned = exsvd.load(MODEL), exsvd.load(MODEL), exsvd.load(MODEL, EXTENSION)
    exsvd.extend(untuned.unet, a.frames)
    panels = torch.cat([video(svd, picture, a.size, a.frames) for svd in (base, untuned, tuned)], dim=2)
    first, *rest = [Image.fromarray(frame.numpy()) for frame in panels]
    first.save(a.out, save_all=True, append_images=rest, duration=125, loop=0, quality=a.quality, method=6)
    print(f"{a.out}: {os.path.getsize(a.out) / 1e6:.1f} MB")
