"""Tests of everything, on the CPU, without weights or network:

    pip install -r requirements.txt pytest diffusers transformers
    python -m pytest -q test_exsvd.py
    python -m pytest -q test_exsvd.py -m quick    # exactness, ExVideo, samplers, EMA and resume

Networks are small and their weights random, since nothing here depends on what was learned. The
reference is diffusers and transformers with the same weights. What needs a GPU skips and says so.
Runtime: see README.md.

    1. the method  parity, ExVideo, EDM, samplers; then memory, published files, extension files
    2. data.py     pictures and videos in and out
    3. data.py     videos to clips and latents
    4. sample.py   the command
    5. train.py    runs with DeepSpeed, one and two ranks, killed and resumed
    6. toy/        its world, and the measures on clips whose truth is known
"""

import argparse
import contextlib
import csv
import fcntl
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
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
import warnings
import zlib
from collections import Counter
from dataclasses import asdict, replace
from fractions import Fraction
from unittest.mock import Mock, patch

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageCms
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import data
import exsvd
import sample
import train
from bench import compare
from toy import measure, world

HERE = os.path.dirname(os.path.abspath(__file__))

torch.set_num_threads(1)  # networks this small don't gain from more

# --------------------------------------------------------------------------------------------------
# Small networks with random weights: four levels and all blocks of the real ones, only narrower.

UNET = exsvd.UNetConfig(channels=(32, 64, 96, 96), heads=(1, 2, 3, 2), context_dim=40)
VAE = exsvd.VAEConfig(channels=(32, 64, 96, 96))
CLIP = exsvd.CLIPConfig(width=64, layers=3, heads=4, out_dim=40, image=56)
TINY = {"channels": (8, 16, 24, 24), "groups": 4}  # diffusers has 32 groups always
TWO_LEVELS = TINY | {"channels": (8, 16), "heads": (1, 2)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
def randomize(module, seed=0):
    """Weights as after training: nothing stays at 0 or 1, activations stay near 1."""
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
    unet = exsvd.UNet(replace(UNET, **kw))
    return randomize(unet if num_frames is None else exsvd.extend(unet, num_frames), seed)


def freeze(unet):
    """All but what the paper trains. -> the names of that"""
    for name, p in unet.named_parameters():
        p.requires_grad_(exsvd.is_extension_parameter(name))
    return [name for name, p in unet.named_parameters() if p.requires_grad]


def networks(num_frames=None, **kw):
    vae, clip = randomize(exsvd.VAE(VAE)), randomize(exsvd.ImageEncoder(CLIP))
    return make_unet(num_frames, **kw), vae, clip


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
    """The module's tensors under the names and in the shapes of a published layout."""
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
    """The net holds this state in this dtype, on the CPU, in eval mode, without buffers."""
    got = net.state_dict()
    assert got.keys() == state.keys() and not net.training and not list(net.buffers())
    for n, t in got.items():
        assert t.device.type == "cpu" and t.dtype == dtype and torch.equal(t, state[n].to(dtype)), n


# --------------------------------------------------------------------------------------------------
# 1. The method. Parity with the public implementations: the same random weights and epsilons, in
#    float32.

PARITY = 1e-5


def same_epsilons(module, ref):
    """Outputs can't show an epsilon far below the variances, so they are compared as numbers."""
    norms = {n: m for n, m in ref.named_modules() if hasattr(m, "eps") and hasattr(m, "weight")}
    theirs = {n: m.eps for n, m in norms.items()}
    names = exsvd.file_names(module, "diffusers")
    ours = {n: m.eps for n, m in module.named_modules() if hasattr(m, "eps")}
    ours = {names[f"{n}.weight"][0].removesuffix(".weight"): eps for n, eps in ours.items()}
    assert ours == theirs and len(ours) > 5


def diffusers_unet(unet, aspect):
    """diffusers' UNet of the same weights. What extending adds is made of stock parts: a table in
    place of the sinusoid, and a Conv3d with reflected borders before the temporal block's norm_in.
    aspect: H / W of its inputs, which tokens do not tell."""
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


def diffusers_vae(vae):
    models = pytest.importorskip("diffusers.models", reason="the reference")
    ref = models.AutoencoderKLTemporalDecoder(
        block_out_channels=vae.config.channels, layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4).eval()
    ref.load_state_dict(named(vae, "diffusers"))
    same_epsilons(vae, ref)  # diffusers has Stability's here
    return ref


def transformers_clip(clip):
    transformers, c = pytest.importorskip("transformers", reason="the reference"), clip.config
    ref = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        hidden_size=c.width, intermediate_size=4 * c.width, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, image_size=c.image, patch_size=c.patch,
        projection_dim=c.out_dim, hidden_act="gelu", attn_implementation="eager")).eval()
    ref.load_state_dict(named(clip, "diffusers"))
    same_epsilons(clip, ref)
    return ref


def published_scheduler():
    """As beside SVD-XT's weights."""
    return pytest.importorskip("diffusers", reason="the reference").EulerDiscreteScheduler(
        sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True, beta_start=0.00085,
        beta_end=0.012, beta_schedule="scaled_linear", timestep_type="continuous",
        prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1)


@torch.no_grad()
def test_vae_and_clip_parity():
    vae, clip = randomize(exsvd.VAE(VAE)), randomize(exsvd.ImageEncoder(CLIP))
    ref = diffusers_vae(vae)
    img, z = torch.rand(3, 3, 40, 64) * 2 - 1, torch.randn(2, 5, 4, 4, 6)
    close(vae.encode(img), ref.encode(img).latent_dist.mean, PARITY, "VAE encode")
    video = ref.decode(z.flatten(0, 1), num_frames=5).sample.unflatten(0, (2, 5))
    close(vae.decode(z), video, PARITY, "VAE decode")
    img = torch.randn(3, 3, CLIP.image, CLIP.image)
    close(clip(img), transformers_clip(clip)(img).image_embeds, PARITY, "CLIP")


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
# ExVideo: extending changes nothing up to the native length; the fold; the borders; what trains.


# a base; a model extended before, with learned table and convolution; a frozen base in bfloat16
@pytest.mark.parametrize("native, learned, size, dtype", [
    (6, None, (8, 16), torch.float32), (3, 7, 8, torch.float32), (3, None, 8, torch.bfloat16)])
@torch.no_grad()
def test_extending_changes_nothing_up_to_the_native_length(native, learned, size, dtype):
    base, longer = (make_unet(learned, native_frames=native).to(dtype) for _ in range(2))
    trains, native = dtype == torch.float32, learned or native
    base.requires_grad_(trains)
    assert exsvd.extend(longer.requires_grad_(trains), 40) is longer and longer.max_frames == 40
    assert {(p.dtype, p.requires_grad) for p in longer.parameters()} == {(dtype, trains)}
    # batches have other memory layouts than one video
    for T, B in (1, 2), (2, 1), (native - 1, 2), (native, 1):
        inputs = unet_inputs(T, size, B, seed=T)
        want = base(*inputs)
        assert want.isfinite().all() and torch.equal(longer(*inputs), want), f"{T} frames"
    if learned:
        for a, b in zip(base.temporal_blocks(), longer.temporal_blocks()):
            assert torch.equal(b.frame_table, a.frame_table[exsvd.fold_positions(7, 40)])
    else:  # beyond it the positions are other ones
        inputs = unet_inputs(native + 1, 8, 1)
        assert not torch.equal(longer(*inputs), base(*inputs))


def test_fold_positions():
    # of the release: 0 to 24, then to and fro between 24 and 4
    up, down = [*range(4, 25)], [*range(23, 4, -1)]
    assert exsvd.fold_positions(25, 128) == ([0, 1, 2, 3] + up + (down + up) * 3)[:128]
    for native in (1, 2, 3, 5, 8, 14, 128):
        longest = exsvd.fold_positions(native, 600)
        steps = {abs(b - a) for a, b in zip(longest, longest[1:])}
        assert steps == ({1} if native > 1 else {0}), "neighbours have neighbouring positions"
        assert set(longest) == set(range(native)) and longest[:native] == [*range(native)]
        for n in (1, native, native + 1, 512):
            assert exsvd.fold_positions(native, n) == longest[:n], "a longer fold continues it"


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
    unet = make_unet(num_frames=12, **TINY).train()
    for T, size in (1, 8), (2, 16):  # 64 pixels are one on the coarsest level
        unet.zero_grad()
        unet(*unet_inputs(T, size)).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in unet.parameters() if p.grad is not None)
        assert all(b.frame_conv.weight.grad.abs().sum() > 0 for b in unet.temporal_blocks())


def gradients(unet):
    unet.zero_grad()
    unet(*unet_inputs(3)).square().mean().backward()
    return {n: p.grad for n, p in unet.named_parameters() if p.grad is not None}


def test_what_the_paper_trains_and_what_has_no_effect():
    unet = make_unet(num_frames=12, **TINY).train()
    names = freeze(unet)
    blocks = {id(p) for block in unet.temporal_blocks() for p in block.parameters()}
    assert set(names) == {n for n, p in unet.named_parameters() if id(p) in blocks}
    assert len(names) == 33 * 16
    grads = gradients(unet)
    idle = set(names) - set(grads)  # a softmax over the one context token is 1 whatever the query
    assert idle == {n for n in names if exsvd.WITHOUT_EFFECT.search(n)} and len(idle) == 4 * 16
    for n, g in grads.items():
        if n.endswith("frame_table"):  # the rows of the three frames there were
            assert (g.abs().amax(1) > 0).tolist() == [True] * 3 + [False] * 9
        else:
            assert n in names and g.abs().max() > 0, n


def test_the_third_input_of_the_unet():
    settings = {"motion": torch.tensor([127.0, 20.0]), "fps": 7, "aug": 0.02, "steps": 25}
    ids = exsvd.unet_ids(("fps", "motion", "aug"), settings)
    assert torch.equal(ids, torch.tensor([[6, 127, 0.02], [6, 20, 0.02]]))
    with pytest.raises(ValueError, match="conditioned on fps, pan, but there is no pan"):
        exsvd.unet_ids(("fps", "pan"), settings)


def test_inputs_that_do_not_fit():
    unet, vae, clip = make_unet(12, **TWO_LEVELS), exsvd.VAE(VAE), exsvd.ImageEncoder(CLIP)
    x, c_noise, ctx, ids = unet_inputs(2)
    for network, inputs, words in (
            (unet, unet_inputs(2, (8, 12)), "multiples of 8"),
            (unet, unet_inputs(2, (20, 16)), "multiples of 8"),
            (unet, (x, c_noise, ctx[:1], ids), "ctx"),
            (unet, (x, c_noise, ctx.repeat(1, 2, 1), ids), "ctx"),
            (unet, unet_inputs(13), "13 frames asked of a model extended to 12"),
            (exsvd.extend, (unet, 0), "at least one"),
            (vae.encode, [torch.zeros(1, 3, 60, 60)], "got (1, 3, 60, 60)"),
            (vae.encode, [torch.zeros(3, 64, 64)], "got (3, 64, 64)"),
            (clip, [torch.zeros(1, 3, 64, 64)], "got (1, 3, 64, 64)")):
        with pytest.raises(ValueError, match=re.escape(words)):
            network(*inputs)


# --------------------------------------------------------------------------------------------------
# EDM


def test_denoise_and_losses_of_a_network_whose_answer_is_known():
    sigma = torch.tensor([0.002, 0.05, 1.0, 20.0, 700.0])
    shapes = (3, 4, 8, 8), (3, 4, 8, 8), (1, 4, 8, 8), (1, UNET.context_dim), (3,)
    x, noise, image, ctx, ids = (torch.randn(5, *shape) for shape in shapes)
    s, per_frame = sigma.view(-1, 1, 1, 1, 1), image.expand(-1, 3, -1, -1, -1)
    v = (noise - s * x) / (s**2 + 1).sqrt()  # the F for which D is exactly the clean latents

    def ideal(inputs, c_noise, ctx_in, ids_in):
        assert torch.equal(inputs[:, :, 4:], per_frame)  # unscaled, repeated for every frame
        assert ctx_in is ctx and ids_in is ids
        close(c_noise, sigma.log() / 4, 1e-6, "c_noise")
        close(inputs[:, :, :4], (x + s * noise) / (s**2 + 1).sqrt(), 1e-6, "scaled noisy latents")
        return v

    for image_latents in (image, per_frame):
        close(exsvd.denoise(ideal, x + s * noise, sigma, image_latents, ctx, ids), x, 1e-4,
              "D of the ideal F")

    guess = torch.randn(x.shape)
    D = (x + s * noise) / (s**2 + 1) - s / (s**2 + 1).sqrt() * guess
    edm, exvideo = (exsvd.training_loss(lambda *inputs: guess, exsvd.LOSSES[name], x, sigma, noise,
                                        image, ctx, ids) for name in ("edm", "exvideo"))
    close(edm, (guess - v).square().mean(dim=(1, 2, 3, 4)), 1e-4,
          "EDM's loss is |F - v|^2, as its weight is 1 / c_out^2")
    want = ((s**2 + 1).sqrt() / s * (D - 1.01 * x) ** 2).mean(dim=(1, 2, 3, 4))
    close(exvideo, want, 1e-5, "ExVideo's loss")


def test_noise_levels_that_losses_draw():
    def draw(name, n):
        return exsvd.LOSSES[name].draw(n, 16, torch.Generator().manual_seed(5))

    log, drawn, table = draw("edm", 20000).log(), draw("exvideo", 20000), exsvd.karras_sigmas(1000)
    assert abs(log.mean() - 0.7) < 0.05 and abs(log.std() - 1.6) < 0.05
    assert set(drawn.tolist()) <= set(table[:-1].tolist())
    assert abs(drawn.log().mean() - table[:-1].log().mean()) < 0.1
    assert torch.equal(draw("exvideo", 3), draw("exvideo", 3))


def test_karras_sigmas_are_those_of_the_published_scheduler():
    scheduler = published_scheduler()
    for steps in (2, 25, 50):
        scheduler.set_timesteps(steps)
        close(exsvd.karras_sigmas(steps), scheduler.sigmas, 1e-6, "sigmas")
        close(exsvd.karras_sigmas(steps)[:-1].log() / 4, scheduler.timesteps, 1e-6, "c_noise")
    assert exsvd.karras_sigmas(1).tolist() == [700, 0]


# --------------------------------------------------------------------------------------------------
# Samplers, guidance, rounds, decoding in chunks


def gaussian_denoiser(mean, std):
    """The ideal D(x; sigma) where the data are N(mean, std^2)."""
    return lambda x, sigma: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


def sampled(name, denoise, x, sigmas, eta=0.0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    s = sample.Settings(eta=eta)
    return sample.SAMPLERS[name].function(
        denoise, x, sigmas, s, lambda: torch.randn(x.shape, generator=generator).to(x))


@pytest.mark.parametrize("name, eta", [("euler", 0), ("ddim", 1), ("heun", 0), ("dpm++", 0)])
def test_samplers_hit_a_gaussian_and_known_frames(name, eta):
    x, known = torch.randn(2, 1, 5, 4, 25, 40).double()
    sigmas, ideal = exsvd.karras_sigmas(400).double(), gaussian_denoiser(1.5, 0.5)
    start = x * (sigmas[0] ** 2 + 0.5**2).sqrt() + 1.5
    before = start.clone()
    free = sampled(name, ideal, start, sigmas, eta)
    assert torch.equal(start, before), "the sampler changed its input"
    assert abs(free.mean() - 1.5) < 0.02 and abs(free.std() - 0.5) < 0.02, (free.mean(), free.std())

    mask, levels = torch.tensor([1, 1, 0, 0, 1]).bool(), []

    def spy(x, sigma):
        levels.append((x - known)[:, mask].std() / sigma)  # the noise that a known frame carries
        return ideal(x, sigma)

    out = sampled(name, sample.with_known_frames(spy, known, mask.double()), start, sigmas, eta)
    assert torch.allclose(out[:, mask], known[:, mask], atol=1e-4)
    assert all(0.6 < level < 1.4 for level in levels)
    assert torch.allclose(out[:, ~mask], free[:, ~mask], atol=1e-5)


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpm++", 2)])
def test_order_of_a_sampler(name, order):
    x, error = torch.tensor([8.0]).double(), {}
    for steps in (40, 80):
        sigmas = torch.logspace(1, -1, steps + 1).double()
        # the probability flow ODE, solved
        exact = 1.5 + (x - 1.5) * ((0.1**2 + 0.5**2) / (10**2 + 0.5**2)) ** 0.5
        out = sampled(name, gaussian_denoiser(1.5, 0.5), x, sigmas)
        error[steps] = (out - exact).abs().item()
    assert 0.9 < math.log2(error[40] / error[80]) / order < 1.1, error


def test_eta_replaces_noise_by_fresh_noise():
    x, sigmas, D = torch.randn(3, 4) * 700, exsvd.karras_sigmas(10), gaussian_denoiser(0.3, 1.0)
    runs = ((0.5, 5), (1.0, 5), (1.0, 5), (1.0, 6))
    a, b, c, other = (sampled("ddim", D, x, sigmas, eta, seed) for eta, seed in runs)
    assert torch.equal(b, c) and not torch.allclose(a, b) and not torch.allclose(b, other)
    assert torch.allclose(sampled("ddim", D, x, sigmas), sampled("euler", D, x, sigmas))


def test_align_your_steps():
    sigmas, finer = sample.ays_sigmas(10), sample.ays_sigmas(20)
    assert torch.equal(sigmas, torch.tensor([*sample.AYS[:-1], 0.0]))
    assert torch.allclose(finer[::2], sigmas)
    between = sigmas[:-1] * torch.tensor(sample.AYS[1:])
    assert torch.allclose(finer[1::2] ** 2, between), "ln sigma"
    for steps in (1, 3, 25):
        sigmas = sample.ays_sigmas(steps)
        assert len(sigmas) == steps + 1 and sigmas[0] == 700 and sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()


def test_four_steps_of_latent_consistency():
    """x = D + next sigma * fresh noise, at the levels that AnimateLCM-SVD was distilled on."""
    sigmas = sample.lcm_sigmas(4)
    distilled = exsvd.karras_sigmas(40)[[0, 10, 20, 30]]
    assert torch.equal(sigmas, torch.cat([distilled, torch.zeros(1)]))
    seen, g = [], torch.Generator().manual_seed(1)
    out = sampled("lcm", lambda x, sigma: seen.append(x) or torch.full_like(x, len(seen)),
                  torch.zeros(2, 3), sigmas)
    for i in range(1, 4):
        assert torch.allclose(seen[i], i + sigmas[i] * torch.randn(2, 3, generator=g))
    assert len(seen) == 4 and torch.equal(out, torch.full((2, 3), 4.0))


def test_levels_of_the_authors_second_pass():
    """All steps are spread over what the strength leaves of the ramp. Numbers: computed with
    DiffSynth 1.1.9, ContinuousODEScheduler().set_timesteps(steps, strength).sigmas, the first,
    second and last."""
    for steps, strength, *theirs in (
            (25, 0.5, 15.589973449707031, 12.58881664276123, 0.0020000035874545574),
            (10, 0.8, 193.64572143554688, 100.40792083740234, 0.0020000035874545574),
            (4, 1.0, 700.0001220703125, 70.54086303710938, 0.0020000035874545574)):
        s = sample.Settings(steps=steps, strength=strength, schedule="karras")
        sigmas = sample.noise_levels(s, True)
        assert len(sigmas) == steps + 1 and sigmas[-1] == 0
        assert [sigmas[i].item() for i in (0, 1, -2)] == pytest.approx(theirs, rel=1e-5)
    ays = sample.noise_levels(sample.Settings(steps=10, strength=0.5, schedule="ays"), True)
    assert torch.equal(ays, sample.ays_sigmas(10)[-6:])


@pytest.mark.parametrize("cfg, interval, passes", [
    ((1, 3), None, 2), ((1, 1), None, 1), ((1.5, 1), None, 2), ((0, 1), None, 2),
    ((1, 3), (0.5, 1), 2), ((1, 3), (1, 2), 1), ((1, 3), (0.5, 2), 2)])
def test_guidance_goes_linearly_over_the_frames(monkeypatch, cfg, interval, passes):
    calls, x = [], torch.zeros(1, 5, 4, 2, 2)
    given = torch.ones(1, 1, 4, 2, 2), torch.ones(1, 1, 8), torch.tensor([[6.0, 127, 0.02]])

    def fake(unet, x, sigma, image_latents, ctx, ids):
        calls.append((bool(image_latents.any()), bool(ctx.any())))
        assert torch.equal(ids, given[2])  # without the image too
        return torch.full_like(x, 1.0 if ctx.any() else 0.5)

    monkeypatch.setattr(exsvd, "denoise", fake)
    D = sample.guided(None, *given, cfg, 5, interval)(x, torch.tensor(1.0))[0, :, 0, 0, 0]
    assert torch.allclose(D, 0.5 + 0.5 * torch.linspace(*cfg, 5) if passes == 2 else torch.ones(5))
    assert calls == [(True, True), (False, False)][:passes], "guidance of 1 is free"


def test_rounds_of_a_long_video():
    assert sample.rounds(8, 20, 2) == [(0, 8)] and sample.rounds(20, 20, 2) == [(0, 20)]
    assert sample.rounds(21, 20, 2) == [(0, 20), (1, 21)]
    assert sample.rounds(45, 20, 4) == [(0, 20), (16, 36), (25, 45)]


def test_adjust_matches_frames_and_raises_contrast():
    gain, bias = (torch.linspace(*ends, 6).view(1, -1, 1, 1, 1) for ends in ((0.5, 2), (-1, 1)))
    z = torch.randn(1, 6, 4, 8, 8) * gain + bias
    s = sample.Settings(match_stats=True, contrast=1.2)
    out = sample.adjust(z, s)
    assert torch.allclose(out.mean((2, 3, 4)), z.mean().expand(1, 6) * 1.2, atol=1e-5)
    assert torch.allclose(out.std((2, 3, 4)), z.std().expand(1, 6) * 1.2, rtol=1e-4)
    given = sample.adjust(z, s, [2, 9])
    assert torch.equal(given[:, 2], z[:, 2] * 1.2) and torch.equal(given[:, 3:], out[:, 3:])
    assert torch.equal(sample.adjust(z, sample.Settings()), z)
    z[:, 1] = 3
    assert sample.adjust(z, s).isfinite().all(), "a frame without variance"


class Frames:
    """Stands in for the VAE where only the cutting matters: a frame's pixels are its latents, but
    for the outermost frames of what is decoded at once, which are off by `edges`."""

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


@pytest.mark.parametrize("T, chunk", [
    (1, 8), (7, 8), (8, 8), (9, 8), (40, 8), (41, 16), (25, 1), (25, 3), (128, 14)])
def test_chunks_cover_every_frame_once_in_order(T, chunk):
    z, vae = counting(T), Frames()
    before = z.clone()
    pieces = list(sample.decode(vae, z, chunk))
    assert torch.allclose(torch.cat(pieces), z[0, :, :3], atol=1e-4) and torch.equal(z, before)
    assert max(map(len, pieces)) <= chunk  # memory does not grow with the video
    if chunk >= 6:  # a chunk's outermost frames saw padding: none of it is left
        frames = torch.cat(list(sample.decode(Frames(edges=100), z, chunk)))
        assert torch.allclose(frames[1:-1], z[0, 1:-1, :3], atol=1e-4)
    # all at once where that is possible; never a short last chunk, whose norms see fewer frames
    assert vae.calls == [T] if T <= chunk else set(vae.calls) == {chunk}


@pytest.mark.parametrize("fail_at", [(1,), (3,), (3, 4), (2, 3, 4), (3, 6)])
def test_out_of_memory_halves_the_chunk_and_goes_on(fail_at, capsys):
    z, vae = counting(60), Frames(fail_at)
    assert torch.allclose(torch.cat(list(sample.decode(vae, z, 16))), z[0, :, :3], atol=1e-4)
    assert vae.calls[-1] == 16 // 2 ** len(fail_at)
    assert capsys.readouterr().err.count("out of memory") == len(fail_at)
    with pytest.raises(torch.OutOfMemoryError):
        list(sample.decode(Frames([1]), z, 1))


# -m quick runs all of this section so far, and what the end of this file adds
QUICK = [test for name, test in globals().items() if name.startswith("test_")]


@torch.no_grad()
def test_a_video_is_that_of_diffusers_pipeline():
    """5 frames of 128x64 by diffusers' whole pipeline: the same weights, noise and settings."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    config = exsvd.CLIPConfig(**vars(CLIP) | {"image": 224, "patch": 56})  # the pipeline's size
    unet, vae, clip = make_unet(), *map(randomize, (exsvd.VAE(VAE), exsvd.ImageEncoder(config)))
    pipeline = diffusers.StableVideoDiffusionPipeline(
        diffusers_vae(vae), transformers_clip(clip), diffusers_unet(unet, 64 / 128),
        published_scheduler(), transformers.CLIPImageProcessor())
    pipeline.set_progress_bar_config(disable=True)

    s = sample.Settings(frames=5, steps=5, fps=6.0, motion=40.0, aug=0.1, cfg=(1.2, 4.0), seed=3,
                        native=25, schedule="karras")
    picture = torch.randint(256, (64, 128, 3), dtype=torch.uint8)
    svd, img = exsvd.SVD(unet, vae, clip, {}, None), data.fit_image(picture, 128, 64)
    latents = sample.make_latents(svd, img, s, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 5, 4, 8, 16, generator=generator)
    theirs = pipeline(
        Image.fromarray(picture.numpy()), 64, 128, num_frames=5, num_inference_steps=5,
        min_guidance_scale=1.2, max_guidance_scale=4.0, fps=6, motion_bucket_id=40,
        noise_aug_strength=0.1, latents=noise, generator=generator, output_type="latent").frames
    close(latents, theirs, PARITY, "latents")
    [frames] = sample.decode(vae, latents / exsvd.VAE_SCALE, 5)
    their_frames = pipeline.decode_latents(theirs, 5)[0].transpose(0, 1)  # from (3,T,H,W)
    close(frames, their_frames, PARITY, "frames")


@pytest.fixture
def all_threads():
    """For the networks of the toy, which gain from them."""
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(1)


@torch.no_grad()
def test_seams_do_not_show(all_threads):
    """The mean change from frame to frame beside that of the whole decode: at the seam as
    elsewhere, to 2 % in the mean of three flights into photographs and to 0.05 of 255 in each. (Of
    a smooth picture, a rocket in the sky, it is 7 %, and 0.02 of 255.)"""
    vae = exsvd.load(os.path.join(HERE, "assets", "toy.safetensors"), parts=("vae",)).vae
    overlap, ratios = 4, []
    for name in ("astronaut", "chelsea", "coffee"):
        photograph = data.read_image(os.path.join(HERE, "toy", "photographs", f"{name}.jpg"))
        photograph = data.fit_image(photograph, 256, 256)
        z = vae.encode(world.flight(photograph, world.scales(60, world.FPS, 28), 64))[None]
        whole, pieces = vae.decode(z)[0], list(sample.decode(vae, z, 16))
        video, seam = torch.cat(pieces), torch.zeros(27, dtype=torch.bool)
        [first, _] = map(len, pieces)
        seam[first - 1:first + overlap] = True  # every change that involves a blended frame
        change, true = ((x[1:] - x[:-1]).abs().mean((1, 2, 3)) * 127.5 for x in (video, whole))
        ratios.append((change / true)[seam].mean() / (change / true)[~seam].mean())
        psnr = 10 * torch.log10(4 / (video - whole).square().mean())
        print(f"{name}: PSNR against the whole decode {psnr:.1f} dB")  # pytest -s shows it
        assert psnr > 50 and abs((change - true)[seam].mean()) < 0.05
    assert abs(torch.stack(ratios).mean() - 1) <= 0.02, ratios


# --------------------------------------------------------------------------------------------------
# Memory and speed: flash-attn, checkpoints, slices, streaming; other devices; half precision.


def plain_attention(q, k, v, deterministic=False):
    """softmax(q k^T / sqrt(d)) v in flash-attn's layout, (B, N, H, D)."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) / math.sqrt(q.shape[-1])
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.float()).to(q.dtype)


@torch.no_grad()
def test_layout_handed_to_flash_attn(monkeypatch):
    q, k, v = torch.randn(2, 7, 12), torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    flash = Mock(wraps=plain_attention)
    want = exsvd.attention(q, k, v, heads=3)
    monkeypatch.setattr(exsvd, "flash_fits", lambda q: True)
    monkeypatch.setattr(exsvd, "flash_attn_func", flash)
    for deterministic in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
        close(exsvd.attention(q, k, v, heads=3), want, 1e-5, "through flash-attn's layout")
        assert flash.call_args.args[0].shape == (2, 7, 3, 4)
        assert flash.call_args.kwargs == {"deterministic": deterministic}


@pytest.mark.parametrize("takes, dim, changes", [
    (True, 64, {}), (True, 80, {}), (True, 256, {"dtype": torch.float16}), (False, 512, {}),
    (False, 36, {}), (False, 64, {"dtype": torch.float32}), (False, 64, {"is_cuda": False}),
    (False, 64, {"capability": (7, 5)}), (False, 64, {"kernel": None})])
def test_what_flash_attn_takes(monkeypatch, takes, dim, changes):
    q = argparse.Namespace(shape=(1, 2, 1, dim), device="cuda", dtype=torch.bfloat16, is_cuda=True,
                           capability=(8, 0), kernel=plain_attention)
    vars(q).update(changes)
    monkeypatch.setattr(exsvd, "flash_attn_func", q.kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: q.capability)
    assert exsvd.flash_fits(q) == takes


@pytest.mark.skipif(exsvd.flash_attn_func is None or not torch.cuda.is_available(),
                    reason="needs flash-attn and a GPU")
@pytest.mark.parametrize("n, heads, dim", [(4096, 5, 64), (128, 20, 64), (257, 16, 80), (7, 3, 32)])
def test_flash_attn_itself(n, heads, dim):
    q, k, v = torch.randn(3, 2, n, heads * dim, device="cuda", dtype=torch.bfloat16)
    assert exsvd.flash_fits(q.unflatten(2, (heads, dim)))
    want = plain_attention(*(x.float().unflatten(2, (heads, dim)) for x in (q, k, v))).flatten(2)
    close(exsvd.attention(q, k, v, heads).float(), want, 1e-2, "flash-attn in bf16")


def test_checkpoints_and_slices_change_no_gradient():
    # float64, where rounding can't hide or fake anything
    unet = make_unet(num_frames=12, **TWO_LEVELS).double().train()
    freeze(unet)  # the first blocks have nothing to train, nor inputs that need a gradient
    unet.checkpointing = None
    plain = gradients(unet)
    total = torch.stack([g.norm() for g in plain.values()]).norm()
    for unet.checkpointing in ("memory", "balanced"):
        unet.slice_size = None
        whole = gradients(unet)
        unet.slice_size = 1500
        sliced = gradients(unet)
        assert plain.keys() == whole.keys() == sliced.keys() and len(plain) > 150
        # 2nd term: a bias before a norm of one channel has no gradient but rounding
        for n, g in plain.items():
            assert torch.equal(whole[n], g), n
            assert (sliced[n] - g).norm() <= 1e-9 * g.norm() + 1e-13 * total, (n, rel(sliced[n], g))


def test_balanced_checkpoints_compute_few_products_again():
    """A backward pass is twice the work of a forward pass. "memory" adds a whole one."""
    unet = make_unet(num_frames=9, **TINY)

    def work(level, training=True):
        unet.train(training).checkpointing = level
        with FlopCounterMode(display=False) as flops:
            unet(*unet_inputs(3, B=1)).square().mean().backward()
        return flops.get_total_flops()

    three = work(None)
    assert 1.1 * three < work("balanced") < 1.15 * three and work("memory") > 1.3 * three
    assert work("memory", training=False) == three, "networks in eval mode keep everything"


@torch.no_grad()
def test_slices_change_no_output(monkeypatch):
    unet, inputs = make_unet(num_frames=12, **TWO_LEVELS), unet_inputs(5, (8, 16))
    before = [x.clone() for x in inputs]
    unet.slice_size = None
    whole = unet(*inputs)
    for unet.slice_size in (1000, 5000):
        close(unet(*inputs), whole, 1e-5, f"UNet, slices of {unet.slice_size}")
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


def test_a_step_of_training_is_counted():
    """By DeepSpeed's own code, of networks that are not as deep. What is trained takes 24 bytes
    during the update: master, moments, average, gradient and a temporary, shared by two ranks."""
    code = """if True:
        from functools import partial
        import exsvd
        from bench import compare
        exsvd.UNet = partial(exsvd.UNet, exsvd.UNetConfig((320, 640), (5, 10)))
        exsvd.ImageEncoder = partial(exsvd.ImageEncoder, exsvd.CLIPConfig(layers=2))
        stages = compare.step_stages("none", (2, 8, 8), ranks=2)
        print(*(peak for peak, _ in stages.values()))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    encoding, passes, update = map(int, done.stdout.splitlines()[-1].split())
    with torch.device("meta"):
        unet = exsvd.extend(exsvd.UNet(exsvd.UNetConfig((320, 640), (5, 10))))
        vae, clip = exsvd.VAE(), exsvd.ImageEncoder(exsvd.CLIPConfig(layers=2))
    trains = [n for n in freeze(unet) if not exsvd.WITHOUT_EFFECT.search(n)]
    trained = sum(unet.get_parameter(n).numel() for n in trains)
    held = sum(2 * p.numel() for network in (unet, clip) for p in network.parameters())
    held += sum(p.nbytes for p in vae.parameters())
    assert update == pytest.approx(held + 24 * trained / 2, rel=0.03)
    assert held + 16 * trained / 2 < encoding < passes


def test_the_readme_says_what_is_computed():
    """Within 3 %, of the rows of bench/README.md that take the most memory."""
    with patch.object(sample, "write_video", Mock()):
        stages = compare.video_stages("ExVideo", (128, 64, 64), resident=True, slice_size=None)
    step = compare.count("ours", (128, 64, 64), train=True, checkpointing=None)
    with open(os.path.join(HERE, "bench", "README.md")) as file:
        rows = [line[2:].split(" | ") for line in file if line.startswith("| ")]
    for name, counted in (("sample.py, ExVideo, 128 frames: sampling", stages["sampling"]),
                          ("forward and backward", step)):
        cells = [row[3:] for row in rows if row[:3] == [name, "this repository", "128x64x64"]]
        published = max(cells, key=lambda row: float(row[0]))
        computed = compare.computed(*counted)
        for column, cell in zip(list(computed)[:-1], published):
            theirs, ours = ([float(n.replace(",", "")) for n in re.findall(r"[\d.,]+", text)]
                            for text in (cell, computed[column]))
            assert theirs == pytest.approx(ours, rel=0.03), (name, column)
    with open(os.path.join(HERE, "README.md")) as file:
        shown = re.search(r"no slices \| ([\d.]+) GB", file.read())[1]
    assert float(shown) == pytest.approx(stages["sampling"][0] / 1e9, rel=0.03)


def test_decoding_fits_a_small_card():
    """sample.py --offload decodes four frames of 1024x1024 at once, within the 3 GB it promises."""
    peak, _ = compare.count("ours", (4, 128, 128), compare.decoder)
    assert peak + 2 * 97.7e6 <= 3e9  # with the weights in half precision


def test_blocks_compile_without_a_break(monkeypatch):
    """Traced as torch.compile traces, in full graphs, and run without its code generator."""
    traced = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=traced))
    monkeypatch.setattr(exsvd, "flash_attn_func", None)  # with it graphs need not be full
    unet = make_unet(num_frames=12, **TINY)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8):
        eager = unet(*unet_inputs(2, B=1))
        exsvd.compile_blocks(unet.down[1])
        close(unet(*unet_inputs(2, B=1)), eager, 1e-5, "compiled")
    assert traced.frame_count == 3  # both transformers, and the residual block over pixels


@torch.inference_mode()
def test_streaming_changes_no_bit():
    """Without CUDA copies are made as with it, only not beside anything."""
    with torch.inference_mode(False):
        unet = make_unet(num_frames=12, **TWO_LEVELS)
    inputs = unet_inputs(3, (8, 16))
    want, state = unet(*inputs), {n: t.clone() for n, t in unet.state_dict().items()}
    unet.stream = exsvd.Stream(unet, "cpu", large=4000)  # bytes, of which some skips have less
    home = {n: p.data_ptr() for n, p in unet.named_parameters()}
    for _ in range(2):
        assert torch.equal(unet(*inputs), want)
    assert {n: p.data_ptr() for n, p in unet.named_parameters()} == home
    same(unet, state)


def test_streaming_needs_the_weights_once():
    with compare.Meter(device="cpu") as meter:
        unet = make_unet(**TWO_LEVELS | {"channels": (64, 128)})
        meter.stage()
        unet.stream = exsvd.Stream(unet, "cpu")
    weights = sum(p.nbytes for p in unet.parameters())
    assert meter.live < 1.25 * weights and meter.peak < 1.6 * weights


def test_training_on_another_device():
    """Under FakeTensorMode "meta" is a device like any other, on which nothing need exist: mixed
    devices and reads of values fail."""
    there = torch.device("meta")
    with FakeTensorMode(allow_non_fake_inputs=True), there:
        unet = exsvd.extend(exsvd.UNet(replace(UNET, **TWO_LEVELS)), 12).requires_grad_(False)
        vae, clip = exsvd.VAE(VAE), exsvd.ImageEncoder(CLIP)
        last = unet.up[-1].requires_grad_(True)  # the way back is slow under FakeTensorMode
        x, sigma, img = torch.empty(1, 3, 4, 8, 16), torch.empty(1), torch.rand(1, 3, 64, 128)
        ids = exsvd.unet_ids(UNET.ids, {"fps": 7, "motion": torch.ones(1), "aug": 0.02}, there)
        ctx = clip(exsvd.preprocess_clip(img, CLIP.image))[:, None]
        given = x, sigma, x, vae.encode(img)[:, None], ctx, ids
        exsvd.training_loss(unet, exsvd.LOSSES["edm"], *given).mean().backward()
    assert {p.grad.device for p in last.parameters() if p.grad is not None} == {there}


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


# --------------------------------------------------------------------------------------------------
# The published files, known by hashes of their names and shapes. DiffSynth-Studio publishes the
# first and the last hash; the others were proved by the byte sizes of the published files.

PUBLISHED = {"svd_xt.safetensors": "2a07abce74b4bdc696b76254ab474da6",
             "unet/diffusion_pytorch_model.safetensors": "7bd2a4d8f465070a00de811dcc1802e3",
             "vae/diffusion_pytorch_model.safetensors": "680317af073df1be619812892f038346",
             "image_encoder/model.safetensors": "8fb352186fcacd462dd817c19064d51e",
             "ExVideo-SVD-128f-v1": "9a4ab6869ac9b7d6e31f9854e397c867"}


def keys_md5(tensors):
    lines = [line for n, t in tensors.items() for line in (n, f"{n}:{'_'.join(map(str, t.shape))}")]
    return hashlib.md5(",".join(sorted(lines)).encode()).hexdigest()


# These hashes don't see that two names of one shape are exchanged. Parity does for diffusers'
# names; hashes of pairs (other name, diffusers' name) do for the others. The pairs were checked
# against DiffSynth's tables.
TRANSLATIONS = {("sgm", exsvd.UNet): "9703f29d26a7848796b14632a4128298",
                ("sgm", exsvd.VAE): "b7b9f9771203a2d20b70cf5c7e33c947",
                ("sgm", exsvd.ImageEncoder): "bf0d2d8396c499904d156d883233a0d9",
                ("exvideo", exsvd.UNet): "599a2a3d2cb048df05f6494c4b4ce047"}


def sgm_leftovers(vae):
    """The 252 tensors of the single file that no network of ours has."""
    text = "conditioner.embedders.0.open_clip.model."
    conditioner, first = "conditioner.embedders.3.encoder.", "first_stage_model."
    like = next(vae.parameters())
    out = {text + n: like.new_empty(s) for n, s in {
        "ln_final.weight": [1024], "ln_final.bias": [1024], "logit_scale": [],
        "positional_embedding": [77, 1024], "text_projection": [1024, 1024],
        "token_embedding.weight": [49408, 1024]}.items()}
    for n, t in named(vae, "sgm").items():
        if n.startswith(conditioner + "encoder."):
            out[first + n.removeprefix(conditioner)] = t
        elif n.startswith(first) and not re.search("time_stack|mix_factor|time_mix_conv", n):
            out[conditioner + n.removeprefix(first)] = t
    return out | {conditioner + "post_quant_conv.weight": like.new_empty(4, 4, 1, 1),
                  conditioner + "post_quant_conv.bias": like.new_empty(4)}


@pytest.fixture(scope="module")
def full():
    """The full-size networks, without storage, and {published file: {name: tensor}} of them."""
    with torch.device("meta"):
        unet, vae, clip = exsvd.UNet(), exsvd.VAE(), exsvd.ImageEncoder()
        single = named(unet, "sgm") | named(vae, "sgm") | named(clip, "sgm") | sgm_leftovers(vae)
        tensors = [single, *(named(net, "diffusers") for net in (unet, vae, clip))]
        files = dict(zip(PUBLISHED, [*tensors, named(exsvd.extend(unet), "exvideo")]))
    return unet, vae, clip, files


@pytest.fixture(scope="module")
def published(full, tmp_path_factory):
    """A folder with the published files, as far as names and shapes go: all 0, and sparse."""
    folder = tmp_path_factory.mktemp("published")
    for file, tensors in full[-1].items():
        header, end = {}, 0
        for name, t in tensors.items():
            begin, end = end, end + 2 * t.numel()
            header[name] = {"dtype": "F16", "shape": list(t.shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(folder / file, 8 + len(text) + end)
    return folder


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


def test_published_files_fill_the_networks(published):
    """Nothing is missing, and nothing left over but what no network of ours has."""
    release = published / "ExVideo-SVD-128f-v1"
    for model in (published / "svd_xt.safetensors", published):
        svd = exsvd.load(model, device="meta")
        sizes = [sum(p.numel() for p in net.parameters()) for net in (svd.unet, svd.vae, svd.clip)]
        assert sizes == [1_524_623_082, 97_742_847, 632_076_800]
        unet = exsvd.load(model, release, device="meta").unet
        assert unet.max_frames == 128 and sum(p.numel() for p in unet.parameters()) == 1_860_773_802
    extension = exsvd.locate(unet, exsvd.Tensors(release))
    assert list(extension) == freeze(unet)
    assert sum(unet.get_parameter(n).numel() for n in extension) == 832_956_800


# --------------------------------------------------------------------------------------------------
# Files

CONFIG = {"unet": vars(UNET), "vae": vars(VAE), "clip": vars(CLIP)}
CONFIG = {"exsvd": json.dumps({"config": CONFIG})}


@contextlib.contextmanager
def refused(*words):
    """What is done here is refused in one line that says this."""
    with pytest.raises(exsvd.WeightsError) as e:
        yield
    line = str(e.value)
    assert "\n" not in line and len(line) < 1200 and all(re.search(w, line) for w in words), line


def write_model(path, layout, nets, dtype=torch.float32):
    """nets at path, as somebody else would have written them."""
    names = "sgm" if layout == "single" else "diffusers"
    tensors = [{n: t.to(dtype) for n, t in named(net, names).items()} for net in nets]
    if layout == "single":
        everything = tensors[0] | tensors[1] | tensors[2]
        everything |= sgm_leftovers(randomize(exsvd.VAE(VAE), seed=9))
        save_file(everything, path / "svd.safetensors", metadata=CONFIG)
        return path / "svd.safetensors"
    tensors[2]["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # in older files
    fp16 = ".fp16" if dtype == torch.float16 else ""
    for stem, t in zip(exsvd.FOLDER.values(), tensors):
        folder = path / os.path.dirname(stem)
        folder.mkdir(exist_ok=True)
        save_file(t, f"{path / stem}{fp16}.safetensors", metadata=CONFIG)
        (folder / "config.json").write_text(json.dumps({"num_frames": 14}))
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


def extension_of(module):
    """What an extension file of the module holds."""
    return {n: t for n, t in module.state_dict().items() if exsvd.is_extension_parameter(n)}


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
    if layout == "folder":  # full precision is preferred to what lies beside it
        write_model(tmp_path, layout, files.nets)
        same(exsvd.load(path, parts=("clip",)).clip, files.nets[2].state_dict())
    assert sample.vae_id(path) == sample.vae_id(files.single), "another VAE's decoder is in there"


def test_dtypes(files):
    def trained(name):
        return name.startswith("unet") and exsvd.is_extension_parameter(name) or name == "clip.proj"

    def wide(name):  # the VAE's encoder exceeds float16's range
        return trained(name) or name.startswith(("vae.encoder.", "vae.quant_conv."))

    svd = exsvd.load(files.single, files.own, torch.float16, keep_float32=trained)
    for part, mine in zip(exsvd.FOLDER, files.nets):
        state = mine.state_dict() | (extension_of(files.longer) if part == "unet" else {})
        for name, p in getattr(svd, part).named_parameters():
            assert p.dtype == (torch.float32 if wide(f"{part}.{name}") else torch.float16), name
            assert torch.equal(p, state[name].to(p.dtype)), name


@pytest.mark.parametrize("extension, dtype", [("release", torch.float16), ("own", torch.float32)],
                         ids=str)
def test_load_extensions(files, extension, dtype):
    svd = exsvd.load(files.folder, getattr(files, extension), parts=("unet",))
    trained = {n: t.to(dtype).float() for n, t in extension_of(files.longer).items()}
    same(svd.unet, files.nets[0].state_dict() | trained)
    own = {"step": 7, "architecture": "exvideo", "frames": 12, "native_frames": 25,
           "ids": ["fps", "motion", "aug"]}
    assert svd.extension == (own if extension == "own" else {})
    assert svd.vae is None and svd.unet.max_frames == 12
    native = 25 if extension == "own" else 14  # of the base that it was made from
    assert svd.unet.config.native_frames == native


def test_whole_models_of_ours(tmp_path, files):
    path, defaults = tmp_path / "model.safetensors", {"sample": {"steps": 8}}
    exsvd.save_model(path, files.longer, *files.nets[1:], dtype=torch.float16, defaults=defaults)
    svd = exsvd.load(path, parts=("unet",))
    same(svd.unet, {n: t.half().float() for n, t in files.longer.state_dict().items()})
    assert svd.unet.max_frames == 12 and svd.meta["defaults"] == defaults
    again = exsvd.load(path, files.release, parts=("unet",))  # one extension over another
    assert again.unet.max_frames == 12


def test_a_unet_by_itself(tmp_path, files):
    """With the prefixes of training tools, in any layout."""
    other, folder = make_unet(seed=8), shutil.copytree(files.folder / "unet", tmp_path / "unet")
    in_folder, sgm = folder / "diffusion_pytorch_model.safetensors", tmp_path / "sgm"
    for path, layout, prefix in ((in_folder, "diffusers", "model."), (tmp_path / "x", "ours", ""),
                                 (sgm, "sgm", "module._orig_mod.unet.")):
        tensors = {prefix + n: t for n, t in named(other, layout).items()}
        save_file(tensors, path, metadata=CONFIG)
    for path in (folder, in_folder, sgm, tmp_path / "x"):
        svd = exsvd.load(files.single, unet=path)
        same(svd.unet, other.state_dict())
    same(svd.vae, files.nets[1].state_dict())
    assert svd.meta["note"] == "hello"
    same(exsvd.load(sgm, parts=("unet",)).unet, other.state_dict())
    for alone in (sgm, folder):
        with refused("UNet alone.* as --unet"):
            exsvd.load(alone)


# --------------------------------------------------------------------------------------------------
# Extension files, the paper's and others


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
    exsvd.save_extension(path, unet, over=[files.release])
    assert "over" not in exsvd.Tensors(path).meta, "it holds all that the file below it does"
    own, release = (exsvd.Tensors(file).fingerprint() for file in (files.own, files.release))
    assert own == release, "the same weights, in another dtype"
    for name in ("module.x", "conv_out.bias"):  # wrong names, and parameters that would be left out
        with pytest.raises(ValueError, match=f"{name} is no parameter of an extension"):
            exsvd.save_extension(path, unet, {name: torch.zeros(1)})
    with pytest.raises(ValueError, match="not extended"):
        exsvd.save_extension(path, files.nets[0])


def test_extensions_that_hold_less_or_other_things(tmp_path, files):
    def load(tensors, **meta):
        save_file(tensors, tmp_path / "x", metadata={"exsvd": json.dumps(meta)})
        return exsvd.load(files.single, tmp_path / "x", parts=("unet",)).unet

    whole, meta = load_file(files.own), exsvd.Tensors(files.own).meta
    unet = load({n: t for n, t in whole.items() if "attn1" in n}, **meta)
    base = exsvd.load(files.single, parts=("unet",)).unet
    want, trained = exsvd.extend(base, 12).state_dict(), files.longer.state_dict()
    same(unet, want | {n: trained[n] for n in want if ".attn.temporal.attn1" in n})
    unet = load(whole, native_frames=8)  # an older file
    assert unet.max_frames == 12 and unet.config.native_frames == 8
    with refused("'rotary', but this code has 'exvideo'"):
        load(whole, **meta | {"architecture": "rotary"})


@pytest.fixture
def lora(monkeypatch):
    """The modification that toy/lora.py makes of section 4, until the test ends."""
    for name in ("extend", "is_extension_parameter"):
        monkeypatch.setattr(exsvd, name, getattr(exsvd, name))
    monkeypatch.delitem(sys.modules, "toy.lora", raising=False)
    return importlib.import_module("toy.lora")


@torch.no_grad()
def test_a_lora(tmp_path, published, files, lora):
    over = published / "svd_xt.safetensors", published / "ExVideo-SVD-128f-v1"
    unet = exsvd.load(*over, device="meta").unet
    trained = freeze(unet)
    assert len(trained) == 16 * 4 * 2 and all(n.endswith((".A", ".B")) for n in trained)
    assert sum(p.numel() for p in unet.parameters() if not p.requires_grad) == 1_860_773_802
    assert exsvd.load(files.single, files.own, parts=("unet",)).unet.max_frames == 12

    base, unet = (exsvd.load(files.single, parts=("unet",)).unet for _ in range(2))
    assert exsvd.extend(exsvd.extend(unet, 25), 25).max_frames == 25, "a second call adds nothing"
    inputs = unet_inputs(3, B=1)
    assert torch.equal(unet.requires_grad_(False)(*inputs), base(*inputs))
    for block in unet.temporal_blocks():
        block.attn1.to_out.B.normal_()
    assert not torch.equal(unet(*inputs), base(*inputs))
    exsvd.save_extension(tmp_path / "lora", unet)
    exsvd.save_model(tmp_path / "whole", unet, *files.nets[1:])
    assert len(load_file(tmp_path / "lora")) == 16 * 4 * 2
    for given in ((files.single, tmp_path / "lora"), (tmp_path / "whole",)):
        same(exsvd.load(*given, parts=("unet",)).unet, unet.state_dict())


# --------------------------------------------------------------------------------------------------
# Files that cannot be used


def test_files_that_are_no_models(tmp_path):
    path, zeros = tmp_path / "x.safetensors", {"x": torch.zeros(9)}
    good, pickles = to_bytes(zeros), []
    for zipped in (False, True):
        torch.save(zeros, path, _use_new_zipfile_serialization=zipped)
        pickles.append(path.read_bytes())
    metadata = ["{", "3", "null", "[1]", '{"config": {"unet": {"chan": 1}}}']
    for words, contents in {
            "is not a complete safetensors file": [b"", good[:20], good[:-1], good + b"0", b"<h>"],
            "is a Git LFS pointer": [b"version https://git-lfs.github.com/spec/v1\noid"],
            "is a pickled checkpoint, which is never opened": [*pickles, b"PK\x03\x04" + good],
            "": [to_bytes(zeros, {"exsvd": text}) for text in metadata],
            "is the image-decoder variant.*use svd_xt.safetensors": [
                to_bytes({"first_stage_model.post_quant_conv.weight": zeros["x"]})],
            "is an extension, not a model": [to_bytes({"blocks.7.norm_in.bias": zeros["x"]})],
    }.items():
        for content in contents:
            path.write_bytes(content)
            with refused(f"x.safetensors.*{words}"):
                exsvd.load(path)


def test_damaged_headers_are_noticed(tmp_path, files):
    net, path = files.nets[2], tmp_path / "x.safetensors"
    good = to_bytes(named(net, "diffusers"))
    header = 8 + int.from_bytes(good[:8], "little")
    for at, bit in itertools.product(
            (0, 1, 3, 7, 8, *range(9, header - 8, header // 20)), (0x01, 0x80)):
        path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1:])
        with refused("x.safetensors"):
            exsvd.locate(net, exsvd.Tensors(path))
    for begins in (b"\x80\x02", b"PK"):  # of a pickle and of a zip, here a header's length
        header = b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
        header = header.ljust(int.from_bytes(begins, "little"))
        path.write_bytes(begins + bytes(6) + header + np.float32([1, 2]).tobytes())
        assert exsvd.Tensors(path).get("x").tolist() == [1, 2]


def test_paths_that_cannot_be_loaded(tmp_path, files):
    none, folder = tmp_path / "none", shutil.copytree(files.folder, tmp_path / "folder")
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    for given, words in (([none], "none: no such weight file"),
                         ([files.single, none], "none: no such weight file"),
                         ([tmp_path], "no unet/diffusion_pytorch_model.safetensors"),
                         ([files.single, files.single], "is not an extension")):
        with refused(words):
            exsvd.load(*given, device="meta")
    weights.unlink()
    with refused("no vae/.*in several parts must be saved again with a larger max_shard_size"):
        exsvd.load(folder)


def test_tensors_that_do_not_fit(tmp_path, files):
    unet, vae, clip = files.nets
    good, joined, one = named(unet, "diffusers"), named(clip, "diffusers"), torch.zeros(1)
    release, first = named(files.longer, "exvideo"), "conv_in.weight"
    a, b = "time_embedding.linear_1.weight", "add_embedding.linear_1.weight"
    q = "vision_model.encoder.layers.0.self_attn.q_proj.weight"

    def without(part):
        return {n: t for n, t in release.items() if part not in n}

    for net, tensors, *words in (
            (unet, {"my.a": one, "my.b": one + 1}, "UNet .1428 tensors.: 1428 missing, such as",
             "2 unexpected, such as my.a, my.b"),
            # not all names have the prefix
            (unet, {f"module.{n}": t for n, t in good.items()} | {"a.b": one}, "1428 missing"),
            (unet, {n.replace(first, "conv_inn.weight"): t for n, t in good.items()},
             "1 missing, such as conv_in.weight", "1 unexpected, such as conv_inn.weight"),
            (unet, good | {a: good[b], b: good[a]}, "2 mis-shaped",
             rf"{a} \(128, 768\) instead of \(128, 32\)"),
            (clip, named(unet, "sgm"), "has nothing of the ImageEncoder"),
            (clip, joined | {q: joined[q][:3]}, r"q_proj.weight \(3, 64\)", "192, 64"),
            (vae, named(vae, "sgm") | named(vae, "diffusers"), "VAE", "unexpected"),  # two layouts
            (files.longer, without("_conv"), "32 missing"),
            (files.longer, without("embeddings"), "16 missing"),
            (files.longer, release | {"blocks.8.norm_in.weight": torch.zeros(32)},
             "1 unexpected, such as blocks.8.")):
        save_file(tensors, tmp_path / "x")
        with refused(*words):
            exsvd.locate(net, exsvd.Tensors(tmp_path / "x"))


def test_failing_save_leaves_the_old_file(tmp_path, monkeypatch, files):
    def disk_full(tensors, temporary, metadata):
        open(temporary, "wb").close()
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(exsvd, "save_file", disk_full)
    path, nets = tmp_path / "x.safetensors", (files.longer, *files.nets[1:])
    for save, saved in ((exsvd.save_model, nets), (exsvd.save_extension, nets[:1])):
        path.write_bytes(b"old")
        with pytest.raises(OSError, match="is the disk full"):
            save(path, *saved)
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.safetensors"]


def test_files_name_their_ids(tmp_path, files, monkeypatch):
    """A code that conditions on one more number loads the files of before: its weights are 0. What
    was trained with it is refused by a code that has another in its place."""
    Config = exsvd.UNetConfig

    def code_with(name):
        monkeypatch.setattr(exsvd, "UNetConfig", lambda: Config(ids=("fps", "motion", "aug", name)))

    monkeypatch.setattr(exsvd, "is_extension_parameter", lambda name: name == "cond_embed.0.weight")
    code_with("pan")
    unet = exsvd.load(files.single, files.own, parts=("unet",)).unet
    weight, known = unet.cond_embed[0].weight, 3 * exsvd.ID_DIM
    assert torch.equal(weight[:, :known], files.nets[0].cond_embed[0].weight)
    assert weight.shape[1] == known + exsvd.ID_DIM and not weight[:, known:].any()
    weight.normal_()
    exsvd.save_extension(tmp_path / "e", unet)
    exsvd.save_model(tmp_path / "m", unet, *files.nets[1:])
    for given in ((files.single, tmp_path / "e"), (tmp_path / "m",)):
        code_with("pan")
        assert torch.equal(exsvd.load(*given, parts=("unet",)).unet.cond_embed[0].weight, weight)
        code_with("zoom")
        with refused("conditioned on fps, motion, aug, pan, but.*zoom"):
            exsvd.load(*given, device="meta")


def test_a_saved_file_is_synced_as_windows_wants_it(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(os, "fsync", lambda fd: modes.append(fcntl.fcntl(fd, fcntl.F_GETFL)))
    exsvd.save(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, {})
    assert [mode & os.O_ACCMODE for mode in modes] == [os.O_RDWR]


# --------------------------------------------------------------------------------------------------
# 2. data.py: pictures and videos in and out


def corners(H=48, W=80):
    """A picture whose four quarters differ: uint8 (H, W, 3)."""
    colours = [[[200, 40, 40], [40, 180, 60]], [[50, 60, 210], [230, 230, 230]]]
    return np.array(colours, np.uint8).repeat(H // 2, 0).repeat(W // 2, 1)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


BEST = {"JPEG": {"quality": 95, "subsampling": 0}, "AVIF": {"quality": 95, "subsampling": "4:4:4"},
        "WEBP": {"lossless": True, "exact": True}}
LOSS = {"JPEG": 6, "AVIF": 8}  # of the corners, at the edges


def file_of(pixels, form, **options):
    """The bytes of an image file. pixels: uint8 (H, W, C), or a Pillow image."""
    if not isinstance(pixels, Image.Image):
        pixels = Image.fromarray(np.ascontiguousarray(pixels))
    file = io.BytesIO()
    pixels.save(file, form, **BEST.get(form, {}) | options)
    return file.getvalue()


def png_chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_head(W, H, bits):
    """How a PNG of RGB pixels begins."""
    header = struct.pack(">IIBBBBB", W, H, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def pictures():
    """Yields (what, file, the pixels that it shows, how far off they may be)."""
    image = Image.fromarray(corners())
    # How a camera stores an upright picture, for each value of the tag (EXIF 2.3).
    stored = [lambda u: u, np.fliplr, lambda u: np.rot90(u, 2), np.flipud,
              lambda u: u.swapaxes(0, 1), lambda u: np.rot90(u, 1),
              lambda u: np.rot90(u, 2).swapaxes(0, 1), lambda u: np.rot90(u, -1)]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = srgb[128:].replace(b"rXYZ", b"?").replace(b"gXYZ", b"rXYZ").replace(b"?", b"gXYZ")
    swapped, green = srgb[:128] + tags, corners()[..., [1, 0, 2]]  # what it calls red is green
    for form, loss in {"PNG": 0, "WEBP": 0, "TIFF": 0, **LOSS}.items():
        for i, turned in enumerate(stored, 1):
            exif = Image.Exif()
            exif[0x0112] = i
            yield f"{form} turned {i}", file_of(turned(corners()), form, exif=exif), corners(), loss
        yield f"{form} profile", file_of(corners(), form, icc_profile=swapped), green, loss + 1
    yield "palette profile", file_of(image.quantize(4), "PNG", icc_profile=swapped), green, 1
    yield "junk profile", file_of(corners(), "PNG", icc_profile=b"junk" * 50), corners(), 0
    cmyk = file_of(image.convert("CMYK"), "TIFF", icc_profile=swapped)
    yield "RGB profile of CMYK", cmyk, corners(), 1  # does not fit: ignored
    jpeg = file_of(corners(), "JPEG")
    for exif in (b"Exif\0\0", b"Exif\0\0II", b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        block = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        yield f"damaged {exif}", jpeg[:2] + block + jpeg[2:], corners(), LOSS["JPEG"]

    rgba = noise(9, 13, 4)
    alpha = rgba[..., 3:] / 255
    on_white = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha))
    for form in ("PNG", "WEBP", "TIFF"):
        yield f"{form} alpha", file_of(rgba, form), on_white, 1
    grey = np.array([[[0, 0], [0, 255], [100, 128]]], np.uint8)
    yield "grey alpha", file_of(grey, "PNG"), np.repeat([[[255], [0], [177]]], 3, 2), 1
    palette = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    want = np.array([[[255, 0, 0], [127, 255, 127], [255, 255, 255]]])
    yield "palette alpha", file_of(palette, "PNG", transparency=bytes([255, 128, 0])), want, 1

    x = noise(7, 11, 6).view(">u2")  # 16 bits
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in x))
    rgb = png_head(11, 7, 16) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    yield "16 bits", rgb, x / 257, 1
    one, want = x[..., 0].astype(np.uint16), np.rint(np.repeat(x[..., :1], 3, 2) / 257)
    for form in ("PNG", "TIFF", "PPM"):
        yield f"{form} 16 bits", file_of(one, form), want, 0
    yield "float", file_of(one.astype(np.float32) / 65535, "TIFF"), want, 0
    second = {"save_all": True, "append_images": [Image.fromarray(255 - corners())], "duration": 9}
    for form, loss in {"PNG": 0, "WEBP": 0, "GIF": 3}.items():
        yield f"{form} animated", file_of(image, form, **second), corners(), loss


def check_pixels(path, pixels, tolerance):
    image = data.read_image(path)
    assert image.dtype == torch.uint8 and image.shape == pixels.shape
    assert np.abs(image.numpy().astype(int) - np.asarray(pixels).astype(int)).max() <= tolerance


@pytest.mark.parametrize("file, pixels, tolerance",
                         [pytest.param(*x, id=what) for what, *x in pictures()])
def test_pictures_are_upright_srgb_and_on_white(tmp_path, capfd, file, pixels, tolerance):
    (tmp_path / "x").write_bytes(file)
    check_pixels(tmp_path / "x", pixels, tolerance)
    assert capfd.readouterr() == ("", "")


def test_content_decides_not_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.jpg", "x.mp4", "a%03d.png", "no extension", "concat:x", "-", "x.txt", "pipe:0"):
        data.write_png(name, corners())
        for picture in (name, Image.open(name)):
            check_pixels(picture, corners(), 0)


NOISE = noise(60, 80, 3)
LARGE = png_head(20000, 10000, 8) + file_of(NOISE, "PNG")[33:]
RAW = file_of(NOISE, "TIFF", tiffinfo={254: 1})  # a thumbnail comes first
BAD_PICTURES = {  # what a file holds, words of the message
    "empty": (b"", "Invalid data"), "text.png": (b"no image\n" * 50, "Invalid data"),
    "noise": (NOISE.tobytes(), "Invalid data"), "a\nb": (b"?", "Invalid data"),
    "x.heic": (b"\0\0\0\x18ftypheic" + bytes(99), "Invalid data"),
    "large.png": (LARGE, "more than 179 megapixels: shrink it"),
    "float.tif": (file_of(np.full((9, 9), 1.5, np.float32), "TIFF"), "beyond .*: export it"),
    "minus.tif": (file_of(np.full((9, 9), -0.5, np.float32), "TIFF"), "beyond .*: export it"),
    "raw.dng": (RAW, "a raw photograph: export it"),
    "missing.png": (None, "No such file"), ".": (None, "Is a directory"),
    "x.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="5" height="5"/>', "no picture"),
    "list.png": (b"ffconcat version 1.0\nfile photos/a.png\n", "cannot be read")}  # nor is a.png
for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF", "BMP"):
    whole = file_of(NOISE, form)
    for part in (0.05, 0.3, 0.6, 0.9, 0.98):
        BAD_PICTURES[f"{part} of {form}"] = whole[:int(len(whole) * part)], "cannot be read"
BAD_LISTS = {
    "a.json": (b'{"good.mp4": 1}', "its JSON is not a list"), "b.json": (b"[", "Expecting value"),
    "c.json": (b'["a", {"cap": 1}]', "has the columns 'cap'; .* path, video or file"),
    "d.csv": (b"file_name,text\na,b", "has the columns 'file_name', 'text'"),
    "e.csv": (b"path;text\na;b", "has the columns 'path;text'"), "f.txt": (b"\xff", "can't decode"),
    "g.txt": (b"", "0 of 0 files"), "h.xyz": (b"", "no such folder")}
BAD_TARGETS = {  # frames per second, words
    "x.avi": (5, "must end in"), "photos/a.png": (5, "must end in"), "photos": (5, "exists"),
    "folder.mp4": (5, "exists"), "x.mp4": (0, "above 0"), "y.mp4": (math.nan, "above 0"),
    "x.gif": (60, "at most 50")}


@pytest.mark.parametrize("name", [*BAD_PICTURES, *BAD_LISTS, *BAD_TARGETS])
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, capfd, name):
    content, words = (BAD_PICTURES | BAD_LISTS | BAD_TARGETS)[name]
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "photos").mkdir()
    data.write_png(tmp_path / "photos" / "a.png", corners())
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    before = contents(tmp_path)
    with pytest.raises(data.MediaError, match=words) as e:
        if name in BAD_TARGETS:
            data.VideoWriter(tmp_path / name, content)
        read = data.read_image if name in BAD_PICTURES else open_clips
        read(tmp_path / name)
    assert str(e.value).isprintable() and data.one_line(tmp_path / name) in str(e.value)
    assert contents(tmp_path) == before and capfd.readouterr() == ("", "")


def test_heic_is_read_whole_or_refused_with_the_line_to_install(tmp_path, monkeypatch):
    pytest.importorskip("pillow_heif")
    (tmp_path / "x").write_bytes(file_of(corners(), "HEIF", quality=95, chroma=444))
    check_pixels(tmp_path / "x", corners(), 8)
    monkeypatch.setattr(data, "PICTURES", [x for x in data.PICTURES if x != "HEIF"])
    with pytest.raises(data.MediaError, match="pip install pillow-heif"):
        data.read_image(tmp_path / "x")


PIXEL_FORMATS = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le", "gif": "rgb8", "ffv1": "yuv444p"}
CODEC_OPTIONS = {"libx264": {"crf": "12"}, "libx265": {"x265-params": "log-level=none"},
                 "libvpx-vp9": {"cpu-used": "8", "crf": "10", "b": "0"}}


def write_video(path, frames, codec="libx264", rate=30, times=None, aspect=None, metadata={},
                context={}, **options):
    """frames: uint8 (T, H, W, 3), or av.VideoFrames, which stay as they are; times in ms; context:
    attributes of the encoder."""
    base = Fraction(1, rate) if times is None else Fraction(1, 1000)
    with av.open(str(path), "w") as c:
        s = c.add_stream(codec, rate=rate, options=CODEC_OPTIONS.get(codec, {}) | options)
        s.metadata.update(metadata)
        form = PIXEL_FORMATS.get(codec, "yuv420p")
        about = {"gop_size": 12, "time_base": base} | context
        about |= {"qmin": 2, "qmax": 2} if codec.startswith(("mpeg", "mjpeg")) else {}
        about |= {"sample_aspect_ratio": aspect} if aspect else {}
        for x, time_stamp in zip(frames, times or itertools.count()):
            if not isinstance(x, av.VideoFrame):
                x = av.VideoFrame.from_ndarray(np.ascontiguousarray(x), "rgb24")
                x = x.reformat(format=form)
            x.pts, x.time_base = time_stamp, base
            if not s.codec_context.is_open:
                s.width, s.height, s.pix_fmt = x.width, x.height, x.format.name
                for name, value in about.items():
                    setattr(s.codec_context, name, value)
            c.mux(s.encode(x))
        c.mux(s.encode(None))
    return path


def pq(nits):
    """The code value in [0, 1] of SMPTE ST 2084."""
    y = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


@pytest.mark.parametrize("curve, white, quarter, grey", [
    (16, pq(203), pq(50.75), 143), (18, 0.75, 0.5, 143), (14, 1, 0.5, 127)],
    ids=["PQ", "HLG", "SDR"])
def test_hdr_and_bt2020_become_sdr(tmp_path, curve, white, quarter, grey):
    """White of 203 nits, a quarter of its light, and (of SDR) BT.709's red in BT.2020."""
    red = np.array([0.6274, 0.0691, 0.0164]) ** (1 / 2.4)
    codes = np.stack([[white] * 3, [quarter] * 3, red]).repeat(16, 0)[None].repeat(32, 0)
    want = np.array([[255] * 3, [grey] * 3, [255, 0, 0]]).repeat(16, 0)[None].repeat(32, 0)
    frame = av.VideoFrame.from_ndarray(np.rint(65535 * codes).astype(np.uint16), "rgb48le")
    frame = frame.reformat(format="yuv444p10le", dst_colorspace=9, dst_color_range=1)
    named = {"color_trc": curve, "color_primaries": 9, "colorspace": 9, "color_range": 1}
    files = [write_video(tmp_path / "v.mkv", [frame], "ffv1", context=named)]
    if curve == 16:
        codes = np.rint(255 * codes).astype(np.uint8)
        avif, png = file_of(codes, "AVIF"), file_of(codes, "PNG")
        at = avif.index(b"colrnclx") + 8
        files += [tmp_path / "x.avif", tmp_path / "x.png"]
        files[1].write_bytes(avif[:at] + bytes([0, 9, 0, curve]) + avif[at + 4:])
        files[2].write_bytes(png[:33] + png_chunk(b"cICP", bytes([9, curve, 0, 1])) + png[33:])
    for file in files:
        error = np.abs(data.read_image(file).numpy() - want)
        assert error[:, :32].max() <= 4
        assert curve != 14 or error[:, 32:].max() < 30, "off by 84 where it is not converted"


@pytest.mark.parametrize("H, W, form, coefficients", [
    (48, 80, "yuv420p", (1.5960, 0.3918, 0.8130, 2.0172)),  # BT.601
    (66, 34, "yuv420p10le", (1.5960, 0.3918, 0.8130, 2.0172)),
    (720, 64, "yuv420p", (1.7927, 0.2132, 0.5329, 2.1124))])  # BT.709, as in players
def test_colours_of_untagged_videos_are_exact(tmp_path, H, W, form, coefficients):
    chroma = np.linspace(100, 160, W // 2).round()[None].repeat(H // 2, 0)
    planes = [100 + noise(H, W) // 4, chroma, 255 - chroma]
    packed = np.concatenate([p.flatten() for p in planes]).reshape(-1, W)
    packed = 4 * packed.astype(np.uint16) if "10" in form else packed.astype(np.uint8)
    path = write_video(tmp_path / "x.mkv", [av.VideoFrame.from_ndarray(packed, form)], "ffv1")
    y, cb, cr = (torch.from_numpy(p).float() for p in planes)
    cb, cr = (F.interpolate(p[None, None], scale_factor=2, mode="bilinear")[0, 0] - 128
              for p in (cb, cr))
    y = 1.1644 * (y - 16)
    a, b, c, d = coefficients
    want = torch.stack([y + a * cr, y - b * cb - c * cr, y + d * cb], -1).clamp(0, 255)
    error = (data.read_image(path) - want).abs()
    assert error.mean() < 0.7 and error.max() <= 4, (error.mean(), error.max())


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_alpha_of_webm_is_laid_on_white(tmp_path, codec):
    rgba = np.zeros((48, 64, 4), np.uint8)
    rgba[:, :32] = [200, 40, 40, 255]
    frame = av.VideoFrame.from_ndarray(rgba, "rgba").reformat(format="yuva420p")
    path = write_video(tmp_path / "x.webm", [frame], codec, metadata={"alpha_mode": "1"},
                       **{"auto-alt-ref": "0"})
    image = data.read_image(path).int()
    assert (image[:, 4:28] - torch.tensor([200, 40, 40])).abs().max() < 12
    assert image[:, 36:].min() > 243 and data.scan(path)["frames"] == 1


def test_fit_image_covers_crops_and_does_not_distort():
    for H, W, width, height in [(300, 500, 64, 64), (80, 48, 192, 64), (97, 131, 64, 192)]:
        y, x = np.mgrid[0:H, 0:W] + 0.5
        ramp = np.stack([x, y, 0 * x], -1) * 255 / max(H, W)
        out = data.fit_image(torch.from_numpy(ramp).byte(), width, height)
        assert out.shape == (3, height, width) and out.dtype == torch.float32
        scale = max(width / W, height / H)  # of both axes, about the centre
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        want = [(x + 0.5 - width / 2) / scale + W / 2, (y + 0.5 - height / 2) / scale + H / 2]
        error = (out[:2] + 1) / 2 * max(H, W) - torch.stack(want)
        assert error[:, 4:-4, 4:-4].abs().max() < 1 / scale + 2
    img = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    assert torch.equal(data.to_uint8(data.fit_image(img, 16, 16)), img.permute(2, 0, 1))


def test_default_size_keeps_the_aspect_ratio_and_bounds_the_area():
    assert data.default_size(1920, 1080, 1024 * 576) == (1024, 576)
    assert data.default_size(1080, 1920, 1024 * 576) == (576, 1024)
    for area in (64 * 64, 128 * 128, 512 * 512, 1024 * 576):
        for w, h in [(1, 1), (3, 2), (4, 3), (9, 16), (10000, 10), (1, 5000), (7, 1)]:
            W, H = data.default_size(w, h, area)
            assert W % 64 == H % 64 == 0 and area / 2 <= W * H <= 2 * area, (w, h, area, W, H)


def contents(folder):
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def ramps(T=12):
    y, x, t = torch.meshgrid(torch.arange(48), torch.arange(64), torch.arange(T), indexing="ij")
    frames = torch.stack([3 * x + 4 * t, 5 * y, 255 - 2 * x - 2 * y + 3 * t])
    return frames.permute(3, 1, 2, 0).clamp(0, 255).to(torch.uint8)


def write(path, parts, fps=7.5, settings=None):
    with data.VideoWriter(path, fps, settings) as v:
        for part in parts:
            v.write(part)


@pytest.mark.parametrize("name, least", [("x.mp4", 38), ("x.webm", 36), ("x.gif", 32)])
def test_a_video_survives_writing(tmp_path, name, least):
    settings = {"seed": 3, "prompt": "ü \"quoted\"", "cfg": [1.0, 3.0]}
    write(tmp_path / name, [ramps()], settings=settings)
    video, fps = data.read_video(tmp_path / name)
    assert video.shape == ramps().shape and abs(fps - 7.5) < (0.2 if name == "x.gif" else 1e-6)
    mse = (video.double() - ramps().double()).square().mean()
    assert 10 * torch.log10(255 ** 2 / mse) >= least
    assert torch.equal(data.read_image(tmp_path / name), video[0])
    assert data.read_settings(tmp_path / name) == (None if name == "x.gif" else settings)
    if name == "x.gif":
        with Image.open(tmp_path / name) as gif:  # ms: delays are whole 1/100 s
            shown = [gif.seek(i) or gif.info["duration"] for i in range(12)]
        assert shown == 4 * [130, 140, 130]


@pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.gif", "run1.5/"])
def test_pieces_give_the_same_bytes_and_a_failure_leaves_the_old_file(tmp_path, name):
    write(f"{tmp_path}/{name}", [ramps()], settings={"seed": 3})
    old = contents(tmp_path)
    write(f"{tmp_path}/{name}", ramps().split(1), settings={"seed": 3})
    assert contents(tmp_path) == old

    def interrupted():
        yield 255 - ramps()
        raise KeyboardInterrupt
    for error, parts in ((KeyboardInterrupt, interrupted()), (data.MediaError, []),
                         (ValueError, [ramps(), ramps()[:, :16]])):  # of two sizes
        with pytest.raises(error):
            write(f"{tmp_path}/{name}", parts)
        assert contents(tmp_path) == old
    if name == "run1.5/":
        assert list(old) == [f"run1.5/frame_{i:04d}.png" for i in range(12)]
        assert torch.equal(torch.stack([data.read_image(tmp_path / x) for x in old]), ramps())
        write(f"{tmp_path}/{name}", [ramps(7)])
        assert list(contents(tmp_path)) == list(old)[:7] and os.listdir(tmp_path) == ["run1.5"]


def test_mp4_is_what_browsers_play(tmp_path):
    red = torch.tensor([250, 90, 90], dtype=torch.uint8).expand(3, 63, 65, 3)  # odd: padded to even
    write(tmp_path / "x.mp4", [red], fps=24000 / 1001)
    raw = (tmp_path / "x.mp4").read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat") and b"Lavf" not in raw
    with av.open(str(tmp_path / "x.mp4")) as c:
        s = c.streams.video[0].codec_context
        assert (s.name, s.pix_fmt, s.width, s.height) == ("h264", "yuv420p", 66, 64)
        assert s.colorspace == s.color_primaries == s.color_trc == s.color_range == 1  # BT.709
        assert abs(c.streams.video[0].average_rate - 24000 / 1001) < 1e-4
    assert (data.read_video(tmp_path / "x.mp4")[0].int() - red[0, 0, 0].int()).abs().max() <= 3


# --------------------------------------------------------------------------------------------------
# 3. data.py: videos to clips and latents


def scene(n, frames=48, size=64):
    """A camera pans over smooth noise: uint8 (T, H, W, 3)."""
    coarse = Image.fromarray(np.random.default_rng(n).integers(0, 256, (6, 12, 3), np.uint8))
    wide = np.asarray(coarse.resize((3 * size, size), Image.Resampling.BICUBIC))
    return np.stack([wide[:, 2 * t:2 * t + size] for t in range(frames)])


def damage(path, number):
    """Overwrites a video packet, as a bad disk or a lossy link would."""
    with av.open(str(path)) as c:
        at, size = [(p.pos, p.size) for p in c.demux(c.streams.video[0]) if p.size][number]
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + bytes(size) + raw[at + size:])


def open_clips(source, frames=8, size=(64, 64), **kw):
    return data.open_dataset(source, frames=frames, size=size, **kw)


def same_item(a, b):
    return set(a) == set(b) and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k]))
                                    for k in a if k != "name") and a["name"] == b["name"]


def from_workers(dataset, numbers):
    """Items in that order, from two forked processes."""
    return torch.utils.data.DataLoader(dataset, batch_size=None, sampler=numbers, num_workers=2,
                                       multiprocessing_context="fork", timeout=60)


@pytest.mark.parametrize("name, codec, options", [
    ("a.mp4", "libx264", {"bf": "3"}), ("b.webm", "libvpx-vp9", {}), ("d.avi", "mjpeg", {}),
    ("c.avi", "mpeg4", {"bf": "2"}), ("k.mts", "libx264", {"bf": "3"}),
    ("e.mkv", "libsvtav1", {"preset": "12"}), ("f.mov", "prores_ks", {}),
    ("g.ts", "mpeg2video", {"bf": "2"}), ("j.mpg", "mpeg2video", {"bf": "2"}),
    ("h.mkv", "ffv1", {}), ("i.mkv", "libx265", {}),
    ("l.gif", "gif", {})])
def test_frames_found_by_seeking_are_those_decoded_from_the_start(tmp_path, name, codec, options):
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV has no {codec} here")
    path = write_video(tmp_path / name, scene(3), codec, **options)
    entry, gif = data.scan(path), name == "l.gif"
    assert entry["frames"] == 48 and entry["cuts"] == []
    assert data.frame_rate(data._times(entry)) == pytest.approx(30, rel=0.02 if gif else 0.002)
    every = torch.stack([x for x, _, _ in data.video_frames(path, (64, 64))]).permute(0, 3, 1, 2)
    error = data.to_float(every) - data.to_float(torch.from_numpy(scene(3))).permute(0, 3, 1, 2)
    assert len(every) == 48 and error.square().mean() < (0.1 if gif else 0.01)
    for first in (0, 5, 11, 12, 13, 30, 40):
        clip = data.read_clip(path, entry, np.arange(first, first + 8), (64, 64))
        assert torch.equal(clip, every[first:first + 8])


@pytest.mark.parametrize("name, codec, bf, packet, kept", [
    ("x.mkv", "libx264", 0, 16, [*range(16), *range(24, 48)]),
    ("x.mkv", "mpeg2video", 0, 16, [*range(16), *range(24, 48)]),
    ("x.avi", "mpeg4", 2, 13, [*range(12), *range(24, 48)])])  # read before frame 12 is decoded
def test_what_refers_to_a_damaged_frame_is_left_out(tmp_path, name, codec, bf, packet, kept):
    """Decoders conceal it, and call the frames that are predicted from it good."""
    path = write_video(tmp_path / name, scene(3), codec, g="12", bf=str(bf))
    whole = data.read_video(path)[0]
    damage(path, packet)
    assert torch.equal(data.read_video(path)[0], whole[kept])


def test_a_duplicate_time_stamp_costs_one_frame(tmp_path):
    times = [33 * t for t in range(48)]
    times[20] = times[19]
    path = write_video(tmp_path / "x.mkv", scene(0), "ffv1", times=times)
    clip = data.read_clip(path, data.scan(path), np.arange(18, 22), (64, 64))
    want = torch.from_numpy(scene(0)[[18, 19, 21, 22]]).permute(0, 3, 1, 2)
    assert (clip.int() - want.int()).abs().max() <= 4 and len(data.read_video(path)[0]) == 47


def test_frames_are_taken_by_number_or_by_time(tmp_path):
    """Of 61 frames, 25 per second on average, whose grey is 4 times their number."""
    times = np.cumsum([0] + [20, 25, 75] * 20).tolist()  # ms
    levels = 4 * np.arange(61, dtype=np.uint8)[:, None, None, None]
    write_video(tmp_path / "v.mkv", np.broadcast_to(levels, (61, 64, 64, 3)), times=times)

    def numbers_in(item):
        numbers = (item["video"].float().mean((1, 2, 3)) / 4).round().long().tolist()
        assert item["name"] == f"v.mkv@{numbers[0]}"
        return numbers

    item = open_clips(tmp_path, frames=6, stride=3)[0]
    assert np.diff(numbers_in(item)).tolist() == [3] * 5
    assert item["fps"] == pytest.approx(25 / 3, rel=1e-4)
    timed = open_clips(tmp_path, frames=6, fps=12.5)
    assert len(timed.starts("v.mkv")) == sum(t + 400 <= times[-1] + 37.5 for t in times)
    for n in range(5):
        numbers = numbers_in(timed[n])
        first, last = times[numbers[0]], times[numbers[-1]]
        nearest = [int(np.argmin([abs(t - first - 80 * k) for t in times])) for k in range(6)]
        assert numbers == nearest
        assert timed[n]["fps"] == pytest.approx(5000 / (last - first), rel=1e-4)


def first_frame(path, size):
    return data.read_clip(path, data.scan(path), [0], size)[0]


@pytest.mark.parametrize("aspect", [1, 2, Fraction(1, 2)], ids=str)
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_videos_are_read_as_they_are_shown(tmp_path, degrees, mirrored, aspect):
    """Pixels that are not square in a container that turns and mirrors, in every path."""
    x = np.broadcast_to(corners(64, 64), (4, 64, 64, 3))
    path = write_video(tmp_path / "x.mp4", x, aspect=Fraction(aspect))
    right, down = {0: (1, 1j), 90: (-1j, 1), 180: (-1, -1j), 270: (1j, -1)}[degrees]
    right = -right if mirrored else right  # where a step to the right leads, as x + iy
    plain, matrix = (struct.pack(">9i", *(int(65536 * n) for n in (
        x.real, x.imag, 0, y.real, y.imag, 0, 0, 0, 2**14))) for x, y in ((1, 1j), (right, down)))
    raw = path.read_bytes()
    at = raw.index(plain, raw.index(b"tkhd"))
    path.write_bytes(raw[:at] + matrix + raw[at + 36:])
    want = x[0].repeat(max(1, aspect), 1).repeat(max(1, 1 / Fraction(aspect)), 0)
    want = torch.from_numpy(np.rot90(want[:, ::-1] if mirrored else want, degrees // 90).copy())
    image = data.read_image(path)
    fitted = data.to_uint8(data.fit_image(image, 64, 48))
    frame = next(data.video_frames(path, (64, 48)))[0].permute(2, 0, 1)
    for got, wanted in ((image, want), (frame, fitted), (first_frame(path, (64, 48)), fitted)):
        assert got.shape == wanted.shape and (got.int() - wanted.int()).abs().float().mean() < 4


def test_frames_are_scaled_to_cover_like_pictures(tmp_path):
    x = Image.fromarray(noise(12, 36, 1).repeat(3, 2))
    x = np.asarray(x.resize((288, 96), Image.Resampling.BICUBIC))  # 8-pixel noise
    path = write_video(tmp_path / "x.mkv", x[None], "ffv1")
    for size in ((64, 64), (32, 32), (144, 48), (192, 192)):
        want = data.to_uint8(data.fit_image(data.read_image(path), *size)).int()
        error = (first_frame(path, size).int() - want).abs()
        assert error.float().mean() < 1 and error.max() <= 10


def test_clips_lie_between_hard_cuts_and_fast_motion_is_no_cut(tmp_path):
    a, b = scene(0, 30), scene(1, 26)
    flash = a.copy()
    flash[15] = 255
    fast, drawn = ([np.roll(a[0], shift, 1) for shift in shifts]  # drawn: changes every third frame
                   for shifts in (range(0, 270, 9), np.repeat(range(0, 50, 5), 3)))
    for name, frames in {"cut": [*a, *b], "flash": flash, "fast": fast, "drawn": drawn}.items():
        write_video(tmp_path / f"{name}.mp4", np.stack(frames))
    dataset = open_clips(tmp_path, frames=10)
    cuts = {name: entry["cuts"] for name, entry in dataset.index.items()}
    assert cuts == {"cut.mp4": [30], "drawn.mp4": [], "fast.mp4": [], "flash.mp4": []}
    starts = [*range(21), *range(30, 47)]
    assert dataset.starts("cut.mp4") == starts
    drawn = [dataset._draw(n) for n in range(3000)]
    assert {row for name, row in drawn if name == "cut.mp4"} == set(range(len(starts)))


@pytest.mark.parametrize("steps, settings, starts", [  # steps of time, in ms; clips have 8 frames
    ([1500] * 20, {}, None), (([40] * 6 + [60000]) * 3, {}, None), ([40] * 400, {"stride": 30}, None),
    ([100] * 40, {"fps": 12.0}, None), (([20] * 6 + [100]) * 4, {"fps": 25.0}, None),
    ([40] * 20 + [5000] + [40] * 20, {}, [*range(14), *range(21, 35)]),
    ([40] * 20 + [5000] + [40] * 20, {"fps": 25.0}, [*range(14), *range(21, 35)])],
    ids=["slow", "pauses", "stride", "fps", "fps in part", "a pause", "a pause, by time"])
def test_clips_have_no_pause_and_no_frame_twice(tmp_path, steps, settings, starts):
    times = np.cumsum([0] + steps).tolist()
    frames = np.broadcast_to(scene(0, 1, 16), (len(times), 16, 16, 3))
    write_video(tmp_path / "v.mkv", frames, "ffv1", times=times)
    write_video(tmp_path / "25.mkv", np.repeat(frames[:1], 300, 0), "ffv1", rate=25)
    dataset = data.Clips(tmp_path, 8, (64, 64), **settings)
    assert ("25.mkv" in dataset.names) == ("stride" not in settings)
    if starts:
        assert dataset.starts("v.mkv") == starts
    else:
        assert dataset.left_out["v.mkv"].startswith("too slow: ")


@pytest.fixture
def mixed(tmp_path):
    """A folder as people have them; clips of 24 frames are wanted of it."""
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    write_video(folder / "good.mp4", scene(0))
    write_video(folder / "deep" / "vp9.webm", scene(1, 30), "libvpx-vp9")
    write_video(folder / "short.mp4", scene(3, 12))
    write_video(folder / "still.mp4", np.repeat(scene(4, 1), 30, 0))
    write_video(folder / "bare.h264", scene(3))
    write_video(folder / "b.avi", scene(3), bf="3")
    write_video(folder / "x.mpg", scene(0), "mpeg2video", flags="+ildct+ilme", top="1")
    (folder / "junk.mp4").write_bytes(b"no video at all" * 99)
    (folder / "notes.doc").write_text("not looked at")
    whole = write_video(tmp_path / "whole.ts", scene(5), "mpeg2video").read_bytes()
    (folder / "cut off.ts").write_bytes(whole[:len(whole) * 2 // 3])
    (folder / "joined.ts").write_bytes(2 * whole)
    damage(write_video(folder / "broken.avi", scene(2), "mjpeg"), 24)
    return folder


def run_data(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
    return data.main()


def test_what_cannot_be_used_is_left_out_and_named(mixed, capsys, monkeypatch):
    flags = ["--frames", 24, "--size", "128x64", "--skip-static", 0.002]
    assert run_data(monkeypatch, "check", mixed, *flags) == 0
    out, stamps = capsys.readouterr().out, "bad time stamps: ffmpeg -i OLD -crf 16 NEW.mp4 "
    for words in ("4 of 11 files hold .*stride 1, 3 bad time stamps, 1 cannot be read, "
                  "1 interlaced, 1 static, 1 too short", f"bare.h264: {stamps}", f"b.avi: {stamps}",
                  "short.mp4: too short: 12 frames, 12 without a cut", f"joined.ts: {stamps}",
                  "x.mpg: interlaced: .* ffmpeg -i OLD -vf bwdif=0 "):
        assert re.search(words, out), out
    dataset = open_clips(mixed, frames=24, skip_static=0.002)
    assert dataset.names == ["broken.avi", "cut off.ts", "deep/vp9.webm", "good.mp4"]
    assert dataset.index["broken.avi"]["frames"] == 47
    for n in range(8):  # all of them can be read
        data.check_item(dataset[n], 24, (64, 64))
    assert run_data(monkeypatch, "check", mixed, "--frames", 500) == 1
    with pytest.raises(data.MediaError, match="6 too short.*nothing to use"):
        open_clips(mixed, frames=500)
    with pytest.raises(data.MediaError, match="x.mpg: interlaced"):
        data.read_image(mixed / "x.mpg")


def test_index_is_built_once_and_again_for_what_changed(mixed, monkeypatch):
    scan = spied(monkeypatch, data, "scan")
    first = open_clips(mixed)
    assert open_clips(mixed).index == first.index and scan.call_count == 11
    write_video(mixed / "short.mp4", scene(6, 9))
    assert open_clips(mixed).index["short.mp4"]["frames"] == 9
    index = mixed / data.INDEX
    index.write_bytes(index.read_bytes()[:-9])  # cut off by a full disk
    open_clips(mixed)
    open_clips(mixed)
    assert [call.args[0] for call in scan.call_args_list[11:]] == 2 * [str(mixed / "short.mp4")]


NAMES = ["deep/vp9.webm", "good.mp4"]
ROWS = [f'a\u2028b\u0085c\x0cd,"e,\n{"f" * 200_000}",{name}' for name in NAMES]
LISTS = {
    "a.txt": "\ufeffgood.mp4\r\n\ndeep/vp9.webm\n",
    "b.csv": "path\n" + "\n".join(NAMES),
    "c.csv": "\ufeffcaption,extra,video\r\n" + "\r\n".join(ROWS),
    "d.csv": "path,file\n,x\n" + ",x\n".join(NAMES) + ",x",  # with an empty cell
    "e.json": json.dumps([*NAMES, "two\nlines.mp4", "no \udcff", "\0"]),  # three can't be opened
    "f.json": "\ufeff" + json.dumps([{"path": name, "cap": "x"} for name in NAMES])}


@pytest.mark.parametrize("name", LISTS)
def test_lists_name_the_files(mixed, name):
    (mixed / name).write_text(LISTS[name], newline="")
    assert open_clips(mixed / name).names == NAMES


def test_links_to_folders_are_followed_but_not_in_circles(mixed, tmp_path):
    names = sorted([*data.list_files(mixed), "there/x.mp4"])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.mp4").touch()
    for link, folder in (("there", tmp_path / "elsewhere"), ("deep/up", mixed), ("self", mixed)):
        (mixed / link).symlink_to(folder, target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(mixed, target_is_directory=True)
    for hidden in (".trash", "@eaDir"):
        (mixed / hidden).mkdir()
        (mixed / hidden / "x.mp4").touch()
    assert list(data.list_files(mixed)) == names


def test_items_depend_on_seed_and_number_alone(mixed):
    dataset = open_clips(mixed, stride=2, size=(128, 64))
    items = [dataset[n] for n in range(12)]
    order = [item["name"].split("@")[0] for item in items]
    used = len(dataset.names)
    assert sorted(order[:used]) == sorted(order[used:2 * used]) == dataset.names
    for n, item in zip((11, 3, 0, 7), from_workers(dataset, [11, 3, 0, 7])):
        assert same_item(item, items[n])
    assert same_item(pickle.loads(pickle.dumps(dataset))[5], items[5])
    other = open_clips(mixed, stride=2, size=(128, 64), seed=1)
    assert [other[n]["name"] for n in range(12)] != [item["name"] for item in items]
    moved = open_clips(mixed.rename(mixed.with_name("moved")), stride=2, size=(128, 64))
    assert same_item(moved[4], items[4]) and moved.id == dataset.id  # names decide, not places


def test_a_file_that_goes_during_a_run_costs_a_line_and_another_clip(mixed, capfd):
    """Where no other is left, the error of a reader is one line."""
    dataset = open_clips(mixed, frames=24)
    before = [dataset[n] for n in range(20)]
    os.remove(mixed / "good.mp4")
    for n, item in enumerate(before):
        gone = item["name"].startswith("good.mp4")
        try:
            assert same_item(dataset[n], item) == (not gone)
        except data.MediaError:
            assert dataset._draw(n + 10**9)[0] == "good.mp4"  # the other clip is of the same file
    assert re.search("good.mp4: cannot be read: No such .*; another clip", capfd.readouterr().err)
    for path in mixed.rglob("*.*"):
        os.remove(path)
    with pytest.raises(data.MediaError, match=rf"^{mixed}\S*[^\n]*$"):
        list(from_workers(dataset, [0]))


def test_the_example_of_a_python_file_works(tmp_path, monkeypatch):
    with open(data.__file__) as f:
        lines = re.search("#   class Arrays.*clips = Arrays", f.read(), re.DOTALL)[0].split("\n")
    example = ["import glob, torch", "import numpy as np", *(line[4:] for line in lines)]
    (tmp_path / "my_clips.py").write_text("\n".join(example))
    (tmp_path / "arrays").mkdir()
    for n in range(3):
        np.save(tmp_path / "arrays" / f"{n}.npy", scene(n))
    monkeypatch.chdir(tmp_path)
    dataset = open_clips("my_clips.py", stride=1, fps=None)  # as train.py's defaults are
    data.check_item(dataset[0], 8, (64, 64))
    assert same_item(next(iter(from_workers(dataset, [5]))), dataset[5])
    with pytest.raises(data.MediaError, match="--stride.*for videos"):
        open_clips("my_clips.py", stride=2)


def test_a_bug_shows_its_traceback(mixed, monkeypatch):
    """Only errors of libraries are called damage."""
    dataset = open_clips(mixed)
    data.write_png(mixed / "x.png", corners())
    (mixed / "my_clips.py").write_text("clips = lambda frames, size, seed: size.typo")
    monkeypatch.setattr(data, "motion_score", lambda video: video.typo)
    monkeypatch.setattr(data, "_picture_pixels", lambda path, picture: picture.typo)
    for read in (lambda: dataset[0], lambda: data.read_image(mixed / "x.png"),
                 lambda: open_clips(mixed / "my_clips.py")):
        with pytest.raises(AttributeError, match="typo"):
            read()


PIXELS = {"video": torch.zeros(8, 3, 48, 64, dtype=torch.uint8), "fps": 8.0,
          "motion": np.float32(3), "pan": 1, "name": "a"}
LATENTS = {"latents": torch.zeros(8, 4, 6, 8), "cond": torch.zeros(4, 6, 8), "ctx": torch.zeros(16),
           "aug": torch.tensor(0.1), "fps": 8, "motion": 3.0, "pan": 0.5, "name": "a"}


@pytest.mark.parametrize("item, words", [
    (PIXELS, None), (LATENTS, None), ({}, '"video".*found None'),
    (PIXELS | {"video": torch.zeros(8, 3, 48, 64)}, '"video".*torch.float32 .*wanted.*torch.uint8'),
    (PIXELS | {"video": np.zeros((8, 48, 64, 3))}, r'"video".*ndarray of float64 \(8, 48, 64, 3\)'),
    (PIXELS | {"video": PIXELS["video"][..., :56]}, r"48, 56\), wanted.*48, 64\) or .*64, 64\)"),
    (PIXELS | {"fps": 0}, '"fps".*found 0, wanted a number > 0'),
    (PIXELS | {"motion": math.nan}, '"motion".*found nan'),
    (PIXELS | {"name": 3}, '"name".*found 3, wanted a str'),
    (LATENTS | {"ctx": torch.zeros(8)}, r'"ctx".*\(8,\), wanted .*\(16,\)'),
    (LATENTS | {"aug": None}, '"aug".*None'), (LATENTS | {"pan": "fast"}, '"pan".*fast')])
def test_an_item_that_breaks_the_contract_is_named(item, words):
    ids = ("fps", "motion", "aug", "pan")  # the UNet was modified: it wants a number more
    expected = pytest.raises(data.MediaError, match=words) if words else contextlib.nullcontext()
    with expected:
        data.check_item(item, 8, [(64, 48), (64, 64)], ctx_dim=16, ids=ids)


def test_motion_and_its_buckets_are_exvideos():
    x = torch.randint(256, (60, 3, 16, 16), dtype=torch.uint8)
    score = data.motion_score(x)
    assert score == pytest.approx(data.to_float(x).double().std(0).mean().item(), rel=1e-6)
    white = torch.full((300, 8, 8), 255, dtype=torch.uint8)
    assert data.motion_score(x[:1]) == data.motion_score(white) == 0
    published = data.EXVIDEO_MOTION.tolist()
    assert len(published) == 128 and published == sorted(published)
    some = [0, 0.012205946, 0.087700523, 0.198099136, 0.440871328]  # as in the release's JSON
    assert [published[i] for i in (0, 1, 40, 90, 127)] == some
    for i, t in enumerate(published):
        assert data.motion_bucket(t) == i
        assert data.motion_bucket(np.nextafter(t, -1)) == max(0, i - 1)
    assert data.motion_bucket(9.0) == 127 and data.motion_bucket(0.2, "64") == 64

    frames, motion = list(x.numpy()), data.Motion()  # whose running sums change nothing
    clips = [range(a, a + 8) for a in (0, 1, 2, 3, 4, 6, 7, 50)]
    clips += [range(5, 60, 7), range(6, 60, 7), [12, 12, 13, 15], [12, 13, 15, 15],
              [13, 15, 15, 15], [13, 13, 15, 15], [3], [4]]  # some twice
    for clip in clips:
        assert motion.score([frames[k] for k in clip]) == data.motion_score(x[clip])


def test_noise_on_condition_images_is_log_normal():
    draws = data.draw_conditions(0, [f"a.mp4@{n}" for n in range(2000)], (8, 8))[0].log()
    assert [draws.mean(), draws.std()] == pytest.approx([-3, 0.5], abs=0.05)
    assert data.draw_conditions(0, ["a"], (16, 8))[1].shape == (1, 3, 8, 16)


@pytest.fixture
def pair(tmp_path):
    """A folder of two short videos, of which one is tall and the other shown 3 : 2."""
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    write_video(tmp_path / "videos" / "a.mp4", scene(0, 14, 80)[:, :, :48])
    write_video(tmp_path / "videos" / "deep" / "b.mp4", scene(1, 12), aspect=Fraction(3, 2))
    return tmp_path / "videos"


OPTIONS_4 = {"frames": 4, "size": (64, 64), "stride": 2, "seed": 3}
SIZES = [(128, 64), (256, 128), (64, 128)]  # of two alike the first


@pytest.mark.parametrize("dtype, bound, more", [
    (torch.float32, 0, {}), (torch.float32, 0, {"fps": 13.0}),
    (torch.float32, 0, {"size": SIZES, "start_every": 3}),
    (torch.float16, 2**-11, {}), (torch.bfloat16, 2**-8, {})], ids=str)  # how far rounding can move
def test_latents_are_what_training_from_videos_sees(pair, tmp_path, small, dtype, bound, more):
    """Of several sizes a video takes the nearest in aspect ratio."""
    options = OPTIONS_4 | more
    svd = exsvd.load(small, parts=("vae", "clip"))
    data.encode(small, pair, tmp_path / "out", dtype, **options)
    videos = data.open_dataset(pair, **options)
    latents = data.open_dataset(tmp_path / "out", **options | {"start_every": 1})  # as encoded: 3
    assert latents.names == videos.names and latents.id == videos.id
    for n in range(4):
        a, b = videos[n], latents[n]
        data.check_item(b, 4, options["size"], ctx_dim=16)
        size = a["video"].shape[:1:-1]
        nearest = (64, 128) if a["name"].startswith("a") else (128, 64)
        assert size == (nearest if "size" in more else (64, 64))
        aug, noise = data.draw_conditions(3, [a["name"]], size)
        video = data.to_float(a["video"])
        cond, ctx = data.encode_condition(svd.vae, svd.clip, video[:1], aug, noise)
        wanted = {"latents": data.encode_frames(svd.vae, video), "cond": cond[0], "ctx": ctx[0]}
        assert all(rel(b[key], x) <= bound for key, x in wanted.items())
        assert all(a[key] == b[key] for key in ("fps", "motion", "name")) and b["aug"] == aug.item()


def test_latents_are_of_one_kind_of_clip_and_one_model(pair, tmp_path, small):
    data.encode(small, pair, tmp_path / "out", **OPTIONS_4)
    for change in ({"size": (64, 128)}, {"size": SIZES}, {"frames": 5}, {"stride": 1}, {"fps": 5}):
        with pytest.raises(data.MediaError, match=f"was encoded with {next(iter(change))}"):
            data.open_dataset(tmp_path / "out", **OPTIONS_4 | change)
    svd, other = exsvd.load(small), str(tmp_path / "other.safetensors")
    exsvd.save_model(other, svd.unet, svd.vae, svd.clip, torch.float16)  # the same model
    data.open_dataset(tmp_path / "out", model=other, **OPTIONS_4)
    with torch.no_grad():
        svd.vae.quant_conv.weight *= 1.01
    exsvd.save_model(other, svd.unet, svd.vae, svd.clip)
    flags = ["--frames", "4", "--size", "64x64", "--stride", "2", "--data", str(tmp_path / "out")]
    for use in (lambda: train.open_clips(train.parse(["--model", other, *flags]), 0),
                lambda: data.encode(other, pair, tmp_path / "out", **OPTIONS_4)):
        with pytest.raises(data.MediaError, match="was encoded with model"):
            use()


def test_half_precision_is_exact_enough_to_train_on(monkeypatch):
    svd, item = exsvd.load(sample.toy_files()[0]), world.clips(6, (128, 128), 7)[0]
    video, noise, found = data.to_float(item["video"]), torch.randn(1, 6, 4, 16, 16), []
    ids = exsvd.unet_ids(svd.unet.config.ids, item | {"aug": 0.0})
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr(data, "encoding_on", lambda device: (dtype, 4))  # float16 as on a GPU
        z = data.encode_frames(svd.vae, video)[None]
        cond, ctx = data.encode_condition(svd.vae, svd.clip, video[:1], torch.zeros(1), video[:1])
        given = z * exsvd.VAE_SCALE, torch.ones(1), noise, cond[None], ctx[None], ids
        found.append((z, exsvd.training_loss(svd.unet, exsvd.LOSSES["edm"], *given)))
    (exact, exact_loss), (half, half_loss) = found
    assert 0 < rel(half, exact) < 7e-4 and rel(half_loss, exact_loss) < 6e-4


def test_frames_beyond_the_range_of_float16_are_encoded_in_float32(monkeypatch):
    vae, video = randomize(exsvd.VAE(VAE)), torch.rand(5, 3, 32, 48)
    too_large = torch.cat([video, torch.full((2, 3, 32, 48), 6e4)])[[0, 5, 1, 2, 3, 6, 4]]
    exact, exact_too = data.encode_frames(vae, video), data.encode_frames(vae, too_large)
    monkeypatch.setattr(data, "encoding_on", lambda device: (torch.float16, 2))  # as on a GPU
    half, mixed = data.encode_frames(vae, video), data.encode_frames(vae, too_large)
    assert 0 < rel(half, exact) < 2e-3 and half.dtype == torch.float32
    assert rel(mixed[[0, 2, 3, 4, 6]], half) < 1e-3 and rel(mixed[[1, 5]], exact_too[[1, 5]]) < 1e-5


def test_encoding_goes_on_and_follows_the_videos(pair, tmp_path, small, monkeypatch, capsys):
    def run(*more, out="out"):
        flags = ["--model", small, "--data", pair, "--out", tmp_path / out]
        assert run_data(monkeypatch, "encode", *flags, *more) == 0
        files = (tmp_path / out).rglob("*.safetensors")
        return {path.name[0]: path.stat().st_mtime_ns for path in files}

    def stops(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if "b.mp4" in path:
            with open(path, "wb") as f:
                f.write(b"half of it")
            raise KeyboardInterrupt

    with patch.object(exsvd, "save_file", stops), pytest.raises(KeyboardInterrupt):
        run()
    with (patch.object(data, "_decode", lambda path: iter(())),  # a file that was changed meanwhile
          pytest.raises(SystemExit, match="b.mp4: .* those of the index: remove")):
        run()
    encode = Mock(side_effect=[data.unreadable("a.mp4", "x"), {"x": torch.ones(1)}])
    with (patch.object(data, "_encode_file", encode),
          pytest.raises(SystemExit, match="1 of 2 files .*a.mp4: cannot be read: x")):
        run(out="failed")
    assert list(data.latents_in(tmp_path / "failed")) == ["deep/b.mp4"]
    first, = contents(tmp_path / "out").keys() - {"latents.json"}
    written = (tmp_path / "out" / first).stat().st_mtime_ns
    both = run()
    assert both["a"] == written and run("--shard", 1, 2, out="shards").keys() == {"a"}
    assert run("--shard", 2, 2, out="shards").keys() == {"a", "b"}
    assert contents(tmp_path / "out") == contents(tmp_path / "shards")
    with pytest.raises(SystemExit, match="was encoded with seed 0, not 5"):
        run("--seed", 5)
    write_video(pair / "a.mp4", scene(5, 14))
    now = run()
    assert now["a"] > both["a"] and now["b"] == both["b"] and run() == now
    os.remove(pair / "deep" / "b.mp4")
    capsys.readouterr()
    assert run() == now and "deep/b.mp4" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--size", "64"], "WIDTHxHEIGHT"), (["--size", "72x64"], "nearest is 64x64"),
    (["--shard", 0, 2], "from 1 to"), (["--shard", 3, 2], "from 1 to"), (["--frames", "-1"], "at"),
    ([], "the index cannot be written .*: give a .txt list")])
def test_the_command_refuses_in_a_line(pair, monkeypatch, capsys, small, tmp_path, flags, words):
    (pair / data.INDEX).mkdir()  # as if the folder were read-only, which does not stop root
    args = ["encode", "--model", small, "--data", pair, "--out", tmp_path / "out", *flags]
    with pytest.raises(SystemExit) as e:
        run_data(monkeypatch, *args)
    assert re.search(words, f"{e.value} {capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# 4. sample.py: the command, on a small model with random weights

SAMPLING = {"size": [64, 64], "steps": 1, "sampler": "ddim", "eta": 1.0, "cfg": [1.0, 1.0],
            "fps": 8.0, "motion": 40.0, "dtype": "float32"}
TRAINING = {"frames": 10, "size": [64, 64], "lr": 1e-3, "warmup": 2, "checkpoint": "none",
            "drop": 0.0, "dtype": "float32"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    unet = exsvd.UNet(exsvd.UNetConfig((16, 32, 32, 32), (1, 1, 1, 1), 16, 8, 8))
    vae = exsvd.VAE(exsvd.VAEConfig((8, 16, 16, 16), 8))
    clip = exsvd.ImageEncoder(exsvd.CLIPConfig(32, 1, 2, 56, 16))
    exsvd.save_model(path, unet, vae, clip, defaults={"sample": SAMPLING, "train": TRAINING})
    return str(path)


@pytest.fixture(scope="module")
def small_vae(small):
    return exsvd.load(small, parts=("vae",)).vae


@pytest.fixture(scope="module")
def extensions(small, tmp_path_factory):
    """-> (our own extension to 20 frames, the same without metadata as the release is)"""
    own, release = (str(tmp_path_factory.mktemp("extension") / "e.safetensors") for _ in range(2))
    exsvd.save_extension(own, exsvd.extend(exsvd.load(small, parts=("unet",)).unet, 20))
    save_file(load_file(own), release)
    return own, release


@pytest.fixture
def pictures(tmp_path):
    paths = [str(tmp_path / name) for name in ("first.png", "second.png")]
    for number, path in enumerate(paths):
        pixels = sample.to_pixels(world.picture(0, number)[None, :, :96, :96])
        data.write_png(path, pixels[0])
    return paths


@pytest.fixture
def make(small, pictures, tmp_path):
    """make(flags) -> the path of what sample.py made: from the first picture with the small model,
    where the flags don't say otherwise."""

    def make(*flags, images=pictures[:1], name="a.mp4"):
        out = tmp_path / name
        sample.main([*map(str, [*images, "--model", small, "--out", out, *flags])])
        return out

    return make


def spied(monkeypatch, module, name):
    """-> a Mock that does what the function does, and has its calls"""
    spy = Mock(wraps=getattr(module, name))
    monkeypatch.setattr(module, name, spy)
    return spy


def oracle(monkeypatch, *clips):
    """From now on the model sees the first of these latents, then the second, ... in whatever it is
    shown. -> lists of what it will be shown, (x, sigma), and of the image latents it is
    conditioned on"""
    shown, conditions, clips = [], [], iter(clips)

    def guided(unet, image_latents, *_):
        conditions.append(image_latents)
        z = next(clips)

        def denoise(*x_and_sigma):
            shown.append(x_and_sigma)
            return z
        return denoise

    monkeypatch.setattr(sample, "guided", guided)
    return shown, conditions


def latents_of(out):
    return load_file(sample.latents_path(str(out)))["latents"]


def fitted(path):
    return data.fit_image(data.read_image(path), 64, 64)


def floats(frames):
    """uint8 (T,H,W,3) -> float32 (T,3,H,W) in [-1,1]"""
    return frames.permute(0, 3, 1, 2) / 127.5 - 1


def frames_of(folder):
    """What sample.py wrote as a folder of PNGs: uint8 (T,H,W,3)"""
    return torch.stack([data.read_image(path) for path in sorted(folder.glob("frame_*.png"))])


def test_video_from_an_image(make, monkeypatch, capsys):
    """Guided in an interval of noise levels."""
    denoise = spied(monkeypatch, exsvd, "denoise")
    out = make("--steps", 6, "--cfg", 2, 2, "--cfg-interval", 0.1, 10)
    sigmas = exsvd.karras_sigmas(6)[:-1].tolist()
    asked = [call.args[2].item() for call in denoise.call_args_list]
    assert sorted(asked) == sorted(sigmas + [s for s in sigmas if 0.1 < s <= 10])
    video, fps = data.read_video(out)
    assert video.shape == (8, 64, 64, 3) and fps == 8
    settings = data.read_settings(out)
    assert settings == settings | {"frames": 8, "steps": 6, "seed": 0, "cfg_interval": [0.1, 10]}
    assert not any("/" in str(value) for value in settings.values()), "a path gives away too much"
    text = capsys.readouterr().out
    assert "float32 on cpu" in text and "s to sample" in text and "at the peak" in text


def test_what_the_model_says_comes_out(make, small_vae, monkeypatch):
    """It is asked at the schedule's noise levels. The noise of one mean is standard normal."""
    z = torch.randn(1, 8, 4, 8, 8)
    shown, _ = oracle(monkeypatch, z)
    flags = "--schedule", "ays", "--sampler", "dpm++", "--steps", 4, "--share-mean"
    out = make(*flags, name="frames/")
    assert torch.equal(torch.stack([sigma for _, sigma in shown]), sample.ays_sigmas(4)[:-1])
    x, sigma = shown[0]
    noise = x / (sigma**2 + 1).sqrt()
    means = noise.mean((3, 4))
    assert torch.allclose(means, means[:, :1].expand_as(means), atol=1e-5)
    assert abs(noise.std() - 1) < 0.05 and not torch.allclose(noise[:, 0], noise[:, 1])
    assert torch.allclose(latents_of(out), z, atol=1e-4)
    expected = sample.to_pixels(small_vae.decode(z / exsvd.VAE_SCALE)[0])
    assert (frames_of(out).int() - expected.int()).abs().max() <= 1


def test_longer_than_the_table_in_rounds_to_an_end(make, extensions, pictures, monkeypatch):
    *clips, backward = clips_and_end = torch.randn(4, 1, 20, 4, 8, 8)
    oracle(monkeypatch, *clips_and_end)
    condition = spied(monkeypatch, sample, "condition")
    out = make("--extension", extensions[0], "--frames", 45, "--overlap", 4, "--decode-chunk", 45,
               "--end", pictures[1], name="frames/")
    # the last round alone knows the end
    clips[2] = torch.lerp(clips[2], backward.flip(1), torch.linspace(0, 1, 20).view(1, 20, 1, 1, 1))
    expected = torch.zeros(1, 45, 4, 8, 8)  # common frames fade from one round to the next
    for clip, start, shared in zip(clips, (0, 16, 25), (0, 4, 11)):
        fading = torch.linspace(1, 0, shared + 1)[:-1]
        weight = torch.cat([fading, torch.zeros(20 - shared)]).view(1, 20, 1, 1, 1)
        made = expected[:, start:start + 20]
        expected[:, start:start + 20] = torch.lerp(clip, made, weight)
    assert torch.allclose(latents_of(out), expected, atol=1e-4)
    first, *later, last = [call.args[1] for call in condition.call_args_list]
    assert torch.equal(first, fitted(pictures[0])) and torch.equal(last, fitted(pictures[1]))
    # a round is conditioned on its own first frame, as the model was trained
    video = floats(frames_of(out))
    assert [(video - img).square().mean((1, 2, 3)).argmin() for img in later] == [16, 25]


def test_rounds_and_key_frames_of_published_weights(
        make, small_vae, extensions, pictures, monkeypatch):
    """A later round is conditioned on the frame that a viewer sees. A key frame enters at the scale
    of the authors' encoder, and its statistics stay."""
    clips = torch.randn(2, 1, 20, 4, 8, 8)
    _, conditions = oracle(monkeypatch, *clips)
    out = make("--extension", extensions[1], "--frames", 24, "--overlap", 8,
               "--keyframe", f"14={pictures[0]}")
    z, s = latents_of(out), sample.Settings(match_stats=True, contrast=1.2)
    encoded = small_vae.encode(fitted(pictures[0])[None])
    assert torch.allclose(z[:, 14], encoded * 0.13025, atol=1e-5)
    assert torch.allclose(sample.adjust(z, s, [14])[:, 14], z[:, 14] * 1.2)
    clips[0][:, 14] = z[:, 14]
    seen = sample.adjust(clips[0], s, [14])[:, 4:5] / exsvd.VAE_SCALE
    assert torch.allclose(conditions[1], seen, atol=1e-4)
    write_video = spied(monkeypatch, sample, "write_video")
    make("--decode-only", sample.latents_path(str(out)), "--contrast", 1, images=())
    _, _, settings, _, keyframes = write_video.call_args.args
    assert settings.contrast == 1 and settings.match_stats and keyframes == [14]


def test_an_end_and_key_frames(make, small_vae, pictures, monkeypatch):
    a, b = torch.randn(2, 1, 8, 4, 8, 8)
    shown, _ = oracle(monkeypatch, a, b)
    out = make("--end", pictures[1], "--keyframe", f"3={pictures[1]}")
    assert torch.equal(shown[1][0], shown[0][0].flip(1)), "the end sees the video run backward"
    expected = torch.lerp(a, b.flip(1), torch.linspace(0, 1, 8).view(1, 8, 1, 1, 1))
    expected[:, 3] = small_vae.encode(fitted(pictures[1])[None]) * exsvd.VAE_SCALE
    assert torch.allclose(latents_of(out), expected, atol=1e-5)


def test_a_video_is_refined_from_where_the_strength_says(
        make, small_vae, extensions, pictures, monkeypatch):
    """The video and its latents start alike, at the scale of the weights: published ones take
    0.13025."""
    first = make("--frames", 8, name="first.mp4")
    video, fps = data.read_video(first)
    source, z = sample.latents_path(str(first)), latents_of(first) / exsvd.VAE_SCALE
    encoded = data.encode_frames(small_vae, floats(video))[None]
    noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    for path, given, flags, strength, scale in (
            (first, encoded, (), 0.5, exsvd.VAE_SCALE),
            (source, z, (), 1, exsvd.VAE_SCALE),
            (source, z, ("--extension", extensions[1]), 0.5, 0.13025)):
        shown, _ = oracle(monkeypatch, torch.randn(1, 4, 4, 8, 8))
        out = make("--video", path, "--strength", strength, "--steps", 4, "--seed", 5,
                   "--frames", 4, *flags, images=(), name="refined.mp4")
        s = sample.Settings(steps=4, strength=strength, schedule="karras")
        sigma = sample.noise_levels(s, True)[0]
        assert len(shown) == 4 and shown[0][1] == sigma, "all steps are made"
        start = given[:, [0, 2, 5, 7]] * scale + sigma * noise
        assert torch.allclose(shown[0][0], start, rtol=1e-4, atol=1e-3)
        refined, its_fps = data.read_video(out)
        assert refined.shape == (4, 64, 64, 3) and its_fps == fps / 2, "as long as it was"
    condition = spied(monkeypatch, sample, "condition")
    oracle(monkeypatch, torch.zeros(1, 8, 4, 8, 8))
    make("--video", source, images=pictures[1:], name="refined.mp4")
    assert torch.equal(condition.call_args.args[1], fitted(pictures[1]))
    with pytest.raises(data.MediaError, match="latents are of 64x64"):
        sample.open_video(source, (128, 128), small_vae, torch.device("cpu"), "x")


def test_a_video_to_refine_is_resampled_by_time():
    latents, times = torch.arange(20.0).view(20, 1, 1, 1), [i / 5 for i in range(10)]
    times += [2 + i / 50 for i in range(10)]  # 200 ms each, then 20 ms
    video = sample.Video(latents, torch.tensor(times), 9.2, None)
    found = sample.resampled(video, 12)[0].flatten().int().tolist()
    assert found == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 19]
    even = sample.Video(latents, torch.arange(20) / 5, 5, None)
    assert torch.equal(sample.resampled(even, 20)[0], latents)


def test_one_call_makes_what_the_command_makes(make, small, pictures):
    """Of a path, a Pillow image, or pixels; with Settings, or some of them by name."""
    folder = frames_of(make("--steps", 2, "--seed", 3, name="frames/"))
    svd, given, pixels = exsvd.load(small), dict(steps=2, seed=3), data.read_image(pictures[0])
    path = pictures[0]
    for image in (path, Image.open(path), pixels, pixels.numpy(), fitted(path)):
        frames = sample.generate(svd, image, device="cpu", **given)
        assert torch.equal(sample.to_pixels(frames), folder), type(image)
    for settings in (sample.settings_for(svd, given), sample.complete(svd, given)):
        assert torch.equal(sample.generate(svd, pixels, settings), frames)
    assert len(sample.generate(svd, pixels, settings, frames=3)) == 3
    for bad in (pixels.permute(2, 0, 1), floats(pixels[None])[0] * 255, torch.zeros(1, 64, 64),
                pixels[..., 0], pixels[None], torch.full((3, 64, 64), math.nan)):
        with pytest.raises(data.MediaError, match="a picture is"):
            sample.generate(svd, bad)
    with refused("setting cfg is not usable"):
        sample.generate(svd, pixels, cfg=2.0)


def test_the_toy_that_ships(all_threads, tmp_path):
    names = "toy.safetensors", "toy-exvideo.safetensors", "img.png"
    toy, tuned, image = (os.path.join(HERE, "assets", name) for name in names)
    assert os.path.getsize(toy) + os.path.getsize(tuned) < 32e6
    out = tmp_path / "a.mp4"
    sample.main([image, "--model", toy, "--extension", tuned, "--out", str(out),
                 "--size", "128x128"])  # a quarter of its own size, to save time
    frames, fps = data.read_video(out)
    size = frames.shape[1]
    picture = data.fit_image(data.read_image(image), size, size)
    m = measure.measure(floats(frames), picture, data.read_settings(out)["motion"], fps)
    assert len(frames) == 40
    assert 0.85 < m["arrival"] < 1.15 and m["rms"] < 0.08 and m["back"] < 0.03, m


def test_the_defaults_of_a_model_come_in_order():
    """The class, published weights, the model's file, the extension's file, flags. Where no file
    has a size, a video has as many pixels as published, in the picture's aspect ratio."""
    def has(s, **expected):
        assert asdict(s) == asdict(s) | expected

    unet = make_unet()
    svd = exsvd.SVD(unet, None, None, {}, None)
    has(sample.settings_for(svd), steps=25, size=(1024, 576), cfg=(1, 3), fps=7, native=25,
        dtype="float32", match_stats=False)
    has(sample.complete(svd, {}, (400, 100)), size=(1536, 384))
    unet.max_frames = 128
    published = replace(svd, extension={})
    has(sample.settings_for(published), steps=50, size=(512, 512), match_stats=True, contrast=1.2,
        encode_scale=0.13025)
    has(sample.complete(published, {}, (400, 100)), size=(1024, 256))
    sampling = {"steps": 8, "size": [256, 128], "cfg": [1, 1], "sampler": "lcm", "contrast": None}
    own = {"defaults": {"sample": {"size": [64, 64]}}}
    ours = replace(svd, meta={"defaults": {"sample": sampling}}, extension=own)
    has(sample.settings_for(ours, {"steps": 3}), steps=3, size=(64, 64), cfg=(1, 1),
        schedule="lcm", match_stats=False, contrast=1)
    has(sample.complete(ours, {}, (400, 100)), size=(64, 64))
    has(sample.complete(ours, {"size": (128, 64)}, (400, 100)), size=(128, 64))
    for bad in ({"steps": 0}, {"size": [100, 64]}, {"cfg": [1]}, {"sampler": "rm -rf"},
                {"out": "/etc/passwd"}, {"share_mean": 1}, {"fps": "fast"}, {"dtype": ["float32"]}):
        in_file = replace(svd, meta={"defaults": {"sample": bad}})
        with refused(f"m.st: its setting {next(iter(bad))} is not usable"):
            sample.settings_for(in_file, model="m.st")


def test_a_dtype_that_the_extension_states_is_used(small, tmp_path):
    path, args = str(tmp_path / "e.safetensors"), Mock(unet=None, offload=False, compile=False)
    unet = exsvd.extend(exsvd.load(small, parts=("unet",)).unet, 20)
    exsvd.save_extension(path, unet, defaults={"sample": {"dtype": "bfloat16"}})
    for given, dtype in (({}, torch.bfloat16), ({"dtype": "float16"}, torch.float16)):
        svd = sample.load(args, given, small, [path], torch.device("cpu"))
        assert svd.unet.conv_out.weight.dtype == dtype


@pytest.mark.parametrize("flags, words", [
    ("--frames 9", "9 frames, but this model knows 8"), ("--frames 9 --native 9", None),
    ("--frames 9 --overlap 1", None),
    ("--sampler euler --eta 1", "eta has no effect without --sampler ddim"),
    ("--strength 1", "strength has no effect without --video"),
    ("--encode-scale 0.13", "encode_scale has no effect without --video or --keyframe"),
    ("--cfg-interval 1 2", "cfg_interval has no effect without --cfg other than 1"),
    ("--eta 1 --strength 0.5", None)])  # the small model's sampler is ddim; 0.5 is the default
def test_what_flags_warn_of(small, flags, words, capsys):
    svd = exsvd.load(small, parts=("unet",))
    sample.complete(svd, sample.parse(["a.png", *flags.split()])[1])
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {words}") and said.count("\n") == 1 if words else not said


def test_default_model(tmp_path, monkeypatch, capsys):
    def chosen(model=None, extension=None):
        given = argparse.Namespace(model=model, extension=extension, unet=None)
        model, files = sample.default_model(given)
        return [os.path.relpath(path, tmp_path) for path in (model, *(files or ()))]

    monkeypatch.setattr(sample, "HERE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    toy = ["assets/toy.safetensors", "assets/toy-exvideo.safetensors"]
    assert chosen() == toy and "using the toy" in capsys.readouterr().err
    assert chosen(toy[0]) == toy and chosen("m") == ["m"]
    os.mkdir("weights")
    # the last is our own, and comes first
    weights = [f"weights/{name}.safetensors" for name in ("svd_xt", "model.fp16", "exvideo")]
    for path in weights:
        open(path, "w").close()
        assert chosen() == list(dict.fromkeys([weights[0], path]))
    assert chosen(extension=["e", "f"]) == [weights[0], "e", "f"] and not capsys.readouterr().err


def test_names_of_outputs():
    outs = ["a/b.1.mp4", "a/b.2.mp4", "b.1/", "b.2/", "b"]
    assert len({sample.latents_path(out) for out in outs}) == len(outs)
    jobs = sample.parse(["a.png", "--seeds", "2", "--out", "frames.d/"])[0].jobs
    assert [out for *_, out in jobs] == ["frames.d-0/", "frames.d-1/"], "seeds of a folder"


def test_offload_changes_nothing(make):
    assert make(name="plain.mp4").read_bytes() == make("--offload", name="offload.mp4").read_bytes()


@pytest.mark.parametrize("offload", [False, True])
def test_networks_take_turns_on_the_device(monkeypatch, offload):
    """In two rounds with a key frame, and without a read of values. Under FakeTensorMode "meta" is
    a device like any other, and mixed devices fail."""
    there, seen = torch.device("meta"), set()

    def parts():
        found = {"unet": svd.unet.up[0].res.spatial.conv1, "clip": svd.clip.ln_post,
                 "encoder": svd.vae.quant_conv, "decoder": svd.vae.decoder.conv_in}
        return " ".join(name for name, m in found.items() if m.weight.device == there)

    def watch(network, method):
        def run(*inputs, original=getattr(network, method)):
            seen.add((type(network).__name__, method, parts()))
            return original(*inputs)
        monkeypatch.setattr(network, method, run)

    with FakeTensorMode(allow_non_fake_inputs=True):
        unet = exsvd.extend(exsvd.UNet(replace(UNET, **TWO_LEVELS)), 4).requires_grad_(False)
        svd = exsvd.SVD(unet, exsvd.VAE(VAE), exsvd.ImageEncoder(CLIP), {}, None)
        unet.stream = exsvd.Stream(unet, there, large=2000) if offload else None
        for network, method in ((unet, "forward"), (svd.clip, "forward"), (svd.vae, "encode"),
                                (svd.vae, "decode")):
            watch(network, method)
        s = sample.Settings(frames=6, size=(128, 64), steps=1, cfg=(1, 1), overlap=2,
                            schedule="karras", decode_chunk=2)
        img = torch.empty(3, 64, 128)
        z = sample.make_latents(svd, img, s, there, keyframes={1: img})
        monkeypatch.setattr(sample, "check_finite", Mock())
        monkeypatch.setattr(data, "VideoWriter", Mock(return_value=contextlib.nullcontext(Mock())))
        sample.write_video(svd.vae, z, s, "a.mp4")
    vision = "clip encoder decoder"
    assert seen == {("UNet", "forward", "" if offload else "unet"),
                    ("ImageEncoder", "forward", vision), ("VAE", "encode", vision),
                    ("VAE", "encode", "encoder decoder"),  # of the key frame
                    ("VAE", "decode", "decoder")}
    assert z.device == there and not parts()


def test_what_stays_on_a_card(monkeypatch):
    """Half-precision networks of full size, and what a pass of them takes as it is counted."""
    size, s = exsvd.Slices.size, sample.Settings(frames=128, native=25)
    with torch.device("meta"):
        svd = exsvd.SVD(exsvd.extend(exsvd.UNet(), 128).half(), exsvd.VAE().half(),
                        exsvd.ImageEncoder().half(), {}, {})
    moved, device = [], torch.device("cuda:1")
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Module, "to", lambda network, where: moved.append(str(where)))
        for gigabytes, home, slice_size in (
                (22, "cuda:1", None), (8, "cuda:1", 4 * size), (7, "cpu", 4 * size),
                (6, "cpu", size), (1, "cpu", size)):
            moved.clear()
            patched.setattr(sample, "free_bytes", lambda device: gigabytes * 1e9 / sample.USABLE)
            sample.place_networks(svd, s, device)
            assert moved == [home] * 3 and svd.unet.slice_size == slice_size
        with patch.object(svd.unet, "stream", Mock()):
            sample.place_networks(svd, s, device)
        assert len(moved) == 3, "with --offload nothing settles"
    weights = sum(p.nbytes for p in svd.unet.parameters())
    s = replace(s, frames=16, size=(256, 256))
    monkeypatch.setattr(sample, "SLICES", (size // 2, size // 4))
    for slice_size, less in ((None, size // 2), (size // 2, size // 4)):
        peak, _ = compare.count("ours", (16, 32, 32), slice_size=slice_size)
        assert sample.what_fits(svd, s, weights + peak)[1] == less
        assert sample.what_fits(svd, s, weights + 1.15 * peak)[1] == slice_size


def test_out_of_memory_takes_smaller_slices_and_draws_nothing_twice(make, monkeypatch, capsys):
    flags = "--steps", 4, "--cfg", 2, 2
    whole, denoise, calls, sizes = latents_of(make(*flags)), exsvd.denoise, itertools.count(), []

    def full(unet, *inputs):
        sizes.append(unet.slice_size)
        if next(calls) in fail_at:
            raise torch.OutOfMemoryError("injected")
        return denoise(unet, *inputs)

    monkeypatch.setattr(exsvd, "denoise", full)
    fail_at = {3}  # the second pass of the second step, of which both are repeated
    assert torch.equal(latents_of(make(*flags, name="b.mp4")), whole)
    n = exsvd.Slices.size
    assert sizes == [n] * 4 + [n // 4] * 6
    assert "sampling goes on in slices of 1,310,720" in capsys.readouterr().err
    calls, fail_at = itertools.count(), {0, 1}
    with pytest.raises(MemoryError, match="--offload"):
        make(*flags, name="c.mp4")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_really_moves(make, small):
    unet = exsvd.load(small, parts=("unet",)).unet
    with torch.inference_mode(), sample.on_device(torch.device("cuda"), unet):
        assert unet.conv_out.weight.is_cuda
    assert not unet.conv_out.weight.is_cuda and not unet.conv_out.weight.is_inference()
    make("--offload", "--device", "cuda")
    make("--device", "cuda", name="resident.mp4")


def test_a_batch(make, pictures, tmp_path, monkeypatch, capsys):
    """Seeds, a bad image, latents that overflow, a full memory, what exists already; one load of
    the model."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    load, made, make_latents = spied(monkeypatch, exsvd, "load"), [], sample.make_latents

    def overflows_first(*args):
        made.append(args)
        if len(made) == 3:
            raise torch.OutOfMemoryError("injected")
        return make_latents(*args) * (math.nan if len(made) == 1 else 1)

    monkeypatch.setattr(sample, "make_latents", overflows_first)
    flags = "--frames", 2, "--size", "128x64", "--seed", 3, "--seeds", 2
    outs = [tmp_path / f"{name}-{seed}.mp4" for name in ("first", "second") for seed in (3, 4)]
    failed = "4 of 6 videos were not made: .*first-3.mp4, .*bad-3.mp4, .*bad-4.mp4, .*second-3.mp4"
    with pytest.raises(data.MediaError, match=failed):
        make(*flags, images=(pictures[0], bad, pictures[1]), name="{name}.mp4")
    errors = capsys.readouterr().err
    for words in (f"{bad}: ", f"{outs[0]}: the latents are not", "out of memory"):
        assert f"sample.py: {words}" in errors
    assert sorted(tmp_path.glob("*.mp4")) == [outs[1], outs[3]] and load.call_count == 1
    make(*flags, images=pictures, name="{name}.mp4")
    assert "first-4.mp4: exists and is skipped" in capsys.readouterr().out
    assert sorted(tmp_path.glob("*.mp4")) == outs and len({o.read_bytes() for o in outs}) == 4
    assert data.read_video(outs[0])[0].shape == (2, 64, 128, 3)
    assert data.read_settings(outs[1])["seed"] == 4 and len(made) == 6
    make(*flags, "--overwrite", name="{name}.mp4")
    assert len(made) == 8


def test_torchrun_shares_out_the_videos(small, pictures, tmp_path):
    """A process that has failed waits for the others, or torchrun would end them. DeepSpeed is not
    needed."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    (tmp_path / "deepspeed.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "sample.py", bad, *pictures, "--model", small, "--out", tmp_path / "{name}.mp4"],
        cwd=HERE, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode and "1 of 2 videos were not made" in done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["first.mp4", "second.mp4"]


def test_latents_survive_a_failing_decoder(make, small, tmp_path, monkeypatch):
    """They are decoded by the VAE that they were made for, or one that is named."""
    model, lost = shutil.copy(small, tmp_path / "own.safetensors"), tmp_path / "lost.mp4"
    whole = make("--model", model, name="whole.mp4").read_bytes()
    infinite = lambda vae, z: torch.full((1, z.shape[1], 3, 64, 64), math.inf)
    with (patch.object(exsvd.VAE, "decode", infinite),
          pytest.raises(FloatingPointError, match="--decode-only .*--dtype float32")):
        make("--model", model, name="lost.mp4")
    assert not lost.exists()
    latents = sample.latents_path(str(lost))
    again = ["--decode-only", latents, "--dtype", "float32", "--out", str(lost)]
    sample.main(again)
    assert lost.read_bytes() == whole

    svd = exsvd.load(model)
    exsvd.save_model(model, svd.unet, randomize(svd.vae, seed=9), svd.clip)
    with refused("own.safetensors, which is not there or has another VAE"):
        sample.main(again)
    with refused("was made with .*own.safetensors, and the VAE of .* is another"):
        make("--model", model, "--video", latents, images=(), name="refined.mp4")
    os.remove(model)
    with refused("own.safetensors, which is not there or has another VAE"):
        sample.main(again)
    os.remove(lost)
    sample.main([*again, "--model", small])
    assert lost.read_bytes() == whole

    settings, zeros = exsvd.Tensors(latents).meta["settings"], torch.zeros(1, 8, 4, 8, 8)
    for z, saved, words in (
            (zeros, None, "no latents"), (zeros, [1], "no latents"),
            (zeros, {"frames": 2}, "no latents"), (zeros[0], settings, "no latents"),
            (zeros * math.nan, settings, "not finite")):
        exsvd.save(latents, {"latents": z}, {"settings": saved})
        with refused(words):
            sample.saved_latents(latents)


@pytest.mark.parametrize("args, words", [
    ("", "at least one image"), ("missing.png", "missing.png"),
    ("{png} --size 100x64", "multiples of 64"), ("{png} --eta 2", "at most 1"),
    ("{png} --frames 1.5", "a whole number"), ("{png} --fps nan", "at least 1"),
    (f"{{png}} --seed {2**32}", "at most"), ("{png} --keyframe c.png", "NUMBER=IMAGE"),
    ("{png} --end missing.png", "missing.png"), ("{png} --device nonsense", "--device nonsense"),
    ("{png} --video missing.mp4", "missing.mp4"), ("--video {png}", "holds a single picture"),
    ("{png} {png} --video missing.mp4", "one video"), ("{png} {png}", "same file"),
    ("{png} --frames 9 --overlap 8", "less than a round"),
    ("{png} --keyframe 8={png}", "the frames 0 to 7"), ("{png} --out a.xyz", ".mp4"),
    ("{png} --out {png}/a.mp4", "cannot be written"),
    (f"{{png}} --out {'x' * 240}.mp4", "cannot be written"),  # its latents' name is too long
    ("{png} --end a.mp4 --out a.mp4", "would overwrite what is read"),
    ("a.mp4 --out a.mp4", "would overwrite what is read"),
    ("--video a.latents.safetensors --out a.webm", "would overwrite what is read"),
    ("{png} --model missing.safetensors", "no such weight file"),
    ("{png} --model {png}", "not a complete safetensors"),
    ("{png} --extension {model}", "not an extension"),
    ("{png} --unet missing.safetensors", "missing.safetensors"),
    ("--decode-only {model}", "no latents")])
def test_bad_input_is_one_line_and_a_failure(
        args, words, small, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = args.format(png=pictures[0], model=small).split()
    with pytest.raises(SystemExit) as exit:
        sample.command(args if "--model" in args else [*args, "--model", small])
    last = exit.value.code if isinstance(exit.value.code, str) else capsys.readouterr().err
    assert exit.value.code not in (0, None) and words in last.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*.mp4")) and not list(tmp_path.glob("out/*"))


def test_what_the_command_prints(monkeypatch, tmp_path):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sample, "main", lambda argv: print("caf\udce9 \xe9", flush=True))
    sample.command([])
    assert terminal.buffer.getvalue() == b"caf\\udce9 \\xe9\n", "what it can't show costs nothing"
    monkeypatch.undo()
    monkeypatch.setattr(sample, "load", Mock(side_effect=torch.OutOfMemoryError("injected")))
    with pytest.raises(SystemExit, match="^sample.py: out of memory.*--dtype float16"):
        sample.command([os.path.join(HERE, "assets", "img.png"), "--out", str(tmp_path / "a.mp4")])


def test_the_snippets_of_the_readme(small, extensions, pictures, tmp_path, monkeypatch):
    """The very lines, with small files and a stand-in for the pipeline."""
    diffusers, pipeline = pytest.importorskip("diffusers"), Mock()
    with open(os.path.join(HERE, "README.md")) as file:
        from_text, from_picture = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for real, ours in (("weights/svd_xt.safetensors", small), ("assets/img.png", pictures[0]),
                       ("weights/model.fp16.safetensors", extensions[1]), ("cuda", "cpu"),
                       ("float16", "float32")):
        assert real in from_picture
        from_picture = from_picture.replace(real, ours)
    exec(from_picture, {})
    assert data.read_video("out.mp4")[0].shape == (20, 64, 64, 3)

    pipeline.to("cuda").return_value = argparse.Namespace(images=[Image.fromarray(corners())])
    pretrained = diffusers.AutoPipelineForText2Image
    monkeypatch.setattr(pretrained, "from_pretrained", lambda name, torch_dtype: pipeline)
    monkeypatch.setattr(sample, "default_model", lambda a: (small, None))
    exec(from_text, {})
    pipeline.to("cuda").assert_called_with("a lighthouse")
    assert data.read_video("out/lighthouse.mp4")[0].shape == (8, 64, 64, 3)


# --------------------------------------------------------------------------------------------------
# 5. train.py: real runs on a model small enough for a step to take a moment. One rank runs in this
#    process; what is killed, or has several ranks, is started as a user starts it.


def launch(*args, ranks=1, script="train.py"):
    """-> Popen. All that is started is in one process group."""
    launcher = [sys.executable]
    if ranks > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        deepspeed = os.path.join(os.path.dirname(sys.executable), "deepspeed")
        launcher = [deepspeed, "--num_accelerators", ranks, "--master_port", port]
    command = [*map(str, [*launcher, os.path.join(HERE, script), *args])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=env, start_new_session=True)


def train_here(*args):
    """train.py on one rank, in this process. SystemExit where it exits with a line."""
    import deepspeed
    handlers = {number: signal.getsignal(number) for number in train.STOP_SIGNALS}
    with patch.dict(os.environ):  # main() sets there what a launcher would
        try:
            train.main([str(a) for a in ("--workers", 0, *args)])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if train.dist.is_initialized():
                deepspeed.comm.destroy_process_group()


@pytest.fixture
def run(small, clips, tmp_path):
    """run(flags): the shortest run of train.py that the flags allow, of two frames and one of the
    matrices, into a folder of tmp_path that is returned"""
    def run(flags="", *, out=tmp_path / "run", data=clips):
        train_here("--model", small, "--data", data, "--out", out, "--frames", 2, "--train", "to_q",
                   *flags.split())
        return out
    return run


STEPS = "--log-every 1 --steps 4 --save-every 1 --weights-every 4"
WHOLE = f"--frames 10 --train temporal {STEPS}"  # flags of runs as those of one_rank and two_ranks


def log_of(out):
    with open(out / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def state_path(out, step):
    return out / f"state-{step:08d}.safetensors"


def state_meta(out, step, changes=None):
    """The metadata of a state, in whose file some values are changed."""
    tensors = exsvd.Tensors(state_path(out, step))
    if changes:
        exsvd.save(tensors.path, load_file(tensors.path), tensors.meta | changes)
    return tensors.meta


def kept(out, step, key):
    """What a state holds under a key, such as master: {name of a parameter: tensor}"""
    tensors, end = load_file(state_path(out, step)), f".{key}"
    return {name.removesuffix(end): t for name, t in tensors.items() if name.endswith(end)}


def same_tensors(ours, theirs):
    """Of two files, bit for bit"""
    ours, theirs = load_file(ours), load_file(theirs)
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


def same_state(out, other, step=4):
    return same_tensors(state_path(out, step), state_path(other, step))


CLIPS = """
import torch
class Clips:
    id = "four"
    def __init__(self, frames, size, seed):
        self.frames, self.size, self.seed = frames, size, seed
    def __getitem__(self, n):
        g = torch.Generator().manual_seed(self.seed * 1000 + n % 4)
        W, H = self.size
        still = torch.randint(256, (3, H // 8, W // 8), generator=g, dtype=torch.uint8)
        still = still.repeat_interleave(8, 1).repeat_interleave(8, 2)
        video = torch.stack([still.roll(2 * t, 2) for t in range(self.frames)])
        return {"video": video, "fps": 8.0, "motion": 40.0, "name": f"clip {n % 4}"}
    def measure(self, frames, image, fps, motion):
        return {"brightness": float(frames.mean())}
clips = Clips
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A user's own clips: a Python file."""
    path = tmp_path_factory.mktemp("clips") / "my_clips.py"
    path.write_text(CLIPS)
    return path


@pytest.fixture
def clips_with(tmp_path):
    """clips_with((old, new), ...): the clips with other text in place of some of theirs"""
    def change(*replacements):
        text = CLIPS
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "changed_clips.py").write_text(text)
        return tmp_path / "changed_clips.py"
    return change


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two good files, one of them with a cut, and one too short"""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "good.mp4", scene(0))
    write_video(folder / "short.mp4", scene(2, 5))
    write_video(folder / "cut.mp4", np.concatenate([scene(4, 24), scene(5, 24)]))
    return folder


@pytest.fixture(scope="module")
def one_rank(small, videos, tmp_path_factory):
    """-> a run of four steps that kept every state"""
    out = tmp_path_factory.mktemp("one_rank")
    with patch.object(train, "STATES_KEPT", 100):
        train_here("--model", small, "--data", videos, "--out", out, *STEPS.split())
    return argparse.Namespace(out=out, step=4)


@pytest.fixture(scope="module")
def two_ranks(small, videos, clips, tmp_path_factory):
    """-> a run that saved and left on a signal to every process, readers too, as a terminal, Slurm
    and DeepSpeed's launcher send it; and what it printed"""
    out = tmp_path_factory.mktemp("two_ranks")
    p = launch("--model", small, "--data", videos, "--out", out, *STEPS.split(), "--workers", 1,
               "--steps", 10000, "--val", clips, ranks=2)
    while not (out / "log.csv").exists() or len(log_of(out)) < 4:
        assert p.poll() is None, p.communicate()[0]
        time.sleep(0.05)
    os.killpg(p.pid, signal.SIGTERM)
    text = p.communicate(timeout=100)[0]
    return argparse.Namespace(out=out, text=text, step=int(log_of(out)[-1]["step"]))


def changed_model(small, tmp_path, name, by):
    """The small model with another value in one parameter of its UNet."""
    svd, path = exsvd.load(small), tmp_path / "changed.safetensors"
    svd.unet.get_parameter(name).data[0] += by
    exsvd.save_model(path, svd.unet, svd.vae, svd.clip, **svd.meta)
    return path


def at_start(small):
    """-> the extended UNet, and {name: parameter} of what the paper trains"""
    unet = exsvd.extend(exsvd.load(small, parts=("unet",)).unet, 10)
    return unet, {f"unet.{name}": p for name, p in unet.named_parameters()
                  if exsvd.is_extension_parameter(name) and not exsvd.WITHOUT_EFFECT.search(name)}


# What a run computes


def test_two_ranks_train_on_real_videos_until_a_signal(two_ranks):
    out, rows, steps = two_ranks.out, log_of(two_ranks.out)[1:], range(1, two_ranks.step + 1)
    assert [(int(r["step"]), int(r["videos"])) for r in rows] == [(n, 2 * n) for n in steps]
    assert all(0 < float(r["loss"]) < 10 and float(r["grad_norm"]) > 0 for r in rows)
    assert "1 too short" in two_ranks.text and "float32, 2 ranks on cpu" in two_ranks.text
    assert sorted(out.glob("state-*")) == [state_path(out, n) for n in steps[-2:]]
    [start] = json.loads((out / "run.json").read_text())
    assert start["deepspeed"]["zero_optimization"]["stage"] == 2 and start["ranks"] == 2
    assert start["settings"]["frames"] == 10


def test_average_is_its_closed_form(small, one_rank):
    _, average = at_start(small)
    for step in range(1, 5):
        decay = min(0.9999, step / (9 + step))  # (1 + n) / (10 + n); the first step is number 0
        masters, ours = (kept(one_rank.out, step, key) for key in ("master", "average"))
        assert masters.keys() == ours.keys() == average.keys()
        for name, master in masters.items():
            assert not torch.equal(master, average[name])
            average[name] = decay * average[name] + (1 - decay) * master
            assert torch.allclose(ours[name], average[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_the_weights_file_is_the_average(ranks, small, request):
    """In 16 bits, every tensor under its name in the release, whatever the number of ranks. Every
    element of a parameter is where it was: at most 3 learning rates a step from its start."""
    run, (unet, start) = request.getfixturevalue(ranks), at_start(small)
    files = exsvd.file_names(unet, "exvideo")
    saved = load_file(run.out / f"exvideo-{run.step:06d}.safetensors")
    for name, tensor in kept(run.out, run.step, "average").items():
        [in_file] = files[name.removeprefix("unet.")]
        assert torch.equal(saved[in_file], tensor.half()), name
        assert (tensor - start.pop(name)).abs().max() < 3e-3 * run.step, name
    assert not start


def test_only_temporal_blocks_learn_and_all_of_them(small, videos, one_rank):
    start, file = at_start(small)[0].state_dict(), one_rank.out / "exvideo-000004.safetensors"
    svd = exsvd.load(small, file)
    assert svd.unet.max_frames == 10 and svd.extension["native_frames"] == 8
    for name, p in svd.unet.named_parameters():
        temporal = exsvd.is_extension_parameter(name)
        was = start[name].half().float() if temporal else start[name]
        assert torch.equal(p, was) != (temporal and not exsvd.WITHOUT_EFFECT.search(name)), name
    in_release = exsvd.file_names(svd.unet, "exvideo").values()
    assert set(load_file(file)) == {name for names in in_release for name in names}
    s = sample.settings_for(svd)
    assert s.size == (64, 64) and s.sampler == "ddim", "as its base, at the size of training"
    loss = float(log_of(one_rank.out)[-1]["loss"])
    said = {key: svd.extension[key] for key in ("step", "videos", "lr", "data", "loss", "commit")}
    assert said == {"step": 4, "videos": 4, "lr": 1e-3, "data": str(videos),
                    "commit": train.commit(), "loss": pytest.approx(loss, abs=1e-5)}


def test_weight_decay_spares_norms_biases_tables_and_the_identity_convolution(small):
    _, trained = at_start(small)
    groups = train.parameter_groups(trained, train.TrainSettings(weight_decay=0.5))
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, p in trained.items():
        exempt = p.ndim == 1 or "frame_table" in name or "frame_conv" in name
        assert decay[id(p)] == (0 if exempt else 0.5), name


def test_validation_is_the_loss_of_the_average_and_changes_no_bit(
        small, clips, videos, one_rank, two_ranks, run, capsys):
    out = run(f"{WHOLE} --log-every 3 --val {clips} --val-every 4", data=videos)
    assert same_state(one_rank.out, out)
    first, three, last = log_of(out)
    assert first["step"] == "0" and not first["loss"] and three["loss"] and not three["val_loss"]
    assert f"step 4: validation loss {float(last['val_loss']):.4f}" in capsys.readouterr().out
    shared = float(log_of(two_ranks.out)[0]["val_loss"])  # each rank has half of the clips
    assert float(first["val_loss"]) == pytest.approx(shared, rel=1e-4)
    svd = exsvd.load(small, out / "exvideo-000004.safetensors")
    dataset, losses = data.open_dataset(clips, 10, (64, 64), train.VAL_SEED), []
    for n in range(train.VAL_CLIPS):
        item = torch.utils.data.default_collate([dataset[n]])
        x, *conditions = train.inputs(train.TrainSettings(seed=train.VAL_SEED), svd, item)
        noise = train.draw(train.TrainSettings(seed=train.VAL_SEED), n, x.shape[1:])[1][None]
        losses.append([exsvd.training_loss(svd.unet, exsvd.LOSSES["edm"], x, torch.tensor([sigma]),
                                           noise, *conditions).item() for sigma in train.VAL_SIGMAS])
    by_level = np.mean(losses, 0)
    moved = float(first["val_loss"]) - float(last["val_loss"])
    assert abs(by_level.mean() - float(last["val_loss"])) < 0.01 * abs(moved)  # the file is float16
    for name, loss in zip(train.Log.VAL[1:], by_level):
        assert float(last[name]) == pytest.approx(loss, rel=1e-3)


def test_one_clip_is_overfitted_and_samples_and_monitors_show_it(
        small, run, clips_with, tmp_path, monkeypatch, capsys):
    """Everything trains, CLIP too, and samples are made with the average of CLIP."""
    seen, condition, wandb = [], sample.condition, Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    one = clips_with(("n % 4", "0"), ('"motion": 40.0', '"motion": 0.0'))

    def spy(svd, *args):
        seen.append(svd.clip.proj.clone())
        return condition(svd, *args)

    monkeypatch.setattr(sample, "condition", spy)
    (tmp_path / "config").write_text('{"wandb": {"enabled": true}}')
    out = run("--train all --steps 20 --sample-every 10 --val-every 20 --lr 5e-3 "
              f"--val {one} --deepspeed_config {tmp_path / 'config'}", data=one)
    svd, start = exsvd.load(out / "model-000020.safetensors"), exsvd.load(small)
    rows = [row for row in log_of(out) if row["val_loss"]]
    before, after = (float(row["val_loss"]) for row in rows)
    assert after < 0.7 * before, "the loss of held-out clips, which here are the one"
    assert svd.meta["defaults"]["sample"] == SAMPLING and svd.unet.max_frames is None
    assert torch.equal(svd.vae.quant_conv.weight, start.vae.quant_conv.weight.half().float())
    assert len(seen) == 3 and torch.equal(seen[0], start.clip.proj)
    assert not torch.equal(seen[0], seen[2])
    assert torch.allclose(seen[2], svd.clip.proj, rtol=2**-10, atol=1e-6)
    assert data.read_video(out / "sample-000020.mp4")[0].shape == (2, 64, 64, 3)
    assert data.read_image(out / "progress.png").shape == (3 * 64, 2 * 64, 3)
    said = capsys.readouterr().out
    assert "at motion 40 and 8 fps: " in said, "the model's own, though the clip stands still"
    assert "brightness" in said, "what the dataset measures"
    calls = [(call.kwargs["step"], *call.args[0].items()) for call in wandb.log.call_args_list]
    assert calls == sorted(calls, key=lambda call: call[0]), "W&B drops what goes back"
    for curve, column in (("train/loss", "loss"), ("train/lr", "lr"), ("val/loss", "val_loss")):
        assert [(videos, value) for videos, (name, value) in calls if name == curve] == [
            (int(row["videos"]), pytest.approx(float(row[column]), abs=1e-5))
            for row in log_of(out) if row[column]]
    assert [videos for videos, (name, _) in calls if name == "sample/brightness"] == [0, 10, 20]


def test_training_from_latents_is_training_from_videos(
        small, videos, one_rank, run, tmp_path, monkeypatch):
    latents = tmp_path / "latents"
    monkeypatch.setattr(train, "VAL_CLIPS", 2)
    data.encode(small, videos, latents, torch.float32, frames=10, size=(64, 64))
    out = run(f"{WHOLE} --steps 2 --sample-every 2 --val {latents}", data=latents)
    start, *rows = log_of(out)
    assert [row["loss"] for row in rows] == [row["loss"] for row in log_of(one_rank.out)[:2]]
    assert data.read_image(out / "progress.png").shape == (2 * 64, 9 * 64, 3)
    assert 0 < float(start["val_loss"]) < 10
    with pytest.raises(SystemExit, match="--val must be encoded"):
        run(f"{WHOLE} --val {videos}", data=latents)


def test_clips_of_several_sizes(small, run, monkeypatch):
    denoise = spied(monkeypatch, exsvd, "denoise")
    with pytest.raises(ValueError, match="the toy's clips are square"):
        run("--size 128x64", data=train.TOY_CLIPS)
    out = run("--size 128x128 64x64 --steps 3 --accumulate 2", data=train.TOY_CLIPS)
    sizes = {tuple(call.args[1].shape[-2:]) for call in denoise.call_args_list}
    assert sizes == {(16, 16), (8, 8)}
    meta = exsvd.load(out / "model-000003.safetensors", parts=("unet",)).meta
    assert meta["defaults"]["sample"]["size"] == [128, 128]
    in_file = {"defaults": {"train": {"size": [[128, 128], [64, 64]]}}}
    settings = sample.settings_in_file(train.TrainSettings, in_file, "train", small)
    assert settings == {"size": ((128, 128), (64, 64))}


def test_accumulated_passes_are_one_large_batch(run, tmp_path):
    flags = "--train temporal --warmup 4 --log-every 1"
    whole = run(f"{flags} --steps 2 --batch 2", out=tmp_path / "2")
    parts = run(f"{flags} --steps 2 --accumulate 2")
    assert [row["videos"] for row in log_of(parts)] == ["2", "4"]
    assert [float(row["lr"]) for row in log_of(parts)] == [2.5e-4, 5e-4], "what the step used"
    losses = [[float(row["loss"]) for row in log_of(out)] for out in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    moments = [kept(out, 2, "exp_avg").values() for out in (whole, parts)]
    close(*(torch.cat([t.flatten() for t in ts]) for ts in moments), 1e-3, "first moments")
    # the number of passes may change within a run, when there are fewer ranks, and the decay too
    meta = state_meta(run(f"{flags} --steps 3 --accumulate 3 --weight-decay 0"), 3)
    assert meta["updates"] == 3 and meta["videos"] == 7, "the average follows"


def test_draws_depend_on_seed_and_number():
    numbers = (*range(4000), 2**32, 2**33)
    draws = [train.draw(train.TrainSettings(seed=seed), n, (1, 4, 2, 2))
             for seed in (0, 1, 10**12) for n in numbers]
    different = {float(sigma) for sigma, _, _ in draws}
    assert len(different) > 0.999 * len(draws)  # 32-bit seeds may coincide
    again = train.draw(train.TrainSettings(seed=1), 7, (1, 4, 2, 2))
    assert all(torch.equal(a, b) for a, b in zip(again, draws[4002 + 7]))
    scaled = train.draw(train.TrainSettings(seed=1, sigma_scale=3.0), 7, (1, 4, 2, 2))
    assert scaled[0] == 3 * again[0] and torch.equal(scaled[1], again[1])
    dropped = 1 - torch.stack([kept for _, _, kept in draws]).mean()
    assert abs(dropped - 0.1) < 0.012  # four standard errors


def test_progress_shows_frames_evenly_and_drops_rows_that_come_again(tmp_path):
    frames = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 64, 64, 3)
    for step in (0, 10, 20, 10):
        (tmp_path / f"sample-{step:06d}.mp4").touch()
        train.add_progress(tmp_path, step, frames + step)
    rows = data.read_image(tmp_path / "progress.png")[::64, ::64, 0]
    assert rows[0].tolist() == [*range(0, 40, 5), 39] and rows[:, 0].tolist() == [0, 10]


# States


KILLED = """
import os, signal, train
replace = os.replace
def die(source, target):
    if "state-00000003" in str(target):
        os.killpg(0, signal.SIGKILL)  # readers too
    replace(source, target)
os.replace = die
train.main()
"""


def test_killed_while_saving_it_resumes_bit_identically(small, videos, one_rank, tmp_path, capsys):
    straight, run = one_rank.out, tmp_path / "run"
    args = ("--model", small, "--data", videos, "--out", run, *STEPS.split(), "--log-every", 3)
    (tmp_path / "killed.py").write_text(KILLED)
    p = launch(*args, script=tmp_path / "killed.py")
    output = p.communicate()[0]
    assert p.returncode == -signal.SIGKILL, output
    assert list(run.glob("state-00000003*.tmp")) and not state_path(run, 3).exists()
    train_here(*args)
    assert "state-00000002.safetensors: step 2" in capsys.readouterr().out
    assert not list(run.glob("*.tmp")) and same_state(straight, run)
    assert same_tensors(*(out / "exvideo-000004.safetensors" for out in (run, straight)))
    # rows of three steps, the first of which was interrupted: what was summed before is not lost
    (three, four), every = log_of(run), log_of(straight)
    mean = sum(float(row["loss"]) for row in every[:3]) / 3
    assert three["step"] == "3" and float(three["loss"]) == pytest.approx(mean, abs=2e-5)
    for column in ("step", "videos", *train.Log.LOSS, "grad_norm", "lr"):
        assert four[column] == every[3][column]


def test_a_run_of_two_ranks_goes_on_with_one(two_ranks, run, videos, tmp_path, monkeypatch):
    """What one loads is bit for bit what the two saved."""
    step, load = two_ranks.step, train.Shards.load
    out = shutil.copytree(two_ranks.out, tmp_path / "run")

    def load_and_save(shards, state):
        load(shards, state)
        train.save_state(tmp_path, shards, {"step": step})

    monkeypatch.setattr(train.Shards, "load", load_and_save)
    run(f"{WHOLE} --steps {step + 1}", data=videos)
    assert same_state(two_ranks.out, tmp_path, step)
    assert int(log_of(out)[-1]["videos"]) == 2 * step + 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_state_is_cut_for_any_number_of_ranks(ranks, tmp_path, monkeypatch):
    """DeepSpeed says what a rank has: here of a group of 13 elements, or 15 with zeros."""
    from deepspeed.utils import link_hp_params
    monkeypatch.setattr(train, "dist", Mock(get_rank=lambda: 0))
    path, size = tmp_path / "state.safetensors", -(-13 // ranks)
    shapes = {"a": (3, 2), "b": (5,), "c": (1, 2)}
    module = torch.nn.ParameterDict({name: torch.rand(shape) for name, shape in shapes.items()})
    start = {name: torch.zeros(shape) for name, shape in shapes.items()}
    state = {f"{name}.{key}": torch.rand(shape) for name, shape in shapes.items()
             for key in ("master", "average", "exp_avg")}
    exsvd.save(path, state, {"numbers": [{"step": 2.0}], "updates": 2, "loss_scaler": {}})
    total, masters = Counter(), torch.zeros(ranks, size)
    for rank, master in enumerate(masters):
        link_hp_params([*module.values()], master, {}, {}, False, 0, rank * size, size, None)
        zero = Mock(single_partition_of_fp32_groups=[master], bit16_groups=[[*module.values()]])
        zero.optimizer.state = {master: {}}
        engine = Mock(optimizer=zero, module=module, device="cpu", lr_scheduler=None)
        shards = train.Shards(engine, 0.9, start)
        shards.load(exsvd.Tensors(path))
        tensors, meta = shards.state()
        assert meta["numbers"] == [{"step": 2.0}] and tensors.keys() == state.keys()
        for name, t in tensors.items():  # as dist.reduce() adds
            total[name] = total[name] + t
    assert all(torch.equal(total[name], t) for name, t in state.items())
    flat = torch.cat([state[f"{name}.master"].flatten() for name in module])
    assert torch.equal(masters.flatten(), F.pad(flat, (0, ranks * size - 13)))


def test_a_state_that_is_damaged_or_of_other_settings_or_weights_is_refused(
        small, one_rank, run, videos, tmp_path, monkeypatch):
    out = shutil.copytree(one_rank.out, tmp_path / "run")
    meta, state = state_meta(out, 4), state_path(out, 4)
    name = next(name for name in meta["layout"] if name.startswith("unet."))

    def refused(words, flags="", **changes):
        state_meta(out, 4, meta | changes)
        with pytest.raises(SystemExit, match=f"{state.name} was made with {words}"):
            run(f"{WHOLE} --steps 5 {flags}", data=videos)

    refused(r"drop 0.0 \(now 0.5\)", "--drop 0.5")
    other = changed_model(small, tmp_path, "conv_out.weight", 1e-3)
    refused("frozen weights of unet [0-9]+", f"--model {other}")
    refused(r"ids \['fps', 'pan'\]", settings=meta["settings"] | {"ids": ["fps", "pan"]})
    refused(rf"{name} \[3\] \(now", layout=meta["layout"] | {name: [3]})
    refused(r"unet.gone \[3\] \(now None", layout=meta["layout"] | {"unet.gone": [3]})
    refused(r"optimizer Lion \(now AdamW\)", layout=meta["layout"] | {"optimizer": "Lion"})
    monkeypatch.setattr(exsvd, "ARCHITECTURE", "rotary")
    refused("architecture exvideo")
    state.write_bytes(state.read_bytes()[:-100])
    before = state_path(out, 3)
    with pytest.raises(SystemExit, match=f"{state} cannot be read .* go on from {before}"):
        run()


HAS_FP16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param(
    "float16", marks=pytest.mark.skipif(not HAS_FP16, reason="no fp16 on this CPU"))])
def test_a_resumed_run_keeps_fp32_masters_and_what_was_chosen(dtype, run, all_threads, capsys):
    """Threads too: they change the last bits, and how many there are depends on the machine."""
    out = run(f"--steps 1 --dtype {dtype} --checkpoint balanced")
    assert state_meta(out, 1, {"threads": [3]})["threads"] == [torch.get_num_threads()]
    capsys.readouterr()
    run("--steps 2")
    assert torch.get_num_threads() == 3 and state_meta(out, 2)["settings"]["dtype"] == dtype
    assert "--checkpoint balanced" in capsys.readouterr().out
    for master in kept(out, 2, "master").values():
        assert master.dtype == torch.float32
        assert not torch.equal(master, master.to(getattr(torch, dtype)).float())


def test_a_failed_save_is_a_warning_and_the_next_one_is_tried(
        one_rank, run, videos, monkeypatch, capsys):
    save = exsvd.save

    def disk_full(path, *args):
        if re.search("state-0000000[235]", path):
            raise OSError(28, "No space left on device")
        save(path, *args)

    monkeypatch.setattr(exsvd, "save", disk_full)
    out = run(WHOLE, data=videos)
    said = capsys.readouterr().out
    assert "step 2 could not be saved" in said and "step 3 could not be saved" in said
    assert same_state(one_rank.out, out)
    with pytest.raises(SystemExit, match="step 5 could not be saved"):
        run(f"{WHOLE} --steps 5", data=videos)
    assert state_path(out, 4).exists()


# Optimiser and DeepSpeed


def test_optimiser_on_the_cpu(run, tmp_path):
    """--offload: DeepSpeed's own AdamW, with gradients that pass through small buckets. It
    resumes."""
    (tmp_path / "config").write_text('{"zero_optimization": {"reduce_bucket_size": 1000}}')
    flags = "--train temporal --save-every 1 --warmup 0"
    gpu = run(f"{flags} --steps 2", out=tmp_path / "gpu")
    for steps in (1, 2):
        cpu = run(f"{flags} --steps {steps} --offload --deepspeed_config {tmp_path / 'config'}")
    starts = json.loads((cpu / "run.json").read_text())
    assert [start["step"] for start in starts] == [0, 1]
    assert starts[1]["deepspeed"]["zero_optimization"]["reduce_bucket_size"] == 1000
    for key in ("exp_avg", "master"):
        ours, theirs = kept(cpu, 2, key), kept(gpu, 2, key)
        for name in theirs:
            close(ours[name], theirs[name], 1e-4, name)


WARMUP = {"warmup_max_lr": "auto", "warmup_num_steps": 4, "warmup_type": "linear"}
CYCLE = {"cycle_min_lr": 1e-4, "cycle_max_lr": 5e-4, "cycle_first_step_size": 4}
SGD = functools.partial(torch.optim.SGD, momentum=0.9)
@pytest.mark.parametrize("scheduler, rates, optimizer, moment", [
    ({"type": "WarmupLR", "params": WARMUP}, [0, 0, 2.5e-4, 5e-4], torch.optim.AdamW, "exp_avg"),
    ({"type": "OneCycle", "params": CYCLE}, [1e-4, 2e-4, 3e-4, 4e-4], SGD, "momentum_buffer")])
def test_what_schedulers_and_optimisers_keep_comes_back(
        scheduler, rates, optimizer, moment, run, tmp_path, monkeypatch):
    """A scheduler of DeepSpeed sets the rate alone, another optimiser is one function, and a run
    goes on with both bit-identically."""
    monkeypatch.setattr(train, "make_optimizer", lambda groups, s: optimizer(groups, lr=s.lr))
    (tmp_path / "config").write_text(json.dumps({"scheduler": scheduler}))
    flags = f"--log-every 1 --deepspeed_config {tmp_path / 'config'} --warmup 0 --save-every 2"
    straight = run(f"{flags} --steps 4", out=tmp_path / "straight")
    run(f"{flags} --steps 2")
    resumed = run(f"{flags} --steps 4")
    for out in straight, resumed:
        assert [float(row["lr"]) for row in log_of(out)] == pytest.approx(rates)
    assert same_state(straight, resumed)
    for key in ("master", moment):
        before, after = (kept(straight, step, key) for step in (2, 4))
        assert after and not any(torch.equal(before[name], after[name]) for name in after)


def test_the_rate_rises_and_falls():
    s = train.TrainSettings(steps=10, warmup=4, cooldown=2)
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5]
    assert [train.rate(s, step) for step in range(10)] == expected
    assert {train.rate(train.TrainSettings(), step) for step in (0, 7, 63999)} == {1}


def configured(tmp_path, config, **settings):
    """What deepspeed_config() makes of a file."""
    (tmp_path / "c.json").write_text(json.dumps(config))
    s = train.TrainSettings(deepspeed_config=str(tmp_path / "c.json"), **settings)
    return train.deepspeed_config(s)


def test_auto_in_a_deepspeed_config_means_ours(tmp_path):
    s = {"dtype": "bfloat16", "clip": 0.5}
    ours = train.deepspeed_config(train.TrainSettings(**s))
    auto = {"gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto"},
            "bf16": {"enabled": "auto"}, "data_types": "auto"}
    more = {"steps_per_print": 5, "wandb": {"enabled": False}, "flops_profiler": {"enabled": False}}
    assert configured(tmp_path, auto | more, **s) == ours | more
    for kind, params in (("WarmupLR", {}),
                         ("WarmupDecayLR", {"warmup_max_lr": 1e-5, "total_num_steps": 64000})):
        scheduler = {"scheduler": {"type": kind, "params": {"warmup_max_lr": "auto"}}}
        assert configured(tmp_path, scheduler, **s)["scheduler"] == {"type": kind, "params": params}


@pytest.mark.parametrize("config, words", [
    ([1], "must be an object"), ({"optimizer": {"type": "AdamW"}}, r"make_optimizer\(\)"),
    ({"zero_optimisation": {"stage": 2}}, "does not know zero_optimisation$"),
    ({"zero_optimization": {"buckets": 1}}, "buckets Extra inputs"),
    ({"bf16": True}, "bf16 must be an object"), ({"train_batch_size": 7}, "7 != 1"),
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage must be 2: "),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps must be 1: "),
    ({"bf16": {"enabled": True}}, "bf16.enabled must be False"),
    ({"scheduler": {"type": "StepLR"}}, "has no attribute 'StepLR'"),
    ({"scheduler": "WarmupLR"}, "scheduler must be an object"),
    ({"scheduler": {"type": "WarmupLR"}, "warmup": 10}, "give --warmup 0 --cooldown 0"),
    ({"scheduler": {"type": "WarmupLR"}, "cooldown": 10}, "give --warmup 0 --cooldown 0")])
def test_a_deepspeed_config_is_refused_in_one_line(config, words, tmp_path):
    flags = {name: config.pop(name) for name in ("warmup", "cooldown") if name in config}
    with pytest.raises(SystemExit, match=f"^train.py: --deepspeed_config .*c.json: .*{words}"):
        configured(tmp_path, config, dtype="float32", **flags)


# Networks: extensions, memory


def test_the_extension_is_in_fp32_and_a_frozen_clip_as_for_encoded_latents(small, monkeypatch):
    def networks_of(*flags):
        s = train.parse(["--model", small, "--data", "x", *flags])
        return train.load_networks(s, True, torch.device("cpu"))

    monkeypatch.setattr(data, "encoding_on", lambda device: (torch.float16, 4))  # as on a GPU
    # the base is told its native length: the fold walks over these positions, and no others
    svd, whole = networks_of("--dtype", "bfloat16", "--native", "6"), exsvd.load(small)
    assert torch.equal(svd.clip.proj, whole.clip.proj.half())
    for name, p in svd.unet.named_parameters():
        assert p.dtype == (torch.float32 if ".attn.temporal." in name else torch.bfloat16), name
    assert networks_of("--train", "clip").clip.proj.dtype == torch.float32
    assert svd.unet.config.native_frames == 6
    for block in svd.unet.temporal_blocks():
        positions = torch.tensor(exsvd.fold_positions(6, 10))
        assert torch.equal(block.frame_table, exsvd.sinusoid(positions, block.frame_table.shape[1]))


def test_what_is_frozen_of_an_extension_is_saved_as_it_was(small, extensions, run):
    out = run(f"--train frame_conv --dtype bfloat16 --extension {extensions[1]} --steps 1")
    saved, release = load_file(out / "exvideo-000001.safetensors"), load_file(extensions[1])
    for name, t in saved.items():
        assert torch.equal(t, release[name].half()) == ("positional_conv" not in name), name


def test_a_lora_over_a_frozen_release(
        small, extensions, run, lora, pictures, tmp_path, monkeypatch, capsys):
    """It is trained, saved, loaded and sampled over the release, and goes on bit-identically."""
    _, release = extensions
    flags = f"--train temporal --extension {release} --weights-every 1"
    out = run(f"{flags} --steps 1")
    run(f"{flags} --steps 2")
    text, path = capsys.readouterr().out, out / "exvideo-000002.safetensors"
    assert " are trained in float32" in text and "resumed from" in text
    assert same_state(out, run(f"{flags} --steps 2", out=tmp_path / "straight"), 2)
    below, svd = (exsvd.load(small, files).unet for files in (release, [release, path]))
    for name, p in svd.named_parameters():
        equal = torch.equal(p, below.get_parameter(name))
        assert equal != name.endswith((".A", ".B")), name

    def sampled(*files):
        out = tmp_path / "x.mp4"
        sample.main([pictures[0], "--model", small, "--out", str(out), "--extension", *files])
        return latents_of(out)

    assert not torch.equal(sampled(release, str(path)), sampled(release))
    with refused("was trained over e.safetensors: give that extension"):
        exsvd.load(small, path)
    monkeypatch.setattr(lora, "RANK", 4)
    with pytest.raises(SystemExit, match=r"\.A \[8, 16\] \(now \[4, 16\]\)"):
        run(f"{flags} --steps 3")
    monkeypatch.setattr(sys, "argv", ["toy/lora.py", "--local_rank=0", "train.py", "--help"])
    with pytest.raises(SystemExit, match="^0$"):  # as DeepSpeed's launcher starts it
        runpy.run_path(os.path.join(HERE, "toy", "lora.py"), run_name="__main__")


def test_a_motion_lora_at_the_native_length(small, run, lora):
    out = run("--train temporal --steps 1 --frames 8")
    unet = exsvd.load(small, out / "exvideo-000001.safetensors").unet
    assert unet.max_frames == 8 and all(b.attn1.to_q.B.any() for b in unet.temporal_blocks())


def test_estimates_of_what_checkpoints_keep_hold():
    """Never less than what is kept, and at most twice that. On a narrow UNet, cut as SVD-XT
    is at 64 times as many pixels."""
    T, H, W, part = 8, 24, 24, 64
    s = train.TrainSettings(frames=T, size=((8 * W, 8 * H),))
    config = exsvd.UNetConfig(channels=(32, 64, 128, 128), heads=(1, 1, 2, 2), context_dim=8)
    for name in ("none", "balanced", "memory"):  # the others differ in their slices alone
        level, slice_size, *costs = train.CHECKPOINTS[name]
        cut = {name: (level, slice_size // part, *costs)}
        with patch.dict(train.CHECKPOINTS, cut), compare.computing():
            unet = exsvd.extend(exsvd.UNet(config), 128).bfloat16().train().to("meta")
            freeze(unet)
            unet.checkpointing, unet.slice_size = level, slice_size // part
            x = torch.zeros(1, T, 8, H, W, dtype=torch.bfloat16, device="meta")
            with torch.device("meta"), compare.Meter(unet.parameters()) as meter:
                unet(x, torch.zeros(1), torch.zeros(1, 1, 8), torch.zeros(1, 3)).sum().backward()
            kept = meter.peak - sum(p.grad.nbytes for p in unet.parameters() if p.grad is not None)
            assert kept <= train.activations(name, s, unet) <= 2 * kept, name


@pytest.mark.parametrize("free, chosen", [
    (8, "memory"), (24, "memory-large"), (34, "balanced-small"), (40, "balanced"), (300, "none")])
def test_the_fastest_checkpoints_that_fit_are_chosen(free, chosen, monkeypatch):
    unet = exsvd.UNet(exsvd.UNetConfig(channels=(8, 16, 24, 24), groups=4)).bfloat16()
    unet.config = exsvd.UNetConfig()  # as large as SVD-XT, for all that is asked of it
    monkeypatch.setattr(train, "of_all_ranks", lambda free: [free, 300e9])
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 1e9, 0))
    s, device = train.TrainSettings(), torch.device("cuda")
    name, why = train.choose_checkpoint(s, unet, 833_000_000, device)
    assert name == chosen and f"of the {0.9 * min(free + 1, 300):.1f} GB that are free" in why
    assert free < 300 or "takes about 226.9 GB" in why


# What ends a run


def test_gradients_that_stay_bad_stop_the_run(small, run, tmp_path, monkeypatch):
    bad = changed_model(small, tmp_path, "conv_out.bias", math.nan)
    monkeypatch.setattr(train, "MAX_SKIPPED", 3)
    with pytest.raises(SystemExit, match="no finite gradients in 3 steps, .*clip 2"):
        run(f"--model {bad}")


def test_a_clip_whose_loss_is_not_finite_is_named_at_once(run, clips_with, capsys):
    """Its step is left out of weights and average."""
    latents = """z = torch.full((self.frames, 4, 8, 8), float("nan") if n == 2 else 1.0)
        return {"latents": z, "cond": torch.ones(4, 8, 8), "ctx": torch.ones(16), "aug": 0.1, """
    bad = clips_with(('return {"video": video, ', latents))
    out = run("--steps 2 --accumulate 2 --save-every 1", data=bad)
    assert "step 2 is left out: no finite loss on clip 2\n" in capsys.readouterr().out
    for key in ("master", "average"):
        before, after = (kept(out, step, key) for step in (1, 2))
        assert all(torch.equal(before[name], t) and t.isfinite().all() for name, t in after.items())


@pytest.mark.parametrize("code, words", [
    ("assert n < 3, 'a bug of mine'", "AssertionError: a bug of mine"),
    ("self.frames -= n == 3", 'train.py: dataset[3]["video"]: found Tensor of torch.uint8 (9, ')])
def test_a_failing_run_with_readers_ends(code, words, small, clips_with, tmp_path):
    """Within seconds, though readers ignore SIGTERM. A user's own bug shows its traceback, and an
    item that is not what it should be is named."""
    p = launch("--model", small, "--data", clips_with(("W, H =", f"{code}; W, H =")),
               "--out", tmp_path / "run", "--workers", 2)
    text = p.communicate(timeout=100)[0]
    assert p.returncode == 1 and words in text, text
    assert ("Traceback" in text) == ("bug" in code)


def test_what_cannot_be_loaded_again_ends_the_run_before_its_first_step(run, tmp_path, monkeypatch):
    save_extension = exsvd.save_extension

    def wrong_shape(path, unet, state, *args, **meta):
        save_extension(path, unet, state | {next(iter(state)): torch.zeros(3)}, *args, **meta)

    monkeypatch.setattr(exsvd, "save_extension", wrong_shape)
    with pytest.raises(exsvd.WeightsError):
        run("--train temporal --steps 1")
    assert not (tmp_path / "run" / "log.csv").exists()


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_and_a_second_one_ends_at_once(times, run, clips_with, tmp_path):
    interrupts = f"[os.kill(os.getpid(), signal.SIGINT) for _ in range({times} * (n == 2))]; W, H ="
    file = clips_with(("import torch", "import os, signal, torch"), ("W, H =", interrupts))
    with pytest.raises(KeyboardInterrupt) if times == 2 else contextlib.nullcontext():
        run(data=file)
    assert state_path(tmp_path / "run", 3).exists() == (times == 1)


def test_a_run_that_is_alive_keeps_others_out(run, tmp_path):
    """The lock dies with its process."""
    code = "import sys, train; train.lock_folder(sys.argv[1]); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=HERE, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(SystemExit, match="another run writes to"):
        run("--steps 1", out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]
    other.kill()
    other.communicate()
    run("--steps 1", out=tmp_path)


@pytest.mark.parametrize("flags, words", [
    ("--nonsense", "unrecognized"), ("--size 100x100", "multiples of 64"),
    ("--steps 0", "at least 1"), ("--drop 1.5", "at most 1"), ("--motion much", "must be a number"),
    ("--data missing", "missing"), ("--sample-image missing.png", "missing.png"),
    ("--train nothing", "names no parameter"), ("--train (", "not a valid regular"),
    ("--size 128x64 64x64 --batch 2", "--batch must be 1"),
    ("--deepspeed_config missing.json", "missing.json")])
def test_train_refuses_in_one_line(flags, words, run, tmp_path, capsys):
    with pytest.raises((SystemExit, data.MediaError)) as e:
        run(flags)
    assert words in capsys.readouterr().err + str(e.value)
    assert getattr(e.value, "code", 1) not in (0, None)
    assert not list(tmp_path.glob("run/state-*"))


def test_the_toy_is_the_default(monkeypatch):
    monkeypatch.chdir(HERE)
    s = train.parse([])
    assert s.data == train.TOY_CLIPS and s.out == "runs/toy"
    assert s == train.parse(["--model", "assets/toy.safetensors"])
    assert s.frames == 40 and s.size == ((128, 128),) and (s.val, s.val_every) == (s.data, 50)
    s = train.parse(["--model", train.TOY, "--data", "x", "--lr", "3e-4"])
    assert s.data == "x" and s.lr == 3e-4 and s.val is None


# --------------------------------------------------------------------------------------------------
# 6. toy/


def test_the_world_is_a_flight_whose_speed_the_bucket_gives():
    rates, still = set(), 0
    for frames, size in ((8, 128), (40, 64)):
        clips = world.clips(frames, (size, size), seed=0)
        for n in range(24):  # enough to see every rate
            item = clips[n]
            data.check_item(item, frames, (size, size))
            video = item["video"] / 127.5 - 1
            path = world.camera_path(video, video[0])
            true = world.scales(item["motion"], item["fps"], frames)
            assert (path - true).abs().max() < 0.03, (n, frames, item["motion"])
            rates.add((frames, item["fps"]))
            still += item["motion"] == 0
        again = world.clips(frames, (size, size), seed=0)[n]
        assert torch.equal(again["video"], item["video"]) and again["name"] == item["name"]
    assert rates == {(8, 8), (8, 4), (8, 1.6), (40, 8)}
    assert still, "a camera that stands is never seen"


def test_flights_into_pictures_of_a_folder(tmp_path):
    true = world.picture(7, 0)
    pixels = ((true + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    data.write_png(str(tmp_path / "a.png"), pixels)
    rng = np.random.default_rng(0)
    squares = [world.photograph(str(tmp_path), rng) for _ in range(4)]  # the only square there is
    assert all(min((x - true).abs().max(), (x.flip(2) - true).abs().max()) < 0.01 for x in squares)
    mixed = world.clips(2, (64, 64), 0, pictures=str(tmp_path))
    synthetic = world.clips(2, (64, 64), 0)
    same = [torch.equal(mixed[n]["video"], synthetic[n]["video"]) for n in range(12)]
    assert any(same) and not all(same)


def test_the_measures_tell_bad_flights_from_good_ones():
    picture = world.picture(5, 2)
    video = world.flight(picture, world.scales(60, 8, 40), 128)
    m = measure.measure(video, picture, 60, 8)
    assert abs(m["arrival"] - 1) < 0.01 and m["rms"] < 0.01 and m["back"] < 0.01
    assert m["flicker_sharp"] == 1 and min(m["psnr"]) > 60
    to_and_fro = torch.cat([video[::2], video[::2].flip(0)])
    for bad, expected in ((video[:1].expand_as(video), dict(arrival=0, back=0, flicker=0)),
                          (video[torch.arange(40) // 2], dict(arrival=0.5, back=0)),
                          (to_and_fro, dict(arrival=0, back=1))):
        m = measure.measure(bad, picture, 60, 8)
        assert all(abs(m[name] - value) < 0.03 for name, value in expected.items()), (expected, m)
        assert m["rms"] > 0.2 and m["psnr"][-1] < 25, (expected, m)
    soft = world.flight(F.avg_pool2d(picture, 16), world.scales(60, 8, 40), 128)
    m = measure.measure(soft, picture, 60, 8)  # softer than the picture, but steady
    assert m["flicker_sharp"] < 0.8 and abs(m["flicker"] - 1) < 0.1
    tints = 0.2 * torch.randn(40, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    m = measure.measure(video + tints, picture, 60, 8)  # another in each frame
    assert abs(m["arrival"] - 1) < 0.03 and m["back"] < 0.03, m
    assert m["flicker"] > 2 and m["rms"] < 0.02 and max(m["psnr"]) < 40, m


# --------------------------------------------------------------------------------------------------
# -m quick

warnings.filterwarnings("ignore", "Unknown pytest.mark.quick")  # no file at the top registers it
for quick in (*QUICK, test_names_of_published_files,  # not named test, or pytest would run it
              test_average_is_its_closed_form, test_killed_while_saving_it_resumes_bit_identically,
              test_a_state_is_cut_for_any_number_of_ranks,
              test_draws_depend_on_seed_and_number):
    pytest.mark.quick(quick)
