"""Memory, work and time of this repository beside diffusers and DiffSynth's ExVideo classes: one command, one table.

    python bench/compare.py                                             # counts of a UNet pass at three shapes, no GPU
    python bench/compare.py count train vae --diffsynth FOLDER          # every count of bench/README.md, 15 minutes
    python bench/compare.py time process --shape 16x32x32               # full size, really run: 10 GB of memory
    python bench/compare.py gpu --diffsynth FOLDER                      # what a GPU tells, 9 minutes; gpu2: the rest

    count      peak live bytes of activations and matrix work of one UNet pass at any shape (fake tensors)
    train      the same of forward and backward, temporal blocks trained, checkpointed; on a GPU also really run
    offload    bytes on the device, weights included, where others wait in CPU memory: exsvd.Stream, train.py --offload
    vae        the same of VAE decoding; --shape counts latents
    time       seconds of a pass, ours against each other code: median ratio of alternating pairs [quartiles]; share of
               the device's matrix rate, as one large product has it; on a GPU the allocator's peak
    process    memory of a process that builds a network and runs one pass
    frames     seconds per frame of a long clip over those of a short one, and the same of the counted work
    attention  ours with each attention backend
    load       an SVD-XT-shaped float32 file (random values, written first: 10 GB) to a bfloat16 model, against cat
    decode     memory of sample.decode for longer and longer videos
    stream     seconds of a pass with exsvd.Stream (sample.py --offload), beside one without; on a GPU the peak
    compile    the same of exsvd.compile_blocks (sample.py --compile)
    parity     bfloat16 and float16 beside float32, the same weights and inputs
    step       steps of train.py: both settings of checkpointing, and --offload. On the CPU of the toy
    repeat     train.py --deterministic on the toy: twice, and stopped and resumed; are the states equal?
    gpu, gpu2  the above in order of worth, each with a time limit (GPU_PLAN), at most 9 minutes, then at most 14; rows
               go to --out at once, and what fails or is cut off is a row that says so. To try it without a GPU:
               compare.py gpu gpu2 --device cpu --shape 2x16x16 --pairs 2

Every network has the size of SVD-XT and random weights, in bfloat16, unless a row says otherwise. DiffSynth's last
release with SVD is 1.1.9: `pip download diffsynth==1.1.9 --no-deps`, unzip the wheel into FOLDER. What is not installed
is left out.
"""

import argparse
import csv
import gc
import glob
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import weakref
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import exsvd
import sample
import train

# ----------------------------------------------------------------------------------------------------------------------
# The networks. unet() gives a module, pass(T, H, W) with random inputs, and which parameters post-tuning trains;
# build() applies them.

# the first two extended to 128 frames or more
CODES = ("ours", "diffsynth", "ours-base", "diffusers", "diffsynth-base")


def diffsynth_classes(folder):
    """DiffSynth's modules, without its package's __init__, which imports everything the package can do."""
    for name in ("diffsynth", "diffsynth.models"):
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(folder, *name.split("."))]
        sys.modules.setdefault(name, package)
    from diffsynth.models import svd_unet, svd_vae_decoder
    return svd_unet, svd_vae_decoder


def version(code, folder):
    """Of another code, None where it is not installed."""
    if code.startswith("ours"):
        return "this repository"
    if code == "diffusers":
        try:
            return "diffusers " + importlib.metadata.version("diffusers")
        except importlib.metadata.PackageNotFoundError:
            return None
    found = glob.glob(os.path.join(folder or "", "diffsynth-*.dist-info"))
    return f"DiffSynth {found[0].split('-')[-2].removesuffix('.dist')}" if folder and found else None


def unet(code, frames, folder, new, checkpointing):
    """-> the network, run(frames, height, width) for one pass, the names of the blocks that ExVideo trains"""
    if code == "diffusers":
        from diffusers import UNetSpatioTemporalConditionModel
        m = UNetSpatioTemporalConditionModel(num_frames=25, num_attention_heads=(5, 10, 20, 20))
        m.enable_gradient_checkpointing()  # takes effect in training mode only, as in the others

        def run(T, H, W):
            return m(new(1, T, 8, H, W), new(1), new(1, 1, 1024), new(1, 3)).sample

        return m, run, (".temporal_transformer_blocks.",)
    if code in ("diffsynth", "diffsynth-base"):
        module = diffsynth_classes(folder)[0]
        m = module.SVDUNet(add_positional_conv=frames if code == "diffsynth" else None)
        blocks = [n + "." for n, b in m.named_modules() if isinstance(b, module.TemporalAttentionBlock)]

        def run(T, H, W):
            return m(new(T, 8, H, W), 1.0, new(1, 1024), new(1, 3), use_gradient_checkpointing=m.training)

        return m, run, blocks
    m = exsvd.UNet()
    if code == "ours":
        exsvd.extend(m, frames)
    m.checkpointing = checkpointing
    return m, lambda T, H, W: m(new(1, T, 8, H, W), new(1), new(1, 1, 1024), new(1, 3)), (".attn.temporal.",)


def vae(code, folder, new):
    if code == "diffusers":
        from diffusers import AutoencoderKLTemporalDecoder
        m = AutoencoderKLTemporalDecoder(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
            layers_per_block=2)
        return m, lambda T, H, W: m.decode(new(T, 4, H, W), num_frames=T).sample
    if code == "diffsynth":  # one tile; it tiles what is larger than 8 x 128x128
        m = diffsynth_classes(folder)[1].SVDVAEDecoder()
        return m, lambda T, H, W: m(new(4, T, H, W))
    m = exsvd.VAE()
    return m, lambda T, H, W: m.decode(new(1, T, 4, H, W))


def build(code, a, T=128, part="unet", train=False, checkpointing="memory", device=None):
    """-> (network, pass(T, H, W)), in bfloat16 on a device [a.device]."""
    device = device or a.device
    new = partial(torch.randn, dtype=torch.bfloat16, device=device)  # random inputs
    torch.set_default_dtype(torch.bfloat16)  # float32 first would need twice the memory
    try:
        with torch.device(device):
            if part == "vae":
                (m, run), trained = vae(code, a.diffsynth, new), ()
            else:
                m, run, trained = unet(code, max(T, 128), a.diffsynth, new, checkpointing)
    finally:
        torch.set_default_dtype(torch.float32)
    if train:
        for name, p in m.named_parameters():
            p.requires_grad_(any(part in name for part in trained))
    # Otherwise parameters require gradients, as in a network that was just loaded. Trap: switched off, torch.matmul
    # takes a slower path for small strided contexts, and diffusers takes two and a half times as long on a CPU.
    return m.train(train), run


def one_pass(run, shape, train=False):
    with torch.set_grad_enabled(train):
        out = run(*shape)
        if train:
            out.float().pow(2).mean().backward()


def weight_bytes(*networks):
    return sum(p.numel() * p.element_size() for m in networks for p in m.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Counting: shapes go through the network, numbers do not


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live [on one device], `peak` the most there were. Each
    counts once, however many tensors share it; copies inside an operation and a library's workspace are not seen."""

    def __init__(self, weights, device=None):
        super().__init__()
        self.device = device
        self.known = {w.untyped_storage()._cdata for w in weights}
        self.live = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            counts = isinstance(tensor, torch.Tensor) and self.device in (None, tensor.device.type)
            if counts and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, key, size):
        self.known.discard(key)
        self.live -= size


def count(code, a, shape, part="unet", train=False, checkpointing="memory"):
    """(peak bytes of activations, and gradients if training; multiply-adds times two) of a pass in bfloat16."""
    # on the CPU, so that a count is the same everywhere, but of what a GPU needs
    small, exsvd.CPU_SLICES = exsvd.CPU_SLICES, 1
    try:
        with FakeTensorMode():
            m, run = build(code, a, shape[0], part, train, checkpointing, device="cpu")
            live = LiveBytes([*m.parameters(), *m.buffers()])
            with live:
                one_pass(run, shape, train)
            m.zero_grad(set_to_none=True)
            if not train:
                # the counter follows modules by their gradients, and trips over parameters without any
                m.requires_grad_(False)
            flops = FlopCounterMode(display=False)  # apart: it keeps tensors alive
            with flops:
                one_pass(run, shape, train)
    finally:
        exsvd.CPU_SLICES = small
    return live.peak, flops.get_total_flops()


# ----------------------------------------------------------------------------------------------------------------------
# Running


def clocks(f, device):
    """Seconds of one call, on a GPU until it has finished, and of CPU time: on a busy machine the better measure."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin, cpu = time.perf_counter(), time.process_time()
    f()
    wait()
    return time.perf_counter() - begin, time.process_time() - cpu


def seconds(f, device):
    return clocks(f, device)[0]


def gpu_peak(f, device):
    """What the allocator handed out at most during a call, beyond what was there before; None without a GPU."""
    if device != "cuda":
        f()
        return None
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def matrix_rate(device):
    """Operations per second of one large bfloat16 product: what this device does at best, as measured."""
    n = 8192 if device == "cuda" else 2048
    x, y = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    times = [seconds(lambda: x @ y, device) for _ in range(20)]
    return 2 * n**3 / statistics.median(times[5:])


def pairs(f, g, a):
    """Alternating runs: seconds (2, pairs) of f and g, and of CPU time. What else the machine does hits both alike."""
    times = torch.tensor([(clocks(f, a.device), clocks(g, a.device)) for _ in range(a.pairs + 1)])
    times = times[1:]  # the first warms up
    return times[..., 0].T.tolist(), times[..., 1].T.tolist()


def quartiles(values):
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{mid:.3f} [{low:.3f}, {high:.3f}]"


def ratio(numerators, denominators):
    return quartiles([x / y for x, y in zip(numerators, denominators)])


def in_fresh_process(f, *args):
    """f(*args) in a process of its own, so that its peak memory is of this alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(f, args)


def status(key):
    """A line of /proc/self/status in bytes (Linux). VmHWM is the peak; ru_maxrss would start at the parent's."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(key + ":"))


def process_of(code, a, shape):
    torch.set_num_threads(a.threads)
    m, run = build(code, a, shape[0])
    built = status("VmRSS")
    one_pass(run, shape)
    return built, status("VmHWM")


def write_random_model(path):
    """A float32 file with the names, shapes and size of svd_xt.safetensors, written tensor by tensor."""
    with torch.device("meta"):
        parts = exsvd.UNet(), exsvd.VAE(), exsvd.ImageEncoder()
    shapes = {names[0]: tuple(p.shape) for m in parts for names, p in
              zip(exsvd.file_names(m, "sgm").values(), m.state_dict().values())}
    have = sum(math.prod(s) for s in shapes.values())
    shapes["first_stage_model.encoder.filler"] = (int(9.56e9 / 4) - have,)  # a second VAE and CLIP's text side, unread
    header, end = {}, 0
    for name, shape in sorted(shapes.items()):  # alphabetically, as safetensors writes
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * math.prod(shape)]}
    text = json.dumps(header).encode()
    with open(path + ".tmp", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, shape in sorted(shapes.items()):
            f.write(torch.randn(shape).numpy())
    os.replace(path + ".tmp", path)


def load_once(path, a):
    """Of loading: (seconds, RssAnon at most, before, size of the model), the last three in bytes."""
    torch.set_num_threads(a.threads)
    before = peak = status("RssAnon")
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    svd = exsvd.load(path, dtype=torch.bfloat16)
    took = time.perf_counter() - begin
    done.set()
    watcher.join()
    return took, max(peak, status("RssAnon")), before, weight_bytes(svd.unet, svd.vae, svd.clip)


def cat(path):
    """Seconds of `cat FILE > /dev/null`."""
    return seconds(lambda: os.system(f"cat '{path}' > {os.devnull}"), "cpu")


def decode_frames(T, a, pixels):
    """Peak memory of the process, bytes: a VAE a quarter as wide as SVD's decodes T frames in chunks of 16."""
    torch.set_num_threads(a.threads)
    vae = exsvd.VAE(exsvd.VAEConfig(channels=(32, 64, 128, 128))).eval()
    with torch.inference_mode():
        n = sum(len(frames) for frames in sample.decode(vae, torch.randn(1, T, 4, pixels // 8, pixels // 8), 16))
    assert n == T, f"{n} frames of {T}"
    return status("VmHWM")


# ----------------------------------------------------------------------------------------------------------------------
# The table: each task yields rows (what, code, shape, {column: value})

COLUMNS = ("peak GB", "TFLOP", "seconds", "ratio", "of matrix rate", "note")
HEADER = ("", "code", "shape", *COLUMNS, "conditions")


def gb(n):
    return None if n is None else f"{n / 1e9:.3f}"


def others(a, codes):
    return [c for c in codes if version(c, a.diffsynth)]


def counted(what, code, a, shape, note=None, **how):
    peak, flops = count(code, a, shape, **how)
    return f"{what}, counted", code, shape, {"peak GB": gb(peak), "TFLOP": f"{flops / 1e12:.2f}", "note": note}


def count_rows(a):
    for shape in a.shape or [(128, 64, 64), (128, 128, 128), (16, 32, 32)]:
        for code in others(a, CODES):
            yield counted("UNet forward", code, a, shape)


def train_rows(a):
    settings = [("ours", "memory"), ("ours", "speed")]
    settings += [(code, "its own") for code in others(a, ("diffsynth", "diffusers"))]
    for shape in a.shape or [(128, 64, 64)]:
        if a.device == "cuda":  # first: a count may take minutes
            for code, setting in settings:
                yield "UNet forward + backward", code, shape, train_on_gpu(code, a, shape, setting)
        for code, setting in settings:
            yield counted("UNet forward + backward", code, a, shape, f"checkpointing: {setting}", train=True,
                          checkpointing=setting)


def train_on_gpu(code, a, shape, setting):
    note = f"checkpointing: {setting}; without the optimiser"
    try:
        m, run = build(code, a, shape[0], train=True, checkpointing=setting)

        def step():
            one_pass(run, shape, train=True)
            m.zero_grad(set_to_none=True)

        peak = gpu_peak(step, a.device)
        times = [seconds(step, a.device) for _ in range(a.pairs)]
        return {"peak GB": gb(peak), "seconds": quartiles(times), "note": note}
    except torch.OutOfMemoryError:
        return {"note": f"{note}; out of memory"}


def offload_rows(a):
    """On the device that a Stream serves: "meta", which under FakeTensorMode is one as any other.

    There PyTorch takes attention apart, and all scores would count (4.0 and 15.2 GB). The kernels of a GPU keep none,
    and of those of a CPU, which other rows count, nothing but the result shows either.
    """
    new = partial(torch.empty, device="meta")
    fused = patch.object(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    for shape in a.shape or [(128, 64, 64), (128, 128, 128)]:
        T, H, W = shape
        with FakeTensorMode():
            m = build("ours", a, T, device="cpu")[0]
            with LiveBytes([], "meta") as live, torch.no_grad(), fused:
                m.stream = exsvd.Stream(m, "meta")
                exsvd.denoise(m, new(1, T, 4, H, W), new(1), new(1, 1, 4, H, W), new(1, 1, 1024), new(1, 3))
        yield "denoise() with exsvd.Stream, counted", "ours", shape, {"peak GB": gb(live.peak), "note": "with weights"}
    shape = a.shape[0] if a.shape else (128, 64, 64)
    for ranks, note in (1, "one GPU"), (2, "several GPUs"):
        yield "post-tuning step with --offload, counted", "ours", shape, {
            "peak GB": gb(counted_step(a, shape, ranks)), "note": f"with weights, buckets; stored latents; {note}"}


def counted_step(a, shape, ranks):
    """Bytes on the device in a step of `train.py --offload`, forward and backward, weights and all.

    DeepSpeed 0.19 (stage_1_and_2.py: setup_buckets, reduce_independent_p_g_buckets_and_remove_grads, average_tensor,
    copy_grads_in_partition) moves each gradient to a bucket as soon as it is there; a full one is joined to one tensor
    and summed over the ranks, and each gradient leaves for the CPU by way of a copy in fp32. It keeps room for the
    largest parameter. Sums between nodes need what NCCL needs on top.
    """
    new, small, exsvd.CPU_SLICES = partial(torch.empty, dtype=torch.bfloat16), exsvd.CPU_SLICES, 1
    bucket, waiting = [], []

    def leave(p):
        if not bucket:
            bucket.append(new(train.BUCKET))
        if sum(waiting) + p.numel() > train.BUCKET:
            joined = new(sum(waiting)) if ranks > 1 else None
            for n in waiting:
                torch.empty(n)  # fp32
            del joined
            waiting.clear()
        waiting.append(p.numel())
        p.grad = None

    try:
        with FakeTensorMode():
            m, run = build("ours", a, shape[0], train=True, device="cpu")
            trained = [p for name, p in m.named_parameters() if p.requires_grad and not exsvd.IDLE.search(name)]
            for p in trained:
                p.register_post_accumulate_grad_hook(leave)
            with LiveBytes([*m.parameters()]) as live:
                one_pass(run, shape, train=True)
    finally:
        exsvd.CPU_SLICES = small
    return live.peak + weight_bytes(m) + 2 * max(p.numel() for p in trained)


def vae_rows(a):
    for shape in a.shape or [(8, 128, 128)]:
        for code in others(a, ("ours", "diffusers", "diffsynth")):
            yield counted("VAE decode", code, a, shape, part="vae")


def time_rows(a):
    rate, timed = matrix_rate(a.device), []
    for shape in a.shape or [(16, 32, 32)]:
        for ours, other in [("ours-base", "diffusers"), ("ours", "diffsynth")]:
            if not version(other, a.diffsynth):
                continue
            try:
                networks, runs = zip(build(ours, a, shape[0]), build(other, a, shape[0]))
                runs = [partial(one_pass, run, shape) for run in runs]
                peaks = [gpu_peak(run, a.device) for run in runs]
                times, cpu = pairs(*runs, a)
                weights = [weight_bytes(m) for m in networks]
            except torch.OutOfMemoryError:
                yield "UNet forward", f"{ours} beside {other}", shape, {"note": "out of memory"}
                continue
            finally:
                networks = runs = None
            for code, t, cpu_t, peak, weight in zip((ours, other), times, cpu, peaks, weights):
                yield "UNet forward", code, shape, {
                    "peak GB": gb(peak), "seconds": quartiles(t), "ratio": ratio(*times) if code == ours else None,
                    "note": f"{a.pairs} pairs; CPU time {quartiles(cpu_t)} s, ratio {ratio(*cpu)}; "
                            f"weights of {gb(weight)} GB come on top of the peak"}
                timed.append((code, shape, statistics.median(t)))
    for code, shape, t in timed:  # last: to count a large shape takes longer than to run it on a GPU
        yield "UNet forward, its rate", code, shape, {
            "of matrix rate": f"{count(code, a, shape)[1] / t / rate:.2f}", "note": f"{rate / 1e12:.2f} TFLOP/s is 1"}


def process_rows(a):
    for shape in a.shape or [(16, 32, 32)]:
        for code in others(a, CODES):
            built, peak = in_fresh_process(process_of, code, a, shape)
            yield "process with one UNet pass", code, shape, {"peak GB": gb(peak), "note": f"{gb(built)} GB when built"}


def frames_rows(a):
    long, short = a.shape if a.shape and len(a.shape) == 2 else ((128, 16, 16), (25, 16, 16))
    m, run = build("ours", a, long[0])
    times, cpu = pairs(partial(one_pass, run, long), partial(one_pass, run, short), a)
    del m, run
    work = count("ours", a, long)[1] / long[0] / (count("ours", a, short)[1] / short[0])

    def per_frame(times):
        return [x / long[0] / (y / short[0]) / work for x, y in zip(*times)]

    for shape, t in zip((long, short), times):
        yield "UNet forward", "ours", shape, {"seconds": quartiles(t)}
    yield "per frame, long over short", "ours", long, {
        "ratio": quartiles(per_frame(times)),
        "note": f"over the ratio of work, {work:.4f}; CPU time {quartiles(per_frame(cpu))}; {a.pairs} pairs"}


def attention_rows(a):
    flash = exsvd.flash_attn_func
    for shape in a.shape or [(128, 64, 64)]:
        m, run = build("ours", a, shape[0])
        step = partial(one_pass, run, shape)
        kinds = {"as torch chooses": nullcontext(),
                 "flash (torch)": sdpa_kernel(SDPBackend.FLASH_ATTENTION),
                 "cuDNN": sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
                 "efficient": sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
                 "flash-attn": nullcontext()}
        for kind, context in kinds.items():
            if kind == "flash-attn" and flash is None:
                yield "attention", "ours", shape, {"note": f"{kind}: not installed"}
                continue
            exsvd.flash_attn_func = flash if kind == "flash-attn" else None
            try:
                with context:
                    first = seconds(step, a.device)  # compiles, chooses kernels
                    peak = gpu_peak(step, a.device)
                    t = [seconds(step, a.device) for _ in range(a.pairs)]
            except RuntimeError as e:  # no kernel of this kind for this device, dtype or head size; out of memory
                problem = str(e) or type(e).__name__
                yield "attention", "ours", shape, {"note": f"{kind}: {problem.splitlines()[0][:80]}"}
                continue
            yield "attention", "ours", shape, {
                "peak GB": gb(peak), "seconds": quartiles(t), "note": f"{kind}; first pass {first:.1f} s"}
        exsvd.flash_attn_func = flash
        del m, run, step


def load_rows(a):
    with tempfile.TemporaryDirectory() as folder:
        path = a.file or os.path.join(folder, "svd_xt_random.safetensors")
        if not os.path.exists(path):
            write_random_model(path)
        cat(path)
        runs = [(cat(path), *in_fresh_process(load_once, path, a)) for _ in range(3)]
        cats, loads, peaks, before, sizes = zip(*runs)
        yield "cat FILE > /dev/null, warm", "", None, {
            "seconds": f"{statistics.median(cats):.2f}", "note": f"{gb(os.path.getsize(path))} GB"}
        yield "exsvd.load, float32 file to bfloat16", "ours", None, {
            "peak GB": gb(max(peaks)), "seconds": f"{statistics.median(loads):.2f}",
            "ratio": f"{statistics.median(l / c for l, c in zip(loads, cats)):.2f}",
            "note": f"RssAnon, {gb(max(before))} before; the model has {gb(sizes[0])}; 3 runs"}


def decode_rows(a):
    for T in (32, 64, 128):
        yield f"sample.decode of {T} frames of 256x256", "ours", None, {
            "peak GB": gb(in_fresh_process(decode_frames, T, a, 256)),
            "note": "whole process; VAE a quarter as wide, float32, chunks of 16"}


def beside_plain(what, change, a):
    """Ours after change(network) beside ours as it is, in alternating runs."""
    for shape in a.shape or [(128, 64, 64), (128, 128, 128)]:
        try:
            networks, runs = zip(build("ours", a, shape[0]), build("ours", a, shape[0]))
            change(networks[0])
            runs = [partial(one_pass, run, shape) for run in runs]
            peaks = [gpu_peak(run, a.device) for run in runs]
            times, _ = pairs(*runs, a)
        except torch.OutOfMemoryError:
            yield what, "ours", shape, {"note": "out of memory"}
            continue
        for name, m, t, peak in zip((what, "neither"), networks, times, peaks):
            there = sum(p.nbytes for p in m.parameters() if p.device.type == a.device)
            yield f"UNet forward, {name}", "ours", shape, {
                "peak GB": gb(peak), "seconds": quartiles(t), "ratio": ratio(*times) if m is networks[0] else None,
                "note": f"{a.pairs} pairs; on top of the peak come weights of {gb(there)} GB that stay on the device"}
        del networks, runs, m


def stream_rows(a):
    def stream(unet):
        unet.stream = exsvd.Stream(unet, a.device)

    return beside_plain("exsvd.Stream", stream, a)


def compile_rows(a):
    return beside_plain("compiled", exsvd.compile_blocks, a)


@torch.no_grad()
def parity_rows(a):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32
    new = partial(torch.randn, device=a.device)
    for shape in a.shape or [(128, 64, 64)]:
        T, H, W = shape
        with torch.device(a.device):
            m = exsvd.extend(exsvd.UNet(), max(T, 128))
        inputs = new(1, T, 8, H, W), new(1), new(1, 1, 1024), new(1, 3)
        expected = m(*inputs)
        for dtype in (torch.bfloat16, torch.float16):
            weights = {name: p.to(dtype) for name, p in m.named_parameters()}
            error = torch.func.functional_call(m, weights, tuple(t.to(dtype) for t in inputs)).float() - expected
            note = f"root mean square of the error {error.norm() / expected.norm():.2e}, largest " \
                   f"{error.abs().max() / expected.std():.2e}, over the output's; of random weights"
            yield f"UNet forward, {dtype} beside float32", "ours", shape, {"note": note}


def post_tune(out, a, arguments, shape):
    """Run train.py into the folder `out` on synthetic clips. RuntimeError with its last line if it fails."""
    size = [] if shape is None else ["--frames", str(shape[0]), "--size", f"{8 * shape[2]}x{8 * shape[1]}"]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if a.device == "cpu" else {})
    done = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), "--data", "synthetic", "--out", out, *size,
                           "--sample-every", "0", "--log-every", "1", *arguments], env=env, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(last_line(done.stderr, done.returncode))


def last_line(text, code):
    return (text.strip().splitlines() or [f"exit code {code}"])[-1][:200].replace("|", "/")


def step_rows(a):
    for shape in a.shape or [(128, 64, 64)]:
        with tempfile.TemporaryDirectory() as folder:
            model = os.path.join(ROOT, "assets", "toy.safetensors")
            if a.device == "cuda":
                model = os.path.join(folder, "random.safetensors")
                with torch.device(a.device):
                    parts = exsvd.UNet(), exsvd.VAE(), exsvd.ImageEncoder()
                exsvd.save_model(model, *(m.to("cpu", torch.bfloat16) for m in parts))
                del parts
                torch.cuda.empty_cache()
            for settings in ("--checkpoint memory", "--checkpoint speed", "--checkpoint memory --offload"):
                out = os.path.join(folder, settings.replace(" ", ""))
                try:
                    post_tune(out, a, ["--model", model, "--steps", "3", "--workers", "4", *settings.split()], shape)
                except RuntimeError as e:
                    yield "post-tuning step", "ours", shape, {"note": f"{settings}: failed: {e}"}
                    continue
                with open(os.path.join(out, "log.csv"), newline="") as f:
                    last = list(csv.DictReader(f))[-1]
                yield "post-tuning step", "ours", shape, {
                    "peak GB": last["peak_memory_GB"], "seconds": last["seconds_per_step"],
                    "note": f"{settings}; the third step, VAE, CLIP and optimiser included; loss {last['loss']}"}


def repeat_rows(a):
    """Masters, moments and EMA after four steps, of float32: a run, the same again, and one that stopped after two."""
    with tempfile.TemporaryDirectory() as folder:
        states = []
        for name, stops in ("once", ["4"]), ("again", ["4"]), ("resumed", ["2", "4"]):
            out = os.path.join(folder, name)
            for steps in stops:
                post_tune(out, a, ["--deterministic", "--steps", steps], a.shape[0] if a.shape else None)
            states.append(load_file(os.path.join(out, "state-00000004", "rank-0.safetensors")))
            if name != "once":
                apart = [key for key in states[0] if not torch.equal(states[0][key], states[-1][key])]
                note = f"{len(apart)} of {len(states[0])} tensors differ" if apart else "equal in every bit"
                yield f"the toy's training, --deterministic, {name}", "ours", None, {"note": note}


# In order of worth: (limit in seconds, task, shapes, pairs)
GPU_PLAN = {"gpu": [(100, "attention", ["128x64x64"], 3),
                    (100, "time", ["128x64x64"], 5),
                    (110, "time", ["128x128x128"], 2),
                    (90, "stream", ["128x64x64", "128x128x128"], 2),
                    (140, "step", ["128x64x64"], 2)],
            "gpu2": [(240, "compile", ["128x64x64"], 3),
                     (90, "parity", ["128x64x64"], 2),
                     (240, "repeat", [], 2),
                     (240, "train", ["128x64x64"], 3)]}


def gpu_rows(half, a):
    for limit, task, shapes, pairs in GPU_PLAN[half]:
        if a.shape:
            shapes = [f"{T}x{H}x{W}" for T, H, W in a.shape]
        command = ["timeout", "--kill-after=5", str(limit), sys.executable, os.path.abspath(__file__), task,
                   "--device", a.device, "--threads", str(a.threads), "--pairs", str(min(pairs, a.pairs)),
                   "--out", a.out]
        command += ["--shape", *shapes] if shapes else []
        command += ["--diffsynth", a.diffsynth] if a.diffsynth else []
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode in (124, 137):
            yield f"{task} {' '.join(shapes)}", "", None, {"note": f"cut off after {limit} s"}
        elif done.returncode:
            yield f"{task} {' '.join(shapes)}", "", None, {"note": f"failed: {last_line(done.stderr, done.returncode)}"}


TASKS = {"count": count_rows, "train": train_rows, "offload": offload_rows, "vae": vae_rows, "time": time_rows,
         "process": process_rows, "frames": frames_rows, "attention": attention_rows, "load": load_rows,
         "decode": decode_rows, "stream": stream_rows, "compile": compile_rows, "parity": parity_rows,
         "step": step_rows, "repeat": repeat_rows, "gpu": partial(gpu_rows, "gpu"), "gpu2": partial(gpu_rows, "gpu2")}


def hardware(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):  # Linux, where platform does not know
        with open("/proc/cpuinfo") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def parse():
    def shape(text):
        try:
            T, H, W = (int(n) for n in text.lower().split("x"))
            assert T > 0 and H > 0 and W > 0 and H % 8 == W % 8 == 0
            return T, H, W
        except (ValueError, AssertionError):
            raise argparse.ArgumentTypeError(f"{text}: write FRAMESxHEIGHTxWIDTH of the latents, multiples of 8, such "
                                             "as 128x64x64") from None

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)} [count]")
    p.add_argument("--shape", type=shape, nargs="+",
                   help="frames x height x width of the latents [of each task, see bench/README.md]; frames takes two, "
                        "the long one first")
    p.add_argument("--diffsynth", metavar="FOLDER",
                   help="holds diffsynth/ and its dist-info: an unpacked wheel of 1.1.9, to be compared with")
    p.add_argument("--pairs", type=int, default=9, help="alternating pairs of runs [9; fewer are for trying out]")
    p.add_argument("--device", choices=("cpu", "cuda"), help="to run on; counts need none [cpu; of gpu and gpu2 cuda]")
    p.add_argument("--out", help="append every row to OUT.md and OUT.jsonl too [of gpu and gpu2: gpu]")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU [what torch chooses]")
    p.add_argument("--file", help="of load: kept, and used again if it is there [a temporary one]")
    p.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="written into every row [today]")
    a = p.parse_args()
    a.tasks = a.tasks or ["count"]
    if unknown := [t for t in a.tasks if t not in TASKS]:
        p.error(f"unknown task {unknown[0]}: there are {', '.join(TASKS)}")
    if a.diffsynth and not version("diffsynth", a.diffsynth):
        p.error(f"--diffsynth {a.diffsynth}: no unpacked wheel there (a folder with diffsynth/ and "
                "diffsynth-1.1.9.dist-info/)")
    if "frames" in a.tasks and a.shape and len(a.shape) != 2:
        p.error("frames takes two shapes, the long one first")
    if a.pairs < 2:
        p.error("--pairs: quartiles take at least two")
    plan = any(task in GPU_PLAN for task in a.tasks)
    a.device = a.device or ("cuda" if plan else "cpu")
    a.out = a.out or ("gpu" if plan else None)
    if a.device == "cuda" and not torch.cuda.is_available():
        sys.exit("compare.py: torch sees no GPU here")
    return a


def command(task, a):
    shapes = "".join(f" {T}x{H}x{W}" for T, H, W in a.shape or ())
    return f"compare.py {task}{' --shape' + shapes if shapes else ''} --pairs {a.pairs} --device {a.device}"


def write_row(cells, a):
    line = f"| {' | '.join(cells)} |"
    print(line, flush=True)
    if a.out:
        with open(a.out + ".md", "a") as table, open(a.out + ".jsonl", "a") as objects:
            table.write(line + "\n")
            objects.write(json.dumps(dict(zip(("row", *HEADER[1:]), cells))) + "\n")


def main():
    a = parse()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    if not (a.out and os.path.exists(a.out + ".md")):  # where it is, rows are added to a table that has begun
        head = f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}"
        print(head, flush=True)
        if a.out:
            with open(a.out + ".md", "w") as f:
                f.write(head + "\n")
    for task in a.tasks:
        for what, code, size, values in TASKS[task](a):
            load = "" if a.device == "cuda" else f", load {os.getloadavg()[0]:.1f}"
            conditions = (f"torch {torch.__version__}, {hardware(a.device)}, {a.threads} CPU thread(s){load}, "
                          f"{a.date}, `{command(task, a)}`")
            cells = [what,
                     f"{code} ({version(code, a.diffsynth)})" if code else "",
                     f"{size[0]} x {size[1]}x{size[2]}" if size else "",
                     *(values.get(column) or "" for column in COLUMNS), conditions]
            write_row(cells, a)
            gc.collect()
            if a.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
