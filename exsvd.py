"""ExSVD: Stable Video Diffusion extended to long videos by ExVideo. Read it from top to bottom.

    1. Configurations         sizes of the three networks; SVD-XT is the default of each
    2. Primitives             sinusoid, attention, feed-forward
    3. Spatio-temporal blocks residual blocks over pixels and over frames, and the mix of the two
    4. ExVideo                transformer block over frames, its extension; extend()
    5. UNet                   (B,T,8,H,W) noisy and image latents -> (B,T,4,H,W)
    6. VAE                    image encoder, temporal decoder
    7. CLIP image encoder     ViT-H/14 and its antialiased preprocessing
    8. EDM                    preconditioning, Karras sigmas, training losses
    9. Memory and speed       slices of long videos, weights that wait in CPU memory, torch.compile
   10. Checkpoints            weight files, rules for names; load(), save_extension(), ...

Shapes: B videos, T frames, C channels, H W size of latents (image size / 8), N = H*W pixels, D
width of the context. Public functions take and return (B, T, C, H, W). Inside there are three
layouts, and every line that changes one says so: spatial (B*T, C, H, W), temporal convolution
(B, C, T, H, W), temporal attention (B*N, T, C).

`slices` in a signature is a Slices of section 9: it applies a function to some frames or pixels at
a time, so that long videos fit in memory. Read `slices(f, x)` as f(x).

Sources. Method: ExVideo (Duan et al. 2024, arXiv:2406.14130), sections 3.2 and 3.3. Base model:
Stable Video Diffusion (Blattmann et al. 2023, arXiv:2311.15127). Diffusion: EDM (Karras et al.
2022, arXiv:2206.00364). Facts no paper states (orders, epsilons, names) were read off
Stability-AI/generative-models, diffusers 0.42 and DiffSynth-Studio 1.1.9.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

try:  # optional, CUDA only; everything works without it
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

# --------------------------------------------------------------------------------------------------
# 1. Configurations. The defaults are SVD-XT. `heads` and `channels` have one entry per level.


@dataclass(frozen=True)
class UNetConfig:
    channels: tuple = (320, 640, 1280, 1280)
    heads: tuple = (5, 10, 20, 20)  # head size 64 on every level of SVD
    context_dim: int = 1024         # D, width of the CLIP image embedding
    groups: int = 32                # of every GroupNorm
    native_frames: int = 25         # of the base: SVD-XT 25, SVD 14. Weights do not tell
    ids: tuple = ("fps", "motion", "aug")  # numbers that the UNet is conditioned on, see unet_ids()


@dataclass(frozen=True)
class VAEConfig:
    channels: tuple = (128, 256, 512, 512)
    groups: int = 32


@dataclass(frozen=True)
class CLIPConfig:
    width: int = 1280
    layers: int = 32
    heads: int = 16
    patch: int = 14
    out_dim: int = 1024
    image: int = 224


# Norm epsilons differ between the public codes. These are Stability's, with which SVD was trained.
# diffusers has 1e-6 in most UNet residual blocks. DiffSynth, under which ExVideo was tuned, has
# 1e-5 in the UNet transformer and the VAE's last norm; the effect is below float16's rounding.
EPS_UNET_RES = 1e-5          # residual blocks, spatial and temporal, and the last norm of the UNet
EPS_UNET_TRANSFORMER = 1e-6  # GroupNorm that opens a transformer block
EPS_LAYER_NORM = 1e-5        # every LayerNorm, CLIP's too
EPS_VAE = 1e-6               # every VAE norm ...
EPS_VAE_TEMPORAL = 1e-5      # ... but the decoder's temporal residual blocks

VAE_SCALE = 0.18215  # video latents of the UNet are VAE latents times this; image latents are not
EXVIDEO_ENCODE_SCALE = 0.13025  # DiffSynth, in which ExVideo was made, encodes with SDXL's scale
ID_DIM = 256  # width of the sinusoid of each of UNetConfig.ids

# --------------------------------------------------------------------------------------------------
# 2. Primitives. Tokens are (batch, length, C).


def sinusoid(t, dim):
    """Sinusoidal features (Vaswani et al. 2017), cosines first: (...) -> (..., dim), float32."""
    k = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    freqs = torch.exp(-math.log(10000) / (dim // 2) * k)
    angles = t.float()[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def best_dtype(device, training=False):
    """The dtype for the networks on a device: torch.float16, torch.bfloat16 or torch.float32.

    Sampling on a GPU uses float16, as Stability, diffusers and DiffSynth do; it is 8 times closer
    to float32 than bfloat16. Training on a GPU uses bfloat16, or float16 before compute capability
    8.0. A CPU without instructions for bfloat16 computes it many times slower than float32.
    """
    device = torch.device(device)
    if device.type == "cuda" and training and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    if device.type == "cuda" or (device.type == "mps" and not training):
        return torch.float16
    fast = ("avx512_bf16", "amx_bf16", "bf16")  # the last is Arm's
    if device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in fast):
        return torch.bfloat16
    return torch.float32


def flash_fits(q):
    """Whether flash-attn has a kernel for q (b, n, h, d)."""
    if flash_attn_func is None or not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    head_size = q.shape[-1]  # 64 in the UNet, 80 in CLIP; the VAE's 512 does not fit
    new_enough = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return new_enough and head_size <= 256 and head_size % 8 == 0


def attention(q, k, v, heads):
    """softmax(q k^T / sqrt(d)) v: q (b, n, heads*d), k and v (b, m, heads*d) -> (b, n, heads*d)."""
    q, k, v = (rearrange(x, "b n (h d) -> b n h d", h=heads) for x in (q, k, v))
    if flash_fits(q):
        deterministic = torch.are_deterministic_algorithms_enabled()  # matters for gradients
        out = flash_attn_func(q, k, v, deterministic=deterministic)
        return rearrange(out, "b n h d -> b n (h d)")
    q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


class SelfAttention(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(C, C, bias=False) for _ in range(3))
        self.to_out = nn.Linear(C, C)

    def forward(self, x):
        return self.to_out(attention(self.to_q(x), self.to_k(x), self.to_v(x), self.heads))


class ContextAttention(nn.Module):
    """Cross-attention to the one context token. A softmax over one key is 1, so every query gets
    the same value, and this is cross-attention exactly. to_q, to_k and the norm before them have no
    effect; they are loaded and saved."""

    def __init__(self, C, context_dim):
        super().__init__()
        self.to_q = nn.Linear(C, C, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_dim, C, bias=False) for _ in range(2))
        self.to_out = nn.Linear(C, C)

    def forward(self, ctx):
        return self.to_out(self.to_v(ctx))  # (B, 1, D) -> (B, 1, C)


class FeedForward(nn.Module):
    """GEGLU: the first half of proj_in is the value, the second the gate, through an exact GELU."""

    def __init__(self, C):
        super().__init__()
        self.proj_in = nn.Linear(C, 8 * C)
        self.proj_out = nn.Linear(4 * C, C)

    def forward(self, x):
        w_value, w_gate = self.proj_in.weight.chunk(2)
        b_value, b_gate = self.proj_in.bias.chunk(2)
        h = F.gelu(F.linear(x, w_gate, b_gate))  # two products instead of one: less memory at once
        if torch.is_grad_enabled():
            h = h * F.linear(x, w_value, b_value)
        else:
            h.mul_(F.linear(x, w_value, b_value))
        return self.proj_out(h)


LayerNorm = partial(nn.LayerNorm, eps=EPS_LAYER_NORM)


def silu(x):
    """SiLU. Without gradients it overwrites x, which no caller needs afterwards."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class Upsample(nn.Conv2d):
    """Nearest neighbour 2x, then the convolution."""

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


# --------------------------------------------------------------------------------------------------
# 3. Spatio-temporal blocks: (B*T, C, H, W) -> (B*T, C', H, W). A spatial branch sees each frame
#    alone, a temporal one sees all frames, and a learned alpha = sigmoid(mix) blends them. T is
#    known from B, the number of videos.


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice, the noise embedding added between. Over pixels (3x3) or
    over frames (3x1x1)."""

    def __init__(self, c_in, c_out, emb_dim=None, temporal=False, groups=32, eps=EPS_UNET_RES):
        super().__init__()
        if temporal:  # 2D ones over (T, H*W) take 2 % less time, but round differently
            Conv = partial(nn.Conv3d, kernel_size=(3, 1, 1), padding=(1, 0, 0))
        else:
            Conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps=eps), Conv(c_in, c_out)
        self.emb = nn.Linear(emb_dim, c_out) if emb_dim else None
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps=eps), Conv(c_out, c_out)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, skip=None, e=None, upsample=None, again=lambda f, *xs: f(*xs)):
        """x (b, c, H, W), and skip (b, c', H, W) where c + c' = c_in -> (b, c_out, H, W).

        e: from embed(). upsample: the convolution that ends the previous level, or None. again: see
        Slices.again(). The parts that it is given end in a convolution, which it therefore need not
        compute again.
        """
        inplace = not torch.is_grad_enabled()
        fresh = upsample is not None and skip is None and isinstance(self.shortcut, nn.Conv2d)

        def joined(x, skip):
            return x if skip is None else torch.cat([x, skip], dim=1)

        def first(x, skip):
            x = joined(x, skip)
            h = group_norm_(self.norm1, x) if fresh and inplace else self.norm1(x)
            h = self.conv1(silu(h))
            return h if e is None else h + e

        def second(h):
            return self.conv2(silu(self.norm2(h)))

        if upsample is not None:
            x = again(upsample, x)
        if inplace:  # with gradients each part joins them for itself, and no copy is kept
            x, skip = joined(x, skip), None
        shortcut = again(lambda *xs: self.shortcut(joined(*xs)), x, skip)
        h = again(first, x, skip)
        if not inplace:
            return shortcut + again(second, h)
        del x
        h = silu(self.norm2(h))
        h = self.conv2(h)  # a line each, so that what goes in is free as early as possible
        return shortcut + h

    def embed(self, emb, n, ndim):
        """Noise embeddings of videos (B, emb_dim), for n entries: (n, c_out, 1, ...), of ndim."""
        e = self.emb(F.silu(emb)).repeat_interleave(n // len(emb), 0)
        return e.reshape(e.shape + (1,) * (ndim - 2))


class SpatioTemporalRes(nn.Module):
    """A residual block per frame, and one over frames on its output, blended. Without emb_dim it
    is the VAE decoder's."""

    def __init__(self, c_in, c_out, emb_dim=None, groups=32, eps=EPS_UNET_RES,
                 eps_temporal=EPS_UNET_RES):
        super().__init__()
        self.spatial = ResBlock(c_in, c_out, emb_dim, False, groups, eps)
        self.temporal = ResBlock(c_out, c_out, emb_dim, True, groups, eps_temporal)
        self.mix = nn.Parameter(torch.tensor([0.5 if emb_dim else 0.0]))

    def forward(self, inputs, B, emb=None, upsample=None, *, slices):
        """inputs: a list of x (B*T, c, H, W) or of x and skip (B*T, c', H, W), where c + c' = c_in
        -> (B*T, c_out, H, W).

        upsample: the convolution that ends the previous level, applied to x first; or None. The
        list is emptied. Activations are the largest tensors there are, and the call of a module
        keeps its arguments alive to its end. So a list holds them, and no variable of the caller
        does: what went into the first block is free before the second begins.
        """
        h = self.over_pixels(*inputs, emb=emb, upsample=upsample, slices=slices)
        inputs.clear()
        return self.over_frames(h, B, emb, slices)

    def over_pixels(self, x, skip=None, *, emb, upsample, slices):
        e = None if emb is None else self.spatial.embed(emb, len(x), 4)
        same_shape = upsample is None and isinstance(self.spatial.shortcut, nn.Identity)
        reusable = emb is None and same_shape  # in the UNet, x waits as a skip, too

        def per_frame(x, skip, e):
            return self.spatial(x, skip, e, upsample, slices.again)

        return slices(per_frame, x, skip, e, out=x if reusable else None, parts=True)

    def over_frames(self, x, B, emb, slices):
        """(B*T, C, H, W) -> (B*T, C, H, W). x may be overwritten where autograd is off.

        The norms see all frames and all pixels, so a clip that is cut in time has other results
        (see VAE.decode). The convolutions see all frames of one pixel. So statistics are taken in
        slices of frames, the rest in slices of rows.
        """
        block = self.temporal
        e = None if emb is None else block.embed(emb, B, 5)
        # The block adds to its input, so blending means weighting what it adds. Trap: alpha weights
        # the spatial branch in the UNet, but the temporal branch in the VAE decoder.
        alpha = self.mix.float().sigmoid().to(x.dtype)
        weight = alpha if emb is None else 1 - alpha

        def first(x):
            x = rearrange(x, "(b t) c h w -> b c t h w", b=B)
            h = block.conv1(silu(norm1(x)))
            return rearrange(h if e is None else h + e, "b c t h w -> (b t) c h w")

        def second(x, h):
            h = rearrange(h, "(b t) c h w -> b c t h w", b=B)
            h = block.conv2(silu(norm2(h)))
            return torch.addcmul(x, rearrange(h, "b c t h w -> (b t) c h w"), weight)

        norm1 = norm_over_frames(block.norm1, x, B, slices)
        h = slices(first, x, dim=2)
        norm2 = norm_over_frames(block.norm2, h, B, slices)
        return slices(second, x, h, dim=2, out=x)


class SpatialBlock(nn.Module):
    """Transformer block over the pixels of each frame: (b, N, C) -> (b, N, C)."""

    def __init__(self, C, heads, context_dim):
        super().__init__()
        self.norm1, self.attn1 = LayerNorm(C), SelfAttention(C, heads)
        self.norm2, self.attn2 = LayerNorm(C), ContextAttention(C, context_dim)
        self.norm3, self.ff = LayerNorm(C), FeedForward(C)

    def forward(self, x, c):
        """c (b, 1, C): what attn2 makes of the context, the same at every pixel."""
        x = x + self.attn1(self.norm1(x)) + c
        return x + self.ff(self.norm3(x))


# --------------------------------------------------------------------------------------------------
# 4. ExVideo (section 3.2, Figure 1). Each temporal transformer block gets a trainable table of
#    frame positions in place of the sinusoid, and then a 3D convolution that starts as the
#    identity. The table starts by walking up and down the positions that the base knows, so that
#    neighbouring frames have neighbouring positions. Up to native_frames frames, an extended model
#    computes exactly what the base did.
#
#    To try another extension, change this section alone; toy/lora.py is an example. What extend()
#    adds is trained, saved and loaded if is_extension_parameter() says so. Add parameters but no
#    buffers: load() builds the networks without storage. A module that replaces a layer keeps that
#    layer as self.base: in files its weights have no `.base` in their names. extend() may be called
#    again, on an extended UNet, and at any length: training at the native length calls it too.

# In extension files. What gives the same parameters another meaning needs another name; what only
# adds some does not, so that it can be trained over files that are there.
ARCHITECTURE = "exvideo"


class TemporalBlock(nn.Module):
    """Transformer block over the frames at each pixel. What ExVideo extends and trains."""

    def __init__(self, C, heads, context_dim):
        super().__init__()
        self.frame_embed = nn.Sequential(nn.Linear(C, 4 * C), nn.SiLU(), nn.Linear(4 * C, C))
        self.frame_table = None  # ExVideo: (num_frames, C), in place of the sinusoid
        self.frame_conv = None   # ExVideo: the identity 3D convolution
        self.norm_in, self.ff_in = LayerNorm(C), FeedForward(C)
        self.norm1, self.attn1 = LayerNorm(C), SelfAttention(C, heads)
        self.norm2, self.attn2 = LayerNorm(C), ContextAttention(C, context_dim)
        self.norm3, self.ff = LayerNorm(C), FeedForward(C)

    def position_embedding(self, T, like):
        """Embedding of the frame indices 0..T-1: (T, 1, C)."""
        if self.frame_table is None:
            table = sinusoid(torch.arange(T, device=like.device), like.shape[-1]).to(like.dtype)
        else:
            table = self.frame_table[:T]
        return self.frame_embed(table)[:, None]

    def forward(self, x, c):
        """x (B, T, n, C) -> (B, T, n, C), n any number of pixels.

        The frame positions are in x, and the convolution is done. c (B, 1, C): attn2(context).
        """
        B = len(x)
        x = rearrange(x, "b t n c -> (b n) t c").contiguous()
        x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1(self.norm1(x))
        x = (x.unflatten(0, (B, -1)) + c[:, None]).flatten(0, 1)  # the same for all pixels
        x = x + self.ff(self.norm3(x))
        return rearrange(x, "(b n) t c -> b t n c", b=B)


class FrameConv(nn.Conv3d):
    """3x3x3 convolution over frames and pixels, initialised to the identity.

    Borders reflect, as in the released model. Along an axis of length 1 they replicate (the
    official code fails there), so that one frame and images of 64 pixels work.
    """

    def __init__(self, C, device=None, dtype=None):
        super().__init__(C, C, 3, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self):
        self.bias.zero_()
        self.weight.zero_()
        self.weight[:, :, 1, 1, 1].fill_diagonal_(1)

    def forward(self, x, embedding, H, slices):
        """Tokens (B, T, H*W, C) plus the embedding of their positions (T, 1, C), convolved:
        (B, T, H*W, C)."""
        def convolve(embedding, *frames):
            """n + 2 frames (B, H*W, C), with their embedding -> the inner n, (B, n, H*W, C)"""
            x = torch.stack(frames, dim=1) + embedding
            x = rearrange(x, "b t (h w) c -> b c t h w", h=H)
            x = reflect(x, 3)
            x = reflect(x, 4)
            x = super(FrameConv, self).forward(x)
            x = rearrange(x, "b c t h w -> b t (h w) c")
            return x.contiguous()  # the layout that a base has here: kernels depend on it

        return slices.with_neighbours(convolve, reflect(embedding, 0), x)


def reflect(x, axis):
    """x with an entry more at both ends of an axis. F.pad's CUDA gradient isn't deterministic."""
    n = x.shape[axis]
    first, last = x.narrow(axis, min(1, n - 1), 1), x.narrow(axis, max(n - 2, 0), 1)
    return torch.cat([first, x, last], axis)


def fold_positions(native, num_frames):
    """The "cyclic pattern" of section 3.2: a position known to the base for each of num_frames.

    Up through all native positions, then down and up by 4/5 of them. For 25 these are 0 1 ... 24
    23 ... 4 5 ... 24 ..., as in the released model. The paper has no formula; the fraction is our
    choice for other lengths.
    """
    swing = native * 4 // 5
    positions = list(range(min(native, num_frames)))
    for t in range(native, num_frames):
        steps = (t - native + 1) % (2 * swing) if swing else 0  # since the last position was passed
        positions.append(native - 1 - min(steps, 2 * swing - steps))
    return positions


@torch.no_grad()
def extend(unet, num_frames=128):
    """Extend a UNet to num_frames frames, in place (ExVideo section 3.2), and return it.

    The native length is unet.config.native_frames for a base, and the present length for a UNet
    that was extended before; num_frames may be more, the same or less. A video that has no more
    frames than either stays bit-identical (on CUDA in float32 only without TF32, which rounds what
    passes the convolution).
    New parameters have the device, dtype and requires_grad of their neighbours. Raises ValueError
    if num_frames is below 1.
    """
    if num_frames < 1:
        raise ValueError(f"extend() to {num_frames} frames: it takes at least one")
    native = unet.max_frames or unet.config.native_frames
    positions = torch.tensor(fold_positions(native, num_frames))
    for block in unet.temporal_blocks():
        like = block.norm_in.weight
        index = positions.to(like.device)
        if block.frame_table is None:
            rows = sinusoid(index, len(like)).to(like.dtype)
        else:
            rows = block.frame_table[index]
        block.frame_table = nn.Parameter(rows, like.requires_grad)
        if block.frame_conv is None:
            conv = FrameConv(len(like), like.device, like.dtype)
            block.frame_conv = conv.requires_grad_(like.requires_grad)
    unet.max_frames = num_frames
    return unet


# Parameters that have no effect while the context is one token (see ContextAttention). They are
# loaded and saved, but never trained.
WITHOUT_EFFECT = re.compile(r"\.attn\.(spatial|temporal)\.(attn2\.to_[qk]|norm2)\.")


def is_extension_parameter(name):
    """Whether the paper trains a parameter (section 3.3), named as in unet.named_parameters().
    Extension files hold these and no others."""
    return ".attn.temporal." in name


# --------------------------------------------------------------------------------------------------
# 5. UNet: four levels down, a middle, four levels up. `down` and `up` have twelve blocks each,
#    numbered as in the published single file. A block has a residual block, a transformer and a
#    resampling (or input) convolution, or some of these. Without what saves memory, a pass is
#
#        h = conv_in(x)                                         # the first block of `down`
#        skips = [h]
#        for block in down: h = block.conv(block.attn(block.res(h))); skips.append(h)
#        for block in mid:  h = block.attn(block.res(h))
#        for block in up:   h = block.conv(block.attn(block.res(cat([h, skips.pop()]))))
#        return conv_out(silu(norm_out(h)))
#
#    where res and attn work on the pixels of each frame, on the frames at each pixel, and blend.


class SpatioTemporalTransformer(nn.Module):
    """A transformer block over the pixels of each frame, and one over the frames at each pixel on
    its output, blended: (B*T, C, H, W) -> (B*T, C, H, W)"""

    def __init__(self, C, heads, context_dim, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, C, eps=EPS_UNET_TRANSFORMER)
        self.proj_in = nn.Linear(C, C)
        self.spatial = SpatialBlock(C, heads, context_dim)
        self.temporal = TemporalBlock(C, heads, context_dim)
        self.mix = nn.Parameter(torch.tensor([0.5]))
        self.proj_out = nn.Linear(C, C)

    def forward(self, x, ctx, slices):
        B, H, temporal = len(ctx), x.shape[2], self.temporal
        alpha = self.mix.float().sigmoid().to(x.dtype)
        slices = slices.for_cache(x)

        def per_frame(x, context):
            x = self.proj_in(rearrange(self.norm(x), "bt c h w -> bt (h w) c"))
            return self.spatial(x, context)

        context = self.spatial.attn2(ctx).repeat_interleave(len(x) // B, 0)   # (B*T, 1, C)
        h = slices(per_frame, x, context).unflatten(0, (B, -1))               # (B, T, N, C)

        context = temporal.attn2(ctx)                                         # (B, 1, C)
        embedding = temporal.position_embedding(h.shape[1], h)                # (T, 1, C)
        convolved = None
        if temporal.frame_conv is not None:
            convolved = temporal.frame_conv(h, embedding, H, slices)          # (B, T, N, C)

        def per_pixel(h, convolved):
            y = temporal(h + embedding if convolved is None else convolved, context)
            return self.proj_out(torch.lerp(y, h, alpha))  # alpha weights the spatial branch

        h = slices(per_pixel, h, convolved, dim=2, out=h)                     # (B, T, N, C)
        del convolved  # before the sum needs as much
        return x + rearrange(h, "b t (h w) c -> (b t) c h w", h=H)


class Block(nn.Module):
    def __init__(self, res=None, attn=None, conv=None):
        super().__init__()
        self.res, self.attn, self.conv = res, attn, conv

    def forward(self, inputs, emb, ctx, upsample, slices):
        """res and attn; conv is left to UNet.forward. inputs: see SpatioTemporalRes."""
        h = self.res(inputs, len(ctx), emb, upsample, slices=slices)
        return h if self.attn is None else self.attn(h, ctx, slices)


class UNet(nn.Module):
    """SVD's spatio-temporal UNet (SVD-XT: 1,524,623,082 parameters).

    max_frames: the most frames that it can make after extend(); None for a base.
    slice_size: elements per slice of long videos (see Slices); None switches slices off.
    checkpointing: what training keeps of a pass, and what it computes again on the way back.
        "memory" keeps the inputs of blocks with a transformer, and computes the slices in them
        once more; "balanced" keeps what enters and leaves convolutions and attention blocks; None
        keeps everything. bench/README.md says what each costs.
    stream: Stream(unet, device) keeps weights and skips in CPU memory until they are needed.
    """

    def __init__(self, config=UNetConfig()):
        super().__init__()
        self.config = config
        self.max_frames = None  # set by extend()
        self.checkpointing = "memory"
        self.slice_size = Slices.size
        self.stream = None
        C, emb_dim = config.channels, 4 * config.channels[0]
        last = len(C) - 1  # the coarsest level has no transformers

        def mlp(width):
            return nn.Sequential(nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))

        def res(c_in, c_out):
            return SpatioTemporalRes(c_in, c_out, emb_dim, config.groups)

        def attn(c, heads):
            return SpatioTemporalTransformer(c, heads, config.context_dim, config.groups)

        self.time_embed = mlp(C[0])                        # of the noise level
        self.cond_embed = mlp(len(config.ids) * ID_DIM)    # of the ids

        self.down = nn.ModuleList([Block(conv=nn.Conv2d(8, C[0], 3, padding=1))])
        widths = [C[0]]  # of the skips
        for level, c in enumerate(C):
            for _ in range(2):
                transformer = attn(c, config.heads[level]) if level < last else None
                self.down.append(Block(res(widths[-1], c), transformer))
                widths.append(c)
            if level < last:
                self.down.append(Block(conv=nn.Conv2d(c, c, 3, stride=2, padding=1)))
                widths.append(c)

        self.mid = nn.ModuleList([Block(res(c, c), attn(c, config.heads[last])), Block(res(c, c))])

        self.up = nn.ModuleList()
        for level, c_out in reversed(list(enumerate(C))):
            for i in range(3):
                transformer = attn(c_out, config.heads[level]) if level < last else None
                upsample = Upsample(c_out, c_out, 3, padding=1) if i == 2 and level > 0 else None
                self.up.append(Block(res(c + widths.pop(), c_out), transformer, upsample))
                c = c_out

        self.norm_out = nn.GroupNorm(config.groups, C[0], eps=EPS_UNET_RES)
        self.conv_out = nn.Conv2d(C[0], 4, 3, padding=1)

    def temporal_blocks(self):
        """The 16 temporal transformer blocks, in forward order."""
        return [m for m in self.modules() if isinstance(m, TemporalBlock)]

    def forward(self, x, c_noise, ctx, ids):
        """F of EDM's preconditioning (section 8).

        x (B,T,8,H,W): 4 noisy latents times c_in, then 4 image latents; H and W multiples of 8.
        c_noise (B,): ln(sigma)/4. ctx (B,1,D): CLIP image embedding, zeros when unconditional.
        ids (B,3): see unet_ids(). Returns (B,T,4,H,W) in x's dtype. Use torch.no_grad() unless you
        train: gradients need memory, and without checkpoints there are no slices.
        Raises ValueError if shapes do not fit or T exceeds max_frames.
        """
        B, T, _, H, W = x.shape
        if H % 8 or W % 8 or ctx.shape[:2] != (B, 1):
            raise ValueError(f"latents must be multiples of 8 and ctx (B,1,D) with B={B}: "
                             f"got {H}x{W}, {tuple(ctx.shape)}")
        if self.max_frames and T > self.max_frames:
            raise ValueError(f"{T} frames asked of a model extended to {self.max_frames}: "
                             "use extend() for more")
        dtype = self.conv_out.weight.dtype
        ctx = ctx.to(dtype)
        emb = self.time_embed(sinusoid(c_noise, self.config.channels[0]).to(dtype))  # (B, emb_dim)
        emb = emb + self.cond_embed(sinusoid(ids, ID_DIM).flatten(1).to(dtype))

        checkpointing = self.checkpointing if self.training and torch.is_grad_enabled() else None
        slices = Slices(self.slice_size, checkpointing)
        visit = self.stream.visit if self.stream else lambda blocks, skips=(): blocks
        put = self.stream.put if self.stream else lambda skip: skip

        def run(block, inputs, upsample=None):
            if block.res is None:
                return block.conv(*inputs)
            if checkpointing == "memory" and block.attn is not None:
                return recomputed(lambda *xs: block(list(xs), emb, ctx, upsample, slices), *inputs)
            return block(inputs, emb, ctx, upsample, slices)

        # lists, which alone hold the activations: see SpatioTemporalRes.forward
        h = [self.down[0].conv(x.to(dtype).flatten(0, 1))]                    # (B*T, C, H, W)
        skips = [put(h[0])]
        for block in visit(self.down[1:]):
            h = [run(block, h)]
            skips.append(put(h[0]))
        for block in visit(self.mid):
            h = [run(block, h)]
        upsamplings = [None, *(block.conv for block in self.up)]  # which the next block does
        for block, upsample in zip(visit(self.up, skips), upsamplings):
            h.append(skips.pop())
            h = [run(block, h, upsample)]

        def out(h):
            return self.conv_out(silu(self.norm_out(h)))

        return slices(out, *h).unflatten(0, (B, T)).to(x.dtype)               # (B, T, 4, H, W)


def unet_ids(names, values, device=None):
    """The UNet's input `ids`, (B, len(names)) float32. names: those of unet.config.ids.

    values: a mapping with a number, or a tensor (B,), for each name; it may hold more. fps is in
    frames per second. Only this function knows that SVD is given fps - 1.
    Raises ValueError if a name is missing.
    """
    ids = []
    for name in names:
        if name not in values:
            raise ValueError(f"the UNet is conditioned on {', '.join(names)}, "
                             f"but there is no {name}")
        value = torch.as_tensor(values[name], dtype=torch.float32, device=device).reshape(-1)
        ids.append(value - 1 if name == "fps" else value)
    return torch.stack(torch.broadcast_tensors(*ids), dim=1)


# --------------------------------------------------------------------------------------------------
# 6. VAE: images (N,3,8h,8w) in [-1,1] -> latents (N,4,h,w), latents (B,T,4,h,w) -> video
#    (B,T,3,8h,8w). The encoder is Stable Diffusion's image encoder. The decoder has a temporal
#    residual block behind each spatial one.


class PixelAttention(nn.Module):
    """Self-attention over pixels with a single head as wide as the feature map (512 in SVD)."""

    def __init__(self, C, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, C, eps=EPS_VAE)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(C, C, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b (h w) c") for f in (self.q, self.k, self.v))
        q, k, v = (t.contiguous() for t in (q, k, v))  # fused kernels take nothing else
        h = rearrange(attention(q, k, v, heads=1), "b (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(h)


class Downsample(nn.Conv2d):
    """Stride 2 on an image padded at the right and the bottom only, as in Stable Diffusion."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks of one resolution, and the resampling after them (or None)."""

    def __init__(self, blocks, downsample=None, upsample=None):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.downsample, self.upsample = downsample, upsample


class Mid(nn.Module):
    def __init__(self, res, C, groups):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = res(C, C), PixelAttention(C, groups), res(C, C)


class Encoder(nn.Module):
    """(N,3,8h,8w) -> (N,8,h,w), mean and log variance of the latents before quant_conv."""

    def __init__(self, config):
        super().__init__()
        C, res = config.channels, partial(ResBlock, groups=config.groups, eps=EPS_VAE)
        self.conv_in = nn.Conv2d(3, C[0], 3, padding=1)
        c_in = (C[0],) + C[:-1]
        self.down = nn.ModuleList()
        for level, (a, b) in enumerate(zip(c_in, C)):
            sample = Downsample(b, b, 3, stride=2) if level < len(C) - 1 else None
            self.down.append(Level([res(a, b), res(b, b)], downsample=sample))
        self.mid = Mid(res, C[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, C[-1], eps=EPS_VAE)
        self.conv_out = nn.Conv2d(C[-1], 8, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            if level.downsample is not None:
                h = level.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B,T,4,h,w) -> (B,T,3,8h,8w). `up` is listed from fine to coarse, as in the files, and run in
    reverse."""

    def __init__(self, config):
        super().__init__()
        C = config.channels
        res = partial(SpatioTemporalRes, emb_dim=None, groups=config.groups, eps=EPS_VAE,
                      eps_temporal=EPS_VAE_TEMPORAL)
        self.conv_in = nn.Conv2d(4, C[-1], 3, padding=1)
        self.mid = Mid(res, C[-1], config.groups)
        c_in = C[1:] + (C[-1],)
        self.up = nn.ModuleList()
        for level, (a, b) in enumerate(zip(c_in, C)):
            sample = Upsample(b, b, 3, padding=1) if level > 0 else None
            self.up.append(Level([res(a, b), res(b, b), res(b, b)], upsample=sample))
        self.norm_out = nn.GroupNorm(config.groups, C[0], eps=EPS_VAE)
        self.conv_out = nn.Conv2d(C[0], 3, 3, padding=1)
        self.time_conv_out = nn.Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0))  # over frames, of RGB

    def forward(self, z):
        B, slices, upsample = len(z), Slices().for_cache(z), None

        def out(h):
            return self.conv_out(silu(self.norm_out(h)))

        h = [self.conv_in(z.flatten(0, 1))]          # (B*T, C, h, w), see SpatioTemporalRes.forward
        h = [self.mid.block_1(h, B, slices=slices)]
        h = [slices(self.mid.attn_1, *h)]
        h = [self.mid.block_2(h, B, slices=slices)]
        for level in reversed(self.up):
            for block in level.block:
                h = [block(h, B, upsample=upsample, slices=slices)]
                upsample = None
            upsample = level.upsample  # waits for the next block, which does it slice by slice
        h = slices(out, *h)                                                   # (B*T, 3, 8h, 8w)
        h = self.time_conv_out(rearrange(h, "(b t) c h w -> b c t h w", b=B))
        return rearrange(h, "b c t h w -> b t c h w")


@contextmanager
def exact_float32():
    """Convolutions in true float32. By default cuDNN rounds their factors to 10 bits (TF32)."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


class VAE(nn.Module):
    """SVD's VAE (97.7 M parameters). Its latents are unscaled; the UNet's are times VAE_SCALE."""

    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.quant_conv = Encoder(config), nn.Conv2d(8, 8, 1)
        self.decoder = Decoder(config)

    @exact_float32()
    def encode(self, img):
        """Mean latents of images, unscaled: (N,3,H,W) in [-1,1], H and W multiples of 8 ->
        (N,4,H/8,W/8). Raises ValueError for other shapes."""
        if img.ndim != 4 or img.shape[1] != 3 or img.shape[2] % 8 or img.shape[3] % 8:
            raise ValueError("images must be (N,3,H,W), H and W multiples of 8: got "
                             f"{tuple(img.shape)}")
        h = self.quant_conv(self.encoder(img.to(self.quant_conv.weight.dtype)))
        return h[:, :4].to(img.dtype)

    @exact_float32()
    def decode(self, z):
        """Video of unscaled latents, the whole clip at once: (B,T,4,h,w) -> (B,T,3,8h,8w), about
        [-1,1], not clamped.

        Normalisation in the temporal blocks spans all frames: decoding a clip in pieces gives
        (slightly) other pixels.
        """
        return self.decoder(z.to(self.decoder.conv_in.weight.dtype)).to(z.dtype)


# --------------------------------------------------------------------------------------------------
# 7. CLIP image encoder (OpenCLIP ViT-H/14): images (N,3,H,W) in [-1,1] -> embeddings (N,1024).

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0,1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess_clip(img, size=224):
    """Images for the ImageEncoder: (N,3,H,W) in [-1,1] -> (N,3,size,size), float32, normalised with
    CLIP's statistics.

    As SVD was trained: Gaussian blur against aliasing, bicubic resize with aligned corners; the
    aspect ratio is not kept and nothing is cropped.
    """
    x = img.float()
    for axis, n in ((2, img.shape[2]), (3, img.shape[3])):
        sigma = max((n / size - 1) / 2, 0.001)
        k = int(max(4 * sigma, 3)) | 1  # made odd
        taps = torch.exp(-0.5 * ((torch.arange(k, device=img.device) - k // 2) / sigma) ** 2)
        taps = (taps / taps.sum()).view((1, 1, k, 1) if axis == 2 else (1, 1, 1, k))
        pad = (0, 0, k // 2, k // 2) if axis == 2 else (k // 2, k // 2, 0, 0)
        x = F.conv2d(F.pad(x, pad, mode="reflect"), taps.repeat(3, 1, 1, 1), groups=3)
    x = F.interpolate(x, (size, size), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(v).view(3, 1, 1).to(img.device) for v in (CLIP_MEAN, CLIP_STD))
    return ((x + 1) / 2 - mean) / std


class CLIPBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.qkv = LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ln2, self.fc1 = LayerNorm(width), nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.out(attention(*self.qkv(self.ln1(x)).chunk(3, dim=-1), self.heads))
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))  # exact GELU, neither tanh nor "quick"


class ImageEncoder(nn.Module):
    """OpenCLIP's ViT-H/14 vision tower with its projection (632.1 M parameters)."""

    def __init__(self, config=CLIPConfig()):
        super().__init__()
        self.config = config
        width, tokens = config.width, (config.image // config.patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)

        def random(*shape):  # as nn.Linear starts (normal numbers on meta import for a second)
            return nn.Parameter(nn.init.uniform_(torch.empty(*shape), -width**-0.5, width**-0.5))

        self.class_embedding = random(width)
        self.positional_embedding = random(tokens, width)
        self.ln_pre = LayerNorm(width)
        self.blocks = nn.ModuleList(CLIPBlock(width, config.heads) for _ in range(config.layers))
        self.ln_post = LayerNorm(width)
        self.proj = random(width, config.out_dim)

    def forward(self, img):
        """Embedding of preprocessed images: (N,3,224,224) -> (N,out_dim), in img's dtype. Raises
        ValueError for other shapes."""
        size = self.config.image
        if img.shape[1:] != (3, size, size):
            raise ValueError(f"images must be (N,3,{size},{size}), see preprocess_clip(): got "
                             f"{tuple(img.shape)}")
        x = rearrange(self.conv1(img.to(self.proj.dtype)), "n c h w -> n (h w) c")
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = x + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.blocks:
            x = block(x)
        return (self.ln_post(x[:, 0]) @ self.proj).to(img.dtype)


# --------------------------------------------------------------------------------------------------
# 8. EDM (Karras et al. 2022, Table 1) with SVD's choices: v-prediction, sigma_data = 1. Latents
#    here are scaled by VAE_SCALE, float32, (B,T,4,H,W); sigma is (B,), a noise level per video.

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 700.0, 7.0  # SVD's published scheduler; EDM's sigma_max is 80


def karras_sigmas(steps, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, rho=RHO):
    """EDM eq. 5: noise levels from sigma_max down to sigma_min, then 0: (steps + 1,), float32."""
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64)  # of one step, it is [1]
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (low + ramp * (high - low)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def denoise(unet, x, sigma, image_latents, ctx, ids):
    """D(x; sigma), the estimate of the clean latents (EDM eq. 7): (B,T,4,H,W) -> (B,T,4,H,W).

    image_latents (B,1 or T,4,H,W): unscaled VAE latents of the conditioning image, zeros when
    unconditional. sigma (B,) > 0, ctx (B,1,D), ids as in UNet.forward.
    """
    s = sigma.float().view(-1, 1, 1, 1, 1)
    c_skip = 1 / (s**2 + 1)
    c_out = -s / (s**2 + 1).sqrt()
    c_in = 1 / (s**2 + 1).sqrt()
    c_noise = sigma.float().log() / 4
    image_latents = image_latents.expand(-1, x.shape[1], -1, -1, -1).to(x.dtype)
    inputs = torch.cat([c_in * x, image_latents], dim=2)
    return c_skip * x + c_out * unet(inputs, c_noise, ctx, ids)


class Loss(NamedTuple):
    """Which noise levels are trained on, and how much each of them counts."""
    draw: Callable       # draw(n, T, generator) -> sigma (n,), for videos of T frames
    weight: Callable     # weight(sigma, T) -> weight of |D - target*x|^2, of sigma's shape
    target: float = 1.0  # factor on the clean latents


LOSSES = {
    # ln sigma ~ N(0.7, 1.6^2). EDM's lambda for sigma_data = 1, under which an untrained F has a
    # loss of about 1 at every level.
    "edm": Loss(lambda n, T, g: (0.7 + 1.6 * torch.randn(n, generator=g)).exp(),
                lambda sigma, T: (sigma**2 + 1) / sigma**2),
    # Uniform on the 1000 Karras sigmas, as in ExVideo's released training script. The target is its
    # remedy for videos that turn grey.
    "exvideo": Loss(lambda n, T, g: karras_sigmas(1000)[torch.randint(1000, (n,), generator=g)],
                    lambda sigma, T: (sigma**2 + 1).sqrt() / sigma, target=1.01),
}


def training_loss(unet, loss, x, sigma, noise, image_latents, ctx, ids):
    """The loss of each video, (B,): the mean of weight * |D(x + sigma*noise; sigma) - target*x|^2.

    loss: a Loss. x, noise (B,T,4,H,W). The rest as in denoise().
    """
    s = sigma.float().view(-1, 1, 1, 1, 1)
    D = denoise(unet, x + s * noise, sigma, image_latents, ctx, ids)
    return (loss.weight(s, x.shape[1]) * (D - loss.target * x) ** 2).mean(dim=(1, 2, 3, 4))


# --------------------------------------------------------------------------------------------------
# 9. Memory and speed. Long videos do not fit in memory, but hardly any layer needs all of one:
#    spatial layers treat frames independently, temporal ones pixels. So a layer hands Slices a
#    function, which is applied to some frames or pixels at a time. What fits in one slice is
#    computed as if there were no slices.

CPU_SLICES = 4  # transformers and the decoder take smaller slices on a CPU: 10 to 16 % less time


def recomputed(f, *xs):
    """f(*xs), of which only the inputs are kept. The way back computes f again, up to the last
    operation whose inputs it needs."""
    return checkpoint(f, *xs, use_reentrant=False, preserve_rng_state=False)  # no dropout here


@dataclass
class Slices:
    """slices(f, x) is f(x), slice by slice, for an f that treats frames (or pixels) one by one.

    size: elements of x per slice; None never cuts. 16k tokens of 320 channels keep a GPU busy (with
        fewer than 8k, launching kernels dominates) and make what is alive inside a slice small.
    checkpointing: of UNet, while gradients are needed: what a slice keeps. With gradients and
        without checkpoints nothing is cut: it would save nothing.
    """
    size: int | None = 16384 * 320
    checkpointing: str | None = None

    def again(self, f, *xs):
        """f(*xs). With "balanced" checkpoints, its activations are computed again on the way
        back."""
        return recomputed(f, *xs) if self.checkpointing == "balanced" else f(*xs)

    def count(self, *xs):
        """Number of slices for some tensors: that of the largest."""
        if self.size is None or (torch.is_grad_enabled() and not self.checkpointing):
            return 1
        largest = max(x.numel() for x in xs if x is not None)
        return max(1, math.ceil(largest / self.size))

    def length(self, dim, *xs):
        """Length of a slice along a dimension. The last one may be shorter."""
        n = xs[0].shape[dim]
        return math.ceil(n / min(n, self.count(*xs)))

    def for_cache(self, x):
        """These slices; for inference on a CPU smaller ones, which its cache holds."""
        smaller = self.size and x.is_cpu and not torch.is_grad_enabled()
        return replace(self, size=math.ceil(self.size / CPU_SLICES)) if smaller else self

    def __call__(self, f, *xs, dim=0, out=None, parts=False):
        """f(*xs), where f treats the entries of one dimension independently. xs may contain None.

        out: a tensor of the result's shape that may be overwritten where autograd is off; it may be
        xs[0] itself. parts: f itself calls again() for each of its parts.
        """
        n, length = xs[0].shape[dim], self.length(dim, *xs)
        f = f if parts else partial(self.again, f)
        if length == n:
            return f(*xs)
        pieces = [repeat(None) if x is None else x.split(length, dim) for x in xs]
        return self.join(f, zip(*pieces), n, dim, out)

    def with_neighbours(self, f, embedding, x):
        """f of all frames of x (B, T, n, C), where f needs the frames before and after, too.

        f(embedding, *frames) is given frames (B, n, C) with a neighbour more at both ends
        (reflected at the ends of the video), and their rows of embedding (T + 2, ...). It returns
        the frames without these neighbours, (B, ., n, C).
        """
        T, length = x.shape[1], self.length(1, x)
        frames = x.unbind(1)  # not x[:, t], the gradient of which is as large as x
        frames = [frames[min(1, T - 1)], *frames, frames[max(T - 2, 0)]]
        cuts = [slice(begin, begin + length + 2) for begin in range(0, T, length)]
        slabs = [(embedding[cut], *frames[cut]) for cut in cuts]
        f = partial(self.again, f)
        return f(*slabs[0]) if len(slabs) == 1 else self.join(f, slabs, T, dim=1)

    def join(self, f, pieces, n, dim, out=None):
        """f of every tuple in pieces, concatenated to length n along dim."""
        if torch.is_grad_enabled():
            if self.checkpointing == "memory":
                f = partial(recomputed, f)
            return torch.cat([f(*xs) for xs in pieces], dim)
        begin = 0
        for xs in pieces:
            y = f(*xs)
            if out is None:
                out = y.new_empty([*y.shape[:dim], n, *y.shape[dim + 1:]])
            out.narrow(dim, begin, y.shape[dim]).copy_(y)
            begin += y.shape[dim]
            del y  # or it would live through the next slice
        return out


def norm_over_frames(norm, x, B, slices):
    """GroupNorm with the statistics of whole videos x (B*T, C, H, W), as a function of slices
    (B, C, T, h, W)."""
    if slices.count(x) == 1:
        return norm
    wide = torch.promote_types(x.dtype, torch.float32)

    def moments(x):
        groups = x.to(wide).unflatten(1, (norm.num_groups, -1)).flatten(2)
        var, mean = torch.var_mean(groups, dim=2, correction=0)
        return torch.stack([mean, var], dim=1)                                # (frames, 2, groups)

    def per_channel(v):
        return v.repeat_interleave(x.shape[1] // norm.num_groups, dim=1)  # (B, groups) -> (B, C)

    means, variances = slices(moments, x).unflatten(0, (B, -1)).unbind(2)     # (B, T, groups)
    mean = means.mean(1, keepdim=True)
    var = (variances + (means - mean) ** 2).mean(1)
    scale = per_channel((var + norm.eps).rsqrt()) * norm.weight.to(wide)
    shift = norm.bias.to(wide) - per_channel(mean[:, 0]) * scale
    scale, shift = (v[..., None, None, None] for v in (scale, shift))         # (B, C, 1, 1, 1)
    return lambda x: torch.addcmul(shift, x, scale).to(x.dtype)  # rounded once, as in GroupNorm


def group_norm_(norm, x):
    """A GroupNorm in place, bit-identical. Half of the groups at a time take less memory."""
    n = math.gcd(2, norm.num_groups)
    for part, weight, bias in zip(x.chunk(n, dim=1), norm.weight.chunk(n), norm.bias.chunk(n)):
        part.copy_(F.group_norm(part, norm.num_groups // n, weight, bias, norm.eps))
    return x


class Stream:
    """For small cards: keeps in CPU memory what a pass does not need yet. Inference only.

    Use it by unet.stream = Stream(unet, device). The device holds the weights of two blocks, a flat
    buffer each: of the one that computes, and of the next, which is copied meanwhile. Skips of at
    least `large` bytes wait in CPU memory, too. On CUDA the copies run in a stream of their own and
    from pinned memory. The output is bit-identical.
    """

    def __init__(self, unet, device, large=2**26):
        self.device, self.large = torch.device(device), large
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        blocks, self.home, shelf = [*unet.down, *unet.mid, *unet.up], {}, ()
        needs = [sum(size for *_, size in self.weights(block)) for block in blocks]
        # PyTorch rounds pinned memory up to a power of two, so blocks share buffers of such a size.
        most = 2 ** (sum(needs) // 4).bit_length()
        for i, (block, need) in enumerate(zip(blocks, needs)):
            if need > len(shelf):  # several blocks share one
                size = max(need, min(most, sum(needs[i:])))
                shelf = torch.empty(size, dtype=torch.uint8, pin_memory=bool(self.side))
            self.home[block], shelf = shelf[:need], shelf[need:]
            self.set_weights(block, self.home[block], fill=True)
        in_blocks = {module for block in blocks for module, *_ in self.weights(block)}
        for module in set(unet.modules()) - in_blocks:
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(p.to(self.device), p.requires_grad))

    def weights(self, block):
        """[(module, name, parameter, aligned bytes)] of a block, without its conv: the next block
        runs that."""
        modules = (m for part in (block.res, block.attn) if part for m in part.modules())
        return [(m, name, p, math.ceil(p.nbytes / 512) * 512)
                for m in modules for name, p in m.named_parameters(recurse=False)]

    @torch.inference_mode(False)  # or requires_grad is lost, on which torch.matmul's kernel depends
    def set_weights(self, block, buffer, fill=False):
        """Makes a block's parameters views of a buffer. fill: it gets their values first."""
        for module, name, p, size in self.weights(block):
            view, buffer = buffer[:p.nbytes].view(p.dtype).view(p.shape), buffer[size:]
            if fill:
                view.copy_(p.detach())
            setattr(module, name, nn.Parameter(view, p.requires_grad))

    def aside(self):
        """A context for copies beside the computation, after all that was queued so far."""
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.side)  # which does nothing with None

    def put(self, skip):
        """A skip, or its copy in CPU memory if it is large."""
        if skip.nbytes < self.large:
            return skip
        with self.aside():
            waiting = skip.to("cpu", non_blocking=True, copy=True)  # which pins it
        if self.side is not None:
            skip.record_stream(self.side)  # its memory is not used again before it is copied
        return waiting

    def visit(self, blocks, skips=()):
        """Yields the blocks, each with its weights and the last of the skips on the device."""
        buffer, arrived = self.fetch(blocks[0], skips, -1)
        for block, following in zip(blocks, [*blocks[1:], None]):
            self.set_weights(block, buffer)
            if arrived is not None:
                torch.cuda.current_stream(self.device).wait_event(arrived)
            if following is not None:
                buffer, arrived = self.fetch(following, skips, -2)
            try:
                yield block
            finally:
                self.set_weights(block, self.home[block])

    @torch.inference_mode(False)
    def fetch(self, block, skips, i):
        """Begins to copy a block's buffer and skips[i] to the device: (the copy, final event)."""
        with self.aside():
            if len(skips) >= -i and skips[i].nbytes >= self.large:
                skips[i] = skips[i].to(self.device, non_blocking=True, copy=True)
            buffer = self.home[block].to(self.device, non_blocking=True, copy=True)
            return buffer, self.side and self.side.record_event()


def compile_blocks(unet):
    """torch.compile, in place, of transformer blocks and residual blocks over pixels. Not of loops
    over slices, nor of residual blocks over frames, whose norms span slices. The first pass takes
    minutes."""
    limit = max(64, torch._dynamo.config.recompile_limit)  # sizes differ between levels
    torch._dynamo.config.recompile_limit = limit
    blocks = [m for m in unet.modules() if isinstance(m, (SpatialBlock, TemporalBlock))]
    blocks += [m.spatial for m in unet.modules() if isinstance(m, SpatioTemporalRes)]
    for block in blocks:
        block.compile(fullgraph=flash_attn_func is None)  # only flash-attn may break the graph


# --------------------------------------------------------------------------------------------------
# 10. Checkpoints. Lists of substitutions turn our parameter names into those of a published file.
#     So one list reads and writes a format, and which names a file must have is known beforehand.


class WeightsError(ValueError):
    """A weight file that can't be used; the message says what is wrong with it and what to do."""


def _number(template, per_level, offset=0):
    """Splits the number of a block into level and index: down.4.res -> down_blocks.1.resnets.0"""
    return lambda m: template.format(*divmod(int(m[1]) - offset, per_level))


_FF = [
    (r"\.(ff|ff_in)\.proj_in", r".\1.net.0.proj"), (r"\.(ff|ff_in)\.proj_out", r".\1.net.2"), (r"to_out", "to_out.0"),
]
_EXTENSION = [(r"frame_table$", "positional_embedding.embeddings"), (r"frame_conv", "positional_conv")]

# SGM: Stability's generative-models, in whose names the published single files are.
UNET_SGM = [
    (r"(\.res\.\w+)\.norm1", r"\1.in_layers.0"), (r"conv1", "in_layers.2"), (r"\.emb\.", ".emb_layers.1."),
    (r"(\.res\.\w+)\.norm2", r"\1.out_layers.0"), (r"conv2", "out_layers.3"), (r"\.shortcut\.", ".skip_connection."),
    (r"\.res\.spatial", ".res"), (r"\.res\.temporal", ".res.time_stack"), (r"\.mix$", ".time_mixer.mix_factor"),
    (r"\.temporal\.frame_embed", ".time_pos_embed"), *_EXTENSION,
    (r"\.spatial\.", ".transformer_blocks.0."), (r"\.temporal\.", ".time_stack.0."), *_FF,
    (r"^mid\.0\.res", "middle_block.0"), (r"^mid\.0\.attn", "middle_block.1"), (r"^mid\.1\.res", "middle_block.2"),
    (r"^down\.0\.conv", "input_blocks.0.0"), (r"^down\.(\d+)\.conv", r"input_blocks.\1.0.op"),
    (r"^up\.2\.conv", "output_blocks.2.1.conv"), (r"^up\.(\d+)\.conv", r"output_blocks.\1.2.conv"),
    (r"^down\.", "input_blocks."), (r"^up\.", "output_blocks."),
    (r"(\d)\.res\.", r"\1.0."), (r"(\d)\.attn\.", r"\1.1."),
    (r"^cond_embed", "label_emb.0"), (r"^norm_out", "out.0"), (r"^conv_out", "out.2"), (r"^", "model.diffusion_model."),
]
UNET_DIFFUSERS = [
    (r"^down\.0\.conv", "conv_in"), (r"^down\.(\d+)\.conv", _number("down_blocks.{}.downsamplers.0.conv", 3, 1)),
    (r"^down\.(\d+)\.res", _number("down_blocks.{}.resnets.{}", 3, 1)),
    (r"^down\.(\d+)\.attn", _number("down_blocks.{}.attentions.{}", 3, 1)),
    (r"^mid\.(\d+)\.res", r"mid_block.resnets.\1"), (r"^mid\.(\d+)\.attn", r"mid_block.attentions.\1"),
    (r"^up\.(\d+)\.res", _number("up_blocks.{}.resnets.{}", 3)),
    (r"^up\.(\d+)\.attn", _number("up_blocks.{}.attentions.{}", 3)),
    (r"^up\.(\d+)\.conv", _number("up_blocks.{}.upsamplers.0.conv", 3)),
    (r"(resnets\.\d+)\.(spatial|temporal)", r"\1.\2_res_block"), (r"\.emb\.", ".time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."), (r"\.mix$", ".time_mixer.mix_factor"),
    (r"\.temporal\.frame_embed\.0", ".time_pos_embed.linear_1"),
    (r"\.temporal\.frame_embed\.2", ".time_pos_embed.linear_2"), *_EXTENSION,
    (r"\.spatial\.", ".transformer_blocks.0."), (r"\.temporal\.", ".temporal_transformer_blocks.0."), *_FF,
    (r"^time_embed\.0", "time_embedding.linear_1"), (r"^time_embed\.2", "time_embedding.linear_2"),
    (r"^cond_embed\.0", "add_embedding.linear_1"), (r"^cond_embed\.2", "add_embedding.linear_2"),
    (r"^norm_out", "conv_norm_out"),
]
VAE_SGM = [
    (r"temporal\.norm1", "time_stack.in_layers.0"), (r"temporal\.conv1", "time_stack.in_layers.2"),
    (r"temporal\.norm2", "time_stack.out_layers.0"), (r"temporal\.conv2", "time_stack.out_layers.3"),
    (r"\.spatial\.", "."), (r"\.mix$", ".mix_factor"), (r"\.shortcut\.", ".nin_shortcut."),
    (r"(down|up)sample\.", r"\1sample.conv."), (r"time_conv_out", "conv_out.time_mix_conv"),
    (r"^decoder", "first_stage_model.decoder"), (r"^(encoder|quant_conv)", r"conditioner.embedders.3.encoder.\1"),
]
VAE_DIFFUSERS = [
    (r"^decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{3 - int(m[1])}"),  # the decoder is listed in reverse there
    (r"^encoder\.down\.", "encoder.down_blocks."), (r"\.block\.", ".resnets."),
    (r"(down|up)sample\.", r"\1samplers.0.conv."), (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"), (r"mid\.attn_1", "mid_block.attentions.0"),
    (r"(attentions\.0)\.norm", r"\1.group_norm"), (r"(attentions\.0)\.([qkv])\.", r"\1.to_\2."),
    (r"proj_out", "to_out.0"),
    (r"(resnets\.\d+)\.(spatial|temporal)", r"\1.\2_res_block"), (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.mix$", ".time_mixer.mix_factor"), (r"norm_out", "conv_norm_out"),
]
CLIP_SGM = [
    (r"^blocks", "transformer.resblocks"), (r"\.qkv\.", ".attn.in_proj_"), (r"\.out\.", ".attn.out_proj."),
    (r"\.ln(\d)", r".ln_\1"), (r"fc1", "mlp.c_fc"), (r"fc2", "mlp.c_proj"),
    (r"^", "conditioner.embedders.0.open_clip.model.visual."),
]
CLIP_DIFFUSERS = [
    (r"^blocks", "encoder.layers"), (r"\.qkv\.", ".self_attn.{qkv}_proj."), (r"\.out\.", ".self_attn.out_proj."),
    (r"\.ln(\d)", r".layer_norm\1"), (r"(fc\d)", r"mlp.\1"),
    (r"^ln_pre", "pre_layrnorm"), (r"^ln_post", "post_layernorm"),
    (r"^class_embedding", "embeddings.class_embedding"), (r"^conv1", "embeddings.patch_embedding"),
    (r"^positional_embedding", "embeddings.position_embedding.weight"), (r"^(?!proj)", "vision_model."),
    (r"^proj", "visual_projection.weight"),
]
EXVIDEO = [  # names inside one temporal block of the ExVideo release
    (r"^ff_in\.proj_in", "act_fn_in.proj"), (r"^ff_in\.proj_out", "ff_in"), (r"^ff\.proj_in", "act_fn_out.proj"),
    (r"^ff\.proj_out", "ff_out"), (r"^norm3", "norm_out"), (r"^frame_embed", "positional_embedding_proj"), *_EXTENSION,
]
# Where the temporal blocks are in the release's flat list, in which pushes and pops count too.
EXVIDEO_BLOCKS = (7, 17, 29, 39, 51, 61, 83, 113, 123, 133, 144, 154, 164, 175, 185, 195)

# In published files but in none of our networks: a second encoder and decoder, CLIP's text side.
IGNORED = (
    r"first_stage_model\.encoder\.|conditioner\.embedders\.3\.encoder\.(decoder|post_quant_conv)\.|"
    r"conditioner\.embedders\.0\.open_clip\.model\."
    r"(logit_scale|token_embedding|positional_embedding|text_projection|ln_final)|"
    r"vision_model\.embeddings\.position_ids$")

# What belongs to each network in the single file; together with IGNORED, all of it.
SGM_PART = {
    UNet: r"model\.diffusion_model\.",
    ImageEncoder: r"conditioner\.embedders\.0\.open_clip\.model\.visual\.",
    VAE: r"first_stage_model\.(decoder|post_quant_conv)\.|"
         r"conditioner\.embedders\.3\.encoder\.(encoder|quant_conv)\.",
}
RULES = {"sgm": {UNet: UNET_SGM, VAE: VAE_SGM, ImageEncoder: CLIP_SGM},
         "diffusers": {UNet: UNET_DIFFUSERS, VAE: VAE_DIFFUSERS, ImageEncoder: CLIP_DIFFUSERS},
         "exvideo": {TemporalBlock: EXVIDEO}}


def file_names(module, layout):
    """Where a layout keeps each parameter: {our name: [name in the file]}, three names if it splits
    q, k, v.

    layout: "ours" (that of named_parameters), "sgm" (the published single file), "diffusers" (its
    folders), or "exvideo": what extension files may hold, under the release's names inside temporal
    blocks and under ours elsewhere. A layer that a module of yours wraps as `base` keeps its name.
    """
    blocks = (name for name, m in module.named_modules() if isinstance(m, TemporalBlock))
    numbers = dict(zip(blocks, EXVIDEO_BLOCKS))
    names = {}
    for ours, _ in module.named_parameters():
        name = ours if layout == "ours" else ours.replace(".base.", ".")
        block, temporal, inner = name.partition(".attn.temporal.")
        if layout in ("sgm", "diffusers"):
            name = rename(name, layout, type(module))
        elif layout == "exvideo" and temporal:
            number = numbers[f"{block}.attn.temporal"]
            name = f"blocks.{number}.{rename(inner, layout, TemporalBlock)}"
        elif layout == "exvideo" and not is_extension_parameter(ours):
            continue
        names[ours] = [name.replace("{qkv}", c) for c in "qkv"] if "{qkv}" in name else [name]
    return names


@cache
def rename(name, layout, network):
    for pattern, replacement in RULES[layout][network]:
        name = re.sub(pattern, replacement, name)
    return name


def convert(names, tensors, shape):
    """The tensors that a file has under these names, as one parameter of ours. It has the wanted
    shape if theirs fit; RuntimeError if they cannot be joined."""
    t = torch.cat(tensors) if len(tensors) > 1 else tensors[0]  # CLIP's q, k, v, split in diffusers
    if names == ["visual_projection.weight"] and t.ndim == 2:
        t = t.T  # a Linear in diffusers, a matrix in the single file
    if re.search(r"(label_emb\.0\.0|add_embedding\.linear_1|cond_embed\.0)\.weight", names[0]):
        lacking = shape[1] - t.shape[-1]  # columns of ids that the file does not know
        if lacking > 0 and lacking % ID_DIM == 0 and t.shape[-1] >= 3 * ID_DIM:
            t = F.pad(t, (0, lacking))  # they have no effect yet
    if t.shape + (1, 1) == shape:
        t = t.view(shape)  # a Linear in diffusers, a 1x1 convolution here
    return t


class Tensors:
    """A safetensors file, memory-mapped and read on demand. Raises WeightsError.

    names: without the prefixes module. _orig_mod. unet. model. of training tools, if all have them.
    meta: what save() was given; {} for files that are not ours.
    """

    def __init__(self, path):
        self.path = path = os.fspath(path)
        if not os.path.isfile(path):
            raise WeightsError(f"{path}: no such weight file")
        try:
            self.file = safe_open(path, framework="pt")
            self.meta = dict(json.loads((self.file.metadata() or {}).get("exsvd", "{}")))
        except (SafetensorError, ValueError, TypeError) as e:
            with open(path, "rb") as f:  # only now: a good file can begin like a pickle
                begin = f.read(20)
            it = f"is not a complete safetensors file ({e}): download or save it again"
            if re.match(rb"PK\x03\x04|\x80\x02[^\0]", begin):  # loading a pickle runs any code
                it = "is a pickled checkpoint, which is never opened: use its .safetensors version"
            if begin.startswith(b"version https://git-"):
                it = "is a Git LFS pointer in place of the file: fetch it with git lfs pull"
            raise WeightsError(f"{path} {it}") from e
        names = list(self.file.keys())
        tools = r"(module\.|_orig_mod\.|unet\.|model\.(?!diffusion_model\.))*"
        self.prefix = re.match(tools, os.path.commonprefix(names))[0]
        self.names = {name.removeprefix(self.prefix) for name in names}
        blocks = any(name.startswith("blocks.") for name in self.names)
        self.is_extension = blocks or ("architecture" in self.meta and "config" not in self.meta)

    def get(self, name):
        return self.file.get_tensor(self.prefix + name)

    def shape(self, name):
        return self.file.get_slice(self.prefix + name).get_shape()

    def frames(self):
        """The frames that the weights are extended to, None for a base. The release has no metadata
        that says so, but frame tables."""
        tables = ("positional_embedding.embeddings", "frame_table")
        lengths = [self.shape(name)[0] for name in self.names if name.endswith(tables)]
        return self.meta.get("frames") or max(lengths, default=None)

    def fingerprint(self):
        """A hash of the names and of some values of every tensor, in float16, whatever the file's
        dtype."""
        digest = hashlib.blake2b(digest_size=8)
        for name in sorted(self.names):
            digest.update(name.encode())
            digest.update(self.get(name).flatten()[:256].half().numpy().tobytes())
        return digest.hexdigest()


def locate(module, tensors):
    """Where a file has each parameter of a network: {our name: [names in the file]}.

    Nothing is read yet. Raises WeightsError with examples if anything is missing, mis-shaped or
    left over. Only an extension file of ours may hold a part of what the network has.
    """
    network, in_file = type(module).__name__, tensors.names
    extension = network == "UNet" and tensors.is_extension
    architecture = tensors.meta.get("architecture", ARCHITECTURE)
    if network == "UNet" and architecture != ARCHITECTURE:
        raise WeightsError(f"{tensors.path} holds the extension {architecture!r}, but this code "
                           f"has {ARCHITECTURE!r}: see section 4 of exsvd.py")

    def hits(names):
        return sum(n in in_file for group in names.values() for n in group)

    layouts = ("exvideo",) if extension else ("ours", "sgm", "diffusers")
    names = max((file_names(module, layout) for layout in layouts), key=hits)
    if network != "UNet" and not hits(names):
        raise WeightsError(f"{tensors.path} has nothing of the {network}: if it holds a UNet "
                           "alone, give it as --unet beside --model")
    if extension and tensors.meta:
        names = {ours: group for ours, group in names.items() if group[0] in in_file}
    elif extension:  # the release: what a base has in these blocks, and what ExVideo adds
        with torch.device("meta"):
            base = file_names(UNet(module.config), "exvideo").values()
        added = re.compile(r".*\.positional_(embedding\.embeddings|conv\.(weight|bias))")
        names = {ours: group for ours, group in names.items()
                 if group in base or added.fullmatch(group[0])}

    expected, misfits = {n for group in names.values() for n in group}, []
    for ours, group in names.items():
        if not in_file.issuperset(group):
            continue
        want, shapes = module.get_parameter(ours).shape, [tuple(tensors.shape(n)) for n in group]
        try:
            t = convert(group, [torch.empty(shape, device="meta") for shape in shapes], want)
        except RuntimeError:  # they can't be joined
            t = None
        if t is None or t.shape != want:
            theirs = ", ".join(f"{n} {shape}" for n, shape in zip(group, shapes))
            misfits.append(f"{theirs} instead of {tuple(want)}")
    others = [pattern for cls, pattern in SGM_PART.items() if not isinstance(module, cls)]
    ignored = re.compile("|".join([IGNORED, *others]))
    problems = {"missing": sorted(expected - in_file), "mis-shaped": misfits,
                "unexpected": sorted(n for n in in_file - expected if not ignored.match(n))}
    problems = "; ".join(f"{len(wrong)} {what}, such as {', '.join(wrong[:3])}"
                         for what, wrong in problems.items() if wrong)
    if problems:
        hint = " (was it made with another section 4 of exsvd.py?)" if extension else ""
        raise WeightsError(f"{tensors.path} does not fit {network} ({len(expected)} tensors): "
                           f"{problems}{hint}")
    return names


@torch.no_grad()
def read_into(module, tensors, names, dtype_of=lambda name: None, device=None):
    """Read what locate() found into a module, tensor by tensor. Parameters get dtype_of(our name)
    and the device, or keep their own."""
    for ours, group in names.items():
        path, _, leaf = ours.rpartition(".")
        parent = module.get_submodule(path)
        p = getattr(parent, leaf)
        t = convert(group, [tensors.get(n) for n in group], p.shape)
        copy = torch.empty_like(p, dtype=dtype_of(ours), device=device)
        setattr(parent, leaf, nn.Parameter(copy.copy_(t)))  # copied, as t changes with the file


@dataclass
class SVD:
    """The three networks, in eval mode, and what their files say of themselves."""
    unet: UNet
    vae: VAE
    clip: ImageEncoder
    meta: dict                # of the model file, {} for published ones
    extension: dict | None    # of the last extension file, {} for the ExVideo release, None without


FOLDER = {"unet": "unet/diffusion_pytorch_model", "vae": "vae/diffusion_pytorch_model",
          "clip": "image_encoder/model"}


def open_model(path):
    """-> {"unet", "vae", "clip": Tensors}, (UNetConfig, VAEConfig, CLIPConfig). path as in load().

    Only names and configurations are read. Raises WeightsError.
    """
    defaults = {"unet": UNetConfig(), "vae": VAEConfig(), "clip": CLIPConfig()}
    opened = [open_network(path, FOLDER[part], part, config) for part, config in defaults.items()]
    files, configs = zip(*opened)
    return dict(zip(FOLDER, files)), configs


def open_network(path, stem, part, default):
    """One network of a model: (Tensors, configuration). path: a file, or a folder in which `stem`
    names its weights, without .safetensors or .fp16.safetensors; the former is preferred.

    default: the configuration, where our metadata says nothing. Of diffusers' own, only the native
    length of a UNet is read.
    """
    in_folder = {}
    if os.path.isdir(path):
        paths = [os.path.join(path, stem + end) for end in (".safetensors", ".fp16.safetensors")]
        in_it = next(filter(os.path.isfile, paths), None)
        if in_it is None:
            raise WeightsError(f"{path}: no {stem}.safetensors (or .fp16.safetensors), which a "
                               "folder of SVD has. A UNet alone is given as --unet beside --model; "
                               "weights in several parts must be saved again with a larger "
                               "max_shard_size")
        path = in_it
        config = os.path.join(os.path.dirname(path), "config.json")
        if part == "unet" and os.path.exists(config):
            with open(config) as f:
                in_folder = {"native_frames": json.load(f).get("num_frames", 25)}
    tensors = Tensors(path)
    if tensors.is_extension:
        raise WeightsError(f"{path} is an extension, not a model: give SVD-XT's file as the model, "
                           "and this one as the extension")
    if "first_stage_model.post_quant_conv.weight" in tensors.names:
        raise WeightsError(f"{path} is the image-decoder variant, without temporal layers: use "
                           "svd_xt.safetensors (or svd.safetensors) instead")
    noted = tensors.meta.get("config", {}).get(part, {})
    return tensors, configure(default, noted | in_folder, path)


def configure(default, values, path):
    """The default configuration with the values that a file has for it. Raises WeightsError."""
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    ids = values.pop("ids", None)  # the code may have more of them, see convert()
    if ids and ids != default.ids[:len(ids)]:
        raise WeightsError(f"{path} is conditioned on {', '.join(ids)}, but this code on "
                           f"{', '.join(default.ids)}: UNetConfig.ids must begin with the file's")
    try:
        return replace(default, **values)
    except TypeError as e:  # a key that this code does not have
        raise WeightsError(f"{path}: its configuration is not understood: {e}") from e


def open_extensions(paths):
    """-> [Tensors] of extension files, from bottom to top. Raises WeightsError, also if one was
    trained over a file that is not below it."""
    opened = []
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    for path in paths or ():
        tensors = Tensors(path)
        if not tensors.is_extension or not tensors.frames():
            raise WeightsError(f"{path} is not an extension: it has no tensors blocks.*, or no "
                               "frame tables")
        below = [file.fingerprint() for file in opened]
        for name, fingerprint in tensors.meta.get("over", ()):
            if fingerprint not in below:
                raise WeightsError(f"{path} was trained over {name}: give that extension before it")
        opened.append(tensors)
    return opened


def load(path, extension=None, dtype=torch.float32, device="cpu", parts=("unet", "vae", "clip"),
         unet=None, keep_float32=lambda name: False):
    """SVD from published weights or our own: .unet, .vae and .clip, in eval mode, all parameters
    with requires_grad False.

    path: a .safetensors file, or a folder in diffusers' layout.
    extension: the ExVideo release or an extension trained here, or several of them in order, such
        as the release and what was trained over it. Extends the UNet to the frames of each.
    dtype: of the parameters. With float16 the VAE's encoder stays float32, whose range it needs.
    device: "meta" checks everything (names, shapes, extensions) but reads no weights.
    parts: what to load; the others are None.
    unet: a UNet by itself in place of the model's, a .safetensors file or diffusers' folder of it.
    keep_float32(name) -> bool: what stays float32, named as in unet.down.1.attn.norm.weight.

    Tensors are converted one by one: memory peaks at the size of the model. Raises WeightsError.
    """
    only_check = torch.device(device).type == "meta"
    if extension and not only_check:  # before gigabytes are read
        load(path, extension, device="meta", parts=parts, unet=unet)

    files, (unet_config, vae_config, clip_config) = open_model(path)
    meta = files["unet"].meta
    if unet is not None:
        stem = os.path.basename(FOLDER["unet"])
        files["unet"], unet_config = open_network(unet, stem, "unet", unet_config)
    extensions = open_extensions(extension)
    for tensors in extensions:
        noted = {key: tensors.meta[key] for key in ("native_frames", "ids") if key in tensors.meta}
        unet_config = configure(unet_config, noted, tensors.path)

    with torch.device("meta"):  # nothing is initialised that is then overwritten
        networks = nn.ModuleDict({"unet": UNet(unet_config), "vae": VAE(vae_config),
                                  "clip": ImageEncoder(clip_config)})
        if files["unet"].frames():
            extend(networks["unet"], files["unet"].frames())

    def dtype_of(part, name):
        name = f"{part}.{name}"
        wide = dtype == torch.float16 and name.startswith(("vae.encoder.", "vae.quant_conv."))
        return torch.float32 if wide or keep_float32(name) else dtype

    names = {part: locate(networks[part], files[part]) for part in parts}
    if not only_check:
        for part in parts:
            read_into(networks[part], files[part], names[part], partial(dtype_of, part), device)
    for tensors in extensions if "unet" in parts else ():
        extended = networks["unet"]
        if extended.max_frames != tensors.frames():
            with torch.device(device):  # where a modified extend() creates parameters
                extend(extended, tensors.frames())
            for name, p in extended.named_parameters():
                p.data = p.data.to(dtype_of("unet", name))
        added = locate(extended, tensors)
        if not only_check:
            read_into(extended, tensors, added)
    networks.eval().requires_grad_(False)
    return SVD(*(networks[part] if part in parts else None for part in FOLDER), meta,
               extensions[-1].meta if extensions else None)


@contextmanager
def written_whole(path):
    """For `with`: the name of a temporary file beside `path`. At the end of the block it takes the
    place of `path`, complete and on the disk; after an error it is removed."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as f:  # Windows refuses fsync for a file opened to read
            os.fsync(f.fileno())  # a crash of the machine must not leave an empty file
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def save(path, tensors, meta):
    """Write a .safetensors file with our metadata, whole or not at all. Raises OSError, for example
    on a full disk."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    note = {"exsvd": json.dumps(meta)}  # a single key: safetensors writes several in random order
    try:
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata=note)
            os.chmod(temporary, 0o644)  # safetensors makes files that only their owner can read
    except SafetensorError as e:
        raise OSError(f"{path} cannot be written ({e}): is the disk full?") from e


def save_parameters(path, module, names, state, dtype, meta, unet):
    """save() of a module's parameters under names {ours: [in the file]}, or of what `state` has in
    their place. The metadata says how the unet was extended."""
    state = dict(module.named_parameters()) | (state or {})
    tensors = {name: state[ours].to(dtype or state[ours].dtype) for ours, (name,) in names.items()}
    if unet.max_frames is not None:
        meta |= {"architecture": ARCHITECTURE, "frames": unet.max_frames, "ids": unet.config.ids,
                 "native_frames": unet.config.native_frames}
    save(path, tensors, meta)


def save_extension(path, unet, state=None, dtype=None, over=(), **meta):
    """Write an extension file: what is_extension_parameter() names of an extended UNet.

    state: {our name: tensor}, for example an average, in place of some of the UNet's parameters.
    dtype: of the file (float16 in the release), by default that of the tensors. over: the extension
    files below it, which load() then requires if they hold what this one does not. meta: kept as
    JSON. Names and shapes are the release's; parameters that it does not have keep our names.
    DiffSynth, the official code, reads a file of 128 frames that holds exactly what the release
    holds. Raises ValueError if the UNet is not extended, or if `state` has another name.
    """
    if unet.max_frames is None:
        raise ValueError(f"{path}: nothing to save of a UNet that is not extended")
    names = {ours: group for ours, group in file_names(unet, "exvideo").items()
             if is_extension_parameter(ours)}
    unknown = sorted((state or {}).keys() - names.keys())
    if unknown:
        raise ValueError(f"{path}: {unknown[0]} is no parameter of an extension")
    held = {name for (name,) in names.values()}
    below = [file for file in map(Tensors, over) if not file.names <= held]
    if below:
        meta["over"] = [(os.path.basename(file.path), file.fingerprint()) for file in below]
    save_parameters(path, unet, names, state, dtype, meta, unet)


def save_model(path, unet, vae, clip, dtype=None, state=None, **meta):
    """Write a whole model as a single file in SGM names, with its configuration.

    state: {"unet.<our name>" or "clip.<our name>": tensor} in place of some parameters, for example
    an average.
    """
    networks = nn.ModuleDict({"unet": unet, "vae": vae, "clip": clip})
    names = {f"{part}.{ours}": group for part, network in networks.items()
             for ours, group in file_names(network, "sgm").items()}
    meta["config"] = {part: asdict(network.config) for part, network in networks.items()}
    save_parameters(path, networks, names, state, dtype, meta, unet)
