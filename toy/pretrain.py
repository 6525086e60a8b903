r"""Makes the toy that ships, assets/toy.safetensors and assets/toy-exvideo.safetensors:

    python toy/pretrain.py  # its VAE: runs/toy/start.safetensors, later vae.safetensors

    # the UNet: a base for 8 frames, and CLIP with it; then ExVideo, for 40
    two="deepspeed --num_accelerators 2 train.py --sample-every 0 --weights-every 5000"
    two="$two --val toy/world.py"
    both="--size 256x256 128x128 --sigma-scale 3 --data runs/pictures.py"
    base="--train all --frames 8 --warmup 100"
    $two $base --model runs/toy/start.safetensors --data toy/world.py --batch 8 --ema 0.995 \
        --lr 2e-3 --steps 2500 --cooldown 1500 --out runs/toy/base
    $two $base --model runs/toy/base/model-002500.safetensors $both --accumulate 2 --ema 0.97 \
        --lr 1e-3 --steps 1300 --cooldown 800 --out runs/toy/base256
    small="runs/toy/base256/model-001300.safetensors"
    $two --model $small --data toy/world.py \
        --lr 1e-3 --steps 480 --cooldown 200 --out runs/toy/tuned
    $two --model $small --extension runs/toy/tuned/exvideo-000480.safetensors $both \
        --lr 1e-3 --steps 1800 --cooldown 1000 --out runs/toy/tuned256

    # the decoder against blur and flicker
    python toy/pretrain.py --sharpen runs/toy/vae.safetensors --pictures FOLDER --lr 5e-4 \
        --out runs/toy/sharp

    python toy/pretrain.py --pack $small --decoder runs/toy/sharp/decoder.safetensors \
        --out assets/toy.safetensors
    cp runs/toy/tuned256/exvideo-001800.safetensors assets/toy-exvideo.safetensors

Given again, every command resumes. Half of the flights go into pictures by runs/pictures.py:

    from toy import world
    clips = lambda frames, size, seed: world.Clips(frames, size, seed, pictures="FOLDER")

The weights that ship have a longer history, which toy/README.md tells; the commands for the UNet
were not run from start to end in this form.

The VAE learns in three phases. First the encoder and the decoder train together. Every other step
enlarges the picture and its latents alike (EQ-VAE, arXiv:2502.09509), so that a moving picture
gives moving latents, which the UNet can learn. Then the latents are scaled to mean 0 and variance
1, start.safetensors is written, and the decoder trains alone. The base needs only the encoder, so
it can train from then on. Last, --sharpen trains the decoder against blur (a loss on gradients and
a discriminator, as published image VAEs are trained) and against flicker (noise of its own on the
latents of each frame, and a loss on the change between frames).

The networks are SVD's, block for block, only narrower; 128 x 128 pixels are 16 x 16 latents.
"""

import argparse
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import spectral_norm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import exsvd
from toy import world

UNET = exsvd.UNetConfig(channels=(48,) * 4, heads=(3,) * 4, context_dim=64, groups=8,
                        native_frames=world.SHORT)
VAE = exsvd.VAEConfig(channels=(24, 48, 96, 96), groups=2)  # norms of a pair would lose colour
CLIP = exsvd.CLIPConfig(width=64, layers=2, heads=4, patch=28, out_dim=64)
CROP = 64                    # pixels of what the VAE sees before it is sharpened
LATENT_NOISE = 0.1           # standard deviation, added to latents: errors this small will not show
COLOUR_STEPS = 1000          # over which the hint of colour_loss fades
SHARP_CROP = 96              # pixels of what sharpen() sees
JUDGED_FROM = 100            # steps before the discriminator is listened to
DEFAULTS = {  # of sample.py and train.py for this model: kept in its files
    "sample": dict(size=(256, 256), steps=8, sampler="ddim", eta=1.0, share_mean=True,
                   cfg=(1.0, 1.0), fps=8.0, motion=40.0, aug=0.02, decode_chunk=16),
    "train": dict(frames=40, size=(128, 128), steps=100, lr=1e-3, checkpoint="none",
                  weights_every=50, sample_every=50, warmup=10, ema=0.98, drop=0.0),
}
VAE_STEPS = 4000, 1900       # of its first two phases
HELD_OUT = 1  # seed of pictures that nothing is trained on; do not give it to train.py


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
        network.down[0].conv.weight.data[:, 4:] *= exsvd.VAE_SCALE  # image latents come unscaled
    if isinstance(network, exsvd.VAE):
        # Colours get through from the first step on. Started at random, it had learned only grey in
        # 1,500 steps.
        through = ("conv_in", "skip", "downsample", "upsample", "coder.conv_out", "quant_conv")
        for name, m in network.named_modules():
            if name.endswith(through) and isinstance(m, nn.Conv2d):
                m.weight.data += nn.init.dirac_(torch.empty_like(m.weight))
        zero(network.decoder.time_conv_out)  # the identity over the finished video
        network.decoder.time_conv_out.weight.data[:, :, 1, 0, 0] = torch.eye(3)
    return network


def stills(count):
    """Synthetic pictures to train on: uint8 (count, 3, PICTURE, PICTURE)."""
    return torch.stack([((world.picture(0, i) + 1) * 127.5).to(torch.uint8) for i in range(count)])


def random_windows(n, smallest):
    """Scales (n,) from `smallest` to 1 and offsets (n,2) of windows that lie within the picture."""
    scales = smallest + (1 - smallest) * torch.rand(n)
    return scales, (2 * torch.rand(n, 2) - 1) * (1 - scales[:, None])


def crops(pictures, n, frames):
    """A batch for the VAE: (n, frames, 3, CROP, CROP) in [-1, 1]. Each item is a window onto a
    picture, which shrinks over the frames, as in a flight."""
    images = pictures[torch.randint(len(pictures), (n,))].float() / 127.5 - 1
    images = images[:, torch.randperm(3)]  # other colours, and mirrored
    if torch.rand(()) < 0.5:
        images = images.flip(-1)
    scales, offsets = random_windows(n, 0.55)
    path = world.scales(torch.rand(()) * 160, world.FPS, frames)
    path = 0.5 * scales[:, None] * path  # (n, frames)
    images, offsets = images.repeat_interleave(frames, 0), offsets.repeat_interleave(frames, 0)
    return world.windows(images, path.flatten(), offsets, CROP).unflatten(0, (n, frames))


def reconstruction_loss(a, b):
    """L1 and L2 on images (n,3,H,W) and on their 2, 4 and 8 times smaller versions, so that the
    colours of areas count. Scalar."""
    loss = 0
    for _ in range(4):
        loss = loss + (a - b).abs().mean() + 2 * (a - b).square().mean()
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return loss


def colour_loss(z, x):
    """How far the first three latents of z (n,4,h,w) are from the mean colours of their 8x8 pixels
    of x (n,3,8h,8w). Scalar.

    Pictures are mostly brightness. Without this at the start two of the four latents went to edges,
    and an axis of colour was lost for good.
    """
    return (z[:, :3] - 2 * F.avg_pool2d(x, 8)).square().mean()


@torch.no_grad()
def vae_psnr(vae, images):
    """PSNR in dB of decoding the mean latents of images (n,3,H,W) in [-1, 1], averaged over
    images."""
    decoded = torch.cat([vae.decode(vae.encode(x[None])[:, None])[0] for x in images])
    error = decoded.clamp(-1, 1) - images
    return (10 * torch.log10(4 / error.square().flatten(1).mean(1))).mean().item()


@torch.no_grad()
def normalise(vae, pictures):
    """Fold mean and deviation of the latents into the layers around: scaled latents get mean 0,
    variance 1. Returns what LATENT_NOISE then is, (4,1,1)."""
    torch.manual_seed(0)
    z = torch.cat([vae.encode(crops(pictures, 8, 1).flatten(0, 1)) for _ in range(128)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3)) * exsvd.VAE_SCALE  # (4,); new: (z - mean) / std
    quant, conv_in = vae.quant_conv, vae.decoder.conv_in
    # Zeros around the latents now mean `mean`, which conv_in's bias can't express: the decoder
    # learns its rim anew.
    conv_in.bias += (conv_in.weight.sum((2, 3)) * mean).sum(1)
    conv_in.weight *= std[:, None, None]
    quant.weight[:4] /= std[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / std
    quant.weight[4:] = 0  # log variance: the noise of training
    quant.bias[4:] = 2 * (LATENT_NOISE / std).log()
    return (LATENT_NOISE / std)[:, None, None]


def save_state(path, **state):
    """Saves what a resumed run needs. Each step seeds its own random numbers, so no generator's
    state is saved."""
    with exsvd.written_whole(path) as temporary:
        torch.save(state, temporary)


def set_rate(opt, peak, step, steps, warmup, least):
    """The learning rate: a warm-up, then a cosine down to a share `least` of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in opt.param_groups:
        group["lr"] = peak * min(1, (step + 1) / warmup) * (least + (1 - least) * cosine)


def autocast():
    """bfloat16 on CPUs that have instructions for it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=exsvd.best_dtype("cpu") == torch.bfloat16)


def train_vae(args):
    """Both phases; resumes from --out/vae-state.pt."""
    torch.manual_seed(0)
    vae, start, average = init(exsvd.VAE(VAE)), time.time(), 0
    path = os.path.join(args.out, "vae-state.pt")
    pictures, still = stills(args.stills), torch.ones(1)
    held_out = [world.flight(world.picture(HELD_OUT, i), still, 128) for i in range(32)]
    held_out = torch.cat(held_out)
    print(f"{len(pictures)} pictures  {time.time() - start:.0f} s", flush=True)

    def optimizer(encoder):
        vae.encoder.requires_grad_(encoder)
        vae.quant_conv.requires_grad_(encoder)
        parameters = [p for p in vae.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-3)

    def save(name):
        torch.manual_seed(0)
        exsvd.save_model(os.path.join(args.out, name), init(exsvd.UNet(UNET)), vae,
                         exsvd.ImageEncoder(CLIP), dtype=torch.float16, defaults=DEFAULTS)

    opt, noise, step = optimizer(True), torch.full((4, 1, 1), LATENT_NOISE), 0
    if os.path.exists(path):
        state = torch.load(path)
        step, noise, opt = state["step"], state["noise"], optimizer(state["step"] <= VAE_STEPS[0])
        vae.load_state_dict(state["vae"])
        opt.load_state_dict(state["opt"])
        print(f"resumed at step {step}", flush=True)
    first = step
    while step < sum(VAE_STEPS):
        if step == VAE_STEPS[0]:
            noise, opt = normalise(vae, pictures), optimizer(False)
            save("start.safetensors")  # the decoder's new rim comes with vae.safetensors
        phase, done = (0, step) if step < VAE_STEPS[0] else (1, step - VAE_STEPS[0])
        set_rate(opt, args.lr, done, VAE_STEPS[phase], warmup=100, least=0.02)
        torch.manual_seed(1 + step)
        frames = 4 if step % 4 == 0 else 1                                        # mostly images
        x = crops(pictures, 8 // frames, frames)
        with autocast():
            z = vae.encode(x.flatten(0, 1)).float()
            z = z.unflatten(0, x.shape[:2])  # (n, frames, 4, 8, 8)
            if step % 2:
                enlarged = random_windows(len(x), 0.6)
                scale, offset = (t.repeat_interleave(frames, 0) for t in enlarged)
                x = world.windows(x.flatten(0, 1), scale, offset, CROP).unflatten(0, x.shape[:2])
                grid = torch.cat([scale.view(-1, 1, 1) * torch.eye(2), offset[..., None]], -1)
                grid = F.affine_grid(grid, (len(grid), 4, *z.shape[-2:]), align_corners=False)
                moved = F.grid_sample(z.flatten(0, 1), grid, padding_mode="border",
                                      align_corners=False)
                z = moved.unflatten(0, z.shape[:2])
            y = vae.decode(z + noise * torch.randn_like(z)).float()
        loss = reconstruction_loss(y.flatten(0, 1), x.flatten(0, 1))
        if phase == 0:
            hint = max(0, 1 - step / COLOUR_STEPS)
            loss = loss + 1e-3 * z.square().mean()
            loss = loss + hint * colour_loss(z.flatten(0, 1), x.flatten(0, 1))
        vae.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        step += 1
        average += (loss.item() - average) / min(step - first, 200)
        if step % 250 == 0 or step == sum(VAE_STEPS):
            line = dict(step=step, loss=round(average, 4), psnr=round(vae_psnr(vae, held_out), 2),
                        seconds=round(time.time() - start))
            print(json.dumps(line), flush=True)
            with open(os.path.join(args.out, "vae.log"), "a") as f:
                f.write(json.dumps(line) + "\n")
            save_state(path, step=step, noise=noise, vae=vae.state_dict(), opt=opt.state_dict())
            if phase == 1:
                save("vae.safetensors")


class Discriminator(nn.Sequential):
    """Tells patches of 54 pixels of pictures from decoded ones: (n,3,H,W) -> logits (n,1,h,w)."""

    def __init__(self, C=32):
        super().__init__()
        widths, strides = (3, C, 2 * C, 3 * C, 3 * C, 1), (2, 2, 2, 1, 1)
        for c_in, c_out, stride in zip(widths, widths[1:], strides):
            size = 4 if stride == 2 else 3
            self.append(spectral_norm(nn.Conv2d(c_in, c_out, size, stride, padding=1)))
            if c_out > 1:
                self.append(nn.LeakyReLU(0.2))


def gradient_loss(a, b):
    """L1 between the differences of neighbouring pixels of images (n,3,H,W), so that edges stay
    sharp. Scalar."""
    return sum((a.diff(dim=d) - b.diff(dim=d)).abs().mean() for d in (2, 3))


def views(pictures, folder, n, frames, size, rng):
    """A batch to sharpen the decoder on: flights (n, frames, 3, size, size) in [-1, 1] through
    crops of pictures. With a folder, three fifths come from it and the rest are synthetic. A pixel
    of a crop is as large as one of a picture of 256 pixels, or up to 1.5 times smaller."""
    videos = []
    for i in range(n):
        if folder and rng.uniform() < 0.6:
            image = world.photograph(folder, rng)
        else:
            image = pictures[rng.integers(len(pictures))].float() / 127.5 - 1
        scale = size / 256 * rng.uniform(0.65, 1)
        offset = torch.from_numpy(rng.uniform(-1, 1, 2) * (1 - scale)).float().expand(frames, 2)
        path = scale * world.scales(rng.uniform(0, 160), world.FPS, frames)
        images = image[rng.permutation(3)].expand(frames, -1, -1, -1)
        videos.append(world.windows(images, path, offset, size))
    return torch.stack(videos)


def sharpen(args):
    """The third phase: trains the decoder alone, on crops of pictures. Resumes from
    --out/sharpen-state.pt."""
    vae = exsvd.load(args.sharpen, parts=("vae",)).vae
    decoder = vae.decoder.requires_grad_(True)
    average = {name: t.clone() for name, t in decoder.state_dict().items()}
    torch.manual_seed(0)
    judge, path = Discriminator(), os.path.join(args.out, "sharpen-state.pt")
    opt = torch.optim.AdamW(decoder.parameters(), lr=args.lr, betas=(0.5, 0.99), weight_decay=1e-3)
    judge_opt = torch.optim.AdamW(judge.parameters(), lr=1e-3, betas=(0.5, 0.99), weight_decay=1e-3)
    noise = (vae.quant_conv.bias[4:] / 2).exp().view(4, 1, 1)  # what normalise() left there
    pictures, step, start, mean = stills(args.stills), 0, time.time(), {}
    kept = {"decoder": decoder, "judge": judge, "opt": opt, "judge_opt": judge_opt}
    if os.path.exists(path):
        state = torch.load(path)
        step, average = state["step"], state["average"]
        for name, thing in kept.items():
            thing.load_state_dict(state[name])
        print(f"resumed at step {step}", flush=True)
    while step < args.steps:
        rng = np.random.default_rng([0, step])
        torch.manual_seed(1 + step)
        set_rate(opt, args.lr, step, args.steps, warmup=50, least=0.05)
        n, frames = ((4, 1), (4, 1), (1, 5))[step % 3]
        x = views(pictures, args.pictures, n, frames, SHARP_CROP, rng)
        z = vae.encode(x.flatten(0, 1)).unflatten(0, (n, frames))
        # each frame has noise of its own, of which the video must not flicker
        z = z + noise * torch.rand(n, 1, 1, 1, 1) * 1.2 * torch.randn_like(z)
        y = vae.decode(z)
        true, made = x.flatten(0, 1), y.flatten(0, 1)
        losses = {"picture": reconstruction_loss(made, true), "edges": gradient_loss(made, true)}
        if frames > 1:
            losses["flicker"] = 2 * (y.diff(dim=1) - x.diff(dim=1)).abs().mean()
        if step >= JUDGED_FROM:
            losses["adversarial"] = -args.adversarial * judge(made).mean()
        opt.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        opt.step()
        judge_opt.zero_grad()
        losses["judge"] = F.relu(1 - judge(true)).mean() + F.relu(1 + judge(made.detach())).mean()
        losses["judge"].backward()
        judge_opt.step()
        step += 1
        with torch.no_grad():
            for name, t in decoder.state_dict().items():
                average[name].lerp_(t, 1 - min(0.995, step / (step + 9)))
        for name, loss in losses.items():
            mean[name] = mean.get(name, loss.item()) * 0.98 + 0.02 * loss.item()
        if step % 50 == 0 or step == args.steps:
            means = {name: round(loss, 4) for name, loss in mean.items()}
            line = dict(step=step, **means, seconds=round(time.time() - start))
            print(json.dumps(line), flush=True)
            states = {name: thing.state_dict() for name, thing in kept.items()}
            save_state(path, step=step, average=average, **states)
            save_file(average, os.path.join(args.out, "decoder.safetensors"))


def pack(args):
    """A model as it ships: float16, with the sharpened decoder."""
    svd = exsvd.load(args.pack)
    svd.vae.decoder.load_state_dict(load_file(args.decoder))
    exsvd.save_model(args.out, svd.unet, svd.vae, svd.clip, dtype=torch.float16, defaults=DEFAULTS)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Train the toy's VAE, or pack a trained toy.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--out", default=os.path.join(ROOT, "runs", "toy"),
        help="folder of a run, or file of --pack")
    add("--pictures", metavar="FOLDER", help="pictures for --sharpen beside the synthetic ones")
    add("--stills", type=int, default=1500, help="synthetic stills that the VAE is trained on")
    add("--steps", type=int, default=750, help="of --sharpen")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--sharpen", metavar="MODEL", help="the VAE's third phase, on the decoder of this model")
    add("--adversarial", type=float, default=0.15,
        help="weight of the discriminator in the third phase")
    add("--pack", metavar="MODEL", help="write this model as it ships, with --decoder, to --out")
    add("--decoder", metavar="FILE", help="with --pack: the decoder of --sharpen")
    args = p.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # branches that start at zero make many
    if args.pack:
        pack(args)
    else:
        os.makedirs(args.out, exist_ok=True)
        (sharpen if args.sharpen else train_vae)(args)
