"""Makes the toy that ships, assets/toy.safetensors and assets/toy-exvideo.safetensors:

    python toy/pretrain.py  # its VAE: runs/toy/start.safetensors, later vae.safetensors

    two="deepspeed --num_accelerators 2 train.py"  # the UNet on 8 frames, and CLIP with it: 16 clips a step
    base="--model runs/toy/start.safetensors --data toy/world.py --train all --frames 8 --batch 8 --ema 0.995"
    base="$base --warmup 100 --sample-every 0 --out runs/toy/base"
    $two $base --lr 2e-3 --steps 1977 && $two $base --lr 8e-4 --steps 2381 && $two $base --lr 3e-4 --steps 2539

    tuned="--sample-every 0 --out runs/toy/tuned"  # ExVideo: 40 frames, 2 clips a step
    tuned="--model runs/toy/base/model-002539.safetensors $tuned"
    $two $tuned --lr 1e-3 --steps 400 && $two $tuned --lr 3e-4 --steps 480

    # the decoder against blur and flicker; FOLDER holds pictures
    python toy/pretrain.py --sharpen runs/toy/vae.safetensors --pictures FOLDER --lr 5e-4 --out runs/toy/sharp

    python toy/pretrain.py --pack runs/toy/base/model-002539.safetensors --decoder runs/toy/sharp/decoder.safetensors \\
        --out assets/toy.safetensors
    python toy/pretrain.py --pack runs/toy/tuned/exvideo-000480.safetensors --out assets/toy-exvideo.safetensors

Every command resumes when it is given again. The weights that ship were made in a longer story: the
base's first 1,084 steps by one process, with 8 clips each; its clips and the extension's into
synthetic pictures of 256 pixels, not 384, encoded in bfloat16. The decoder was sharpened for 625 of
750 planned steps, the first 400 with --adversarial 0.08.

For 256x256, --tune goes on with clips of two sizes; with 40 frames it tunes an extension. This has
not run for long enough to ship (README.md beside this file says how far it got):

    tune="torchrun --nproc_per_node 2 toy/pretrain.py --pictures FOLDER"
    $tune --tune assets/toy.safetensors --steps 0 0 0 1100 --out runs/toy/base256
    $tune --tune runs/toy/base256/model.safetensors --tuned-on assets/toy.safetensors \\
        --extension assets/toy-exvideo.safetensors --clips 40x256:0.75 40x128:0.25 \\
        --batch 1 --ema 0.96 --seed 60 --steps 0 0 0 400 --out runs/toy/tuned256

The VAE learns in three phases. First encoder and decoder train together, and a picture that moves
is to be latents that move (EQ-VAE, arXiv:2502.09509): every other step enlarges picture and latents
alike, or the UNet could not learn to fly. Then the latents are given mean 0 and variance 1, and the
decoder trains alone, on them. From then on the base can be trained beside it: start.safetensors is
written. Last, --sharpen trains the decoder against blur (a loss on gradients and a discriminator,
as published image VAEs are trained) and against flicker (noise of its own on the latents of each
frame, and a loss on the change between frames).

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.utils import spectral_norm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data
import exsvd
from toy import world

UNET = exsvd.UNetConfig(channels=(48,) * 4, heads=(3,) * 4, context_dim=64, groups=8, native_frames=world.SHORT)
VAE = exsvd.VAEConfig(channels=(24, 48, 96, 96), groups=2)  # few groups: normalising pairs would lose colour
CLIP = exsvd.CLIPConfig(width=64, layers=2, heads=4, patch=28, out_dim=64)
CROP = 64                    # pixels of what the VAE sees, half a frame of the toy
LATENT_NOISE = 0.1  # standard deviation added to latents in VAE training: errors this small will not show
COLOUR_STEPS = 1000          # over which the hint of colour_loss fades
SHARP_CROP = 96              # pixels of what sharpen() sees
JUDGED_FROM = 100            # steps before the discriminator is listened to
DEFAULTS = {  # of sample.py and train.py for this model: kept in its files
    "sample": dict(size=(128, 128), steps=8, sampler="ddim", eta=1.0, share_mean=True, cfg=(1.0, 1.0), fps=8.0,
                   motion=40.0, aug=0.02, decode_chunk=16),
    "train": dict(frames=40, size=(128, 128), steps=100, lr=1e-3, checkpoint="none", weights_every=50, sample_every=50,
                  warmup=10, ema=0.98, drop=0.0),
}
HELD_OUT = 1  # seed of pictures that nothing is trained on; train.py's --seed is another


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


def random_windows(n, smallest):
    """Scales (n,) from `smallest` to 1 and offsets (n,2) of windows that lie within the picture."""
    scales = smallest + (1 - smallest) * torch.rand(n)
    return scales, (2 * torch.rand(n, 2) - 1) * (1 - scales[:, None])


def crops(pictures, n, frames):
    """A batch for the VAE: (n, frames, 3, CROP, CROP) in [-1, 1], windows onto pictures, of several
    frames: flights."""
    images = pictures[torch.randint(len(pictures), (n,))].float() / 127.5 - 1
    images = images[:, torch.randperm(3)]  # other colours, and both hands
    if torch.rand(()) < 0.5:
        images = images.flip(-1)
    scales, offsets = random_windows(n, 0.55)
    path = 0.5 * scales[:, None] * world.scales(torch.rand(()) * 160, world.FPS, frames)  # (n, frames)
    images, offsets = images.repeat_interleave(frames, 0), offsets.repeat_interleave(frames, 0)
    return world.windows(images, path.flatten(), offsets, CROP).unflatten(0, (n, frames))


def reconstruction_loss(a, b):
    """L1 and L2 on images (n,3,H,W) and on their 2, 4 and 8 times smaller versions, for colours of
    areas. Scalar."""
    loss = 0
    for _ in range(4):
        loss = loss + (a - b).abs().mean() + 2 * (a - b).square().mean()
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return loss


def colour_loss(z, x):
    """Of latents (n,4,h,w) whose first three are not the mean colours of their 8x8 pixels of x
    (n,3,8h,8w). Scalar.

    Pictures are mostly brightness. Without this at the start two of the four latents went to edges,
    and an axis of colour was lost for good.
    """
    return (z[:, :3] - 2 * F.avg_pool2d(x, 8)).square().mean()


@torch.no_grad()
def vae_psnr(vae, images):
    """Of decoded means, images (n,3,H,W) in [-1, 1]: dB, averaged over images."""
    error = torch.cat([vae.decode(vae.encode(x[None])[:, None])[0].clamp(-1, 1) - x for x in images])
    return (10 * torch.log10(4 / error.square().flatten(1).mean(1))).mean().item()


@torch.no_grad()
def normalise(vae, pictures):
    """Fold mean and deviation of the latents into the layers around: scaled latents get mean 0,
    variance 1. Returns what LATENT_NOISE then is, (4,1,1)."""
    torch.manual_seed(0)
    z = torch.cat([vae.encode(crops(pictures, 8, 1).flatten(0, 1)) for _ in range(128)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3)) * exsvd.VAE_SCALE  # (4,) each; new latents: (z - mean) / std
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


def save_state(path, vae, opt, noise, step):
    """All that training goes on from. Every step draws from a seed of its own, so no generator's
    state is needed."""
    moments = {f"{i}.{key}": t.clone() for i, s in opt.state_dict()["state"].items() for key, t in s.items()}
    state = vae.state_dict() | {f"optimizer.{name}": t for name, t in moments.items()} | {"noise": noise}
    save_file({name: t.contiguous() for name, t in state.items()}, path + ".tmp", metadata={"step": str(step)})
    os.replace(path + ".tmp", path)


def load_state(path, vae, opt):
    """Returns (noise, step)."""
    state = load_file(path)
    with safe_open(path, "pt") as f:
        step = int(f.metadata()["step"])
    moments = {}
    for name in [name for name in state if name.startswith("optimizer.")]:
        _, i, key = name.split(".")
        moments.setdefault(int(i), {})[key] = state.pop(name)
    noise = state.pop("noise")
    vae.load_state_dict(state)
    opt.load_state_dict({"state": moments, "param_groups": opt.state_dict()["param_groups"]})
    return noise, step


def set_rate(opt, peak, step, steps, warmup, least):
    """The learning rate: a warm-up, then a cosine down to a share `least` of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in opt.param_groups:
        group["lr"] = peak * min(1, (step + 1) / warmup) * (least + (1 - least) * cosine)


def train_vae(args):
    """Both phases; resumes from --out/vae-state.safetensors."""
    torch.manual_seed(0)
    vae, start, average, path = init(exsvd.VAE(VAE)), time.time(), 0, os.path.join(args.out, "vae-state.safetensors")
    pictures = torch.stack([((world.picture(0, i) + 1) * 127.5).to(torch.uint8) for i in range(args.stills)])
    held_out = torch.cat([world.flight(world.picture(HELD_OUT, i), torch.ones(1), 128) for i in range(32)])
    print(f"{len(pictures)} pictures  {time.time() - start:.0f} s", flush=True)

    def optimizer(phase):
        both = phase == 0
        vae.encoder.requires_grad_(both)
        vae.quant_conv.requires_grad_(both)
        parameters = [p for p in vae.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=1e-3)

    def save(name):
        torch.manual_seed(0)
        exsvd.save_model(os.path.join(args.out, name), init(exsvd.UNet(UNET)), vae, exsvd.ImageEncoder(CLIP),
                         dtype=torch.float16, defaults=DEFAULTS)

    opt, noise, step = optimizer(0), torch.full((4, 1, 1), LATENT_NOISE), 0
    if os.path.exists(path):
        with safe_open(path, "pt") as f:
            opt = optimizer(int(int(f.metadata()["step"]) > args.steps[0]))
        noise, step = load_state(path, vae, opt)
        print(f"resumed at step {step}", flush=True)
    first = step
    while step < sum(args.steps[:2]):
        if step == args.steps[0]:
            save("before.safetensors")
            noise, opt = normalise(vae, pictures), optimizer(1)
            save("start.safetensors")  # the decoder's new rim comes with vae.safetensors
        phase, done = (0, step) if step < args.steps[0] else (1, step - args.steps[0])
        set_rate(opt, args.lr, done, args.steps[phase], warmup=100, least=0.02)
        torch.manual_seed(1 + step)
        frames = 4 if step % 4 == 0 else 1                                        # mostly images
        x = crops(pictures, 8 // frames, frames)
        with torch.autocast("cpu", torch.bfloat16, enabled=exsvd.best_dtype("cpu") == torch.bfloat16):
            z = vae.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]).float()  # (n, frames, 4, 8, 8)
            if step % 2:
                scale, offset = (t.repeat_interleave(frames, 0) for t in random_windows(len(x), 0.6))
                x = world.windows(x.flatten(0, 1), scale, offset, CROP).unflatten(0, x.shape[:2])
                grid = torch.cat([scale.view(-1, 1, 1) * torch.eye(2), offset[..., None]], -1)
                grid = F.affine_grid(grid, (len(grid), 4, *z.shape[-2:]), align_corners=False)
                moved = F.grid_sample(z.flatten(0, 1), grid, padding_mode="border", align_corners=False)
                z = moved.unflatten(0, z.shape[:2])
            y = vae.decode(z + noise * torch.randn_like(z)).float()
        loss = reconstruction_loss(y.flatten(0, 1), x.flatten(0, 1))
        if phase == 0:
            hint = max(0, 1 - step / COLOUR_STEPS)
            loss = loss + 1e-3 * z.square().mean() + hint * colour_loss(z.flatten(0, 1), x.flatten(0, 1))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in opt.param_groups for p in group["params"]], 1.0)
        opt.step()
        step += 1
        average += (loss.item() - average) / min(step - first, 200)
        if step % 250 == 0 or step == sum(args.steps[:2]):
            line = dict(step=step, loss=round(average, 4), psnr=round(vae_psnr(vae, held_out), 2),
                        seconds=round(time.time() - start))
            print(json.dumps(line), flush=True)
            with open(os.path.join(args.out, "vae.log"), "a") as f:
                f.write(json.dumps(line) + "\n")
            save_state(path, vae, opt, noise, step)
            if phase == 1:
                save("vae.safetensors")


class Discriminator(nn.Sequential):
    """Which patches of 46 pixels are of pictures, which are decoded: (n,3,H,W) -> logits
    (n,1,h,w)."""

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


def views(stills, folder, n, frames, size, rng):
    """A batch to sharpen the decoder on: flights (n, frames, 3, size, size) in [-1, 1] through
    crops of pictures, half of them synthetic. A pixel of a crop is as large as one of a picture of
    256 pixels, or up to 1.5 times smaller."""
    videos = []
    for i in range(n):
        if folder and rng.uniform() < 0.6:
            image = world.photograph(folder, rng)
        else:
            image = stills[rng.integers(len(stills))].float() / 127.5 - 1
        scale = size / 256 * rng.uniform(0.65, 1)
        offset = torch.from_numpy(rng.uniform(-1, 1, 2) * (1 - scale)).float().expand(frames, 2)
        path = scale * world.scales(rng.uniform(0, 160), world.FPS, frames)
        videos.append(world.windows(image[rng.permutation(3)].expand(frames, -1, -1, -1), path, offset, size))
    return torch.stack(videos)


def sharpen(args):
    """The third phase: the decoder alone, on crops of pictures of 256 pixels; resumes from
    --out/sharpen-state.pt."""
    vae = exsvd.load(args.sharpen, parts=("vae",)).vae.requires_grad_(False).train()
    decoder = vae.decoder.requires_grad_(True)
    average = {name: t.clone() for name, t in decoder.state_dict().items()}
    torch.manual_seed(0)
    judge, path = Discriminator(), os.path.join(args.out, "sharpen-state.pt")
    opt = torch.optim.AdamW(decoder.parameters(), lr=args.lr, betas=(0.5, 0.99), weight_decay=1e-3)
    judge_opt = torch.optim.AdamW(judge.parameters(), lr=1e-3, betas=(0.5, 0.99), weight_decay=1e-3)
    noise = (vae.quant_conv.bias[4:] / 2).exp().view(4, 1, 1)  # what normalise() left there
    stills = torch.stack([((world.picture(0, i) + 1) * 127.5).to(torch.uint8) for i in range(args.stills)])
    step, start, mean = 0, time.time(), {}
    if os.path.exists(path):
        state = torch.load(path)
        step, average = state["step"], state["average"]
        for thing, name in ((decoder, "decoder"), (judge, "judge"), (opt, "opt"), (judge_opt, "judge_opt")):
            thing.load_state_dict(state[name])
        print(f"resumed at step {step}", flush=True)
    while step < args.steps[2]:
        rng = np.random.default_rng([0, step])
        torch.manual_seed(1 + step)
        set_rate(opt, args.lr, step, args.steps[2], warmup=50, least=0.05)
        n, frames = ((4, 1), (4, 1), (1, 5))[step % 3]
        x = views(stills, args.pictures, n, frames, SHARP_CROP, rng)
        z = vae.encode(x.flatten(0, 1)).unflatten(0, (n, frames))
        z = z + noise * torch.rand(n, 1, 1, 1, 1) * 1.2 * torch.randn_like(z)  # of each frame: it must not flicker
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
        if step % 50 == 0 or step == args.steps[2]:
            line = dict(step=step, **{k: round(v, 4) for k, v in mean.items()}, seconds=round(time.time() - start))
            print(json.dumps(line), flush=True)
            state = dict(step=step, average=average, decoder=decoder.state_dict(), judge=judge.state_dict(),
                         opt=opt.state_dict(), judge_opt=judge_opt.state_dict())
            torch.save(state, path + ".tmp")
            os.replace(path + ".tmp", path)
            save_file(average, os.path.join(args.out, "decoder.safetensors"))


def tune(args):
    """The UNet on clips of several sizes, each of them encoded once and used --reuse times with
    other noise. A base trains as a whole; with clips longer than SHORT an extension trains, as in
    the paper. Under torchrun the ranks average their gradients. Resumes from --out/tune-state.pt."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        distributed.init_process_group("gloo")
    svd = exsvd.load(args.tune, args.extension)
    unet, kinds = svd.unet.train(), [parse_kind(text) for text in args.clips]
    unet.checkpointing, long = None, max(frames for frames, _, _ in kinds) > world.SHORT
    if long and unet.max_frames is None:
        exsvd.extend(unet, max(frames for frames, _, _ in kinds))
    trained = {name: p for name, p in unet.named_parameters()
               if not exsvd.IDLE.search(f".{name}") and (exsvd.is_extension_parameter(name) or not long)}
    for p in trained.values():
        p.requires_grad_(True)
    if args.tuned_on:  # the base has learned since: its temporal blocks' changes are the extension's, too
        before, now = (exsvd.load(model, parts=("unet",)).unet.state_dict() for model in (args.tuned_on, args.tune))
        with torch.no_grad():
            for name in trained.keys() & before.keys():
                trained[name] += now[name] - before[name]
    opt = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=0.01)
    average = {name: p.detach().clone() for name, p in trained.items()}
    sources = []
    for i, (frames, size, _) in enumerate(kinds):
        sources.append(world.clips(frames, (size, size), args.seed + i, args.pictures))
    step, drawn, stores, path = 0, [0] * len(kinds), [[] for _ in kinds], os.path.join(args.out, "tune-state.pt")
    if os.path.exists(path):
        state = torch.load(path)
        unet.load_state_dict(state["unet"])
        opt.load_state_dict(state["opt"])
        step, drawn, average = state["step"], state["drawn"], state["average"]
        print(f"resumed at step {step}", flush=True)

    def encoded(kind):
        """The next clip of a kind: (scaled latents, condition latent, CLIP embedding, ids), each
        with a batch of 1."""
        item = sources[kind][drawn[kind] * ranks + rank]
        drawn[kind] += 1
        video = data.to_float(item["video"])
        aug, noise = data.draw_condition(args.seed, item["name"], video.shape[:1:-1])
        cond, ctx = data.encode_condition(svd.vae, svd.clip, video[0], aug, noise)
        ids = exsvd.unet_ids(unet.config.ids, item | {"aug": float(aug)})
        return data.encode_frames(svd.vae, video)[None] * exsvd.VAE_SCALE, cond[None, None], ctx[None, None], ids

    def drawn_clip(kind, rng):
        store = stores[kind]
        if store and rng.uniform() > 1 / args.reuse:
            return store[rng.integers(len(store))]
        store.append(encoded(kind))
        del store[:-200]
        return store[-1]

    while step < args.steps[3]:
        rng = np.random.default_rng([args.seed, step])                            # the same on all ranks
        generator = torch.Generator().manual_seed(step * ranks + rank)
        set_rate(opt, args.lr, step, args.steps[3], warmup=10, least=0.05)
        losses, start = {}, time.time()
        for _ in range(args.batch):  # one after the other: the caches of a CPU hold no batch of clips
            kind = rng.choice(len(kinds), p=[share for _, _, share in kinds])
            x, *conditions = drawn_clip(kind, rng)
            sigma, noise = exsvd.LOSSES["edm"].draw(1, x.shape[1], generator), torch.randn(x.shape, generator=generator)
            loss = exsvd.training_loss(unet, exsvd.LOSSES["edm"], x, sigma, noise, *conditions).mean()
            (loss / args.batch).backward()
            losses.setdefault(args.clips[kind], []).append(round(loss.item(), 4))
        if ranks > 1:
            flat = nn.utils.parameters_to_vector([p.grad for p in trained.values()]) / ranks
            distributed.all_reduce(flat)
            nn.utils.vector_to_parameters(flat, [p.grad for p in trained.values()])
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        opt.step()
        opt.zero_grad()
        step += 1
        if rank > 0:
            continue
        with torch.no_grad():
            for name, p in trained.items():
                average[name].lerp_(p, 1 - min(args.ema, step / (step + 4)))
        print(json.dumps(dict(step=step, losses=losses, seconds=round(time.time() - start, 1))), flush=True)
        if step % 20 == 0 or step == args.steps[3]:
            state = dict(step=step, drawn=drawn, average=average, unet=unet.state_dict(), opt=opt.state_dict())
            torch.save(state, path + ".tmp")
            os.replace(path + ".tmp", path)
    if rank > 0:
        return
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(average[name])
    if long:
        exsvd.save_extension(os.path.join(args.out, "exvideo.safetensors"), unet)
    else:
        exsvd.save_model(os.path.join(args.out, "model.safetensors"), unet, svd.vae, svd.clip, defaults=DEFAULTS)


def parse_kind(text):
    """8x256:0.65 -> (frames, pixels, share of the clips)"""
    shape, share = text.split(":")
    frames, size = shape.split("x")
    return int(frames), int(size), float(share)


def pack(args):
    """A model or an extension as it ships: float16, with the defaults of sample.py and train.py."""
    file = exsvd.Tensors(args.pack)
    if "config" not in file.meta:                                                 # an extension
        tensors = {name: file.get(name).half() for name in sorted(file.names)}
        exsvd.save(args.out, tensors, file.meta | {"defaults": {"sample": DEFAULTS["sample"]}})
        return
    svd = exsvd.load(args.pack)
    if args.decoder:
        svd.vae.decoder.load_state_dict(load_file(args.decoder))
    exsvd.save_model(args.out, svd.unet, svd.vae, svd.clip, dtype=torch.float16, defaults=DEFAULTS)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Train the toy's VAE, tune its UNet, or pack a trained toy.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--out", default=os.path.join(ROOT, "runs", "toy"), help="folder of a run, or file of --pack")
    add("--pictures", metavar="FOLDER", help="pictures to fly into beside the synthetic ones")
    add("--stills", type=int, default=1500, help="synthetic stills that the VAE is trained on")
    add("--steps", type=int, nargs=4, default=(4000, 1900, 750, 400), help="of the VAE's three phases, and of --tune")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--sharpen", metavar="MODEL", help="the VAE's third phase, on the decoder of this model")
    add("--adversarial", type=float, default=0.15, help="weight of the discriminator in the third phase")
    add("--tune", metavar="MODEL", help="train the UNet of this model: its base, or on long clips an extension")
    add("--extension", help="with --tune: the extension to go on from")
    add("--tuned-on", metavar="MODEL", help="with --extension: the base that it was tuned on, if --tune's has changed")
    add("--clips", nargs="+", default=["8x256:0.6", "8x128:0.4"], help="FRAMESxPIXELS:SHARE of --tune's clips")
    add("--batch", type=int, default=2, help="clips a step of --tune, on each rank")
    add("--reuse", type=int, default=5, help="how often --tune uses a clip")
    add("--ema", type=float, default=0.98, help="decay of --tune's average")
    add("--seed", type=int, default=40, help="of --tune's clips and noise")
    add("--pack", metavar="FILE", help="write this model or extension as it ships, to --out")
    add("--decoder", metavar="FILE", help="with --pack: the decoder of --sharpen")
    args = p.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # branches that start at zero make many
    if args.pack:
        sys.exit(pack(args))
    os.makedirs(args.out, exist_ok=True)
    if args.sharpen:
        sharpen(args)
    elif args.tune:
        tune(args)
    else:
        train_vae(args)
