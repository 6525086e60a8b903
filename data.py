"""Pictures and videos in and out, and sets of videos as clips for training.

    python data.py check videos/                                        # what would be used, and why not the rest
    python data.py encode --model svd_xt.safetensors --data videos/ --out latents/

    1. Pictures and videos in          read_image, read_video, video_frames, fit_image, ...
    2. Videos out                      VideoWriter (.mp4, .webm, .gif, a folder of PNGs), write_png
    3. Motion and noise                motion_score, motion_bucket, draw_condition
    4. The index of a set of videos    list_files, scan, find_cuts, build_index
    5. Clips                           open_dataset
    6. Encoding a set of videos        encode_frames, encode_condition, encode
    7. Command line                    check, main

Pixels are uint8 RGB with the channel last, (H, W, 3) or (T, H, W, 3), until fit_image turns them into what the model
eats: float32 (3, H, W) in [-1, 1].  T frames, H W pixels; a size is (W, H).  Pictures are read by Pillow, videos by
FFmpeg through PyAV.  The colour profile of a picture is applied; that of a video and HDR transfer curves are not.
"""
import argparse
import bisect
import contextlib
import csv
import hashlib
import io
import itertools
import json
import logging
import math
import os
import signal
import sys
import tempfile
import types
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from tqdm import tqdm

import exsvd

av.logging.set_level(None)                  # what the libraries say themselves would drown our one line
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module="PIL")


def one_line(text):
    """Text as one printable line: file names may hold line breaks, null bytes, and what is no UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class MediaError(ValueError):
    """A file that cannot be read or written; the message is one line: which file, what is wrong, what to do."""

    def __init__(self, message):
        # a DataLoader raises what its reader raised with the traceback as message; what we said is in its last line
        super().__init__(one_line(message.rsplit("MediaError: ", 1)[-1].strip()))


# ----------------------------------------------------------------------------------------------------------------------
# 1. Pictures and videos in

MAX_PIXELS = 200_000_000                    # of one frame; beyond it a small file may unpack to more than the memory
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2    # Pillow refuses what has twice as many
PICTURES = "AVIF BMP DIB GIF ICO JPEG JPEG2000 PNG PPM QOI TIFF WEBP".split()       # all else is left to FFmpeg
HEIC = [b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")]
# without these flags swscale repeats chroma samples instead of interpolating them: coloured edges come out wrong
EXACT = 0x2 | 0x40000 | 0x2000              # bilinear, accurate rounding, full chroma: PyAV names them from 18 on
SAFE = {"protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}                # a playlist may open no other files


def _reason(error):
    if isinstance(error, (LookupError, TypeError, AttributeError)):                 # of a decoder, fed with nonsense
        return "it is damaged"
    return str(getattr(error, "strerror", None) or error or type(error).__name__).splitlines()[0].rstrip(". ")


@contextlib.contextmanager
def _reading(path, advice):
    """Whatever is raised while `path` is read becomes a MediaError: a damaged file makes decoders raise anything."""
    try:
        yield
    except MediaError:
        raise
    except Exception as e:
        raise MediaError(f"{path}: cannot be read ({_reason(e)}); {advice}") from None


def _demux(file):
    """An open file for FFmpeg, without its name: it goes by content, and interprets no a%03d.png or http://x."""
    return av.open(types.SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell), options=SAFE)


def _identify(file):
    """A picture that Pillow opens, or None."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # of headers, that is: pixels are not refused for damaged notes about them
    try:
        picture = Image.open(file, formats=PICTURES)
        # an animated PNG may hide its first frame behind a picture for viewers that show none: FFmpeg finds it
        return None if picture.format == "PNG" and picture.info.get("default_image") else picture
    except UnidentifiedImageError:
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _srgb(picture, profile):
    """A picture of mode L, RGB or CMYK in sRGB, mode RGB.  profile: ICC, as bytes; one that does not fit is ignored."""
    for image in [picture] if picture.mode == "CMYK" else [picture, picture.convert("RGB")]:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    return picture.convert("RGB")


def _still(picture):
    """The first frame of what Pillow opened, upright, in sRGB, on white: uint8 (H, W, 3)."""
    box = picture.tile[0].extents if picture.format == "GIF" else None              # where a GIF's first frame lies
    picture.load()
    with contextlib.suppress(Exception):    # damaged EXIF raises whatever Pillow stumbles over: the pixels count
        picture = ImageOps.exif_transpose(picture)
    profile = picture.info.get("icc_profile", b"")
    if picture.mode[0] in "IF":             # more than 8 bits of grey, which convert() would clip
        x = np.asarray(picture)
        grey = np.nan_to_num(x * 255.0 if picture.mode == "F" else x / 257)
        grey[x == picture.info.get("transparency")] = 255
        picture = Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8))
    mode = {"CMYK": "CMYK", "1": "L", "L": "L", "LA": "L"}.get(picture.mode, "RGB")
    image = _srgb(picture.convert(mode), profile)
    if box or picture.has_transparency_data:
        page = Image.new("RGB", image.size, "white")
        page.paste(image.crop(box), box, picture.convert("RGBA").getchannel("A").crop(box))
        image = page
    return torch.from_numpy(np.array(image))


def _pixels(frame):
    """A frame of a video as uint8 (H, W, 3), on white, turned as its container asks."""
    # a reformatter of its own: one that a frame keeps has threads, and hangs the forked reader that collects the frame
    x = VideoReformatter().reformat(frame, format="rgba", interpolation=EXACT).to_ndarray()             # (H, W, 4)
    x, alpha = x[..., :3], x[..., 3:]
    if alpha.min() < 255:
        x = np.rint(255 - (255 - x) * (alpha / np.float32(255))).astype(np.uint8)
    with contextlib.suppress(ValueError, TypeError):                                # none, or of an unknown kind
        a, b, _, c, d = np.frombuffer(frame.side_data.get("DISPLAYMATRIX"), np.int32)[:5].tolist()
        if a * d < b * c:                   # mirrored, which PyAV's rotation leaves out
            x = x[::-1]
    return torch.from_numpy(np.rot90(x, frame.rotation // 90).copy())               # to the left


def _best_stream(container):
    """The largest video stream that is not an attached picture (cover art), unless nothing else is there."""
    streams = [s for s in container.streams.video if s.codec_context]               # none for SVG: no decoder
    if not streams:
        raise ValueError("it holds no picture that can be decoded")
    cover = av.stream.Disposition.attached_pic
    best = max(streams, key=lambda s: (not s.disposition & cover, s.width * s.height))
    if best.width * best.height > MAX_PIXELS:
        raise ValueError(f"{best.width}x{best.height} pixels are more than {MAX_PIXELS}")
    return best


def _decode(path, seek=None):
    """(frame, stream) for the frames of a video in the order shown, from the key frame at or before the time stamp
    `seek`; the frame is None where a packet is damaged.  Raises ValueError at the end if all are."""
    found = False
    with open(path, "rb") as f, _demux(f) as c:
        s = _best_stream(c)
        s.codec_context.thread_count = 1    # with more, an error surfaces at another packet from one run to the next
        if seek is not None:
            c.seek(int(seek), stream=s)
        for packet in c.demux(s):
            try:
                frames = packet.decode()
            except (av.FFmpegError, ValueError):
                frames = [None]
            for frame in frames:
                whole = frame is not None and not frame.is_corrupt
                found |= whole
                yield frame if whole else None, s
    if not found:
        raise ValueError("none of its frames can be decoded")


def read_image(path):
    """The picture, or the first frame of the animation or video, at `path`: torch.uint8 (H, W, 3), upright, on white.

    Recognised by content: what Pillow reads of PICTURES, and FFmpeg of the rest.  Raises MediaError."""
    with _reading(path, "give a JPEG, PNG, WebP, GIF or video file, or save it again in an image editor"):
        with open(path, "rb") as f:
            picture = _identify(f)
            if picture is not None:
                return _still(picture)
            f.seek(4)
            if f.read(8) in HEIC:
                raise ValueError("it is HEIC: convert it to JPEG, with heif-convert or in the phone's photo app")
        return next(_pixels(frame) for frame, _ in _decode(path) if frame is not None)


def video_frames(path):
    """The frames of a video, GIF, or folder of PNGs written by VideoWriter, one by one: (uint8 (H, W, 3), its time in
    seconds or None, the frame rate that the file declares or None).  Raises MediaError."""
    path = Path(path)
    with _reading(path, "give a video file, or a folder written by sample.py"):
        if path.is_dir():
            fps, files = float(read_settings(path)["fps"]), sorted(path.glob("frame_*.png"))
            if not files or not fps > 0:
                raise ValueError(f"it holds no frame_0000.png, or no frame rate in {SETTINGS}")
            for i, file in enumerate(files):
                yield read_image(file), i / fps, fps
        else:
            for frame, stream in _decode(path):
                if frame is not None:
                    yield _pixels(frame), frame.time, stream.average_rate


def frame_rate(times, declared=None):
    """Frames per second: measured from the time stamps (seconds, or None), or as declared; 1.0 if neither says it."""
    if len(times) > 1 and None not in times and times[-1] > times[0]:
        measured = (len(times) - 1) / (times[-1] - times[0])
        if not declared or abs(declared - measured) > 0.02 * measured:              # stamps are rounded, headers lie
            return measured
    return float(declared or 1)


def read_video(path):
    """All frames of what video_frames() reads: uint8 (T, H, W, 3), frames per second.  Raises MediaError."""
    frames, times, declared = zip(*video_frames(path))
    with _reading(path, "convert it to one size"):
        return torch.stack(frames), frame_rate(times, declared[-1])


def read_settings(path):
    """The settings a VideoWriter stored with the video, or None where there are none.  Raises MediaError."""
    path = Path(path)
    with _reading(path, "give a video written by sample.py"):
        if path.is_dir():
            return json.loads((path / SETTINGS).read_text())
        with open(path, "rb") as f, _demux(f) as c:
            tags = {k.lower(): v for k, v in c.metadata.items()}
            return json.loads(tags["comment"]) if "comment" in tags else None


def fit_image(img, width, height, aspect=1):
    """uint8 (H, W, 3) -> float32 (3, height, width) in [-1, 1]: scaled to cover the target, centre cropped.

    Antialiased bicubic, without distortion; aspect is the width of a pixel over its height."""
    H, W, _ = img.shape
    scale = max(width / (W * aspect), height / H) * (1 + 1e-9)                      # never one pixel short by rounding
    sx, sy = float(scale * aspect), float(scale)
    # drop now what the crop would drop, but for the filter's reach: 10000x10 must not become 64000x64 first
    x = max(0, int((W - width / sx) / 2 - 2 / sx) - 3)
    y = max(0, int((H - height / sy) / 2 - 2 / sy) - 3)
    img = img[y:H - y, x:W - x].permute(2, 0, 1)[None].float() / 127.5 - 1          # (1, 3, H, W)
    img = F.interpolate(img, scale_factor=(sy, sx), mode="bicubic", antialias=True)
    y, x = (img.shape[2] - height) // 2, (img.shape[3] - width) // 2
    return img[0, :, y:y + height, x:x + width].clamp(-1, 1).contiguous()           # bicubic overshoots at edges


def default_size(width, height, area, multiple=64, max_ratio=4):
    """(W, H), multiples of `multiple` with about `area` pixels at the aspect ratio of a width x height image.

    Ratios beyond max_ratio are cropped to it; the area never exceeds twice the wish (or one `multiple` squared)."""
    ratio = min(max(width / height, 1 / max_ratio), max_ratio)
    W = max(1, round(math.sqrt(area * ratio) / multiple))
    H = max(1, round(math.sqrt(area / ratio) / multiple))
    most = max(1, int(2 * area / multiple ** 2))
    W, H = min(W, max(1, most // H)), min(H, max(1, most // W))
    return W * multiple, H * multiple


# ----------------------------------------------------------------------------------------------------------------------
# 2. Videos out
# One thread: x264 and libvpx divide the work differently for each number of threads, and the bytes with it.
# No mbtree: with it up to one in ten files of the same 64x64 frames came out with other bytes; without, none of 450.
ENCODERS = {  # extension: codec, its options
    ".mp4": ("libx264", {"crf": "17", "preset": "medium", "x264-params": "mbtree=0"}),
    ".webm": ("libvpx-vp9", {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4"}),
    ".gif": ("gif", {}),
}
SETTINGS = "settings.json"                  # of a folder of PNGs, which cannot tell their frame rate


def write_png(path, img):
    """Writes uint8 (H, W, 3) as a PNG file that is never half written."""
    part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    Image.fromarray(np.ascontiguousarray(img)).save(part, "PNG")
    os.replace(part, path)


class VideoWriter:
    """Writes a video frame by frame; memory does not grow with its length.

        with VideoWriter("out.mp4", fps=7, settings={...}) as video:
            video.write(frames)             # uint8 (T, H, W, 3), as often as there are frames

    .mp4 (H.264, plays in browsers), .webm (VP9), .gif (a palette per frame) or, without an extension or with a final
    slash, a folder of PNGs.  `settings`, JSON, goes into the comment tag of mp4 and webm, or with the frame rate into
    settings.json of the folder; a GIF holds none.  The target appears when the `with` block ends well; after an
    exception an older one is as it was.  Same machine, versions and frames: same bytes.  Bad names and rates raise
    MediaError before any work; frames of a wrong type or size raise ValueError."""

    def __init__(self, path, fps, settings=None):
        self.path, self.settings = Path(path), settings or {}
        self.kind = "" if str(path).endswith("/") else self.path.suffix.lower()
        if self.kind not in ("", *ENCODERS):
            raise MediaError(f"{path}: end the name in .mp4, .webm or .gif, or in a slash for a folder of PNGs")
        if not 0 < fps <= (50 if self.kind == ".gif" else 1000):
            raise MediaError(f"{path}: {fps} frames per second cannot be written; use at most 50 for a gif, else 1000")
        if self.kind and self.path.is_dir():
            raise MediaError(f"{path}: is a folder; choose another name")
        if not self.kind and self.path.exists() and not self._ours():
            raise MediaError(f"{path}: exists and holds more than PNG frames written here; choose another name")
        self.fps = Fraction(fps).limit_denominator(1001)                            # 30000/1001 and 7.5 alike
        self.count, self.size, self.container = 0, None, None

    def _ours(self):
        return self.path.is_dir() and all(f.name == SETTINGS or f.match("frame_*.png") for f in self.path.iterdir())

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.part = tempfile.TemporaryDirectory(".tmp", f".{self.path.name}.", self.path.parent)
        self.new = Path(self.part.name, f"new{self.kind}")                          # on the same file system
        if not self.kind:
            self.new.mkdir()
        return self

    def _start(self, frame):
        codec, options = ENCODERS[self.kind]
        # faststart: the index comes first, so that a browser can begin before it has all; wants an absolute name
        self.container = av.open("file:" + os.path.abspath(self.new), "w",
                                 container_options={"fflags": "+bitexact", "movflags": "+faststart"})
        if self.settings:
            self.container.metadata["comment"] = json.dumps(self.settings)
        self.tick = Fraction(1, 100) if codec == "gif" else 1 / self.fps            # GIF delays are whole 1/100 s
        s = self.stream = self.container.add_stream(codec, rate=1 / self.tick, options=options)
        s.width, s.height, s.pix_fmt = frame.width, frame.height, frame.format.name
        s.codec_context.time_base, s.codec_context.thread_count = self.tick, 1
        s.codec_context.flags |= av.codec.context.Flags.bitexact
        if codec != "gif":
            s.codec_context.colorspace = s.codec_context.color_primaries = s.codec_context.color_trc = 1    # bt709
            s.codec_context.color_range = ColorRange.MPEG

    def write(self, frames):
        """Appends uint8 (T, H, W, 3); all calls must agree in H and W."""
        frames = torch.as_tensor(frames).cpu().numpy()
        self.size = self.size or frames.shape[1:]
        if frames.dtype != np.uint8 or frames.shape[1:] != self.size or frames.shape[3:] != (3,):
            raise ValueError(f"frames must be uint8 (T, H, W, 3), all of one size, not {frames.dtype} {frames.shape}")
        for x in frames:
            if self.kind:
                self._encode(x)
            else:
                write_png(self.new / f"frame_{self.count:04d}.png", x)
            self.count += 1

    def _encode(self, x):
        if self.kind == ".gif":
            x = Image.fromarray(x).quantize(256, Image.Quantize.FASTOCTREE)
            colours = np.reshape(x.getpalette(), (-1, 3))
            palette = np.full((256, 4), 255, np.uint8)                              # ARGB
            palette[:len(colours), 1:] = colours
            frame = av.VideoFrame.from_ndarray((np.asarray(x), palette), "pal8")
        else:
            x = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2), (0, 0)), "edge")       # chroma has half the size
            frame = av.VideoFrame.from_ndarray(x, "rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG,
                                   interpolation=EXACT)
        if not self.container:
            self._start(frame)
        frame.pts, frame.time_base = round(self.count / self.fps / self.tick), self.tick
        self.container.mux(self.stream.encode(frame))

    def __exit__(self, error, *_):
        with self.part:                     # removed whatever happens
            if error:
                if self.container:
                    with contextlib.suppress(av.FFmpegError):                       # must not hide the first error
                        self.container.close()
                return
            if not self.count:
                raise MediaError(f"{self.path}: no frame was written; the older file, if any, is as it was")
            if self.kind:
                self.container.mux(self.stream.encode(None))
                self.container.close()
            else:
                (self.new / SETTINGS).write_text(json.dumps({"fps": float(self.fps), **self.settings}))
                if self.path.exists():      # a folder is not replaced by another
                    os.replace(self.path, Path(self.part.name, "old"))
            os.replace(self.new, self.path)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Motion and noise: what a clip tells the model about itself
# ExVideo's training script sorts clips into 128 buckets by these lower bounds, here in units of 1e-9
EXVIDEO_MOTION = (
    0, 12205946, 15117834, 18080613, 20614484, 21959992, 24088068, 26323952, 28277775, 29968588, 31836554, 33596724,
    35121530, 37200287, 38914755, 40696491, 42368013, 44265781, 46311017, 48243891, 50294187, 52142400, 53634230,
    55612389, 57594258, 59410289, 61283995, 63603796, 65192916, 67146860, 69066539, 70390493, 72588451, 73959745,
    75889029, 77695683, 79783581, 82162730, 84092639, 85958421, 87700523, 89684933, 91688842, 93335517, 94987206,
    96664011, 98314710, 100262381, 101984538, 103404313, 105280340, 106974818, 109028399, 111164779, 113065213,
    114362158, 116407216, 118063427, 119524263, 121835820, 124242283, 126202747, 128989249, 131672353, 133417681,
    135567948, 137313649, 139189199, 140912935, 143525436, 145718485, 148315132, 151039496, 153218940, 155252382,
    157651082, 159966752, 162195817, 164811596, 167341709, 170251891, 172651157, 175550997, 178372145, 181039348,
    183565900, 186599866, 190071866, 192574754, 195026234, 198099136, 200210452, 202522039, 205410406, 208610669,
    211623028, 214723110, 218520239, 222194016, 225363150, 229384825, 233422622, 237012610, 240735114, 243622541,
    247465774, 252190471, 257356376, 261856794, 266556412, 271076709, 277361482, 281250387, 286582440, 291158527,
    296712339, 303008437, 311793238, 318485111, 326999635, 332138240, 341770738, 354188830, 365194678, 379234344,
    401538879, 416078776, 440871328,
)
AUG_LOG_MEAN, AUG_LOG_STD = -3.0, 0.5       # ln sigma of the noise on a condition image: SVD's choice


def motion_score(video):
    """How much a clip moves: float >= 0, for (T, 3, H, W) in [-1, 1] or a list of its frames.

    Standard deviation over time (unbiased), averaged over channels and pixels, as in ExVideo's script; 0 if T = 1.
    Summed in float64, so that every machine and every order of summation finds the same bucket."""
    mean = sum(x.double() for x in video) / len(video)
    return (sum((x - mean).square() for x in video) / max(len(video) - 1, 1)).sqrt().mean().item()


def motion_bucket(score, scale="exvideo"):
    """The motion id of a score.  scale: "exvideo", its last of 128 thresholds not above the score; or the id."""
    if scale != "exvideo":
        return float(scale)
    return float(max(0, bisect.bisect_right(EXVIDEO_MOTION, score, key=lambda t: t / 1e9) - 1))


def draw_condition(seed, name, frame, size):
    """The noise on frame number `frame` of the file `name` as a condition image: sigma float32 (), noise (3, H, W)."""
    key = hashlib.blake2b(os.fsencode(f"{seed}/{name}/{frame}"), digest_size=8).digest()
    g = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    aug = torch.exp(AUG_LOG_MEAN + AUG_LOG_STD * torch.randn((), generator=g))
    return aug, torch.randn(3, size[1], size[0], generator=g)


# ----------------------------------------------------------------------------------------------------------------------
# 4. The index of a set of videos: each is decoded once, before anything relies on it
# A frame's number is its place among the frames that decode, in the order shown.  Headers are not believed: they count
# frames that are damaged, hidden or not there.  A shot is what lies between two hard cuts; clips never cross one.

INDEX = ".exsvd-index-3.jsonl"              # the number is of what the lines hold
SUFFIXES = set(".3gp .asf .avi .flv .gif .h264 .hevc .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob"
               " .webm .wmv .y4m".split())  # looked at in folders; a list may name anything


def list_files(source):
    """The files of a set of videos: {name: path}, sorted.

    source: a folder, searched recursively; a .txt list, a path per line; a .csv list with a column named path, video or
    file; a .json list of paths, or of objects with such a key, as Open-Sora-Plan's.
    A name is the path relative to the folder (the list's folder).  Raises MediaError."""
    source = Path(source)
    root = os.path.abspath(source if source.is_dir() else source.parent)
    with _reading(source, "give a folder, a .txt list of paths, or a .csv or .json list with a path for each video"):
        if source.is_dir():
            found = (p for p in Path(root).rglob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
            items = [str(p) for p in found if p.is_file()]
        elif source.suffix.lower() == ".txt":
            lines = map(str.strip, source.read_text().splitlines())
            items = [line for line in lines if line and line[0] != "#"]
        elif source.suffix.lower() == ".csv":
            items = list(csv.DictReader(source.read_text().splitlines()))
        elif source.suffix.lower() == ".json":
            items = json.loads(source.read_text())
        else:
            raise ValueError("it is neither a folder nor such a list")
        files = {}
        for item in items:
            if not isinstance(item, str):
                item = item.get("path") or item.get("video") or item["file"]
            path = os.path.abspath(os.path.join(root, item))
            name = os.path.relpath(path, root)
            files[one_line(path.lstrip("/") if name.startswith("..") else name)] = path
        return dict(sorted(files.items()))


CUT_JUMP, CUT_RATIO = 0.04, 2.0             # difference of thumbnails in [0, 1]; and over the third largest step nearby


def find_cuts(lags):
    """Numbers of the frames that follow a hard cut.  lags (N, 3): distances of each frame from the 1, 2 and 3 before.

    At a cut both frames before differ from both after (a flash of one frame does not), and by far more than frames
    nearby differ from each other (fast motion does not; nor do drawings that move every other or third frame)."""
    after = np.concatenate([lags[1:], np.full((1, 3), np.inf)])
    jump = np.minimum(lags[:, :2].min(1), after[:, 1:].min(1))
    steps = np.pad(np.where(np.isfinite(lags[:, 0]), lags[:, 0], 0), 6, "reflect")
    near = np.lib.stride_tricks.sliding_window_view(steps, 13).copy()               # (N, 13)
    near[:, 6] = 0
    level = np.partition(near, -3)[:, -3]                                           # two other cuts may be nearby
    cut = np.isfinite(jump) & (jump > CUT_JUMP) & (jump > CUT_RATIO * level)
    return np.flatnonzero(cut).tolist()


def scan(path):
    """What the index keeps of one file, as JSON; {"error": ...} if it cannot be used."""
    stamps, lags, recent, bad, healthy = [], [], deque(maxlen=3), 0, True
    try:
        for frame, stream in _decode(path):
            if frame is None:
                bad, healthy = bad + 1, False
                continue
            x = frame.to_ndarray(width=32, height=18, format="rgb24", interpolation=Interpolation.AREA)
            x = x / np.float32(255)         # a thumbnail
            # until the next key frame the picture may be damaged; that it jumps back then is no cut
            lags.append([healthy * float(np.abs(x - y).mean()) for y in recent] + [math.inf] * (3 - len(recent)))
            healthy |= frame.key_frame
            recent.appendleft(x)
            stamps.append(frame.pts)
            last, base, aspect = frame, stream.time_base, stream.sample_aspect_ratio or 1
    except Exception as e:                  # a damaged file can make a decoder raise anything
        return {"error": f"unreadable: {_reason(e)}"}
    if None in stamps or any(a >= b for a, b in itertools.pairwise(stamps)):          # AVI with B-frames, a bare stream
        return {"error": "unstamped: its frames do not say when they are shown; encode it again with times, as in "
                         f'ffmpeg -i "{one_line(os.path.basename(path))}" -crf 16 out.mp4'}
    lags = np.array(lags)
    cuts = find_cuts(lags)
    shots = itertools.pairwise([0, *cuts, len(stamps)])
    width, height = round(last.width * aspect), last.height
    return {"frames": len(stamps), "bad": bad, "cuts": cuts,
            "size": [height, width] if last.rotation % 180 else [width, height],    # upright, of square pixels
            "base": [base.numerator, base.denominator], "start": stamps[0],
            "steps": [[step, len(list(run))] for step, run in itertools.groupby(np.diff(stamps).tolist())],
            "change": [round(float(lags[a + 1:b, 0].mean()), 6) if b > a + 1 else 0.0 for a, b in shots]}


def _stamps(entry):
    """Presentation times of a file's frames, in units of its time base: int64 (N,)."""
    steps = [np.full(n, step) for step, n in entry["steps"]]
    return np.cumsum(np.concatenate([[entry["start"]], *steps])).astype(np.int64)


def _times(entry):
    """The same in seconds, float64 (N,)."""
    return _stamps(entry) * (entry["base"][0] / entry["base"][1])


def _key(path):
    """By this the index knows a file again: size and time of the last change; None if it cannot be opened."""
    try:
        with open(path, "rb") as f:
            stat = os.fstat(f.fileno())
            return [stat.st_size, stat.st_mtime_ns]
    except (OSError, ValueError):           # ValueError: a null byte in the name
        return None


def _json_lines(path):
    """What the lines of a file hold, if it is there; of one that was cut off while it was written, the other lines."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def build_index(source, files):
    """{name: what scan() found, and the key}, from the cache where a file's key is as it was, else by decoding it.

    The cache lies in the folder of the videos, or if that is read-only under ~/.cache: a line of JSON per file, written
    when the file has been decoded, so that an interrupted build goes on where it was."""
    source = Path(os.path.abspath(source))
    cache = source / INDEX if source.is_dir() else source.with_name(f".{source.name}{INDEX}")
    if not os.access(cache.parent, os.W_OK):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = home / "exsvd" / (hashlib.blake2b(os.fsencode(source), digest_size=12).hexdigest() + INDEX)
    keys = {name: _key(path) for name, path in files.items()}
    with _reading(cache, "remove it, it is made anew"):
        known = dict(_json_lines(cache))
        index = {name: known[name] for name in files if name in known and known[name]["key"] == keys[name]}
    todo = [name for name in files if name not in index]
    if todo:
        cache.parent.mkdir(parents=True, exist_ok=True)
        pool = ThreadPoolExecutor(os.cpu_count())                                   # decoding lets other threads run
        try:
            jobs = {pool.submit(scan, files[name]): name for name in todo}
            with open(cache, "a") as f:
                for job in tqdm(as_completed(jobs), "index", len(todo), unit="file"):
                    name = jobs[job]
                    index[name] = job.result() | {"key": keys[name]}
                    f.write("\n" + json.dumps([name, index[name]]))                 # the line before may be cut off
                    f.flush()
        finally:
            pool.shutdown(cancel_futures=True)
    return {name: index[name] for name in files}


# ----------------------------------------------------------------------------------------------------------------------
# 5. Clips


def _numbered(path, entry, size, wanted=None, seek=None):
    """(number, pixels) of a file's frames from its start, or from the key frame at or before the time stamp `seek`.

    Pixels are float32 (3, H, W) in [-1, 1]; None for frames that are not among `wanted`.  Raises MediaError."""
    numbers = {stamp: i for i, stamp in enumerate(_stamps(entry).tolist())}
    with _reading(path, "put the file back that was indexed, or leave it out and start again"):
        if entry.get("key") not in (None, _key(path)):
            raise ValueError("it was changed after it was indexed")
        for frame, stream in _decode(path, seek):
            i = None if frame is None else numbers.get(frame.pts)
            if i is None:                   # damage may let frames through after a seek that the index does not have
                continue
            pixels = None
            if wanted is None or i in wanted:
                aspect = stream.sample_aspect_ratio or 1
                pixels = fit_image(_pixels(frame), *size, 1 / aspect if frame.rotation % 180 else aspect)
            yield i, pixels


def read_clip(path, entry, numbers, size):
    """Frames of a video by number: float32 (T, 3, H, W) in [-1, 1]; size (W, H).  Raises MediaError."""
    first, last, wanted = int(numbers[0]), int(numbers[-1]), set(map(int, numbers))
    at, second = _stamps(entry)[first], entry["base"][1] / entry["base"][0]         # in units of the time base
    for seek in (at, at - 2 * second, at - 20 * second, None):
        got = {}                            # a key frame is sought by decoding time, and may be shown after `first`
        try:
            for i, pixels in _numbered(path, entry, size, wanted, seek):
                if pixels is not None:
                    got[i] = pixels
                if i >= last or i > first and first not in got:
                    break
        except MediaError:                  # not every container can seek
            if seek is None:
                raise
        if len(got) == len(wanted):
            return torch.stack([got[int(i)] for i in numbers])
    raise MediaError(f"{path}: its frames are not those of the index; leave it out and start again")


@dataclass
class Clips:
    """An endless stream of clips: item n is a function of (seed, n) alone, whatever process asks for it.

    Each epoch takes one clip, anywhere in it, from every usable file, in a new order.  Where a file can't be read any
    more, that costs a line in the log, and item n is another clip, drawn from (seed, n, number of the try)."""
    source: str                 # "synthetic", anything list_files() takes, or a folder written by encode()
    frames: int = 40            # of a clip
    size: list = (64, 64)       # (W, H): the shorter side is resized, the centre cropped
    stride: int = 1             # every stride-th frame, or
    fps: float = None           # those nearest to each 1/fps
    seed: int = 0
    motion: str = "exvideo"     # the bucket of the measured score; or one bucket for all clips
    skip_static: float = 0.0    # shots whose thumbnails, 0 to 1, change less per frame are left out; 0.002: a still
    log: str = None             # a file that will name what is left out, or later can't be read, and why

    def __post_init__(self):
        self.size = W, H = list(self.size)  # a list, as in JSON
        positive = min(self.frames, self.stride, W, H) > 0 and (self.fps is None or self.fps > 0)
        if not positive or self.seed < 0 or W % 8 or H % 8:
            raise MediaError(f"frames {self.frames}, stride {self.stride}, fps {self.fps}, seed {self.seed}, size "
                             f"{W}x{H}: must be positive, and sizes multiples of 8")
        self._open()

    def picks(self, times, start, k):
        """The number of a clip's frame k = 0, 1, ...: every stride-th, or that shown nearest to each 1/fps.

        times: of the file's frames, in seconds (N,); N where it has ended.  start, k: integers or arrays of them."""
        if self.fps is None:
            return start + self.stride * k
        # a frame is the nearest one up to the middle between it and the next; the last, for half a step more
        until = np.append((times[1:] + times[:-1]) / 2, times[-1] + 0.5 / frame_rate(times[-2:]))   # (N,)
        return np.searchsorted(until, times[start] + k / self.fps)

    def _use(self, index):
        """Sorts what is usable of the files in an index from what is left out."""
        self.index, self.usable, self.left_out = index, {}, {}
        for name, entry in index.items():
            if "error" in entry:
                self.left_out[name] = entry["error"]
                continue
            last = self.picks(_times(entry), np.arange(entry["frames"]), self.frames - 1)   # of a clip from each
            shots = list(itertools.pairwise([0, *entry["cuts"], entry["frames"]]))
            found = [range(a, a + np.count_nonzero(last[a:b] < b)) for a, b in shots]
            moving = [starts for starts, change in zip(found, entry["change"]) if starts and change >= self.skip_static]
            if moving:
                self.usable[name] = moving
            elif any(found):
                self.left_out[name] = f"static: frames differ by {max(entry['change'])}, {self.skip_static} needed"
            else:
                longest = max(b - a for a, b in shots)
                self.left_out[name] = f"too short: {entry['frames']} frames, {longest} of them without a cut"
        self.names, self.clips = list(self.usable), len(self.usable)
        _add_to_log(self.log, [f"{name}\t{why}" for name, why in self.left_out.items()])

    def describe(self):
        """One line: how many files are used, and how many are not for each reason."""
        starts = sum(len(starts) for found in self.usable.values() for starts in found)
        rate = f"{self.fps:g} fps" if self.fps else f"stride {self.stride}"
        reasons = Counter(why.split(":")[0] for why in self.left_out.values())
        return (f"{self.source}: {self.clips} of {len(self.index)} files hold {starts:,} clips of {self.frames} frames "
                f"at {rate}" + "".join(f", {n} {why}" for why, n in sorted(reasons.items())))

    def _where(self, n, attempt):
        """File and first frame of item n."""
        rng = np.random.default_rng([self.seed, 1, n, attempt])
        if attempt == 0:
            epoch, i = divmod(n, self.clips)
            name = self.names[np.random.default_rng([self.seed, 0, epoch]).permutation(self.clips)[i]]
        else:
            name = self.names[rng.integers(self.clips)]
        starts = list(itertools.chain(*self.usable[name]))
        return name, starts[rng.integers(len(starts))]

    def __getitem__(self, n):
        for attempt in range(20):
            name, start = self._where(int(n), attempt)
            entry = self.index[name]
            times = _times(entry)                                                   # (N,), seconds
            numbers = self.picks(times, start, np.arange(self.frames))              # (T,)
            try:
                item, score = self._load(name, numbers)
            except MediaError as e:
                error = e
                _add_to_log(self.log, [f"{name}\tclip {n}, try {attempt + 1}: {e}"])
                continue
            fps = frame_rate(times[numbers] if self.frames > 1 else times)
            return item | {"name": f"{name}@{start}", "fps": torch.tensor(fps, dtype=torch.float32),
                           "motion": torch.tensor(motion_bucket(score, self.motion))}
        raise error


def _add_to_log(log, lines):
    """Adds those lines to a file that it does not have; several processes may do so at once."""
    if log is not None:
        known = set(Path(log).read_text().splitlines()) if os.path.exists(log) else ()
        new = "".join(f"{line}\n" for line in lines if line not in known)
        with contextlib.suppress(OSError):  # a full disk must not end the run
            with open(log, "ab", buffering=0) as f:                                 # one write: lines don't interleave
                f.write(new.encode())


class VideoClips(Clips):
    """Items, float32: "video" (T, 3, H, W) in [-1, 1], "fps", "motion", "aug", "aug_noise" (3, H, W); and "name"."""
    pixels = True

    def _open(self):
        self.files = list_files(self.source)
        self._use(build_index(self.source, self.files))

    def _load(self, name, numbers):
        video = read_clip(self.files[name], self.index[name], numbers, self.size)
        aug, noise = draw_condition(self.seed, name, int(numbers[0]), self.size)
        return {"video": video, "aug": aug, "aug_noise": noise}, motion_score(video)


class SyntheticClips(Clips):
    """The same of toy/world.py, made on the fly: item n is its clip n, with the frame rate and motion bucket it has."""
    pixels = True

    def _open(self):
        if self.stride != 1 or self.fps is not None:
            raise MediaError("synthetic clips have frame rates of their own; leave out --stride and --fps")
        self._use({})
        self.clips = 10_000                 # there is no end of them

    def describe(self):
        return f"synthetic flights: clips of {self.frames} frames, {self.size[0]}x{self.size[1]} pixels"

    def __getitem__(self, n):
        from toy import world               # only here: data.py and the other files do without toy/
        frames, fps, motion = world.clip(self.seed, int(n), self.frames, max(self.size))
        if self.motion != "exvideo":
            motion = motion_bucket(0.0, self.motion)
        aug, noise = draw_condition(self.seed, "synthetic", int(n), self.size)
        return {"video": torch.stack([fit_image(x, *self.size) for x in frames]), "aug": aug, "aug_noise": noise,
                "name": f"scene {n}", "fps": torch.tensor(fps), "motion": torch.tensor(motion)}


class LatentClips(Clips):
    """Items, float32: "latents" (T, 4, h, w), "cond" (4, h, w), "ctx" (D,), "fps", "motion", "aug"; and "name".

    The motion scores in it are those of clips of the frames, stride and fps it was encoded for, so others are refused
    unless motion does not come from there.  The condition noise is that of the seed it was encoded with."""
    pixels = False

    def _open(self):
        store = Path(self.source, STORE)
        with _reading(store, "encode into another folder"):
            [self.settings, self.of], *lines = _json_lines(store)
            for key in ("size", "frames", "stride", "fps") if self.motion == "exvideo" else ("size",):
                ours, theirs = getattr(self, key), self.settings.get(key)
                if ours != theirs:
                    raise MediaError(f"{self.source}: was encoded with {key} {theirs}, not {ours}; use that, encode "
                                     "again, or where it is not the size, give all clips one bucket: --motion 127")
            self.skip_static = max(self.skip_static, self.settings["skip_static"])
            self._use(dict(lines))

    def describe(self):
        missing = self.of - len(self.index)
        return super().describe() + (f"; {missing} not encoded yet: run data.py encode again" if missing else "")

    def _load(self, name, numbers):
        first, last, path = int(numbers[0]), int(numbers[-1]), _shard(self.source, name)
        with _reading(path, "run data.py encode again"), safe_open(path, "pt") as f:
            item = {key: f.get_slice(key)[first:first + 1][0].float() for key in ("cond", "ctx", "aug")}
            item["latents"] = f.get_slice("latents")[first:last + 1][torch.from_numpy(numbers - first)].float()
            return item, f.get_slice("motion")[first:first + 1].item()


def open_dataset(source, frames=Clips.frames, or_nothing=False, **settings):
    """The clips of a data set: dataset[n] for n = 0, 1, 2, ... without end; for the items see VideoClips, LatentClips.

    source, frames, settings: see Clips.  Raises MediaError, also when nothing is left, unless or_nothing.  Of several
    processes one must come first: it builds the index that the others find."""
    if str(source) == "synthetic":
        kind = SyntheticClips
    elif os.path.exists(os.path.join(source, STORE)):
        kind = LatentClips
    else:
        kind = VideoClips
    dataset = kind(source, frames, **settings)
    if not dataset.clips and not or_nothing:
        raise MediaError(f"{dataset.describe()}: nothing is left to use; python data.py check says why")
    return dataset


# ----------------------------------------------------------------------------------------------------------------------
# 6. Encoding a set of videos once, so that training needs neither VAE nor CLIP
# One .safetensors file per video.  Per frame: its mean latent; as if a clip began there, its condition latent, CLIP
# embedding, and motion score.  And a list: a line with the settings, then one per file, written when the file is there.

STORE = "latents.jsonl"


def _shard(folder, name):
    return os.path.join(folder, name + ".safetensors")


@torch.no_grad()
def encode_frames(vae, video):
    """Mean latents, unscaled: (T, 3, H, W) -> (T, 4, H/8, W/8), on the VAE's device, in the video's dtype.

    One frame at a time: in a batch of another size a frame's latent differs in its last bits."""
    device = next(vae.parameters()).device
    return torch.cat([vae.encode(x[None].to(device)) for x in video])


@torch.no_grad()
def encode_condition(vae, clip, frame, aug, noise):
    """What the model is told of its first frame (3, H, W): the latent of frame + aug * noise, (4, h, w), and the CLIP
    embedding (D,) of the clean frame at this very size, as in Stability's code."""
    device = next(vae.parameters()).device
    frame, aug, noise = (torch.as_tensor(x).to(device) for x in (frame, aug, noise))
    ctx = clip(exsvd.preprocess_clip(frame[None], clip.config.image))
    return vae.encode((frame + aug * noise)[None])[0], ctx[0]


def _encode_file(dataset, name, vae, clip, dtype, bar):
    """The tensors of one file, a row per frame; holds the pixels of no more frames than a clip spans."""
    times, starts = _times(dataset.index[name]), deque(itertools.chain(*dataset.usable[name]))
    rows, window = [], {}
    motion = torch.zeros(len(times), dtype=torch.float64)
    for i, frame in _numbered(dataset.files[name], dataset.index[name], dataset.size):
        aug, noise = draw_condition(dataset.seed, name, i, dataset.size)
        cond, ctx = encode_condition(vae, clip, frame, aug, noise)
        row = {"latents": encode_frames(vae, frame[None])[0], "cond": cond, "ctx": ctx}
        rows.append({key: x.to("cpu", dtype) for key, x in row.items()} | {"aug": aug})
        window[i] = frame.to(cond.device)
        while starts:                       # the clips that end here
            numbers = dataset.picks(times, starts[0], np.arange(dataset.frames)).tolist()
            if numbers[-1] > i:
                break
            motion[starts.popleft()] = motion_score([window[k] for k in numbers])
        window = {k: x for k, x in window.items() if starts and k >= starts[0]}
        bar.update()
    if len(rows) != len(times):
        raise MediaError(f"{dataset.files[name]}: its frames are not those of the index; leave it out and start again")
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]} | {"motion": motion}


def encode(model, source, out, dtype=torch.float32, device="cpu", **settings):
    """Encodes all usable files of a data set into the folder `out`; what is there already is kept.

    dtype: of latents and embeddings in the files; settings: open_dataset's.  Raises MediaError, also if `out` was begun
    with other settings."""
    dataset = open_dataset(source, **settings)
    if not isinstance(dataset, VideoClips):
        raise MediaError(f"{source}: is not a set of videos; train.py takes it as it is")
    svd = exsvd.load(model, device=device, parts=("vae", "clip"))
    weights = hashlib.blake2b(digest_size=8)                                        # two tensors tell models apart
    for x in (svd.vae.quant_conv.weight, svd.clip.proj):
        weights.update(x.detach().cpu().numpy().tobytes())
    ours = {"model": weights.hexdigest(), "ctx": svd.clip.config.out_dim, "dtype": str(dtype).split(".")[1],
            **{key: getattr(dataset, key) for key in ("seed", "size", "frames", "stride", "fps", "skip_static")}}
    store = Path(out, STORE)
    with _reading(store, "encode into another folder"):
        [theirs, _], *lines = list(_json_lines(store)) or [[ours, 0]]
        theirs, known = dict(theirs), dict(lines)
    for key in ours:
        if theirs.get(key) != ours[key]:
            raise MediaError(f"{out}: was begun with {key} {theirs.get(key)}, not {ours[key]}; encode elsewhere")
    done = {name: entry for name, entry in known.items() if dataset.index.get(name) == entry and name in dataset.usable}
    done = {name: entry for name, entry in done.items() if os.path.exists(_shard(out, name))}
    todo = [name for name in dataset.names if name not in done]
    store.parent.mkdir(parents=True, exist_ok=True)
    part = store.with_name(f".{STORE}.part")                                        # files that changed lose their line
    part.write_text("".join(json.dumps(line) + "\n" for line in ([ours, dataset.clips], *done.items())))
    os.replace(part, store)
    with tqdm(desc="encode", total=sum(dataset.index[name]["frames"] for name in todo), unit="frame") as bar:
        for name in todo:
            tensors, path = _encode_file(dataset, name, svd.vae, svd.clip, dtype, bar), _shard(out, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            exsvd.save(path, tensors, {})
            with open(store, "a") as f:
                print(json.dumps([name, dataset.index[name]]), file=f)
    return dataset


# ----------------------------------------------------------------------------------------------------------------------
# 7. Command line: python data.py check videos/;  python data.py encode --model M --data videos/ --out latents/


def check(source, **settings):
    """Prints what of a data set would be used, and why not the rest.  Returns the number of usable files."""
    dataset = open_dataset(source, motion="0", or_nothing=True, **settings)
    for name, why in dataset.left_out.items():
        print(f"  left out  {name}: {why}")
    print(dataset.describe())
    used = [dataset.index[name] for name in dataset.names]
    if used:
        times = [_times(entry) for entry in used]
        rates = sorted(map(frame_rate, times))
        W, H = dataset.size
        print(f"  {sum(t[-1] - t[0] for t in times) / 3600:.2f} hours, {sum(len(e['cuts']) for e in used)} cuts, "
              f"{rates[0]:.5g} to {rates[-1]:.5g} frames per second; {sum(e['bad'] > 0 for e in used)} with damaged "
              f"packets, {sum(e['size'][0] < W or e['size'][1] < H for e in used)} smaller than {W}x{H}")
    return dataset.clips


def frame_size(text):
    """An argparse type: WxH -> (W, H)."""
    try:
        W, H = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write it as WIDTHxHEIGHT, for example 512x512") from None
    return W, H


def main():
    p = argparse.ArgumentParser(description="Look at a set of videos before training on it, or encode it once for all.")
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="say what would be used, and why not the rest")
    c.add_argument("data", help="a folder, a .txt, .csv or .json list, or a folder of latents")
    e = commands.add_parser("encode", help="store latents and embeddings; run again, it goes on where it stopped")
    e.add_argument("--model", required=True, help="SVD-XT, a file or a diffusers folder, for its VAE and CLIP")
    e.add_argument("--data", required=True, help="a folder, or a .txt, .csv or .json list")
    e.add_argument("--out", required=True, help="a folder for the latents, one file per video")
    e.add_argument("--seed", type=int, default=0, help="of the noise on condition images (default: 0, as train.py's)")
    e.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"],
                   help="of what is stored (default: float16: a clip's loss off by up to 5e-5 of itself; bfloat16: "
                   "9e-4; float32: bit for bit what encoding on the fly gives)")
    e.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    for q in (c, e):
        q.add_argument("--frames", type=int, help="of a clip (default: 128, as in the paper; encoding for a toy: 40)")
        q.add_argument("--size", type=frame_size, metavar="WxH",
                       help="pixels of a clip, multiples of 8 (default: 512x512; toy: 128x128)")
        q.add_argument("--stride", type=int, default=1, help="take every k-th frame (default: 1)")
        q.add_argument("--fps", type=float, help="take the frames nearest to this rate instead")
        q.add_argument("--skip-static", type=float, default=0.0, help="leave out shots that change less; try 0.002")
    a = p.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)                       # leaves as Ctrl-C does
    try:
        settings = {"frames": 128, "size": (512, 512), "stride": a.stride, "fps": a.fps, "skip_static": a.skip_static}
        if a.command == "encode" and exsvd.open_model(a.model)[0]["unet"].meta.get("family") == "toy":
            settings |= {"frames": 40, "size": (128, 128)}
        settings |= {key: value for key, value in (("frames", a.frames), ("size", a.size)) if value is not None}
        if a.command == "check":
            return 0 if check(a.data, **settings) else 1
        print(encode(a.model, a.data, a.out, getattr(torch, a.dtype), a.device, seed=a.seed, **settings).describe())
        return 0
    except (MediaError, exsvd.WeightsError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
