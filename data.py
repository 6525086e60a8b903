"""Reads and writes pictures and videos, and makes clips for training out of a set of videos.

    python data.py check videos/       # which files would be used, and why the others would not
    python data.py encode --model svd_xt.safetensors --data videos/ --out latents/

    1. Reading                  read_image, read_video, video_frames, fit_image, to_float, ...
    2. Writing                  VideoWriter (.mp4, .webm, .gif, a folder of PNGs), write_png
    3. Motion and noise         motion_score, motion_bucket, draw_condition
    4. The index                list_files, scan, find_cuts, build_index
    5. Clips                    what an item of a dataset holds; open_dataset, check_item
    6. Encoding                 encode_frames, encode_condition, encode
    7. Command line             check, main

T frames, H W pixels; a size is (W, H). Pixels that were read are uint8 RGB with the channel last,
(H, W, 3) or (T, H, W, 3). fit_image makes them float32 (3, H, W) in [-1, 1], which the model takes.
Pillow reads pictures, FFmpeg reads videos (through PyAV). The colour profile of a picture is
applied; colour profiles of videos and the transfer curves of HDR are not.
"""
import argparse
import bisect
import contextlib
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import numbers
import os
import signal
import sys
import tempfile
import types
import warnings
import zlib
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
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import exsvd

# a damaged file gets one line from us; the messages of the libraries would hide it
av.logging.set_level(None)
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module="PIL")


def one_line(text):
    """Text with what cannot be printed escaped: file names may hold line breaks or bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class MediaError(ValueError):
    """A file or an item that cannot be used. The message is one line: which one, and what is wrong."""

    def __init__(self, message):
        # A DataLoader raises the error of a worker again, with the worker's traceback as the
        # message. Our own message is what follows the last "MediaError: " in it.
        super().__init__(one_line(message.rsplit("MediaError: ", 1)[-1].strip()))


def unreadable(path, reason):
    """The MediaError of a file that cannot be read. reason: a text, or the exception that a library raised."""
    if isinstance(reason, (LookupError, TypeError, AttributeError, AssertionError)):
        reason = "it is damaged"  # the texts of these say nothing to a user
    elif isinstance(reason, Exception):
        text = str(getattr(reason, "strerror", None) or reason or type(reason).__name__)
        reason = text.splitlines()[0].rstrip(". ")
    return MediaError(f"{path}: cannot be read: {reason}")


# --------------------------------------------------------------------------------------------------
# 1. Reading

MAX_PIXELS = 200_000_000  # of one frame; more would let a small file fill the memory
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses what has more than twice as many
PICTURES = "AVIF BMP DIB GIF ICO JPEG JPEG2000 PNG PPM QOI TIFF WEBP".split()  # FFmpeg reads the rest
HEIC = [b"ftyp" + x for x in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")]
# Bilinear, accurate rounding, full chroma. Without these flags swscale repeats chroma samples instead
# of interpolating them, and coloured edges come out wrong.
EXACT = 0x2 | 0x40000 | 0x2000
# A playlist must not open other files.
SAFE = {"protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}


def _open(path):
    try:
        return open(path, "rb")
    except (OSError, ValueError) as e:  # ValueError: a null byte in the name
        raise unreadable(path, e) from e


def _open_picture(path, file):
    """The file as a Pillow image that is not decoded yet, or None if it is none of PICTURES."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # here: accept damaged metadata; damaged pixels are still an error
    try:
        return Image.open(file, formats=PICTURES)
    except UnidentifiedImageError:
        return None
    except Exception as e:  # decoders of damaged files raise anything
        raise unreadable(path, e) from e
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _srgb(picture, profile):
    """A picture of mode L, RGB or CMYK in sRGB, as RGB. profile: ICC as bytes; one that does not fit is ignored."""
    candidates = [picture] if picture.mode == "CMYK" else [picture, picture.convert("RGB")]
    for image in candidates:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    return picture.convert("RGB")


def _still(path, picture):
    """The first frame of a Pillow image, upright, in sRGB, on white: uint8 (H, W, 3)."""
    box = picture.tile[0].extents if picture.format == "GIF" else None  # its first frame may be smaller than the GIF
    try:
        picture.load()
    except Exception as e:
        raise unreadable(path, e) from e
    with contextlib.suppress(Exception):  # damaged EXIF makes Pillow raise anything; the pixels are good
        picture = ImageOps.exif_transpose(picture)
    profile = picture.info.get("icc_profile", b"")
    if picture.mode[0] in "IF":  # grey with more than 8 bits, which convert() would clip
        x = np.asarray(picture)
        grey = np.nan_to_num(x * 255.0 if picture.mode == "F" else x / 257)
        grey[x == picture.info.get("transparency")] = 255
        picture = Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8))
    mode = {"CMYK": "CMYK", "1": "L", "L": "L", "LA": "L"}.get(picture.mode, "RGB")
    image = _srgb(picture.convert(mode), profile)
    if box or picture.has_transparency_data:
        page = Image.new("RGB", image.size, "white")
        alpha = picture.convert("RGBA").getchannel("A")
        page.paste(image.crop(box), box, alpha.crop(box))
        image = page
    return torch.from_numpy(np.array(image))


def _open_container(path, file):
    """An open file as a PyAV container.

    FFmpeg does not see the name, only the content: it would take a%03d.png or http://x for something else.
    """
    try:
        return av.open(types.SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell), options=SAFE)
    except Exception as e:
        raise unreadable(path, e) from e


def _best_stream(path, container):
    """The largest video stream. An attached picture (cover art) is taken only if there is nothing else."""
    streams = [s for s in container.streams.video if s.codec_context]  # None for SVG, which has no decoder
    if not streams:
        raise unreadable(path, "it holds no picture that can be decoded")
    cover = av.stream.Disposition.attached_pic
    best = max(streams, key=lambda s: (not s.disposition & cover, s.width * s.height))
    if best.width * best.height > MAX_PIXELS:
        raise unreadable(path, f"{best.width}x{best.height} pixels are more than {MAX_PIXELS}")
    return best


def _tags(source):
    """The metadata of a container or a stream, with names in lower case: containers differ in it."""
    return {key.lower(): value for key, value in source.metadata.items()}


def _decoder(stream):
    """The codec context that decodes a stream."""
    # FFmpeg's own decoders of VP8 and VP9 drop an alpha channel; those of libvpx keep it
    libvpx = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if _tags(stream).get("alpha_mode") == "1" and libvpx in av.codecs_available:
        decoder = av.CodecContext.create(libvpx, "r")
    else:
        decoder = stream.codec_context
    decoder.thread_count = 1  # with more, an error shows up at another packet from one run to the next
    return decoder


def _packets(path, container, stream, seek):
    try:
        if seek is not None:
            container.seek(int(seek), stream=stream)
        yield from container.demux(stream)
    except av.FFmpegError as e:
        raise unreadable(path, e) from e


def _decode(path, seek=None):
    """Decodes a video: yields (PyAV frame, stream) in the order in which frames are shown.

    seek: a time stamp; decoding starts at the key frame at or before it. The frame is None where a packet is
    damaged. Raises MediaError, also at the end if no frame could be decoded.
    """
    decoded = False
    with _open(path) as file, _open_container(path, file) as container:
        stream = _best_stream(path, container)
        decoder = _decoder(stream)
        for packet in _packets(path, container, stream, seek):
            try:
                frames = decoder.decode(packet)
            except (av.FFmpegError, ValueError):
                frames = [None]
            for frame in frames:
                if frame is not None and frame.is_corrupt:
                    frame = None
                decoded = decoded or frame is not None
                yield frame, stream
    if not decoded:
        raise unreadable(path, "none of its frames can be decoded")


def _convert(path, frame, form, **options):
    """The pixels of a PyAV frame in another format, uint8 (H, W, C)."""
    # A new reformatter each time: the one that belongs to a frame has threads, and hangs a forked
    # DataLoader worker that frees the frame.
    try:
        return VideoReformatter().reformat(frame, format=form, **options).to_ndarray()
    except (av.FFmpegError, ValueError) as e:
        raise unreadable(path, e) from e


UNTAGGED = 2  # FFmpeg's number of a colour space that the file does not name


def _pixels(path, frame):
    """A frame of a video on white, rotated as its container says: uint8 (H, W, 3)."""
    # players take untagged video of 720 lines and more for BT.709 (HD), the rest for BT.601
    matrix = Colorspace.ITU709 if frame.colorspace == UNTAGGED and frame.height >= 720 else None
    x = _convert(path, frame, "rgba", interpolation=EXACT, src_colorspace=matrix)
    x, alpha = x[..., :3], x[..., 3:]
    if alpha.min() < 255:
        x = np.rint(255 - (255 - x) * (alpha / np.float32(255))).astype(np.uint8)
    display = frame.side_data.get("DISPLAYMATRIX")
    if display is not None:
        a, b, _, c, d = np.frombuffer(display, np.int32)[:5].tolist()
        if a * d < b * c:  # mirrored, which PyAV's frame.rotation does not say
            x = x[::-1]
    return torch.from_numpy(np.rot90(x, frame.rotation // 90).copy())  # counterclockwise


def read_image(path):
    """The picture, or the first frame of the animation or video, at `path`: uint8 (H, W, 3), upright, on white.

    The content decides what the file is, not its name. Raises MediaError.
    """
    with _open(path) as file:
        picture = _open_picture(path, file)
        if picture is not None:
            return _still(path, picture)
        file.seek(4)
        if file.read(8) in HEIC:
            raise unreadable(path, "it is HEIC; convert it to JPEG, with heif-convert or in the phone's photo app")
    for frame, _ in _decode(path):
        if frame is not None:
            return _pixels(path, frame)


def video_frames(path):
    """The frames of a video or an animation, one by one. Raises MediaError.

    Yields (uint8 (H, W, 3), its time in seconds or None, the frame rate that the file declares or None).
    """
    for frame, stream in _decode(path):
        if frame is not None:
            yield _pixels(path, frame), frame.time, stream.average_rate


def frame_rate(times, declared=None):
    """Frames per second, measured from time stamps (seconds or None), else as declared, else 1.0."""
    if len(times) > 1 and None not in times and times[-1] > times[0]:
        measured = (len(times) - 1) / (times[-1] - times[0])
        if not declared or abs(declared - measured) > 0.02 * measured:  # stamps are rounded; headers may be wrong
            return float(measured)
    return float(declared or 1)


def read_video(path):
    """All frames of a video, uint8 (T, H, W, 3), and its frames per second. Raises MediaError."""
    frames, times, declared = zip(*video_frames(path))
    if len({x.shape for x in frames}) > 1:
        raise unreadable(path, "its frames have several sizes; convert it to one size")
    return torch.stack(frames), frame_rate(times, declared[-1])


def read_settings(path):
    """The settings that VideoWriter stored in a video, or None if there are none. Raises MediaError."""
    with _open(path) as file, _open_container(path, file) as container:
        comment = _tags(container).get("comment", "null")
    try:
        return json.loads(comment)
    except ValueError:  # a comment that somebody else wrote
        return None


def fit_image(img, width, height, aspect=1):
    """uint8 (H, W, 3) -> float32 (3, height, width) in [-1, 1]: scaled to cover that size, then centre cropped.

    Antialiased bicubic, without distortion. aspect: the width of a pixel over its height.
    """
    H, W, _ = img.shape
    scale = max(width / (W * aspect), height / H) * (1 + 1e-9)  # rounding must not make it one pixel short
    sx, sy = float(scale * aspect), float(scale)
    # Drop first what the crop will drop, except for the reach of the filter: a picture of 10000x10
    # must not become one of 64000x64.
    x = max(0, int((W - width / sx) / 2 - 2 / sx) - 3)
    y = max(0, int((H - height / sy) / 2 - 2 / sy) - 3)
    img = img[y:H - y, x:W - x].permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, H, W)
    img = F.interpolate(img, scale_factor=(sy, sx), mode="bicubic", antialias=True)
    y, x = (img.shape[2] - height) // 2, (img.shape[3] - width) // 2
    return img[0, :, y:y + height, x:x + width].clamp(-1, 1).contiguous()  # bicubic overshoots at edges


def to_float(video):
    """uint8 pixels of any shape -> float32 in [-1, 1]."""
    return video.float() / 127.5 - 1


def to_uint8(video):
    """Float pixels in [-1, 1] of any shape -> uint8, rounded."""
    return ((video + 1) * 127.5).round().to(torch.uint8)


def default_size(width, height, area, multiple=64, max_ratio=4):
    """(W, H), multiples of `multiple`, with about `area` pixels and the aspect ratio of a width x height image.

    Aspect ratios beyond max_ratio become max_ratio. The area is at most twice what was asked for (or one
    `multiple` squared).
    """
    ratio = min(max(width / height, 1 / max_ratio), max_ratio)
    W = max(1, round(math.sqrt(area * ratio) / multiple))
    H = max(1, round(math.sqrt(area / ratio) / multiple))
    most = max(1, int(2 * area / multiple**2))
    W, H = min(W, max(1, most // H)), min(H, max(1, most // W))
    return W * multiple, H * multiple


# --------------------------------------------------------------------------------------------------
# 2. Writing

# One thread: x264 and libvpx split the work by the number of threads, and other bytes come out.
# No mbtree: with it up to one in ten files of the same frames came out with other bytes.
ENCODERS = {  # extension: codec, its options
    ".mp4": ("libx264", {"crf": "17", "preset": "medium", "x264-params": "mbtree=0"}),
    ".webm": ("libvpx-vp9", {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4"}),
    ".gif": ("gif", {}),
}
SETTINGS = "settings.json"  # in a folder of PNGs


def write_png(path, img):
    """Writes uint8 (H, W, 3) as a PNG file that is complete or not there."""
    part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    Image.fromarray(np.ascontiguousarray(img)).save(part, "PNG")
    os.replace(part, path)


class VideoWriter:
    """Writes a video frame by frame, so that memory does not grow with its length.

        with VideoWriter("out.mp4", fps=7, settings={...}) as video:
            video.write(frames)  # uint8 (T, H, W, 3), as often as you like

    The name decides the format: .mp4 (H.264, plays in browsers), .webm (VP9), .gif (one palette per frame), or a
    folder of PNGs where it has no extension or ends in a slash. settings, a dict for JSON, are stored in the comment
    tag of .mp4 and .webm and in settings.json of a folder; a GIF holds none. The file appears when the `with` block
    ends without an error; until then an older file of this name stays as it was. The same frames give the same
    bytes (on one machine with the same versions). A name or rate that cannot be written raises MediaError at once,
    frames of a wrong type or size raise ValueError.
    """

    def __init__(self, path, fps, settings=None):
        self.path, self.settings = Path(path), settings or {}
        self.kind = "" if str(path).endswith("/") else self.path.suffix.lower()
        if self.kind not in ("", *ENCODERS):
            raise MediaError(f"{path}: the name must end in .mp4, .webm or .gif, or in a slash for a folder of PNGs")
        fastest = 50 if self.kind == ".gif" else 1000
        if not 0 < fps <= fastest:
            raise MediaError(f"{path}: {fps} frames per second cannot be written; choose more than 0, at most {fastest}")
        if self.kind and self.path.is_dir():
            raise MediaError(f"{path}: is a folder; choose another name")
        if not self.kind and self.path.exists() and not self._is_ours():
            raise MediaError(f"{path}: exists and is no folder of PNG frames; choose another name")
        self.fps = Fraction(fps).limit_denominator(1001)  # 30000/1001 and 7.5 alike
        self.count, self.size, self.container = 0, None, None

    def _is_ours(self):
        return self.path.is_dir() and all(f.name == SETTINGS or f.match("frame_*.png") for f in self.path.iterdir())

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = tempfile.TemporaryDirectory(".tmp", f".{self.path.name}.", self.path.parent)
        self.new = Path(self.temporary.name, f"new{self.kind}")  # on the same file system
        if not self.kind:
            self.new.mkdir()
        return self

    def _start(self, frame):
        codec, options = ENCODERS[self.kind]
        gif = codec == "gif"
        # faststart puts the index first, so that a browser can play before it has all; it wants an absolute path.
        # final_delay is how long a GIF shows its last frame, in 1/100 s; without it a loop would stutter.
        muxer = {"final_delay": str(round(100 / self.fps))} if gif else {"movflags": "+faststart"}
        self.container = av.open("file:" + os.path.abspath(self.new), "w",
                                 container_options={"fflags": "+bitexact"} | muxer)
        if self.settings:
            self.container.metadata["comment"] = json.dumps(self.settings)
        self.tick = Fraction(1, 100) if gif else 1 / self.fps  # delays in a GIF are whole 1/100 s
        self.stream = self.container.add_stream(codec, rate=1 / self.tick, options=options)
        self.stream.width, self.stream.height = frame.width, frame.height
        self.stream.pix_fmt = frame.format.name
        context = self.stream.codec_context
        context.time_base, context.thread_count = self.tick, 1
        context.flags |= av.codec.context.Flags.bitexact
        if not gif:
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = ColorRange.MPEG

    def write(self, frames):
        """Appends uint8 (T, H, W, 3). H and W must be the same in all calls."""
        frames = torch.as_tensor(frames).cpu().numpy()
        self.size = self.size or frames.shape[1:]
        if frames.dtype != np.uint8 or frames.shape[1:] != self.size or frames.shape[3:] != (3,):
            raise ValueError(f"frames must be uint8 (T, H, W, 3) of one size, not {frames.dtype} {frames.shape}")
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
            palette = np.full((256, 4), 255, np.uint8)  # ARGB
            palette[:len(colours), 1:] = colours
            frame = av.VideoFrame.from_ndarray((np.asarray(x), palette), "pal8")
        else:
            x = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2), (0, 0)), "edge")  # chroma has half the size
            frame = av.VideoFrame.from_ndarray(x, "rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709,
                                   dst_color_range=ColorRange.MPEG, interpolation=EXACT)
        if not self.container:
            self._start(frame)
        frame.pts, frame.time_base = round(self.count / self.fps / self.tick), self.tick
        self.container.mux(self.stream.encode(frame))

    def __exit__(self, error, *_):
        with self.temporary:  # its folder is removed in any case
            if error:
                if self.container:
                    with contextlib.suppress(av.FFmpegError):  # it would hide the first error
                        self.container.close()
                return
            if not self.count:
                raise MediaError(f"{self.path}: no frame was written")
            if self.kind:
                self.container.mux(self.stream.encode(None))
                self.container.close()
            else:
                (self.new / SETTINGS).write_text(json.dumps({"fps": float(self.fps)} | self.settings))
                if self.path.exists():  # one folder cannot replace another
                    os.replace(self.path, Path(self.temporary.name, "old"))
            os.replace(self.new, self.path)


# --------------------------------------------------------------------------------------------------
# 3. Motion and noise: two of the numbers on which the model is conditioned

# ExVideo's training script sorts clips into 128 buckets. These are their lower bounds, in units of 1e-9.
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
AUG_LOG_MEAN, AUG_LOG_STD = -3.0, 0.5  # of ln sigma of the noise on a condition image (SVD_Xtend's choice)


def motion_score(video):
    """How much a clip moves: a float >= 0. video: (T, 3, H, W) or a list of frames, uint8 or float in [-1, 1].

    The standard deviation over time (unbiased), averaged over channels and pixels, as in ExVideo's script; 0 if
    T = 1. It is summed in float64, so that every machine finds the same bucket.
    """
    scale = 1 / 127.5 if video[0].dtype == torch.uint8 else 1.0
    mean = sum(x.double() for x in video) / len(video)
    variance = sum((x - mean).square() for x in video) / max(len(video) - 1, 1)
    return variance.sqrt().mean().item() * scale


def motion_bucket(score, scale="exvideo"):
    """The motion bucket of a score. scale: "exvideo", the last of its 128 bounds not above the score; or a bucket."""
    if scale != "exvideo":
        return float(scale)
    return float(max(0, bisect.bisect_right(EXVIDEO_MOTION, score, key=lambda t: t / 1e9) - 1))


def draw_condition(seed, name, size):
    """The noise on the condition image of the clip `name`: its sigma, float32 (), and the noise, (3, H, W)."""
    key = hashlib.blake2b(os.fsencode(f"{seed}/{name}"), digest_size=8).digest()
    g = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    aug = torch.exp(AUG_LOG_MEAN + AUG_LOG_STD * torch.randn((), generator=g))
    return aug, torch.randn(3, size[1], size[0], generator=g)


# --------------------------------------------------------------------------------------------------
# 4. The index: what is known of each video after it was decoded once
#
# A frame's number is its place among the frames that can be decoded, in the order in which they are
# shown. Headers are not used: they count frames that are damaged, hidden or missing. A shot is what
# lies between two hard cuts; a clip never crosses one.

INDEX = ".exsvd-index-4.jsonl"  # the number changes with the format of the lines
SUFFIXES = set(".3gp .asf .avi .flv .gif .h264 .hevc .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv"
               " .ts .vob .webm .wmv .y4m".split())  # looked for in folders; a list may name any file
COLUMNS = ("path", "video", "file")  # of a .csv or .json list
csv.field_size_limit(2**31 - 1)  # captions may be long


def _read_list(source):
    """What the lines of a .txt list, the rows of a .csv list or the items of a .json list hold: texts or dicts."""
    kind = source.suffix.lower()
    if kind not in (".txt", ".csv", ".json"):
        raise unreadable(source, "it is neither a folder nor a .txt, .csv or .json list nor a .py file")
    try:
        with open(source, encoding="utf-8-sig", newline="") as f:  # -sig: a byte order mark is not part of the text
            text = f.read()
    except (OSError, ValueError) as e:
        raise unreadable(source, e) from e
    if kind == ".txt":
        lines = [line.strip() for line in text.split("\n")]
        return [line for line in lines if not line.startswith("#")]
    try:
        items = json.loads(text) if kind == ".json" else list(csv.DictReader(io.StringIO(text, newline="")))
    except (ValueError, RecursionError, csv.Error) as e:
        raise unreadable(source, e) from e
    if not isinstance(items, list):
        raise unreadable(source, f"it holds a JSON {type(items).__name__}; give a list of paths or objects")
    return items


def _path_in(source, item):
    """The path that an item of a list names, or "" if it names none."""
    if isinstance(item, dict):
        columns = [key for key in COLUMNS if key in item]
        if not columns:
            found = ", ".join(f'"{key}"' for key in list(item)[:10])
            raise unreadable(source, f"it has the columns {found}; the path must be in one of: {', '.join(COLUMNS)}")
        item = next((item[key] for key in columns if item[key]), "")
    if not isinstance(item, str):
        raise unreadable(source, f"it holds {item!r:.40} where a path should be")
    return item


def list_files(source):
    """The files of a set of videos, {name: path}, sorted by name. Raises MediaError.

    source: a folder, searched recursively; a .txt list, one path per line; a .csv list with a column "path", "video"
    or "file"; a .json list of paths, or of objects that have one of these keys. A name is the path relative to the
    folder, or to the folder of the list.
    """
    source = Path(source)
    root = os.path.abspath(source if source.is_dir() else source.parent)
    if source.is_dir():
        found = [p for p in Path(root).rglob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != "."]
        paths = [str(p) for p in found if p.is_file()]
    else:
        paths = [_path_in(source, item) for item in _read_list(source)]
    files = {}
    for path in filter(None, paths):
        path = os.path.abspath(os.path.join(root, path))
        name = os.path.relpath(path, root)
        files[one_line(path.lstrip("/") if name.startswith("..") else name)] = path
    return dict(sorted(files.items()))


CUT_JUMP = 0.04  # a cut changes the thumbnails, whose values are in [0, 1], by more than this
CUT_RATIO = 2.0  # and by this many times the third largest change nearby


def find_cuts(lags):
    """Numbers of the frames that follow a hard cut. lags (N, 3): how far each frame is from the 1, 2 and 3 before it.

    At a cut both frames before it differ from both after it (at a flash of one frame they do not), and by far more
    than frames nearby differ from each other (in fast motion they do not, nor in drawings that change every second
    or third frame).
    """
    after = np.concatenate([lags[1:], np.full((1, 3), np.inf)])
    jump = np.minimum(lags[:, :2].min(1), after[:, 1:].min(1))
    steps = np.pad(np.where(np.isfinite(lags[:, 0]), lags[:, 0], 0), 6, "reflect")
    near = np.lib.stride_tricks.sliding_window_view(steps, 13).copy()  # (N, 13)
    near[:, 6] = 0
    level = np.partition(near, -3)[:, -3]  # the third largest: two other cuts may be nearby
    cut = np.isfinite(jump) & (jump > CUT_JUMP) & (jump > CUT_RATIO * level)
    return np.flatnonzero(cut).tolist()


def scan(path):
    """What the index keeps of one file, as JSON; {"error": why} if the file cannot be used."""
    stamps, lags, bad = [], [], 0
    recent, healthy = deque(maxlen=3), True
    try:
        for frame, stream in _decode(path):
            if frame is None:
                bad, healthy = bad + 1, False
                continue
            if stamps and frame.pts is not None and frame.pts == stamps[-1]:
                continue  # a second frame with the same time stamp has no time of its own
            x = _convert(path, frame, "rgb24", width=32, height=18, interpolation=Interpolation.AREA)
            x = x / np.float32(255)  # a thumbnail
            # After a damaged packet pictures may be wrong until the next key frame, and then jump; this is no cut.
            distances = [healthy * float(np.abs(x - y).mean()) for y in recent]
            lags.append(distances + [math.inf] * (3 - len(recent)))
            healthy = healthy or frame.key_frame
            recent.appendleft(x)
            stamps.append(frame.pts)
            last, base, aspect = frame, stream.time_base, stream.sample_aspect_ratio or 1
    except MediaError as e:
        return {"error": str(e).removeprefix(f"{one_line(path)}: ")}
    advice = f'encode it again, as in ffmpeg -i "{one_line(os.path.basename(path))}" -crf 16 out.mp4'
    if None in stamps:  # some AVI files, or a stream without a container
        return {"error": f"no time stamps: its frames do not say when they are shown; {advice}"}
    steps = np.diff(stamps)
    if steps.size and steps.min() < 0:
        return {"error": f"clock jumps back: after frame {int(steps.argmin())}, as in files that were joined; {advice}"}
    lags = np.array(lags)
    cuts = find_cuts(lags)
    changes = []  # of each shot: how much its thumbnails change per frame
    for a, b in itertools.pairwise([0, *cuts, len(stamps)]):
        changes.append(round(float(lags[a + 1:b, 0].mean()), 6) if b > a + 1 else 0.0)
    width, height = round(last.width * aspect), last.height
    return {"frames": len(stamps), "bad": bad, "cuts": cuts, "change": changes,
            "size": [height, width] if last.rotation % 180 else [width, height],  # upright, of square pixels
            "base": [base.numerator, base.denominator], "start": stamps[0],
            "steps": [[step, len(list(run))] for step, run in itertools.groupby(steps.tolist())]}


def _stamps(entry):
    """Time stamps of a file's frames, in units of its time base: int64 (N,)."""
    steps = [np.full(count, step) for step, count in entry["steps"]]
    return np.cumsum(np.concatenate([[entry["start"]], *steps])).astype(np.int64)


def _times(entry):
    """The same in seconds: float64 (N,)."""
    return _stamps(entry) * (entry["base"][0] / entry["base"][1])


def _key(path):
    """Size and time of the last change: a file with another key is indexed again. None if it cannot be opened."""
    try:
        with _open(path) as f:
            stat = os.fstat(f.fileno())
    except MediaError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _json_lines(path):
    """What the lines of a file hold, if the file is there. Lines that were cut off while they were written are skipped."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def build_index(source, files):
    """{name: what scan() found, and the file's key}. Files whose key is in the cache are not decoded again.

    The cache lies in the folder of the videos, or under ~/.cache if that is read-only. It has one line of JSON per
    file, written when the file has been decoded: an interrupted build goes on where it was.
    """
    source = Path(os.path.abspath(source))
    cache = source / INDEX if source.is_dir() else source.with_name(f".{source.name}{INDEX}")
    if not os.access(cache.parent, os.W_OK):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = home / "exsvd" / (hashlib.blake2b(os.fsencode(source), digest_size=12).hexdigest() + INDEX)
    keys = {name: _key(path) for name, path in files.items()}
    known = dict(_json_lines(cache))
    index = {name: known[name] for name in files if name in known and known[name]["key"] == keys[name]}
    todo = [name for name in files if name not in index]
    if todo:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        pool = ThreadPoolExecutor(cores)  # while FFmpeg decodes, other threads can run
        try:
            jobs = {pool.submit(scan, files[name]): name for name in todo}
            with open(cache, "a") as f:
                for job in tqdm(as_completed(jobs), "index", len(todo), unit="file"):
                    name = jobs[job]
                    index[name] = job.result() | {"key": keys[name]}
                    f.write("\n" + json.dumps([name, index[name]]))  # a new line first: the last may be cut off
                    f.flush()
        finally:
            pool.shutdown(cancel_futures=True)
    return {name: index[name] for name in files}


# --------------------------------------------------------------------------------------------------
# 5. Clips
#
# A dataset is an object whose dataset[n], for n = 0, 1, 2, ... without end, is a dict. It must depend
# on n and the seed alone: any process may ask for any n, and a resumed run asks again. It holds
#
#   "video"    torch.uint8 (T, 3, H, W), RGB: the frames of a clip
# or, if the clip is encoded already,
#   "latents"  torch.float32 (T, 4, H/8, W/8): mean latents of its frames, unscaled
#   "cond"     torch.float32 (4, H/8, W/8): mean latent, unscaled, of its first frame with noise
#   "ctx"      torch.float32 (D,): CLIP embedding of its first frame
#   "aug"      number: sigma of the noise on that first frame
# and in both cases
#   "fps"      number > 0: frames per second of the clip
#   "motion"   number: its motion bucket
#   "name"     str: which clip this is. The noise on its condition image is drawn from (seed, name).
#   any other number that a modified UNetConfig.ids names
#
# It may also have
#   describe()  -> str, one line for the log
#   id          str, a fingerprint of what it holds; a resumed run warns if it is another
#   measure(frames, image, fps, motion) -> {name: number}, logged with each sample during training.
#               frames: float (T, 3, H, W) in [-1, 1]; image: float (3, H', W'), what it started from
#
# Your own clips come from a Python file, say clips.py, for --data clips.py:
#
#   class Arrays:  # clips in .npy files, uint8 (T, H, W, 3)
#       def __init__(self, frames, size, seed):
#           self.paths = sorted(glob.glob("arrays/*.npy"))
#           self.frames, self.seed = frames, seed
#
#       def __getitem__(self, n):
#           rng = np.random.default_rng([self.seed, n])
#           path = self.paths[rng.integers(len(self.paths))]
#           video = torch.from_numpy(np.load(path)[:self.frames]).permute(0, 3, 1, 2)
#           return {"video": video, "fps": 8.0, "motion": 127.0, "name": path}
#
#   clips = Arrays  # or any function clips(frames, size, seed) -> dataset; size is (W, H)


def check_item(item, frames, size, ctx_dim=None, ids=("fps", "motion")):
    """Raises MediaError if an item is not as described above: which key, what was found, what is wanted.

    ctx_dim: the D of "ctx" that the UNet takes, any if None. ids: the numbers that the item must have; "aug" is
    looked for in encoded clips only.
    """
    W, H = size

    def refuse(key, wanted):
        x = item.get(key, "nothing")
        if isinstance(x, (torch.Tensor, np.ndarray)):
            x = f"{type(x).__name__} of {x.dtype} {tuple(x.shape)}"
        raise MediaError(f'dataset[0]["{key}"]: found {x!s:.100}, wanted {wanted}')

    def check_tensor(key, dtype, shape):
        x = item.get(key)
        if not isinstance(x, torch.Tensor) or x.dtype != dtype or tuple(x.shape) != shape:
            refuse(key, f"Tensor of {dtype} {shape}")

    if not isinstance(item, dict):
        raise MediaError(f"dataset[0]: found {type(item).__name__}, wanted a dict")
    encoded = "latents" in item
    if encoded:
        if ctx_dim is None:
            ctx_dim = len(item.get("ctx", ()))
        check_tensor("latents", torch.float32, (frames, 4, H // 8, W // 8))
        check_tensor("cond", torch.float32, (4, H // 8, W // 8))
        check_tensor("ctx", torch.float32, (ctx_dim,))
    else:
        check_tensor("video", torch.uint8, (frames, 3, H, W))
    wanted = [key for key in ids if key != "aug"] + ["aug"] * encoded
    for key in wanted:
        x = item.get(key)
        if isinstance(x, torch.Tensor) and x.ndim == 0:
            x = x.item()
        if not isinstance(x, numbers.Real) or not math.isfinite(x) or (key == "fps" and x <= 0):
            refuse(key, "a number > 0" if key == "fps" else "a number")
    if not isinstance(item.get("name"), str):
        refuse("name", "a str that names the clip")


def _numbered(path, entry, size, wanted=None, seek=None):
    """(number, pixels) of a file's frames, in order, from the start or the key frame at or before the stamp `seek`.

    Pixels are uint8 (3, H, W); None for frames that are not among `wanted`. Raises MediaError.
    """
    if entry.get("key") not in (None, _key(path)):
        raise unreadable(path, "it was changed after it was indexed; start again")
    numbers_of = {stamp: i for i, stamp in enumerate(_stamps(entry).tolist())}
    before = -1
    for frame, stream in _decode(path, seek):
        number = None if frame is None else numbers_of.get(frame.pts)
        # After a seek damage may let frames through that the index does not have; and a time stamp
        # that comes twice counts once.
        if number is None or number <= before:
            continue
        before, pixels = number, None
        if wanted is None or number in wanted:
            aspect = stream.sample_aspect_ratio or 1
            aspect = 1 / aspect if frame.rotation % 180 else aspect
            pixels = to_uint8(fit_image(_pixels(path, frame), *size, aspect))
        yield number, pixels


def read_clip(path, entry, numbers, size):
    """Frames of a video by number: uint8 (T, 3, H, W); size (W, H). Raises MediaError."""
    first, last, wanted = int(numbers[0]), int(numbers[-1]), set(map(int, numbers))
    at, second = _stamps(entry)[first], entry["base"][1] / entry["base"][0]  # in units of the time base
    # Containers find key frames by decoding time, which may be after `first` is shown: then seek earlier.
    for seek in (at, at - 2 * second, at - 20 * second, None):
        got = {}
        try:
            for i, pixels in _numbered(path, entry, size, wanted, seek):
                if pixels is not None:
                    got[i] = pixels
                if i >= last or i > first and first not in got:
                    break
        except MediaError:  # not every container can seek
            if seek is None:
                raise
        if len(got) == len(wanted):
            return torch.stack([got[int(i)] for i in numbers])
    raise unreadable(path, "its frames are not those of the index; remove the index and start again")


@dataclass
class Clips:
    """Clips out of files. Each epoch takes one clip from every usable file, from anywhere in it, in a new order."""
    source: str  # what list_files() takes, or a folder written by encode()
    frames: int  # of a clip
    size: tuple  # (W, H): frames are scaled to cover it and centre cropped
    seed: int = 0
    stride: int = 1  # take every stride-th frame; or
    fps: float = None  # take the frames nearest to each 1/fps
    motion: str = "exvideo"  # the bucket of the measured score; or one bucket for all clips
    skip_static: float = 0.0  # leave out shots whose thumbnails, in [0, 1], change less per frame; 0.002: a still
    start_every: int = 1  # of the frames at which a clip can start, use every so many

    def __post_init__(self):
        self.size = W, H = list(self.size)  # a list, as JSON has it
        positive = min(self.frames, self.stride, self.start_every, W, H) > 0 and (self.fps is None or self.fps > 0)
        if not positive or self.seed < 0 or W % 8 or H % 8:
            raise MediaError(f"frames {self.frames}, stride {self.stride}, fps {self.fps}, seed {self.seed}, size "
                             f"{W}x{H}: must be positive, and sizes multiples of 8")
        self.warned = set()
        self.index = self._open()
        self.usable, self.left_out = {}, {}  # {name: frame numbers at which a clip can start}, {name: why}
        for name, entry in self.index.items():
            if "error" in entry:
                self.left_out[name] = entry["error"]
            else:
                self._look_for_clips(name, entry)
        self.names = list(self.usable)
        self.id = hashlib.blake2b(repr(self.usable).encode(), digest_size=8).hexdigest()

    def _look_for_clips(self, name, entry):
        last = self._picks(_times(entry), np.arange(entry["frames"]), self.frames - 1)  # of a clip from each frame
        shots = list(itertools.pairwise([0, *entry["cuts"], entry["frames"]]))
        found = [range(a, a + np.count_nonzero(last[a:b] < b), self.start_every) for a, b in shots]
        moving = [starts for starts, change in zip(found, entry["change"]) if change >= self.skip_static]
        if any(moving):
            self.usable[name] = [starts for starts in moving if starts]
        elif any(found):
            self.left_out[name] = f"static: frames differ by {max(entry['change'])}, {self.skip_static} needed"
        else:
            longest = max(b - a for a, b in shots)
            self.left_out[name] = f"too short: {entry['frames']} frames, {longest} of them without a cut"

    def _picks(self, times, start, k):
        """The number of frame k = 0, 1, ... of a clip: every stride-th, or the one shown nearest to each 1/fps.

        times (N,): of the file's frames, in seconds. start, k: integers or arrays. N or more: past the end.
        """
        if self.fps is None:
            return start + self.stride * k
        # a frame is the nearest one up to the middle between it and the next; the last, for half a step more
        until = np.append((times[1:] + times[:-1]) / 2, times[-1] + 0.5 / frame_rate(times[-2:]))  # (N,)
        return np.searchsorted(until, times[start] + k / self.fps)

    def starts(self, name):
        """Numbers of the frames of a file at which a clip can start."""
        return list(itertools.chain(*self.usable[name]))

    def describe(self):
        """One line: how many files are used, and how many are not for each reason."""
        clips = sum(len(self.starts(name)) for name in self.names)
        rate = f"{self.fps:g} fps" if self.fps else f"stride {self.stride}"
        reasons = Counter(why.split(":")[0] for why in self.left_out.values())
        left_out = "".join(f", {count} {why}" for why, count in sorted(reasons.items()))
        return (f"{self.source}: {len(self.names)} of {len(self.index)} files hold {clips:,} clips of {self.frames} "
                f"frames at {rate}{left_out}")

    def _draw(self, n, attempt):
        """The file of clip n, and which of its starts."""
        rng = np.random.default_rng([self.seed, 1, n, attempt])
        if attempt == 0:
            epoch, i = divmod(n, len(self.names))
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.names))
            name = self.names[order[i]]
        else:
            name = self.names[rng.integers(len(self.names))]
        return name, int(rng.integers(len(self.starts(name))))

    def _read(self, name, row):
        start, times = self.starts(name)[row], _times(self.index[name])
        numbers = self._picks(times, start, np.arange(self.frames))  # (T,)
        item, score = self._load(name, row, numbers)
        fps = frame_rate(times[numbers] if self.frames > 1 else times)
        return item | {"name": f"{name}@{start}", "fps": fps, "motion": motion_bucket(score, self.motion)}

    def __getitem__(self, n):
        name, row = self._draw(int(n), 0)
        try:
            return self._read(name, row)
        except MediaError as e:  # a file that was removed or changed during a long run: take one other clip
            if name not in self.warned:
                print(f"{e}; other clips take its place", file=sys.stderr, flush=True)
            self.warned.add(name)
        return self._read(*self._draw(int(n), 1))


class VideoClips(Clips):
    """Items hold "video"."""

    def _open(self):
        self.files = list_files(self.source)
        return build_index(self.source, self.files)

    def _load(self, name, row, numbers):
        video = read_clip(self.files[name], self.index[name], numbers, self.size)
        return {"video": video}, motion_score(video)


class LatentClips(Clips):
    """Items hold "latents", "cond", "ctx" and "aug", read from a folder that encode() wrote.

    Clips must be of the size, frames, stride and fps that were encoded. The noise on the condition images is that of
    the seed they were encoded with.
    """

    def _open(self):
        encoded, self.of, index = _read_store(self.source)
        for key in ("size", "frames", "stride", "fps"):
            if getattr(self, key) != encoded[key]:
                raise MediaError(f"{self.source}: was encoded with {key} {encoded[key]}, not {getattr(self, key)}")
        if self.skip_static not in (0, encoded["skip_static"]):
            raise MediaError(f"{self.source}: was encoded with skip_static {encoded['skip_static']}")
        self.skip_static, self.start_every = encoded["skip_static"], encoded["start_every"]
        return index

    def describe(self):
        missing = self.of - len(self.index)
        return super().describe() + (f"; {missing} not encoded yet: run data.py encode again" if missing > 0 else "")

    def _load(self, name, row, numbers):
        path, first, last = _latents_file(self.source, name), int(numbers[0]), int(numbers[-1])
        try:
            with safe_open(path, "pt") as f:
                item = {key: f.get_slice(key)[row] for key in ("cond", "ctx", "aug", "motion")}
                item["latents"] = f.get_slice("latents")[first:last + 1]
        except (OSError, SafetensorError) as e:
            raise unreadable(path, f"{e}; run data.py encode again") from e
        item["latents"] = item["latents"][torch.from_numpy(numbers - first)]
        aug, score = item.pop("aug").item(), item.pop("motion").item()
        return {key: x.float() for key, x in item.items()} | {"aug": aug}, score


def _clips_of_file(path, frames, size, seed):
    """What clips(frames, size, seed) of a user's Python file returns. Its errors are not caught."""
    spec = importlib.util.spec_from_file_location(f"clips_file_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # the file may import others beside it
    spec.loader.exec_module(module)
    if not hasattr(module, "clips"):
        raise MediaError(f"{path}: defines no clips(frames, size, seed)")
    return module.clips(frames, tuple(size), seed)


def open_dataset(source, frames, size, seed=0, **settings):
    """The dataset of a source of clips, as described above. Raises MediaError, also if it would hold no clip.

    source: a folder of videos or a list of them (see list_files), a folder written by encode(), or a Python file that
    defines clips(frames, size, seed). size: (W, H). settings: of Clips; a Python file takes none. Where several
    processes open the same videos, one must do so first: it builds the index that the others find.
    """
    if str(source).endswith(".py"):
        if not os.path.isfile(source):
            raise unreadable(source, "no such file")
        defaults = {key: getattr(Clips, key) for key in settings}
        if settings != defaults:
            raise MediaError(f"{source}: --stride, --fps, --motion and --skip-static are for videos; leave them out")
        return _clips_of_file(source, frames, size, seed)
    dataset = _clips_of_folder(source, frames, size, seed, **settings)
    if not dataset.names:
        raise MediaError(f"{dataset.describe()}: nothing is left to use; python data.py check says why")
    return dataset


def _clips_of_folder(source, *args, **settings):
    encoded = any(Path(source).glob(STORE.format("*")))
    return (LatentClips if encoded else VideoClips)(source, *args, **settings)


# --------------------------------------------------------------------------------------------------
# 6. Encoding: every frame once, so that training needs neither the VAE nor CLIP
#
# One .safetensors file per video: the latents of all frames; and for each frame at which a clip can
# start, in this order, the condition latent, the CLIP embedding, sigma and motion score. One list per
# shard: a line with the settings, then one per video, written when its file is there.

STORE = "latents-{}.jsonl"  # of shard I of N: latents-1-of-8.jsonl


def _latents_file(folder, name):
    return os.path.join(folder, name + ".safetensors")


def _read_store(folder):
    """What the lists in a folder of latents say: settings, number of videos to encode, {name: index entry}."""
    settings, total, index = None, 0, {}
    for path in sorted(Path(folder).glob(STORE.format("*")), key=os.path.getmtime):
        [settings, total], *entries = _json_lines(path)
        index |= dict(entries)
    return settings, total, dict(sorted(index.items()))


@torch.no_grad()
def encode_frames(vae, video):
    """Mean latents of frames, unscaled: float (T, 3, H, W) in [-1, 1] -> (T, 4, H/8, W/8), on the VAE's device.

    One frame at a time: in a larger batch the last bits of a latent differ, and there is little to gain, since the
    encoder needs 1.1 TFLOP for a frame of 512x512.
    """
    device = next(vae.parameters()).device
    return torch.cat([vae.encode(x[None].to(device)) for x in video])


@torch.no_grad()
def encode_condition(vae, clip, frame, aug, noise):
    """The conditioning by a first frame, float (3, H, W) in [-1, 1]: latent (4, H/8, W/8) and CLIP embedding (D,).

    The latent is of frame + aug * noise, unscaled; the embedding is of the frame without noise, at this size, as in
    Stability's code.
    """
    device = next(vae.parameters()).device
    frame, aug, noise = (torch.as_tensor(x).to(device) for x in (frame, aug, noise))
    ctx = clip(exsvd.preprocess_clip(frame[None], clip.config.image))
    return vae.encode((frame + aug * noise)[None])[0], ctx[0]


def _encode_file(dataset, name, svd, dtype, progress):
    """The tensors of one file. Keeps the pixels of no more frames than a clip spans."""
    times, starts = _times(dataset.index[name]), dataset.starts(name)
    device = svd.vae.quant_conv.weight.device
    latents, conditions, scores = [], {}, []
    window = {}  # number: pixels, of the frames that clips still need
    for i, pixels in _numbered(dataset.files[name], dataset.index[name], dataset.size):
        window[i] = pixels.to(device)
        frame = to_float(window[i])
        latents.append(encode_frames(svd.vae, frame[None])[0].to("cpu", dtype))
        if i in starts:
            aug, noise = draw_condition(dataset.seed, f"{name}@{i}", dataset.size)
            cond, ctx = encode_condition(svd.vae, svd.clip, frame, aug, noise)
            conditions[i] = {"cond": cond.to("cpu", dtype), "ctx": ctx.to("cpu", dtype), "aug": aug}
        while len(scores) < len(starts):  # the clips that end here
            clip = dataset._picks(times, starts[len(scores)], np.arange(dataset.frames)).tolist()
            if clip[-1] > i:
                break
            scores.append(motion_score([window[k] for k in clip]))
        needed_from = starts[len(scores)] if len(scores) < len(starts) else math.inf
        window = {k: x for k, x in window.items() if k >= needed_from}
        progress.update()
    if len(latents) != len(times):
        raise unreadable(dataset.files[name], "its frames are not those of the index; start again")
    rows = [conditions[i] for i in starts]
    tensors = {key: torch.stack([row[key] for row in rows]) for key in ("cond", "ctx", "aug")}
    return tensors | {"latents": torch.stack(latents), "motion": torch.tensor(scores, dtype=torch.float64)}


def encode(model, source, out, dtype=torch.float16, device="cpu", shard=(1, 1), **settings):
    """Encodes the usable files of a set of videos into the folder `out`. Files that are there already are kept.

    dtype: of latents and embeddings in the files. shard: (I, N), do the I-th of N parts. settings: frames, size, seed
    and others of Clips. The VAE's encoder runs in float32, whose precision its latents need; CLIP in best_dtype().
    Raises MediaError, also if `out` was begun with other settings.
    """
    if str(source).endswith(".py"):
        raise MediaError(f"{source}: only videos can be encoded")
    dataset = open_dataset(source, **settings)
    if isinstance(dataset, LatentClips):
        raise MediaError(f"{source}: is encoded already")
    svd = exsvd.load(model, device=device, parts=("vae", "clip"))
    weights = hashlib.blake2b(digest_size=8)  # two tensors tell models apart
    for x in (svd.vae.quant_conv.weight, svd.clip.proj):
        weights.update(x.detach().cpu().numpy().tobytes())
    svd.clip.to(exsvd.best_dtype(device))
    keys = ("seed", "size", "frames", "stride", "fps", "skip_static", "start_every")
    ours = {"model": weights.hexdigest(), "dtype": str(dtype).split(".")[1]} | {k: getattr(dataset, k) for k in keys}
    theirs, _, known = _read_store(out)
    for key in ours:
        if theirs and theirs[key] != ours[key]:
            raise MediaError(f"{out}: was begun with {key} {theirs[key]}, not {ours[key]}; encode elsewhere")

    def is_done(name):
        return known.get(name) == dataset.index[name] and os.path.exists(_latents_file(out, name))

    part, parts = shard
    mine = [name for name in dataset.names if zlib.crc32(name.encode()) % parts == part - 1]
    done, todo = [name for name in mine if is_done(name)], [name for name in mine if not is_done(name)]
    store = Path(out, STORE.format(f"{part}-of-{parts}"))
    store.parent.mkdir(parents=True, exist_ok=True)
    lines = [[ours, len(dataset.names)], *([name, known[name]] for name in done)]
    new = store.with_name(f".{store.name}.new")  # a file that was changed loses its line before it is encoded again
    new.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(new, store)
    frames = sum(dataset.index[name]["frames"] for name in todo)
    with tqdm(desc="encode", total=frames, unit="frame") as progress:
        for name in todo:
            tensors, path = _encode_file(dataset, name, svd, dtype, progress), _latents_file(out, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            exsvd.save(path, tensors, {})
            with open(store, "a") as f:
                print(json.dumps([name, dataset.index[name]]), file=f)
    return dataset


# --------------------------------------------------------------------------------------------------
# 7. Command line: python data.py check videos/;  python data.py encode --model M --data videos/ --out latents/

COST = """Computed, not measured: the encoder takes 1.1 TFLOP for a frame of 512x512 in float32. The 40,258 videos of
Open-Sora-Plan 1.0 (274 hours, 29 million frames) take 8 A100 at half of their 19.5 TFLOP/s 116 hours, and as long again
for the condition latents, unless --start-every makes these few. An epoch of train.py takes 128 frames of each video,
so encoding pays off from 6 epochs on (12 with --start-every 1)."""


def check(source, **settings):
    """Prints which files of a set of videos would be used, and why the others would not. Returns the number used."""
    if str(source).endswith(".py"):
        check_item(open_dataset(source, **settings)[0], settings["frames"], settings["size"])
        print(f"{source}: its first item is as train.py takes it")
        return 1
    dataset = _clips_of_folder(source, **settings)
    for name, why in dataset.left_out.items():
        print(f"  left out  {name}: {why}")
    print(dataset.describe())
    used = [dataset.index[name] for name in dataset.names]
    if used:
        times = [_times(entry) for entry in used]
        rates = sorted(map(frame_rate, times))
        W, H = dataset.size
        hours = sum(t[-1] - t[0] for t in times) / 3600
        cuts = sum(len(entry["cuts"]) for entry in used)
        damaged = sum(entry["bad"] > 0 for entry in used)
        small = sum(entry["size"][0] < W or entry["size"][1] < H for entry in used)
        print(f"  {hours:.2f} hours, {cuts} cuts, {rates[0]:.5g} to {rates[-1]:.5g} frames per second; "
              f"{damaged} with damaged packets, {small} smaller than {W}x{H}")
    return len(used)


def frame_size(text):
    """An argparse type: WxH -> (W, H)."""
    try:
        W, H = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write it as WIDTHxHEIGHT, for example 512x512") from None
    return W, H


def shard_of(text):
    """An argparse type: I/N -> (I, N)."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text}: write it as I/N, for example 1/8 to 8/8")
    return int(part), int(parts)


def main():
    p = argparse.ArgumentParser(description="Look at a set of videos before training on it, or encode it once.")
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("check", help="say which files would be used, and why the others would not")
    c.add_argument("data", help="a folder, a .txt, .csv or .json list, a folder of latents, or a Python file")
    e = commands.add_parser("encode", help="store latents and embeddings; the same command again goes on", epilog=COST)
    e.add_argument("--model", required=True, help="SVD-XT, a file or a diffusers folder, for its VAE and CLIP")
    e.add_argument("--data", required=True, help="a folder, or a .txt, .csv or .json list")
    e.add_argument("--out", required=True, help="a folder for the latents, one file per video")
    e.add_argument("--seed", type=int, default=0, help="of the noise on condition images (default: 0, as train.py's)")
    e.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"],
                   help="of what is stored (default: float16, which changes a clip's loss by up to 5e-5 of itself; "
                   "bfloat16: 9e-4; float32: nothing)")
    e.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if any")
    e.add_argument("--start-every", type=int, default=1, metavar="K",
                   help="let clips start only at every K-th frame: the others need no condition latent (default: 1)")
    e.add_argument("--shard", type=shard_of, default=(1, 1), metavar="I/N",
                   help="encode the I-th of N parts, one GPU each; run `data.py check` first, which builds the index")
    for q in (c, e):
        q.add_argument("--frames", type=int, help="of a clip (default: what --model says, else 128 as in the paper)")
        q.add_argument("--size", type=frame_size, metavar="WxH",
                       help="pixels of a clip, multiples of 8 (default: what --model says, else 512x512)")
        q.add_argument("--stride", type=int, default=1, help="take every k-th frame (default: 1)")
        q.add_argument("--fps", type=float, help="take the frames nearest to this rate instead")
        q.add_argument("--skip-static", type=float, default=0.0, help="leave out shots that change less; try 0.002")
    a = p.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    settings = {"frames": 128, "size": (512, 512)}
    try:
        if a.command == "encode":
            theirs = exsvd.open_model(a.model)[0]["unet"].meta.get("defaults", {}).get("train", {})
            settings |= {key: theirs[key] for key in settings if key in theirs}
        settings |= {key: getattr(a, key) for key in settings if getattr(a, key) is not None}
        settings |= {"stride": a.stride, "fps": a.fps, "skip_static": a.skip_static}
        if a.command == "check":
            return 0 if check(a.data, **settings) else 1
        dtype = getattr(torch, a.dtype)
        settings |= {"seed": a.seed, "start_every": a.start_every}
        print(encode(a.model, a.data, a.out, dtype, a.device, a.shard, **settings).describe())
        return 0
    except (MediaError, exsvd.WeightsError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
