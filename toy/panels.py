"""What ExVideo changes, side by side: the animation at the top of the README.

    python toy/panels.py  # -> assets/panels.webp, of assets/img.png

Three videos of the same picture and noise: the base asked for 40 frames, extended but not tuned,
post-tuned.
"""

import os
import sys

import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data
import exsvd
import sample

ASSETS = os.path.join(ROOT, "assets")
IMAGE, OUT = os.path.join(ASSETS, "img.png"), os.path.join(ASSETS, "panels.webp")
MODEL, EXTENSION = sample.toy_files()
FRAMES = 40


def video(svd, picture):
    """uint8 (FRAMES, H, W, 3), of the size that the model's file asks for."""
    return sample.to_pixels(sample.generate(svd, picture, frames=FRAMES))


if __name__ == "__main__":
    picture = data.read_image(IMAGE)
    base, untuned, tuned = exsvd.load(MODEL), exsvd.load(MODEL), exsvd.load(MODEL, EXTENSION)
    exsvd.extend(untuned.unet, FRAMES)
    panels = torch.cat([video(svd, picture) for svd in (base, untuned, tuned)], dim=2)
    first, *rest = [Image.fromarray(frame.numpy()) for frame in panels]
    first.save(OUT, save_all=True, append_images=rest, duration=125, loop=0, quality=85, method=6)
    print(f"{OUT}: {os.path.getsize(OUT) / 1e6:.1f} MB")
