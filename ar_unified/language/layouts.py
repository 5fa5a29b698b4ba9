"""How a system writes images and turns: one record each, ours and the published ones, in one table.

    image      open [size] start (codes [row end])*h close
    document   begin parts end                                   no turn
               begin (system) user ask answer end (user ask answer end)*
               (frame of the system's turn) (frame of the user's) frame of the answer (...)*

Marks are names of control tokens, or `Text`, which the text tokenizer spells. Everything else follows from the record:
`syntax` its lengths, `grammar` its ids, `automaton` what may come next.

Sources: Chameleon facebookresearch/chameleon, Anole GAIR-NLP/anole, Lumina-mGPT Alpha-VLLM/Lumina-mGPT and
Lumina-mGPT-2.0, Emu3 and Emu3.5 baaivision/Emu3 and Emu3.5, LWM LargeWorldModel/LWM, Liquid FoundationVision/Liquid,
SimpleAR wdrink/SimpleAR, Tar csuhan/Tar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from ar_unified.language.vocabulary import CONTROLS


@dataclass(frozen=True)
class Text:
    """A mark that is spelled by the text tokenizer."""

    text: str


Mark = str | Text


@dataclass(frozen=True)
class SizeTokens:
    """Height, then width, in one size token each: token n says n units of codes."""

    unit: int = 1


@dataclass(frozen=True)
class Decimal:
    """Height, a separator, width, in decimal digits: one piece of the text tokenizer each, the first of them not 0."""

    separator: str = "*"


@dataclass(frozen=True)
class TurnMarks:
    """Turns told apart by ids: what stands before an answer ends with `ask`, an answer with the document's `end`.

    If more than one turn precedes the first answer, the system says the first.
    """

    ask: str = "eot"


@dataclass(frozen=True)
class TurnTemplate:
    """Turns told apart by text, which cannot be read back: ids -> document gives one turn with all of it.

    Attributes:
        user: the text around a user's turn; its parts take the place of {}. The answer follows it, then the document's
        `end`.
        system: the system's turn, where a document has none of its own.
        answer: controls between the user's text and the answer.
    """

    user: str = "{}"
    system: str = ""
    answer: tuple[str, ...] = ()


@dataclass(frozen=True)
class TurnFrames:
    """Turns each in a frame (Qwen's): a control, who speaks, the parts, the document's `end`. A conversation begins
    with the first frame and not with `begin`; like `TurnTemplate`, ids -> document gives one turn with all of it.

    Attributes:
        open: the control in front.
        name: the text behind it, with the speaker for {}.
        between: the text between two frames.
        system: the system's turn, where a document has none of its own; "": none.
    """

    open: str = "turn"
    name: str = "{}\n"
    between: str = "\n"
    system: str = ""


@dataclass(frozen=True)
class Layout:
    """How one system writes.

    Attributes:
        controls: the control tokens it needs, in the order of our id space.
        image_side: where text and images have a softmax each, the first control on the side of images; "": none is.
        open: what begins an image.
        size: how an image says its size; None: all have one.
        start: behind the size.
        rows: whether `row_end` follows no row, each row, or each row but the last.
        close: what ends an image.
        begin: of a document.
        end: ends an answer and a document; a sampler stops at it. If `TurnMarks` end a question with the same token,
        turns are told apart by counting.
        tail: behind the last `end` of a document, never sampled.
        turns: how they are marked.
        unconditional: what classifier-free guidance compares an image with, up to the image's `open`.
    """

    controls: tuple[str, ...] = CONTROLS
    image_side: str = ""
    open: Mark = "boi"
    size: SizeTokens | Decimal | None = None
    start: tuple[str, ...] = ()
    rows: Literal["none", "after", "between"] = "none"
    row_end: str = "eol"
    close: tuple[Mark, ...] = ("eoi",)
    begin: str = "bos"
    end: str = "eos"
    tail: tuple[str, ...] = ()
    turns: TurnMarks | TurnTemplate | TurnFrames = field(default_factory=TurnMarks)
    unconditional: tuple[Mark, ...] = ("bos", "eot")


_EMU3 = ("pad", "bos", "eos", "boi", "eoi", "img", "eol", "eof", "frame")
_EMU3_CHAT = Layout(
    controls=_EMU3,
    size=Decimal(),
    start=("img",),
    rows="after",
    close=("eof", "eoi"),
    turns=TurnTemplate(" USER: {}. ASSISTANT:", "You are a helpful assistant."),
    unconditional=("bos",),
)
_EMU3_5 = (*_EMU3, "bss", "ess", "boc", "eoc", "bog", "eog")

LAYOUTS: Mapping[str, Layout] = MappingProxyType({
    # Ours: all images have one size, or each says its size and ends its rows. Sizes are tokens, so it does not matter
    # how a text tokenizer splits digits.
    "grid": Layout(),
    "rows": Layout(size=SizeTokens(), rows="after"),
    # A published language model: no images, and turns are whatever the text says.
    "plain": Layout(controls=("pad", "bos", "eos"), turns=TurnTemplate(), unconditional=("bos",)),
    # Chameleon and Anole: 32 x 32 codes.
    "chameleon": Layout(
        controls=("pad", "bos", "eos", "eot", "boi", "eoi"),
        unconditional=("bos",),
    ),
    # Lumina-mGPT: height and width in 32 pixels, two codes; an end of each row; all turns end alike; without a prompt
    # nothing stands before an image.
    "lumina_mgpt": Layout(size=SizeTokens(2), rows="after", end="eot", unconditional=()),
    # Lumina-mGPT 2.0: the same with a tokenizer of 8 pixels a code.
    "lumina_mgpt_2": Layout(size=SizeTokens(4), rows="after", end="eot", unconditional=()),
    # Emu3's chat, and its models that draw, which are asked with the bare text.
    "emu3": _EMU3_CHAT,
    "emu3_gen": replace(_EMU3_CHAT, turns=TurnTemplate()),
    # Emu3.5: the system's turn names the task, t2i, x2i, story or howto.
    "emu3_5": Layout(
        controls=_EMU3_5,
        size=Decimal(),
        start=("img",),
        rows="between",
        end="ess",
        tail=("eos",),
        turns=TurnTemplate(" USER: {} ASSISTANT: ", "You are a helpful assistant for t2i task.", ("bss",)),
        unconditional=("bos", Text("You are a helpful assistant. USER:  ASSISTANT: "), "bss"),
    ),
    # LWM: the text "<vision>" opens an image of 16 x 16 codes, an id of the vision table and "</vision>" close it.
    "lwm": Layout(
        controls=("pad", "bos", "eos", "eof", "eov"),
        image_side="eof",
        open=Text("<vision>"),
        close=("eov", Text("</vision>")),
        turns=TurnTemplate(),
        unconditional=("bos",),
    ),
    # Liquid, asked to draw.
    "liquid": Layout(
        controls=("pad", "bos", "eos", "boi", "eoi", "unconditional"),
        turns=TurnTemplate("{} Generate an image based on this description."),
        unconditional=("bos", "unconditional"),
    ),
    # SimpleAR: a prompt, then an image that no token closes. To drop the prompt is to drop all before the image.
    "simplear": Layout(
        controls=("pad", "bos", "eos", "boi"),
        close=(),
        turns=TurnTemplate(),
        unconditional=("bos",),
    ),
    # Tar, drawing: the scale says how many codes an image has, and all of one model have the same here.
    "tar": Layout(
        controls=("pad", "bos", "eos", "boi", "eoi", "scale", "turn"),
        start=("scale",),
        turns=TurnFrames(system="You are a helpful assistant."),
        unconditional=("bos",),
    ),
})  # fmt: skip

WITH_IMAGES = tuple(name for name in LAYOUTS if name != "plain")
