"""Pixels in and out, the synthetic scenes the toy model is made from, and videos as clips for training.

    python data.py check videos/                                        # what would be used, and why not the rest
    python data.py encode --model svd_xt.safetensors --data videos/ --out latents/

    1. Reading images and videos     read_image, read_video, read_settings
    2. Fitting an image to a size    fit_image, default_size
    3. Writing videos                VideoWriter (.mp4, .webm, .gif, a folder of PNGs), write_png
    4. Synthetic moving scenes       synthetic_scene
    5. Motion and noise              motion_score, motion_bucket, draw_condition
    6. The index of a data set       list_files, scan, find_cuts, build_index
    7. Clips                         open_dataset
    8. Encoding a data set           encode_frames, encode_condition, encode
    9. Command line                  check, main

Pixels are uint8 RGB with the channel last, (H, W, 3) or (T, H, W, 3), until fit_image turns them into what the model
eats: float32 (3, H, W) in [-1, 1].  T frames, H W pixels.  Colour profiles (ICC) and HDR transfer curves are ignored.
"""
import argparse
import bisect
import colorsys
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import struct
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import exsvd

av.logging.set_level(None)                  # ffmpeg's own messages would drown our one line


class MediaError(ValueError):
    """A pixel file that cannot be read or written; the message is one line: which file, what is wrong, what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# 1. Reading images and videos
# ----------------------------------------------------------------------------------------------------------------------

MAX_PIXELS = 200_000_000                    # of one frame; beyond it a small file may unpack to more than the memory
# without these flags swscale repeats chroma samples instead of interpolating them: coloured edges come out wrong
EXACT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
SAFE = {"protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}               # a playlist must not open other files
JPEG_MARKER = re.compile(rb"\xff+([^\0\xff\xd0-\xd7])")                        # but stuffed zeros and restarts
HEIF_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")


class _Unnamed:
    """A binary file without its name, so that ffmpeg goes by content and never interprets 'a%03d.png' or 'http://x'."""
    def __init__(self, file):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _reason(error):
    if isinstance(error, (IndexError, KeyError)):                                   # from our own parsing
        return "it is damaged"
    return str(getattr(error, "strerror", None) or error or type(error).__name__).splitlines()[0].rstrip(". ")


def _open(path):
    try:
        return open(path, "rb")
    except (OSError, ValueError) as e:      # ValueError: a null byte in the name
        raise MediaError(f"{path}: cannot be opened ({_reason(e)}); give the path of an image or video file") from None


def _plane(frame, dtype):
    """The pixels (H, W, 4) of an rgba frame, without the padding at the end of each row."""
    p = frame.planes[0]
    x = np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[:frame.height]
    return x[:, :frame.width * 4 * np.dtype(dtype).itemsize].copy().view(dtype).reshape(frame.height, frame.width, 4)


def _even(frame):
    """The same planar YUV frame padded to a multiple of 4 pixels, 8 at least, by repeating its edge.

    swscale stretches the chroma of a frame of odd size (17 samples over 33 pixels) instead of doubling it, and errs on
    a side of 4 pixels."""
    w, h = frame.width, frame.height
    even = av.VideoFrame(max(8, w + -w % 4), max(8, h + -h % 4), frame.format.name)
    even.colorspace, even.color_range = frame.colorspace, frame.color_range
    size = 2 if frame.format.components[0].bits > 8 else 1
    for src, dst in zip(frame.planes, even.planes):
        x = np.frombuffer(src, np.uint8).reshape(-1, src.line_size)[:src.height, :src.width * size]
        x = x.reshape(src.height, src.width, size)
        x = np.pad(x, ((0, dst.height - src.height), (0, dst.width - src.width), (0, 0)), "edge").reshape(dst.height, -1)
        dst.update(np.pad(x, ((0, 0), (0, dst.line_size - x.shape[1]))).tobytes())
    return even


def _rgb(frame, alpha=None):
    """A decoded frame as uint8 (H, W, 3); transparent parts (alpha in 0..255, the frame's own by default) go on white."""
    w, h = frame.width, frame.height
    parts = frame.format.components
    yuv = len(parts) >= 3 and len(frame.planes) >= 3 and not frame.format.is_rgb
    if yuv and (w % 4 or h % 4 or min(w, h) < 8):
        frame = _even(frame)
    if parts[0].bits > 8 and not yuv:       # swscale truncates 16 bits to 8; we round
        x = _plane(frame.reformat(format="rgba64le"), np.uint16)[:h, :w] / np.float32(257)
    else:
        x = _plane(frame.reformat(format="rgba", interpolation=EXACT), np.uint8)[:h, :w]
    x, a = x[..., :3], x[..., 3:] if alpha is None else alpha
    if a.min() < 255:
        x = 255 + (x - np.float32(255)) * (a / np.float32(255))
    if x.dtype != np.uint8:
        x = np.rint(x).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(x))


def _turned(frame):
    """A video frame's pixels, turned as its container asks: mirrored or not, then quarter turns to the left."""
    img, matrix = _rgb(frame), None
    with contextlib.suppress(ValueError):   # side data of a kind that PyAV does not know
        matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:                  # PyAV's rotation leaves out the mirror, which shows in the determinant
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        img = img.flip(0) if a * d < b * c else img
    return torch.rot90(img, frame.rotation // 90, (0, 1)).contiguous()


def _best_stream(container):
    """The largest video stream that is not an attached picture (cover art), unless nothing else is there."""
    streams = [s for s in container.streams.video if s.codec_context]               # none for SVG: no decoder
    if not streams:
        raise ValueError("it holds no picture that can be decoded")
    cover = lambda s: bool(s.disposition & av.stream.Disposition.attached_pic)
    return max(streams, key=lambda s: (not cover(s), s.width * s.height))


def _first(container, stream, options={}):
    if stream.width * stream.height > MAX_PIXELS:
        raise ValueError(f"{stream.width}x{stream.height} pixels are more than {MAX_PIXELS}")
    stream.codec_context.options = dict(options)
    for frame in container.decode(stream):
        return frame
    raise ValueError("no picture could be decoded")


def _chunks(data):
    """The (name, body) chunks of a RIFF (WebP) file or an ANMF frame inside one."""
    i = 0
    while i + 8 <= len(data):
        n = int.from_bytes(data[i + 4:i + 8], "little")
        yield data[i:i + 4], data[i + 8:i + 8 + n]
        i += 8 + n + n % 2


def _segments(data):
    """The (marker, body, end) segments of the first image in a JPEG file, up to its end marker, 0xd9, if that is there."""
    i = 2
    while m := JPEG_MARKER.search(data, i):                                         # between segments: coded pixels
        i, name = m.end(), m[1][0]
        n = 0 if name == 0xd9 else int.from_bytes(data[i:i + 2], "big")
        yield name, data[i + 2:i + n], i + n
        if name == 0xd9:
            return
        i += n


def orientation(data):
    """EXIF orientation, 1 to 8, of the bytes of a JPEG, PNG, WebP, TIFF, AVIF or HEIC file; 1 where there is none.

    1 is upright; 5 to 8 swap rows and columns (EXIF 2.3, tag 0x0112)."""
    if data[4:8] == b"ftyp":                # AVIF and HEIC: quarter turns to the left, then a mirror; their EXIF is a copy
        turn, mirror = (data[i + 4] if 0 < i < len(data) - 4 else None for i in (data.find(b"irot"), data.find(b"imir")))
        table = {None: (1, 8, 3, 6), 0: (4, 5, 2, 7), 1: (2, 7, 4, 5)}             # mirror 0: top to bottom, 1: left to right
        return table.get(mirror, table[None])[(turn or 0) % 4]
    tiff = b""
    if data[:4] in (b"II*\0", b"MM\0*"):
        tiff = data
    elif data[:2] == b"\xff\xd8":
        tiff = next((body[6:] for name, body, _ in _segments(data) if name == 0xe1 and body[:6] == b"Exif\0\0"), b"")
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        i = 8
        while i + 8 <= len(data):
            n = int.from_bytes(data[i:i + 4], "big")
            if data[i + 4:i + 8] == b"eXIf":
                tiff = data[i + 8:i + 8 + n]
            i += 12 + n
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        tiff = dict(_chunks(data[12:])).get(b"EXIF", b"").removeprefix(b"Exif\0\0")
    try:
        end = {b"II": "<", b"MM": ">"}[tiff[:2]]
        ifd, = struct.unpack_from(end + "I", tiff, 4)
        count, = struct.unpack_from(end + "H", tiff, ifd)
        for i in range(count):
            tag, kind, _ = struct.unpack_from(end + "HHI", tiff, ifd + 2 + 12 * i)
            if tag == 0x0112:
                value, = struct.unpack_from(end + ("I" if kind == 4 else "H"), tiff, ifd + 10 + 12 * i)
                return value if 1 <= value <= 8 else 1
    except (KeyError, struct.error):        # no EXIF, or a damaged one: the pixels count
        pass
    return 1


def upright(img, o):
    """(H, W, 3) pixels stored under EXIF orientation `o`, as they are meant to be seen."""
    if o >= 5:
        img = img.transpose(0, 1)
    flip = [d for d, orientations in ((0, (3, 4, 7, 8)), (1, (2, 3, 6, 7))) if o in orientations]
    return img.flip(flip).contiguous()


def _still_webp(data):
    """An animated WebP, which ffmpeg 8 does not decode, as a still one of its first frame: (bytes, canvas and offset)."""
    chunks = dict(reversed(list(_chunks(data[12:]))))                               # the first of each name wins
    canvas = [int.from_bytes(chunks[b"VP8X"][i:i + 3], "little") + 1 for i in (4, 7)]
    x, y = (2 * int.from_bytes(chunks[b"ANMF"][i:i + 3], "little") for i in (0, 3))
    frame = chunks[b"ANMF"]
    head = bytes([0x10 * (b"ALPH" in frame[16:20]), 0, 0, 0]) + frame[6:12]         # VP8X: flags and the frame's size
    body = b"WEBPVP8X" + struct.pack("<I", 10) + head + frame[16:]
    return b"RIFF" + struct.pack("<I", len(body)) + body, (*canvas, x, y)


def _still(data, heif, webp):
    """The first image in the bytes of an image file, upright."""
    turn, box = orientation(data), None
    gif, jpeg = data[:4] == b"GIF8", data[:2] == b"\xff\xd8"
    if jpeg:                                                                        # phones append videos and more images
        data = data[:next((end for name, _, end in _segments(data) if name == 0xd9), 0)]
    if gif and not data.rstrip(b"\0").endswith(b";") or not data:
        raise ValueError("the file is truncated")                                   # ffmpeg would leave the rest empty
    if heif and b"grid" in data[:1 << 16]:
        raise ValueError("it is tiled; convert it to JPEG or PNG")                  # ffmpeg gives the tiles as videos
    if webp and data[12:16] == b"VP8X" and data[20] & 2:
        data, box = _still_webp(data)
    if data[:4] == b"\x89PNG":
        data = data.replace(b"eXIf", b"exIf", 1)                                    # hidden: a damaged one would be refused
    strict = {"err_detect": "explode"} if jpeg else {}                              # or a broken JPEG has a grey end
    with av.open(io.BytesIO(data), options=SAFE) as c:
        frame, alpha = _first(c, _best_stream(c), strict), None
    if heif and b":alpha" in data[:1 << 16]:                                        # for ffmpeg a second, grey video
        with av.open(io.BytesIO(data), options=SAFE) as c:
            alpha = _first(c, c.streams.video[1]).to_ndarray(format="gray")[..., None]
    img = _rgb(frame, alpha)
    if box:
        W, H, x, y = box
        if W * H > MAX_PIXELS or x + img.shape[1] > W or y + img.shape[0] > H:
            raise ValueError("its first frame does not fit its canvas")
        page = torch.full((H, W, 3), 255, dtype=torch.uint8)
        page[y:y + img.shape[0], x:x + img.shape[1]] = img
        img = page
    return upright(img, turn)


def read_image(path):
    """The image, or the first frame of the animation or video, at `path`: torch.uint8 (H, W, 3), upright, on white.

    Whatever PyAV decodes, recognised by content.  Raises MediaError for everything else."""
    with _open(path) as f:
        try:
            head = f.read(32)
            f.seek(0)
            heif = head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS
            webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
            if heif or webp or head.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")):
                return _still(f.read(), heif, webp)
            if not head:
                raise ValueError("the file is empty")
            with av.open(_Unnamed(f), options=SAFE) as c:
                return _turned(_first(c, _best_stream(c)))
        except (av.FFmpegError, ValueError, LookupError, EOFError, MemoryError) as e:
            raise MediaError(f"{path}: not a readable image or video ({_reason(e)}); give a JPEG, PNG, WebP, GIF or video "
                             "file, or save it again in an image editor") from None


def read_video(path):
    """All frames of a video, GIF, or folder of PNGs written by VideoWriter: uint8 (T, H, W, 3), frames per second.

    The rate is measured from the time stamps (1.0 for a single frame without one).  Raises MediaError."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("frame_*.png"))
        if not files:
            raise MediaError(f"{path}: holds no frame_0000.png; give a video file or a folder written by sample.py")
        return torch.stack([read_image(f) for f in files]), float((read_settings(path) or {}).get("fps", 1.0))
    frames, times = [], []
    with _open(path) as f:
        try:
            with av.open(_Unnamed(f), options=SAFE) as c:
                s = _best_stream(c)
                s.thread_type = "AUTO"
                rate = s.average_rate
                for frame in c.decode(s):
                    frames.append(_turned(frame))
                    times.append(frame.pts * frame.time_base if frame.pts is not None else None)
        except (av.FFmpegError, ValueError, LookupError, EOFError) as e:
            raise MediaError(f"{path}: not a readable video ({_reason(e)}); give an mp4, webm, gif or similar file") from None
    if not frames:
        raise MediaError(f"{path}: no frame could be decoded; give another video")
    if len(frames) > 1 and None not in times and times[-1] > times[0]:
        measured = (len(frames) - 1) / (times[-1] - times[0])
        if not rate or abs(rate - measured) > 0.02 * measured:                      # time stamps are rounded, headers lie
            rate = measured
    return torch.stack(frames), float(rate or 1)


def read_settings(path):
    """The settings a VideoWriter stored with the video, or None where there are none.  Raises MediaError."""
    path = Path(path)
    try:
        if path.is_dir() or path.suffix.lower() == ".gif":
            side = _sidecar(path)
            return json.loads(side.read_text()) if side.exists() else None
        with _open(path) as f, av.open(_Unnamed(f), options=SAFE) as c:
            tags = {k.lower(): v for k, v in c.metadata.items()}
            return json.loads(tags["comment"]) if "comment" in tags else None
    except MediaError:
        raise
    except (av.FFmpegError, ValueError) as e:
        raise MediaError(f"{path}: holds no readable settings ({_reason(e)}); give a video written by sample.py") from None


# ----------------------------------------------------------------------------------------------------------------------
# 2. Fitting an image to a size
# ----------------------------------------------------------------------------------------------------------------------

def fit_image(img, width, height, aspect=1):
    """uint8 (H, W, 3) -> float32 (3, height, width) in [-1, 1]: scaled to cover the target, centre cropped, not distorted.

    Antialiased bicubic, the same scale along both axes; aspect is the width of a pixel over its height."""
    H, W, _ = img.shape
    scale = max(width / (W * aspect), height / H) * (1 + 1e-9)                      # never one pixel short by rounding
    sx, sy = float(scale * aspect), float(scale)
    # drop now what the crop would drop, but for the filter's reach: 10000x10 must not become 64000x64 first
    x, y = (max(0, int((n - m / s) / 2 - 2 / s) - 3) for n, m, s in ((W, width, sx), (H, height, sy)))
    img = img[y:H - y, x:W - x]
    img = img.permute(2, 0, 1)[None].float() / 127.5 - 1                            # (1, 3, H, W)
    img = F.interpolate(img, scale_factor=(sy, sx), mode="bicubic", antialias=True)
    y, x = (img.shape[2] - height) // 2, (img.shape[3] - width) // 2
    return img[0, :, y:y + height, x:x + width].clamp(-1, 1).contiguous()           # bicubic overshoots at edges


def default_size(width, height, area, multiple=64, max_ratio=4):
    """(W, H), multiples of `multiple` with about `area` pixels at the aspect ratio of a width x height image.

    Ratios beyond max_ratio are cropped to it; the area never exceeds twice the wish (or one `multiple` squared)."""
    ratio = min(max(width / height, 1 / max_ratio), max_ratio)
    W, H = (max(1, round(math.sqrt(area * r) / multiple)) for r in (ratio, 1 / ratio))
    most = max(1, int(2 * area / multiple ** 2))
    W, H = min(W, max(1, most // H)), min(H, max(1, most // W))
    return W * multiple, H * multiple


# ----------------------------------------------------------------------------------------------------------------------
# 3. Writing videos
# ----------------------------------------------------------------------------------------------------------------------

# One thread: x264 and libvpx divide the work differently for each number of threads, and the bytes with it.
# No mbtree: with it up to one in ten files of the same 64x64 frames came out with other bytes; without, none of 450.
ENCODERS = {  # extension: container, codec, its options
    ".mp4": ("mp4", "libx264", {"crf": "17", "preset": "medium", "x264-params": "mbtree=0"}),
    ".webm": ("webm", "libvpx-vp9", {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4"}),
    ".gif": ("gif", "gif", {}),
}


def _sidecar(path):
    return path / "settings.json" if path.suffix.lower() != ".gif" else path.with_name(path.name + ".json")


def _png(img):
    """uint8 (H, W, 3) -> the bytes of a PNG file."""
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = img.shape[1], img.shape[0], "rgb24", Fraction(1)
    codec.thread_count = 1
    codec.options = {"pred": "mixed"}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(img), "rgb24")
    return b"".join(bytes(p) for p in [*codec.encode(frame), *codec.encode(None)])


def _json(settings):
    return json.dumps(settings, sort_keys=True)


def _write(path, data):
    """Text or bytes into a file that is never half written."""
    part = Path(path).with_name(f".{Path(path).name}.part{os.getpid()}")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(part, path)


def write_png(path, img):
    """Writes uint8 (H, W, 3) as a PNG file."""
    _write(path, _png(torch.as_tensor(img).numpy()))


class VideoWriter:
    """Writes a video frame by frame; memory does not grow with its length.

        with VideoWriter("out.mp4", fps=7, settings={...}) as video:
            video.write(frames)             # uint8 (T, H, W, 3), as often as there are frames

    .mp4 (H.264, plays in browsers), .webm (VP9), .gif (a palette per frame) or, without an extension or with a final
    slash, a folder of PNGs.  `settings` goes as JSON into the comment tag of mp4 and webm, into out.gif.json, or with
    the frame rate into settings.json of the folder.  The target appears only when the `with` block ends well; after an
    exception an older one is as it was.  Same machine, versions and frames: same bytes.  Bad names and rates raise
    MediaError at once, before any work; frames of a wrong type or size raise ValueError."""

    def __init__(self, path, fps, settings=None):
        self.path, self.settings = Path(path), settings
        self.kind = "" if str(path).endswith("/") else self.path.suffix.lower()
        if self.kind not in ("", *ENCODERS):
            raise MediaError(f"{path}: cannot write {self.kind} files; end the name in .mp4, .webm or .gif, or in nothing for a "
                             "folder of PNGs")
        if not 0 < fps <= (50 if self.kind == ".gif" else 1000):
            raise MediaError(f"{path}: {fps} frames per second cannot be written; use up to 50 for a gif, up to 1000 otherwise")
        self.fps = Fraction(fps).limit_denominator(1001)                            # 30000/1001 and 7.5 alike
        if self.kind and self.path.is_dir():
            raise MediaError(f"{path}: is a folder; choose another name")
        if not self.kind and self.path.exists() and not self._ours(self.path):
            raise MediaError(f"{path}: exists and holds more than PNG frames written here; choose another name")
        self.part = self.path.with_name(f".{self.path.name}.part{os.getpid()}")     # beside the target: same file system
        self.count, self.size, self.container, self.filter = 0, None, None, None

    @staticmethod
    def _ours(folder):
        return folder.is_dir() and all(f.name == "settings.json" or f.match("frame_*.png") for f in folder.iterdir())

    def __enter__(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._discard()
            self.part.mkdir() if not self.kind else self.part.touch()
        except OSError as e:
            raise MediaError(f"{self.path}: cannot be written ({_reason(e)}); choose another place") from None
        return self

    def _start(self, H, W):
        name, codec, options = ENCODERS[self.kind]
        # by absolute name, since +faststart opens the file a second time
        self.container = av.open("file:" + os.path.abspath(self.part), "w", format=name, container_options={
            "fflags": "+bitexact", **({"movflags": "+faststart"} if name == "mp4" else {})})
        if self.settings is not None and name != "gif":
            self.container.metadata["comment"] = _json(self.settings)
        if name == "gif":
            s = self.container.add_stream(codec, rate=100)                          # GIF delays are whole 1/100 s
            s.width, s.height, s.pix_fmt = W, H, "pal8"
            s.codec_context.time_base = Fraction(1, 100)
            self._start_palette(H, W)
        else:
            s = self.container.add_stream(codec, rate=self.fps, options=options)
            s.width, s.height, s.pix_fmt = W + W % 2, H + H % 2, "yuv420p"          # half-size chroma needs even sides
            s.codec_context.time_base = 1 / self.fps
            s.codec_context.colorspace = s.codec_context.color_primaries = s.codec_context.color_trc = 1    # bt709
            s.codec_context.color_range = ColorRange.MPEG
            if name == "mp4":               # x264 writes its version and settings into the stream as a message, type 6
                self.filter = av.bitstream.BitStreamFilterContext("filter_units=remove_types=6", s)
        s.codec_context.thread_count = 1
        s.codec_context.flags |= av.codec.context.Flags.bitexact
        self.stream = s

    def _start_palette(self, H, W):
        # one palette for the whole video would mean holding all its frames
        g = self.graph = av.filter.Graph()
        self.source = g.add_buffer(width=W, height=H, format="rgb24", time_base=Fraction(1, 100))
        split, make = g.add("split"), g.add("palettegen", "stats_mode=single:reserve_transparent=0")
        use, self.sink = g.add("paletteuse", "new=1:dither=bayer:bayer_scale=4"), g.add("buffersink")
        self.source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(make, 1, 0)
        make.link_to(use, 0, 1)
        use.link_to(self.sink)
        g.configure()

    def write(self, frames):
        """Appends uint8 (T, H, W, 3); all calls must agree in H and W."""
        frames = torch.as_tensor(frames).cpu()
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(f"frames must be uint8 (T, H, W, 3), not {frames.dtype} {tuple(frames.shape)}")
        self.size = self.size or frames.shape[1:3]
        if frames.shape[1:3] != self.size:
            raise ValueError(f"frames of {tuple(frames.shape[1:3])} follow frames of {tuple(self.size)}; all must agree")
        for x in frames.numpy():
            if not self.kind:
                (self.part / f"frame_{self.count:04d}.png").write_bytes(_png(x))
            else:
                if not self.container:
                    self._start(*self.size)
                self._encode(x)
            self.count += 1

    def _encode(self, x):
        if self.kind == ".gif":
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(x), "rgb24")
            frame.pts, frame.time_base = round(self.count * 100 / self.fps), Fraction(1, 100)
            self.source.push(frame)
            frame = self.sink.pull()
        else:
            x = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2), (0, 0)), "edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(x), "rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG,
                                   interpolation=EXACT)
            frame.pts, frame.time_base = self.count, 1 / self.fps
        self._mux(self.stream.encode(frame))

    def _mux(self, packets):
        for p in packets:
            self.container.mux(self.filter.filter(p) if self.filter else p)

    def __exit__(self, kind, error, trace):
        try:
            if kind is not None:
                with contextlib.suppress(av.FFmpegError):                           # must not hide the first error
                    self.container and self.container.close()
                return
            if not self.count:
                raise MediaError(f"{self.path}: no frame was written; the older file, if any, is as it was")
            if self.container:
                self._mux(self.stream.encode(None))
                self.container.close()
            self._finish()
        finally:
            self._discard()

    def _finish(self):
        if not self.kind:                                                           # PNGs cannot tell their frame rate
            _write(self.part / "settings.json", _json({"fps": float(self.fps), **(self.settings or {})}))
            old = self.path.with_name(self.part.name + ".old")
            if self.path.exists():
                os.replace(self.path, old)
            os.replace(self.part, self.path)
            shutil.rmtree(old, ignore_errors=True)
            return
        os.replace(self.part, self.path)
        if self.kind == ".gif":
            if self.settings is None:
                _sidecar(self.path).unlink(missing_ok=True)
            else:
                _write(_sidecar(self.path), _json(self.settings))

    def _discard(self):
        if self.part.is_dir():
            shutil.rmtree(self.part)
        else:
            self.part.unlink(missing_ok=True)

# ----------------------------------------------------------------------------------------------------------------------
# 4. Synthetic moving scenes
# ----------------------------------------------------------------------------------------------------------------------
# A canvas three frames wide is painted once: a gradient, 1/f noise, and "dead leaves", shapes of all sizes that hide each
# other; together they have the statistics of photographs (Lee, Mumford & Huang 2001).  A camera pans, zooms and turns over
# it; objects pass in front.  Objects are magenta, and nothing else ever is, so that a program can find them.

UNIT = 64                                   # lengths and speeds below are in pixels of a frame of 64, scaled by u = size / 64
HUE_BACK, HUE_OBJECT = 0.1, 0.4             # magenta() of every background pixel stays below, of every object pixel above


def magenta(rgb):
    """How magenta colours (..., 3) in [0, 1] are, in [-1, 1]: min(R, B) - G."""
    return torch.minimum(rgb[..., 0], rgb[..., 2]) - rgb[..., 1]


def _glide(rng, reach, speed):
    """A function of time that moves at about `speed` per frame, either way, within [-reach, reach], and turns softly."""
    k, phase = 0.98, rng.uniform(0, 2 * math.pi)                                    # k = 1: a triangle wave, sharp corners
    rate = math.pi / 2 * speed / reach
    return lambda t: reach * np.arcsin(k * np.sin(rate * t + phase)) / math.asin(k)


def _either(rng, low, high):
    """Zero a quarter of the time, else anything between low and high on a logarithmic scale."""
    return 0.0 if rng.uniform() < 0.25 else math.exp(rng.uniform(math.log(low), math.log(high)))


def _noise(rng, n):
    """Four (n, n) fields of unit variance, two smooth and two rough, their amplitude falling as a power of frequency."""
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.fftfreq(n)[None]).astype(np.float32)
    f[0, 0] = np.inf
    white = rng.standard_normal((4, n, n), np.float32)
    smooth, rough = (np.fft.ifft2((re + 1j * im) * f ** np.float32(-slope)) for re, im, slope in
                     ((white[0], white[1], rng.uniform(1.3, 1.8)), (white[2], white[3], rng.uniform(0.7, 1.2))))
    x = np.stack([smooth.real, smooth.imag, rough.real, rough.imag])                # real and imaginary: two fields each
    return x / x.std((1, 2), keepdims=True)


def _outline(rng):
    """A random convex shape of radius at most 1.3: its signed distance, (x, y) -> negative inside."""
    kind, a, flat = rng.integers(3), rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 1)
    c, s = math.cos(a), math.sin(a)
    if kind == 0:                                                                   # ellipse
        return lambda x, y: (np.hypot(c * x + s * y, (c * y - s * x) / flat) - 1) * flat
    if kind == 1:                                                                   # box
        return lambda x, y: np.maximum(np.abs(c * x + s * y) - 0.85, np.abs(c * y - s * x) - 0.85 * flat)
    m = rng.integers(3, 7)                                                          # polygon of m sides
    sides = [(math.cos(b), math.sin(b), math.cos(math.pi / m) * rng.uniform(0.7, 0.9))
             for b in a + (np.arange(m) + rng.uniform(-0.08, 0.08, m)) * 2 * math.pi / m]
    return lambda x, y: np.maximum.reduce([bx * x + by * y - r for bx, by, r in sides])


def _canvas(rng, n, u):
    """The world: float32 (n, n, 3) in [0, 1]."""
    noise = _noise(rng, n)                                                          # (4, n, n)
    y, x = np.ogrid[0:n, 0:n]
    y, x = y.astype(np.float32), x.astype(np.float32)                               # (n, 1) (1, n)
    vivid, few = rng.uniform(0.1, 1), rng.integers(2, 7)
    palette = [colorsys.hsv_to_rgb(rng.uniform(), vivid * rng.beta(1.2, 1.5), rng.uniform(0.05, 1) ** 0.8) for _ in range(few)]
    spread = rng.uniform(0, 0.12)
    def colour():
        return np.clip(palette[rng.integers(few)] + rng.normal(0, spread, 3), 0, 1).astype(np.float32)
    def wave(X, Y, a):
        return X * np.float32(math.cos(a)) + Y * np.float32(math.sin(a))

    ramp = np.clip(0.5 + wave(x - n / 2, y - n / 2, rng.uniform(0, 7)) / (n * rng.uniform(0.3, 1)), 0, 1)[..., None]
    img = colour() * ramp + colour() * (1 - ramp)
    for field in noise[[0, 1, 3]]:                                                  # light and two tints
        img += field[..., None] * rng.uniform(0, 0.09, 3).astype(np.float32)
    soft = u * _either(rng, 0.8, 3) + 0.8 * u                                       # the focus: width of an edge
    sizes = np.exp(rng.uniform(math.log(2.5), math.log(55), int(rng.choice([0, 15, 40, 60, 60, 90]) * rng.uniform(0.6, 1))))
    for r in u * (np.sort(sizes)[::-1] if rng.uniform() < 0.5 else sizes):
        cx, cy = rng.uniform(0, n, 2)
        x0, x1, y0, y1 = (int(min(max(v, 0), n)) for v in (cx - 1.3 * r, cx + 1.3 * r + 1, cy - 1.3 * r, cy + 1.3 * r + 1))
        X, Y, part = x[:, x0:x1] - np.float32(cx), y[y0:y1] - np.float32(cy), noise[:, y0:y1, x0:x1]
        d = _outline(rng)(X / r, Y / r)                                             # (h, w), in radii
        if rng.uniform() < 0.4:                                                     # a ragged outline: foliage, rock, cloud
            d = d + part[0] * np.float32(rng.uniform(0.05, 0.25))
        cover = np.clip(0.5 - d * (r / soft), 0, 1)[..., None]
        shade = part[rng.integers(4)] * np.float32(_either(rng, 0.01, 0.2))
        shade = shade + wave(X, Y, rng.uniform(0, 7)) * (rng.normal() * 0.12 / r)
        if rng.uniform() < 0.12:                                                    # stripes
            k = 2 * math.pi / (u * rng.uniform(3, 14))
            shade = shade + rng.uniform(0.05, 0.3) * np.clip(2 * np.sin(wave(X, Y, rng.uniform(0, 7)) * k), -1, 1)
        view = img[y0:y1, x0:x1]
        view += cover.astype(np.float32) * (colour() + shade[..., None].astype(np.float32) - view)
    return np.clip((img - 0.5) * rng.uniform(0.6, 1.25) + 0.5 + rng.uniform(-0.12, 0.12), 0, 1).astype(np.float32)


def _object(rng, t, size, u):
    """One object at times t: its centres (T, 2), radii (T,), coverage (T, H, W, 1) and colours (T, H, W, 3)."""
    r, speed, a = u * rng.uniform(5, 11), u * math.exp(rng.uniform(math.log(0.3), math.log(2.5))), rng.uniform(0, 2 * math.pi)
    if rng.uniform() < 0.6:                                                         # stays in the frame, and bounces
        cx = size / 2 + _glide(rng, size / 2 - r, speed * math.cos(a))(t)
        cy = size / 2 + _glide(rng, size / 2 - r, speed * math.sin(a))(t)
    else:                                                                           # crosses it, leaves, and comes back
        span = size + 4 * r
        along = (rng.uniform(0, span) + speed * t) % span - 2 * r
        across = rng.uniform(r, size - r) + _glide(rng, 6 * u, 0.2 * speed)(t)
        cx, cy = (along, across) if rng.uniform() < 0.7 else (across, along)
        if rng.uniform() < 0.5:
            cx, cy = size - cx, size - cy
    r = r * np.exp(_glide(rng, 0.15, _either(rng, 0.002, 0.02))(t))
    outline, spin = _outline(rng), rng.uniform(-0.06, 0.06) * t

    frame = lambda v: v.astype(np.float32)[:, None, None]                           # (T,) -> (T, 1, 1)
    X = np.arange(size, dtype=np.float32)[None, None, :] + 0.5 - frame(cx)          # (T, 1, W), pixels from the centre
    Y = np.arange(size, dtype=np.float32)[None, :, None] + 0.5 - frame(cy)          # (T, H, 1)
    c, s = frame(np.cos(spin) / r), frame(np.sin(spin) / r)
    x, y = c * X + s * Y, c * Y - s * X                                             # (T, H, W), in radii, turning with it
    cover = np.clip(0.5 - outline(x, y) * (frame(r) / np.float32(u)), 0, 1)
    light = 1 + 0.15 * np.clip(x, -1, 1)                                            # one side is darker, so that spin shows
    rgb = np.array([rng.uniform(0.65, 0.87), rng.uniform(0, 0.12), rng.uniform(0.65, 0.87)], np.float32)
    return np.stack([cx, cy], -1), r, cover[..., None], light[..., None] * rgb


def synthetic_scene(seed, index, frames=8, size=64):
    """A moving scene: uint8 (frames, size, size, 3), and the truth about it.  A function of (seed, index, size) alone.

    Frame t does not depend on `frames`: the first 8 of 40 are the 8.  The truth, in pixels and radians:
      camera   float32 (frames, 4): dx, dy of its centre from the canvas's, zoom (above 1 enlarges), angle
      centres  float32 (frames, objects, 2): x, y of each object in the frame, or outside it
      radii    float32 (frames, objects)
      present  bool (frames, objects): the centre lies inside the frame (later objects may cover earlier ones)"""
    rng = np.random.default_rng([seed, index])
    u, n, t = size / UNIT, 3 * size, np.arange(frames)
    world = torch.from_numpy(_canvas(rng, n, u)).permute(2, 0, 1)[None]             # (1, 3, n, n)

    # reach 36, zoom >= 0.78, half a diagonal 45: the camera never sees beyond the canvas's 96
    speed, a = u * _either(rng, 0.2, 2.5), rng.uniform(0, 2 * math.pi)              # each of pan, zoom and turn may rest
    dx, dy = (_glide(rng, 36 * u, speed * v)(t) for v in (math.cos(a), math.sin(a)))
    zoom = np.exp(_glide(rng, 0.25, _either(rng, 0.003, 0.03))(t))
    angle = _glide(rng, 0.6, rng.choice([0, 1]) * _either(rng, 0.003, 0.03))(t)
    c, s = np.cos(angle) / zoom, np.sin(angle) / zoom
    theta = np.stack([c, -s, 2 * dx / size, s, c, 2 * dy / size], -1).reshape(-1, 2, 3) * size / n
    grid = F.affine_grid(torch.from_numpy(theta).float(), (frames, 3, size, size), align_corners=False)
    x = F.grid_sample(world.expand(frames, -1, -1, -1), grid, align_corners=False)
    x = x.permute(0, 2, 3, 1).contiguous()                                          # (T, H, W, 3)
    x[..., 1] += (magenta(x) - HUE_BACK).clamp(min=0)

    objects = [_object(rng, t, size, u) for _ in range(rng.choice([0, 1, 1, 2, 2, 3]))]
    for _, _, cover, rgb in objects:
        x += torch.from_numpy(cover) * (torch.from_numpy(rgb) - x)
    centres = np.stack([o[0] for o in objects], 1) if objects else np.zeros((frames, 0, 2))
    radii = np.stack([o[1] for o in objects], 1) if objects else np.zeros((frames, 0))
    truth = {"camera": np.stack([dx, dy, zoom, angle], -1), "centres": centres, "radii": radii}
    truth = {k: torch.from_numpy(v).float() for k, v in truth.items()}
    truth["present"] = ((truth["centres"] >= 0) & (truth["centres"] < size)).all(-1)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8), truth


# ----------------------------------------------------------------------------------------------------------------------
# 5. Motion and noise: what a clip tells the model about itself
# ----------------------------------------------------------------------------------------------------------------------

# ExVideo's training script sorts clips into 128 buckets by these lower bounds, here in units of 1e-9
EXVIDEO_MOTION = (
    0, 12205946, 15117834, 18080613, 20614484, 21959992, 24088068, 26323952, 28277775, 29968588, 31836554, 33596724,
    35121530, 37200287, 38914755, 40696491, 42368013, 44265781, 46311017, 48243891, 50294187, 52142400, 53634230, 55612389,
    57594258, 59410289, 61283995, 63603796, 65192916, 67146860, 69066539, 70390493, 72588451, 73959745, 75889029, 77695683,
    79783581, 82162730, 84092639, 85958421, 87700523, 89684933, 91688842, 93335517, 94987206, 96664011, 98314710, 100262381,
    101984538, 103404313, 105280340, 106974818, 109028399, 111164779, 113065213, 114362158, 116407216, 118063427, 119524263,
    121835820, 124242283, 126202747, 128989249, 131672353, 133417681, 135567948, 137313649, 139189199, 140912935, 143525436,
    145718485, 148315132, 151039496, 153218940, 155252382, 157651082, 159966752, 162195817, 164811596, 167341709, 170251891,
    172651157, 175550997, 178372145, 181039348, 183565900, 186599866, 190071866, 192574754, 195026234, 198099136, 200210452,
    202522039, 205410406, 208610669, 211623028, 214723110, 218520239, 222194016, 225363150, 229384825, 233422622, 237012610,
    240735114, 243622541, 247465774, 252190471, 257356376, 261856794, 266556412, 271076709, 277361482, 281250387, 286582440,
    291158527, 296712339, 303008437, 311793238, 318485111, 326999635, 332138240, 341770738, 354188830, 365194678, 379234344,
    401538879, 416078776, 440871328,
)
AUG_LOG_MEAN, AUG_LOG_STD = -3.0, 0.5       # ln sigma of the noise on a condition image: SVD's choice


def motion_score(video):
    """How much a clip moves: float >= 0, for (T, 3, H, W) in [-1, 1] or a list of its frames.

    Standard deviation over time (unbiased), averaged over channels and pixels, as ExVideo's script measures it; 0 if T = 1.
    Summed in float64, so that every machine and every order of summation finds the same bucket."""
    mean = sum(x.double() for x in video) / len(video)
    return (sum((x - mean).square() for x in video) / max(len(video) - 1, 1)).sqrt().mean().item()


def motion_bucket(score, scale="exvideo"):
    """The motion id of a score: "exvideo", the last of its 128 thresholds not above the score; a number, that number."""
    if scale == "exvideo":
        return float(max(0, bisect.bisect_right(EXVIDEO_MOTION, score, key=lambda t: t / 1e9) - 1))
    try:
        return float(scale)
    except ValueError:
        raise MediaError(f"motion scale {scale!r} is not known; use exvideo, or one number for all clips") from None


def draw_condition(seed, name, frame, size):
    """The noise on frame number `frame` of the file `name` as a condition image: sigma float32 (), noise (3, H, W)."""
    key = hashlib.blake2b(os.fsencode(f"{seed}/{name}/{frame}"), digest_size=8).digest()
    g = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    aug = torch.exp(AUG_LOG_MEAN + AUG_LOG_STD * torch.randn((), generator=g))
    return aug, torch.randn(3, size[1], size[0], generator=g)


# ----------------------------------------------------------------------------------------------------------------------
# 6. The index: every file of a data set decoded once, before anything relies on it
# ----------------------------------------------------------------------------------------------------------------------
# A frame's number is its place among the frames that decode, in the order shown.  Headers are not believed: they count
# frames that are damaged, hidden or not there.  A shot is what lies between two hard cuts; clips never cross one.

INDEX_VERSION = 1
SYNTHETIC_FPS = 8
SUFFIXES = set(".3gp .asf .avi .flv .gif .h264 .hevc .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv "
               ".y4m".split())              # looked at in folders; a list may name anything


def list_files(source):
    """The files of a data set: {name: path}, sorted; a name is the path relative to the folder (the list's folder).

    source: a folder, searched recursively; a .txt file with a path per line; a .csv file with a column path, video or
    file (else its first); a .json list of paths or {"path": ...}, as Open-Sora-Plan's.  Raises MediaError."""
    source = Path(source)
    root = source if source.is_dir() else source.parent
    try:
        if source.is_dir():
            found = (p.relative_to(source) for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            paths = [p for p in found if p.name[0] != "."]
        elif source.suffix.lower() == ".json":
            items = json.loads(source.read_text())
            paths = [item if isinstance(item, str) else item["path"] for item in items]
        elif source.suffix.lower() == ".csv":
            rows = [row for row in csv.reader(source.read_text().splitlines()) if row]
            head = [cell.strip().lower() for cell in rows[0]] if rows else []
            named = [head.index(word) for word in ("path", "video", "file") if word in head]
            paths = [row[named[0]] for row in rows[1:]] if named else [row[0] for row in rows]
        elif source.suffix.lower() == ".txt":
            lines = map(str.strip, source.read_text().splitlines())
            paths = [line for line in lines if line and line[0] != "#"]
        else:
            raise ValueError("it is neither there as a folder nor a .txt, .csv or .json list")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        e = "its items have no path" if isinstance(e, (KeyError, TypeError, IndexError)) else _reason(e)
        raise MediaError(f"{source}: not a set of videos ({e}); give a folder, a list of paths, or synthetic") from None
    files = {}
    for path in paths:
        path = os.path.abspath(root / path)
        name = os.path.relpath(path, os.path.abspath(root))
        files[path.lstrip("/") if name.startswith("..") else name] = path
    return dict(sorted(files.items()))


def _decode(container, stream):
    """Frames in the order shown; None for a damaged packet or frame, after which decoding goes on."""
    stream.codec_context.thread_count = 1   # with more, an error would surface at another packet from one run to the next
    packets, failures = container.demux(stream), 0
    while failures < 100:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            frames, failures = packet.decode(), 0
        except (av.FFmpegError, ValueError):
            failures += 1
            packets = container.demux(stream)                                       # goes on behind the damage
            frames = [None]
        for frame in frames:
            yield None if frame is None or frame.is_corrupt else frame


CUT_JUMP, CUT_RATIO = 0.04, 2.0             # mean difference of thumbnails in [0, 1]; times the third largest step nearby


def find_cuts(lags):
    """Numbers of the frames that follow a hard cut.  lags (N, 3): distances of each frame from the 1, 2 and 3 before it.

    At a cut both frames before differ from both after (a flash of one frame does not), and by far more than frames nearby
    differ from each other (fast motion does not; nor do drawings that move every other or third frame)."""
    pad = np.full((1, 3), np.inf)
    after = np.concatenate([lags[1:], pad])
    jump = np.minimum(lags[:, :2].min(1), after[:, 1:].min(1))
    steps = np.pad(np.where(np.isfinite(lags[:, 0]), lags[:, 0], 0), 6, "reflect")
    near = np.lib.stride_tricks.sliding_window_view(steps, 13).copy()               # (N, 13)
    near[:, 6] = 0
    level = np.partition(near, -3)[:, -3]                                           # two other cuts may be nearby
    cut = np.isfinite(jump) & (jump > CUT_JUMP) & (jump > CUT_RATIO * level)
    return [int(t) for t in np.flatnonzero(cut)]


def scan(path):
    """What the index keeps of one file, as JSON; {"error": ...} if no frame of it can be had."""
    pts, lags, recent, bad, interlaced, healthy = [], [], deque(maxlen=3), 0, 0, True
    try:
        with open(path, "rb") as f, av.open(_Unnamed(f), options=SAFE) as c:
            s = _best_stream(c)
            for frame in _decode(c, s):
                if frame is None:
                    bad, healthy = bad + 1, False
                    continue
                x = frame.reformat(32, 18, "rgb24", interpolation=Interpolation.AREA).to_ndarray().astype(np.float32) / 255
                # until the next key frame the picture may be damaged; that it jumps back then is no cut
                lags.append([healthy * float(np.abs(x - y).mean()) for y in recent] + [math.inf] * (3 - len(recent)))
                healthy |= frame.key_frame
                recent.appendleft(x)
                pts.append(frame.pts)
                interlaced += frame.interlaced_frame
                last = frame
            base, rate, codec = s.time_base, s.average_rate or s.guessed_rate or 25, s.codec_context.codec.canonical_name
            aspect = s.sample_aspect_ratio or 1
    except (OSError, av.FFmpegError, ValueError, LookupError, EOFError, MemoryError) as e:
        return {"error": f"unreadable: {_reason(e)}"}
    if not pts:
        return {"error": f"broken: opens, but none of its frames can be decoded ({bad} bad packets)"}
    stamped = None not in pts and all(a < b for a, b in zip(pts, pts[1:]))
    if not stamped:                         # as in AVI with B frames; frames are then found by counting, not by seeking
        pts, base = range(len(pts)), 1 / Fraction(rate)
    lags = np.array(lags)
    cuts = find_cuts(lags)
    shots = zip([0, *cuts], [*cuts, len(pts)])
    width, height = round(last.width * aspect), last.height
    steps, first = np.diff(pts), np.flatnonzero(np.diff(np.diff(pts), prepend=-1))  # runs of equal steps
    runs = np.diff(first, append=len(steps))
    return {"codec": codec, "frames": len(pts), "bad": bad, "interlaced": 2 * interlaced > len(pts), "stamped": stamped,
            "size": [height, width] if last.rotation % 180 else [width, height],    # upright, of square pixels
            "base": [base.numerator, base.denominator], "start": int(pts[0]),
            "steps": [[int(steps[i]), int(n)] for i, n in zip(first, runs)], "cuts": cuts,
            "change": [round(float(lags[a + 1:b, 0].mean()), 6) if b > a + 1 else 0.0 for a, b in shots]}


def _stamps(entry):
    """Presentation times of a file's frames, in units of its time base: int64 (N,)."""
    steps = [np.full(n, step) for step, n in entry["steps"]]
    return np.cumsum(np.concatenate([[entry["start"]], *steps])).astype(np.int64)


def _times(entry):
    """The same in seconds, float64 (N,)."""
    return _stamps(entry) * (entry["base"][0] / entry["base"][1])


def build_index(source, files):
    """{name: what scan() found}, from the cache where size and mtime of a file are as they were, else by decoding it.

    The cache, JSON, lies in the data set's folder, or if that is read-only under ~/.cache."""
    source = Path(os.path.abspath(source))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "exsvd"
    caches = [source / ".exsvd-index.json" if source.is_dir() else source.with_name(f".{source.name}.exsvd-index.json"),
              home / (hashlib.blake2b(os.fsencode(source), digest_size=12).hexdigest() + ".json")]
    old, index, keys = {}, {}, {}
    for cache in reversed(caches):
        try:
            known = json.loads(cache.read_text())
            old |= known["files"] if known["version"] == INDEX_VERSION else {}
        except (OSError, ValueError, LookupError, TypeError):                       # none yet, or not ours: built anew
            pass
    for name, path in files.items():
        try:
            with open(path, "rb") as f:     # what cannot be opened now may be another time: that is not kept
                stat = os.fstat(f.fileno())
            keys[name] = [stat.st_size, stat.st_mtime_ns]
            if old.get(name, {}).get("key") == keys[name]:
                index[name] = old[name]
        except OSError as e:
            index[name] = {"error": f"unreadable: {_reason(e)}"}

    def save():
        for cache in caches:
            try:
                cache.parent.mkdir(parents=True, exist_ok=True)
                return _write(cache, _json({"version": INDEX_VERSION, "files": {n: e for n, e in index.items() if "key" in e}}))
            except OSError:
                continue
        tqdm.write(f"neither {caches[0].parent} nor {home} can be written: the index is not kept", file=sys.stderr)

    todo, saved = [name for name in files if name not in index], time.monotonic()
    if todo:
        pool = ThreadPoolExecutor(os.cpu_count())                                   # decoding lets other threads run
        try:
            jobs = {pool.submit(scan, files[name]): name for name in todo}
            for job in tqdm(as_completed(jobs), "index", len(todo), unit="file"):
                index[jobs[job]] = job.result() | {"key": keys[jobs[job]]}
                if time.monotonic() > saved + 60:
                    save()
                    saved = time.monotonic()
        finally:                            # an interrupted build goes on where it was
            pool.shutdown(cancel_futures=True)
            save()
    return {name: index[name] for name in files}


# ----------------------------------------------------------------------------------------------------------------------
# 7. Clips
# ----------------------------------------------------------------------------------------------------------------------

def _rate(times):
    """Frames per second, the mean over all of `times`."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 1.0


def _middles(times):
    """Times until which each frame is the nearest one, (N,)."""
    return np.append((times[1:] + times[:-1]) / 2, times[-1] + 0.5 / _rate(times[-2:]))


def spans(entry, frames, stride, fps):
    """Where clips can start: [(first, count)], one for each shot that is long enough."""
    bounds = [0, *entry["cuts"], entry["frames"]]
    if fps is None:
        found = [(a, b - a - (frames - 1) * stride) for a, b in zip(bounds, bounds[1:])]
    else:
        t = _times(entry)
        found = [(a, int(np.searchsorted(t[a:b], m - (frames - 1) / fps, "right")))
                 for a, b, m in zip(bounds, bounds[1:], _middles(t)[np.array(bounds[1:]) - 1])]
    return [(a, n) for a, n in found if n > 0]


def picks(times, start, frames, stride, fps):
    """The numbers of a clip's frames, int64 (T,): every stride-th, or those shown nearest to each 1/fps."""
    if fps is None:
        return start + stride * np.arange(frames)
    return np.searchsorted(_middles(times), times[start] + np.arange(frames) / fps)


def _numbered(path, entry, size, wanted=None, seek=None):
    """(number, pixels) of a file's frames from its start, or from the key frame at or before the time stamp `seek`.

    Pixels are float32 (3, H, W) in [-1, 1]; None for frames that are not among `wanted`."""
    places = {stamp: i for i, stamp in enumerate(_stamps(entry).tolist())}
    with _open(path) as f, av.open(_Unnamed(f), options=SAFE) as c:
        s = _best_stream(c)
        aspect = s.sample_aspect_ratio or 1
        if seek is not None:
            c.seek(int(seek), stream=s)
        for count, frame in enumerate(frame for frame in _decode(c, s) if frame is not None):
            i = places.get(frame.pts) if entry["stamped"] else count
            if wanted is None or i in wanted:
                yield i, fit_image(_turned(frame), *size, 1 / aspect if frame.rotation % 180 else aspect)
            elif i is not None:             # damage may let frames through after a seek that the index does not have
                yield i, None


def read_clip(path, entry, numbers, size):
    """Frames of a video by number: float32 (T, 3, H, W) in [-1, 1]; size (W, H).  Raises MediaError."""
    first, last, wanted = int(numbers[0]), int(numbers[-1]), set(map(int, numbers))
    at, second = _stamps(entry)[first], entry["base"][1] / entry["base"][0]         # in units of the time base
    reason = "its frames are not those of the index"
    for seek in [at, at - 2 * second, at - 20 * second, None] if entry["stamped"] else [None]:
        got = {}                            # a key frame is sought by decoding time, and may be shown after `first`
        try:
            for i, pixels in _numbered(path, entry, size, wanted, seek):
                if pixels is not None:
                    got[i] = pixels
                if i >= last or i > first and first not in got:
                    break
        except (av.FFmpegError, ValueError, LookupError, EOFError) as e:            # not every container can seek
            reason = _reason(e)
        if len(got) == len(wanted):
            return torch.stack([got[int(i)] for i in numbers])
    raise MediaError(f"{path}: cannot be read as it was indexed ({reason}); put the file back, or start again without it")


class Clips:
    """An endless stream of clips: item n is a function of (seed, n) alone, whatever process asks for it.

    Each epoch takes one clip, anywhere in it, from every usable file, in a new order."""

    def __init__(self, source, index, frames, size, stride, fps, seed, motion, skip_static=0.0):
        self.source, self.frames, self.size, self.stride, self.fps = str(source), frames, tuple(size), stride, fps
        self.seed, self.motion, self.skip_static, self.index, self.left_out = seed, motion, skip_static, index, {}
        self.usable, self.order = {}, (None, None)
        for name, entry in index.items():
            if "error" in entry:
                self.left_out[name] = entry["error"]
                continue
            found, shots = spans(entry, frames, stride, fps), [0, *entry["cuts"]]
            moving = [(a, n) for a, n in found if entry["change"][shots.index(a)] >= skip_static]
            if moving:
                self.usable[name] = moving
            elif found:
                self.left_out[name] = f"static: neighbouring frames differ by {max(entry['change'])}, {skip_static} needed"
            else:
                longest = max(np.diff([*shots, entry["frames"]]))
                needed = math.ceil((frames - 1) * (_rate(_times(entry)) / fps if fps else stride)) + 1
                self.left_out[name] = (f"too short: {entry['frames']} frames found, {longest} of them without a cut, "
                                       f"{needed} needed" + (f" ({entry['bad']} bad packets)" if entry["bad"] else ""))
        self.names, self.clips = list(self.usable), len(self.usable)

    def reasons(self):
        return Counter(why.split(":")[0] for why in self.left_out.values())

    def describe(self):
        """One line: how many files are used, and how many are not for each reason."""
        starts = sum(n for found in self.usable.values() for _, n in found)
        rate = f"{self.fps:g} fps" if self.fps else f"stride {self.stride}"
        return (f"{self.source}: {self.clips} of {len(self.index)} files hold {starts:,} clips of {self.frames} frames at {rate}"
                + "".join(f", {n} {why}" for why, n in sorted(self.reasons().items())))

    def _where(self, n):
        epoch, i = divmod(n, self.clips)
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(self.clips)
        name = self.names[self.order[1][i]]
        k = int(np.random.default_rng([self.seed, 1, n]).integers(sum(count for _, count in self.usable[name])))
        for first, count in self.usable[name]:
            if k < count:
                return name, first + k
            k -= count

    def _times(self, name):
        return _times(self.index[name])

    def __getitem__(self, n):
        name, start = self._where(int(n))
        times = self._times(name)                                                   # (N,), seconds
        numbers = picks(times, start, self.frames, self.stride, self.fps)           # (T,)
        item = self._load(name, numbers)
        fps = _rate(times[numbers]) if self.frames > 1 else _rate(times)
        return item | {"fps": torch.tensor(fps, dtype=torch.float32), "name": f"{name}@{start}",
                       "motion": torch.tensor(motion_bucket(item.pop("score"), self.motion))}


class VideoClips(Clips):
    """Items: "video" (T, 3, H, W) in [-1, 1], "fps", "motion", "aug", "aug_noise" (3, H, W), "name"; all tensors float32."""
    pixels = True

    def __init__(self, files, *args):
        super().__init__(*args)
        self.files = files

    def _video(self, name, numbers):
        return read_clip(self.files[name], self.index[name], numbers, self.size)

    def _load(self, name, numbers):
        video = self._video(name, numbers)
        aug, noise = draw_condition(self.seed, name, int(numbers[0]), self.size)
        return {"video": video, "score": motion_score(video), "aug": aug, "aug_noise": noise}


class SyntheticClips(VideoClips):
    """The same of synthetic_scene: scene n for item n, SYNTHETIC_FPS frames per second before any stride."""

    def __init__(self, *args):
        super().__init__({}, "synthetic", {}, *args)
        if self.fps and self.fps > SYNTHETIC_FPS:
            raise MediaError(f"synthetic scenes have {SYNTHETIC_FPS} frames per second, not {self.fps:g}; ask for fewer")
        self.clips = 10_000                 # for printing: there is no end to them

    def describe(self):
        return f"synthetic scenes: clips of {self.frames} frames, {self.size[0]}x{self.size[1]} pixels"

    def _where(self, n):
        return f"scene {n}", 0

    def _times(self, name):
        stride = self.stride if self.fps is None else math.ceil(SYNTHETIC_FPS / self.fps)
        return np.arange(self.frames * stride) / SYNTHETIC_FPS

    def _video(self, name, numbers):
        W, H = self.size
        scene, _ = synthetic_scene(self.seed, int(name.split()[1]), int(numbers[-1]) + 1, max(W, H))
        return torch.stack([fit_image(scene[i], W, H) for i in numbers.tolist()])


class LatentClips(Clips):
    """Clips encoded by encode().  Items: "latents" (T, 4, h, w), "cond" (4, h, w), "ctx" (D,), "fps", "motion", "aug", "name".

    The motion scores in it are those of clips of the frames, stride and fps it was encoded for, so others are refused
    unless `motion` is a number.  The condition noise is that of the seed it was encoded with."""
    pixels = False

    def __init__(self, source, frames, size, stride, fps, seed, motion, skip_static=0.0):
        store = _read_store(source)
        self.settings = store["settings"]
        skip_static = max(skip_static, self.settings["skip_static"])
        super().__init__(source, store["files"], frames, size, stride, fps, seed, motion, skip_static)
        asked = {"size": list(self.size)} | ({"frames": frames, "stride": stride, "fps": fps} if motion == "exvideo" else {})
        for key, value in asked.items():
            if self.settings[key] != value:
                raise MediaError(f"{source}: was encoded with {key} {self.settings[key]}, not {value}; use that, encode again"
                                 + ("" if key == "size" else ", or give all clips one motion bucket, as in --motion 127"))
        self.missing = store["of"] - len(self.index)

    def describe(self):
        rest = f"; {self.missing} files are not encoded yet: run data.py encode again" if self.missing else ""
        return f"{super().describe()}; latents of {'{}x{}'.format(*self.size)} pixels, seed {self.settings['seed']}{rest}"

    def _load(self, name, numbers):
        first, last = int(numbers[0]), int(numbers[-1])
        try:
            with safe_open(_shard(self.source, name), "pt") as f:
                one = lambda key: f.get_slice(key)[first:first + 1][0]
                latents = f.get_slice("latents")[first:last + 1][torch.from_numpy(numbers - first)]
                return {"latents": latents.float(), "cond": one("cond").float(), "ctx": one("ctx").float(), "aug": one("aug"),
                        "score": one("motion").item()}
        except (OSError, SafetensorError) as e:
            raise MediaError(f"{_shard(self.source, name)}: cannot be read ({_reason(e)}); run data.py encode again") from None


def open_dataset(source, frames=40, size=(64, 64), stride=1, fps=None, seed=0, motion="exvideo", skip_static=0.0, log=None):
    """The clips of a data set: dataset[n] for n = 0, 1, 2, ... without end; see VideoClips and LatentClips for the items.

    source: "synthetic", anything list_files() takes, or a folder written by encode(). A clip is `frames` frames, every
    stride-th one or, with fps, those nearest to each 1/fps; size is (W, H), shorter side resized, centre cropped.
    skip_static: shots whose thumbnails change less from frame to frame, 0 to 1, are left out (0.002: a still picture).
    log: a file that will name what is left out, and why. Raises MediaError, also when nothing is left.
    Of several processes one must come first: it builds the index that the others then find."""
    if frames < 1 or stride < 1 or fps is not None and not fps > 0 or seed < 0 or min(size) < 8:
        raise MediaError(f"frames {frames}, stride {stride}, fps {fps}, seed {seed}, size {size}: all must be positive")
    motion_bucket(0.0, motion)              # raises if the scale is not known
    dataset = _clips(source, skip_static, frames, size, stride, fps, seed, motion)
    if log is not None:
        _write(log, "".join(f"{name}\t{why}\n" for name, why in dataset.left_out.items()))
    if not dataset.clips:
        raise MediaError(f"{dataset.describe()}: nothing is left to use; python data.py check says why")
    return dataset


def _clips(source, skip_static, *settings):
    if str(source) == "synthetic":
        return SyntheticClips(*settings)
    if os.path.exists(os.path.join(source, STORE)):
        return LatentClips(source, *settings, skip_static)
    files = list_files(source)
    return VideoClips(files, source, build_index(source, files), *settings, skip_static)


# ----------------------------------------------------------------------------------------------------------------------
# 8. Encoding a data set once, so that training needs neither VAE nor CLIP
# ----------------------------------------------------------------------------------------------------------------------
# One .safetensors file per video, and latents.json, which says with what settings.  Per frame: its mean latent; as if a
# clip began there, its condition latent, CLIP embedding, and motion score; its time.

STORE = "latents.json"


def _shard(folder, name):
    return os.path.join(folder, name + ".safetensors")


def _read_store(folder):
    try:
        store = json.loads(Path(folder, STORE).read_text())
        return {key: store[key] for key in ("settings", "files", "of")}
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise MediaError(f"{folder}/{STORE}: cannot be read ({_reason(e)}); encode into another folder") from None


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
    frame, aug, noise = (torch.as_tensor(x).to(next(vae.parameters()).device) for x in (frame, aug, noise))
    ctx = clip(exsvd.preprocess_clip(frame[None], clip.config.image))
    return vae.encode((frame + aug * noise)[None])[0], ctx[0]


def _write_rows(path, shapes, rows, meta):
    """A .safetensors file of more than fits in memory.  shapes: {name: (dtype, shape)}; rows: (name, i, tensor), any order.

    The format (8 bytes of length, a JSON header, the tensors) is simple enough to be filled in place."""
    kind = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header, end = {"__metadata__": {"exsvd": _json(meta)}}, 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind[dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.part", "wb") as f:   # left behind by a kill, and then written anew by the next run
        f.write(struct.pack("<Q", len(head)) + head)
        f.truncate(8 + len(head) + end)
        for name, i, row in rows:
            row = torch.as_tensor(row, dtype=shapes[name][0]).detach().cpu().reshape(-1)
            f.seek(8 + len(head) + header[name]["data_offsets"][0] + i * row.nbytes)
            f.write(row.view(torch.uint8).numpy())
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.part", path)


def _encoded(dataset, name, vae, clip, bar):
    """All rows of one file's shard; holds no more frames than a clip spans."""
    entry, times = dataset.index[name], dataset._times(name)
    numbers = lambda start: picks(times, start, dataset.frames, dataset.stride, dataset.fps).tolist()
    starts = deque(first + k for first, count in dataset.usable[name] for k in range(count))
    window, last = {}, -1
    for i, frame in _numbered(dataset.files[name], entry, dataset.size):
        aug, noise = draw_condition(dataset.seed, name, i, dataset.size)
        cond, ctx = encode_condition(vae, clip, frame, aug, noise)
        yield from (("time", i, times[i]), ("aug", i, aug), ("cond", i, cond), ("ctx", i, ctx))
        yield "latents", i, encode_frames(vae, frame[None])
        window[i], last = frame.to(cond.device), i
        while starts and numbers(starts[0])[-1] <= i:
            yield "motion", starts[0], motion_score([window[k] for k in numbers(starts[0])])
            starts.popleft()
        window = {k: x for k, x in window.items() if starts and k >= starts[0]}
        bar.update()
    if last != entry["frames"] - 1:
        raise MediaError(f"{dataset.files[name]}: cannot be read as it was indexed; put the file back, or leave it out")


def encode(model, source, out, dtype=torch.float32, device="cpu", **settings):
    """Encodes all usable files of a data set into the folder `out`; what is there already is kept.  settings: open_dataset's.

    dtype: of latents and embeddings in the files.  Raises MediaError, also if `out` was begun with other settings."""
    dataset = open_dataset(source, **settings)
    if not dataset.pixels or isinstance(dataset, SyntheticClips):
        raise MediaError(f"{source}: is not a set of videos; train.py takes it as it is")
    svd = exsvd.load(model, device=device, parts=("vae", "clip"))
    weights = hashlib.blake2b(digest_size=8)                                        # two tensors tell one model from another
    for x in (svd.vae.quant_conv.weight, svd.clip.proj):
        weights.update(x.detach().cpu().numpy().tobytes())
    ours = {"model": weights.hexdigest(), "ctx": svd.clip.config.out_dim, "dtype": str(dtype).split(".")[1], "seed": dataset.seed,
            "size": list(dataset.size), "frames": dataset.frames, "stride": dataset.stride, "fps": dataset.fps,
            "skip_static": dataset.skip_static}
    if os.path.exists(os.path.join(out, STORE)):
        theirs = _read_store(out)["settings"]
        wrong = [key for key in ours if theirs.get(key) != ours[key]]
        if wrong:
            raise MediaError(f"{out}: was begun with {wrong[0]} {theirs.get(wrong[0])}, not {ours[wrong[0]]}; encode into another "
                             "folder")

    def finished(name):
        try:
            with safe_open(_shard(out, name), "pt") as f:
                return f.metadata()["exsvd"] == _json(ours | {"file": dataset.index[name]})
        except (OSError, SafetensorError, LookupError, TypeError):
            return False

    def save():
        Path(out).mkdir(parents=True, exist_ok=True)
        files = {name: dataset.index[name] for name in dataset.names if name in done}
        _write(Path(out, STORE), _json({"settings": ours, "files": files, "of": dataset.clips}))

    done = set(filter(finished, dataset.names))
    save()
    todo, saved, (W, H) = [name for name in dataset.names if name not in done], time.monotonic(), dataset.size
    with tqdm(desc="encode", total=sum(dataset.index[name]["frames"] for name in todo), unit="frame") as bar:
        for name in todo:
            n, latent = dataset.index[name]["frames"], (4, H // 8, W // 8)
            shapes = {"time": (torch.float64, (n,)), "motion": (torch.float64, (n,)), "aug": (torch.float32, (n,)),
                      "latents": (dtype, (n, *latent)), "cond": (dtype, (n, *latent)), "ctx": (dtype, (n, ours["ctx"]))}
            rows = _encoded(dataset, name, svd.vae, svd.clip, bar)
            _write_rows(_shard(out, name), shapes, rows, ours | {"file": dataset.index[name]})
            done.add(name)
            if time.monotonic() > saved + 60:
                save()
                saved = time.monotonic()
    save()
    return dataset


# ----------------------------------------------------------------------------------------------------------------------
# 9. Command line: python data.py check videos/;  python data.py encode --model M --data videos/ --out latents/
# ----------------------------------------------------------------------------------------------------------------------

def check(source, frames, size, stride, fps, skip_static):
    """Prints what of a data set would be used, and why not the rest.  Returns the number of usable files."""
    dataset = _clips(source, skip_static, frames, size or (64, 64), stride, fps, 0, "0")
    for name, why in dataset.left_out.items():
        print(f"  left out  {name}: {why}")
    print(dataset.describe())
    used = [dataset.index[name] for name in dataset.names]
    if used:
        rates, sizes = [_rate(_times(e)) for e in used], sorted((e["size"] for e in used), key=math.prod)
        hours = sum(_times(e)[-1] - _times(e)[0] for e in used) / 3600
        codecs = ", ".join(f"{codec} ({n})" for codec, n in Counter(e["codec"] for e in used).most_common())
        variable = sum(np.ptp([step for step, _ in e["steps"]] or [0]) > 1 for e in used)               # by more than rounding
        print(f"  {hours:.2f} hours, {sum(len(e['cuts']) for e in used)} cuts; codecs {codecs}")
        print(f"  {min(rates):.5g} to {max(rates):.5g} frames per second, variable in {variable} files; "
              f"{'{}x{}'.format(*sizes[0])} to {'{}x{}'.format(*sizes[-1])} pixels")
        print(f"  {sum(e['interlaced'] for e in used)} interlaced (used as they are; better deinterlaced first), "
              f"{sum(e['bad'] > 0 for e in used)} with damaged packets ({sum(e['bad'] for e in used)}, whose frames are left out)")
        if size:
            print(f"  {sum(w < size[0] or h < size[1] for w, h in sizes)} smaller than {'{}x{}'.format(*size)}: enlarged")
        if fps:
            print(f"  {sum(rate < 0.95 * fps for rate in rates)} slower than {fps:g} frames per second: some frames are repeated")
    return dataset.clips


def _size(text):
    """WxH, multiples of 8."""
    W, H = map(int, text.lower().split("x"))
    if min(W, H) < 8 or W % 8 or H % 8:
        raise ValueError
    return W, H


def main():
    p = argparse.ArgumentParser(description="Look at a set of videos before training on it, or encode it once and for all.")
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="say what would be used, and why not the rest")
    c.add_argument("data", help="a folder, a .txt, .csv or .json list, or a folder of latents")
    e = commands.add_parser("encode", help="store latents and embeddings; the same command again goes on where it stopped")
    e.add_argument("--model", required=True, help="SVD-XT, a single file or a diffusers folder; its VAE and CLIP are used")
    e.add_argument("--data", required=True, help="a folder, or a .txt, .csv or .json list")
    e.add_argument("--out", required=True, help="a folder for the latents, one file per video")
    for q in (c, e):
        q.add_argument("--frames", type=int, help="of a clip (default: 128, as in the paper" + ("; toy: 40)" if q is e else ")"))
        q.add_argument("--stride", type=int, default=1, help="take every k-th frame (default: 1)")
        q.add_argument("--fps", type=float, help="take the frames nearest to this rate instead")
        q.add_argument("--skip-static", type=float, default=0.0, help="leave out shots that change less per frame; try 0.002")
        q.add_argument("--size", type=_size, metavar="WxH", help="pixels of a clip, multiples of 8" +
                       (" (default: 512x512; toy: 128x128)" if q is e else "; here only to count smaller videos"))
    e.add_argument("--seed", type=int, default=0, help="of the noise on condition images; train.py --seed then draws the same")
    e.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"],
                   help="of what is stored, computed in float32 (default: float16: latents off by 3e-4 of their norm, the loss of a "
                   "clip by up to 5e-5 of itself; bfloat16: 2e-3 and 9e-4; float32: what encoding on the fly gives, bit for bit)")
    e.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one")
    a = vars(p.parse_args())
    try:
        toy = "model" in a and exsvd.open_model(a["model"])[0]["unet"].meta.get("family") == "toy"
        a["frames"] = a["frames"] or (40 if toy else 128)
        if a.pop("command") == "check":
            return 0 if check(a.pop("data"), **a) else 1
        a["size"] = a["size"] or ((128, 128) if toy else (512, 512))
        print(encode(a.pop("model"), a.pop("data"), a.pop("out"), getattr(torch, a.pop("dtype")), a.pop("device"), **a).describe())
    except (MediaError, exsvd.WeightsError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
