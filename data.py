"""Reads and writes pictures and videos, and makes clips for training out of sets of videos.

    python data.py check videos/       # which files can be used, and why the others cannot
    python data.py encode --model svd_xt.safetensors --data videos/ --out latents/

    1. Reading            read_image, read_video, video_frames, fit_image, to_float, ...
    2. Writing            VideoWriter (.mp4, .webm, .gif, a folder of PNGs), write_png
    3. Motion and noise   motion_score, motion_bucket, draw_conditions
    4. The index          list_files, scan, find_cuts, build_index
    5. Clips              what an item of a dataset holds; open_dataset, check_item
    6. Encoding           encode_frames, encode_condition, encode
    7. Command line       main

T is the number of frames; H and W are in pixels; a size is (W, H). The functions that read return
uint8 RGB, channels last: (H, W, 3). fit_image turns it into what the model takes: float32 (3, H, W)
in [-1, 1]. Pillow reads pictures, FFmpeg (through PyAV) reads videos. HDR and wide gamuts become
SDR; colour profiles of pictures are applied, those in videos are not.
"""
import argparse
import contextlib
import csv
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import tempfile
import threading
import types
import warnings
from collections import Counter, deque
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.pool import ThreadPool
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import (
    ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter)
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from tqdm import tqdm

import exsvd

# We print one line about a damaged file. Without this, these libraries would print more.
av.logging.set_level(None)
logging.getLogger("PIL").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", module="PIL")


def one_line(text):
    """Text with unprintable characters escaped: file names may hold line breaks."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


class MediaError(ValueError):
    """A file or an item that cannot be used. The message is one line: which one, what is wrong."""

    def __init__(self, message):
        # A DataLoader raises a worker's error again with its whole traceback as the message. Ours
        # is what follows the last "MediaError: ".
        super().__init__(one_line(message.rsplit("MediaError: ", 1)[-1].strip()))


def unreadable(path, reason):
    """The MediaError of a file. reason: a text, or what a library raised."""
    reason = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return MediaError(f"{path}: cannot be read: {reason}")


# --------------------------------------------------------------------------------------------------
# 1. Reading

PICTURES = "AVIF BMP DIB GIF ICO JPEG JPEG2000 PNG PPM QOI TIFF WEBP".split()  # else FFmpeg
with contextlib.suppress(ImportError):
    import pillow_heif  # optional: HEIC, which iPhones save
    pillow_heif.register_heif_opener()
    PICTURES.append("HEIF")
# Without these flags swscale repeats chroma samples.
EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
HDR = ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67  # PQ and HLG
WIDE = ColorPrimaries.BT2020, ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432  # the others are P3


def _open_picture(path):
    """The first frame of a picture as a Pillow image, upright. None if Pillow does not know it."""
    try:
        with open(path, "rb") as file:
            # Pillow ignores the numbers with which AVIF, HEIC and PNG name HDR.
            named = re.search(rb"colrnclx\0(.)\0(.)|cICP(.)(.)", file.read(2**16), re.DOTALL)
            picture = Image.open(file, formats=PICTURES)
            tags = getattr(picture, "tag_v2", {})
            if 50706 in tags or tags.get(254, 0) & 1:  # DNG, or a thumbnail comes first
                raise ValueError("a raw photograph: export it as JPEG or PNG")
            picture.load()
        picture.info["named"] = named and [x[0] for x in named.groups() if x]
        return ImageOps.exif_transpose(picture)
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError as e:
        raise unreadable(path, "it has more than 179 megapixels: shrink it first") from e
    except Exception as e:  # a damaged file can make Pillow raise anything
        raise unreadable(path, e) from e


def _picture_pixels(path, picture):
    """A Pillow image in sRGB, on white: uint8 (H, W, 3)."""
    profile = picture.info.get("icc_profile", b"")
    if picture.mode[0] in "IF":  # grey of more than 8 bits, which convert() would clip
        grey = np.nan_to_num(np.asarray(picture) * (255.0 if picture.mode == "F" else 1 / 257))
        if grey.min() < -1 or grey.max() > 256:
            raise unreadable(path, "its values go beyond 0 to 1.0, or 0 to 65535: export it as PNG")
        picture = Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8))
    image = picture if picture.mode in ("CMYK", "L") else picture.convert("RGB")
    try:
        srgb = ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # none, or it does not fit
        image = image.convert("RGB")
    if picture.has_transparency_data:
        image.putalpha(picture.convert("RGBA").getchannel("A"))
    frame = av.VideoFrame.from_ndarray(np.asarray(image), "rgba" if "A" in image.mode else "rgb24")
    if picture.info.get("named") and not profile:
        frame.color_primaries, frame.color_trc = picture.info["named"]
    return _as_shown(path, frame)


@contextlib.contextmanager
def _container(path):
    """The PyAV container of a file. An error of FFmpeg within the `with` block is a MediaError."""
    if "\0" in str(path):
        raise unreadable(path, "no file name holds a NUL character")
    try:
        with open(path, "rb") as file:
            # FFmpeg gets the content alone, since it would interpret a name such as a%03d.png. The
            # whitelist keeps a playlist from opening other files. Of HEIC it would give one tile.
            content = types.SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
            options = {"protocol_whitelist": "none"}
            with av.open(content, options=options, metadata_errors="replace") as container:
                if container.metadata.get("major_brand", "")[:3] in ("hei", "hev", "mif", "msf"):
                    raise unreadable(path, "a HEIC picture, which needs pip install pillow-heif, "
                                           "or is damaged if you have that")
                yield container
    except (OSError, av.FFmpegError) as e:
        raise unreadable(path, e) from e


def _decode(path, seek=None):
    """Yields (PyAV frame, stream) in the order in which frames are shown, from the start or from
    the key frame at or before the time stamp `seek`. After an error that FFmpeg reports, frames
    are left out up to the next key frame. So is a frame with the time stamp of the one before.
    Raises MediaError, also if no frame is left, or if one is interlaced."""
    last, damaged, fresh = None, False, False  # fresh: a key frame was read since the damage
    with _container(path) as container:
        stream = container.streams.best("video")
        decoder = stream and stream.codec_context
        if not decoder:  # FFmpeg finds SVG, but does not decode it
            raise unreadable(path, "it holds no picture that can be decoded")
        if decoder.name in ("exr", "hdr", "pfm", "phm"):  # FFmpeg does not say that it is linear
            raise unreadable(path, "it holds linear light: export it as PNG or JPEG")
        # FFmpeg's own decoders of VP8 and VP9 drop an alpha channel, those of libvpx keep it.
        libvpx = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name)
        if libvpx and {"alpha_mode", "ALPHA_MODE"} & stream.metadata.keys():
            decoder = av.CodecContext.create(libvpx, "r")
        decoder.thread_count = 1  # with more, errors surface at other packets from run to run
        if seek is not None and container.format.name != "mpeg":  # there time stamps would change
            container.seek(int(seek), stream=stream)
        for packet in container.demux(stream):
            fresh = fresh or packet.is_keyframe
            try:
                frames = decoder.decode(packet)
            except (av.FFmpegError, ValueError):
                frames = None
            if frames is None or packet.is_corrupt:
                damaged, fresh = True, False
            for frame in frames or ():
                if frame.interlaced_frame:
                    raise MediaError(f"{path}: interlaced: two moments per frame: encode it again: "
                                     "ffmpeg -i OLD -vf bwdif=0 -crf 16 NEW.mp4")
                twice = last is not None and frame.pts is not None and frame.pts == last.pts
                damaged = frame.is_corrupt or (damaged and not (fresh and frame.key_frame))
                if not damaged and not twice:
                    last = frame
                    yield frame, stream
    if last is None and seek is None:
        raise unreadable(path, "none of its frames can be decoded")


_hdr = threading.local()  # keeps a scaler per thread, since the tables for HDR take two seconds


def _convert(path, frame, form, scaler=None, **options):
    """A PyAV frame in another pixel format. Raises MediaError."""
    try:  # one thread: a forked worker of a DataLoader that frees a scaler with threads hangs
        return (scaler or VideoReformatter()).reformat(frame, format=form, threads=1, **options)
    except (av.FFmpegError, ValueError) as e:
        raise unreadable(path, e) from e


def _as_shown(path, frame, stream=None, size=None):
    """A PyAV frame as players show it: uint8 (H, W, 3), on white, upright, with square pixels, in
    SDR (203 nits are white). size: (W, H), which it is scaled to cover, then centre cropped; of
    several sizes, the nearest in aspect ratio."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5] if matrix else (1, 0, 0, 0, 1)
    turned = abs(b) > abs(a)
    down, across = (b, c) if turned else (d, a)
    aspect = stream and stream.sample_aspect_ratio or 1
    W, H = frame.width * max(aspect, 1), frame.height * max(1 / aspect, 1)
    if size is not None:
        ratio = H / W if turned else W / H
        size = min(sizes_of(size), key=lambda s: abs(math.log(s[0] / s[1] / ratio)))
    w, h = (round(W), round(H)) if size is None else size[::-1] if turned else size
    scale = max(w / W, h / H)
    W, H = max(w, round(W * scale)), max(h, round(H * scale))
    how = {"interpolation": Interpolation.BICUBIC | EXACT | Interpolation.FULL_CHR_H_INP}
    if frame.colorspace == 2 and frame.height >= 720 and not frame.format.is_rgb:  # 2: not named
        how["src_colorspace"] = Colorspace.ITU709  # as players do; otherwise it is BT.601
    curve, primaries = frame.color_trc, frame.color_primaries
    if frame.format.has_palette or any(x.is_alpha for x in frame.format.components):
        x = _convert(path, frame, "rgba", **how).to_ndarray()
        # Laid on white before it is scaled, since transparent pixels may have any colour.
        x = 255 - (255 - x[..., :3]) * (x[..., 3:] / np.float32(255))
        frame = av.VideoFrame.from_ndarray(np.rint(x).astype(np.uint8), "rgb24")
        frame.color_trc, frame.color_primaries = curve, primaries
    wide = curve in HDR or primaries in WIDE  # below, planar formats are twice as fast as rgb24
    frame = _convert(path, frame, "gbrp16le" if wide else "gbrp", width=W, height=H, **how)
    if wide:
        scaler = _hdr.__dict__.setdefault("scaler", VideoReformatter())
        frame = _convert(path, frame, "gbrp", scaler, dst_color_primaries=ColorPrimaries.BT709,
                         dst_color_trc=ColorTrc.BT709 if curve in HDR else curve)
    top, left = (H - h) // 2, (W - w) // 2
    x = frame.to_ndarray()[top:top + h, left:left + w]
    x = x.swapaxes(0, 1) if turned else x
    return torch.from_numpy(x[::-1 if down < 0 else 1, ::-1 if across < 0 else 1].copy())


def read_image(path):
    """A picture, or the first frame of an animation or video: uint8 (H, W, 3), upright, on white.
    path: a file, whose content decides what it is, or a Pillow image. Raises MediaError."""
    opened = isinstance(path, Image.Image)
    picture = ImageOps.exif_transpose(path) if opened else _open_picture(path)
    return next(video_frames(path))[0] if picture is None else _picture_pixels(path, picture)


def video_frames(path, size=None):
    """Yields (uint8 (H, W, 3), seconds or None, the declared frame rate or None) for the frames of
    a video or an animation. size: as in _as_shown(). Raises MediaError."""
    for frame, stream in _decode(path):
        yield _as_shown(path, frame, stream, size), frame.time, stream.average_rate


def frame_rate(times, declared=None):
    """Frames per second: measured from time stamps (seconds or None), else as declared, else 1."""
    if len(times) > 1 and None not in times and times[-1] > times[0]:
        measured = (len(times) - 1) / (times[-1] - times[0])
        if not declared or abs(declared - measured) > 0.02 * measured:  # time stamps are rounded
            return float(measured)
    return float(declared or 1)


def read_video(path):
    """All frames of a video, uint8 (T, H, W, 3), and its frames per second. Raises MediaError."""
    frames, times, declared = zip(*video_frames(path))
    return torch.stack(frames), frame_rate(times, declared[-1])


def read_settings(path):
    """The settings that VideoWriter stored in an .mp4 or .webm; None if there are none."""
    with _container(path) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}
    with contextlib.suppress(ValueError):  # a comment of another program
        return json.loads(tags.get("comment", "null"))


def fit_image(img, width, height):
    """uint8 (H, W, 3), or float (3, H, W) in [-1, 1], -> float32 (3, height, width) in [-1, 1]:
    scaled to cover that size, then centre cropped. Antialiased bicubic, undistorted."""
    if img.dtype == torch.uint8:
        img = to_float(img.permute(2, 0, 1))
    elif img.shape[1:] == (height, width):
        return img
    _, H, W = img.shape
    scale = max(width / W, height / H) * (1 + 1e-9)  # rounding must not lose a pixel
    img = F.interpolate(img[None], scale_factor=scale, mode="bicubic", antialias=True)
    y, x = (img.shape[2] - height) // 2, (img.shape[3] - width) // 2
    img = img[0, :, y:y + height, x:x + width]
    return img.clamp(-1, 1).contiguous()  # bicubic overshoots at edges


def sizes_of(size):
    """One size (W, H), or several of them -> [[W, H], ...]"""
    return np.reshape(size, (-1, 2)).tolist()


def frame_size(text):
    """The type of a flag: WxH -> (W, H), multiples of 64."""
    try:
        W, H = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write WIDTHxHEIGHT, like 512x512") from None
    if min(W, H) < 64 or W % 64 or H % 64:
        near = "x".join(str(max(64, round(n / 64) * 64)) for n in (W, H))
        raise argparse.ArgumentTypeError(f"{text}: use multiples of 64; the nearest is {near}")
    return W, H


def to_float(video):
    """uint8 pixels of any shape -> float32 in [-1, 1]."""
    return video.float() / 127.5 - 1


def to_uint8(video):
    """Float pixels in [-1, 1], of any shape -> uint8, rounded."""
    return ((video + 1) * 127.5).round().to(torch.uint8)


def default_size(width, height, area):
    """(W, H), multiples of 64, with about `area` pixels (at most twice as many, or those of 128x64)
    and the aspect ratio of a width x height image, up to 4."""
    ratio = min(max(width / height, 1 / 4), 4)
    return tuple(64 * max(1, round(math.sqrt(area * x) / 64)) for x in (ratio, 1 / ratio))


# --------------------------------------------------------------------------------------------------
# 2. Writing

# One thread: x264 and libvpx divide the work by the number of threads, and the bytes differ.
# No mbtree: with it the bytes of one file in ten differed from run to run.
ENCODERS = {  # extension: codec, its options
    ".mp4": ("libx264", {"crf": "17", "preset": "medium", "x264-params": "mbtree=0"}),
    ".webm": ("libvpx-vp9", {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4"}),
    ".gif": ("gif", {}),
}
PNG_NAME = "frame_{:04d}.png"


def write_png(path, img):
    """Writes uint8 (H, W, 3) as a PNG file."""
    with exsvd.written_whole(path) as temporary:
        Image.fromarray(np.ascontiguousarray(img)).save(temporary, "PNG")


class VideoWriter:
    """Writes a video frame by frame, so that memory does not grow with its length.

        with VideoWriter("out.mp4", fps=7, settings={...}) as video:
            video.write(frames)  # uint8 (T, H, W, 3), any number of times

    The name decides the format: .mp4 (H.264), .webm (VP9), .gif (a palette per frame), or a folder
    of PNGs if it has no extension or ends in a slash. settings: for JSON, kept in .mp4 and .webm.
    The output appears when the block ends without an error, and replaces an older one of its kind.
    The same frames give the same bytes. Raises MediaError at once for a bad name or rate."""

    def __init__(self, path, fps, settings=None):
        self.path, self.settings = Path(path), settings
        self.kind = "" if str(path).endswith("/") else self.path.suffix.lower()
        most = 50 if self.kind == ".gif" else 1000
        if self.kind not in ("", *ENCODERS):
            raise MediaError(f"{path}: must end in .mp4, .webm, .gif, or / for a folder of PNGs")
        if not 0 < fps <= most:
            raise MediaError(f"{path}: {fps} frames per second: must be above 0, at most {most}")
        names = os.listdir(path) if self.path.is_dir() else []
        ours = set(names) == {PNG_NAME.format(i) for i in range(len(names))}
        if self.path.exists() and (self.path.is_dir() == bool(self.kind) or not ours):
            raise MediaError(f"{path}: exists and is not such a video; choose another name")
        self.fps = Fraction(fps).limit_denominator(1001)  # 30000/1001 and 7.5 alike
        self.count, self.size = 0, None

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self.path.name}."  # on the target's file system
        self.temporary = tempfile.TemporaryDirectory(".tmp", prefix, self.path.parent)
        self.new = Path(os.path.abspath(self.temporary.name), f"new{self.kind}")
        if not self.kind:
            self.new.mkdir()
        return self

    def write(self, frames):
        """Appends uint8 (T, H, W, 3); H and W are those of the first call. Raises ValueError for
        anything else."""
        frames = torch.as_tensor(frames).cpu().numpy()
        self.size = self.size or frames.shape[1:]
        if frames.dtype != np.uint8 or frames.shape[1:] != self.size:
            raise ValueError(f"{frames.dtype} {frames.shape}: not uint8 (T, H, W, 3) of one size")
        for x in frames:
            if not self.kind:
                Image.fromarray(x).save(self.new / PNG_NAME.format(self.count))
            else:
                frame = self._frame(x)
                if not self.count:
                    self._start(frame)
                frame.pts, frame.time_base = self.count, 1 / self.fps
                self.container.mux(self.stream.encode(frame))
            self.count += 1

    def _frame(self, x):
        if self.kind == ".gif":
            x = Image.fromarray(x).quantize(256, Image.Quantize.FASTOCTREE)
            colours = np.reshape(x.getpalette(), (-1, 3))
            argb = np.pad(colours, ((0, 256 - len(colours)), (1, 0)), constant_values=255)
            return av.VideoFrame.from_ndarray((np.asarray(x), argb.astype(np.uint8)), "pal8")
        H, W, _ = x.shape
        x = np.pad(x, ((0, H % 2), (0, W % 2), (0, 0)), "edge")  # chroma has half the size
        return av.VideoFrame.from_ndarray(x, "rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.BILINEAR | EXACT)

    def _start(self, frame):
        """Opens the file for frames like this one."""
        codec, options = ENCODERS[self.kind]
        muxer = {"fflags": "+bitexact",
                 "movflags": "+faststart",  # browsers can play before they have the whole file
                 "final_delay": str(round(100 / self.fps))}  # of a GIF's last frame; else 1/100 s
        self.container = av.open(f"file:{self.new}", "w", container_options=muxer)
        if self.settings:
            self.container.metadata["comment"] = json.dumps(self.settings)
        self.stream = self.container.add_stream(
            codec, self.fps, options, width=frame.width, height=frame.height,
            pix_fmt=frame.format.name, time_base=1 / self.fps, thread_count=1)
        context = self.stream.codec_context
        context.flags |= av.codec.context.Flags.bitexact
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = ColorRange.MPEG

    def __exit__(self, error, *_):
        with self.temporary:  # removes the folder
            if error:
                return
            if not self.count:
                raise MediaError(f"{self.path}: no frame was written")
            if self.kind:
                self.container.mux(self.stream.encode(None))
                self.container.close()
            elif self.path.exists():  # os.replace refuses a folder that holds files
                os.replace(self.path, Path(self.temporary.name, "old"))
            os.replace(self.new, self.path)


# --------------------------------------------------------------------------------------------------
# 3. Motion and noise: two of the numbers on which the model is conditioned

# ExVideo's training script sorts clips into 128 buckets of motion. The file has their lower bounds.
with open(os.path.join(os.path.dirname(__file__), "assets", "exvideo_motion.txt")) as file:
    EXVIDEO_MOTION = np.array(file.read().split(), float) / 1e9
AUG_LOG_MEAN, AUG_LOG_STD = -3.0, 0.5  # ln sigma of the noise on a condition image: SVD_Xtend's


class Motion:
    """Motion scores of clips, >= 0: the standard deviation of pixels in [-1, 1] over time
    (unbiased), averaged over channels and pixels, as in ExVideo's script; 0 for one frame.

    The sums of x and x^2 over the frames are integers, hence exact. If a clip is the previous one
    shifted by a frame, only the frame that enters and the one that leaves are read."""
    clip = ()

    def score(self, clip):
        """clip: a list of uint8 arrays of one shape, at most 33,000."""
        n, enter, leave = len(clip), clip[-1:], self.clip[:1]
        if not self.clip or any(x is not y for x, y in zip(clip, self.clip[1:])):
            self.sums, enter, leave = np.zeros((2, clip[0].size), np.int32), clip, ()
        for add, frames in ((np.add, enter), (np.subtract, leave)):
            for x in frames:
                add(self.sums, [x.ravel(), np.square(x.ravel(), dtype=np.uint16)], out=self.sums)
        self.clip, total = clip, 0.0
        for part in np.array_split(self.sums, 32, axis=1):  # which the cache holds
            x, squares = part.astype(np.int64)
            total += np.sqrt(n * squares - x * x).sum()
        return float(total / clip[0].size / math.sqrt(n * max(n - 1, 1)) / 127.5)


def motion_score(video):
    """The motion score of one clip, uint8 (T, ...)."""
    return Motion().score(list(video.numpy()))


def motion_bucket(score, scale="exvideo"):
    """The bucket of a score: the last of ExVideo's 128 whose bound is not above it; or `scale`."""
    last = max(0, np.searchsorted(EXVIDEO_MOTION, score, "right") - 1)
    return float(last if scale == "exvideo" else scale)


def draw_conditions(seed, names, size):
    """The noise on the condition images of clips: sigmas, float32 (n,), and noise (n, 3, H, W)."""
    drawn = []
    for name in names:
        key = hashlib.blake2b(os.fsencode(f"{seed}/{name}"), digest_size=8).digest()
        g = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
        aug = torch.exp(AUG_LOG_MEAN + AUG_LOG_STD * torch.randn((), generator=g))
        drawn.append((aug, torch.randn(3, size[1], size[0], generator=g)))
    return [torch.stack(tensors) for tensors in zip(*drawn)]


# --------------------------------------------------------------------------------------------------
# 4. The index: each video is decoded once, before training relies on it
#
# A frame's number is its place among those that can be decoded, in the order in which they are
# shown (headers count damaged, hidden and missing frames). Clips never cross a hard cut.

INDEX = ".exsvd-index-7.jsonl"  # the number changes with the format
SUFFIXES = set(".3gp .asf .avi .flv .gif .h264 .hevc .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf"
               " .ogv .ts .vob .webm .wmv .y4m".split())  # in folders; a list may name any file
csv.field_size_limit(2**31 - 1)  # captions may be long


def _read_list(source):
    """The paths that a list holds, as they stand there."""
    kind = source.suffix.lower()
    if kind not in (".txt", ".csv", ".json"):
        raise unreadable(source, "no such folder, and its name does not end in .txt, .csv or .json")
    try:
        text = source.read_bytes().decode("utf-8-sig")  # -sig drops a byte order mark
        if kind == ".txt":
            rows = text.split("\n")
        elif kind == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = json.loads(text)
    except (OSError, ValueError, csv.Error) as e:
        raise unreadable(source, e) from e
    if not isinstance(rows, list):
        raise unreadable(source, "its JSON is not a list: give a list of paths or of objects")
    for i, row in enumerate(rows):
        if isinstance(row, dict):
            column = next((key for key in ("path", "video", "file") if key in row), None)
            if not column:
                raise unreadable(source, f"it has the columns {', '.join(map(repr, row))}; the "
                                         "path must be in a column named path, video or file")
            rows[i] = row[column]
    return [str(path or "").strip() for path in rows]


def _videos_in(folder, seen):
    """Yields the paths of videos. seen: folders that were searched; links may lead in a circle."""
    if os.path.realpath(folder) in seen:
        return
    seen.add(os.path.realpath(folder))
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            if name[0] not in ".@":  # folders of systems
                yield from _videos_in(path, seen)
        elif name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES:
            yield path


def list_files(source):
    """The files of a set of videos: {name: path}, sorted. Raises MediaError, or OSError if a folder
    cannot be listed. source: a folder, searched recursively and through links; a .txt list, a path
    per line; a .csv list with a column named path, video or file; or a .json list of paths, or of
    objects with such a key. A name is the path relative to the folder, or to that of the list."""
    source = Path(source)
    root = os.path.abspath(source if source.is_dir() else source.parent)
    paths = _videos_in(root, set()) if source.is_dir() else _read_list(source)
    files = {}
    for path in filter(None, paths):
        path = os.path.abspath(os.path.join(root, path))
        name = os.path.relpath(path, root)
        files[one_line(path.lstrip("/") if name.startswith("..") else name)] = path
    return dict(sorted(files.items()))


THUMBNAIL = {"width": 32, "height": 18, "interpolation": Interpolation.AREA}
CUT_JUMP = 0.04  # at a cut thumbnails in [0, 1] differ by more than this, and
CUT_RATIO = 2.0  # by this many times the third largest step nearby


def find_cuts(lags):
    """Numbers of the frames that follow a hard cut.

    lags (N, 3): how far each frame is from the 1, 2 and 3 before it. At a cut, both frames before
    differ from both after, unlike at a flash of one frame, and by far more than frames nearby do,
    unlike in fast motion or in drawings that change every few frames."""
    after = np.concatenate([lags[1:], np.full((1, 3), np.inf)])
    jump = np.minimum(lags[:, :2].min(1), after[:, 1:].min(1))
    steps = np.pad(np.where(np.isfinite(lags[:, 0]), lags[:, 0], 0), 6, "reflect")
    near = np.lib.stride_tricks.sliding_window_view(steps, 13).copy()  # (N, 13)
    near[:, 6] = 0
    level = np.partition(near, -3)[:, -3]  # the third largest: two other cuts may be nearby
    cut = np.isfinite(jump) & (jump > CUT_JUMP) & (jump > CUT_RATIO * level)
    return np.flatnonzero(cut).tolist()


def scan(path):
    """What the index keeps of one file, for JSON; {"error": why} if the file cannot be used."""
    stamps, lags, recent = [], [], deque(maxlen=3)
    try:
        for frame, stream in _decode(path):
            x = _convert(path, frame, "rgb24", **THUMBNAIL).to_ndarray() / np.float32(255)
            distances = [float(np.abs(x - y).mean()) for y in recent]
            lags.append(distances + [math.inf] * (3 - len(recent)))
            recent.appendleft(x)
            stamps.append(frame.pts)
            base = stream.time_base
    except MediaError as e:
        return {"error": str(e).removeprefix(f"{one_line(path)}: ")}
    if None in stamps or stamps != sorted(stamps):
        return {"error": "bad time stamps: ffmpeg -i OLD -crf 16 NEW.mp4 makes new ones"}
    lags, steps = np.array(lags), np.diff(stamps).tolist()
    cuts = find_cuts(lags)
    # How much the thumbnails of each shot change per frame.
    changes = [round(float(lags[a + 1:b, 0].mean()), 6) if b > a + 1 else 0.0
               for a, b in itertools.pairwise([0, *cuts, len(stamps)])]
    return {"frames": len(stamps), "cuts": cuts, "change": changes,
            "base": [base.numerator, base.denominator], "start": stamps[0],
            "steps": [[k, len(list(run))] for k, run in itertools.groupby(steps)]}


def _stamps(entry):
    """Time stamps of a file's frames, in units of its time base: int64 (N,)."""
    steps, counts = np.reshape(entry["steps"], (-1, 2)).astype(np.int64).T
    return np.cumsum([entry["start"], *steps.repeat(counts)])


def _times(entry):
    """The same in seconds: float64 (N,)."""
    return _stamps(entry) * (entry["base"][0] / entry["base"][1])


def build_index(source, files):
    """{name: what scan() found}. The index is a file beside the videos or their list. Each scan
    adds a line, so an interrupted build goes on. Changed videos are scanned again."""
    source = Path(os.path.abspath(source))
    cache = source / INDEX if source.is_dir() else source.with_name(f".{source.name}{INDEX}")
    known = {}
    try:
        for line in cache.read_bytes().split(b"\n") if cache.exists() else []:
            with contextlib.suppress(ValueError):  # empty, or cut off while it was written
                known.update([json.loads(line)])
        changed = {name: os.path.exists(p) and [os.path.getsize(p), os.stat(p).st_mtime_ns]
                   for name, p in files.items()}
        todo = [name for name in files if known.get(name, {}).get("changed") != changed[name]]
        if todo:
            # The cores that this process may use. FFmpeg lets other threads run.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
            with ThreadPool(cores) as pool, open(cache, "a") as f:
                scanned = pool.imap_unordered(lambda name: (name, scan(files[name])), todo)
                for name, entry in tqdm(scanned, "index", len(todo), unit="file"):
                    known[name] = entry | {"changed": changed[name]}
                    f.write("\n" + json.dumps([name, known[name]]))
                    f.flush()
    except OSError as e:
        raise MediaError(f"{cache}: the index cannot be written ({e.strerror}): give a .txt list "
                         "of absolute paths that is in a folder of your own") from e
    return {name: known[name] for name in files}


# --------------------------------------------------------------------------------------------------
# 5. Clips
#
# A dataset is an object whose dataset[n], for n = 0, 1, 2, ... without end, is a dict. It depends
# on n and the seed alone: any process may ask for any n, and a resumed run asks again. It holds
#
#   "video"    torch.uint8 (T, 3, H, W), RGB: the frames of a clip
# or, of a clip that is encoded already,
#   "latents"  torch.float32 (T, 4, H/8, W/8): unscaled mean latents of its frames
#   "cond"     torch.float32 (4, H/8, W/8): unscaled mean latent of its first frame with noise
#   "ctx"      torch.float32 (D,): CLIP embedding of its first frame
#   "aug"      number: sigma of the noise on its first frame
# and in both cases
#   "fps"      number > 0: frames per second
#   "motion"   number: motion bucket, and any other number that a modified UNetConfig.ids names
#   "name"     str: which clip this is; the noise on its condition image is drawn from (seed, name)
#
# It may also have
#   describe()  -> str, a line to print
#   id          str, a fingerprint of what it holds; train.py warns if it changed when a run resumes
#   measure(frames, image, fps, motion) -> {name: number}, logged with each sample in training.
#               frames: float (T, 3, H, W) in [-1, 1]; image: float (3, H', W'), where they start
#
# For clips of your own give a Python file, --data my_clips.py (where train.py has several --size,
# `size` is a tuple of them, and an item may be of any):
#
#   import glob, numpy as np, torch
#
#   class Arrays:  # .npy files of uint8 (T, H, W, 3)
#       def __init__(self, frames, size, seed):
#           self.paths, self.frames, self.seed = sorted(glob.glob("arrays/*.npy")), frames, seed
#
#       def __getitem__(self, n):
#           path = np.random.default_rng([self.seed, n]).choice(self.paths)
#           video = torch.from_numpy(np.load(path)[:self.frames]).permute(0, 3, 1, 2)
#           return {"video": video, "fps": 8.0, "motion": 127.0, "name": str(path)}
#
#   clips = Arrays  # or any function clips(frames, size, seed) -> dataset; size is (W, H)


def check_item(item, frames, size, ctx_dim=1024, ids=("fps", "motion", "aug"), n=0):
    """Raises MediaError, which names the key, if item n is not as described above. size: one or
    several. ctx_dim: the D of the UNet. ids: the numbers that it needs."""
    def check(key, good, wanted):
        x = item.get(key)
        if not good(x):
            if getattr(x, "ndim", 0):
                x = f"{type(x).__name__} of {x.dtype} {tuple(x.shape)}"
            raise MediaError(f'dataset[{n}]["{key}"]: found {x!s:.80}, wanted {wanted}')

    encoded, sizes = "latents" in item, sizes_of(size)
    if encoded:
        cells, dtype = [(4, H // 8, W // 8) for W, H in sizes], torch.float32
        shapes = {"latents": [(frames, *x) for x in cells], "cond": cells, "ctx": [(ctx_dim,)]}
    else:
        shapes, dtype = {"video": [(frames, 3, H, W) for W, H in sizes]}, torch.uint8
    for key, wanted in shapes.items():
        check(key, lambda x: torch.is_tensor(x) and x.dtype == dtype and x.shape in wanted,
              f"a tensor of {dtype} {' or '.join(map(str, wanted))}")
    for key in [key for key in ("fps", *ids) if encoded or key != "aug"]:  # train.py draws aug
        check(key, lambda x: np.ndim(x) == 0 and np.asarray(x).dtype.kind in "iuf"
              and math.isfinite(x), "a number")
    check("fps", lambda x: x > 0, "a number > 0")
    check("name", lambda x: isinstance(x, str), "a str")


class Checked:
    """A dataset whose items are checked where they are read. args: of check_item()."""

    def __init__(self, dataset, *args):
        self.dataset, self.args = dataset, args

    def __getattr__(self, name):
        return getattr(self.dataset, name)  # describe(), id, measure()

    def __getitem__(self, n):
        check_item(item := self.dataset[n], *self.args, n=n)
        return item


def read_clip(path, entry, numbers, size):
    """Frames of a video by number: uint8 (T, 3, H, W). size: of several, all frames have the
    one nearest in aspect ratio to the first. Raises MediaError."""
    stamps = _stamps(entry)[numbers].tolist()
    earlier = max(stamps[0] - 2 * entry["base"][1] / entry["base"][0], entry["start"])  # by 2 s
    # FFmpeg finds a key frame by the time of its decoding, and it may be shown after the first.
    for seek in (stamps[0], earlier, None):  # None: from the start
        got = {}
        for frame, stream in _decode(path, seek):
            if frame.pts in stamps:
                got[frame.pts] = _as_shown(path, frame, stream, size).permute(2, 0, 1)
                size = got[frame.pts].shape[:0:-1]
            if frame.pts is not None and frame.pts >= stamps[-1 if stamps[0] in got else 0]:
                break
        if got.keys() == set(stamps):
            return torch.stack([got[stamp] for stamp in stamps])
    raise unreadable(path, f"its frames are not those of the index: remove {INDEX}")


@dataclass
class Clips:
    """Clips of videos; items hold "video". An epoch takes one clip of each usable file, from
    anywhere in it."""
    source: str  # what list_files() takes, or a folder that encode() wrote
    frames: int = 128  # of a clip
    size: tuple = (512, 512)  # (W, H), multiples of 64; or several, see read_clip()
    seed: int = 0
    stride: int = 1  # take every stride-th frame; or
    fps: float = None  # the frames nearest to each 1/fps
    motion: str | float = "exvideo"  # the bucket of the measured score; or one bucket for all clips
    skip_static: float = 0.0  # leave out shots whose thumbnails, in [0, 1], change less per frame
    start_every: int = 1  # of the frames at which a clip can start, take every so many

    def __post_init__(self):
        limits = dict(frames=1, stride=1, fps=1, start_every=1, skip_static=0, seed=0)
        for key, least in limits.items():
            value = getattr(self, key)
            if value is not None and not least <= value < math.inf:
                raise MediaError(f"{key} {value}: must be at least {least}")
        sizes = sizes_of(self.size)  # lists, as in JSON
        self.size = sizes if len(sizes) > 1 else sizes[0]
        self.index = self._open()  # {name: what scan() found}
        self.usable, self.left_out = {}, {}  # {name: ranges of first frames}, {name: why not}
        for name, entry in self.index.items():
            why = entry.get("error") or self._find_clips(name, entry)
            if why:
                self.left_out[name] = why
        self.names = list(self.usable)
        self.id = hashlib.blake2b(repr(self.usable).encode(), digest_size=8).hexdigest()

    def _open(self):
        self.files = list_files(self.source)
        return build_index(self.source, self.files)

    def _find_clips(self, name, entry):
        """Sets self.usable[name], the ranges of first frames. -> None, or why there are none"""
        times, every = _times(entry), np.arange(entry["frames"])
        ends = [*entry["cuts"], entry["frames"]]
        shots = np.diff([0, *ends])  # their lengths
        last = self._picks(times, every, self.frames - 1)  # of a clip that starts there
        in_shot = steady = every[last < np.repeat(ends, shots)]
        if np.diff(times).max(initial=0) * (self.fps or self.stride) > 1:
            pause = 2.001 if self.fps else 1.001  # seconds; 0.001 for rounding
            for k in range(1, self.frames):  # no frame may come twice, or after a pause
                a, b = times[self._picks(times, steady, np.array([[k - 1], [k]]))]
                steady = steady[(a < b) & (b - a < pause)]
        moving = steady[np.repeat(entry["change"], shots)[steady] >= self.skip_static]
        if not len(in_shot):
            return f"too short: {len(every)} frames, {max(shots)} without a cut"
        if not len(steady):
            return (f"too slow: {frame_rate(times):.3g} frames per second; "
                    f"{self.fps or self.stride:g} needed, without pauses")
        if not len(moving):
            return f"static: changes by {max(entry['change'])} per frame at most"
        runs = [x.tolist() for x in np.split(moving, np.flatnonzero(np.diff(moving) > 1) + 1)]
        self.usable[name] = [range(x[0], x[-1] + 1, self.start_every) for x in runs]

    def _picks(self, times, start, k):
        """The number of frame k = 0, 1, ... of a clip; N or more past the end of the file. times
        (N,): of the file's frames, in seconds. start, k: integers or arrays."""
        if self.fps is None:
            return start + self.stride * k
        # A frame is the nearest up to the middle between it and the next one.
        end = times[-1] + 0.5 / frame_rate(times[-2:])
        until = np.append((times[1:] + times[:-1]) / 2, end)  # (N,)
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
        return (f"{self.source}: {len(self.names)} of {len(self.index)} files hold {clips:,} clips "
                f"of {self.frames} frames at {rate}{left_out}")

    def _draw(self, n):
        """(name, row) of clip n: its file, and which of self.starts(name)."""
        epoch, i = divmod(n, len(self.names))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.names))
        name = self.names[order[i]]
        row = np.random.default_rng([self.seed, 1, n]).integers(len(self.starts(name)))
        return name, int(row)

    def _read(self, name, row, numbers):
        """The tensors of a clip, and "motion": its score, not yet a bucket. numbers (T,): of its
        frames. row: its place among self.starts(name)."""
        video = read_clip(self.files[name], self.index[name], numbers, self.size)
        return {"video": video, "motion": motion_score(video)}

    def __getitem__(self, n):
        try:
            return self._item(int(n))
        except MediaError as e:  # the file was removed or changed during the run
            print(f"{e}; another clip takes its place", file=sys.stderr, flush=True)
            return self._item(int(n) + 10**9)  # a number beyond any run

    def _item(self, n):
        name, row = self._draw(n)
        start, times = self.starts(name)[row], _times(self.index[name])
        numbers = self._picks(times, start, np.arange(self.frames))  # (T,)
        item = self._read(name, row, numbers)
        return item | {"name": f"{name}@{start}",
                       "motion": motion_bucket(item["motion"], self.motion),
                       "fps": frame_rate(times[numbers] if self.frames > 1 else times)}


class LatentClips(Clips):
    """Clips from a folder that encode() wrote; items hold "latents", "cond", "ctx", "aug". The
    noise is drawn from the seed of the encoding, not from `seed`."""

    def _open(self):
        encoded = check_encoded(self.source, {key: getattr(self, key) for key in CLIP_SETTINGS})
        self.start_every = encoded["start_every"]
        return latents_in(self.source)

    def _read(self, name, row, numbers):
        first, last = int(numbers[0]), int(numbers[-1])
        file = exsvd.Tensors(os.path.join(self.source, f"{name}.safetensors")).file
        cond, ctx = (file.get_slice(key)[row].float() for key in ("cond", "ctx"))
        aug, motion = (file.get_slice(key)[row].item() for key in ("aug", "motion"))
        latents = file.get_slice("latents")[first:last + 1][torch.from_numpy(numbers - first)]
        return {"latents": latents.float(), "cond": cond, "ctx": ctx, "aug": aug, "motion": motion}


def open_dataset(source, frames, size, seed=0, model=None, **settings):
    """The dataset of a source, as described above. Raises MediaError, also if it holds no clip.

    source: videos (see list_files), a folder that encode() wrote, or a Python file that defines
    clips(frames, size, seed), whose errors are not caught. size: (W, H), or several. model: the
    path of one whose VAE and CLIP must have encoded the folder. settings: of Clips; a Python file
    takes none. If several processes open the same videos, one must do so first: it
    builds the index."""
    if str(source).endswith(".py") and os.path.isfile(source):
        if settings != {key: getattr(Clips, key) for key in settings}:
            raise MediaError(f"{source}: --stride, --fps, --motion, --skip-static are for videos")
        spec = importlib.util.spec_from_file_location(f"clips_of_{Path(source).stem}", source)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        sys.path.append(os.path.dirname(os.path.abspath(source)))  # for imports of files beside it
        spec.loader.exec_module(module)
        sizes = tuple(map(tuple, sizes_of(size)))
        return module.clips(frames, sizes if len(sizes) > 1 else sizes[0], seed)
    kind = LatentClips if os.path.exists(os.path.join(source, SETTINGS)) else Clips
    if kind is LatentClips and model:
        svd = exsvd.load(model, dtype=torch.float16, parts=("vae", "clip"))
        check_encoded(source, {"model": fingerprint(svd)})
    dataset = kind(source, frames, size, seed, **settings)
    if not dataset.names:
        raise MediaError(f"{dataset.describe()}: nothing to use; python data.py check says why")
    return dataset


# --------------------------------------------------------------------------------------------------
# 6. Encoding: every frame once, so that training needs neither the VAE nor CLIP
#
# There is a .safetensors file per video. It holds "latents" of all frames, and a row of "cond",
# "ctx", "aug" and "motion" (the score) for each frame at which a clip can start, in this order. Its
# metadata is the video's entry in the index. Computed: an A100 takes 8 ms for a frame of 512x512,
# and twice that where a clip can start. With videos of 720 frames and --start-every 16, encoding
# pays off after 6 epochs.

SETTINGS = "latents.json"  # with what a folder was encoded; its "model" is a fingerprint
CLIP_SETTINGS = ("size", "frames", "stride", "fps", "skip_static")


def latents_in(folder):
    """What a folder of latents holds: {name of a video: the entry in the index that it had}."""
    metas = {str(path.relative_to(folder)).removesuffix(".safetensors"):
             exsvd.Tensors(str(path)).meta for path in Path(folder).rglob("*.safetensors")}
    return {name: metas[name]["index"] for name in sorted(metas) if "index" in metas[name]}


def check_encoded(folder, wanted):
    """-> with what a folder was encoded. Raises MediaError if that is not what is wanted."""
    encoded = json.loads(Path(folder, SETTINGS).read_text())
    for key, value in wanted.items():
        if encoded.get(key) != value:
            raise MediaError(f"{folder}: was encoded with {key} {encoded.get(key)}, not {value}: "
                             "use that, or encode again into another folder")
    return encoded


def fingerprint(svd):
    """Of the weights that encode: the same for every layout, and for float32 and float16."""
    digest = hashlib.blake2b(digest_size=8)
    for network in (svd.vae.encoder, svd.vae.quant_conv, svd.clip):
        for p in network.parameters():
            digest.update(p.half().cpu().numpy())
    return digest.hexdigest()


def encoding_on(device):
    """The dtype of the VAE's encoder and of CLIP where latents are made to train on, and how many
    frames are encoded together, each of which takes 0.2 GB at 512x512."""
    return (torch.float32, 1) if device.type == "cpu" else (torch.float16, 4)


@torch.no_grad()
def encode_frames(vae, video):
    """Unscaled mean latents of frames, to train on: float (T, 3, H, W) in [-1, 1] -> float32
    (T, 4, H/8, W/8) on the VAE's device. On a GPU in float16; frames whose latents are not
    finite are encoded again in TF32. float16 changes the toy's latents by 5e-4 (relative RMS) and a
    clip's loss by 0.02 % on average. VAE.encode is exact, in 12 times the time."""
    exact, device = vae.quant_conv.weight.dtype, vae.quant_conv.weight.device
    fast, at_once = encoding_on(device)

    def latents_of(video, dtype):
        weights = {name: p.to(dtype) for name, p in vae.encoder.named_parameters()}
        encoded = [torch.func.functional_call(vae.encoder, weights, x.to(device, dtype))
                   for x in video.split(at_once)]
        return torch.cat([vae.quant_conv(h.to(exact))[:, :4].float() for h in encoded])

    latents = latents_of(video, fast)
    bad = ~latents.isfinite().flatten(1).all(1)  # an overflow reaches all of a frame by the norms
    if bad.any():
        latents[bad] = latents_of(video[bad.to(video.device)], exact)
    return latents


@torch.no_grad()
def encode_condition(vae, clip, frames, aug, noise):
    """What the model is conditioned on, given first frames, float (n, 3, H, W) in [-1, 1]: unscaled
    mean latents (n, 4, H/8, W/8) of frames + aug * noise, aug (n,), and the CLIP embeddings (n, D)
    of the frames alone, as in Stability's code."""
    device = vae.quant_conv.weight.device
    frames, aug, noise = (x.to(device) for x in (frames, aug, noise))
    ctx = clip(exsvd.preprocess_clip(frames, clip.config.image))
    return encode_frames(vae, frames + aug.view(-1, 1, 1, 1) * noise), ctx


def _encode_file(dataset, name, svd, dtype):
    """The tensors of one video. Only as many frames as a clip spans are in memory at a time."""
    path, entry, size = dataset.files[name], dataset.index[name], dataset.size
    stamps, times, starts = _stamps(entry).tolist(), _times(entry), dataset.starts(name)
    can_start = set(starts)
    clips = deque(dataset._picks(times, start, np.arange(dataset.frames)) for start in starts)
    motion = [Motion() for _ in range(dataset.stride)]  # clips a stride apart share their frames
    tensors = {"latents": [], "cond": [], "ctx": [], "aug": [], "motion": []}
    window = {}  # {number: pixels} of the frames that clips still need
    frames, at_once = _decode(path), encoding_on(svd.vae.quant_conv.weight.device)[1]
    for a in range(0, len(stamps), at_once):
        batch = list(itertools.islice(frames, at_once))
        if [frame.pts for frame, _ in batch] != stamps[a:a + at_once]:
            raise unreadable(path, f"its frames are not those of the index: remove {INDEX}")
        pixels = []
        for each in batch:
            pixels.append(_as_shown(path, *each, size).permute(2, 0, 1))
            size = pixels[0].shape[:0:-1]  # of several, that of the first frame
        window |= {a + k: x.numpy() for k, x in enumerate(pixels)}
        video = to_float(torch.stack(pixels))
        tensors["latents"] += encode_frames(svd.vae, video).to("cpu", dtype)
        if first := [k for k in range(len(batch)) if a + k in can_start]:
            names = [f"{name}@{a + k}" for k in first]
            aug, noise = draw_conditions(dataset.seed, names, size)
            cond, ctx = encode_condition(svd.vae, svd.clip, video[first], aug, noise)
            for key, rows in (("cond", cond.to(dtype)), ("ctx", ctx.to(dtype)), ("aug", aug)):
                tensors[key] += rows.cpu()
        while clips and clips[0][-1] in window:  # all its frames are here
            clip = clips.popleft().tolist()
            score = motion[clip[0] % dataset.stride].score([window[k] for k in clip])
            tensors["motion"].append(torch.tensor(score, dtype=torch.float64))
        window = {k: x for k, x in window.items() if clips and k >= clips[0][0]}
    return {key: torch.stack(rows) for key, rows in tensors.items()}


def encode(model, source, out, dtype=torch.float16, device="cpu", shard=(1, 1), **settings):
    """Encodes the usable files of a set of videos into the folder `out`. What was encoded before is
    kept, unless its video has changed since. dtype: of what is stored. shard: (I, N), the I-th of N
    parts. settings: of Clips. Raises MediaError if `out` was begun with another model or other
    settings; and, when the others are encoded, if files cannot be read."""
    if not 1 <= shard[0] <= shard[1]:
        raise MediaError(f"--shard {shard[0]} {shard[1]}: the first must be from 1 to the second")
    dataset = Clips(source, **settings)
    svd = exsvd.load(model, device=device, parts=("vae", "clip"))
    ours = {key: getattr(dataset, key) for key in ("seed", *CLIP_SETTINGS, "start_every")}
    ours |= {"model": fingerprint(svd), "dtype": str(dtype)}
    svd.clip.to(encoding_on(svd.clip.proj.device)[0])
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, SETTINGS)
    if os.path.exists(path):
        check_encoded(out, ours)
    else:
        with exsvd.written_whole(path) as temporary:
            Path(temporary).write_text(json.dumps(ours))
    encoded = latents_in(out)
    gone = one_line(", ".join(sorted(encoded.keys() - dataset.usable.keys())))
    if gone:
        print(f"{out} also holds latents of videos that {source} lacks or that cannot be used; "
              f"remove them if you do not want to train on them: {gone}", file=sys.stderr)
    todo = [name for name in dataset.names[shard[0] - 1::shard[1]]
            if encoded.get(name) != dataset.index[name]]
    failed = []
    for name in tqdm(todo, "encode", unit="file"):
        path = os.path.join(out, f"{name}.safetensors")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            if len(os.fsencode(os.path.basename(path))) > 240:  # with that of a temporary file
                raise MediaError(f"{name}: its name is too long: rename it")
            tensors = _encode_file(dataset, name, svd, dtype)
            exsvd.save(path, tensors, {"index": dataset.index[name]})
        except MediaError as e:
            failed.append(str(e))
    if failed:
        why = "; ".join(failed)
        raise MediaError(f"{len(failed)} of {len(todo)} files were not encoded: {why}")
    return dataset


# --------------------------------------------------------------------------------------------------
# 7. Command line


def main():
    parser = argparse.ArgumentParser(
        description="Check or encode a set of videos for training. In [brackets]: the default; the "
                    "file of --model may hold others.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="say what cannot be used, and why")
    encoding = commands.add_parser("encode", help="store latents; goes on where it was stopped")
    videos = "folder of videos, or a .txt, .csv or .json list of them"
    check.add_argument("data", help=videos)
    flag = encoding.add_argument
    flag("--model", required=True, help="SVD-XT, for its VAE and CLIP")
    flag("--data", required=True, help=videos)
    flag("--out", required=True, help="folder for the latents")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu",
         help="[cuda if there is one, else cpu]")
    flag("--shard", type=int, nargs=2, default=(1, 1), metavar=("I", "N"),
         help="encode the I-th of N parts, on one GPU; first run `check`, which builds the index")
    flag("--seed", type=int, metavar="N", help="of noise on condition images [0]")
    flag("--start-every", type=int, metavar="N",
         help="clips start at every N-th frame only, which needs fewer conditions [1]")
    for command in (check, encoding):
        flag = command.add_argument
        flag("--frames", type=int, metavar="N", help="of a clip [128]")
        flag("--size", type=frame_size, nargs="+", metavar="WxH", help="multiples of 64; of "
             "several a video takes the nearest in aspect ratio [512x512]")
        flag("--stride", type=int, metavar="N", help="take every N-th frame of a video [1]")
        flag("--fps", type=float, metavar="N", help="take frames at this rate, not by a stride")
        flag("--skip-static", type=float, metavar="N",
             help="leave out shots that change less per frame; 0.002 finds stills [0]")
    args = parser.parse_args()
    given = {key: value for key, value in vars(args).items()
             if key in Clips.__dataclass_fields__ and value is not None}
    try:
        if args.command == "encode":
            meta = exsvd.open_model(args.model)[0]["unet"].meta
            in_file = meta.get("defaults", {}).get("train", {})
            given = {key: in_file[key] for key in CLIP_SETTINGS if key in in_file} | given
            dataset = encode(args.model, args.data, args.out, device=args.device, shard=args.shard,
                             **given)
        else:
            dataset = Clips(args.data, **given)
            for name, why in dataset.left_out.items():
                print(f"  left out  {name}: {why}")
        print(dataset.describe())
    except (MediaError, exsvd.WeightsError, OSError) as e:
        sys.exit(f"data.py: {e}")
    return 0 if dataset.names else 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names that a terminal cannot print
    sys.exit(main())
