"""Memory, work and time of this repository beside diffusers and DiffSynth's ExVideo classes. Each
task prints a table.

    pip install diffusers && pip install --no-deps diffsynth==1.1.9
    python bench/compare.py count  # the networks, computed
    python bench/compare.py cost   # whole commands, computed
    python bench/compare.py time   # beside the other codes: 16 GB of memory
    python bench/compare.py gpu    # all that needs a GPU

Computed on any machine, with tensors that have shapes but no values:
    count    passes of the UNet, forward and backward passes, the VAE, beside the other codes
    cost     sample.py and a step of train.py, stage by stage, with all that they hold
Both print the bytes that live on the GPU at the peak, TFLOP (convolutions and matrix products +
attention), launches of kernels, and seconds on several GPUs by a roofline, see Meter.

Run on the GPU, or on the CPU where there is none (CUDA_VISIBLE_DEVICES= hides it):
    conv     ExVideo's 3x3x3 convolution in half precision against float32: its error and speed
    time     seconds of a UNet pass beside the other codes
    modes    ... as it is beside exsvd.Stream (sample.py --offload) and exsvd.compile_blocks
    step     steps of train.py, with each way of saving memory
    gpu      all of these, conv first, each with a time limit; 16 minutes at most

Two passes that are compared run in turn; times are medians [quartiles] and the ratio is that of the
pairs. Networks have the size of SVD-XT and random weights. A code that is not installed is left
out. DiffSynth's last release with SVD is 1.1.9.
"""

import argparse
import csv
import gc
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
import weakref
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import exsvd
import sample
import train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CODES = {"ours": "this repository", "ours-base": "this repository, not extended"}
for name in ("DiffSynth", "diffusers"):  # the latter is not extended
    if find_spec(name.lower()):
        CODES[name.lower()] = f"{name} {version(name)}"

# --------------------------------------------------------------------------------------------------
# The networks of each code

# The blocks that ExVideo trains: ours, DiffSynth's and diffusers'
TRAINED = "TemporalBlock", "TemporalAttentionBlock", "TemporalBasicTransformerBlock"


def diffsynth(module):
    """A module of its models, without the package's __init__, which imports all that it needs."""
    models = types.ModuleType("diffsynth.models")
    models.__path__ = [os.path.join(*find_spec("diffsynth").submodule_search_locations, "models")]
    sys.modules.setdefault("diffsynth.models", models)
    return importlib.import_module(f"diffsynth.models.{module}")


def unet(code, new):
    """-> a UNet for 128 frames, and pass(T, H, W), which runs it on new(*shape)s"""
    if code == "diffsynth":
        m = diffsynth("svd_unet").SVDUNet(add_positional_conv=128)
        return m, lambda T, H, W: m(
            new(T, 8, H, W), 1.0, new(1, 1024), new(1, 3), use_gradient_checkpointing=m.training)
    if code == "diffusers":
        from diffusers import UNetSpatioTemporalConditionModel
        m = UNetSpatioTemporalConditionModel(num_frames=25, num_attention_heads=(5, 10, 20, 20))
        m.enable_gradient_checkpointing()  # takes effect in training mode only, as in the others
    else:
        m = exsvd.UNet() if code == "ours-base" else exsvd.extend(exsvd.UNet(), 128)
    return m, lambda T, H, W: m(new(1, T, 8, H, W), new(1), new(1, 1, 1024), new(1, 3))


def decoder(code, new):
    if code == "diffusers":
        from diffusers import AutoencoderKLTemporalDecoder
        m = AutoencoderKLTemporalDecoder(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            latent_channels=4, layers_per_block=2)
        return m, lambda T, H, W: m.decode(new(T, 4, H, W), num_frames=T)
    if code == "diffsynth":  # one tile; it cuts what is larger than 8 x 128x128 into tiles
        m = diffsynth("svd_vae_decoder").SVDVAEDecoder()
        return m, lambda T, H, W: m(new(4, T, H, W))
    m = exsvd.VAE()
    return m, lambda T, H, W: m.decode(new(1, T, 4, H, W))


def encoder(code, new):
    """DiffSynth's, of single frames. Ours is part of `cost`."""
    m = diffsynth("svd_vae_encoder").SVDVAEEncoder()
    return m, lambda T, H, W: [m(new(1, 3, 8 * H, 8 * W)) for _ in range(T)]


def build(code, part=unet, train=False, device="meta", dtype=torch.bfloat16):
    """-> (network, pass(T, H, W), which runs it on random inputs)"""
    torch.set_default_dtype(dtype)  # building it in float32 first would take twice the memory
    try:
        with torch.device(device):
            m, run = part(code, partial(torch.randn, dtype=dtype, device=device))
    finally:
        torch.set_default_dtype(torch.float32)
    # Without training, too, parameters have requires_grad=True, as diffusers loads them: without,
    # torch.matmul takes a slower path for small strided contexts, and diffusers needs 2.5 times as
    # long on a CPU.
    m.requires_grad_(not train)
    for block in m.modules():
        if type(block).__name__ in TRAINED:
            block.requires_grad_(True)
    return m.to(device).train(train), run  # DiffSynth makes some on the CPU


# --------------------------------------------------------------------------------------------------
# Computing: FakeTensorMode sends shapes through a network, without values. The device is "meta",
# which works like any other in this mode.

# From NVIDIA's data sheets: dense TFLOP/s in half precision, TF32 and float32, and TB/s.
CARDS = {"A100": (312, 156, 19.5, 2.0), "H100": (989, 495, 67, 3.35), "4090": (165, 83, 83, 1.0)}


class Meter(TorchDispatchMode):
    """Counts what operations do on one type of device. Sums go to `work`, since the last stage().

    live, peak: bytes of the storages made there that live now, and the most since the last stage().
        A storage counts once, however many tensors share it. Copies inside an operation and
        workspaces of libraries are not seen.
    "products", "attention": FLOP, a multiply-add is two.
    "launches": operations that are not mere views.
    a name of CARDS: seconds. An operation is given 60 % of the card's FLOP/s or 80 % of its
        bandwidth for what goes in and out, whichever takes longer, and 2 us more.
    "copied": bytes between the device and CPU memory; they cost none of these seconds.
    """

    def __init__(self, weights=(), device="meta"):
        super().__init__()
        self.device = device
        self.known = {w.untyped_storage()._cdata for w in weights}
        self.live = self.peak = 0
        self.work = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reads = operation is torch.ops.aten._local_scalar_dense.default
        if reads and isinstance(args[0], FakeTensor):
            # no gradient is infinite, all frames are finite, norms and steps are 1
            return float(args[0].is_floating_point()) or getattr(args[0], "of_all", False)
        if torch.is_inference_mode_enabled() and operation.namespace == "aten":
            with self:  # here operations arrive that are made of others
                result = operation.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = operation(*args, **kwargs)
        inputs, outputs = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]
                           for x in ((args, kwargs), result))
        if operation.overloadpacket is torch.ops.aten.all:
            result.of_all = True
        there = [t for t in outputs if t.device.type == self.device]
        for tensor in there:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        devices = {t.device.type for t in inputs + outputs if t.ndim}
        if "empty" in operation.name():
            return result
        if self.device in devices and len(devices) > 1:
            self.work["copied"] += sum(t.nbytes for t in outputs)
        elif there:
            before = {t.untyped_storage()._cdata for t in inputs}
            made = any(t.untyped_storage()._cdata not in before for t in outputs)
            if made or operation._schema.is_mutable:
                self.add(operation, args, kwargs, inputs, outputs, result)
        return result

    def add(self, operation, args, kwargs, inputs, outputs, result):
        flops, kind = 0, "attention" if "attention" in operation.name() else "products"
        if operation.overloadpacket in flop_registry:
            flops = flop_registry[operation.overloadpacket](*args, **kwargs, out_val=result)
        self.work[kind] += flops
        self.work["launches"] += 1
        column = 0
        if inputs and inputs[0].dtype == torch.float32:
            is_conv = "convolution" in operation.name()
            backend = torch.backends.cudnn.conv if is_conv else torch.backends.cuda.matmul
            column = 1 if backend.fp32_precision == "tf32" else 2
        moved = sum(t.nbytes for t in inputs + outputs)
        for card, (*peaks, bandwidth) in CARDS.items():
            times = flops / (0.6e12 * peaks[column]), moved / (0.8e12 * bandwidth)
            self.work[card] += max(times) + 2e-6

    def freed(self, key, size):
        self.known.discard(key)
        self.live -= size

    def stage(self):
        """-> (peak, work) since the last call"""
        done = self.peak, self.work
        self.peak, self.work = self.live, Counter()
        return done


def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """For "meta" PyTorch would split attention into its parts and keep all scores, which no GPU
    does."""
    assert attn_mask is None and not dropout_p and not is_causal
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


@contextmanager
def computing():
    with (patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention),
          # Module.to() swaps parameters of this mode, and refuses where the mode refers to them
          patch("weakref.getweakrefs", lambda _: ()),
          FakeTensorMode(allow_non_fake_inputs=True)):
        yield


def count(code, shape, part=unet, train=False, **attributes):
    """(peak bytes beyond the weights, with gradients if training; work) of a pass in bfloat16.
    attributes: of the network, such as checkpointing."""
    with computing():
        m, run = build(code, part, train)
        vars(m).update(attributes)
        with Meter([*m.parameters(), *m.buffers()]) as meter, torch.set_grad_enabled(train):
            out = run(*shape)
            if train:
                getattr(out, "sample", out).float().pow(2).mean().backward()
            return meter.stage()


# --------------------------------------------------------------------------------------------------
# Whole commands, computed: the functions that sample.py and train.py run, in their order


def load_without_files(path, extension=None, dtype=torch.float32, device="cpu",
                       keep_float32=lambda name: False, **_):
    """In place of exsvd.load: the published networks, or with an extension ExVideo's, with its
    dtypes."""
    networks = {"unet": exsvd.UNet(), "vae": exsvd.VAE(), "clip": exsvd.ImageEncoder()}
    if extension:
        exsvd.extend(networks["unet"])
    for part, network in networks.items():
        network.to(device).eval().requires_grad_(False)
        for name, p in network.named_parameters():
            wide = dtype == torch.float16 and name.startswith(("encoder.", "quant_conv."))
            if not wide and not keep_float32(f"{part}.{name}"):
                p.data = p.to(dtype)
    return exsvd.SVD(**networks, meta={}, extension={} if extension else None)


def once(meter, f):
    """f, which is run once for inputs of the same shapes. Further calls count as much, and their
    result is a new tensor."""
    seen = {}

    def run(*args, **options):
        shapes = tuple(x.shape for x in args)
        if shapes not in seen:
            peak, work, live = *meter.stage(), meter.live
            result = f(*args, **options)
            own_peak, own_work = meter.stage()
            seen[shapes] = result.shape, result.dtype, own_peak - live, own_work
            meter.peak, meter.work = max(peak, own_peak), work + own_work
            return result
        shape, dtype, needs, work = seen[shapes]
        meter.peak = max(meter.peak, meter.live + needs)
        meter.work += work
        return torch.empty(shape, dtype=dtype, device="meta")

    return run


def video_stages(extension, shape, resident=False, offload=False, slice_size=exsvd.Slices.size):
    """sample.py for a shape of latents: {stage: (peak bytes, work)}.

    resident: whether all networks stay on the GPU, or only those at work.
    """
    T, H, W = shape
    device = torch.device("meta")
    with (computing(), Meter() as meter, redirect_stdout(sys.stderr),
          patch.object(sample.data, "VideoWriter")):
        svd = load_without_files(None, extension, torch.float16, device if resident else "cpu")
        if offload:
            svd.unet.stream = exsvd.Stream(svd.unet, device)
        svd.unet.slice_size = slice_size
        svd.unet.forward = once(meter, svd.unet.forward)
        svd.vae.decode = once(meter, svd.vae.decode)
        s = sample.complete(svd, {"frames": T, "size": (8 * W, 8 * H)})
        meter.stage()
        latents = sample.make_latents(svd, torch.empty(3, 8 * H, 8 * W), s, device)
        sampling = meter.stage()
        sample.write_video(svd.vae, latents, s, "video.mp4")
        return {"sampling": sampling, "decoding": meter.stage()}


def join(ranks):
    """DeepSpeed on the device "meta", as rank 0 of `ranks`, which exchange nothing."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks),
                   "LOCAL_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    import deepspeed
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for name in ("device_name", "current_device_name"):
        setattr(CPU_Accelerator, name, lambda self, index=None: "meta")
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would wait for the others
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    deepspeed.init_distributed("fake")


def step_stages(level, shape, ranks=1, offload=False):
    """A step of train.py on one of `ranks` GPUs, from clips: {stage: (peak bytes, work)}. It is the
    second one, after a small one, since the optimiser makes its moments in the first. For a process
    of its own, see join()."""
    join(ranks)
    s = train.TrainSettings(model="random", dtype="bfloat16", checkpoint=level, offload=offload)
    stages, device = {}, torch.device("meta")
    with (computing(), Meter() as meter, redirect_stdout(sys.stderr),
          patch.object(exsvd, "load", load_without_files),
          # DeepSpeed's would be compiled, and needs values
          patch("deepspeed.ops.adam.DeepSpeedCPUAdam", torch.optim.AdamW),
          # as on CUDA, where AdamW keeps one temporary tensor, not two
          patch("torch.optim.optimizer._get_foreach_kernels_supported_devices", lambda: ["meta"])):
        svd = train.load_networks(s, True, device)
        config = train.deepspeed_config(s) | {"zero_force_ds_cpu_optimizer": False}
        shards, s = train.start_engine(s, svd, config, device)
        engine = shards.engine
        # DeepSpeed keeps shapes of parameters as tensors on "meta", which take no memory
        shapes = sum(t.nbytes for group in engine.optimizer.round_robin_bit16_meta for t in group)
        for T, H, W in ((2, 8, 8), shape):
            meter.stage()
            item = {"video": torch.empty(1, T, 3, 8 * H, 8 * W, dtype=torch.uint8), "name": ["0"],
                    "fps": torch.ones(1), "motion": torch.ones(1)}
            x, cond, ctx, ids = train.inputs(s, svd, item)
            stages["encoding"] = meter.stage()
            sigma, noise, keep_image = (t[None].to(device) for t in train.draw(s, 0, x.shape[1:]))
            loss = engine(x, sigma, noise, cond, ctx, ids, keep_image)
            engine.backward(loss.mean())
            stages["forward and backward"] = meter.stage()
            engine.step()
            shards.update_average()
            stages["update"] = meter.stage()
    return {stage: (peak - shapes, work) for stage, (peak, work) in stages.items()}


# --------------------------------------------------------------------------------------------------
# Running


def measure(f):
    """Seconds of a call, and on a GPU the peak bytes beyond those before it, else None."""
    if DEVICE != "cuda":
        begin = time.perf_counter()
        f()
        return time.perf_counter() - begin, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, begin = torch.cuda.memory_allocated(), time.perf_counter()
    f()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() - before


def quartiles(values):
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{mid:.3f} [{low:.3f}, {high:.3f}]"


def compared(a, shape, *two):
    """Rows of two UNets that run in turn, so that other work on the machine slows both alike.
    two: (name, code, what changes the network or None), twice."""
    runs, weights, dtype = [], [], exsvd.best_dtype(DEVICE)
    for _, code, change in two:
        m, run = build(code, device=DEVICE, dtype=dtype)
        if change:
            change(m)
        runs.append(torch.no_grad()(partial(run, *shape)))
        weights.append(sum(p.nbytes for p in m.parameters() if p.device.type == DEVICE))
    pairs = [[measure(run) for run in runs] for _ in range(a.pairs + 1)][1:]  # the first warms up
    ratios = quartiles([first / second for (first, _), (second, _) in pairs]), ""
    for (name, code, _), ratio, there, own in zip(two, ratios, weights, zip(*pairs)):
        seconds, peaks = zip(*own)
        note = f"{dtype}, {a.pairs} pairs; and {gb(there)} GB of weights on the device"
        yield (f"UNet pass, {name}", code, shape,
               measured(gb(peaks[0]), quartiles(seconds), note, ratio))


# --------------------------------------------------------------------------------------------------
# Tasks: each yields rows of a table: (what, code, shape, {column: value})


def gb(n):
    return "" if n is None else f"{n / 1e9:.3f}"


def computed(peak, work, note=""):
    return {"peak GB": gb(peak),
            "TFLOP": f"{work['products'] / 1e12:.2f} + {work['attention'] / 1e12:.2f}",
            "launches": f"{work['launches']:,}",
            **{f"{card} s": f"{work[card]:.2f}" for card in CARDS}, "note": note}


def measured(peak, seconds, note, ratio=""):
    return {"peak GB": peak, "seconds": seconds, "ratio": ratio, "note": note}


def count_rows(a):
    def row(what, code, shape, note="", **how):
        return what, code, shape, computed(*count(code, shape, **how), note)

    others = [code for code in CODES if not code.startswith("ours")]
    shapes = a.shape or [(128, 64, 64), (128, 128, 128), (16, 32, 32)]
    for shape in shapes:
        for code in CODES:
            yield row("UNet pass", code, shape)
        yield row("UNet pass", "ours", shape, "without slices", slice_size=None)
    T, H, W = shape = shapes[0]
    for level, (checkpointing, slice_size, *_) in train.CHECKPOINTS.items():
        yield row("forward and backward", "ours", shape, f"--checkpoint {level}", train=True,
                  checkpointing=checkpointing, slice_size=slice_size)
    for code in others:
        yield row("forward and backward", code, shape, "checkpointing: its own", train=True)
    for code in ["ours", *others]:
        yield row("VAE decode", code, (8, 2 * H, 2 * W), part=decoder)
    if "diffsynth" in others:
        yield row("encoding a clip and its first frame", "diffsynth", (T + 1, H, W), part=encoder)


# sample.py's defaults: (name, extension, shape)
VIDEOS = [("ExVideo, 128 frames", ["ExVideo"], (128, 64, 64)),
          ("SVD-XT, 25 frames", None, (25, 72, 128))]
RESIDENCY = {"all networks stay on the GPU, no slices": dict(resident=True, slice_size=None),
             "networks at work only": {}, "--offload": dict(offload=True)}

# train.py's: (--checkpoint, GPUs, --offload)
STEPS = [("none", 8, False), ("balanced", 8, False), ("memory", 8, False), ("memory", 1, False),
         ("memory", 1, True)]


def cost_rows(a):
    for name, extension, shape in VIDEOS:
        for note, how in RESIDENCY.items():
            for stage, (peak, work) in video_stages(extension, shape, **how).items():
                values = computed(peak, work, f"{note}; {work['copied'] / 1e9:.1f} GB copied")
                yield f"sample.py, {name}: {stage}", "ours", shape, values
    for shape in a.shape or [(128, 64, 64)]:
        for level, ranks, offload in STEPS:
            note = f"--checkpoint {level}{' --offload' * offload}, one of {ranks} GPUs"
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # which may join other ranks
                stages = pool.submit(step_stages, level, shape, ranks, offload).result()
            for stage, (peak, work) in stages.items():
                yield f"train.py, a step: {stage}", "ours", shape, computed(peak, work, note)


@torch.no_grad()
def conv_rows(a):
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32
    for T, H, W in a.shape or [(128, 64, 64)]:
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.randn(1, 320, T, H, W, device=DEVICE).to(dtype)
            conv = torch.nn.Conv3d(320, 320, 3, padding=1, device=DEVICE).to(dtype)
            expected = torch.nn.functional.conv3d(
                x.float(), conv.weight.float(), conv.bias.float(), padding=1)
            error = ((conv(x).float() - expected).norm() / expected.norm()).item()
            seconds, peaks = zip(*(measure(lambda: conv(x)) for _ in range(a.pairs)))
            note = f"error {error:.1e} of the result; cuDNN {torch.backends.cudnn.version()}"
            yield (f"3x3x3 convolution, {dtype} against float32", "ours", (T, H, W),
                   measured(gb(peaks[-1]), quartiles(seconds), note))
            if error > 1e-2:  # rounding explains 2e-4 in float16 and 1.7e-3 in bfloat16
                sys.exit("compare.py: convolutions are wrong in half precision on this machine, "
                         "and so is every video: use another version of PyTorch or cuDNN")


def time_rows(a):
    on_gpu = [(128, 64, 64), (128, 128, 128)]
    for shape in a.shape or (on_gpu if DEVICE == "cuda" else [(16, 32, 32)]):
        for pair in [("ours-base", "diffusers"), ("ours", "diffsynth")]:
            if pair[1] in CODES:
                yield from compared(a, shape, *((CODES[code], code, None) for code in pair))


def mode_rows(a):
    def stream(network):
        network.stream = exsvd.Stream(network, DEVICE)

    for shape in a.shape or [(128, 64, 64)]:
        for name, change in (("exsvd.Stream", stream), ("compiled", exsvd.compile_blocks)):
            yield from compared(a, shape, (name, "ours", change), ("as it is", "ours", None))


def step_rows(a):
    """On a GPU networks of full size; on a CPU the toy, to try the task out."""
    T, H, W = a.shape[0] if a.shape else (128, 64, 64)
    with tempfile.TemporaryDirectory() as folder:
        model = os.path.join(ROOT, "assets", "toy.safetensors")
        if DEVICE == "cuda":
            model = os.path.join(folder, "random.safetensors")
            networks = (network() for network in (exsvd.UNet, exsvd.VAE, exsvd.ImageEncoder))
            exsvd.save_model(model, *(network.bfloat16() for network in networks))
        levels = [level for level in train.CHECKPOINTS if level != "none"]
        for level in (*levels, "memory --offload"):
            flags, out = f"--checkpoint {level}", os.path.join(folder, level)
            command = [sys.executable, "train.py", "--model", model, "--data", "bench/noise.py",
                       "--out", out, "--frames", str(T), "--size", f"{8 * W}x{8 * H}", "--steps",
                       "4", "--log-every", "1", "--sample-every", "0", *flags.split()]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:  # the next may take less memory
                values = measured("", "", f"failed: {last_line(done)}")
            else:
                with open(os.path.join(out, "log.csv"), newline="") as f:
                    step = list(csv.DictReader(f))[-1]
                note = f"the fourth step, with VAE, CLIP and optimiser; loss {step['loss']}"
                values = measured(step["peak_memory_GB"], step["seconds_per_step"], note)
            yield f"train.py {flags}", "ours", (T, H, W), values


def last_line(process):
    lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
    return lines[-1][:200].replace("|", "/")


TASKS = {"count": count_rows, "cost": cost_rows, "conv": conv_rows, "time": time_rows,
         "modes": mode_rows, "step": step_rows}

GPU_PLAN = {"conv": 60, "time": 270, "step": 300, "modes": 330}  # seconds that a task may take


def run_plan():
    """Each task in a process of its own, so that none can fail or hang for the others."""
    for task, limit in GPU_PLAN.items():
        command = ["timeout", "--kill-after=5", str(limit), sys.executable, *sys.argv]
        command[command.index("gpu")] = task
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            stopped = done.returncode in (124, 137)
            why = f"stopped after {limit} s" if stopped else f"failed: {last_line(done)}"
            print(f"\n{task}: {why}", flush=True)
            if task == "conv":  # nothing else would mean anything
                break


def main():
    def shape(text):
        T, H, W = (int(n) for n in text.split("x"))
        return T, H, W

    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("task", choices=[*TASKS, "gpu"], metavar="TASK", help="see above")
    p.add_argument("--shape", type=shape, nargs="+", metavar="TxHxW",
                   help="of the latents, such as 128x64x64 [those of bench/README.md]; at most 128 "
                   "frames, height and width multiples of 8, of DiffSynth at least 16")
    p.add_argument("--pairs", type=int, default=5,
                   help="how often to run what is timed, at least 2 [5]")
    a = p.parse_args()
    if a.task == "gpu":
        if DEVICE != "cuda":
            sys.exit("compare.py: torch sees no GPU here")
        return run_plan()
    cpu = f"CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else cpu
    print(f"\n`compare.py {a.task}`, torch {torch.__version__}, {machine}, "
          f"load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}\n")
    for n, (what, code, shape, values) in enumerate(TASKS[a.task](a)):
        if n == 0:
            print(f"| | code | shape | {' | '.join(values)} |\n|{' --- |' * (len(values) + 3)}")
        cells = what, CODES[code], "x".join(map(str, shape)), *values.values()
        print(f"| {' | '.join(cells)} |", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
