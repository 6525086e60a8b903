"""The toy's world: a still picture into which a camera flies. Also an example of a data file, for
`train.py --data toy/world.py`.

The first frame and the motion bucket determine the clip: nothing appears that was not there at the
start, and the motion bucket is 1000 times the camera's speed. At speed v the window that the camera
sees shrinks by a factor of exp(-v) per second. So every sample can be compared with the true
flight, frame by frame (toy/measure.py).

Synthetic pictures are "dead leaves", shapes of all sizes that hide each other, on 1/f noise, which
have the statistics of photographs (Lee, Mumford & Huang 2001). Images are float32 (3, H, W) in
[-1, 1].
"""

import colorsys
import functools
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

FPS = 8                  # frames per second of long clips
RATES = (8, 4, 1.6, 1.6, 1.6)  # of short ones: at 1.6 eight frames get as far as thirty-six do at 8
SHORT = 8                # frames; clips of at most that many are short
MAX_MOTION = 80          # the fastest motion bucket: 40 frames at FPS end at a window of 0.68
PICTURE = 384            # pixels of a picture; clips are 256 or less: flying in finds detail
FIT = 64                 # pixels at which windows are compared
LARGEST = 1500           # pixels of the largest square that is taken of a photograph


class Clips:
    """Clips of flights, determined by (seed, n). size: (S, S), or several of them, which come
    equally often. pictures: a folder that half of the flights go into.

    The camera starts at a window of 0.7 to 1 of a picture, flies into that window's middle, and
    stands still in one of eight clips. Short clips come at each of RATES, so that the model learns
    what the frame rate means. Fast flights are harder to learn, so they come more often.
    """

    def __init__(self, frames, size, seed=0, pictures=None):
        widths, heights = np.reshape(size, (-1, 2)).T.tolist()
        if widths != heights:
            raise ValueError(f"the toy's clips are square: {size}")
        self.frames, self.sizes, self.seed, self.pictures = frames, widths, seed, pictures

    def __getitem__(self, n):
        rng = np.random.default_rng([self.seed, n, 1])
        fps = float(rng.choice(RATES)) if self.frames <= SHORT else float(FPS)
        motion = 0.0 if rng.uniform() < 1 / 8 else MAX_MOTION * rng.uniform()**0.5
        start = rng.uniform(0.7, 1)
        offset = torch.from_numpy(rng.uniform(-1, 1, 2) * (1 - start)).float()
        taken = self.pictures and rng.uniform() < 0.5
        image = photograph(self.pictures, rng) if taken else picture(self.seed, n)
        size = self.sizes[rng.integers(len(self.sizes))]
        video = flight(image, start * scales(motion, fps, self.frames), size, offset)
        video = ((video + 1) * 127.5).round().to(torch.uint8)  # (T, 3, size, size)
        return dict(video=video, fps=fps, motion=motion, name=f"{self.seed}@{n}")

    def measure(self, frames, image, fps, motion):
        """Returns "arrival": the share of its way that the camera has flown at the last frame."""
        if not motion:
            return {}
        return {"arrival": way(camera_path(frames, image), motion, fps)[-1].item()}


clips = Clips


def log_uniform(rng, low, high):
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def power_noise(rng, size, steepness):
    """Two fields of mean 0 and variance 1 whose amplitude falls as frequency**-steepness:
    (2,size,size)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    frequency[0, 0] = np.inf
    real, imaginary = rng.standard_normal((2, size, size))
    field = np.fft.ifft2((real + 1j * imaginary) * frequency**-steepness)
    fields = np.stack([field.real, field.imag])
    return (fields / fields.std((1, 2), keepdims=True)).astype(np.float32)


def outline(rng, x, y):
    """Signed distance of points x, y from a random convex shape of radius about 1; negative
    inside."""
    turn, flat = rng.uniform(0, 2 * math.pi), rng.uniform(0.4, 1)
    u = math.cos(turn) * x + math.sin(turn) * y
    v = math.cos(turn) * y - math.sin(turn) * x
    kind = rng.integers(3)
    if kind == 0:                                                                 # ellipse
        return (np.hypot(u, v / flat) - 1) * flat
    if kind == 1:                                                                 # box
        return np.maximum(np.abs(u) - 0.9, np.abs(v) - 0.9 * flat)
    sides = rng.integers(3, 8)                                                    # polygon
    angles = (np.arange(sides) + rng.uniform(-0.1, 0.1, sides)) * 2 * math.pi / sides
    return np.max([math.cos(a) * u + math.sin(a) * v - 0.8 for a in angles], axis=0)


def picture(seed, index):
    """A synthetic still, a function of (seed, index) alone: float32 (3, PICTURE, PICTURE)."""
    rng, size = np.random.default_rng([seed, index]), PICTURE
    smooth = power_noise(rng, size, rng.uniform(1.3, 1.9))
    rough = power_noise(rng, size, rng.uniform(0.6, 1.4))
    y, x = np.mgrid[:size, :size].astype(np.float32)
    vivid = rng.uniform(0.1, 0.9)  # photographs are pale, and of few colours
    palette = []
    for _ in range(rng.integers(2, 7)):
        hue, saturation = rng.uniform(), vivid * rng.beta(1.2, 1.5)
        palette.append(colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.05, 1)**0.8))

    def colour():
        near = palette[rng.integers(len(palette))] + rng.normal(0, 0.06, 3)
        return np.clip(near, 0, 1).astype(np.float32)

    angle = rng.uniform(0, 2 * math.pi)  # the ground: a gradient and tinted noise
    along = math.cos(angle) * (x - size / 2) + math.sin(angle) * (y - size / 2)
    slope = along / (size * rng.uniform(0.4, 1.2))
    ramp = np.clip(0.5 + slope, 0, 1)[..., None]
    image = colour() * ramp + colour() * (1 - ramp)                               # (size, size, 3)
    for field in (smooth[0], smooth[1], rough[0]):
        image = image + field[..., None] * rng.uniform(0, 0.08, 3).astype(np.float32)

    radii = [log_uniform(rng, 4, 150) for _ in range(rng.choice([0, 15, 35, 60, 90]))]
    if rng.uniform() < 0.5:
        radii.sort(reverse=True)  # small things in front
    focus = log_uniform(rng, 0.5, 3)  # pixels, the width of an edge
    for radius in radii:
        cx, cy = rng.uniform(0, size, 2)
        left, top = max(0, int(cx - 1.5 * radius)), max(0, int(cy - 1.5 * radius))
        part = np.s_[top:int(cy + 1.5 * radius) + 2, left:int(cx + 1.5 * radius) + 2]
        u, v = (x[part] - np.float32(cx)) / radius, (y[part] - np.float32(cy)) / radius
        distance = outline(rng, u, v)
        if rng.uniform() < 0.4:  # ragged: foliage, rock, cloud
            distance = distance + smooth[0][part] * rng.uniform(0.05, 0.25)
        cover = np.clip(0.5 - distance * (radius / focus), 0, 1)[..., None].astype(np.float32)
        shade = rng.normal(0, 0.1) * u + rng.normal(0, 0.1) * v  # light from one side, and texture
        texture = rough if rng.uniform() < 0.6 else smooth
        shade = shade + texture[1][part] * log_uniform(rng, 0.005, 0.12)
        if rng.uniform() < 0.15:                                                  # stripes
            waves = np.sin((math.cos(angle) * u + math.sin(angle) * v) * rng.uniform(3, 30))
            shade = shade + rng.uniform(0.05, 0.3) * waves
        image[part] += cover * (colour() + shade[..., None].astype(np.float32) - image[part])
    image = (image - 0.5) * rng.uniform(0.6, 1.25) + 0.5 + rng.uniform(-0.12, 0.12)
    image = torch.from_numpy(np.ascontiguousarray(image)).float().permute(2, 0, 1)
    return image.clamp(0, 1) * 2 - 1


@functools.cache
def opened(folder):
    """The pictures of a folder, each as uint8 (H, W, 3)."""
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def photograph(folder, rng):
    """A random square of a picture of the folder, or its mirror image: float32 (3, PICTURE,
    PICTURE)."""
    images = opened(folder)
    image = images[rng.integers(len(images))]
    side = int(log_uniform(rng, PICTURE, max(PICTURE, min(*image.shape[:2], LARGEST))))
    top, left = (int(rng.integers(max(1, n - side + 1))) for n in image.shape[:2])
    square = Image.fromarray(image[top:top + side, left:left + side])
    square = square.resize((PICTURE, PICTURE), Image.LANCZOS)
    square = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1
    return square.flip(2) if rng.uniform() < 0.5 else square


def windows(images, scales, offsets, size):
    """Windows onto images (n,3,H,W): (n,3,size,size). Each pixel is the mean of four samples,
    against aliasing.

    scales (n,): 1 is all of an image. offsets (n,2): of the middles; 1 is half an image.
    """
    theta = torch.cat([scales.view(-1, 1, 1) * torch.eye(2), offsets[..., None]], dim=-1)  # (n,2,3)
    grid = F.affine_grid(theta, (len(images), 3, 2 * size, 2 * size), align_corners=False)
    return F.avg_pool2d(F.grid_sample(images, grid, padding_mode="border", align_corners=False), 2)


def scales(motion, fps, frames):
    """The camera's path: the scale of its window at each frame, (frames,). motion: a bucket."""
    return torch.exp(-motion / 1000 / fps * torch.arange(frames))


def flight(image, scales, size, offset=(0.0, 0.0)):
    """What a camera sees that flies into an image (3,H,W), H = W: float32 (T,3,size,size).

    scales (T,): of its window. offset: of the point it flies to from the image's middle.
    """
    if image.shape[-1] > 2 * size:  # or the windows would alias
        image = F.interpolate(image[None], (2 * size, 2 * size), mode="bilinear", antialias=True)[0]
    offsets = torch.as_tensor(offset).expand(len(scales), 2)
    return windows(image.expand(len(scales), -1, -1, -1), scales, offsets, size)


def flatten(images):
    """Images (n,3,h,w) as vectors of length 1 without the mean of each channel: tints do not
    matter."""
    x = (images - images.mean((2, 3), keepdim=True)).flatten(1)
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-6)


def camera_path(video, picture):
    """The window of the picture that each frame shows, as its scale: 1 is all of it, 0.5 the middle
    half; float (T,).

    The scale with the highest correlation, tried from 0.5 to 1.1 in steps of 0.01 and refined by a
    parabola. Only flights into the middle are recognised.
    """
    tried = torch.arange(0.5, 1.105, 0.01)
    small = F.interpolate(video, (FIT, FIT), mode="bilinear", antialias=True, align_corners=False)
    score = flatten(small) @ flatten(flight(picture, tried, FIT)).T  # (T, tried)
    best = score.argmax(1).clamp(1, len(tried) - 2)
    left, middle, right = (score.gather(1, (best + i)[:, None])[:, 0] for i in (-1, 0, 1))
    shift = 0.5 * (left - right) / (left - 2 * middle + right).clamp(max=-1e-9)
    return tried[best] + 0.01 * shift.clamp(-1, 1)


def way(path, motion, fps):
    """Camera path (T,) -> the distance flown at each frame, (T,); 1 is the true flight's at the
    last frame."""
    return -path.log() / (motion / 1000 / fps * (len(path) - 1))
