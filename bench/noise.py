"""Clips of random pixels, for timing: python train.py --data bench/noise.py"""

import torch


class Noise:
    def __init__(self, frames, size, seed):
        self.frames, self.size, self.seed = frames, size, seed

    def __getitem__(self, n):
        W, H = self.size
        rng = torch.Generator().manual_seed(self.seed + n)
        video = torch.randint(0, 256, (self.frames, 3, H, W), dtype=torch.uint8, generator=rng)
        return {"video": video, "fps": 30.0, "motion": 127.0, "name": str(n)}


def clips(frames, size, seed):
    return Noise(frames, size, seed)
