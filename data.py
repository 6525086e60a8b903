"""Pixels in and out, and the synthetic moving world the toy model is trained on.

    1. Reading images and videos     read_image, read_video, read_settings
    2. Fitting an image to a size    fit_image, default_size
    3. Writing videos                VideoWriter (.mp4, .webm, .gif, a folder of PNGs), write_png
    4. Synthetic moving scenes       synthetic_scene

Pixels are uint8 RGB with the channel last, (H, W, 3) or (T, H, W, 3), until fit_image turns them into what the model
eats: float32 (3, H, W) in [-1, 1].  T frames, H W pixels.  Colour profiles (ICC) and HDR transfer curves are ignored.
"""
import colorsys
import contextlib
import io
import json
import math
import os
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorRange, Colorspace, Interpolation

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
HEIF_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")


class _Unnamed:
    """A binary file without its name, so that ffmpeg goes by content and never interprets 'a%03d.png' or 'http://x'."""
    def __init__(self, file):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def _reason(error):
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
    """A video frame's pixels, turned as its container asks (quarter turns to the left)."""
    return torch.rot90(_rgb(frame), frame.rotation // 90, (0, 1)).contiguous()


def _best_stream(container):
    """The largest video stream that is not an attached picture (cover art), unless nothing else is there."""
    streams = container.streams.video
    if not streams:
        raise ValueError("it holds no picture")
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
        i = 2
        while i + 4 <= len(data) and data[i] == 0xff and data[i + 1] != 0xda:       # segments up to the start of scan
            if data[i + 1] == 0xff:                                                 # fill byte
                i += 1
                continue
            n = int.from_bytes(data[i + 2:i + 4], "big")
            if data[i + 1] == 0xe1 and data[i + 4:i + 10] == b"Exif\0\0":
                tiff = data[i + 10:i + 2 + n]
                break
            i += 2 + n
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
    if gif and not data.rstrip(b"\0").endswith(b";") or jpeg and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
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

def fit_image(img, width, height):
    """uint8 (H, W, 3) -> float32 (3, height, width) in [-1, 1]: scaled to cover the target, centre cropped, not distorted.

    Antialiased bicubic, the same scale along both axes."""
    H, W, _ = img.shape
    scale = max(width / W, height / H) * (1 + 1e-9)                                 # never one pixel short by rounding
    # drop now what the crop would drop, but for the filter's reach: 10000x10 must not become 64000x64 first
    x, y = (max(0, int((n - m / scale) / 2 - 2 / scale) - 3) for n, m in ((W, width), (H, height)))
    img = img[y:H - y, x:W - x]
    img = img.permute(2, 0, 1)[None].float() / 127.5 - 1                            # (1, 3, H, W)
    img = F.interpolate(img, scale_factor=scale, mode="bicubic", antialias=True)
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

# one thread: x264 and libvpx divide the work differently for each number of threads, and the bytes with it
ENCODERS = {  # extension: container, codec, its options
    ".mp4": ("mp4", "libx264", {"crf": "17", "preset": "medium"}),
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
