"""Tests of everything, on the CPU, without weights or network:

    pip install -r requirements.txt pytest diffusers transformers
    python -m pytest -q test_exsvd.py

Networks are small and their weights random, since nothing here depends on what was learned; diffusers and transformers,
holding the same weights, are the reference. What needs a GPU skips and says so. Runtime: see README.md.

    1. exsvd.py    parity, extension, checkpoints, memory
    2. data.py     pictures and videos in and out
    3. data.py     videos to clips and latents
    4. sample.py   samplers, chunked decoding, the command
    5. train.py    runs with DeepSpeed, one and two ranks, killed and resumed
    6. toy/        its world, and the measures on clips whose truth is known
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import operator
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from fractions import Fraction
from unittest.mock import Mock, patch

import av
import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import exsvd
import sample
import train
from bench import compare
from toy import measure, world

HERE = os.path.dirname(os.path.abspath(__file__))

torch.set_num_threads(1)  # networks this small don't gain from more, and lose much on a busy machine

# ----------------------------------------------------------------------------------------------------------------------
# Small networks with random weights: four levels and all blocks of the real ones, only narrower.

UNET = exsvd.UNetConfig(channels=(32, 64, 96, 96), heads=(1, 2, 3, 2), context_dim=40)
VAE = exsvd.VAEConfig(channels=(32, 64, 96, 96))
CLIP = exsvd.CLIPConfig(width=64, layers=3, heads=4, out_dim=40, image=56)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
def randomize(module, seed=0):
    """Weights as after training: nothing stays at 0 or 1 (norms, biases, mix factors), activations
    stay near 1."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        r = torch.randn(p.shape, generator=g)
        if p.ndim > 1 and not name.endswith("frame_table"):
            r = r / math.sqrt(p[0].numel())
        elif re.search(r"(norm\w*|ln\w*|norm\d)\.weight$", name):
            r = 1 + 0.2 * r
        elif name.endswith("bias"):
            r = 0.2 * r
        p.copy_(r)
    return module.eval()


def make_unet(num_frames=None, seed=0, **kw):
    unet = exsvd.UNet(exsvd.UNetConfig(**vars(UNET) | kw))
    return randomize(unet if num_frames is None else exsvd.extend(unet, num_frames), seed)


def networks(num_frames=None, seed=0):
    vae, clip = exsvd.VAE(VAE), exsvd.ImageEncoder(CLIP)
    return make_unet(num_frames, seed), randomize(vae, seed), randomize(clip, seed)


def unet_inputs(T, size=8, B=2, seed=1):
    """x, c_noise, ctx, ids of a batch whose videos differ in everything."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, 8, *np.broadcast_to(size, 2), generator=g)
    c_noise = torch.linspace(-1.5, 1.6, B)  # sigma from 0.0025 to 600
    ids = torch.tensor([[6.0, 127.0, 0.02], [29.0, 20.0, 0.3]]).repeat(B, 1)[:B]
    return x, c_noise, torch.randn(B, 1, UNET.context_dim, generator=g), ids


def rel(a, b):
    """|a-b|/|b|, in float64."""
    assert a.shape == b.shape, (a.shape, b.shape)
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def close(a, b, bound, what):
    difference = f"{what}: |a-b|/|b| = {rel(a, b):.2e}, at most {(a - b).abs().max():.2e}"
    print(difference)  # pytest -s shows it
    assert rel(a, b) <= bound, f"{difference}, not within {bound}"


def named(module, layout):
    """The module's tensors under the names, and in the shapes, that a published layout has for
    them."""
    out, state = {}, module.state_dict()
    for ours, names in exsvd.file_names(module, layout).items():
        t = state[ours]
        t = t.T if names == ["visual_projection.weight"] else t
        linear = layout == "diffusers" and re.search(r"coder.*attn_1.*weight", ours)
        if linear and t.ndim == 4:
            t = t[:, :, 0, 0]  # diffusers has Linear layers there
        parts = [part.clone(memory_format=torch.contiguous_format) for part in t.chunk(len(names))]
        out |= dict(zip(names, parts))
    return out


def same(net, state, dtype=torch.float32):
    """The net holds exactly this state in this dtype, and is real, in eval mode, without
    buffers."""
    got = net.state_dict()
    assert got.keys() == state.keys() and not net.training and not list(net.buffers())
    for n, t in got.items():
        assert t.device.type == "cpu" and t.dtype == dtype and torch.equal(t, state[n].to(dtype)), n


# --------------------------------------------------------------------------------------------------
# Parity with the public implementations: the same random weights and epsilons, fp32, |a-b|/|b| <=
# 1e-5.

PARITY = 1e-5


def same_epsilons(module, ref):
    """Parity can't see an epsilon far below the variances, so they are compared as numbers, norm by
    norm."""
    norms = {n: m for n, m in ref.named_modules() if hasattr(m, "eps") and hasattr(m, "weight")}
    theirs = {n: m.eps for n, m in norms.items()}
    names = exsvd.file_names(module, "diffusers")
    ours = {n: m.eps for n, m in module.named_modules() if hasattr(m, "eps")}
    ours = {names[f"{n}.weight"][0].removesuffix(".weight"): eps for n, eps in ours.items()}
    assert ours == theirs and len(ours) > 5


def diffusers_unet(unet, aspect):
    """diffusers' UNet, of the same weights. Where ours is extended, ExVideo's additions are built
    from stock parts: a table in place of the sinusoid (it goes through time_pos_embed too), and a
    Conv3d with reflected borders before the temporal block's norm_in. aspect: H / W of what it is
    given, which tokens do not tell."""
    models = pytest.importorskip("diffusers.models", reason="the reference")
    c, tensors = unet.config, named(unet, "diffusers")
    additions = {n: tensors.pop(n) for n in list(tensors) if "positional_" in n}
    assert len(additions) == (3 * 16 if unet.max_frames else 0)
    with torch.device("meta"):
        ref = models.UNetSpatioTemporalConditionModel(
            block_out_channels=c.channels, num_attention_heads=c.heads,
            cross_attention_dim=c.context_dim)
    ref.load_state_dict(tensors, assign=True)
    # the only ones that differ: diffusers has 1e-6 in most residual blocks
    for name, m in ref.named_modules():
        if isinstance(m, torch.nn.GroupNorm) and "resnets" in name:
            m.eps = exsvd.EPS_UNET_RES
    same_epsilons(unet, ref)
    for table_name in [n for n in additions if n.endswith("positional_embedding.embeddings")]:
        transformer, _, _ = table_name.partition(".temporal_transformer_blocks")
        conv_name = table_name.replace("embedding.embeddings", "conv")
        weight, bias = additions[f"{conv_name}.weight"], additions[f"{conv_name}.bias"]
        conv = torch.nn.Conv3d(len(bias), len(bias), 3, padding=1, padding_mode="reflect")
        conv.load_state_dict({"weight": weight, "bias": bias})

        def convolve(m, args, kwargs, conv=conv):
            h = round(math.sqrt(args[0].shape[1] * aspect))
            video = rearrange(args[0], "(b t) (h w) c -> b c t h w", t=kwargs["num_frames"], h=h)
            return (rearrange(conv(video), "b c t h w -> (b t) (h w) c"),), kwargs

        m = ref.get_submodule(transformer)
        m.time_proj = torch.nn.Embedding.from_pretrained(additions[table_name])
        m.temporal_transformer_blocks[0].register_forward_pre_hook(convolve, with_kwargs=True)
    return ref.eval()


# extended not at 8x8: the reference can't reflect one pixel
@pytest.mark.parametrize("extended, T, size",
                         [(None, 5, (8, 16)), (12, 2, (16, 16)), (12, 7, (16, 24))])
@torch.no_grad()
def test_unet_parity(extended, T, size):
    unet = make_unet(extended, native_frames=5)  # table and convolution random, as if trained
    inputs = unet_inputs(T, size)
    ref = diffusers_unet(unet, size[0] / size[1])
    close(unet(*inputs), ref(*inputs).sample, PARITY,
          f"UNet extended to {extended}, {T} frames at {size}")


@torch.no_grad()
def test_vae_parity():
    models = pytest.importorskip("diffusers.models", reason="the reference")
    vae = randomize(exsvd.VAE(VAE))
    ref = models.AutoencoderKLTemporalDecoder(
        block_out_channels=VAE.channels, layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4).eval()
    ref.load_state_dict(named(vae, "diffusers"))
    same_epsilons(vae, ref)  # diffusers has Stability's here
    img, z = torch.rand(3, 3, 40, 64) * 2 - 1, torch.randn(2, 5, 4, 4, 6)
    close(vae.encode(img), ref.encode(img).latent_dist.mean, PARITY, "VAE encode")
    video = ref.decode(z.flatten(0, 1), num_frames=5).sample.unflatten(0, (2, 5))
    close(vae.decode(z), video, PARITY, "VAE decode")


@torch.no_grad()
def test_clip_parity():
    transformers = pytest.importorskip("transformers", reason="the reference")
    clip = randomize(exsvd.ImageEncoder(CLIP))
    ref = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=CLIP.width, intermediate_size=4 * CLIP.width, num_hidden_layers=CLIP.layers,
        num_attention_heads=CLIP.heads, image_size=CLIP.image, patch_size=CLIP.patch,
        projection_dim=CLIP.out_dim,
        hidden_act="gelu", attn_implementation="eager"))
    ref.load_state_dict(named(clip, "diffusers"))
    same_epsilons(clip, ref)
    img = torch.randn(3, 3, CLIP.image, CLIP.image)
    close(clip(img), ref.eval()(img).image_embeds, PARITY, "CLIP")


@pytest.mark.parametrize("size", [(576, 1024), (1500, 100), (64, 64), (224, 224), (301, 225)])
def test_clip_preprocessing_parity(size):
    folder = "diffusers.pipelines.stable_video_diffusion"
    pipeline = pytest.importorskip(f"{folder}.pipeline_stable_video_diffusion")
    img = torch.rand(1, 3, *size) * 2 - 1
    ref = (pipeline._resize_with_antialiasing(img, (224, 224)) + 1) / 2
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    ref = (ref - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    close(exsvd.preprocess_clip(img), ref, PARITY, f"preprocessing of {size}")


# --------------------------------------------------------------------------------------------------
# ExVideo: extending changes nothing up to the native length; the fold; the borders.


# SVD's native length; a model extended before, with learned table and convolution
@pytest.mark.parametrize("native, learned, size", [(14, None, 16), (5, 12, 8)])
@torch.no_grad()
def test_extending_changes_nothing_up_to_the_native_length(native, learned, size):
    base, longer = (make_unet(learned, native_frames=native) for _ in range(2))
    assert exsvd.extend(longer, 40) is longer and longer.max_frames == 40
    native = learned or native
    # batches have other memory layouts than one video
    for T, B in (1, 2), (2, 1), (native - 1, 2), (native, 1):
        inputs = unet_inputs(T, size, B, seed=T)
        want = base(*inputs)
        assert want.isfinite().all() and torch.equal(longer(*inputs), want), f"{T} frames"
    for a, b in zip(base.temporal_blocks(), longer.temporal_blocks()):
        if learned:
            assert torch.equal(b.frame_table, a.frame_table[exsvd.fold_positions(12, 40)])
    if not learned:  # beyond it the positions are other ones
        inputs = unet_inputs(native + 1, 8, 1)
        assert not torch.equal(longer(*inputs), base(*inputs))


@torch.no_grad()
def test_extending_changes_nothing_in_bfloat16():
    base, longer = (make_unet(native_frames=3).bfloat16() for _ in range(2))
    exsvd.extend(longer, 8)
    inputs = unet_inputs(3, B=1)
    assert torch.equal(longer(*inputs), base(*inputs))


@pytest.mark.parametrize("part", ["frame_table", "frame_conv"])
@torch.no_grad()
def test_table_or_convolution_alone(part):
    base, unet = make_unet(native_frames=3), exsvd.extend(make_unet(native_frames=3), 8)
    for block in unet.temporal_blocks():
        setattr(block, part, None)
    inputs = unet_inputs(3, B=1)
    assert torch.equal(unet(*inputs), base(*inputs)) and unet(*unet_inputs(8, B=1)).isfinite().all()
    assert exsvd.extend(unet, 12).max_frames == 12


def test_new_parameters_are_like_their_neighbours():
    unet = exsvd.extend(make_unet().double().requires_grad_(False), 8)
    assert {(p.dtype, p.requires_grad) for p in unet.parameters()} == {(torch.float64, False)}


def test_fold_positions():
    # of the release: 0 to 24, then to and fro between 24 and 4
    up, down = [*range(4, 25)], [*range(23, 4, -1)]
    assert exsvd.fold_positions(25, 128) == ([0, 1, 2, 3] + up + (down + up) * 3)[:128]
    for native in (1, 2, 3, 4, 5, 8, 14, 25, 128):
        for n in (1, native, native + 1, 3 * native + 1, 512):
            p = exsvd.fold_positions(native, n)
            assert len(p) == n and p[:native] == list(range(min(native, n)))
            assert set(p) <= set(range(native))
            steps = {abs(b - a) for a, b in zip(p, p[1:])}
            assert steps <= ({1} if native > 1 else {0}), "neighbours have neighbouring positions"
            assert p == exsvd.fold_positions(native, 600)[:n], "a longer fold continues it"


@pytest.mark.parametrize("shape",
                         [(5, 4, 6), (2, 2, 2), (1, 4, 4), (3, 1, 1), (4, 1, 3), (1, 1, 1)])
@torch.no_grad()
def test_borders_of_the_frame_convolution(shape):
    conv, x = randomize(exsvd.FrameConv(6)), torch.randn(2, 6, *shape)
    padded = x.numpy()
    for axis, n in enumerate(shape, start=2):
        width = [(1, 1) if a == axis else (0, 0) for a in range(5)]
        padded = np.pad(padded, width, mode="reflect" if n > 1 else "edge")
    expected = F.conv3d(torch.from_numpy(padded), conv.weight, conv.bias)
    expected = expected.permute(0, 2, 3, 4, 1).flatten(2, 3)
    tokens, nothing = x.permute(0, 2, 3, 4, 1).flatten(2, 3), torch.zeros(shape[0], 1, 6)
    for size in (None, 1, x.numel() // 2):  # whole, frame by frame, in two slabs
        close(conv(tokens, nothing, shape[1], exsvd.Slices(size)), expected, 1e-6,
              f"convolution of {shape}")
    assert torch.equal(exsvd.FrameConv(6)(tokens, nothing, shape[1], exsvd.Slices()), tokens)


def test_one_frame_and_64_pixels_train():
    unet = make_unet(num_frames=12).train()
    for T, size in (1, 8), (2, 16):  # 64 pixels are one on the coarsest level
        unet.zero_grad()
        unet(*unet_inputs(T, size)).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in unet.parameters() if p.grad is not None)
        assert all(b.frame_conv.weight.grad.abs().sum() > 0 for b in unet.temporal_blocks())


def test_inputs_that_do_not_fit():
    unet = make_unet(num_frames=12)
    x, c_noise, ctx, ids = unet_inputs(2)
    misfits = [(unet_inputs(2, size), "multiples of 8") for size in ((8, 12), (20, 16), 4)]
    for bad in (ctx[:1], ctx.repeat(1, 2, 1), ctx[:, 0]):
        misfits.append(((x, c_noise, bad, ids), "ctx"))
    for inputs, says in [*misfits, (unet_inputs(13), "13 frames.*extended to 12")]:
        with pytest.raises(ValueError, match=says):
            unet(*inputs)
    with pytest.raises(ValueError, match="at least one"):
        exsvd.extend(unet, 0)


def test_the_third_input_of_the_unet():
    settings = {"motion": torch.tensor([127.0, 20.0]), "fps": 7, "aug": 0.02, "steps": 25}
    ids = exsvd.unet_ids(("fps", "motion", "aug"), settings)
    assert torch.equal(ids, torch.tensor([[6, 127, 0.02], [6, 20, 0.02]]))
    with pytest.raises(ValueError, match="conditioned on fps, pan, but there is no pan"):
        exsvd.unet_ids(("fps", "pan"), settings)
    unet = make_unet(ids=("fps", "motion", "aug", "pan"))
    ids = exsvd.unet_ids(unet.config.ids, settings | {"pan": 1})
    x, c_noise, ctx, _ = unet_inputs(2)
    assert unet(x, c_noise, ctx, ids).shape == (2, 2, 4, 8, 8)


# --------------------------------------------------------------------------------------------------
# flash-attn


def plain_attention(q, k, v, deterministic=False):
    """softmax(q k^T / sqrt(d)) v, spelled out, in flash-attn's layout: (B, N, H, D), (B, M, H, D)
    -> (B, N, H, D)."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) / math.sqrt(q.shape[-1])
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.float()).to(q.dtype)


@pytest.mark.parametrize("deterministic", [False, True])
@torch.no_grad()
def test_layout_handed_to_flash_attn(monkeypatch, deterministic):
    q, k, v = torch.randn(2, 7, 12), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    flash = Mock(wraps=plain_attention)
    want = exsvd.attention(q, k, v, heads=3)
    monkeypatch.setattr(exsvd, "flash_fits", lambda q: True)
    monkeypatch.setattr(exsvd, "flash_attn_func", flash)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    close(exsvd.attention(q, k, v, heads=3), want, 1e-5, "attention through flash-attn's layout")
    assert flash.call_args.args[0].shape == (2, 7, 3, 4)
    assert flash.call_args.kwargs == {"deterministic": deterministic}


def test_what_flash_attn_takes(monkeypatch):
    def fits(dim, dtype=torch.bfloat16, cuda=True, capability=(8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        q = argparse.Namespace(shape=(1, 2, 1, dim), dtype=dtype, is_cuda=cuda, device="cuda")
        return exsvd.flash_fits(q)

    monkeypatch.setattr(exsvd, "flash_attn_func", plain_attention)
    assert fits(64) and fits(80) and fits(256, torch.float16, capability=(9, 0))
    assert not fits(512) and not fits(36) and not fits(64, torch.float32)
    assert not fits(64, torch.float16, cuda=False) and not fits(64, capability=(7, 5))
    monkeypatch.setattr(exsvd, "flash_attn_func", None)
    assert not fits(64)


@pytest.mark.skipif(exsvd.flash_attn_func is None or not torch.cuda.is_available(),
                    reason="needs flash-attn and a GPU")
@pytest.mark.parametrize("n, heads, dim", [(4096, 5, 64), (128, 20, 64), (257, 16, 80), (7, 3, 32)])
def test_flash_attn_itself(n, heads, dim):
    q, k, v = torch.randn(3, 2, n, heads * dim, device="cuda", dtype=torch.bfloat16)
    assert exsvd.flash_fits(q.unflatten(2, (heads, dim)))
    want = plain_attention(*(x.float().unflatten(2, (heads, dim)) for x in (q, k, v))).flatten(2)
    close(exsvd.attention(q, k, v, heads).float(), want, 1e-2, "flash-attn in bf16")


# --------------------------------------------------------------------------------------------------
# EDM


def known_answer():
    """Inputs of denoise(), and the F (its v) for which D is exactly the clean latents."""
    sigma = torch.tensor([0.002, 0.05, 1.0, 20.0, 700.0])
    shapes = (3, 4, 8, 8), (3, 4, 8, 8), (1, 4, 8, 8), (1, UNET.context_dim), (3,)
    x, noise, image, ctx, ids = (torch.randn(5, *shape) for shape in shapes)
    s = sigma.view(-1, 1, 1, 1, 1)
    return sigma, s, x, noise, image, ctx, ids, (noise - s * x) / (s**2 + 1).sqrt()


def test_denoise_of_a_network_whose_answer_is_known():
    sigma, s, x, noise, image, ctx, ids, v = known_answer()
    per_frame = image.expand(-1, 3, -1, -1, -1)

    def ideal(inputs, c_noise, ctx_in, ids_in):
        assert torch.equal(inputs[:, :, 4:], per_frame)  # unscaled, repeated for every frame
        assert ctx_in is ctx and ids_in is ids
        close(c_noise, sigma.log() / 4, 1e-6, "c_noise")
        close(inputs[:, :, :4], (x + s * noise) / (s**2 + 1).sqrt(), 1e-6, "scaled noisy latents")
        return v

    for image_latents in (image, per_frame):
        close(exsvd.denoise(ideal, x + s * noise, sigma, image_latents, ctx, ids), x, 1e-4,
              "D of the ideal F")


def test_losses_are_their_closed_forms():
    sigma, s, x, noise, image, ctx, ids, v = known_answer()
    guess = torch.randn(x.shape)
    edm = exsvd.training_loss(lambda *a: guess, exsvd.LOSSES["edm"], x, sigma, noise, image, ctx,
                              ids)
    close(edm, (guess - v).square().mean(dim=(1, 2, 3, 4)), 1e-4,
          "EDM's loss is |F - v|^2, as its weight is 1 / c_out^2")
    D = (x + s * noise) / (s**2 + 1) - s / (s**2 + 1).sqrt() * guess
    want = ((s**2 + 1).sqrt() / s * (D - 1.01 * x) ** 2).mean(dim=(1, 2, 3, 4))
    exvideo = exsvd.training_loss(lambda *a: guess, exsvd.LOSSES["exvideo"], x, sigma, noise,
                                  image, ctx, ids)
    close(exvideo, want, 1e-5, "ExVideo's loss")


def test_noise_levels_that_losses_draw():
    g = torch.Generator().manual_seed(0)
    log = exsvd.LOSSES["edm"].draw(20000, 16, g).log()
    assert abs(log.mean() - 0.7) < 0.05 and abs(log.std() - 1.6) < 0.05
    drawn = exsvd.LOSSES["exvideo"].draw(20000, 16, g)
    table = exsvd.karras_sigmas(1000)[:-1]
    assert set(drawn.tolist()) <= set(table.tolist())
    assert abs(drawn.log().mean() - table.log().mean()) < 0.1
    again = exsvd.LOSSES["exvideo"].draw(3, 16, torch.Generator().manual_seed(5))
    assert torch.equal(again, exsvd.LOSSES["exvideo"].draw(3, 16, torch.Generator().manual_seed(5)))


def test_karras_sigmas_are_those_of_the_published_scheduler():
    diffusers = pytest.importorskip("diffusers", reason="the reference")
    scheduler = diffusers.EulerDiscreteScheduler(
        sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True, beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear", timestep_type="continuous", prediction_type="v_prediction",
        timestep_spacing="leading", steps_offset=1)
    for steps in (2, 25, 50):
        scheduler.set_timesteps(steps)
        close(exsvd.karras_sigmas(steps), scheduler.sigmas, 1e-6, "sigmas")
        close(exsvd.karras_sigmas(steps)[:-1].log() / 4, scheduler.timesteps, 1e-6, "c_noise")
    assert exsvd.karras_sigmas(1).tolist() == [700, 0]


# --------------------------------------------------------------------------------------------------
# Memory and training: slices, checkpoints, freezing; other devices; half precision.


def gradients(unet):
    unet.zero_grad()
    unet(*unet_inputs(3)).square().mean().backward()
    return {n: p.grad for n, p in unet.named_parameters() if p.grad is not None}


def test_checkpoints_and_slices_change_no_gradient():
    unet = make_unet(num_frames=12).double().train()  # where rounding can't hide or fake anything
    # most blocks have nothing to train, and the first ones no input that requires a gradient
    exsvd.freeze(unet)
    unet.checkpointing = None
    plain = gradients(unet)
    total = torch.stack([g.norm() for g in plain.values()]).norm()
    for unet.checkpointing in ("memory", "speed"):
        unet.slice_size = None
        whole = gradients(unet)
        unet.slice_size = 3000
        sliced = gradients(unet)
        assert plain.keys() == whole.keys() == sliced.keys() and len(plain) > 300
        # 2nd term: a bias before a norm of one channel has no gradient but rounding
        for n, g in plain.items():
            assert torch.equal(whole[n], g), n
            assert (sliced[n] - g).norm() <= 1e-9 * g.norm() + 1e-13 * total, (n, rel(sliced[n], g))


@pytest.mark.parametrize("switch, blocks", [("memory", 16), ("speed", 5), (None, 0)])
def test_checkpointing_is_one_switch(switch, blocks, monkeypatch):
    """Around every block with a transformer, or around the five of the finest level; inside, around
    every slice."""
    unet, calls = make_unet().train(), []

    def spy(function, *args, use_reentrant):
        calls.append(use_reentrant)
        return function(*args)

    monkeypatch.setattr(exsvd, "checkpoint", spy)
    unet.checkpointing, unet.slice_size = switch, None
    unet(*unet_inputs(2))
    assert calls == [False] * blocks
    unet.slice_size = 1000
    unet(*unet_inputs(2))
    assert len(calls) > 4 * blocks if switch else not calls
    del calls[:]
    unet.eval()(*unet_inputs(2))
    assert not calls


@torch.no_grad()
def test_slices_change_no_output(monkeypatch):
    for frames in (None, 12):
        unet, inputs = make_unet(num_frames=frames), unet_inputs(5, (8, 16))
        before = [x.clone() for x in inputs]
        unet.slice_size = None
        whole = unet(*inputs)
        for unet.slice_size in (1000, 20000):
            close(unet(*inputs), whole, 1e-5,
                  f"UNet extended to {frames}, slices of {unet.slice_size}")
            assert all(map(torch.equal, inputs, before)), "slicing changed its inputs"
    vae, z, small = randomize(exsvd.VAE(VAE)), torch.randn(2, 3, 4, 4, 8), exsvd.Slices(2000)
    whole = vae.decode(z)
    monkeypatch.setattr(exsvd, "Slices", lambda: small)
    close(vae.decode(z), whole, 1e-5, "sliced decoding")


@torch.no_grad()
def test_sliced_norm_is_as_exact_as_group_norm():
    """In bf16, where only the result may be rounded: statistics, scale and shift may not."""
    norm = randomize(torch.nn.GroupNorm(8, 32)).bfloat16()
    x = (3 + torch.randn(2 * 5, 32, 16, 8)).bfloat16()
    video = x.unflatten(0, (2, 5)).transpose(1, 2)  # (B, C, T, H, W)
    exact = F.group_norm(video.double(), 8, norm.weight.double(), norm.bias.double(), norm.eps)
    sliced = exsvd.norm_over_frames(norm, x, 2, exsvd.Slices(4000))
    assert sliced is not norm
    rows = torch.cat([sliced(part) for part in video.split(4, 3)], 3)
    close(rows, exact, 1.05 * rel(norm(video), exact), "sliced norm")


@torch.no_grad()
def test_slices_are_of_one_length_where_they_can_be():
    lengths = [exsvd.Slices(100).length(0, torch.empty(n, 50)) for n in (2, 4, 7, 9, 12)]
    assert lengths == [2, 2, 2, 2, 2] and exsvd.Slices(450).length(0, torch.empty(26, 50)) == 9
    assert exsvd.Slices(450).length(0, torch.empty(28, 50)) == 7


def test_live_bytes_are_counted():
    """The bench's counter, on a pass whose bytes can be counted by hand."""
    x = torch.zeros(1000)
    with compare.LiveBytes([x]) as live:
        a = x + 1                    # 4,000 bytes
        b = a.view(10, 100)[2:] * 2  # 3,200 more; views are free
        assert (live.live, live.peak) == (7200, 7200)
        del a
        c = b.sum()
        x += 1                       # weights do not count
        assert (live.live, live.peak) == (3204, 7200) and c == 800 * 2


def test_decoding_fits_a_small_card():
    """What sample.py --offload decodes of 1024x1024 at once, with all of the VAE's weights: 3 GB,
    as it promises."""
    with FakeTensorMode():
        vae, run = compare.build("ours", argparse.Namespace(device="cpu", diffsynth=None),
                                 part="vae")
        with compare.LiveBytes(vae.parameters()) as live:
            compare.one_pass(run, (4, 128, 128))
    assert live.peak + compare.weight_bytes(vae) <= 3e9


def test_without_no_grad_frozen_networks_take_as_little_memory():
    unet = make_unet(num_frames=12)
    unet.slice_size = 5000

    def peak(trains, context):
        unet.requires_grad_(trains)
        with compare.LiveBytes(unet.parameters()) as live, context:
            unet(*unet_inputs(8, 16, B=1))
        return live.peak

    small = peak(False, torch.no_grad())
    assert peak(False, torch.enable_grad()) == small < peak(True, torch.enable_grad()) / 5


def test_frozen_networks_pass_gradients_on_to_their_inputs():
    vae = exsvd.VAE(VAE).requires_grad_(False)
    img = torch.rand(1, 3, 64, 64)
    assert not vae.encode(img).requires_grad and vae.encode(img.requires_grad_()).requires_grad


def test_blocks_compile_without_a_break(monkeypatch):
    """Traced as torch.compile traces, in full graphs or not at all, and run without its code
    generator."""
    traced = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=traced))
    monkeypatch.setattr(exsvd, "flash_attn_func", None)  # with it graphs need not be full
    unet = make_unet(num_frames=12, channels=(32,) * 4, heads=(1,) * 4)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8):
        eager = unet(*unet_inputs(2, B=1))
        exsvd.compile_blocks(unet)
        close(unet(*unet_inputs(2, B=1)), eager, 1e-5, "compiled")
    compiled = sum(m._compiled_call_impl is not None for m in unet.modules())
    assert compiled == 2 * 16 + 22 and traced.frame_count > 10


def test_freeze():
    unet = make_unet(num_frames=12).train()
    names = exsvd.freeze(unet)
    blocks = {id(p) for block in unet.temporal_blocks() for p in block.parameters()}
    assert len(names) == 33 * 16
    assert set(names) == {n for n, p in unet.named_parameters() if id(p) in blocks}
    assert set(names) == set(filter(exsvd.is_extension_parameter, unet.state_dict()))
    grads = gradients(unet)
    idle = set(names) - set(grads)  # a softmax over the one context token is 1 whatever the query
    assert set(grads) <= set(names)
    assert idle == {n for n in names if exsvd.IDLE.search(n)} and len(idle) == 4 * 16
    for n, g in grads.items():
        if n.endswith("frame_table"):  # the rows of the three frames there were
            assert (g.abs().amax(1) > 0).tolist() == [True] * 3 + [False] * 9
        else:
            assert g.abs().max() > 0, n


@torch.inference_mode()
def test_streaming_changes_no_bit():
    """Without CUDA copies are made as with it, only not beside anything."""
    with torch.inference_mode(False):
        unet = make_unet(num_frames=12)
    inputs = unet_inputs(3, (8, 16))
    want, state = unet(*inputs), {n: t.clone() for n, t in unet.state_dict().items()}
    unet.stream = exsvd.Stream(unet, "cpu", large=2000)  # bytes, of which some skips have less
    home = {n: p.data_ptr() for n, p in unet.named_parameters()}
    for _ in range(2):
        assert torch.equal(unet(*inputs), want)
    assert {n: p.data_ptr() for n, p in unet.named_parameters()} == home
    same(unet, state)


@pytest.mark.parametrize("what", ["sampling", "streaming", "training"])
def test_another_device(what):
    """Under FakeTensorMode "meta" is a device as any other but the CPU, on which nothing need
    exist: mixed devices and reads of values fail."""
    there = torch.device("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cpu" if what == "streaming" else there):
            unet = exsvd.extend(exsvd.UNet(UNET), 12).train(what == "training")
        with there:
            vae, clip = exsvd.VAE(VAE), exsvd.ImageEncoder(CLIP)
            x, sigma, img = torch.empty(1, 9, 4, 8, 16), torch.empty(1), torch.rand(1, 3, 64, 128)
        if what == "streaming":
            unet.stream = exsvd.Stream(unet.requires_grad_(False), there, large=2000)
        ids = exsvd.unet_ids(UNET.ids, {"fps": 7, "motion": torch.ones(1), "aug": 0.02}, there)
        ctx = clip(exsvd.preprocess_clip(img, CLIP.image))[:, None]
        conditions = vae.encode(img)[:, None], ctx, ids
        if what == "training":
            exsvd.freeze(unet)
            loss = exsvd.training_loss(unet, exsvd.LOSSES["edm"], x, sigma, x, *conditions)
            loss.mean().backward()
            assert {p.grad.device for p in unet.parameters() if p.grad is not None} == {there}
        else:
            video = vae.decode(exsvd.denoise(unet, x, sigma, *conditions))
            assert video.shape == (1, 9, 3, 64, 128) and video.device == there


@torch.no_grad()
def test_half_precision():
    """float16 keeps 11 bits; over the depth of a network a few times their rounding is lost."""
    unet, vae, clip = networks(num_frames=12)
    inputs, img = unet_inputs(2, B=1), torch.rand(1, 3, 56, 56) * 2 - 1
    z = torch.randn(1, 1, 4, 2, 2)
    run = {"UNet": (unet, lambda: unet(*inputs)), "VAE encode": (vae, lambda: vae.encode(img)),
           "VAE decode": (vae, lambda: vae.decode(z)), "CLIP": (clip, lambda: clip(img))}
    full = {what: f() for what, (_, f) in run.items()}
    for what, (net, f) in run.items():
        net.half()
        assert f().dtype == torch.float32, "results come in the dtype of the inputs"
        close(f(), full[what], 5e-3, f"{what} in float16")


def test_best_dtype_of_this_machine():
    found = {name for name, value in torch.cpu.get_capabilities().items() if value}
    wanted = torch.bfloat16 if found & {"avx512_bf16", "amx_bf16", "bf16"} else torch.float32
    assert exsvd.best_dtype("cpu") == exsvd.best_dtype("cpu", True) == wanted


@pytest.mark.parametrize("version, warns",
                         [(90700, False), (90800, True), (91400, True), (91501, False)])
def test_a_faulty_cudnn_is_named(monkeypatch, recwarn, version, warns):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    exsvd.warn_of_cudnn()
    assert ["163539" in str(w.message) for w in recwarn] == [True] * warns


# --------------------------------------------------------------------------------------------------
# The published files. Names and shapes are known by hashes (md5 of all names, and names with
# shapes, sorted), of which DiffSynth-Studio publishes the first and the last; the others were
# proved by the byte sizes of the published files.

PUBLISHED = {"svd_xt.safetensors": "2a07abce74b4bdc696b76254ab474da6",
             "svd_xt_image_decoder.safetensors": "f3ea9aecbdbae0bfaa77f78f03319a5e",
             "unet/diffusion_pytorch_model.safetensors": "7bd2a4d8f465070a00de811dcc1802e3",
             "vae/diffusion_pytorch_model.safetensors": "680317af073df1be619812892f038346",
             "image_encoder/model.safetensors": "8fb352186fcacd462dd817c19064d51e",
             "ExVideo-SVD-128f-v1": "9a4ab6869ac9b7d6e31f9854e397c867"}


def keys_md5(tensors):
    lines = [line for n, t in tensors.items() for line in (n, f"{n}:{'_'.join(map(str, t.shape))}")]
    return hashlib.md5(",".join(sorted(lines)).encode()).hexdigest()

# Hashes of names don't see two names of one shape exchanged. Parity does so for diffusers' names,
# and hashes of [other name, diffusers' name] tie the others to them; the pairs were checked one by
# one against the tables of DiffSynth.
TRANSLATIONS = {("sgm", exsvd.UNet): "9703f29d26a7848796b14632a4128298",
                ("sgm", exsvd.VAE): "b7b9f9771203a2d20b70cf5c7e33c947",
                ("sgm", exsvd.ImageEncoder): "bf0d2d8396c499904d156d883233a0d9",
                ("exvideo", exsvd.UNet): "599a2a3d2cb048df05f6494c4b4ce047"}


def sgm_leftovers(vae):
    """The 252 tensors of the single file that no network of ours has: a second image encoder, a
    frame-wise decoder, the text side of CLIP."""
    text = "conditioner.embedders.0.open_clip.model."
    conditioner, first = "conditioner.embedders.3.encoder.", "first_stage_model."
    like = next(vae.parameters())
    out = {text + n: like.new_empty(s) for n, s in {
        "ln_final.weight": [1024], "ln_final.bias": [1024], "logit_scale": [],
        "positional_embedding": [77, 1024],
        "text_projection": [1024, 1024], "token_embedding.weight": [49408, 1024]}.items()}
    for n, t in named(vae, "sgm").items():
        if n.startswith(conditioner + "encoder."):
            out[first + n.removeprefix(conditioner)] = t
        elif n.startswith(first) and not re.search("time_stack|mix_factor|time_mix_conv", n):
            out[conditioner + n.removeprefix(first)] = t
    return out | {conditioner + "post_quant_conv.weight": like.new_empty(4, 4, 1, 1),
                  conditioner + "post_quant_conv.bias": like.new_empty(4)}


@pytest.fixture(scope="module")
def full():
    """The full-size networks, without storage, and {published file: {name: tensor}} made from their
    names."""
    with torch.device("meta"):
        unet, vae, clip = exsvd.UNet(), exsvd.VAE(), exsvd.ImageEncoder()
        single = named(unet, "sgm") | named(vae, "sgm") | named(clip, "sgm") | sgm_leftovers(vae)
        temporal = re.compile("first_stage.*(time_stack|mix_factor|time_mix_conv)")
        image_decoder = {n: t for n, t in single.items() if not temporal.match(n)}
        for n, t in single.items():
            if re.search(r"embedders\.3\.encoder\.(post_)?quant_conv", n):
                image_decoder[n.replace("conditioner.embedders.3.encoder.", "first_stage_model.")] = t
        tensors = [single, image_decoder, *(named(net, "diffusers") for net in (unet, vae, clip))]
        files = dict(zip(PUBLISHED, [*tensors, named(exsvd.extend(unet), "exvideo")]))
    return unet, vae, clip, files


def test_names_of_published_files(full):
    *nets, files = full
    assert {file: keys_md5(tensors) for file, tensors in files.items()} == PUBLISHED
    for (layout, network), md5 in TRANSLATIONS.items():
        (net,) = (net for net in nets if type(net) is network)
        theirs, diffusers = (exsvd.file_names(net, kind) for kind in (layout, "diffusers"))
        if layout == "sgm":
            theirs = {n: t for n, t in theirs.items() if not re.search("frame_(table|conv)", n)}
        lines = sorted(f"{names[0]} {' '.join(diffusers[n])}" for n, names in theirs.items())
        assert hashlib.md5("\n".join(lines).encode()).hexdigest() == md5


def test_published_files_fill_the_networks(full):
    unet, vae, clip, files = full
    temporal = set(exsvd.freeze(unet))
    contents = {"svd_xt.safetensors": (unet, vae, clip),
                "unet/diffusion_pytorch_model.safetensors": (unet,),
                "vae/diffusion_pytorch_model.safetensors": (vae,),
                "image_encoder/model.safetensors": (clip,),
                "ExVideo-SVD-128f-v1": (unet,)}
    for file, nets in contents.items():
        tensors, left = files[file], set(files[file])
        for net in nets:
            located = exsvd.locate(net, exsvd.Tensors(tensors))
            groups = [names for _, names in located.values()]
            missing = net.state_dict().keys() - located.keys()
            left -= {n for names in groups for n in names}
            if file.startswith("ExVideo"):
                assert missing == net.state_dict().keys() - temporal
            else:
                assert all(re.search("frame_(table|conv)", n) for n in missing)  # extend() added it
        assert len(left) == (252 if file == "svd_xt.safetensors" else 0)
        assert all(re.match(exsvd.IGNORED, n) for n in left)
    with pytest.raises(exsvd.WeightsError, match=r"image-decoder variant.*use svd_xt.safetensors"):
        exsvd.locate(vae, exsvd.Tensors(files["svd_xt_image_decoder.safetensors"]))
    sizes = [sum(t.numel() for t in files[file].values()) for file in list(contents)[1:]]
    assert sizes == [1_524_623_082, 97_742_847, 632_076_800, 832_956_800]
    assert sum(p.numel() for p in unet.parameters()) == 1_860_773_802


# --------------------------------------------------------------------------------------------------
# Files

CONFIG = {"exsvd": json.dumps({"config": {"unet": vars(UNET), "vae": vars(VAE), "clip": vars(CLIP)}})}


def write_model(path, layout, nets, dtype=torch.float32):
    """nets at path, as somebody else would have written them."""
    names = "sgm" if layout == "single" else "diffusers"
    tensors = [{n: t.to(dtype) for n, t in named(net, names).items()} for net in nets]
    if layout == "single":
        everything = tensors[0] | tensors[1] | tensors[2] | sgm_leftovers(nets[1])
        save_file(everything, path / "svd.safetensors", metadata=CONFIG)
        return path / "svd.safetensors"
    fp16 = ".fp16" if dtype == torch.float16 else ""
    configs = [{"block_out_channels": UNET.channels, "num_attention_heads": UNET.heads,
                "num_frames": 14,
                "cross_attention_dim": 40},
               {"block_out_channels": VAE.channels, "force_upcast": True},
               {"hidden_size": CLIP.width, "num_hidden_layers": CLIP.layers,
                "num_attention_heads": CLIP.heads,
                "patch_size": CLIP.patch, "projection_dim": CLIP.out_dim, "image_size": CLIP.image}]
    for stem, t, config in zip(exsvd.FOLDER.values(), tensors, configs):
        folder = path / os.path.dirname(stem)
        folder.mkdir(exist_ok=True)
        save_file(t, f"{path / stem}{fp16}.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random networks, a UNet extended to 12 frames, and the files made of them."""
    path = tmp_path_factory.mktemp("files")
    nets, longer = networks(), make_unet(num_frames=12, seed=5)
    found = argparse.Namespace(nets=nets, longer=longer, folder=write_model(path, "folder", nets))
    found.single, found.own = path / "svd.safetensors", path / "own.safetensors"
    exsvd.save_model(found.single, *nets, note="hello")
    exsvd.save_extension(found.own, longer, step=7)
    found.release = path / "release.safetensors"
    save_file({n: t.half() for n, t in named(longer, "exvideo").items()}, found.release)
    return found


def shorter_names(state):
    return {n: t for n, t in state.items() if exsvd.is_extension_parameter(n)}


@pytest.mark.parametrize("layout, dtype", [("single", torch.float32), ("folder", torch.float16)],
                         ids=str)
def test_load_published_layouts(tmp_path, files, layout, dtype):
    path = write_model(tmp_path, layout, files.nets, dtype)
    svd = exsvd.load(path)
    for net, mine in zip((svd.unet, svd.vae, svd.clip), files.nets):
        same(net, {n: t.to(dtype).float() for n, t in mine.state_dict().items()})
        assert not any(p.requires_grad for p in net.parameters())
    native = 25 if layout == "single" else 14
    assert svd.unet.config == exsvd.UNetConfig(**vars(UNET) | {"native_frames": native})
    assert svd.vae.config == VAE and svd.clip.config == CLIP
    assert svd.unet.max_frames is None and svd.extension is None


def test_full_precision_is_preferred_to_what_lies_beside_it(tmp_path, files):
    write_model(tmp_path, "folder", networks(seed=2), torch.float16)
    svd = exsvd.load(write_model(tmp_path, "folder", files.nets), parts=("clip",))
    same(svd.clip, files.nets[2].state_dict())


@pytest.mark.parametrize("extension, dtype", [("release", torch.float16), ("own", torch.float32)],
                         ids=str)
def test_load_extensions(files, extension, dtype):
    svd = exsvd.load(files.folder, getattr(files, extension), parts=("unet",))
    trained = shorter_names(files.longer.state_dict())
    trained = {n: t.to(dtype).float() for n, t in trained.items()}
    same(svd.unet, files.nets[0].state_dict() | trained)
    own = {"step": 7, "architecture": "exvideo", "frames": 12, "native_frames": 25}
    assert svd.extension == (own if extension == "own" else {})
    assert svd.vae is None and svd.unet.max_frames == 12
    native = 25 if extension == "own" else 14  # of the base that it was made from
    assert svd.unet.config.native_frames == native


def test_dtypes(files):
    for dtype in (torch.float16, torch.float64):
        svd = exsvd.load(files.single, dtype=dtype)
        wide = torch.float32 if dtype == torch.float16 else dtype  # the encoder exceeds its range
        for part, expected in {"unet": dtype, "clip": dtype, "vae.decoder": dtype,
                               "vae.encoder": wide,
                               "vae.quant_conv": wide}.items():
            mine = operator.attrgetter(part)(exsvd.SVD(*files.nets, {}, None))
            same(operator.attrgetter(part)(svd), mine.state_dict(), expected)
    assert svd.meta["note"] == "hello"


def test_what_stays_float32(files):
    def trained(name):
        return exsvd.is_extension_parameter(name) or name == "clip.proj"

    svd = exsvd.load(files.single, files.own, torch.float64, keep_float32=trained)
    for part, net in {"unet": svd.unet, "vae": svd.vae, "clip": svd.clip}.items():
        for name, p in net.named_parameters():
            assert p.dtype == (torch.float32 if trained(f"{part}.{name}") else torch.float64), name


def test_loading_to_the_meta_device_only_checks(files, tmp_path):
    svd = exsvd.load(files.single, files.own, device="meta")
    assert all(p.is_meta for net in (svd.unet, svd.vae, svd.clip) for p in net.parameters())
    more = load_file(files.own) | {"blocks.7.x": torch.zeros(1)}
    save_file(more, tmp_path / "x", metadata=metadata(files.own))
    with pytest.raises(exsvd.WeightsError, match="1 unexpected, such as blocks.7.x"):
        exsvd.load(files.single, tmp_path / "x", device="meta")


def metadata(path, **changes):
    return {"exsvd": json.dumps(exsvd.Tensors(path).meta | changes)}


def test_whole_models_of_ours(tmp_path, files):
    path = tmp_path / "model.safetensors"
    defaults = {"sample": {"steps": 8}}
    exsvd.save_model(path, files.longer, *files.nets[1:], dtype=torch.float16, defaults=defaults)
    svd = exsvd.load(path)
    same(svd.unet, {n: t.half().float() for n, t in files.longer.state_dict().items()})
    assert svd.unet.max_frames == 12 and svd.meta["defaults"] == defaults
    again = exsvd.load(path, files.release, parts=("unet",))  # one extension over another
    assert again.unet.max_frames == 12


def test_a_unet_by_itself(tmp_path, files):
    other = make_unet(seed=8)
    folder = write_model(tmp_path, "folder", (other, *files.nets[1:])) / "unet"
    for source in (folder, folder / "diffusion_pytorch_model.safetensors"):
        svd = exsvd.load(files.single, unet=source)
        same(svd.unet, other.state_dict())
        same(svd.vae, files.nets[1].state_dict())
        assert svd.meta["note"] == "hello"
    save_file(named(other, "sgm"), tmp_path / "sgm.safetensors", metadata=CONFIG)
    same(exsvd.load(files.single, unet=tmp_path / "sgm.safetensors").unet, other.state_dict())
    same(exsvd.load(tmp_path / "sgm.safetensors", parts=("unet",)).unet, other.state_dict())
    for alone in ("sgm.safetensors", "unet"):
        with pytest.raises(exsvd.WeightsError, match="holds a UNet alone: give it as --unet"):
            exsvd.load(tmp_path / alone)


@pytest.mark.parametrize("layout", ["ours", "sgm", "diffusers"])
@pytest.mark.parametrize("part", [0, 1, 2], ids=["UNet", "VAE", "CLIP"])
def test_load_weights(tmp_path, files, layout, part):
    net, path = files.nets[part], tmp_path / "one.safetensors"
    tensors = named(net, layout)
    save_file(tensors, path)
    for source, device in ((path, "cpu"), (tensors, "meta")):
        with torch.device(device):
            other = type(net)(net.config).eval()
        assert exsvd.load_weights(other, source) is other
        same(other, net.state_dict())
    next(iter(tensors.values())).add_(1)
    same(other, net.state_dict())  # it has copies, which change with nobody


@pytest.mark.parametrize("prefix",
                         ["module.", "_orig_mod.", "unet.", "model.", "module._orig_mod.unet."])
@pytest.mark.parametrize("layout", ["sgm", "diffusers"])
def test_prefixes_of_training_tools(files, prefix, layout):
    tensors = {prefix + n: t for n, t in named(files.nets[0], layout).items()}
    same(exsvd.load_weights(exsvd.UNet(UNET).eval(), tensors), files.nets[0].state_dict())
    tensors["a.b"] = torch.zeros(1)  # not all names have it
    with pytest.raises(exsvd.WeightsError, match="1428 missing"):
        exsvd.locate(files.nets[0], exsvd.Tensors(tensors))


def test_clip_with_position_ids(files):
    tensors = named(files.nets[2], "diffusers")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    same(exsvd.load_weights(exsvd.ImageEncoder(CLIP).eval(), tensors), files.nets[2].state_dict())


def test_base_and_extension_into_an_extended_unet(files):
    unet = exsvd.extend(exsvd.UNet(UNET), 12).double().eval()
    fresh = {n: t.clone() for n, t in unet.state_dict().items() if "frame_" in n}
    base = files.nets[0].state_dict()
    exsvd.load_weights(unet, named(files.nets[0], "sgm"))
    same(unet, fresh | base, torch.float64)
    exsvd.load_weights(unet, named(files.longer, "exvideo"))
    same(unet, base | shorter_names(files.longer.state_dict()), torch.float64)


# --------------------------------------------------------------------------------------------------
# Extension files, of the paper's architecture and of others


def test_an_extension_is_what_the_release_is(tmp_path, full, files):
    path, unet = tmp_path / "e.safetensors", files.longer
    name = "down.1.attn.temporal.norm_in.bias"
    exsvd.save_extension(path, unet, {name: torch.full((32,), 3.0)}, step=1)  # say, from an EMA
    saved, release, own = load_file(path), full[-1]["ExVideo-SVD-128f-v1"], named(unet, "exvideo")
    assert saved.keys() == release.keys()  # the full-size names, whose hash is the published one
    assert all(t.ndim == release[n].ndim for n, t in saved.items())
    changed = [n for n in saved if not torch.equal(saved[n], own[n])]
    assert changed == exsvd.file_names(unet, "exvideo")[name] and (saved[changed[0]] == 3).all()
    first = path.read_bytes()
    exsvd.save_extension(path, unet, {name: torch.full((32,), 3.0)}, step=1)
    assert path.read_bytes() == first, "the same weights give the same bytes"


def test_what_no_extension_file_holds(tmp_path, files):
    for name in ("module.x", "conv_out.bias"):  # wrong names, and parameters that would be left out
        with pytest.raises(ValueError, match=f"{name} is no parameter of an extension"):
            exsvd.save_extension(tmp_path / "x", files.longer, {name: torch.zeros(1)})
    with pytest.raises(ValueError, match="not extended"):
        exsvd.save_extension(tmp_path / "x", files.nets[0])


def test_another_architecture_is_refused(tmp_path, files):
    other = metadata(files.own, architecture="rotary")
    save_file(load_file(files.own), tmp_path / "x", metadata=other)
    with pytest.raises(exsvd.WeightsError, match="'rotary', but this code has 'exvideo'"):
        exsvd.load(files.single, tmp_path / "x")


def test_an_extension_may_hold_a_part(tmp_path, files):
    part = {n: t for n, t in load_file(files.own).items() if "attn1" in n}
    save_file(part, tmp_path / "x", metadata=metadata(files.own))
    unet = exsvd.load(files.single, tmp_path / "x", parts=("unet",)).unet
    want = exsvd.extend(exsvd.load(files.single, parts=("unet",)).unet, 12).state_dict()
    trained = files.longer.state_dict()
    same(unet, want | {n: trained[n] for n in want if ".attn.temporal.attn1" in n})


def test_older_extensions_of_ours(tmp_path, files):
    note = {"exsvd": json.dumps({"native_frames": 8})}
    save_file(load_file(files.own), tmp_path / "x", metadata=note)
    svd = exsvd.load(files.single, tmp_path / "x", parts=("unet",))
    assert svd.unet.max_frames == 12 and svd.unet.config.native_frames == 8


class LoRA(torch.nn.Module):
    """A linear layer with a trained update of low rank."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        device = base.weight.device
        self.A = torch.nn.Parameter(torch.randn(rank, base.in_features, device=device) / 8)
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


def with_lora(rank, extend=exsvd.extend):
    """What extend() becomes where a user adds LoRA to the temporal attention."""
    def extend_and_add(unet, num_frames):
        extend(unet, num_frames)
        for block in unet.temporal_blocks():
            if not isinstance(block.attn1.to_q, LoRA):
                block.attn1.to_q = LoRA(block.attn1.to_q, rank)
        return unet
    return extend_and_add


@torch.no_grad()
def test_lora_on_the_temporal_attention(tmp_path, files, monkeypatch):
    monkeypatch.setattr(exsvd, "ARCHITECTURE", "lora")
    monkeypatch.setattr(exsvd, "is_extension_parameter", lambda name: name.endswith((".A", ".B")))
    monkeypatch.setattr(exsvd, "extend", with_lora(4))
    unet = exsvd.extend(exsvd.load(files.single, parts=("unet",)).unet, 30)
    assert exsvd.freeze(unet) == [n for n, p in unet.named_parameters() if p.requires_grad]
    for block in unet.temporal_blocks():
        block.attn1.to_q.B.normal_()
    exsvd.save_extension(tmp_path / "lora", unet)
    assert len(load_file(tmp_path / "lora")) == 2 * 16
    same(exsvd.load(files.single, tmp_path / "lora", parts=("unet",)).unet, unet.state_dict())
    exsvd.load(files.single, tmp_path / "lora", device="meta")
    monkeypatch.setattr(exsvd, "extend", with_lora(2))
    with pytest.raises(exsvd.WeightsError, match=r"to_q.A \(4, 32\) instead of \(2, 32\)"):
        exsvd.load(files.single, tmp_path / "lora")


class Rotary(exsvd.SelfAttention):
    def forward(self, x):
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        angle = torch.arange(x.shape[1])[:, None] / 10 ** torch.linspace(0, 4, x.shape[2] // 2)
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (torch.view_as_complex(t.unflatten(2, (-1, 2))) * turn for t in (q, k))
        q, k = (torch.view_as_real(t).flatten(2) for t in (q, k))
        return self.to_out(exsvd.attention(q, k, v, self.heads))


@torch.no_grad()
def test_rotary_positions_instead_of_the_table(tmp_path, files, monkeypatch):
    def extend(unet, num_frames):
        for block in unet.temporal_blocks():
            block.attn1.__class__ = Rotary
        unet.max_frames = num_frames
        return unet

    monkeypatch.setattr(exsvd, "ARCHITECTURE", "rotary")
    monkeypatch.setattr(exsvd, "extend", extend)
    unet = exsvd.extend(make_unet(seed=6), 20)
    exsvd.save_extension(tmp_path / "rotary", unet)
    exsvd.save_model(tmp_path / "whole", unet, *files.nets[1:])
    svd = exsvd.load(files.single, tmp_path / "rotary")
    same(svd.unet, files.nets[0].state_dict() | shorter_names(unet.state_dict()))
    assert svd.unet.max_frames == 20 and svd.unet(*unet_inputs(20, B=1)).isfinite().all()
    whole = exsvd.load(tmp_path / "whole").unet
    same(whole, unet.state_dict())
    assert whole.max_frames == 20 and torch.equal(whole(*unet_inputs(3)), unet(*unet_inputs(3)))
    with pytest.raises(exsvd.WeightsError, match="frame_table|positional_embedding"):
        exsvd.load(files.single, files.release)


# --------------------------------------------------------------------------------------------------
# Files that cannot be used


def refused(net, source, *says):
    """load_weights raises one line that says all this, and changes nothing."""
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(exsvd.WeightsError) as e:
        exsvd.load_weights(net, source)
    assert "\n" not in str(e.value) and len(str(e.value)) < 1200, str(e.value)
    for text in says:
        assert text in str(e.value), str(e.value)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_damaged_files_and_pickles(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    def pickled(zipped):
        file = io.BytesIO()
        torch.save({"x": Bomb()}, file, _use_new_zipfile_serialization=zipped)
        return file.getvalue()

    net, path = randomize(exsvd.ImageEncoder(CLIP)), tmp_path / "x.safetensors"
    save_file(named(net, "diffusers"), path)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    damaged = [b"", good[:-1000], good[:1000], good + b"0000", b"<!DOCTYPE html><html></html>"]
    pickles = [b"\x80\x02}q\x00.", b"PK\x03\x04" + good, pickled(zipped=True),
               pickled(zipped=False)]
    flipped = [good[:at] + bytes([good[at] ^ bit]) + good[at + 1:] for bit in (0x01, 0x80)
               for at in [0, 1, 3, 7, 8, *range(9, header - 8, header // 20)]]
    for contents, says in [(damaged, "is not a complete safetensors file"), (flipped, ""),
                           ([pointer], "is a Git LFS pointer"),
                           (pickles, "is a pickled checkpoint, which is never opened")]:
        for content in contents:
            path.write_bytes(content)
            refused(net, path, f"x.safetensors {says}")
    assert not (tmp_path / "ran").exists()


def test_good_files_that_begin_like_a_pickle(tmp_path):
    """A file begins with the length of its header."""
    for begins in (b"\x80\x02", b"PK"):  # a pickle, a zip
        header = b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        header = header.ljust(int.from_bytes(begins, "little"))
        (tmp_path / "x").write_bytes(begins + bytes(6) + header + np.float32([1, 2]).tobytes())
        assert exsvd.Tensors(tmp_path / "x").get("x").tolist() == [1, 2]


def test_tensors_that_do_not_fit(files):
    unet, vae, clip = files.nets
    good, first = named(unet, "diffusers"), "conv_in.weight"
    refused(unet, {}, "1428 missing, such as", "(1428 tensors)")
    refused(clip, {"my.a": torch.zeros(1), "my.b": torch.zeros(1)}, "which holds my.a, my.b",
            "2 unexpected")
    refused(unet, good | {"extra.weight": torch.zeros(1)}, "1 unexpected, such as extra.weight")
    refused(unet, {n.replace(first, "conv_inn.weight"): t for n, t in good.items()},
            "1 missing, such as conv_in.weight", "1 unexpected, such as conv_inn.weight")
    refused(unet, good | {first: good[first][:, :4]},
            "1 mis-shaped, such as conv_in.weight (32, 4, 3, 3) instead of (32, 8, 3, 3)")
    refused(unet, good | {first: good[first].flatten()}, "mis-shaped")
    a, b = "time_embedding.linear_1.weight", "add_embedding.linear_1.weight"
    refused(unet, good | {a: good[b], b: good[a]}, "2 mis-shaped",
            f"{a} (128, 768) instead of (128, 32)")
    refused(unet, named(vae, "diffusers"), "missing", "unexpected")
    refused(clip, named(unet, "sgm"), "missing")
    refused(make_unet(channels=(32, 32, 64, 64), heads=(1, 1, 2, 2)), good, "mis-shaped")
    joined, q = named(clip, "diffusers"), "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    refused(clip, joined | {q: joined[q][:, :3]}, "q_proj.weight", "(64, 3)", "(192, 64)")
    for network, part in (unet, "UNet"), (vae, "VAE"), (clip, "ImageEncoder"):
        both = named(network, "sgm") | named(network, "diffusers")  # two layouts in one file
        refused(network, both, part, "unexpected")


def test_releases_that_do_not_fit(files):
    longer = exsvd.extend(exsvd.UNet(UNET), 12)
    release, extra = named(longer, "exvideo"), "blocks.8.norm_in.weight"
    refused(files.nets[0], release, "extended to 12 frames, but the UNet is not",
            "extend(unet, 12)")
    refused(make_unet(num_frames=30), release, "extended to 12 frames, but the UNet to 30",
            "extend(unet, 12)")
    refused(longer, {n: t for n, t in release.items() if "positional_conv" not in n}, "32 missing")
    refused(longer, {n: t for n, t in release.items() if "embeddings" not in n}, "16 missing")
    refused(longer, release | {extra: torch.zeros(32)}, f"1 unexpected, such as {extra}")


def test_models_that_cannot_be_loaded(tmp_path, files):
    def cannot_load(says, path=tmp_path, *extension):
        with pytest.raises(exsvd.WeightsError, match=says):
            exsvd.load(path, *extension)

    none = tmp_path / "none.safetensors"
    cannot_load("none.safetensors: no such weight file", none)
    cannot_load("none.safetensors: no such weight file", files.single, none)
    cannot_load("no unet/diffusion_pytorch_model.safetensors")
    cannot_load("is an extension, not a model", files.own)
    cannot_load("is not an extension", files.single, files.single)


@pytest.mark.parametrize("text",
                         ["{", "3", "null", "[1]", *(json.dumps({"config": config}) for config in (
    [], 3, None, {"unet": 3}, {"unet": {"channels": "a"}}, {"unet": {"groups": 0}},
    {"unet": {"chan": 1}},
    {"vae": {"channels": [32]}}, {"clip": {"layers": -1}}))])
def test_metadata_that_no_network_can_have(tmp_path, text):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"exsvd": text})
    with pytest.raises(exsvd.WeightsError, match="x.safetensors"):
        exsvd.load(tmp_path / "x.safetensors")


def test_folders_that_are_not_whole(tmp_path, files):
    shutil.copytree(files.folder, tmp_path / "x")
    for text, says in {"{": "not readable as JSON", "3": "configuration is not understood"}.items():
        (tmp_path / "x/vae/config.json").write_text(text)
        with pytest.raises(exsvd.WeightsError, match=f"vae/config.json: .*{says}"):
            exsvd.load(tmp_path / "x")
    os.remove(tmp_path / "x/vae/diffusion_pytorch_model.safetensors")
    (tmp_path / "x/vae/diffusion_pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(exsvd.WeightsError, match="no vae/diffusion_pytorch_model.safetensors"):
        exsvd.load(tmp_path / "x")


@pytest.mark.parametrize("fails", ["save_file", "replace"])
def test_failing_save_leaves_the_old_file(tmp_path, monkeypatch, fails):
    # save_file(tensors, temporary) or os.replace(temporary, target)
    def disk_full(first, second, metadata=None):
        temporary = second if fails == "save_file" else first
        # beside the target, so that the renaming is atomic
        assert os.path.dirname(temporary) == str(tmp_path)
        with open(temporary, "wb") as f:
            f.write(b"half")
        raise OSError("No space left on device")

    nets = networks(num_frames=12)
    monkeypatch.setattr(exsvd if fails == "save_file" else os, fails, disk_full)
    for save, saved in ((exsvd.save_model, nets), (exsvd.save_extension, nets[:1])):
        path = tmp_path / "x.safetensors"
        path.write_bytes(b"old")
        with pytest.raises(OSError, match="No space left"):
            save(str(path), *saved)
        assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.safetensors"], "no temporary file is left"


# ----------------------------------------------------------------------------------------------------------------------
# data.py: pictures and videos in and out


def corners(H=48, W=80):
    """A picture whose four quarters differ: uint8 (H, W, 3)."""
    quarters = np.array([[[200, 40, 40], [40, 180, 60]], [[50, 60, 210], [230, 230, 230]]], np.uint8)
    return quarters.repeat(H // 2, 0).repeat(W // 2, 1)


def file_of(pixels, form, **options):
    """The bytes of an image file, made by Pillow at its best quality.  pixels: uint8 (H, W, C), or a Pillow image."""
    best = {"JPEG": {"quality": 95, "subsampling": 0}, "AVIF": {"quality": 95, "subsampling": "4:4:4"},
            "WEBP": {"lossless": True, "exact": True}, "MPO": {"quality": 95, "subsampling": 0, "save_all": True,
                                                               "append_images": [Image.new("RGB", (9, 9))]}}
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.ascontiguousarray(pixels))
    file = io.BytesIO()
    image.save(file, form, **best.get(form, {}) | options)
    return file.getvalue()


def png_chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_head(W, H, bits):
    """How a PNG of RGB pixels begins."""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, bits, 2, 0, 0, 0))


@pytest.fixture
def reads(tmp_path):
    """reads(file, pixels, tolerance): that read_image finds those pixels in that file."""
    def check(file, pixels, tolerance=0):
        (tmp_path / "x").write_bytes(file)
        image = data.read_image(tmp_path / "x")
        assert image.dtype == torch.uint8 and image.shape == pixels.shape
        assert np.abs(image.numpy().astype(int) - np.asarray(pixels).astype(int)).max() <= tolerance
    return check


LOSS = {"JPEG": 6, "MPO": 6, "AVIF": 8}                                             # at the edges of a picture


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientations_come_out_upright(reads, form):
    # how a camera that means `up` stores it, for each value of the tag: EXIF 2.3, figure of tag 0x0112
    stored = {1: lambda u: u, 2: np.fliplr, 3: lambda u: np.rot90(u, 2), 4: np.flipud, 5: lambda u: u.swapaxes(0, 1),
              6: lambda u: np.rot90(u, 1), 7: lambda u: np.rot90(u, 2).swapaxes(0, 1), 8: lambda u: np.rot90(u, -1)}
    for value, turned in stored.items():
        exif = Image.Exif()
        exif[0x010F], exif[0x0112] = "a make", value
        reads(file_of(turned(corners()), form, exif=exif), corners(), LOSS.get(form, 0))


def test_damaged_notes_and_what_phones_append_leave_the_pixels_as_they_are(reads, capfd):
    whole = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)     # EXIF: turn by a quarter
    png, jpeg, mpo = (file_of(corners(), form) for form in ("PNG", "JPEG", "MPO"))
    for exif in (b"", b"II", b"MM\0*\xff\xff\xff\xff", whole[:15], whole.replace(b"\6\0", b"\x09\0")):
        reads(png[:33] + png_chunk(b"eXIf", exif) + png[33:], corners())
        exif = b"Exif\0\0" + exif
        reads(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:], corners(), LOSS["JPEG"])
    for name in (b"eXIf", b"iCCP", b"zTXt"):                                        # with a wrong checksum
        reads(png[:33] + png_chunk(name, b"x\0\0junk")[:-1] + b"?" + png[33:], corners())
    for tail in (b"\xff\xda" + bytes(99), jpeg, b"\0\0\0\x18ftypmp42" + bytes(10**5)):
        reads(jpeg + tail, corners(), LOSS["JPEG"])
        reads(mpo + tail, corners(), LOSS["MPO"])
    index = mpo.index(b"MPF\0") + 9                                                 # what says where its pictures are
    reads(mpo[:index] + b"\xff\xff\xff" + mpo[index + 3:], corners(), LOSS["MPO"])
    assert capfd.readouterr() == ("", "")


def test_colour_profiles_become_srgb(reads):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = srgb[128:].replace(b"rXYZ", b"?").replace(b"gXYZ", b"rXYZ").replace(b"?", b"gXYZ")
    swapped, want = srgb[:128] + tags, corners()[..., [1, 0, 2]]                    # what it calls red is green
    for form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        reads(file_of(corners(), form, icc_profile=swapped), want, LOSS.get(form, 0) + 1)
    half = np.dstack([corners(), np.full((48, 80), 128, np.uint8)])
    reads(file_of(half, "PNG", icc_profile=swapped), np.rint(want / 255 * 128 + 127), 2)
    reads(file_of(Image.fromarray(corners()).quantize(4), "PNG", icc_profile=swapped), want, 1)
    grey = Image.fromarray(corners()).convert("L")
    reads(file_of(grey, "PNG", icc_profile=swapped), np.asarray(grey.convert("RGB")), 1)
    reads(file_of(corners(), "PNG", icc_profile=b"junk" * 50), corners())
    cmyk = Image.fromarray(corners()).convert("CMYK")
    for profile in (None, swapped):                                                 # of other colours: ignored
        reads(file_of(cmyk, "JPEG", icc_profile=profile), corners(), 8)
        reads(file_of(cmyk, "TIFF", icc_profile=profile), corners(), 1)


def test_transparency_is_laid_on_white(reads):
    rgba = np.random.default_rng(0).integers(0, 256, (9, 13, 4), np.uint8)
    alpha = rgba[..., 3:] / 255
    for form in ("PNG", "WEBP", "TIFF"):
        reads(file_of(rgba, form), np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)), 1)
    grey = np.array([[[0, 0], [0, 255], [100, 128]]], np.uint8)
    reads(file_of(grey, "PNG"), np.repeat([[[255], [0], [177]]], 3, 2), 1)
    palette = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    want = np.array([[[255, 0, 0], [127, 255, 127], [255, 255, 255]]])
    reads(file_of(palette, "PNG", transparency=bytes([255, 128, 0])), want, 1)
    want = corners()
    want[:24, :40] = 255
    reads(file_of(corners(), "PNG", transparency=(200, 40, 40)), want)


def test_sixteen_bits_are_scaled_not_clipped(reads):
    x = np.random.default_rng(0).integers(0, 65536, (7, 11, 3)).astype(">u2")
    x[0, 0, 0] = 777
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in x))
    reads(png_head(11, 7, 16) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b""), x / 257, 1)
    one, grey = x[..., 0].astype(np.uint16), np.rint(np.repeat(x[..., :1], 3, 2) / 257)
    for form in ("PNG", "TIFF", "PPM"):
        reads(file_of(one, form), grey)
    big_endian = Image.frombytes("I;16B", (11, 7), x[..., 0].tobytes())
    for image in (big_endian, one.astype(np.int32), one.astype(np.float32) / 65535):
        reads(file_of(image, "TIFF"), grey)
    grey[x[..., 0] == 777] = 255
    reads(file_of(one, "PNG", transparency=777), grey)
    one_bit = Image.fromarray(corners()).convert("1")
    reads(file_of(one_bit, "PNG"), np.asarray(one_bit.convert("RGB")))


def test_animations_give_their_first_frame_on_its_canvas(reads):
    first = Image.new("RGBA", (80, 48))
    first.paste(Image.fromarray(corners(20, 30)), (10, 5))
    want = np.full((48, 80, 3), 255)
    want[5:25, 10:40] = corners(20, 30)
    rest = {"save_all": True, "append_images": [Image.fromarray(corners()).convert("RGBA")], "duration": 100}
    for form in ("PNG", "WEBP", "GIF"):
        reads(file_of(first, form, **rest), want, 3 if form == "GIF" else 0)
    reads(file_of(corners(), "AVIF", **rest), corners(), LOSS["AVIF"])
    poster = Image.fromarray(corners()).convert("RGBA")                             # where animations are not shown
    reads(file_of(poster, "PNG", **rest | {"append_images": [first, poster], "default_image": True}), want)
    small = file_of(corners(20, 30), "GIF")                                         # a frame smaller than the canvas
    at = small.index(b",\0\0\0\0")
    reads(small[:6] + struct.pack("<HH", 80, 48) + small[10:at + 1] + struct.pack("<HH", 10, 5) + small[at + 5:], want)


def test_files_are_recognised_by_content_not_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.jpg", "x.mp4", "a%03d.png", "no extension", "concat:x", "-", "x.txt", "pipe:0"):
        data.write_png(name, corners())
        assert torch.equal(data.read_image(name), torch.from_numpy(corners())), name
    (tmp_path / "playlist.png").write_text("ffconcat version 1.0\nfile x.jpg\n")   # must not open the file it names
    with pytest.raises(data.MediaError):
        data.read_image("playlist.png")


def test_unreadable_files_raise_one_line(tmp_path, capfd):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    bad = {"empty.jpg": b"", "text.png": b"not an image\n" * 50, "noise": noise.tobytes(), "two\nlines": b"?",
           "bomb.png": png_head(60000, 60000, 8) + file_of(noise, "PNG")[33:],
           "x.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
           "x.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="5" height="5"/>'}
    for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF", "BMP"):
        whole = file_of(noise, form)
        bad |= {f"{part} of {form}": whole[:int(len(whole) * part)] for part in (0.05, 0.3, 0.6, 0.9, 0.98)}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name in [*bad, "missing.png", ".", "nu\0l"]:
        with pytest.raises(data.MediaError) as e:
            data.read_image(tmp_path / name)
        assert str(e.value).isprintable() and data.one_line(tmp_path / name) in str(e.value), name
        assert ("heif-convert" in str(e.value)) == (name == "x.heic")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("H, W, form", [(48, 80, "yuv420p"), (66, 34, "yuv420p10le")])
def test_colours_of_videos_are_exact(tmp_path, form, H, W):
    # against the half-size chroma interpolated linearly and ITU-R BT.601, limited range
    rng = np.random.default_rng(0)
    planes = [rng.integers(100, 160, ((H + k) // (1 + k), (W + k) // (1 + k))) for k in (0, 1, 1)]
    packed = np.concatenate([v.flatten() for v in planes]).reshape(-1, W)
    packed = packed.astype(np.uint8) if form == "yuv420p" else 4 * packed.astype(np.uint16)
    with av.open(str(tmp_path / "x.mkv"), "w") as c:
        s = c.add_stream("ffv1", rate=5)
        s.width, s.height, s.pix_fmt = W, H, form
        c.mux([*s.encode(av.VideoFrame.from_ndarray(packed, form)), *s.encode(None)])
    y, cb, cr = (torch.from_numpy(v).float() for v in planes)
    cb, cr = (F.interpolate(v[None, None], scale_factor=2, mode="bilinear")[0, 0, :H, :W] - 128 for v in (cb, cr))
    y = 1.1644 * (y - 16)
    want = torch.stack([y + 1.5960 * cr, y - 0.3918 * cb - 0.8130 * cr, y + 2.0172 * cb], -1).clamp(0, 255)
    error = (data.read_image(tmp_path / "x.mkv") - want).abs()
    assert error.mean() < 0.7 and error.max() <= 4, (error.mean(), error.max())


def test_fit_image_covers_crops_and_does_not_distort():
    for H, W, width, height in [(300, 500, 64, 64), (500, 300, 128, 64), (80, 48, 192, 64), (97, 131, 64, 192)]:
        y, x = np.mgrid[0:H, 0:W] + 0.5
        out = data.fit_image(torch.from_numpy(np.stack([x, y, 0 * x], -1) * 255 / max(H, W)).byte(), width, height)
        assert out.shape == (3, height, width) and out.dtype == torch.float32 and -1 <= out.min() and out.max() <= 1
        scale = max(width / W, height / H)                                          # of both axes, about the centre
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        want = torch.stack([(x + 0.5 - width / 2) / scale + W / 2, (y + 0.5 - height / 2) / scale + H / 2])
        assert ((out[:2] + 1) / 2 * max(H, W) - want)[:, 4:-4, 4:-4].abs().max() < 1 / scale + 2
    for H, W in [(1, 1), (1, 4000), (4000, 1), (10, 10000), (10000, 10), (2, 3)]:
        out = data.fit_image(torch.full((H, W, 3), 200, dtype=torch.uint8), 128, 64)
        assert out.shape == (3, 64, 128) and torch.allclose(out, torch.tensor(200 / 127.5 - 1), atol=1e-5)
    x = torch.randint(256, (64, 64, 3), dtype=torch.uint8)
    assert torch.allclose(data.fit_image(x, 64, 64), x.permute(2, 0, 1) / 127.5 - 1, atol=1e-4)     # nothing to do


def test_default_size_keeps_the_aspect_ratio_and_bounds_the_area():
    assert data.default_size(1920, 1080, 1024 * 576) == (1024, 576)
    assert data.default_size(1080, 1920, 1024 * 576) == (576, 1024)
    for area in (64 * 64, 128 * 128, 512 * 512, 1024 * 576):
        for w, h in [(1, 1), (3, 2), (4, 3), (9, 16), (10000, 10), (1, 5000), (7, 1)]:
            W, H = data.default_size(w, h, area)
            assert W % 64 == H % 64 == 0 and min(W, H) >= 64 and area / 2 <= W * H <= 2 * area, (w, h, area, W, H)
            if area >= 512 * 512 and max(w / h, h / w) <= 2:
                assert 0.85 < W / H * h / w < 1.18, (w, h, W, H)


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("name, least", [("x.mp4", 38), ("x.webm", 36), ("x.gif", 32), ("x", math.inf),
                                         ("run1.5/", math.inf)])
def test_videos_survive_a_round_trip_and_a_writer_that_fails(tmp_path, name, least):
    y, x = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    frames = torch.stack([torch.stack([3 * x + 4 * t, 5 * y, 255 - 2 * x - 2 * y + 3 * t], -1) for t in range(12)])
    frames = frames.clamp(0, 255).to(torch.uint8)
    settings, found, path = {"seed": 3, "prompt": "ü \"quoted\"", "cfg": [1.0, 3.0]}, [], f"{tmp_path}/{name}"

    def write(parts, settings):
        with data.VideoWriter(path, fps=7.5, settings=settings) as v:
            for part in parts:
                v.write(part)
    for splits in ([5, 7], [12], [1] * 12):                                         # in pieces or whole: the same
        write(frames.split(splits), settings)
        found.append(contents(tmp_path))
    assert found[0] == found[1] == found[2] and not [f for f in found[0] if ".part" in f]
    video, fps = data.read_video(path)
    assert video.shape == frames.shape and abs(fps - 7.5) < (0.2 if name == "x.gif" else 1e-6)
    assert 10 * torch.log10(255 ** 2 / (video.double() - frames.double()).square().mean()) >= least
    assert os.path.isdir(path) or torch.equal(data.read_image(path), video[0])
    assert name == "x.gif" or settings.items() <= data.read_settings(path).items()

    def interrupted():
        yield 255 - frames
        raise KeyboardInterrupt
    two_sizes = [frames, frames[:, :16]]
    for error, parts in (KeyboardInterrupt, interrupted()), (ValueError, two_sizes), (data.MediaError, []):
        with pytest.raises(error):
            write(parts, {"seed": 4})
        assert contents(tmp_path) == found[0]                                       # the older video, and no rubbish
    write([frames], None)
    assert "seed" not in (data.read_settings(path) or {})                           # older settings do not stay


def test_mp4_is_what_browsers_play(tmp_path):
    frames = torch.tensor([250, 90, 90], dtype=torch.uint8).expand(3, 63, 65, 3)    # odd: padded to even
    with data.VideoWriter(tmp_path / "x.mp4", fps=24000 / 1001) as v:
        v.write(frames)
    raw = (tmp_path / "x.mp4").read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat") and b"Lavf" not in raw
    with av.open(str(tmp_path / "x.mp4")) as c:
        s = c.streams.video[0].codec_context
        assert (s.name, s.pix_fmt, s.width, s.height) == ("h264", "yuv420p", 66, 64)
        assert s.colorspace == s.color_primaries == s.color_trc == s.color_range == 1          # bt709, limited range
        assert abs(c.streams.video[0].average_rate - 24000 / 1001) < 1e-4
    assert (data.read_video(tmp_path / "x.mp4")[0].int() - frames[0, 0, 0].int()).abs().max() <= 3
    assert data.read_settings(tmp_path / "x.mp4") is None


def test_bad_targets_are_refused_before_any_work(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.png").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder.mp4").mkdir()
    for name, fps in [("x.avi", 5), ("x.png", 5), ("photos", 5), ("file", 5), ("folder.mp4", 5), ("x.mp4", 0),
                      ("x.mp4", math.nan), ("x.gif", 60)]:
        with pytest.raises(data.MediaError):
            data.VideoWriter(tmp_path / name, fps)
    with pytest.raises(OSError):                                                    # a file where a folder is needed
        data.VideoWriter(tmp_path / "file" / "x.mp4", 5).__enter__()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder.mp4", "photos"]


# ----------------------------------------------------------------------------------------------------------------------
# data.py: videos to clips and latents


def scene(n, frames=48, size=64):
    """A camera pans over smooth noise: uint8 (T, H, W, 3)."""
    coarse = Image.fromarray(np.random.default_rng(n).integers(0, 256, (6, 12, 3), np.uint8))
    wide = np.asarray(coarse.resize((3 * size, size), Image.Resampling.BICUBIC))
    return np.stack([wide[:, 2 * t:2 * t + size] for t in range(frames)])


def write_video(path, frames, codec="libx264", rate=30, times=None, rotation=0, mirror=None, aspect=None,
                sound=None, **options):
    """frames uint8 (T, H, W, 3); times in ms; rotation in degrees; mirror: "hflip" or "vflip"; sound: "first", an audio
    stream before the video."""
    form = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le", "gif": "rgb8", "ffv1": "yuv444p"}.get(codec, "yuv420p")
    quiet = {"libx264": {"crf": "12"}, "libx265": {"x265-params": "log-level=none"},
             "libvpx-vp9": {"cpu-used": "8", "crf": "10", "b": "0"}}.get(codec, {})
    base = Fraction(1, rate) if times is None else Fraction(1, 1000)
    with av.open(str(path), "w") as c:
        audio = c.add_stream("aac", rate=44100, layout="mono") if sound else None
        s = c.add_stream(codec, rate=rate, options=quiet | options)
        s.width, s.height, s.pix_fmt = frames.shape[2], frames.shape[1], form
        s.codec_context.gop_size, s.codec_context.time_base = 12, base
        if codec.startswith(("mpeg", "mjpeg")):
            s.codec_context.qmin = s.codec_context.qmax = 2
        if rotation or mirror:
            s.set_display_rotation(rotation, **{mirror: True} if mirror else {})
        if aspect:
            s.codec_context.sample_aspect_ratio = aspect
        for x, time_stamp in zip(frames, times or itertools.count()):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(x), "rgb24").reformat(format=form)
            frame.pts, frame.time_base = time_stamp, base
            c.mux(s.encode(frame))
        c.mux(s.encode(None))
        if audio:
            beep = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            beep.sample_rate, beep.pts = 44100, 0
            c.mux([*audio.encode(beep), *audio.encode(None)])
    return path


def damage(path, number, keep=0):
    """Overwrites the body of one video packet, as a bad disk or a lossy link would."""
    with av.open(str(path)) as c:
        at, size = [(p.pos, p.size) for p in c.demux(c.streams.video[0]) if p.size][number]
    raw = bytearray(path.read_bytes())
    raw[at + keep:at + size] = bytes(size - keep)
    path.write_bytes(raw)


def open_clips(source, frames=8, size=(64, 64), **kw):
    return data.open_dataset(source, frames=frames, size=size, **kw)


def same_item(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) if k != "name" else a[k] == b[k] for k in a)


def readers(dataset, numbers):
    """Items in that order, from two forked processes."""
    return torch.utils.data.DataLoader(dataset, batch_size=None, sampler=numbers, num_workers=2,
                                       multiprocessing_context="fork", timeout=60)


CODECS = [("a.mp4", "libx264", {"bf": "3"}), ("b.webm", "libvpx-vp9", {}), ("c.avi", "mpeg4", {"bf": "2"}),
          ("d.avi", "mjpeg", {}), ("e.mkv", "libsvtav1", {"preset": "12"}), ("f.mov", "prores_ks", {}),
          ("g.ts", "mpeg2video", {"bf": "2"}), ("h.mkv", "ffv1", {}), ("i.mkv", "libx265", {}), ("l.gif", "gif", {})]


@pytest.mark.parametrize("name, codec, options", CODECS)
def test_frames_found_by_seeking_are_those_decoded_from_the_start(tmp_path, name, codec, options):
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV has no {codec} here")
    path = write_video(tmp_path / name, scene(3), codec, **options)
    entry, loss = data.scan(path), 0.1 if name == "l.gif" else 0.01
    assert entry["frames"] == 48 and entry["bad"] == 0 and entry["cuts"] == []
    assert data.frame_rate(data._times(entry)) == pytest.approx(30, rel=0.02 if name == "l.gif" else 0.002)
    whole = dict(data._numbered(path, entry, (64, 64)))
    assert list(whole) == list(range(48))
    original = torch.from_numpy(scene(3)).permute(0, 3, 1, 2) / 127.5 - 1           # in the order they were written
    assert (torch.stack(list(whole.values())) - original).square().mean() < loss
    for first in (0, 5, 11, 12, 13, 30, 40):
        clip = data.read_clip(path, entry, np.arange(first, first + 8), (64, 64))
        assert torch.equal(clip, torch.stack([whole[i] for i in range(first, first + 8)]))


def test_stride_rate_and_variable_frame_rate_go_by_presentation_time(tmp_path):
    times = np.cumsum([0] + [20, 25, 75] * 20).tolist()                            # 61 frames, 25 per second on average
    levels = 4 * np.arange(61, dtype=np.uint8)[:, None, None, None]               # the grey of a frame is its number
    write_video(tmp_path / "v.mkv", np.broadcast_to(levels, (61, 64, 64, 3)), times=times)

    def numbers(item):
        found = ((item["video"].mean((1, 2, 3)) + 1) * 127.5 / 4).round().long().tolist()
        assert item["name"] == f"v.mkv@{found[0]}"
        return found
    every = open_clips(tmp_path, frames=6, stride=3)[0]
    assert np.diff(numbers(every)).tolist() == [3] * 5 and every["fps"].item() == pytest.approx(25 / 3, rel=1e-4)
    timed = open_clips(tmp_path, frames=6, fps=12.5)
    assert sum(map(len, timed.usable["v.mkv"])) == sum(t + 400 <= times[-1] + 37.5 for t in times)
    for n in range(5):
        found = numbers(timed[n])
        first, last = times[found[0]], times[found[-1]]
        assert found == [int(np.argmin([abs(t - first - 80 * k) for t in times])) for k in range(6)]
        assert timed[n]["fps"].item() == pytest.approx(5000 / (last - first), rel=1e-4)
    assert open_clips(tmp_path, frames=20, fps=50)[0]["fps"].item() == pytest.approx(50, rel=0.1)       # some repeated


def test_the_picture_comes_out_upright_square_and_from_the_right_stream(tmp_path):
    x = np.broadcast_to(corners(64, 64), (10, 64, 64, 3))

    def read(path):
        return data.read_clip(path, data.scan(path), [3], (64, 64))[0]
    upright = read(write_video(tmp_path / "0.mp4", x))
    axis = {"hflip": [2], "vflip": [1], None: []}
    for degrees, mirror in itertools.product((0, 90, 180, 270), axis):
        want = upright.rot90(degrees // 90, (1, 2)).flip(axis[mirror])              # to the left, then mirrored
        path = write_video(tmp_path / f"{degrees}{mirror}.mp4", x, rotation=degrees, mirror=mirror)
        for image in (data.read_image(path), data.read_video(path)[0][0]):
            assert torch.allclose(image.permute(2, 0, 1) / 127.5 - 1, want, atol=0.15), (degrees, mirror)
        assert torch.allclose(read(path), want, atol=0.15)
    assert torch.equal(read(write_video(tmp_path / "sound.mp4", x, sound="first")), upright)
    bar = np.full((10, 64, 64, 3), 230, np.uint8)
    bar[:, :, 20:24] = 0                                                            # shown 128 wide, the sides cropped
    wide = write_video(tmp_path / "wide.mp4", bar, aspect=Fraction(2))
    assert data.scan(wide)["size"] == [128, 64]
    assert (read(wide).mean((0, 1)) < 0).nonzero().flatten().tolist() == list(range(8, 16))
    assert data.scan(write_video(tmp_path / "tall.mp4", x, aspect=Fraction(2), rotation=90))["size"] == [64, 128]
    with av.open(str(tmp_path / "cover.mp4"), "w") as c, av.open(str(tmp_path / "0.mp4")) as film:
        cover = c.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 256, 256, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        video = c.add_stream_from_template(film.streams.video[0])
        c.mux(cover.encode(av.VideoFrame(256, 256, "yuvj420p")))
        for packet in film.demux(film.streams.video[0]):
            if packet.size:
                packet.stream = video
                c.mux(packet)
    assert torch.equal(read(tmp_path / "cover.mp4"), upright)


def test_clips_lie_between_hard_cuts_and_fast_motion_is_no_cut(tmp_path):
    a, b = scene(0, 30), scene(1, 26)
    flash = a.copy()
    flash[15] = 255
    write_video(tmp_path / "cut.mp4", np.concatenate([a, b]))
    write_video(tmp_path / "flash.mp4", flash)
    write_video(tmp_path / "fast.mp4", np.stack([np.roll(a[0], 9 * k, 1) for k in range(30)]))
    write_video(tmp_path / "drawn.mp4", np.stack([np.roll(a[0], 5 * (k // 3), 1) for k in range(30)]))  # in threes
    dataset = open_clips(tmp_path, frames=10)
    cuts = {name: entry["cuts"] for name, entry in dataset.index.items()}
    assert cuts == {"cut.mp4": [30], "drawn.mp4": [], "fast.mp4": [], "flash.mp4": []}
    assert dataset.usable["cut.mp4"] == [range(21), range(30, 47)]
    starts = {start for name, start in (dataset._where(n, 0) for n in range(3000)) if name == "cut.mp4"}
    assert starts == {*range(21), *range(30, 47)}                                   # every start, none across the cut


@pytest.fixture
def mixed(tmp_path):
    """A folder as people have them; 24 frames in one piece are asked of it."""
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    write_video(folder / "good.mp4", scene(0))
    write_video(folder / "deep" / "vp9.webm", scene(1, 30), "libvpx-vp9")
    damage(write_video(folder / "broken.mp4", scene(2)), 24, keep=20)
    damage(write_video(folder / "broken.avi", scene(2), "mjpeg"), 24)
    write_video(folder / "short.mp4", scene(3, 12))
    write_video(folder / "still.mp4", np.repeat(scene(4, 1), 30, 0))
    write_video(folder / "no stamps.avi", scene(3), bf="3")
    write_video(folder / "bare.h264", scene(3))
    (folder / "junk.mp4").write_bytes(b"no video at all" * 99)
    (folder / "empty.mov").write_bytes(b"")
    (folder / "notes.doc").write_text("not looked at")
    whole = write_video(tmp_path / "whole.ts", scene(5), "mpeg2video").read_bytes()
    (folder / "cut off.ts").write_bytes(whole[:len(whole) * 2 // 3])
    return folder


def test_what_cannot_be_used_is_left_out_counted_and_named(mixed, tmp_path, capsys, monkeypatch):
    dataset = open_clips(mixed, frames=24, skip_static=0.002, log=tmp_path / "data.log")
    assert dataset.names == ["broken.avi", "broken.mp4", "cut off.ts", "deep/vp9.webm", "good.mp4"]
    avi, mp4 = dataset.index["broken.avi"], dataset.index["broken.mp4"]             # only a packet of theirs is lost
    assert avi["frames"] == 47 and avi["bad"] == 1 and 46 <= mp4["frames"] <= 47 and mp4["bad"] >= 1
    assert 26 <= dataset.index["cut off.ts"]["frames"] < 40
    lines = dict(line.split("\t") for line in (tmp_path / "data.log").read_text().splitlines())
    assert set(lines) == {"short.mp4", "still.mp4", "junk.mp4", "empty.mov", "no stamps.avi", "bare.h264"}
    assert lines["short.mp4"] == "too short: 12 frames, 12 of them without a cut"
    assert "ffmpeg -i \"no stamps.avi\" -crf 16 out.mp4" in lines["no stamps.avi"]
    for n in range(10):                                                             # all of them can really be read
        assert dataset[n]["video"].shape == (24, 3, 64, 64)
    check = ["data.py", "check", str(mixed), "--frames"]
    monkeypatch.setattr(sys, "argv", [*check, "24", "--skip-static", "0.002", "--size", "96x64"])
    assert data.main() == 0
    out = capsys.readouterr().out
    for words in (*dataset.left_out.values(), "5 of 11 files", "2 with damaged packets", "5 smaller than 96x64",
                  "at stride 1, 1 static, 1 too short, 2 unreadable, 2 unstamped", ", 0 cuts"):
        assert words in out, out
    monkeypatch.setattr(sys, "argv", [*check, "500"])
    assert data.main() == 1
    with pytest.raises(data.MediaError, match="7 too short.*nothing is left"):
        open_clips(mixed, frames=500)


def test_index_is_built_once_and_again_for_what_changed(mixed, tmp_path, monkeypatch):
    seen, scan = [], data.scan
    monkeypatch.setattr(data, "scan", lambda path: (seen.append(os.path.basename(path)), scan(path))[1])

    def indexed(expected):
        seen.clear()
        dataset = open_clips(mixed)
        assert len(seen) == expected if isinstance(expected, int) else seen == expected
        return dataset
    first = indexed(11)
    again = indexed(0)
    assert again.index == first.index and again[7]["name"] == first[7]["name"]
    write_video(mixed / "short.mp4", scene(6, 9))
    assert indexed(["short.mp4"]).index["short.mp4"]["frames"] == 9
    index = mixed / data.INDEX
    index.write_bytes(index.read_bytes()[:-9])                                      # cut off by a full disk
    assert indexed(1).index == indexed(0).index
    monkeypatch.setattr(os, "access", lambda path, mode: False)                     # a folder that cannot be written
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    indexed(11)
    indexed(0)
    cache = next((tmp_path / "cache").rglob("*.jsonl"))
    assert len(list((tmp_path / "cache").rglob("*"))) == 2
    cache.write_text('["a.mp4", "no pair"]\n[1]\n')                                  # JSON, and no index
    with pytest.raises(data.MediaError, match="remove it, it is made anew"):
        indexed(11)


def test_lists_name_the_same_files_as_the_folder(mixed, monkeypatch):
    monkeypatch.chdir(mixed.parent)
    assert data.list_files("videos") == data.list_files(mixed)
    names = ["good.mp4", "deep/vp9.webm", str(mixed / "broken.avi")]
    lists = {"a.txt": "\n".join(["# three", *names]), "b.csv": "\n".join(["id,path", *(f"7,{n}" for n in names)]),
             "c.csv": "\n".join(["video,caption", *(f"{n},a" for n in names)]),
             "d.json": json.dumps([{"path": n} for n in names]), "e.json": json.dumps(names)}
    for name, text in lists.items():
        (mixed / name).write_text(text)
        assert open_clips(mixed / name).names == ["broken.avi", "deep/vp9.webm", "good.mp4"]
    (mixed / "odd.json").write_text(json.dumps(["good.mp4", "nu\0l.mp4", "two\nlines.mp4", "no \udcff.mp4"]))
    log = mixed / "data.log"
    assert open_clips(mixed / "odd.json", log=log).names == ["good.mp4"] and len(log.read_text().splitlines()) == 3
    bad = {"e.json": '[{"cap": 1}]', "f.json": "[", "g.xyz": "", "h.txt": "", "i.json": "7", "j.json": "[7]",
           "k.json": "[" * 10**5, "l.csv": "a,b\ngood.mp4,7", "n.csv": f'path\n"{"x" * 200_000}"'}
    for name, text in bad.items():
        (mixed / name).write_text(text)
        with pytest.raises(data.MediaError):
            open_clips(mixed / name)
    with pytest.raises(data.MediaError, match="nowhere"):
        open_clips(mixed / "nowhere")


def test_items_depend_on_seed_and_number_alone(mixed):
    dataset = open_clips(mixed, stride=2, size=(64, 48))
    items = [dataset[n] for n in range(12)]
    assert items[0]["video"].shape == (8, 3, 48, 64) and items[0]["aug_noise"].shape == (3, 48, 64)
    assert all(v.dtype == torch.float32 for k, v in items[0].items() if k != "name")
    order = [item["name"].split("@")[0] for item in items]
    assert sorted(order[:6]) == sorted(order[6:]) == dataset.names and order[:6] != order[6:]
    assert all(same_item(a, items[n]) for a, n in zip(readers(dataset, [11, 3, 0, 7]), [11, 3, 0, 7]))
    assert same_item(pickle.loads(pickle.dumps(dataset))[5], items[5])
    assert [open_clips(mixed, seed=1)[n]["name"] for n in range(6)] != [open_clips(mixed)[n]["name"] for n in range(6)]
    moved = mixed.rename(mixed.with_name("moved"))                                  # names decide, not places
    assert same_item(open_clips(moved, stride=2, size=(64, 48))[4], items[4])


def test_synthetic_clips_are_those_of_the_world():
    clips = open_clips("synthetic", frames=5, size=(64, 48), seed=2)
    video, fps, motion = world.clip(2, 3, 5, 64)
    item = clips[3]
    assert torch.equal(item["video"][4], data.fit_image(video[4], 64, 48)) and item["aug_noise"].shape == (3, 48, 64)
    assert item["fps"] == torch.tensor(fps) and item["motion"] == torch.tensor(motion)
    assert same_item(item, pickle.loads(pickle.dumps(clips))[3]) and not torch.equal(item["video"], clips[4]["video"])
    assert open_clips("synthetic", motion="9")[0]["motion"] == 9 and data.check("synthetic") > 0
    with pytest.raises(data.MediaError, match="stride"):
        open_clips("synthetic", stride=2)


def test_videos_that_change_while_they_are_read_cost_a_line_and_another_clip(mixed, tmp_path):
    log = tmp_path / "data.log"
    first, second = (open_clips(mixed, frames=24, log=log) for rank in range(2))
    before, lines = [first[n] for n in range(18)], log.read_text().splitlines()
    os.remove(mixed / "good.mp4")
    write_video(mixed / "broken.mp4", scene(7))                                     # another one
    whole = (mixed / "still.mp4").read_bytes()
    (mixed / "still.mp4").write_bytes(whole[:len(whole) // 2])
    gone = {"good.mp4", "broken.mp4", "still.mp4"}
    for n, item in enumerate(readers(first, range(18))):
        lost = before[n]["name"].split("@")[0] in gone
        assert item["name"].split("@")[0] not in gone and lost != same_item(item, before[n])
        assert same_item(item, second[n])                                           # whoever asks for it
    added = log.read_text().splitlines()[len(lines):]
    assert {line.split("\t")[0] for line in added} == gone and len(added) >= 9 and len(set(added)) == len(added)
    for path in list(mixed.rglob("*.*")):
        if path.is_file():
            os.remove(path)
    with pytest.raises(data.MediaError, match=f"^{mixed}"):                         # one line, even from a reader
        list(readers(first, [0]))


def test_motion_and_its_buckets_are_exvideos():
    x = torch.rand(9, 3, 16, 16) * 2 - 1
    assert data.motion_score(x) == pytest.approx(x.std(0).mean().item(), rel=1e-5) and data.motion_score(x[:1]) == 0
    published = [t / 1e9 for t in data.EXVIDEO_MOTION]                              # as in the release's JSON:
    assert [published[i] for i in (0, 1, 40, 90, 127)] == [0, 0.012205946, 0.087700523, 0.198099136, 0.440871328]
    assert len(published) == 128 and published == sorted(published)
    for i, t in enumerate(published):
        assert data.motion_bucket(t) == i and data.motion_bucket(np.nextafter(t, -1)) == max(0, i - 1)
    assert data.motion_bucket(9.0) == 127 and data.motion_bucket(0.2, "64") == 64
    draws = torch.stack([data.draw_condition(0, "a.mp4", n, (8, 8))[0] for n in range(4000)]).log()
    assert draws.mean().item() == pytest.approx(-3, abs=0.03) and draws.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    """A model file so small that encoding a frame takes a millisecond."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    exsvd.save_model(str(path), exsvd.UNet(exsvd.UNetConfig((8, 8, 8, 8), (1, 1, 1, 1), 16, 4, 8)),
                     exsvd.VAE(exsvd.VAEConfig((8, 8, 8, 8), 4)),
                     exsvd.ImageEncoder(exsvd.CLIPConfig(32, 1, 2, 28, 16, 56)))
    return path


SETTINGS = {"frames": 6, "size": (64, 64), "stride": 2, "seed": 3}


def test_training_from_disk_sees_what_training_on_the_fly_sees(mixed, tmp_path, coder):
    svd = exsvd.load(str(coder), parts=("vae", "clip"))
    for name in ("broken.mp4", "cut off.ts", "still.mp4", "broken.avi"):            # damage looks other after a seek
        os.remove(mixed / name)
    by_rate = SETTINGS | {"fps": 13.0}                                              # the same by time stamps
    for dtype, bound, settings in ((torch.float32, 0, SETTINGS), (torch.float32, 0, by_rate),
                                   (torch.float16, 3e-4, SETTINGS), (torch.bfloat16, 3e-3, SETTINGS)):
        video, out = data.open_dataset(mixed, **settings), tmp_path / f"{dtype}{len(settings)}"
        data.encode(str(coder), mixed, out, dtype, **settings)
        latent = data.open_dataset(out, **settings)
        assert not latent.pixels and latent.names == video.names
        for n in range(12):
            a, b = video[n], latent[n]
            cond, ctx = data.encode_condition(svd.vae, svd.clip, a["video"][0], a["aug"], a["aug_noise"])
            wanted = {"latents": data.encode_frames(svd.vae, a["video"]), "cond": cond, "ctx": ctx}
            assert all(rel(b[k], x) <= bound and b[k].dtype == torch.float32 for k, x in wanted.items())
            assert all(torch.equal(b[k], a[k]) for k in ("fps", "motion", "aug")) and a["name"] == b["name"]
    for change in ({"size": (64, 72)}, {"frames": 5}, {"stride": 1}, {"fps": 5.0}):
        with pytest.raises(data.MediaError, match="was encoded with"):
            data.open_dataset(out, **SETTINGS | change)
    assert data.open_dataset(out, **SETTINGS | {"frames": 4, "motion": "100"})[0]["motion"] == 100        # one for all
    for path in out.rglob("*.safetensors"):
        os.remove(path)
    with pytest.raises(data.MediaError, match="encode again"):
        data.open_dataset(out, **SETTINGS)[0]


def test_encoding_goes_on_where_it_was_stopped(mixed, tmp_path, coder, capsys, monkeypatch):
    def run(out, *more):
        argv = ["data.py", "encode", "--model", str(coder), "--data", str(mixed), "--out", str(out), *more]
        monkeypatch.setattr(sys, "argv", [*argv[:2], "--frames", "6", "--size", "64x64", *argv[2:]])
        return data.main()

    def stopped(tensors, path, metadata):
        if len(list(tmp_path.rglob("*.safetensors"))) == 3:
            with open(path, "wb") as f:
                f.write(b"half of it")
            raise KeyboardInterrupt
        save_file(tensors, path, metadata)
    with monkeypatch.context() as m:
        m.setattr(exsvd, "save_file", stopped)
        assert run(tmp_path / "latents") == 130
    finished = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert len(finished) == 3 and run(tmp_path / "latents") == 0
    assert all(p.stat().st_mtime_ns == t for p, t in finished.items())              # they are left alone
    assert run(tmp_path / "at once") == 0
    assert contents(tmp_path / "latents") == contents(tmp_path / "at once")         # and nothing else is left behind
    assert run(tmp_path / "latents", "--seed", "5") == 1
    assert re.search("latents: was begun with seed 0, not 5", capsys.readouterr().err)
    store = tmp_path / "latents" / data.STORE
    lines = store.read_text().split("\n", 1)
    for damaged in (lines[1], f"{lines[0]}\n[1]\n{lines[1]}"):                       # no settings; what is no pair
        store.write_text(damaged)
        assert run(tmp_path / "latents") == 1 and store.read_text() == damaged
        assert "encode into another folder" in capsys.readouterr().err
    assert run(tmp_path / "none", "--frames", "0") == 1 and not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        run(tmp_path / "none", "--size", "64")
    assert "write it as WIDTHxHEIGHT" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# sample.py


def gaussian_denoiser(mean, std):
    """The ideal D(x; sigma) where the data are N(mean, std^2)."""
    return lambda x, sigma: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


def sampled(name, denoise, x, sigmas, eta=0.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return sample.SAMPLERS[name](denoise, x, sigmas, eta, lambda: torch.randn(x.shape, generator=generator).to(x))


@pytest.mark.parametrize("name, eta", [*((name, 0.0) for name in sample.SAMPLERS), ("ddim", 1.0)])
def test_samplers_hit_a_gaussian_and_what_is_held(name, eta):
    x, known = torch.randn(2, 1, 5, 4, 25, 40).double()
    sigmas, ideal = exsvd.karras_sigmas(400).double(), gaussian_denoiser(1.5, 0.5)
    start = x * (sigmas[0] ** 2 + 0.5**2).sqrt() + 1.5
    before = start.clone()
    free = sampled(name, ideal, start, sigmas, eta)
    assert torch.equal(start, before), "the sampler changed its input"
    assert abs(free.mean() - 1.5) < 0.02 and abs(free.std() - 0.5) < 0.02, (free.mean(), free.std())

    mask, levels = torch.tensor([1, 1, 0, 0, 1]).bool(), []

    def spy(x, sigma):
        levels.append((x - known)[:, mask].std() / sigma)  # the noise that a held frame carries
        return ideal(x, sigma)

    out = sampled(name, sample.held(spy, known, mask.double()), start, sigmas, eta)
    assert torch.allclose(out[:, mask], known[:, mask], atol=1e-4) and all(0.6 < level < 1.4 for level in levels)
    assert torch.allclose(out[:, ~mask], free[:, ~mask], atol=1e-5)


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpm++", 2)])
def test_order_of_a_sampler(name, order):
    x, error = torch.tensor([8.0]).double(), {}
    for steps in (40, 80):
        sigmas = torch.logspace(1, -1, steps + 1).double()
        exact = 1.5 + (x - 1.5) * ((0.1**2 + 0.5**2) / (10**2 + 0.5**2)) ** 0.5  # the probability flow ODE, solved
        error[steps] = (sampled(name, gaussian_denoiser(1.5, 0.5), x, sigmas) - exact).abs().item()
    assert 0.9 < math.log2(error[40] / error[80]) / order < 1.1, error


def test_align_your_steps():
    sigmas, finer = sample.ays_sigmas(10), sample.ays_sigmas(20)
    assert torch.equal(sigmas, torch.tensor([*sample.AYS[:-1], 0.0])) and torch.allclose(finer[::2], sigmas)
    assert torch.allclose(finer[1::2] ** 2, sigmas[:-1] * torch.tensor(sample.AYS[1:])), "means of the logarithms"
    for steps in (1, 3, 25):
        sigmas = sample.ays_sigmas(steps)
        assert len(sigmas) == steps + 1 and sigmas[0] == 700 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_eta_replaces_noise_by_fresh_noise():
    x, sigmas, D = torch.randn(3, 4), exsvd.karras_sigmas(10), gaussian_denoiser(0.3, 1.0)
    runs = ((0.5, 5), (1.0, 5), (1.0, 5), (1.0, 6))
    a, b, c, other = (sampled("ddim", D, x * 700, sigmas, eta, seed) for eta, seed in runs)
    assert torch.equal(b, c) and not torch.allclose(a, b) and not torch.allclose(b, other)


@pytest.mark.parametrize("block, h, w", [(8, 16, 24), (3, 16, 16)])
def test_shared_noise_is_standard_normal_in_every_frame(block, h, w):
    noise = torch.randn(60, 8, 4, h, w)
    before, shared = noise.clone(), sample.shared_noise(noise, block)
    assert torch.equal(noise, before) and sample.shared_noise(noise, 0) is noise
    assert torch.allclose(shared[:, 0], noise[:, 0], atol=1e-5)
    for y, x in itertools.product(range(0, h, block), range(0, w, block)):
        means = shared[..., y:y + block, x:x + block].mean((-2, -1))  # of a last block that sticks out: what is inside
        assert torch.allclose(means, means[:, :1].expand_as(means), atol=1e-5)
    power = torch.fft.fft2(shared).abs().square() / (h * w)                               # white: 1 at every frequency
    for frame in (0, 3, 7):
        x = shared[:, frame]
        assert abs(x.mean()) < 4 / x.numel() ** 0.5 and abs(x.var() - 1) < 4 * (2 / x.numel()) ** 0.5
        assert (power[:, frame].mean((0, 1)) - 1).abs().max() < 5.5 / 240**0.5            # deviation of a mean of 240
    between = (shared[:, 0] * shared[:, 7]).mean()                                        # the covariance of frames
    assert abs(between - (-(-h // block) * -(-w // block)) / (h * w)) < 4 / (240 * h * w) ** 0.5


def test_guidance_goes_linearly_over_the_frames(monkeypatch):
    calls, x = [], torch.zeros(1, 5, 4, 2, 2)
    told = torch.ones(1, 1, 4, 2, 2), torch.ones(1, 1, 8), torch.tensor([[6.0, 127, 0.02]])

    def fake(unet, x, sigma, image_latents, ctx, ids):
        calls.append((bool(image_latents.any()), bool(ctx.any())))
        assert torch.equal(ids, told[2])  # without the image too
        return torch.full_like(x, 1.0 if ctx.any() else 0.5)

    monkeypatch.setattr(exsvd, "denoise", fake)
    for cfg, interval, passes in (
            ((1.0, 3.0), None, 2), ((1.0, 1.0), None, 1), ((1.5, 1.0), None, 2), ((0.0, 1.0), None, 2),
            ((0.0, 0.0), None, 2), ((1.0, 3.0), (0.5, 1.0), 2), ((1.0, 3.0), (1.0, 2.0), 1),
            ((1.0, 3.0), (0.2, 0.5), 1), ((1.0, 3.0), (0.5, 2.0), 2)):
        calls.clear()
        D = sample.guided(None, *told, cfg, 5, interval)(x, torch.tensor(1.0))[0, :, 0, 0, 0]
        assert torch.allclose(D, 0.5 + 0.5 * torch.linspace(*cfg, 5) if passes == 2 else torch.ones(5)), (cfg, interval)
        assert calls == [(True, True), (False, False)][:passes], "guidance of 1 must not cost a second pass"


def test_time_reversal_fusion_ends_with_each_image():
    a, b, x = torch.randn(3, 1, 5, 4, 2, 2)
    backward = Mock(return_value=b)
    D = sample.fused(lambda x, sigma: a, backward, 5)(x, 1.0)
    assert torch.equal(backward.call_args.args[0], x.flip(1))
    assert torch.equal(D[:, 0], a[:, 0]) and torch.equal(D[:, -1], b[:, 0])
    assert torch.allclose(D[:, 1], 0.75 * a[:, 1] + 0.25 * b[:, 3])
    same = sample.fused(lambda x, sigma: 2 * x, lambda x, sigma: 2 * x, 5)(x, 1.0)
    assert torch.allclose(same, 2 * x)


def test_rounds_of_a_long_video():
    assert sample.rounds(8, 20, 2) == [(0, 8)] and sample.rounds(20, 20, 2) == [(0, 20)]
    assert sample.rounds(21, 20, 2) == [(0, 20), (1, 21)]
    assert sample.rounds(45, 20, 4) == [(0, 20), (16, 36), (25, 45)]


def test_adjust_matches_frames_and_raises_contrast():
    gain, bias = (torch.linspace(*ends, 6).view(1, -1, 1, 1, 1) for ends in ((0.5, 2), (-1, 1)))
    z = torch.randn(1, 6, 4, 8, 8) * gain + bias
    s = {"match_stats": True, "contrast": 1.2, "keyframes": []}
    out = sample.adjust(z, s)
    assert torch.allclose(out.mean((2, 3, 4)), z.mean().expand(1, 6) * 1.2, atol=1e-5)
    assert torch.allclose(out.std((2, 3, 4)), z.std().expand(1, 6) * 1.2, rtol=1e-4)
    given = sample.adjust(z, s | {"keyframes": [2, 9]})
    assert torch.equal(given[:, 2], z[:, 2] * 1.2) and torch.equal(given[:, 3:], out[:, 3:])
    assert torch.equal(sample.adjust(z, s | {"match_stats": False, "contrast": 1.0}), z)


class Frames:
    """Stands in for the VAE where only the cutting matters: a frame's pixels are its latents, whatever is decoded with
    it, but for the outermost frames of what is decoded at once, which are off by `edges`."""

    def __init__(self, fail_at=(), edges=0):
        self.calls, self.fail_at, self.edges = [], fail_at, edges

    def decode(self, z):
        self.calls.append(z.shape[1])
        if len(self.calls) in self.fail_at:
            raise torch.OutOfMemoryError("injected")
        frames = z[:, :, :3].clone()
        frames[:, [0, -1]] += self.edges
        return frames


def counting(T):
    """Latents that say which frame they are."""
    return torch.arange(T).float().view(1, T, 1, 1, 1).expand(-1, -1, 4, 2, 2)


@pytest.mark.parametrize("T, chunk", [(1, 8), (7, 8), (8, 8), (9, 8), (40, 8), (41, 16), (25, 1), (25, 3), (128, 14)])
def test_chunks_cover_every_frame_once_in_order(T, chunk):
    z, vae = counting(T), Frames()
    before = z.clone()
    pieces = list(sample.decode(vae, z, chunk))
    assert torch.allclose(torch.cat(pieces), z[0, :, :3], atol=1e-4) and torch.equal(z, before)
    assert max(map(len, pieces)) <= chunk  # memory does not grow with the video
    if chunk >= 6:  # the outermost frames of a chunk saw padding where there are frames: nothing of them is left
        frames = torch.cat(list(sample.decode(Frames(edges=100), z, chunk)))
        assert torch.allclose(frames[1:-1], z[0, 1:-1, :3], atol=1e-4)
    # all at once where that is possible; never a short last chunk, whose norms would see fewer frames
    assert vae.calls == [T] if T <= chunk else set(vae.calls) == {chunk}


@pytest.mark.parametrize("fail_at", [(1,), (3,), (3, 4), (2, 3, 4), (3, 6)])
def test_out_of_memory_halves_the_chunk_and_goes_on(fail_at, capsys):
    z, vae = counting(60), Frames(fail_at)
    assert torch.allclose(torch.cat(list(sample.decode(vae, z, 16))), z[0, :, :3], atol=1e-4)
    assert vae.calls[-1] == 16 // 2 ** len(fail_at) and capsys.readouterr().err.count("out of memory") == len(fail_at)
    with pytest.raises(torch.OutOfMemoryError):
        list(sample.decode(Frames([1]), z, 1))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [8, 16])
def test_seams_do_not_show(chunk):
    """The mean change from frame to frame beside that of the whole decode: at the seams as elsewhere, to 2 % in the
    mean of three flights and to 0.05 of 255 in each."""
    vae = exsvd.load(os.path.join(HERE, "assets", "toy.safetensors"), parts=("vae",)).vae
    overlap, ratios = 4, []
    for number in range(3):
        z = vae.encode(world.flight(world.picture(9, number), world.scales(60, world.FPS, 48), 64))[None]
        whole, pieces = vae.decode(z)[0], list(sample.decode(vae, z, chunk))
        video, seam = torch.cat(pieces), torch.zeros(47, dtype=torch.bool)
        for begin in np.cumsum([len(p) for p in pieces])[:-1]:
            seam[begin - 1:begin + overlap] = True  # every change that involves a blended frame
        change, true = ((x[1:] - x[:-1]).abs().mean((1, 2, 3)) * 127.5 for x in (video, whole))
        ratios.append((change / true)[seam].mean() / (change / true)[~seam].mean())
        excess = (change - true)[seam].mean()
        psnr = 10 * torch.log10(4 / (video - whole).square().mean())
        print(f"chunk {chunk}: change at the seams x {ratios[-1]:.3f} of elsewhere, {excess:+.3f} of 255; "
              f"PSNR against the whole decode {psnr:.1f} dB")                     # see it with -s
        assert psnr > 50 and abs(excess) < 0.05
    assert abs(torch.stack(ratios).mean() - 1) <= 0.02, ratios


# --- the command, on a small model with random weights


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    exsvd.save_model(path, exsvd.UNet(exsvd.UNetConfig((16, 32, 32, 32), (1, 1, 1, 1), 16, 8, 8)),
                     exsvd.VAE(exsvd.VAEConfig((8, 16, 16, 16), 8)),
                     exsvd.ImageEncoder(exsvd.CLIPConfig(32, 1, 2, 56, 16)), family="toy")
    return str(path)


@pytest.fixture(scope="module")
def small_vae(small):
    return exsvd.load(small, parts=("vae",)).vae.requires_grad_(False)


@pytest.fixture(scope="module")
def extensions(small, tmp_path_factory):
    """-> (our own extension to 20 frames, the same without metadata as the ExVideo release is)"""
    own, release = (str(tmp_path_factory.mktemp("extension") / "e.safetensors") for _ in range(2))
    exsvd.save_extension(own, exsvd.extend(exsvd.load(small, parts=("unet",)).unet, 20))
    save_file(load_file(own), release)
    return own, release


@pytest.fixture
def pictures(tmp_path):
    paths = [str(tmp_path / name) for name in ("first.png", "second.png")]
    for number, path in enumerate(paths):
        data.write_png(path, world.clip(0, number, 1, 96)[0][0])
    return paths


@pytest.fixture
def make(small, pictures, tmp_path):
    """make(flags) -> the path of what sample.py made: from the first picture with the small model, in one step of
    64x64 pixels, where the flags don't say otherwise."""

    def make(*flags, images=pictures[:1], name="a.mp4"):
        defaults = {"--model": small, "--out": tmp_path / name}
        if "--decode-only" not in flags:
            defaults |= {"--steps": 1, "--size": "64x64"}
        rest = [word for flag, value in defaults.items() if flag not in flags for word in (flag, value)]
        sample.main([*map(str, [*images, *flags, *rest])])
        return tmp_path / name

    return make


def spied(monkeypatch, module, name):
    """-> a Mock that does what the function does, and has its calls"""
    spy = Mock(wraps=getattr(module, name))
    monkeypatch.setattr(module, name, spy)
    return spy


def oracle(monkeypatch, *clips):
    """From now on the model sees the first of these latents, then the second, ... in whatever it is shown. -> lists of
    what it will be shown, (x, sigma), and of the image latents that it will be told"""
    shown, told, clips = [], [], iter(clips)

    def guided(unet, image_latents, *_):
        told.append(image_latents)
        z = next(clips)

        def denoise(*x_and_sigma):
            shown.append(x_and_sigma)
            return z
        return denoise

    monkeypatch.setattr(sample, "guided", guided)
    return shown, told


def latents_of(out):
    return load_file(sample.latents_path(str(out)))["latents"]


def floats(frames):
    """uint8 (T,H,W,3) -> float32 (T,3,H,W) in [-1,1]"""
    return frames.permute(0, 3, 1, 2) / 127.5 - 1


def test_video_from_an_image(make, monkeypatch, capsys):
    """Guided in an interval of noise levels."""
    denoise, threads = spied(monkeypatch, exsvd, "denoise"), spied(monkeypatch, torch, "set_num_threads")
    out = make("--steps", 6, "--cfg", 2, 2, "--cfg-interval", 0.1, 10)
    sigmas, asked = exsvd.karras_sigmas(6)[:-1].tolist(), [call.args[2].item() for call in denoise.call_args_list]
    assert sorted(asked) == sorted(sigmas + [s for s in sigmas if 0.1 < s <= 10]) and 6 < len(asked) < 12
    video, fps = data.read_video(out)
    assert video.shape == (8, 64, 64, 3) and fps == 8
    settings = data.read_settings(out)
    assert [settings[key] for key in ("frames", "steps", "seed", "cfg_interval")] == [8, 6, 0, [0.1, 10]]
    assert not any("/" in str(value) for value in settings.values()), "a path, which says where somebody works"
    text = capsys.readouterr().out
    assert "s to sample" in text and "s to decode" in text and "at the peak" in text
    threads.assert_called_once_with(1)  # two that wait for each other are slower than one, on networks this small
    for name in ("a.webm", "a.gif"):
        out = make("--frames", 3, name=name)
        assert data.read_video(out)[0].shape == (3, 64, 64, 3)
        assert name == "a.gif" or data.read_settings(out)["frames"] == 3


@pytest.mark.parametrize("schedule, sampler, eta", [
    ("karras", "euler", 0), ("karras", "heun", 0), ("karras", "ddim", 1), ("karras", "dpm++", 0), ("ays", "dpm++", 0),
    ("ays", "ddim", 0)])
def test_what_the_model_says_comes_out(make, small_vae, extensions, monkeypatch, schedule, sampler, eta):
    """It is asked once a step (by heun twice, but in the last), at the schedule's noise levels."""
    z = torch.randn(1, 20, 4, 8, 8)
    shown, _ = oracle(monkeypatch, z)
    out = make("--extension", extensions[0], "--schedule", schedule, "--sampler", sampler, "--eta", eta, "--steps", 4,
               "--decode-chunk", 20, name="frames")
    levels = {"ays": sample.ays_sigmas(4), "karras": exsvd.karras_sigmas(4)}[schedule][:-1]
    if sampler == "heun":
        levels = levels.repeat_interleave(2)[1:]
    assert torch.equal(torch.stack([sigma for _, sigma in shown]), levels)
    assert torch.allclose(latents_of(out), z, atol=1e-4)
    expected = sample.to_pixels(small_vae.decode(z / exsvd.VAE_SCALE)[0])
    assert (data.read_video(out)[0].int() - expected.int()).abs().max() <= 1
    settings = data.read_settings(out)
    assert [settings[key] for key in ("schedule", "sampler", "eta", "steps")] == [schedule, sampler, eta, 4]


def test_offload_has_one_stage_on_the_device_and_changes_nothing(make, monkeypatch):
    moves, to = [], torch.nn.Module.to

    def spy(self, where):
        moves.append((type(self).__name__, str(where)))
        return to(self, where)

    monkeypatch.setattr(torch.nn.Module, "to", spy)
    assert make(name="plain.mp4").read_bytes() == make("--offload", name="offload.mp4").read_bytes()
    out_and_back = [(n, "cpu") for stage in (["ImageEncoder", "VAE"], ["UNet"], ["VAE"]) for n in stage * 2]
    assert moves == out_and_back + [move for move in out_and_back if move[0] != "UNet"], "offloaded, it is a Stream's"

    moves.clear()
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, where: moves.append(str(where)))
    with sample.on_device(torch.device("meta"), torch.nn.Linear(2, 2)):
        assert moves == ["meta"]
    assert moves == ["meta", "cpu"], "home is where it was"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_really_moves(make, small):
    svd = exsvd.load(small)
    with torch.inference_mode(), sample.on_device(torch.device("cuda"), svd.unet):
        assert svd.unet.conv_out.weight.is_cuda
    assert not svd.unet.conv_out.weight.is_cuda and not svd.unet.conv_out.weight.is_inference()
    make("--offload", "--device", "cuda")


@pytest.mark.parametrize("flags, expected", [
    ("", {"sampler": "ddim", "eta": 1.0, "match_stats": False, "contrast": 1.0}),
    ("--eta 0.5", {"sampler": "ddim", "eta": 0.5}),
    ("--sampler ddim", {"sampler": "ddim", "eta": 0.0}),
    ("--sampler heun", {"sampler": "heun", "eta": 0.0}),
    ("--sampler euler --eta 0.5", {"sampler": "euler", "eta": 0.5}),
    ("--extension {own}", {"match_stats": False, "contrast": 1.0}),
    ("--extension {release}", {"match_stats": True, "contrast": 1.2}),
    ("--extension {release} --no-match-stats --contrast 1.1", {"match_stats": False, "contrast": 1.1})])
def test_defaults_and_flags(make, extensions, flags, expected):
    """The toy's sampler is ddim with eta 1; a sampler that is named adds no noise, unless --eta says so. Only the
    published extension is corrected."""
    own, release = extensions
    settings = data.read_settings(make("--frames", 4, *flags.format(own=own, release=release).split()))
    assert settings == settings | expected


def test_warnings_off_the_trained_range(make, pictures, capsys):
    make("--frames", 1, "--fps", 100, "--motion", 90, images=pictures, name="{name}.mp4")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1].strip(",") for line in warnings] == ["64x64", "fps", "motion"], "one line each, once"
    for flags, warning in (
            ("--frames 1 --size 128x128 --fps 8 --motion 20", None),
            ("--frames 1 --size 256x64", "256x64, but toy was trained on 128x128"),  # of the area, but too wide
            ("--frames 9 --size 128x128", "warning: 9 frames, but"),
            ("--frames 9 --size 128x128 --native 9", None), ("--frames 9 --size 128x128 --overlap 1", None)):
        make(*flags.split())
        said = capsys.readouterr().err
        assert warning in said if warning else "warning" not in said, flags


def test_latents_survive_a_failing_decoder(make, tmp_path, monkeypatch):
    whole = make(name="whole.mp4")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="shape"):
        patch.setattr(exsvd.VAE, "decode", lambda *_: torch.zeros(1).view(2))
        make(name="lost.mp4")
    assert not (tmp_path / "lost.mp4").exists()
    again = make("--decode-only", tmp_path / "lost.latents.safetensors", images=(), name="lost.mp4")
    assert again.read_bytes() == whole.read_bytes()


ZEROS, NO_LATENTS = torch.zeros(1, 2, 4, 8, 8), "no latents saved by sample.py"
SAVED = {"family": "toy", "frames": 2, "width": 64, "height": 64, "fps": 8, "dtype": "float32", "decode_chunk": 2,
         "match_stats": False, "contrast": 1}


@pytest.mark.parametrize("flag", ["--decode-only", "--video"])
@pytest.mark.parametrize("latents, settings, words", [
    (ZEROS, {}, NO_LATENTS), (ZEROS, [1], NO_LATENTS), (ZEROS, {"frames": 2, "width": 64, "height": 64}, NO_LATENTS),
    (ZEROS[0], SAVED, NO_LATENTS), (ZEROS * math.nan, SAVED, "not finite"),
    (ZEROS, SAVED | {"family": "SVD"}, "give its --model")])
def test_latents_that_cannot_be_used(make, tmp_path, flag, latents, settings, words):
    exsvd.save(tmp_path / "saved.safetensors", {"latents": latents}, {"settings": settings})
    with pytest.raises(exsvd.WeightsError, match=words):
        make(flag, tmp_path / "saved.safetensors", images=())


def test_names_of_outputs():
    outs = ["a/b.1.mp4", "a/b.2.mp4", "b.1/", "b.2/", "b"]
    assert len({sample.latents_path(out) for out in outs}) == len(outs)
    assert sample.latents_path("a/b.mp4") == "a/b.latents.safetensors"
    jobs = sample.parse(["a.png", "--seeds", "2", "--out", "frames.d/"]).jobs
    assert [out for _, _, out in jobs] == ["frames.d-0/", "frames.d-1/"], "seeds of a folder are folders"


def test_the_toy_that_ships(tmp_path):
    names = "toy.safetensors", "toy-exvideo.safetensors", "img.png"
    toy, tuned, image = (os.path.join(HERE, "assets", name) for name in names)
    assert os.path.getsize(toy) + os.path.getsize(tuned) < 24e6
    sample.main([image, "--model", toy, "--extension", tuned, "--out", str(tmp_path / "frames")])
    frames, fps = data.read_video(tmp_path / "frames")
    picture = data.fit_image(data.read_image(image), world.PICTURE, world.PICTURE)
    m = measure.measure(floats(frames), picture, sample.DEFAULTS["toy"]["motion"], fps)
    assert len(frames) == 40 and 0.85 < m["arrival"] < 1.15 and m["rms"] < 0.08 and m["back"] < 0.03, measure.show(m)
    assert 0.6 < m["flicker"] < 1.5 and min(m["psnr"]) > 22, measure.show(m)


def test_default_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "HERE", str(tmp_path))

    def chosen(model=None, extension=None):
        paths = sample.default_model(argparse.Namespace(model=model, extension=extension))
        return tuple(path and os.path.relpath(path, tmp_path) for path in paths)

    assert chosen() == ("assets/toy.safetensors", "assets/toy-exvideo.safetensors")
    assert "using the toy model" in capsys.readouterr().err
    assert chosen(model=tmp_path / "m") == ("m", None)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/svd_xt.safetensors").touch()
    assert chosen() == ("weights/svd_xt.safetensors", None)
    (tmp_path / "weights/exvideo.safetensors").touch()
    assert chosen() == ("weights/svd_xt.safetensors", "weights/exvideo.safetensors")
    assert chosen(extension=tmp_path / "e") == ("weights/svd_xt.safetensors", "e") and not capsys.readouterr().err


def test_a_batch(make, pictures, tmp_path, monkeypatch, capsys):
    """Seeds, a bad image, latents that overflow, what is there already, shares of the work, and a model that is loaded
    once."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    load, made, make_latents = spied(monkeypatch, exsvd, "load"), [], sample.make_latents

    def overflows_first(*args):
        made.append(args)
        return make_latents(*args) * (math.nan if len(made) == 1 else 1)

    monkeypatch.setattr(sample, "make_latents", overflows_first)
    flags = "--frames", 2, "--size", "128x64", "--seed", 3, "--seeds", 2
    outs = [tmp_path / f"{name}-{seed}.mp4" for name in ("first", "second") for seed in (3, 4)]
    with pytest.raises(data.MediaError, match="3 of 6 videos were not made: .*first-3.mp4, .*bad-3.mp4, .*bad-4.mp4"):
        make(*flags, images=(pictures[0], bad, pictures[1]), name="{name}.mp4")
    errors = capsys.readouterr().err
    assert f"sample.py: {bad}: " in errors and f"sample.py: {outs[0]}: the latents are not" in errors
    assert sorted(tmp_path.glob("*.mp4")) == outs[1:] and load.call_count == 1
    make(*flags, name="{name}.mp4")
    assert sorted(tmp_path.glob("*.mp4")) == outs and len({out.read_bytes() for out in outs}) == 4
    assert data.read_video(outs[0])[0].shape == (2, 64, 128, 3) and data.read_settings(outs[1])["seed"] == 4

    before = outs[3].read_bytes()
    outs[3].unlink()
    make(*flags, "--shard", "0/2", images=pictures, name="{name}.mp4")
    assert not outs[3].exists(), "seed 4 of the second is the other shard's"
    capsys.readouterr()
    make(*flags, "--shard", "1/2", images=pictures, name="{name}.mp4")
    assert outs[3].read_bytes() == before and "first-4.mp4: is there" in capsys.readouterr().out
    make(*flags, "--shard", "3/4", "--overwrite", images=pictures, name="{name}.mp4")
    assert outs[3].read_bytes() == before and load.call_count == 4, "once where a video is made, else not at all"


def test_longer_than_the_table_in_rounds(make, extensions, monkeypatch):
    clips, condition = torch.randn(3, 1, 20, 4, 8, 8), spied(monkeypatch, sample, "condition")
    oracle(monkeypatch, *clips)
    out = make("--extension", extensions[0], "--frames", 45, "--overlap", 4, "--decode-chunk", 45, name="frames")
    expected = torch.zeros(1, 45, 4, 8, 8)  # common frames fade from one round to the next
    for clip, start, shared in zip(clips, (0, 16, 25), (0, 4, 11)):
        weight = torch.cat([torch.linspace(1, 0, shared + 1)[:-1], torch.zeros(20 - shared)]).view(1, 20, 1, 1, 1)
        expected[:, start:start + 20] = torch.lerp(clip, expected[:, start:start + 20], weight)
    assert torch.allclose(latents_of(out), expected, atol=1e-4)
    video, (_, *later) = floats(data.read_video(out)[0]), [call.args[1] for call in condition.call_args_list]
    # a round is told of its own first frame, as the model was trained
    assert len(video) == 45 and [(video - img).square().mean((1, 2, 3)).argmin() for img in later] == [16, 25]


def test_rounds_and_key_frames_of_published_weights(make, small_vae, extensions, pictures, monkeypatch):
    """Every frame is matched to the others and gets 1.2 times the contrast: a later round is told of the frame that a
    viewer sees, and a key frame comes out as its picture is, also when it is decoded with another contrast."""
    clips = torch.randn(2, 1, 20, 4, 8, 8)
    _, told = oracle(monkeypatch, *clips)
    out = make("--extension", extensions[1], "--frames", 24, "--overlap", 8, "--keyframe", f"14={pictures[0]}")
    z, settings = latents_of(out), data.read_settings(out)
    encoded = small_vae.encode(data.fit_image(data.read_image(pictures[0]), 64, 64)[None])
    assert torch.allclose(sample.adjust(z, settings)[:, 14] / exsvd.VAE_SCALE, encoded, atol=1e-4)
    clips[0][:, 14] = z[:, 14]
    assert torch.allclose(told[1], sample.adjust(clips[0], settings)[:, 4:5] / exsvd.VAE_SCALE, atol=1e-4)
    write_video = spied(monkeypatch, sample, "write_video")
    make("--decode-only", sample.latents_path(str(out)), "--contrast", 1, images=())
    _, z, settings, _ = write_video.call_args.args
    assert settings["contrast"] == 1
    assert torch.allclose(sample.adjust(z, settings)[:, 14] / exsvd.VAE_SCALE, encoded, atol=1e-4)


def test_an_end_and_key_frames(make, small_vae, extensions, pictures, monkeypatch):
    a, b = torch.randn(2, 1, 8, 4, 8, 8)
    oracle(monkeypatch, a, b)
    condition = spied(monkeypatch, sample, "condition")
    out = make("--end", pictures[1], "--keyframe", f"3={pictures[1]}")
    expected = torch.lerp(a, b.flip(1), torch.linspace(0, 1, 8).view(1, 8, 1, 1, 1))
    first, last = (data.fit_image(data.read_image(path), 64, 64) for path in pictures)
    expected[:, 3] = small_vae.encode(last[None]) * exsvd.VAE_SCALE
    assert torch.allclose(latents_of(out), expected, atol=1e-5) and data.read_settings(out)["keyframes"] == [3]
    assert [torch.equal(call.args[1], img) for call, img in zip(condition.call_args_list, (first, last))] == [True] * 2

    condition.reset_mock()  # in rounds, the last of them alone knows the end
    clips = torch.randn(3, 1, 20, 4, 8, 8)
    oracle(monkeypatch, *clips)
    out = make("--extension", extensions[0], "--frames", 24, "--overlap", 4, "--end", pictures[1])
    images = [call.args[1] for call in condition.call_args_list]
    assert len(images) == 3 and torch.equal(images[0], first) and torch.equal(images[2], last)
    z = latents_of(out)
    assert torch.allclose(z[:, 0], clips[0][:, 0], atol=1e-5) and torch.allclose(z[:, -1], clips[2][:, 0], atol=1e-5)

    oracle(monkeypatch, a)
    z = latents_of(make("--keyframe", f"3={pictures[1]}", "--contrast", 1.2))
    assert torch.allclose(1.2 * z[:, 3], expected[:, 3], atol=1e-5), "contrast is for what the model made"


@pytest.mark.parametrize("strength, steps", [(0.5, 2), (1, 4), (0, 1)])
def test_a_video_is_refined_from_where_the_strength_says(make, small_vae, pictures, monkeypatch, strength, steps):
    first = make("--frames", 8, name="first.mp4")
    (video, fps), latents = data.read_video(first), latents_of(first)
    encoded = data.encode_frames(small_vae, floats(video))[None] * exsvd.VAE_SCALE
    decoded = sample.to_pixels(small_vae.decode(latents / exsvd.VAE_SCALE)[0])
    sigma = exsvd.karras_sigmas(4)[-1 - steps]
    noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    condition = spied(monkeypatch, sample, "condition")
    for source, z, frames in ((first, encoded, video), (sample.latents_path(str(first)), latents, decoded)):
        shown, _ = oracle(monkeypatch, torch.zeros(1, 4, 4, 8, 8))
        out = make("--video", source, "--strength", strength, "--steps", 4, "--share-noise", 0, "--seed", 5,
                   "--frames", 4, images=(), name="refined.mp4")
        img = condition.call_args.args[1]
        assert (img - data.fit_image(frames[0], 64, 64)).abs().max() < 0.01, "told of another than its first frame"
        assert len(shown) == steps and shown[0][1] == sigma
        assert torch.allclose(shown[0][0], z[:, [0, 2, 5, 7]] + sigma * noise, rtol=1e-4, atol=1e-3)
        refined, its_fps = data.read_video(out)
        assert refined.shape == (4, 64, 64, 3) and its_fps == fps / 2, "it lasts as long as the video did"
    oracle(monkeypatch, torch.zeros(1, 8, 4, 8, 8))
    make("--video", source, images=pictures[1:], name="refined.mp4")
    assert torch.equal(condition.call_args.args[1], data.fit_image(data.read_image(pictures[1]), 64, 64))
    with pytest.raises(data.MediaError, match="latents are of 64x64"):
        make("--video", source, "--size", "128x128")


def test_refinement_by_published_weights_begins_as_the_video_looks(make, small_vae, extensions, monkeypatch):
    """From the video and from its latents alike: what they show, less the contrast that is put on in the end. All 24
    frames are made, in two rounds, at their own rate."""
    release = "--extension", extensions[1]
    oracle(monkeypatch, *torch.randn(2, 1, 20, 4, 8, 8))
    first = make(*release, "--frames", 24, name="first.mp4")
    (video, fps), seen = data.read_video(first), sample.adjust(latents_of(first), data.read_settings(first))
    encoded = data.encode_frames(small_vae, floats(video))[None] * exsvd.VAE_SCALE
    noise = torch.randn(1, 20, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for source, z in ((sample.latents_path(str(first)), seen), (first, encoded)):
        shown, _ = oracle(monkeypatch, *torch.zeros(2, 1, 20, 4, 8, 8))
        out = make("--video", source, *release, "--strength", 0, "--steps", 9, "--share-noise", 0, images=(),
                   name="refined.mp4")
        x, sigma = shown[0]
        assert torch.allclose(x, z[:, :20] / 1.2 + sigma * noise, rtol=1e-4, atol=1e-3)
        refined, its_fps = data.read_video(out)
        assert len(shown) == 2 and len(refined) == 24 and its_fps == fps
        assert data.read_settings(out)["overlap"] == 2, "an eighth of a round"


def test_a_video_to_refine_keeps_its_size(small, tmp_path):
    """Whatever the size of IMAGE; latents also where they are wider than what is chosen for pictures."""
    svd, large = exsvd.load(small), torch.zeros(200, 300, 3, dtype=torch.uint8)
    a = sample.parse(["large.png", "--video", "a.mp4", "--out", str(tmp_path / "refined.mp4")])
    for width, height in ((128, 64), (320, 64)):
        video = sample.Video(torch.zeros(2, 4, height // 8, width // 8), 8, None)
        s = sample.settings_of(a, "toy", svd, large, 0, video)
        assert (s["width"], s["height"]) == (width, height)


def test_out_of_memory_names_what_helps_in_order(small, pictures, monkeypatch):
    monkeypatch.setattr(sample, "make_latents", Mock(side_effect=torch.OutOfMemoryError("injected")))
    with pytest.raises(SystemExit) as exit:
        sample.command([pictures[0], "--model", small])
    flags = re.findall(r"--[a-z-]+", exit.value.code)
    assert flags[:4] == ["--dtype", "--dtype", "--offload", "--frames"] and "--decode-only" in flags


def test_text_to_video_by_the_snippet(small, tmp_path, monkeypatch):
    """The very lines of README.md, with a pipeline of random weights in place of the real one."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(  # of bytes, whose tokenizer needs no files
        vocab_size=384, eos_token_id=1, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2))
    unet = diffusers.UNet2DConditionModel(
        8, block_out_channels=(32,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=32)
    pipeline = diffusers.StableDiffusionPipeline(
        diffusers.AutoencoderKL(block_out_channels=(32,)), text, transformers.ByT5Tokenizer(model_max_length=77), unet,
        diffusers.DDIMScheduler(), None, None, requires_safety_checker=False)
    on_cuda = Mock()  # there is no cuda, and two steps will do
    on_cuda.to = lambda device: functools.partial(pipeline, num_inference_steps=2)
    monkeypatch.setattr(diffusers.AutoPipelineForText2Image, "from_pretrained", lambda name, torch_dtype: on_cuda)
    monkeypatch.setattr(sample, "default_model", lambda a: (small, None))
    monkeypatch.setitem(sample.DEFAULTS, "toy", sample.DEFAULTS["toy"] | {"steps": 1, "size": (64, 64)})
    monkeypatch.chdir(tmp_path)
    with open(os.path.join(HERE, "README.md")) as file:
        blocks = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
    snippet, loop = (next(block for block in blocks if words in block) for words in ("from diffusers", "VBench"))
    exec(snippet, {})
    assert data.read_video("out/lighthouse.mp4")[0].shape == (8, 64, 64, 3)
    assert data.read_image("lighthouse.png").shape == (8, 8, 3)

    before = snippet[:snippet.index("text_to_image(")]  # section 4.1 of the paper: the loop over VBench's prompts
    prompts = ["a beach, watercolor painting", "a table."]
    (tmp_path / "VBench_full_info.json").write_text(json.dumps([{"prompt_en": p} for p in [*prompts, prompts[0]]]))
    exec(before + loop, {})
    images = sorted(tmp_path.glob("a *.png"))
    assert [image.name for image in images] == [f"{p}-{seed}.png" for p in prompts for seed in range(5)]
    assert len({image.read_bytes() for image in images}) == 10
    sample.main([*map(str, images[:2]), "--frames", "1", "--out", "videos/{name}.mp4"])
    assert sorted(os.listdir("videos"))[1::2] == [f"{prompts[0]}-{seed}.mp4" for seed in (0, 1)]


OVERWRITTEN = "would be overwritten: choose another --out"


@pytest.mark.parametrize("args, words", [
    *((f"{{picture}} {flags}", words) for flags, words in (
        ("--size 100x64", "multiples of 64"), ("--size big", "WIDTHxHEIGHT"), ("--size 64x64x64", "WIDTHxHEIGHT"),
        ("--sampler heun --eta 0.5", "--sampler ddim"), ("--eta 2", "at most 1"), ("--strength 0", "only with"),
        ("--strength 2", "at most 1"), ("--frames 0", "at least 1"), ("--frames 1.5", "a whole number"),
        ("--fps nan", "at least 1"), ("--cfg nan 1", "at least 0"), ("--cfg-interval 2 1", "LOW must be below"),
        ("--frames 9 --overlap 8", "less than a round"), ("--keyframe 8={picture}", "the frames 0 to 7"),
        ("--keyframe c.png", "NUMBER=IMAGE"), ("--keyframe 1=a.png --keyframe 1=b.png", "two images"),
        ("--end missing.png", "missing.png"), ("--video missing.mp4", "missing.mp4"),
        ("{picture} --video missing.mp4", "one video"), ("{picture}", "same file"), ("--shard 2/2", "I/N"),
        ("--device nonsense", "--device nonsense"), ("--device meta", "--device meta"), ("--out a.xyz", ".mp4"),
        ("--out {picture}/a.mp4", "cannot be written to"), ("--extension {model}", "not an extension"),
        ("--model missing.safetensors", "no such weight file"), ("--model {picture}", "not a complete safetensors"),
        ("--end a.mp4 --out a.mp4", OVERWRITTEN), ("--keyframe 1=a.mp4 --out a.mp4", OVERWRITTEN),
        (f"--seed {10**30}", "below"))),
    ("a.mp4 --out a.mp4", OVERWRITTEN), ("f/frame_0000.png --out f/", OVERWRITTEN),
    ("--video a.mp4 --out a.mp4", OVERWRITTEN), ("--video a.mp4 --out a.gif", OVERWRITTEN),
    ("--video a.latents.safetensors --out a.webm", OVERWRITTEN),
    ("", "at least one image"), ("missing.png", "missing.png"), ("--video {picture}", "holds a single picture"),
    ("--decode-only {model}", "no latents"), ("--decode-only a.safetensors --motion 0", "leave out --motion"),
    ("--decode-only a.safetensors --shard 1/2", "leave out --shard")])
def test_bad_input_is_one_line_and_a_failure(args, words, small, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = args.format(picture=pictures[0], model=small).split()
    if "--model" not in args:
        args += ["--model", small]
    with pytest.raises(SystemExit) as exit:
        sample.command(args)
    last = exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err
    assert exit.value.code not in (0, None) and words in last.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*.mp4")) and not list(tmp_path.glob("out/*"))


def test_the_script_runs_where_deepspeed_is_not_installed(small, pictures, tmp_path):
    code = "import runpy, sys; sys.modules['deepspeed'] = None; runpy.run_path('sample.py', run_name='__main__')"
    for name, returncode in (("a.mp4", 0), ("a.xyz", 1)):
        flags = ["--model", small, "--frames", "2", "--steps", "1", "--size", "64x64", "--out", str(tmp_path / name)]
        p = subprocess.run([sys.executable, "-c", code, pictures[0], *flags], cwd=HERE, capture_output=True, text=True)
        assert p.returncode == returncode and "Traceback" not in p.stderr, p.stderr
        assert p.stderr.startswith("sample.py: ") == (returncode == 1)
    assert data.read_video(tmp_path / "a.mp4")[0].shape == (2, 64, 64, 3)


# ----------------------------------------------------------------------------------------------------------------------
# 5. train.py: real runs on a model small enough for a step to take a moment. One rank runs in this process; what is
#    killed, or has several ranks, is started as a user starts it.


def launch(*args, ranks=1, wait=True, script="train.py", launcher=(sys.executable,), **options):
    """-> CompletedProcess, or Popen without wait. All that is started is in one process group, of the returned pid."""
    if ranks > 1:
        deepspeed = os.path.join(os.path.dirname(sys.executable), "deepspeed")
        launcher = deepspeed, "--num_accelerators", ranks, "--master_port", free_port()
    command = [*map(str, [*launcher, os.path.join(HERE, script), *args])]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}, **options)
    if not wait:
        return p
    output, _ = p.communicate()
    return subprocess.CompletedProcess(command, p.returncode, output)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train_here(*args):
    """train.py on one rank, in this process. SystemExit where it exits with a line."""
    import deepspeed
    handlers = {number: signal.getsignal(number) for number in train.STOP_SIGNALS}
    with patch.dict(os.environ):  # main() sets there what a launcher would
        try:
            train.main([str(a) for a in ("--workers", 0, "--sample-every", 0, *args)])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if train.dist.is_initialized():
                deepspeed.comm.destroy_process_group()


def log_of(out):
    with open(out / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def untimed(out):
    """The rows of log.csv without what differs from run to run."""
    timing = ("seconds_per_step", "frames_per_second", "peak_memory_GB")
    return [{key: value for key, value in row.items() if key not in timing} for row in log_of(out)]


def flat(out, step, key, groups=2):
    """What the ranks hold of a flat fp32 tensor in a state, joined, one per group. Zeros fill up the last part."""
    files = sorted((out / f"state-{step:08d}").glob("rank-*.safetensors"), key=lambda path: int(path.stem[5:]))
    parts = [load_file(path) for path in files]
    return [torch.cat([part[f"{group}.{key}"] for part in parts]) for group in range(groups)]


def same_state(out, other, step=4):
    """Bit for bit, on any numbers of ranks, and so with any numbers of zeros at the end."""
    for key in ("master", "average", "exp_avg", "exp_avg_sq"):
        for a, b in zip(flat(out, step, key), flat(other, step, key)):
            n = min(len(a), len(b))
            if not torch.equal(a[:n], b[:n]) or a[n:].any() or b[n:].any():
                return False
    return True


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder as people have it: good files, and one of each kind that troubles a loader."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "good.mp4", scene(0))
    write_video(folder / "broken.mp4", scene(1))
    damage(folder / "broken.mp4", 20)
    write_video(folder / "short.mp4", scene(2, 5))
    write_video(folder / "variable.mp4", scene(3), times=np.cumsum([20 + 17 * (i % 3) for i in range(48)]).tolist())
    write_video(folder / "cut.mp4", np.concatenate([scene(4, 24), scene(5, 24)]))
    write_video(folder / "rotated.mp4", scene(6), rotation=90)
    write_video(folder / "sound.mp4", scene(7), sound="first")
    return folder


FAST = ("--size", "64x64", "--frames", 10, "--log-every", 1)
OPTIONS = (*FAST, "--steps", 4, "--save-every", 1, "--keep", 9, "--lr", 1e-3)
TWO = (*OPTIONS, "--workers", 1, "--sample-every", 0)  # with readers of their own


@pytest.fixture(scope="module")
def two_ranks(small, videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("two_ranks")
    p = launch("--model", small, "--data", videos, "--out", out, *TWO, ranks=2)
    assert p.returncode == 0, p.stdout
    return out, p.stdout


@pytest.fixture(scope="module")
def one_rank(small, videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_rank")
    train_here("--model", small, "--data", videos, "--out", out, *OPTIONS)
    return out


def extended(small, frames=10):
    return exsvd.extend(exsvd.load(small, parts=("unet",)).unet, frames)


def test_two_ranks_train_on_real_videos(two_ranks):
    out, text = two_ranks
    rows = log_of(out)
    assert [int(r["step"]) for r in rows] == [1, 2, 3, 4] and [int(r["videos"]) for r in rows] == [2, 4, 6, 8]
    assert all(0 < float(r["loss"]) < 10 and float(r["grad_norm"]) > 0 for r in rows)
    assert "1 too short" in text and "short.mp4" in (out / "data.log").read_text()
    assert json.loads((out / "run.json").read_text())["deepspeed"]["zero_optimization"]["stage"] == 2
    assert (out / "source" / "exsvd.py").read_bytes() == open(exsvd.__file__, "rb").read()


@pytest.mark.parametrize("ranks", [1, 2])
def test_average_is_its_closed_form_and_sharding_changes_nothing(ranks, small, two_ranks, one_rank):
    out, unet = one_rank if ranks == 1 else two_ranks[0], extended(small)
    trained = train.choose(train.Loss(unet, None, "edm"), "temporal")[1]
    groups = [group["params"] for group in train.parameter_groups(trained)]
    average = [torch.cat([p.detach().flatten() for p in group]) for group in groups]  # unsharded, from all masters
    for step in range(1, 5):
        decay = min(0.9999, (1 + step - 1) / (10 + step - 1))                         # the first step is number 0
        masters = [m[:len(a)] for m, a in zip(flat(out, step, "master"), average)]
        assert not any(torch.equal(m, a) for m, a in zip(masters, average))
        average = [decay * a + (1 - decay) * m for m, a in zip(masters, average)]
        for ours, theirs in zip(flat(out, step, "average"), average):
            assert torch.allclose(ours[:len(theirs)], theirs, rtol=1e-5, atol=1e-7)
    # gathered: the file holds it, in 16 bits, every tensor under its name
    names = {id(p): name for name, p in unet.named_parameters()}
    saved = load_file(out / "exvideo-000004.safetensors")
    for group, whole in zip(groups, flat(out, 4, "average")):
        for p, tensor in zip(group, whole[:sum(p.numel() for p in group)].split([p.numel() for p in group])):
            [file_name] = exsvd.file_names(unet, "exvideo")[names[id(p)]]
            assert torch.equal(saved[file_name].flatten(), tensor.half()), file_name


def test_only_temporal_blocks_learn_and_all_of_them(small, one_rank):
    start, file = extended(small).state_dict(), one_rank / "exvideo-000004.safetensors"
    svd = exsvd.load(small, file)
    assert svd.unet.max_frames == 10 and svd.extension["step"] == 4 and svd.extension["native_frames"] == 8
    idle = ("attn2.to_q.weight", "attn2.to_k.weight", "norm2.weight", "norm2.bias")
    for name, p in svd.unet.named_parameters():
        was = start[name].half().float() if ".attn.temporal." in name else start[name]
        assert torch.equal(p, was) != (".attn.temporal." in name and not name.endswith(idle)), name
    assert set(load_file(file)) == {f for names in exsvd.file_names(svd.unet, "exvideo").values() for f in names}


def test_weight_decay_spares_norms_biases_tables_and_the_identity_convolution(small, tmp_path):
    train_here("--model", small, "--out", tmp_path, *FAST, "--steps", 1, "--lr", 1e-3, "--warmup", 0,
               "--weight-decay", 100)
    start = dict(extended(small).named_parameters())
    for name, p in exsvd.load(small, tmp_path / "exvideo-000001.safetensors").unet.named_parameters():
        if ".attn.temporal." in name and not exsvd.IDLE.search(name):
            exempt = p.ndim == 1 or "frame_table" in name or "frame_conv" in name
            decay = 0 if exempt else 0.9 * 1e-3 * 100                  # of the average: 0.1 old, 0.9 new
            moved = p - (1 - decay) * start[name]
            assert moved.abs().max() < 0.9 * 1.01e-3 + 1e-3 * p.abs().max(), name    # Adam's first step is at most lr


KILLED = """
import os, signal, sys, train
rename = os.rename
def die(source, target):
    if target.endswith("state-00000003"):
        os.killpg(0, signal.SIGKILL)  # launcher, ranks and readers
    rename(source, target)
os.rename = die
train.main()
"""


def test_killed_while_saving_and_resumed_is_as_if_nothing_happened(small, videos, two_ranks, tmp_path):
    straight, run = two_ranks[0], tmp_path / "run"
    args = ("--model", small, "--data", videos, "--out", run, *TWO, "--log-every", 3)
    (tmp_path / "killed.py").write_text(KILLED)
    p = launch(*args, ranks=2, script=tmp_path / "killed.py")
    assert p.returncode == -signal.SIGKILL, p.stdout
    assert list(run.glob("saving-00000003.tmp")) and not (run / "state-00000003").exists()
    text = launch(*args, ranks=2).stdout
    assert "state-00000002: step 2" in text, text
    assert not list(run.glob("*.tmp")) and same_state(straight, run)
    ours, theirs = (load_file(out / "exvideo-000004.safetensors") for out in (run, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    # rows of three steps, the first of which was interrupted: what was summed before the kill is not lost
    (three, _), every = log_of(run), log_of(straight)
    mean = sum(float(row["loss"]) for row in every[:3]) / 3
    assert three["step"] == "3" and float(three["loss"]) == pytest.approx(mean, abs=2e-5)
    assert untimed(run)[-1] == untimed(straight)[3]


RESAVED = """
import sys, train
load, out = train.Shards.load, sys.argv.pop()
def load_and_save(shards, paths, saved):
    load(shards, paths, saved)
    shards.save(f"{out}/rank-{shards.rank}.safetensors")
train.Shards.load = load_and_save
train.main()
"""


def test_a_run_goes_on_with_another_number_of_ranks(small, videos, two_ranks, tmp_path):
    """2 -> 3 -> 1: what each loads, joined, is bit for bit what the one before saved. No video is seen twice."""
    (tmp_path / "resaved.py").write_text(RESAVED)
    out, videos_seen = tmp_path / "run", 8
    shutil.copytree(two_ranks[0], out)
    for step, ranks in ((4, 3), (5, 1)):
        loaded = tmp_path / f"state-{step:08d}"
        loaded.mkdir()
        p = launch("--model", small, "--data", videos, "--out", out, *TWO, "--steps", step + 1, loaded, ranks=ranks,
                   script=tmp_path / "resaved.py")
        assert p.returncode == 0 and f"{videos_seen} videos seen" in p.stdout, p.stdout
        assert same_state(out, tmp_path, step)
        videos_seen += ranks
        assert int(log_of(out)[-1]["videos"]) == videos_seen


def test_a_damaged_state_is_passed_over(small, videos, one_rank, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(one_rank, out)
    state = out / "state-00000004"
    tensors, info = state / "rank-0.safetensors", state / "state.json"
    good, text = tensors.read_bytes(), info.read_bytes()
    assert train.read_state(state, 0, 1)["step"] == 4
    for file, damaged in ((info, text[1:]), (info, text.replace(b'"videos": 4', b'"videos": 5')), (info, None),
                          (tensors, good[:-100]), (tensors, None),
                          (tensors, good[:9999] + bytes([good[9999] ^ 1]) + good[10000:])):
        info.write_bytes(text)
        file.unlink(missing_ok=True)
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(OSError):
            train.read_state(state, 0, 1)
    args = ("--model", small, "--data", videos, "--out", out, *OPTIONS)
    train_here(*args)
    said = capsys.readouterr()
    assert "state-00000004 is damaged" in said.err and "state-00000003: step 3" in said.out
    assert same_state(one_rank, out) and not list(out.glob("damaged-*"))
    for file in out.glob("state-*/state.json"):
        file.unlink()
    with pytest.raises(SystemExit, match="no state in .* is undamaged"):
        train_here(*args)


def test_a_full_disk_costs_saves_and_nothing_else(small, one_rank, videos, tmp_path, monkeypatch, capsys):
    """No room before step 2, and none in the middle of writing step 3: both are tried again, nothing is lost."""
    args = ("--model", small, "--data", videos, "--out", tmp_path, *OPTIONS, "--keep", 1)
    has_disk_space, rename, there = train.has_disk_space, os.rename, []

    def states():
        return [p.name for p in tmp_path.glob("state-*")]

    def full_at_step_2(folder, need):
        there.append(states())
        return has_disk_space(folder, need) and len(there) != 2

    def full_at_step_3(source, target):
        if target.endswith("state-00000003"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as full:
        full.setattr(train, "has_disk_space", full_at_step_2)
        full.setattr(train.os, "rename", full_at_step_3)
        train_here(*args)
    assert there == [[], ["state-00000001"], ["state-00000001"], ["state-00000001"]]
    err = capsys.readouterr().err
    assert "step 2 could not be saved" in err and "step 3 could not be saved" in err and "LAST SAVE FAILED" in err
    assert states() == ["state-00000004"] and not list(tmp_path.glob("*.tmp")) and same_state(one_rank, tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit, match="step 5 could not be saved .* What was saved before is still there"):
        train_here(*args, "--steps", 5)
    assert "which has room for 1.0 MB" in capsys.readouterr().err, "said at the start already"
    assert states() == ["state-00000004"]


def test_what_a_run_folder_keeps(small, tmp_path, monkeypatch, capsys):
    """The last states, weights and samples, those of every third step too, and nothing of runs that came to nothing. A
    sample that cannot be written ends no run. Within a run lr may change, but not --drop."""
    args = ("--model", small, "--out", tmp_path, *FAST, "--frames", 2, "--save-every", 1, "--sample-every", 1,
            "--keep-every", 3, "--warmup", 0)
    (tmp_path / "progress").mkdir()  # of a run that ended before its first state
    data.write_png(tmp_path / "progress" / "000007.png", torch.zeros(64, 64, 3, dtype=torch.uint8))
    train_here(*args, "--steps", 1, "--lr", 1e-4)
    assert sorted(os.listdir(tmp_path / "progress")) == ["000000.png", "000001.png"]
    (tmp_path / "model-000001.safetensors.1.tmp").write_bytes(b"half")
    (tmp_path / "saving-00000002.tmp").mkdir()
    save_sample = train.save_sample

    def fail_at_2(a, family, step, *rest):
        if step == 2:
            raise data.MediaError("cannot be written")
        return save_sample(a, family, step, *rest)

    monkeypatch.setattr(train, "save_sample", fail_at_2)
    train_here(*args, "--steps", 5, "--lr", 1e-5)
    said = capsys.readouterr().out
    assert "there is no sample of step 2" in said
    most = 1e6 * float(re.search(r"weights of ([\d.]+) MB", said)[1])
    assert most / 2 < os.path.getsize(tmp_path / "model-000005.safetensors") <= most, "whole models"
    assert [float(row["lr"]) for row in log_of(tmp_path)] == [1e-4] + 4 * [1e-5]
    kept = {"state-*": [4, 5], "*.safetensors*": [3, 4, 5], "sample-*": [0, 3, 4, 5], "*.tmp": []}
    for pattern, steps in kept.items():
        assert sorted(int(re.search(r"\d+", p.name)[0]) for p in tmp_path.glob(pattern)) == steps, pattern
    with pytest.raises(SystemExit, match=r"drop 0.0 \(now 0.5\)"):
        train_here(*args, "--steps", 6, "--drop", 0.5)


def test_a_signal_saves_and_leaves(small, videos, tmp_path):
    """To every process, as a terminal, Slurm and launch.py send it: readers too, without which no step would end."""
    assert {signal.SIGTERM, signal.SIGUSR1} <= set(train.STOP_SIGNALS)
    p = launch("--model", small, "--data", videos, "--out", tmp_path, *TWO, "--frames", 8, "--steps", 10000,
               "--save-every", 10000, ranks=2, wait=False)
    while not (tmp_path / "log.csv").exists() or len(log_of(tmp_path)) < 2:
        assert p.poll() is None, p.communicate()[0]
        time.sleep(0.05)
    os.killpg(p.pid, signal.SIGTERM)
    p.communicate(timeout=100)
    state, = tmp_path.glob("state-*")
    assert int(state.name[6:]) == int(log_of(tmp_path)[-1]["step"])


def start_nodes(*args):
    """Two nodes of a rank each, on this machine."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, "--master_addr",
                "127.0.0.1", "--master_port", free_port(), "--node_rank")
    return [launch(*args, launcher=(*launcher, rank), wait=False) for rank in range(2)]


def nodes_at_work(out, *args):
    """-> one node, all processes of the other, and that one itself, when they have saved two states."""
    node, other = start_nodes(*args)
    while not (out / "state-00000002").exists():
        assert node.poll() is None and other.poll() is None, node.communicate()[0]
        time.sleep(0.05)
    return node, [psutil.Process(other.pid), *psutil.Process(other.pid).children(recursive=True)], other


def test_a_silent_node_ends_the_other(small, videos, tmp_path):
    """Stopped, as without power or network: no connection breaks, and collectives would wait for hours."""
    args = ("--model", small, "--data", videos, "--out", tmp_path, *TWO, "--steps", 1000, "--lost-after", 10)
    node, stopped, other = nodes_at_work(tmp_path, *args)
    for p in stopped:
        p.suspend()
    begin, words = time.monotonic(), "nothing was heard of rank"
    text = node.communicate(timeout=120)[0]
    assert time.monotonic() - begin < 60
    for p in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):
            p.kill()
    other.communicate()
    assert node.returncode != 0 and words in text and "line " not in text.split(words)[1].split("\n")[0], text


def test_one_clip_is_overfitted_and_samples_show_it(small, tmp_path, monkeypatch):
    """Everything trains, CLIP too, and samples are made with the average of CLIP."""
    (tmp_path / "one").mkdir()
    write_video(tmp_path / "one" / "clip.mp4", scene(3, 4))
    seen, condition = [], sample.condition

    def spy(svd, *args):
        seen.append(svd.clip.proj.clone())
        return condition(svd, *args)

    monkeypatch.setattr(sample, "condition", spy)
    train_here("--model", small, "--data", tmp_path / "one", "--out", tmp_path / "run", *FAST, "--frames", 4,
               "--train", "all", "--steps", 100, "--log-every", 25, "--save-every", 100, "--sample-every", 50,
               "--lr", 2e-3, "--drop", 0)
    rows = log_of(tmp_path / "run")
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"]), rows
    svd, start = exsvd.load(tmp_path / "run" / "model-000100.safetensors"), exsvd.load(small)
    assert svd.meta["family"] == "toy" and svd.unet.max_frames is None
    assert torch.equal(svd.vae.quant_conv.weight, start.vae.quant_conv.weight.half().float())
    assert len(seen) == 3 and torch.equal(seen[0], start.clip.proj.bfloat16()) and not torch.equal(seen[0], seen[2])
    assert torch.allclose(seen[2].float(), svd.clip.proj, rtol=2**-8, atol=1e-6)
    assert data.read_video(tmp_path / "run" / "sample-000100.mp4")[0].shape == (4, 64, 64, 3)
    assert data.read_image(tmp_path / "run" / "progress.png").shape == (3 * 64, 4 * 64, 3)


def test_training_from_latents_is_training_from_videos(small, videos, one_rank, tmp_path):
    latents = tmp_path / "latents"
    data.encode(small, videos, latents, torch.float32, frames=10, size=(64, 64))
    train_here("--model", small, "--data", latents, "--out", tmp_path / "run", *OPTIONS, "--sample-every", 4)
    assert [row["loss"] for row in log_of(one_rank)] == [row["loss"] for row in log_of(tmp_path / "run")]
    assert data.read_image(tmp_path / "run" / "progress.png").shape == (2 * 64, 9 * 64, 3)


def test_accumulated_passes_are_one_large_batch(small, tmp_path):
    """Four videos a step in one pass and in four: the same loss and, to rounding of 16 bits, the same gradient."""
    rows, moments = [], []
    for batch in (4, 1):
        out = tmp_path / str(batch)
        train_here("--model", small, "--out", out, *FAST, "--steps", 2, "--batch", batch, "--accumulate", 4 // batch,
                   "--warmup", 4, "--lr", 1e-3)
        rows.append(log_of(out))
        moments.append(torch.cat(flat(out, 2, "exp_avg")))
    assert [row["videos"] for row in rows[1]] == ["4", "8"] and [float(row["lr"]) for row in rows[0]] == [2.5e-4, 5e-4]
    assert [float(r["loss"]) for r in rows[1]] == pytest.approx([float(r["loss"]) for r in rows[0]], rel=0.01)
    close(moments[1], moments[0], 0.02, "first moments")


def test_optimiser_on_the_cpu(small, one_rank, videos, tmp_path):
    """--offload: DeepSpeed's own AdamW, whose step is a number; a run may go there and back. Its bucket is as large as
    what trains, or as the user says; then here gradients go through a full bucket, through a new one, or past it."""
    (tmp_path / "config.json").write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    args = ("--model", small, "--data", videos, "--out", tmp_path, *OPTIONS)
    train_here(*args, "--steps", 2, "--offload", "--deepspeed_config", tmp_path / "config.json")
    ours, theirs = (json.loads((out / "run.json").read_text())["deepspeed"] for out in (one_rank, tmp_path))
    padding = sum(map(len, flat(one_rank, 2, "master"))) - ours["zero_optimization"]["reduce_bucket_size"]
    assert 0 <= padding < 8 and theirs["zero_optimization"]["reduce_bucket_size"] == 1000
    for key in ("exp_avg", "master"):  # later the last bits of the masters decide how weights are rounded
        for ours, theirs in zip(flat(tmp_path, 1, key), flat(one_rank, 1, key)):
            close(ours, theirs, 1e-6, key)
    train_here(*args, "--steps", 3)
    train_here(*args, "--offload")
    assert int(log_of(tmp_path)[-1]["step"]) == 4
    for ours, theirs in zip(flat(tmp_path, 4, "master"), flat(one_rank, 4, "master")):
        close(ours, theirs, 1e-3, "masters")


def test_passes_of_two_lengths_and_the_native_one(small, tmp_path, monkeypatch):
    def lengths(seed, share):
        clips = train.TwoLengths("L" * 400, "S" * 400, share, seed, 4)
        return [clips[n] for n in range(400)]

    drawn = lengths(0, 0.3)
    assert drawn == lengths(0, 0.3) != lengths(1, 0.3) and 0.15 < drawn.count("S") / 400 < 0.45
    assert all(len(set(drawn[i:i + 4])) == 1 for i in range(0, 400, 4)), "a pass of two lengths"
    assert lengths(0, 0) == ["L"] * 400 and lengths(0, 1) == ["S"] * 400

    # a base of 6 frames whose file does not say so
    draw, threads = spied(monkeypatch, train, "draw"), spied(monkeypatch, torch, "set_num_threads")
    train_here("--model", small, "--native", 6, "--out", tmp_path, *FAST, "--steps", 5, "--lr", 0, "--short-clips", 0.5)
    wanted = train.TwoLengths([10] * 5, [6] * 5, 0.5, 0, 1)
    seen = [call.args[2][0] for call in draw.call_args_list]
    assert seen == [wanted[n] for n in range(5)] and set(seen) == {10, 6}
    assert threads.call_args_list[0].args == (1,)
    svd = exsvd.load(small, tmp_path / "exvideo-000005.safetensors", parts=("unet",))
    assert svd.extension["native_frames"] == 6
    for block in svd.unet.temporal_blocks():  # the fold walks over the positions the base knows, and no others
        rows = exsvd.sinusoid(torch.tensor(exsvd.fold_positions(6, 10)), block.frame_table.shape[1])
        assert torch.equal(block.frame_table, rows.half().float())


def test_monitors_get_loss_lr_and_motion_score(small, tmp_path, monkeypatch):
    """By --deepspeed_config, what log.csv says: in TensorBoard's event file, where that is installed, and at W&B, of
    which a stand-in drops what W&B drops."""
    wandb, curves, last = Mock(), {}, [0]

    def log(values, step, commit):
        if step >= last[0]:  # "Steps must be monotonically increasing, so this data will be ignored"
            last[0] = step
            for name, value in values.items():
                curves.setdefault(name, []).append((step, value))

    wandb.log = log
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = {"wandb": {"enabled": True}}
    with contextlib.suppress(ImportError):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        config["tensorboard"] = {"enabled": True, "output_path": str(tmp_path), "job_name": "board"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    train_here("--model", small, "--out", tmp_path / "run", *FAST, "--steps", 2, "--sample-every", 2, "--batch", 2,
               "--deepspeed_config", tmp_path / "config.json")
    logged = log_of(tmp_path / "run")
    for name, column in (("train/loss", "loss"), ("train/lr", "lr")):
        assert curves[name] == [(int(row["videos"]), pytest.approx(float(row[column]), abs=1e-5)) for row in logged]
    assert [videos for videos, _ in curves["sample/motion_score"]] == [0, 4]
    assert all(score > 0 for _, score in curves["sample/motion_score"])
    if "tensorboard" in config:
        board = EventAccumulator(str(tmp_path / "board"))
        board.Reload()
        for name, curve in curves.items():
            assert [(e.step, e.value) for e in board.Scalars(name)] == [(n, pytest.approx(v)) for n, v in curve]


def test_progress_of_a_long_run_stays_small(tmp_path):
    """Its rows are frames 0, T/8, ... T-1; when there are too many rows, every second one goes."""
    frames = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 64, 64, 3)
    for step in range(train.PROGRESS_ROWS + 1):
        train.add_progress(tmp_path, step, frames + step)
    rows = data.read_image(tmp_path / "progress.png")[::64, ::64, 0]
    assert rows[0].tolist() == [*range(0, 40, 5), 39]
    assert rows[:, 0].tolist() == [*range(0, train.PROGRESS_ROWS + 1, 2)]
    assert len(os.listdir(tmp_path / "progress")) == len(rows)


def test_samples_start_from_one_image(pictures, tmp_path):
    """--sample-image; without it assets/img.png for synthetic clips, else the first clip's first frame."""
    a = argparse.Namespace(fps=None, sample_image=None, data="synthetic", size=(64, 64), motion="exvideo")
    for path in (os.path.join(HERE, "assets", "img.png"), pictures[0]):
        img, fps, motion = train.sample_start(a, "toy", None, None)
        assert torch.equal(img, data.fit_image(data.read_image(path), 64, 64))
        assert (fps, motion) == (8, sample.DEFAULTS["toy"]["motion"])
        a.sample_image = pictures[0]
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "clip.mp4", scene(3, 16))
    dataset = open_clips(tmp_path / "videos")
    a.sample_image, a.data, item = None, str(tmp_path / "videos"), dataset[0]
    img, fps, motion = train.sample_start(a, "toy", dataset, None)
    assert torch.equal(img, item["video"][0]) and (fps, motion) == (item["fps"], item["motion"])


def test_draws_depend_on_seed_and_number():
    def draw(seed, n, share_noise=0):
        return train.draw(argparse.Namespace(seed=seed, loss="edm", drop=0.1, share_noise=share_noise), n, (3, 4, 8, 8))

    means = draw(0, 0, share_noise=4)[1].unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))
    assert torch.allclose(means[0], means[2], atol=1e-6) and means.std() > 0.1
    draws = [draw(seed, n) for seed in (0, 1, 10**12) for n in (*range(4000), 2**32, 2**33)]
    assert len({float(sigma) for sigma, _, _ in draws}) > 0.999 * len(draws)  # a few 32-bit seeds may coincide
    ln = torch.stack([sigma for sigma, _, _ in draws]).log()
    assert abs(ln.mean() - 0.7) < 0.06 and abs(ln.std() - 1.6) < 0.05          # about four standard errors
    assert abs(1 - torch.stack([keep for _, _, keep in draws]).mean() - 0.1) < 0.012


HAS_FP16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()


@pytest.mark.parametrize("precision", [
    pytest.param([], id="bf16"),
    pytest.param(["--fp16"], id="fp16", marks=pytest.mark.skipif(not HAS_FP16, reason="no fp16 on this CPU"))])
def test_gradients_that_stay_bad_stop_the_run_and_name_the_clips(small, tmp_path, precision):
    svd = exsvd.load(small)
    svd.unet.conv_out.bias.data[0] = math.nan
    exsvd.save_model(tmp_path / "bad.safetensors", svd.unet, svd.vae, svd.clip, family="toy")
    (tmp_path / "config.json").write_text('{"fp16": {"initial_scale_power": 1}}')
    with pytest.raises(SystemExit, match=r"5 steps in a row with non-finite gradients.*(scene \d+.*){5}"):
        train_here("--model", tmp_path / "bad.safetensors", "--out", tmp_path / "run", *FAST, "--frames", 2,
                   "--steps", 99, "--deepspeed_config", tmp_path / "config.json", *precision)


@pytest.mark.parametrize("args, words", [
    ("--nonsense", "unrecognized"), ("--size 100x100", "multiples of 64"), ("--size 64", "write it as WIDTHxHEIGHT"),
    ("--steps 0", "at least 1"), ("--drop 1.5", "at most 1"), ("--motion much", "invalid bucket value"),
    ("--data missing", "missing"), ("--sample-image missing.png", "missing.png"),
    ("--train nothing", "names no parameter"), ("--train (", "nor a regular expression"),
    ("--deepspeed_config {lr} --lr 0.1", "contradicts"), ("--deepspeed_config {bad}", "not readable as JSON"),
    ("--deepspeed_config {stage}", "written for stage 2"),
    pytest.param("--fp16", "no fp16 on this machine", marks=pytest.mark.skipif(HAS_FP16, reason="there is fp16"))])
def test_train_refuses_in_one_line(args, words, small, tmp_path, capsys):
    configs = {"lr": '{"optimizer": {"params": {"lr": 1e-4}}}', "stage": '{"zero_optimization": {"stage": 3}}'}
    for name, text in (configs | {"bad": "{"}).items():
        (tmp_path / name).write_text(text)
    args = args.format(lr=tmp_path / "lr", stage=tmp_path / "stage", bad=tmp_path / "bad").split()
    with pytest.raises((SystemExit, data.MediaError)) as e:
        train_here("--model", small, "--out", tmp_path / "run", *args)
    assert words in capsys.readouterr().err + str(e.value) and getattr(e.value, "code", 1) not in (0, None)
    after_the_clips = words in ("missing", "names no parameter")  # the others leave no folder behind
    assert (tmp_path / "run").exists() == after_the_clips and not list(tmp_path.glob("run/state-*"))


def test_train_exits_with_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "missing.safetensors"])
    with pytest.raises(SystemExit, match=r"^train.py: missing.safetensors: no such weight file$"):
        runpy.run_path(train.__file__, run_name="__main__")


def test_deepspeed_config_is_merged_over_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"optimizer": {"params": {"lr": 1e-4}}, "gradient_accumulation_steps": 3, '
                                          '"zero_optimization": {"reduce_bucket_size": 1000}}')
    a, family = train.parse(["--deepspeed_config", str(tmp_path / "config.json")])
    config = train.deepspeed_config(a)
    assert family == "toy" and config["optimizer"]["params"]["lr"] == a.lr == 1e-4 and a.accumulate == 3
    assert config["optimizer"]["type"] == "AdamW"
    assert config["zero_optimization"] == {"stage": 2, "round_robin_gradients": False, "reduce_bucket_size": 1000}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in train.deepspeed_config(train.parse(["--offload"])[0]), "DeepSpeed keeps them on the GPU"


# ----------------------------------------------------------------------------------------------------------------------
# 6. toy/


def test_the_world_is_a_flight_whose_speed_the_bucket_tells():
    seen = set()
    for index, frames in itertools.product(range(16), (8, 40)):
        video, fps, motion = world.clip(0, index, frames, 128)
        assert torch.equal(video, world.clip(0, index, frames, 128)[0]) and video.shape == (frames, 128, 128, 3)
        path = measure.camera_path(floats(video), floats(video)[0])
        assert (path - world.scales(motion, fps, frames)).abs().max() < 0.02, (index, frames, motion)
        seen.add((frames, fps, motion == 0))
    assert {(frames, fps) for frames, fps, _ in seen} == {(8, 8), (8, 4), (8, 1.6), (40, 8)}
    assert (40, 8, True) in seen, "a camera that stands is never seen"


def test_the_measures_tell_bad_flights_from_good_ones():
    picture = world.picture(5, 2)
    video = world.flight(picture, world.scales(60, 8, 40), 128)
    m = measure.measure(video, picture, 60, 8)
    assert abs(m["arrival"] - 1) < 0.01 and m["rms"] < 0.01 and m["back"] < 0.01
    assert m["flicker"] == 1 and min(m["psnr"]) > 60
    for how, bad, expected in (("frozen", video[:1].expand_as(video), dict(arrival=0, back=0, flicker=0)),
                               ("half as fast", video[torch.arange(40) // 2], dict(arrival=0.5, back=0)),
                               ("to and fro", torch.cat([video[::2], video[::2].flip(0)]), dict(arrival=0, back=1))):
        m = measure.measure(bad, picture, 60, 8)
        assert all(abs(m[name] - value) < 0.03 for name, value in expected.items()), (how, m)
        assert m["rms"] > 0.2 and m["psnr"][-1] < 25, (how, m)
    tints = 0.2 * torch.randn(40, 3, 1, 1, generator=torch.Generator().manual_seed(0))  # another in each frame
    m = measure.measure(video + tints, picture, 60, 8)
    assert abs(m["arrival"] - 1) < 0.03 and m["back"] < 0.03, m
    assert m["flicker"] > 2 and m["rms"] < 0.02 and max(m["psnr"]) < 40, m
