"""Makes the toy that ships, assets/toy.safetensors and assets/toy-exvideo.safetensors, from nothing but synthetic scenes:

    python toy/pretrain.py --smooth --clips 4000 --vae-steps 1500                # its VAE -> runs/toy-start.safetensors
    python toy/pretrain.py --videos runs/short --frames 8 --clips 2400           # flights into pictures, 128x128 pixels
    python toy/pretrain.py --videos runs/long --speed 0.032 --clips 240 --seed 1 # the same, 40 frames each

    train="deepspeed --num_accelerators 2 train.py --motion 20 --checkpoint none --workers 1"
    base="--frames 8 --batch 4 --ema 0.98"                                       # CLIP, with a first UNet; then latents, once
    $train --model runs/toy-start.safetensors --data runs/short --train all $base --lr 1e-3 --warmup 20 --steps 60 --out runs/clip
    python data.py encode --model runs/clip/model-000060.safetensors --data runs/short --frames 8 --out runs/short-latents
    python data.py encode --model runs/clip/model-000060.safetensors --data runs/long --frames 40 --out runs/long-latents

    base="$base --model runs/clip/model-000060.safetensors --data runs/short-latents --train ^unet --warmup 50 --out runs/base"
    $train $base --lr 2e-3 --steps 1500 && $train $base --lr 4e-4 --steps 1800
    tune="--model runs/base/model-001800.safetensors --data runs/long-latents --frames 40 --batch 2 --ema 0.95 --warmup 10 --out runs/tuned"
    $train $tune --lr 1e-3 --steps 90 && $train $tune --lr 3e-4 --steps 130 && $train $tune --lr 2e-4 --steps 190   # ExVideo: 40 frames
    python toy/pretrain.py --pack runs/base/model-001800.safetensors --out assets/toy.safetensors
    python toy/pretrain.py --pack runs/tuned/exvideo-000190.safetensors --out assets/toy-exvideo.safetensors

    1. Scenes   short clips of data.synthetic_scene, their colours shuffled so that photographs look familiar, and flights into
                them; or (--simple) the study's world
    2. VAE      reconstruction of crops at many scales; halfway its latents are given mean 0 and variance 1

What ships was made by these commands (bash) on two cores of an Intel Xeon in about two hours: VAE 13 min on one core (held-out
PSNR 24.8 dB), beside it the videos, 9 min; CLIP 3 min; latents 14 min and 3 min, with two encoders at a time (the second list in
halves); base 49 and 10 min (1.9 s a step); post-tuning 19 min (5.7 s a step). Before, 320 long flights at 0.08 per second, which
end at 0.68 of the picture, had been tried and dropped: after 120 steps (lr 2e-3, EMA 0.98, so not a comparison of speed alone)
small things dissolved. The base's own 8 frames are good down to about 0.87.

The networks are SVD's, block for block, only narrower; 128 x 128 pixels are 16 x 16 latents.
"""

import argparse
import math
import os
import sys
import time
from multiprocessing import Pool

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data
import exsvd
import sample

T, SIZE = 8, 64              # frames and pixels of a clip
UNET = lambda C: exsvd.UNetConfig(channels=(C,) * 4, heads=(C // 16,) * 4, context_dim=64, groups=8, native_frames=T)
VAE = exsvd.VAEConfig(channels=(16, 32, 64, 64), groups=2)  # few groups: normalising pairs of channels would lose colour
CLIP = exsvd.CLIPConfig(width=64, layers=2, heads=4, patch=28, out_dim=64)
BLUR = 1.5                   # pixels, of the pictures of flights: this small a VAE has no finer texture to offer
LATENT_NOISE = 0.1           # standard deviation added to latents in VAE training: errors this small will not show

# ----------------------------------------------------------------------------------------------------------------------
# 1. Scenes


def blurred(x, sigma, radius):
    """Gaussian blur with kernels of 2 * radius + 1 pixels: float (n,C,H,W) -> the same."""
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    x = F.pad(x, [radius] * 4, mode="replicate")
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        x = F.conv2d(x, (taps / taps.sum()).view(shape).repeat(x.shape[1], 1, 1, 1), groups=x.shape[1])
    return x


def simple_scene(seed, index, frames):
    """A world that small models learn in some hundred steps: waves of colour, over which the camera pans at constant speed, and a
    magenta ball that bounces off the edges of the frame. uint8 (frames, SIZE, SIZE, 3); the camera's path and the ball's in
    the frame, in pixels, float32 (frames, 2) each."""
    rng, t = np.random.default_rng([seed, index]), np.arange(frames)

    def velocity(least, most):
        speed, angle = math.exp(rng.uniform(math.log(least), math.log(most))), rng.uniform(0, 2 * math.pi)
        return speed * np.array([math.cos(angle), math.sin(angle)])

    camera = velocity(0.3, 1) * t[:, None]                                             # (frames, 2)
    v, u = np.mgrid[:SIZE, :SIZE] + 0.5
    x, y = (axis + path[:, None, None] for axis, path in zip((u, v), camera.T))        # (frames, SIZE, SIZE)
    image, turn = rng.uniform(0.3, 0.7, 3), rng.uniform(0, 2 * math.pi)
    for k in range(3):                                                                 # 60 degrees apart: every pan shows
        length, angle, phase = rng.uniform(44, 96), turn + k * math.pi / 3, rng.uniform(0, 2 * math.pi)
        wave = np.sin(2 * math.pi / length * (math.cos(angle) * x + math.sin(angle) * y) + phase)
        image = image + wave[..., None] * rng.normal(0, 0.23, 3)
    image = torch.from_numpy(image).float().clamp(0, 1)
    image[..., 1] += (data.magenta(image) - data.HUE_BACK).clamp(min=0)

    radius = rng.uniform(9, 12)
    reach, moved = SIZE / 2 - radius, rng.uniform(0, 4 * SIZE, 2) + velocity(0.7, 2) * t[:, None]
    centre = SIZE / 2 + np.abs(moved % (4 * reach) - 2 * reach) - reach                # there and back: a bounce
    apart = np.hypot(u - centre[:, 0, None, None], v - centre[:, 1, None, None])
    ball = torch.tensor([rng.uniform(0.7, 0.9), rng.uniform(0, 0.1), rng.uniform(0.7, 0.9)]).float()
    image = torch.lerp(image, ball, torch.from_numpy(1 / (1 + np.exp((apart - radius) / 1.5))).float()[..., None])
    return (image * 255).round().to(torch.uint8), torch.from_numpy(camera).float(), torch.from_numpy(centre).float()


def scene(args):
    """uint8 (T, SIZE, SIZE, 3). A third of the clips skip every other frame: twice as fast."""
    torch.set_num_threads(1)
    seed, index, simple = args
    stride = 2 if index % 3 == 0 else 1
    frames = simple_scene(seed, index, T * stride)[0] if simple else data.synthetic_scene(seed, index, T * stride, SIZE)[0]
    return frames[::stride]


def make_clips(seed, n, workers, simple):
    """n clips (n, T, 3, SIZE, SIZE) uint8."""
    with Pool(workers) as pool:
        videos = list(pool.imap(scene, ((seed, i, simple) for i in range(n)), chunksize=16))
    return torch.stack(videos).permute(0, 1, 4, 2, 3).contiguous()


def recolour(x):
    """Random hue rotation, channel order, contrast and negation of each clip: (B,T,3,H,W) in [-1,1] -> the same.

    Without it everything that moves by itself would be magenta, as objects are in the scenes.
    """
    B, k = len(x), 3**-0.5
    a = torch.rand(B, 1, 1) * 2 * math.pi
    cross = k * torch.tensor([[0., -1, 1], [1, 0, -1], [-1, 1, 0]])
    turn = a.cos() * torch.eye(3) + (1 - a.cos()) / 3 + a.sin() * cross               # (B,3,3), about the gray axis
    turn = torch.where(torch.rand(B, 1, 1) < 0.3, torch.eye(3), turn)
    order = torch.stack([torch.eye(3)[torch.randperm(3)] for _ in range(B)])
    sign = torch.where(torch.rand(B, 1, 1) < 0.25, -1., 1.)
    gain, lift = torch.empty(B, 1, 1).uniform_(0.7, 1.3), torch.empty(B, 1, 1, 1, 1).uniform_(-0.1, 0.1)
    return (torch.einsum("bij,btjhw->btihw", gain * sign * order @ turn, x) + lift).clamp(-1, 1)


def crops(clips, B, frames):
    """A batch for the VAE: (B,frames,3,SIZE,SIZE) in [-1,1]. Windows of 40 to 120 pixels onto four clips side by side."""
    i, t = torch.randint(len(clips), (B, 4)), torch.randint(T - frames + 1, (1,)).item()
    x = clips[i, t:t + frames].float() / 127.5 - 1                                     # (B, 4, t, 3, H, W)
    x = torch.cat([torch.cat([x[:, 0], x[:, 1]], -1), torch.cat([x[:, 2], x[:, 3]], -1)], -2)
    x = recolour(x)
    out = []
    for video in x:
        s = int(40 * 3 ** torch.rand(1).item())
        y, z = (torch.randint(2 * SIZE - s + 1, (1,)).item() for _ in range(2))
        video = F.interpolate(video[..., y:y + s, z:z + s], (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        out.append(video.flip(-1) if torch.rand(1) < 0.5 else video)
    return torch.stack(out)


def windows(x, scale, offset, size, mode="bilinear"):
    """Windows onto images (n,C,H,W), of that scale (n,) and that far from the middle (n,2), where 1 is half an image: (n,C,*size)."""
    theta = torch.cat([scale.view(-1, 1, 1) * torch.eye(2), offset[..., None]], -1)    # (n,2,3)
    grid = F.affine_grid(theta, (len(x), 1, *size), align_corners=False)
    return F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False)


def flight(seed, index, frames, size, speed):
    """A still picture into whose middle a camera flies, at `speed` (of the distance, per second). Nothing appears that was not
    there at the start, so nothing has to be invented. uint8 (frames, size, size, 3), and its frames per second.

    Pictures are synthetic scenes in colours of photographs, drawn from torch's global generator. Clips of 8 frames are also taken at a half or a fifth of
    data.SYNTHETIC_FPS, and then get as far as 40 frames do: the networks are told the frame rate.
    """
    rng = np.random.default_rng([seed, index])
    fps = data.SYNTHETIC_FPS / rng.choice([k for k in (1, 2, 5) if k * frames <= 40])
    x = recolour(data.synthetic_scene(seed, index, 1, 256)[0].permute(0, 3, 1, 2)[None].float() / 127.5 - 1)[0]
    x = torch.lerp(x.mean(1, keepdim=True), x, torch.rand(1))                          # photographs are paler
    scale = rng.uniform(0.7, 1) * torch.exp(-speed / fps * torch.arange(frames))       # of the window, in pictures
    middle = torch.from_numpy(rng.uniform(-1, 1, 2)).float() * (1 - scale[0])
    x = windows(x.expand(frames, -1, -1, -1), scale.float(), middle.expand(frames, -1), (size, size), "bicubic")
    return sample.to_pixels(blurred(x, BLUR, math.ceil(3 * BLUR))), fps


def video(args):
    """One file of --videos."""
    torch.set_num_threads(1)
    folder, seed, index, frames, size, speed, simple = args
    torch.manual_seed(seed * 1_000_003 + index)                                        # for recolour
    x, fps = (simple_scene(seed, index, frames)[0], data.SYNTHETIC_FPS) if simple else flight(seed, index, frames, size, speed)
    with data.VideoWriter(os.path.join(folder, f"{index:05d}.mp4"), fps) as out:
        out.write(x)


# ----------------------------------------------------------------------------------------------------------------------
# 2. VAE


def zero(*layers):
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def init(network):
    """Every residual branch starts at zero, so the deep network starts as a shallow one."""
    for m in network.modules():
        if isinstance(m, exsvd.ResBlock):
            zero(m.conv2)
        if isinstance(m, (exsvd.SpatioTemporalTransformer, exsvd.PixelAttention)):
            zero(m.proj_out)
    if isinstance(network, exsvd.UNet):
        zero(network.conv_out)
        network.down[0].conv.weight.data[:, 4:] *= exsvd.VAE_SCALE                     # image latents come unscaled
    if isinstance(network, exsvd.VAE):
        # Colours get through from the first step on. Started at random, with L1 alone, it had learned only gray in 1,500 steps.
        through = ("conv_in", "skip", "downsample", "upsample", "coder.conv_out", "quant_conv")
        for name, m in network.named_modules():
            if name.endswith(through) and isinstance(m, nn.Conv2d):
                m.weight.data += nn.init.dirac_(torch.empty_like(m.weight))
        zero(network.decoder.time_conv_out)                                            # the identity over the finished video
        network.decoder.time_conv_out.weight.data[:, :, 1, 0, 0] = torch.eye(3)
    return network


def cosine(step, steps, lr, warmup=100):
    return lr * min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def reconstruction_loss(a, b):
    """L1 and L2 on images and on their 2, 4 and 8 times smaller versions: colours of areas first, edges later. Scalar."""
    loss = 0
    for _ in range(4):
        loss = loss + (a - b).abs().mean() + 2 * (a - b).square().mean()
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return loss


def psnr(a, b):
    """Of images in [-1,1], in dB, averaged over the first axis."""
    return (10 * torch.log10(4 / (a.clamp(-1, 1) - b).square().flatten(1).mean(1))).mean().item()


@torch.no_grad()
def vae_psnr(vae, clips):
    x = clips.float() / 127.5 - 1
    z = [vae.encode(v) for v in x]
    return psnr(torch.cat([vae.decode(v[None]) for v in z]).flatten(0, 1), x.flatten(0, 1))


def train_vae(clips, held_out, args):
    """Encoder and decoder for half of the steps; then the encoder is left as it is, its latents get mean 0 and variance 1, and
    the decoder gets better at them."""
    torch.manual_seed(args.seed)
    vae = init(exsvd.VAE(VAE))
    half = args.vae_steps // 2
    start, average, noise = time.time(), 0, LATENT_NOISE
    for step in range(args.vae_steps):
        if step == half:
            noise = normalise(vae, clips)
        if step in (0, half):
            torch.manual_seed(args.seed + step)
            vae.encoder.requires_grad_(step == 0)
            vae.quant_conv.requires_grad_(step == 0)
            trained = [p for p in vae.parameters() if p.requires_grad]
            opt = torch.optim.AdamW(trained, betas=(0.9, 0.99), weight_decay=1e-3)
        frames = 4 if step % 4 == 0 or step > 0.8 * args.vae_steps else 1              # mostly images, clips to finish
        x = crops(clips, 8 // frames, frames)
        for group in opt.param_groups:
            group["lr"] = cosine(step, args.vae_steps, args.vae_lr)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            z = vae.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]).float()          # (B, t, 4, 8, 8)
            if args.smooth and step % 2:  # a picture that moves should be latents that move: EQ-VAE, arXiv:2502.09509
                scale = 1 - 0.4 * torch.rand(len(x))
                offset = (2 * torch.rand(len(x), 2) - 1) * (1 - scale[:, None])
                x, z = (windows(v.flatten(0, 1), scale.repeat_interleave(frames), offset.repeat_interleave(frames, 0), v.shape[-2:])
                        .unflatten(0, v.shape[:2]) for v in (x, z))
            y = vae.decode(z + noise * torch.randn_like(z)).float()
        loss = reconstruction_loss(y.flatten(0, 1), x.flatten(0, 1)) + (1e-3 * z.square().mean() if step < half else 0)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        opt.step()
        average += (loss.item() - average) / min(step + 1, 100)
        if step % 100 == 99:
            print(f"vae {step + 1}/{args.vae_steps}  loss {average:.4f}  held-out PSNR {vae_psnr(vae, held_out[:16]):.2f} dB"
                  f"  {time.time() - start:.0f} s", flush=True)
    return vae


@torch.no_grad()
def normalise(vae, clips):
    """Fold mean and deviation of the latents into the layers around them: latents * VAE_SCALE get mean 0 and variance 1.
    Returns what LATENT_NOISE then is, (4,1,1)."""
    z = torch.cat([vae.encode(v.float() / 127.5 - 1) for v in clips[:512, ::4]])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3)) * exsvd.VAE_SCALE                  # (4,) each; new latents: (z - mean) / std
    quant, conv_in = vae.quant_conv, vae.decoder.conv_in
    # Zeros around the latents now mean `mean`, which conv_in's bias can't express: the decoder learns its rim anew.
    conv_in.bias += (conv_in.weight.sum((2, 3)) * mean).sum(1)
    conv_in.weight *= std[:, None, None]
    quant.weight[:4] /= std[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / std
    quant.weight[4:] = 0                                                               # log variance: the noise of training
    quant.bias[4:] = 2 * (LATENT_NOISE / std).log()
    return (LATENT_NOISE / std)[:, None, None]


# ----------------------------------------------------------------------------------------------------------------------


def save(path, unet, vae, clip):
    exsvd.save_model(path, unet, vae, clip, dtype=torch.float16, family="toy")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Train the toy's VAE from nothing, or pack a trained toy.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default=os.path.join(ROOT, "runs", "toy-start.safetensors"), help="where the model goes")
    p.add_argument("--videos", metavar="FOLDER", help="train nothing: write --clips scenes there, as videos for train.py --data")
    p.add_argument("--frames", type=int, default=40, help="of --videos, at most 40 unless they are --simple")
    p.add_argument("--simple", action="store_true", help="the study's world instead of data.synthetic_scene: waves of colour and a ball, 64x64 pixels")
    p.add_argument("--size", type=int, default=128, help="pixels of --videos")
    p.add_argument("--speed", type=float, default=0.08, help="of --videos: how fast the camera flies into the picture, per second")
    p.add_argument("--pack", metavar="FILE", help="train nothing: write this model or extension, as train.py saved it, to --out in float16")
    p.add_argument("--channels", type=int, default=48, help="of the UNet, a multiple of 16")
    p.add_argument("--clips", type=int, default=8000, help="synthetic scenes to train on")
    p.add_argument("--vae-steps", type=int, default=1000, help="of 8 frames each; the second half for the decoder alone")
    p.add_argument("--smooth", action="store_true", help="VAE: latents that can be moved and enlarged like pictures")
    p.add_argument("--vae-lr", type=float, default=1e-3, help="peak learning rate of the VAE")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 in training")
    p.add_argument("--seed", type=int, default=0, help="of everything; held-out scenes have seed + 1")
    args = p.parse_args()
    if args.frames < 1 or (args.frames > 40 and not args.simple):
        p.error(f"--frames {args.frames}: from 1 to 40, or more with --simple")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    if args.pack:
        file = exsvd.Tensors(args.pack)
        if "config" not in file.meta:  # an extension
            exsvd.save(args.out, {name: file.get(name).half() for name in sorted(file.names)}, file.meta)
            sys.exit()
        svd = exsvd.load(args.pack)
        save(args.out, svd.unet, svd.vae, svd.clip)
        sys.exit()
    if args.videos:
        os.makedirs(args.videos, exist_ok=True)
        with Pool(args.threads) as pool:
            pool.map(video, ((args.videos, args.seed, i, args.frames, args.size, args.speed, args.simple) for i in range(args.clips)), chunksize=8)
        sys.exit()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)                                                     # branches that start at zero make many
    start = time.time()
    clips, held_out = (make_clips(seed, n, args.threads, args.simple) for seed, n in ((args.seed, args.clips), (args.seed + 1, 128)))
    print(f"{args.clips} scenes  {time.time() - start:.0f} s", flush=True)
    vae = train_vae(clips, held_out, args)
    save(args.out, init(exsvd.UNet(UNET(args.channels))), vae, exsvd.ImageEncoder(CLIP))
    print(f"VAE: held-out PSNR {vae_psnr(vae, held_out):.2f} dB  {time.time() - start:.0f} s; saved to {args.out}")
