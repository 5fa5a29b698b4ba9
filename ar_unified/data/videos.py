"""Reads a few frames of a video file (MP4, QuickTime, WebM, Matroska, AVI) with the package `av` (FFmpeg's libraries).

The times of all frames are read from the packets, without decoding. Then decoding starts at the last key frame before
each wanted frame and ends at that frame. Frames are upright. If a file has several video tracks, the first is used.
"""

from __future__ import annotations

import bisect
import importlib.util
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ar_unified.data.images import LIMITS, ImageError, Limits, evenly
from ar_unified.errors import UserError

# The endings of their files' names, in lower case.
SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
_MOST_FRAMES = 1_000_000  # nine hours of video


def require(name: str) -> None:
    """Raises UserError if `av` is missing. The message says how to install it. name: the file that needs it."""
    if importlib.util.find_spec("av") is None:
        raise UserError(
            f"{name}: videos need the package av, which is not installed: pip install 'ar_unified[video]', or take the "
            "videos out of the folder"
        )


def frames(data: bytes, most: int, limits: Limits = LIMITS) -> list[np.ndarray]:
    """At most `most` frames of a video file, evenly spaced (`evenly`) and in order, each as read-only uint8 [H, W, 3].

    Raises:
        ImageError: "empty_file" (no bytes), "image_shape" (frames outside `limits`, or too many), "unreadable_image"
            (no video, or one that is broken or cut short).
    """
    import av  # importing takes half a second, and few users have it

    if not data:
        raise ImageError("empty_file", "the file has no bytes")
    try:
        with av.open(io.BytesIO(data)) as file:
            if not file.streams.video:
                raise ImageError("unreadable_image", "expected a video, found a file without a video track")
            stream = file.streams.video[0]
            limits.check(stream.height, stream.width)
            times, keys = _times(file, stream)
            wanted = [times[number] for number in evenly(len(times), most)]
            return [_upright(frame) for frame in _decoded(file, stream, wanted, keys, limits)]
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # FFmpeg's errors are OSError, ValueError, EOFError and more
        raise ImageError("unreadable_image", f"{type(error).__name__}: {error}") from error


def _times(file: Any, stream: Any) -> tuple[list[int], list[int]]:
    """The times of all frames, in the stream's unit, ascending; and the times of the key frames. Raises ImageError."""
    times, keys = list[int](), list[int]()
    for packet in file.demux(stream):
        if not packet.size:  # the last packet is empty
            continue
        if packet.pts is None or packet.is_corrupt:
            raise ImageError("unreadable_image", f"the video's frame {len(times)} is broken, or has no time")
        times.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
        if len(times) > _MOST_FRAMES:
            raise ImageError("image_shape", f"expected at most {_MOST_FRAMES} frames, found more")
    if not times:
        raise ImageError("unreadable_image", "expected a video, found one without frames")
    if len(times) < stream.frames:
        raise ImageError("unreadable_image", f"the video is cut short: it has {len(times)} of {stream.frames} frames")
    return sorted(times), sorted(keys)


def _decoded(file: Any, stream: Any, wanted: Sequence[int], keys: Sequence[int], limits: Limits) -> Iterator[Any]:
    """The frames at these times, ascending."""
    now, shown = None, None
    for time in wanted:
        key = keys[max(bisect.bisect_right(keys, time) - 1, 0)] if keys else time
        if shown is None or now is None or key > now:  # skips the frames before the key frame
            file.seek(key, stream=stream, backward=True)
            shown = file.decode(stream)
        frame = next((frame for frame in shown if frame.pts is not None and frame.pts >= time), None)
        if frame is None:
            raise ImageError("unreadable_image", f"the video has no frame at {float(time * stream.time_base):.2f} s")
        limits.check(frame.height, frame.width)
        now = frame.pts
        yield frame


def _upright(frame: Any) -> np.ndarray:
    """A frame as a player shows it. A phone does not rotate the frames that it stores; it stores the rotation
    separately.
    """
    pixels = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))
    pixels.flags.writeable = False
    return pixels
