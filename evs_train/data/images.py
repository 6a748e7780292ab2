"""Image files to pixels, and images that are the frames of a video to sampled frames. Runs in the decoding child.

Invariant: what comes out is whole, upright (EXIF) and RGB, and all frames of a video are of one size: an image of
another size among them is an error, not scaled. Cost: only sampled frames are decoded; with `verify` the headers of the
others are read. A frame that is missing from a numbered sequence cannot be noticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from evs_train.data.decoded import Decoded, Pixels, Sink, check_length, check_pixels
from evs_train.data.decoding import Decoding
from evs_train.data.media_files import MediaFile, locate, unreadable
from evs_train.data.sampling import FrameSampling, sample_indices
from evs_train.data.sources import TarMember
from evs_train.errors import MediaError

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
"""PIL's names of the formats that are opened, whatever a file's name says; for EPS it would start Ghostscript."""
REPLACE = "replace the file, or remove its rows"

Image.MAX_IMAGE_PIXELS = None  # `check_pixels` judges, by the recipe


def read_image(source: str | TarMember, decoding: Decoding) -> Pixels:
    """One image, (H, W, 3): RGB, upright by its EXIF tag (as `transformers.image_utils.load_image` does).

    Raises:
        MediaError: it is missing, no image, not whole, or has too many pixels.
    """
    file = locate(source, "image")
    with _opened(file, decoding) as image:
        try:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except MemoryError:
            raise
        except Exception as error:  # PIL's readers raise errors of every kind on damaged files
            is_cut = "truncated" in str(error) or isinstance(error, EOFError)
            message = f"{file.name}: cannot be decoded: {error}"
            raise MediaError(message, REPLACE, "truncated" if is_cut else "damaged") from error


def read_frames(
    name: str,
    paths: Sequence[str],
    fps: float | None,
    sampling: FrameSampling,
    *,
    verify: bool,
    decoding: Decoding,
    sink: Sink,
) -> Decoded:
    """Sample a video whose frames are images: frame i is shown at i / `fps` seconds.

    Raises:
        MediaError: there is no frame or no rate, a frame cannot be read, or is of another size than the others.
    """
    if not paths:
        raise MediaError(f"{name}: holds no frame", "remove its rows", "no frames")
    if fps is None:
        raise MediaError(
            f"{name}: a folder does not tell how many of its frames make a second",
            "set data.frames_fps, or name fps in the row",
            "no timestamps",
        )
    check_length(name, len(paths) / fps, len(paths), decoding)
    if verify:
        first = None
        for path in paths:
            with _opened(locate(path, "image"), decoding) as image:
                sides = sorted(image.size)  # EXIF may turn it yet
            first = first or sides
            if sides != first:
                raise _differing(path, sides, first)
            sink.progress()
    starts = np.arange(len(paths), dtype=np.float64) / fps
    indices = sample_indices(starts, sampling)
    pixels = sink.gather(_same_size([paths[index] for index in indices], decoding), len(indices))
    return Decoded(pixels, indices, fps, starts[indices].tolist(), len(paths), len(paths) / fps, "images", "frames", 0)


def frames_in(folder: str) -> list[str]:
    """Images of a folder in natural order: 2.png before 10.png. Other files are passed over.

    Raises:
        MediaError: the folder cannot be listed, or holds no image.
    """
    try:
        found = [path for path in Path(folder).iterdir() if path.suffix.lower() in FRAME_SUFFIXES]
    except OSError as error:
        raise unreadable(folder, "video", error) from error
    if not found:
        raise MediaError(f"{folder}: not a file, and no folder of images", "name one video file", "not a file")
    return [str(path) for path in sorted(found, key=_natural)]


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Key of the natural order: runs of digits count as numbers. The name itself decides between 1.png and 01.png."""
    pieces = re.split(r"([0-9]+)", path.name.lower())
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces], path.name


def _same_size(paths: Sequence[str], decoding: Decoding) -> Iterator[Pixels]:
    first: tuple[int, ...] | None = None
    for path in paths:
        pixels = read_image(path, decoding)
        first = first or pixels.shape
        if pixels.shape != first:
            raise _differing(path, pixels.shape[1::-1], first[1::-1])
        yield pixels


def _differing(path: str, size: Sequence[int], first: Sequence[int]) -> MediaError:
    sizes = f"{size[0]} x {size[1]} pixels, {first[0]} x {first[1]} before"
    return MediaError(f"{path}: frames differ in size: {sizes}", "scale them alike", "damaged")


def _opened(file: MediaFile, decoding: Decoding) -> Image.Image:
    """An image whose header is read; closing it closes the file."""
    try:
        image = Image.open(file.for_decoder(), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise MediaError(f"{file.name}: cannot be decoded: no known image", REPLACE, "not an image") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError(f"{file.name}: cannot be decoded: {error}", REPLACE, "damaged") from error
    try:
        check_pixels(file.name, *image.size, decoding)
    except MediaError:
        image.close()
        raise
    return image
