"""Memory, work and time of this repository beside diffusers and DiffSynth's ExVideo classes. Each
task prints a table.

    python bench/compare.py count train offload --diffsynth FOLDER   # memory and work, computed
    python bench/compare.py cost                                     # what one video takes
    python bench/compare.py time --diffsynth FOLDER                  # on the CPU: 16 GB of memory
    python bench/compare.py gpu --diffsynth FOLDER                   # all that needs a GPU

Computed, with tensors that have shapes but no values, on any machine:
    count      peak bytes of activations and TFLOP of a UNet pass and of decoding
    train      the same of a forward and backward pass of post-tuning
    offload    bytes on the GPU, weights included, of sample.py and train.py with --offload
    cost       time and memory of one video with the real weights

Run on --device:
    conv       ExVideo's 3x3x3 convolution in half precision against float32: its error and speed
    time       seconds of a UNet pass beside the other codes
    attention  the same with each attention backend, beside the pass as it is
    layout     ... with channels_last and channels_last_3d weights
    stream     ... with exsvd.Stream (sample.py --offload)
    compile    ... with exsvd.compile_blocks (sample.py --compile)
    step       steps of train.py, with each way of saving memory
    gpu        all of these, conv first, each with a time limit; 19 minutes at most

Two passes that are compared run in turn; times are medians [quartiles] and the ratio is that of the
pairs. Networks have the size of SVD-XT and random weights. A code that is not installed is left
out. DiffSynth's last release with SVD is 1.1.9: `pip download diffsynth==1.1.9 --no-deps`, then
unzip the wheel into FOLDER.
"""

import argparse
import csv
import gc
import glob
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import exsvd
import sample

# --------------------------------------------------------------------------------------------------
# The networks of each code: build() returns one, and a function pass(T, H, W) that runs it on
# random inputs

CODES = ("ours", "diffsynth", "ours-base", "diffusers")  # the first two are extended


def version(code, folder):
    """Name and version of a code; None where it is not installed. folder: where DiffSynth's wheel
    was unpacked."""
    if code.startswith("ours"):
        return "this repository"
    if code == "diffusers":
        try:
            return f"diffusers {importlib.metadata.version('diffusers')}"
        except importlib.metadata.PackageNotFoundError:
            return None
    found = glob.glob(os.path.join(folder or "", "diffsynth-*.dist-info"))
    if not folder or not found:
        return None
    return f"DiffSynth {os.path.basename(found[0]).split('-')[1].removesuffix('.dist')}"


def installed(codes, a):
    return [code for code in codes if version(code, a.diffsynth)]


def diffsynth_modules(folder):
    """DiffSynth's UNet and VAE, without its package's __init__, which imports all of the package's
    dependencies."""
    for name in ("diffsynth", "diffsynth.models"):
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(folder, *name.split("."))]
        sys.modules.setdefault(name, package)
    from diffsynth.models import svd_unet, svd_vae_decoder
    return svd_unet, svd_vae_decoder


def unet(code, frames, folder, new, checkpointing):
    """-> (network, pass(T, H, W), what ExVideo trains as parts of parameter names)"""
    if code == "diffusers":
        from diffusers import UNetSpatioTemporalConditionModel
        m = UNetSpatioTemporalConditionModel(num_frames=25, num_attention_heads=(5, 10, 20, 20))
        m.enable_gradient_checkpointing()  # takes effect in training mode only, as in the others

        def run(T, H, W):
            return m(new(1, T, 8, H, W), new(1), new(1, 1, 1024), new(1, 3)).sample

        return m, run, [".temporal_transformer_blocks."]
    if code == "diffsynth":
        module = diffsynth_modules(folder)[0]
        m = module.SVDUNet(add_positional_conv=frames)
        blocks = [f"{name}." for name, block in m.named_modules()
                  if isinstance(block, module.TemporalAttentionBlock)]

        def run(T, H, W):
            return m(new(T, 8, H, W), 1.0, new(1, 1024), new(1, 3),
                     use_gradient_checkpointing=m.training)

        return m, run, blocks
    m = exsvd.UNet()
    if code == "ours":
        exsvd.extend(m, frames)
    m.checkpointing = checkpointing

    def run(T, H, W):
        return m(new(1, T, 8, H, W), new(1), new(1, 1, 1024), new(1, 3))

    return m, run, [".attn.temporal."]


def vae(code, folder, new):
    if code == "diffusers":
        from diffusers import AutoencoderKLTemporalDecoder
        m = AutoencoderKLTemporalDecoder(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            latent_channels=4, layers_per_block=2)
        return m, lambda T, H, W: m.decode(new(T, 4, H, W), num_frames=T).sample
    if code == "diffsynth":  # one tile; it cuts what is larger than 8 x 128x128 into tiles
        m = diffsynth_modules(folder)[1].SVDVAEDecoder()
        return m, lambda T, H, W: m(new(4, T, H, W))
    m = exsvd.VAE()
    return m, lambda T, H, W: m.decode(new(1, T, 4, H, W))


def build(code, a, T=128, part="unet", train=False, checkpointing="memory", device=None,
          dtype=torch.bfloat16):
    """-> (network, pass(T, H, W)) on a device [a.device]. An extended UNet has at least 128
    frames."""
    device = device or a.device
    new = partial(torch.randn, dtype=dtype, device=device)
    torch.set_default_dtype(dtype)  # building it in float32 first would take twice the memory
    try:
        with torch.device(device):
            if part == "vae":
                (m, run), trained = vae(code, a.diffsynth, new), []
            else:
                m, run, trained = unet(code, max(T, 128), a.diffsynth, new, checkpointing)
    finally:
        torch.set_default_dtype(torch.float32)
    if train:
        for name, p in m.named_parameters():
            p.requires_grad_(any(part in name for part in trained))
    # Otherwise parameters keep requires_grad=True, as diffusers loads them: without, torch.matmul
    # takes a slower path for small strided contexts, and diffusers needs 2.5 times as long on a
    # CPU.
    return m.train(train), run


def one_pass(run, shape, train=False):
    with torch.set_grad_enabled(train):
        out = run(*shape)
        if train:
            out.float().pow(2).mean().backward()


def weight_bytes(*networks):
    return sum(p.nbytes for m in networks for p in m.parameters())


# --------------------------------------------------------------------------------------------------
# Computing: FakeTensorMode sends shapes through a network, without values


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that still live [on one device];
    `peak` is the most.

    A storage counts once, however many tensors share it. Copies inside an operation and the
    workspaces of libraries are not seen.
    """

    def __init__(self, weights, device=None):
        super().__init__()
        self.device = device
        self.known = {w.untyped_storage()._cdata for w in weights}
        self.live = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            if self.device not in (None, tensor.device.type):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, key, size):
        self.known.discard(key)
        self.live -= size


@contextmanager
def computing():
    """Fake tensors on the CPU, so that a count is the same on every machine, in the slices that a
    GPU takes."""
    with patch.object(exsvd, "CPU_SLICES", 1), FakeTensorMode():
        yield


def attention_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(q_shape, k_shape, v_shape)


# FlopCounterMode knows the attention kernels of GPUs only
ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def count(code, a, shape, part="unet", train=False, checkpointing="memory", attention=False):
    """(peak bytes of activations, with gradients if training; FLOP, a multiply-add is two) of a
    pass in bfloat16

    attention: whether to count its FLOP too, which every code needs alike.
    """
    with computing():
        m, run = build(code, a, shape[0], part, train, checkpointing, device="cpu")
        with LiveBytes([*m.parameters(), *m.buffers()]) as live:
            one_pass(run, shape, train)
        m.zero_grad(set_to_none=True)
        if not train:
            # FlopCounterMode follows modules by their gradients and needs all or none
            m.requires_grad_(False)
        kernels = ATTENTION if attention else {}
        # in a pass of its own, since it keeps tensors alive
        with FlopCounterMode(display=False, custom_mapping=kernels) as flops:
            one_pass(run, shape, train)
    return live.peak, flops.get_total_flops()


def streamed_bytes(a, shape, code="ours"):
    """Peak bytes on the device, weights included, of denoise() with exsvd.Stream.

    The device is "meta", which works like any other under FakeTensorMode. There PyTorch splits
    attention into its parts and would keep all scores, which the fused kernels of a GPU do not; so
    only its result is made here.
    """
    fused = patch.object(torch.nn.functional, "scaled_dot_product_attention",
                         lambda q, k, v: torch.empty_like(q))
    T, H, W = shape
    new = partial(torch.empty, device="meta")
    with FakeTensorMode():
        m = build(code, a, T, device="cpu")[0]
        with LiveBytes([], "meta") as live, torch.no_grad(), fused:
            m.stream = exsvd.Stream(m, "meta")
            exsvd.denoise(
                m, new(1, T, 4, H, W), new(1), new(1, 1, 4, H, W), new(1, 1, 1024), new(1, 3))
    return live.peak


def offloaded_step_bytes(a, shape):
    """Peak bytes on the device of a step of `train.py --offload`, weights included.

    DeepSpeed 0.19 (stage_1_and_2.py) copies each gradient into a bucket as soon as it is there.
    When the bucket is full, each gradient leaves for the CPU by way of a float32 copy. Room for the
    largest parameter is kept in 16 bits.
    """
    from train import BUCKET  # gradients that fit into the bucket
    bucket, waiting = [], []

    def leave(p):
        if not bucket:
            bucket.append(torch.empty(BUCKET, dtype=torch.bfloat16))
        if sum(waiting) + p.numel() > BUCKET:
            for n in waiting:
                torch.empty(n)  # float32; gone at once
            waiting.clear()
        waiting.append(p.numel())
        p.grad = None

    with computing():
        m, run = build("ours", a, shape[0], train=True, device="cpu")
        trained = [p for name, p in m.named_parameters()
                   if p.requires_grad and not exsvd.IDLE.search(name)]
        for p in trained:
            p.register_post_accumulate_grad_hook(leave)
        with LiveBytes(m.parameters()) as live:
            one_pass(run, shape, train=True)
    return live.peak + weight_bytes(m) + 2 * max(p.numel() for p in trained)


# --------------------------------------------------------------------------------------------------
# Running


def seconds(f, device):
    """Seconds of a call, on a GPU until it has finished."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - begin


def gpu_peak(f, device):
    """Bytes that the allocator gave out during a call, at the peak, beyond those before it; None
    without a GPU."""
    if device != "cuda":
        return None
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def alternating(f, g, a):
    """Seconds of f and of g, [a.pairs] each. Other work on the machine slows both alike; the first
    pair warms up."""
    times = [(seconds(f, a.device), seconds(g, a.device)) for _ in range(a.pairs + 1)]
    return tuple(zip(*times[1:]))


def quartiles(values):
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{mid:.3f} [{low:.3f}, {high:.3f}]"


def ratio(numerators, denominators):
    return quartiles([x / y for x, y in zip(numerators, denominators)])


# --------------------------------------------------------------------------------------------------
# Tasks: each yields rows of a table: (what, code, shape, {column: value})

COLUMNS = ("peak GB", "TFLOP", "seconds", "ratio", "note")


def gb(n):
    return None if n is None else f"{n / 1e9:.3f}"


def counted(what, code, a, shape, note=None, **how):
    peak, flops = count(code, a, shape, **how)
    return what, code, shape, {"peak GB": gb(peak), "TFLOP": f"{flops / 1e12:.2f}", "note": note}


def count_rows(a):
    for shape in a.shape or [(128, 64, 64), (128, 128, 128), (16, 32, 32)]:
        for code in installed(CODES, a):
            yield counted("UNet pass, computed", code, a, shape)
    if not a.shape:
        for code in installed(("ours", "diffusers", "diffsynth"), a):
            yield counted("VAE decode, computed", code, a, (8, 128, 128), part="vae")


def train_rows(a):
    for shape in a.shape or [(128, 64, 64)]:
        for code, setting in (("ours", "memory"), ("ours", "speed"), ("diffsynth", "its own"),
                              ("diffusers", "its own")):
            if version(code, a.diffsynth):
                yield counted("forward and backward, computed", code, a, shape,
                              f"checkpointing: {setting}", train=True, checkpointing=setting)


def offload_rows(a):
    for shape in a.shape or [(128, 64, 64), (128, 128, 128)]:
        yield "sample.py --offload: denoise(), computed", "ours", shape, {
            "peak GB": gb(streamed_bytes(a, shape)), "note": "with weights"}
    shape = a.shape[0] if a.shape else (128, 64, 64)
    yield "train.py --offload: a step, computed", "ours", shape, {
        "peak GB": gb(offloaded_step_bytes(a, shape)),
        "note": "with weights and the bucket; from encoded latents"}


# What one video takes: its FLOP over a share of the GPU's dense float16 peak with sums in float32
# (NVIDIA's data sheets). TensorRT reaches 45 % of it in the UNet and 12 % in the VAE: SVD-XT 1.1,
# 25 steps, in 27.5 and 4.5 s on an A100 (quoted: Hugging Face,
# stabilityai/stable-video-diffusion-img2vid-xt-1-1-tensorrt). PyTorch is given 2/3 of that.
GPUS = {"A100": 312e12, "RTX 4090": 165e12}
UNET_SHARE, VAE_SHARE = 0.30, 0.08

# sample.py's defaults: (name, code, shape of the latents, passes of the UNet, frames that are
# decoded at a time)
VIDEOS = [
    ("ExVideo, 128 frames of 512x512, 50 steps with guidance", "ours", (128, 64, 64), 100, 16),
    ("SVD-XT, 25 frames of 1024x576, 25 steps with guidance", "ours-base", (25, 72, 128), 50, 14)]


def decoded_frames(T, chunk):
    """How many frames sample.decode gives to the VAE for a video of T: its chunks overlap."""
    lengths = []

    def decode(z):
        lengths.append(z.shape[1])
        return torch.zeros(1, z.shape[1], 3, 8, 8)

    for _ in sample.decode(types.SimpleNamespace(decode=decode), torch.zeros(1, T, 4, 1, 1), chunk):
        pass
    return sum(lengths)


def cost_rows(a):
    with torch.device("meta"):
        vae_bytes = weight_bytes(exsvd.VAE()) // 2  # in 16 bits
        clip_bytes = weight_bytes(exsvd.ImageEncoder()) // 2
        unet_bytes = {"ours-base": weight_bytes(exsvd.UNet()) // 2}
        extended = exsvd.UNet()
        exsvd.extend(extended, 128)
        unet_bytes["ours"] = weight_bytes(extended) // 2
    for name, code, shape, passes, chunk in VIDEOS:
        T, H, W = shape
        unet_peak, unet_flops = count(code, a, shape, attention=True)
        vae_peak, vae_flops = count("ours", a, (chunk, H, W), part="vae", attention=True)
        # --offload decodes 4 frames at a time
        small_vae_peak, _ = count("ours", a, (4, H, W), part="vae")
        peak = max(unet_bytes[code] + unet_peak, vae_bytes + vae_peak)
        small_peak = max(streamed_bytes(a, shape, code), vae_bytes + small_vae_peak)
        host = unet_bytes[code] + vae_bytes + clip_bytes
        sampling, decoding = passes * unet_flops, vae_flops * decoded_frames(T, chunk) / chunk
        for gpu, flops in GPUS.items():
            times = sampling / flops / UNET_SHARE, decoding / flops / VAE_SHARE
            yield f"{name}, {gpu}, computed", code, shape, {
                "peak GB": gb(peak), "TFLOP": f"{(sampling + decoding) / 1e12:.0f}",
                "seconds": f"{sum(times):.0f}",
                "note": f"UNet {times[0]:.0f} s, VAE {times[1]:.0f} s; with --offload "
                        f"{gb(small_peak)} GB; networks in host memory {gb(host)} GB"}


@torch.no_grad()
def conv_rows(a):
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32
    T, H, W = a.shape[0] if a.shape else (128, 64, 64)
    wrong = False
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(1, 320, T, H, W, device=a.device).to(dtype)
        conv = torch.nn.Conv3d(320, 320, 3, padding=1, device=a.device).to(dtype)
        expected = torch.nn.functional.conv3d(
            x.float(), conv.weight.float(), conv.bias.float(), padding=1)
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            x, conv = x.contiguous(memory_format=layout), conv.to(memory_format=layout)
            error = ((conv(x).float() - expected).norm() / expected.norm()).item()
            wrong |= error > 1e-2  # rounding explains 2e-4 in float16 and 1.7e-3 in bfloat16
            peak = gpu_peak(lambda: conv(x), a.device)
            times = [seconds(lambda: conv(x), a.device) for _ in range(a.pairs)]
            yield f"3x3x3 convolution, {dtype} against float32", "ours", (T, H, W), {
                "peak GB": gb(peak), "seconds": quartiles(times),
                "note": f"error {error:.1e} of the result; {layout}; "
                        f"cuDNN {torch.backends.cudnn.version()}"}
    if wrong:
        sys.exit("compare.py: convolutions are wrong in half precision on this machine, and so is "
                 "every video: use another version of PyTorch or cuDNN")


def compared(names, builds, shape, a):
    """Rows of two networks that run in turn. builds: functions that return (network, function that
    runs a pass)."""
    try:
        networks, runs = zip(*(build_one() for build_one in builds))
        for run in runs:
            run()  # whatever is compiled or chosen is now
        peaks = [gpu_peak(run, a.device) for run in runs]
        times = alternating(*runs, a)
    except RuntimeError as e:  # out of memory, or no kernel for this device and dtype
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:100]
        what = f"UNet pass, {names[0]} beside {names[1]}"
        return [(what, "", shape, {"note": f"failed: {reason}"})]
    rows = []
    for name, m, peak, t in zip(names, networks, peaks, times):
        there = sum(p.nbytes for p in m.parameters() if p.device.type == a.device)
        rows.append((f"UNet pass, {name}", "", shape, {
            "peak GB": gb(peak), "seconds": quartiles(t),
            "ratio": ratio(*times) if m is networks[0] else None,
            "note": f"{a.dtype}, {a.pairs} pairs; {gb(there)} GB of weights on the device come on "
                    "top"}))
    return rows


def builder(code, a, shape, change=lambda network: None, context=nullcontext):
    """A function that builds a network, changes it, and returns it with a function that runs a pass
    in a context."""
    def build_one():
        m, run = build(code, a, shape[0], dtype=a.dtype)
        change(m)

        def run_one():
            with context():
                one_pass(run, shape)

        return m, run_one

    return build_one


def time_rows(a):
    for shape in a.shape or [(16, 32, 32)]:
        for codes in [("ours-base", "diffusers"), ("ours", "diffsynth")]:
            if version(codes[1], a.diffsynth):
                names = [f"{code} ({version(code, a.diffsynth)})" for code in codes]
                yield from compared(names, [builder(code, a, shape) for code in codes], shape, a)


def beside_plain(name, a, change=lambda network: None, context=nullcontext):
    for shape in a.shape or [(128, 64, 64)]:
        builds = builder("ours", a, shape, change, context), builder("ours", a, shape)
        yield from compared((name, "as it is"), builds, shape, a)


def attention_rows(a):
    @contextmanager
    def only(backend):
        with patch.object(exsvd, "flash_attn_func", None), sdpa_kernel(backend):
            yield

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION,
                    SDPBackend.EFFICIENT_ATTENTION):
        yield from beside_plain(backend.name, a, context=partial(only, backend))


def layout_rows(a):
    def channels_innermost(network):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for p in network.parameters():
            p.data = p.data.contiguous(memory_format=formats.get(p.dim(), torch.contiguous_format))

    return beside_plain("channels innermost", a, channels_innermost)


def stream_rows(a):
    def stream(network):
        network.stream = exsvd.Stream(network, a.device)

    return beside_plain("exsvd.Stream", a, stream)


def compile_rows(a):
    return beside_plain("compiled", a, exsvd.compile_blocks)


def step_rows(a):
    """On a GPU networks of full size; on a CPU the toy, to try the task out."""
    T, H, W = a.shape[0] if a.shape else (128, 64, 64)
    with tempfile.TemporaryDirectory() as folder:
        model = os.path.join(ROOT, "assets", "toy.safetensors")
        if a.device == "cuda":
            model = os.path.join(folder, "random.safetensors")
            networks = (network() for network in (exsvd.UNet, exsvd.VAE, exsvd.ImageEncoder))
            exsvd.save_model(model, *(network.bfloat16() for network in networks))
        for settings in ("--checkpoint memory", "--checkpoint speed",
                         "--checkpoint memory --offload"):
            out = os.path.join(folder, settings.replace(" ", ""))
            command = [sys.executable, "train.py", "--model", model, "--data", "bench/noise.py",
                       "--out", out, "--frames", str(T), "--size", f"{8 * W}x{8 * H}", "--steps",
                       "4", "--log-every", "1", "--sample-every", "0", *settings.split()]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                failed = {"note": f"failed: {last_line(done)}"}
                yield f"train.py {settings}", "ours", (T, H, W), failed
                continue
            with open(os.path.join(out, "log.csv"), newline="") as f:
                step = list(csv.DictReader(f))[-1]
            yield f"train.py {settings}", "ours", (T, H, W), {
                "peak GB": step["peak_memory_GB"], "seconds": step["seconds_per_step"],
                "note": f"the fourth step, with VAE, CLIP and optimiser; loss {step['loss']}"}


def last_line(process):
    lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
    return lines[-1][:200].replace("|", "/")


TASKS = {"count": count_rows, "train": train_rows, "offload": offload_rows, "cost": cost_rows,
         "conv": conv_rows, "time": time_rows, "attention": attention_rows, "layout": layout_rows,
         "stream": stream_rows, "compile": compile_rows, "step": step_rows}

# What `gpu` runs: (task, seconds it may take, shapes, pairs)
GPU_PLAN = [
    ("conv", 60, ["128x64x64"], 9), ("time", 120, ["128x64x64"], 5),
    ("time", 150, ["128x128x128"], 2), ("attention", 150, ["128x64x64"], 3),
    ("layout", 60, ["128x64x64"], 5), ("stream", 120, ["128x64x64", "128x128x128"], 2),
    ("step", 240, ["128x64x64"], 2), ("compile", 240, ["128x64x64"], 3)]


def run_plan(a):
    """Each task in a process of its own, so that none can fail or hang for the others."""
    for task, limit, shapes, pairs in GPU_PLAN:
        if a.shape:
            shapes = ["x".join(map(str, shape)) for shape in a.shape]
        command = ["timeout", "--kill-after=5", str(limit), sys.executable,
                   os.path.abspath(__file__), task, "--device", a.device,
                   "--pairs", str(min(pairs, a.pairs)), "--shape", *shapes]
        if a.diffsynth:
            command += ["--diffsynth", a.diffsynth]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode in (124, 137):
            print(f"\n{task}: stopped after {limit} s", flush=True)
        elif done.returncode:
            print(f"\n{task}: failed: {last_line(done)}", flush=True)
            if task == "conv":  # nothing else would mean anything
                return


def parse():
    def shape(text):
        T, H, W = (int(n) for n in text.split("x"))
        return T, H, W

    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tasks", nargs="+", choices=[*TASKS, "gpu"], metavar="TASK", help="see above")
    p.add_argument("--shape", type=shape, nargs="+", metavar="TxHxW",
                   help="of the latents, such as 128x64x64 [those of bench/README.md]; height and "
                   "width are multiples of 8")
    p.add_argument("--diffsynth", metavar="FOLDER",
                   help="an unpacked wheel of DiffSynth, to compare with")
    p.add_argument("--pairs", type=int, default=9,
                   help="how often to run what is timed, at least 2 [9]")
    p.add_argument("--device", choices=("cpu", "cuda"), help="to run on [cpu; of gpu: cuda]")
    a = p.parse_args()
    if a.diffsynth and not version("diffsynth", a.diffsynth):
        p.error(f"--diffsynth {a.diffsynth}: a folder with diffsynth/ and diffsynth-*.dist-info/ "
                "is needed")
    a.device = a.device or ("cuda" if "gpu" in a.tasks else "cpu")
    if a.device == "cuda" and not torch.cuda.is_available():
        sys.exit("compare.py: torch sees no GPU here")
    a.dtype = exsvd.best_dtype(a.device)
    return a


def hardware(a):
    if a.device == "cuda":
        return torch.cuda.get_device_name()
    name = "CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            names = [line.split(":")[1].strip() for line in f if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"


def main():
    a = parse()
    for task in a.tasks:
        if task == "gpu":
            run_plan(a)
            continue
        date = time.strftime("%Y-%m-%d")
        print(f"\n`compare.py {task}`, torch {torch.__version__}, {hardware(a)}, {date}\n")
        print(f"| | code | shape | {' | '.join(COLUMNS)} |")
        print(f"|{' --- |' * (len(COLUMNS) + 3)}", flush=True)
        for what, code, shape, values in TASKS[task](a):
            cells = [what, f"{code} ({version(code, a.diffsynth)})" if code else "",
                     f"{shape[0]} x {shape[1]}x{shape[2]}" if shape else "",
                     *(values.get(column) or "" for column in COLUMNS)]
            print(f"| {' | '.join(cells)} |", flush=True)
            gc.collect()
            if a.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
