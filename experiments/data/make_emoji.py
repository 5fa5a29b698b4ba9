"""Builds the folder that experiments/emoji.py reads: emoji of 128 x 128 pixels and their English names.

Images: Google's Noto emoji (Apache-2.0; its font SIL OFL 1.1), from either
    the font NotoColorEmoji.ttf as Linux distributions have it (Debian, Ubuntu: apt install fonts-noto-color-emoji)
    a clone of github.com/googlefonts/noto-emoji, whose folder png/128 has them as files
Names: data-by-emoji.json of unicode-emoji-json (MIT; the names of Unicode's CLDR), from npm or a clone of
github.com/muan/unicode-emoji-json:
    npm pack unicode-emoji-json && tar xzf unicode-emoji-json-*.tgz

    python experiments/data/make_emoji.py --font /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf \\
        --names package/data-by-emoji.json --output datasets/noto-emoji

Writes images/emoji_uCODE.png and captions.jsonl ({"image", "text", "group", "codepoints"}). Flags of countries and
regions are left out, as in png/128, and so are names without an image. The run that emoji.py describes had the 1,644
emoji of png/128 (noto-emoji at b3e3051). Debian 12's font (2.042) and unicode-emoji-json 0.9.0 give 1,637 of them, with
the same names; the seven of Unicode 16 are missing. In the font, images have fewer colours, and a few were redrawn: the
mean difference from png/128 is 0.7 of 255 levels for the median image, and at most 1.4 for nine in ten. The run's rows
also had keywords, which nothing reads.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from ar_unified.errors import UserError
from ar_unified.workdir import write_bytes, write_text

SIZE = 128  # pixels
_STRIKE = 109  # the font's only size in Pillow's units; its images have 136 x 128 pixels
_WIDTH = 136
_PRESENTATION = "\ufe0f"  # means "as an image", and is left out of file names

Draw = Callable[[str], bytes | None]  # an emoji -> its PNG, or None


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the folder and prints what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--font", metavar="FILE", help="NotoColorEmoji.ttf with embedded images")
    images.add_argument("--images", metavar="DIR", help="png/128 of a clone of noto-emoji")
    parser.add_argument("--names", required=True, metavar="FILE", help="data-by-emoji.json of unicode-emoji-json")
    parser.add_argument("--output", required=True, metavar="DIR")
    args = parser.parse_args(arguments)
    try:
        draw = from_font(args.font) if args.font else from_files(Path(args.images))
        print(make(draw, Path(args.names), Path(args.output)))
    except UserError as error:
        parser.exit(error.exit_status, f"{parser.prog}: {error}\n")


def make(draw: Draw, names: Path, output: Path) -> str:
    """Writes images and captions; returns a line that says what was made. Raises UserError, OSError."""
    try:
        known = json.loads(names.read_text(encoding="utf-8"))
        entries = [(emoji, entry["name"], entry["group"]) for emoji, entry in known.items()]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f'--names: {names}: expected {{"EMOJI": {{"name", "group"}}}}: {error!r}') from None
    rows, absent = [], 0
    for emoji, name, group in entries:
        if _region(emoji):
            continue
        png = draw(emoji)
        if png is None:
            absent += 1
            continue
        image = f"images/{file_name(emoji)}"
        write_bytes(output / image, png)
        codes = "-".join(f"{ord(letter):x}" for letter in emoji if letter != _PRESENTATION)
        rows.append({"image": image, "text": name, "group": group, "codepoints": codes})
    if not rows:
        raise UserError("no emoji in --names has an image: expected the folder png/128, or an emoji font")
    rows.sort(key=lambda row: row["image"])
    write_text(output / "captions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return f"{output}: {len(rows)} emoji; {absent} names without an image"


def file_name(emoji: str) -> str:
    """The name of an emoji's file in noto-emoji, such as emoji_u0023_20e3.png."""
    codes = "_".join(f"{ord(letter):04x}" for letter in emoji if letter != _PRESENTATION)
    return f"emoji_u{codes}.png"


def _region(emoji: str) -> bool:
    """Whether an emoji is the flag of a country or of a region."""
    return "\U0001f1e6" <= emoji[0] <= "\U0001f1ff" or "\U000e007f" in emoji


def from_files(folder: Path) -> Draw:
    """Finds images in a folder. Raises UserError if there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"--images: {folder}: no such folder")

    def draw(emoji: str) -> bytes | None:
        path = folder / file_name(emoji)
        return path.read_bytes() if path.is_file() else None

    return draw


def from_font(path: str) -> Draw:
    """Draws images with a font. Raises UserError if the font has no embedded images."""
    expected = "expected NotoColorEmoji.ttf with embedded images, as in Debian's fonts-noto-color-emoji"
    if not features.check("raqm"):
        raise UserError("this Pillow has no raqm, which is needed for emoji of several characters: use --images")
    try:
        font = ImageFont.truetype(path, _STRIKE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise UserError(f"--font: {path}: {expected}: {error}") from None

    def draw(emoji: str) -> bytes | None:
        left, top, right, bottom = font.getbbox(emoji)
        if (right - left, bottom - top) != (_WIDTH, SIZE):
            return None  # nothing, or several signs side by side: the font does not know the sequence
        image = Image.new("RGBA", (_WIDTH, SIZE))
        ImageDraw.Draw(image).text((-left, -top), emoji, font=font, embedded_color=True)
        margin = (_WIDTH - SIZE) // 2
        file = io.BytesIO()
        image.crop((margin, 0, margin + SIZE, SIZE)).save(file, "PNG")
        return file.getvalue()

    return draw


if __name__ == "__main__":
    main()
