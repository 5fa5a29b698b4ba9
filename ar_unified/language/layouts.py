"""How each system writes images and the turns of a conversation: one table, with a record for each of our layouts and
each published one.

    image      open [size] start (codes [row end])*h close
    document   begin parts end                                   no turn
               begin (system) user ask answer end (user ask answer end)*
               (framed system turn) (framed user turn) framed answer (...)*

A mark is the name of a control token, or a `Text`, which the text tokenizer encodes. Everything else is derived from
the record: lengths in `syntax`, ids in `grammar`, and what may come next in `automaton`.

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
    """A mark that the text tokenizer encodes."""

    text: str


Mark = str | Text


@dataclass(frozen=True)
class SizeTokens:
    """Height, then width, each as one size token: token n means n units of codes."""

    unit: int = 1


@dataclass(frozen=True)
class Decimal:
    """Height, a separator and width in decimal. Each digit is one piece of the text tokenizer; the first is not 0."""

    separator: str = "*"


@dataclass(frozen=True)
class TurnMarks:
    """Turns separated by ids: the turn before an answer ends with `ask`, and an answer ends with the document's `end`.

    If more than one turn comes before the first answer, the first turn is the system's.
    """

    ask: str = "eot"


@dataclass(frozen=True)
class TurnTemplate:
    """Turns separated by text. Decoding cannot recover them: it gives a document of one turn with everything in it.

    Attributes:
        user: the text around a user's turn; the parts of the turn replace {}. Then come the answer and the document's
            `end`.
        system: the text of the system's turn if the document has no such turn.
        answer: controls between the user's text and the answer.
    """

    user: str = "{}"
    system: str = ""
    answer: tuple[str, ...] = ()


@dataclass(frozen=True)
class TurnFrames:
    """Turns in frames, as in Qwen: a control, the speaker, the parts and the document's `end`. A conversation has no
    `begin` before its first frame. As with `TurnTemplate`, decoding gives one turn with everything in it.

    Attributes:
        open: the control at the start of a frame.
        name: the text after `open`, in which the speaker replaces {}.
        between: the text between two frames.
        system: the text of the system's turn if the document has no such turn; "" adds none.
    """

    open: str = "turn"
    name: str = "{}\n"
    between: str = "\n"
    system: str = ""


@dataclass(frozen=True)
class Layout:
    """How one system writes images and turns.

    Attributes:
        controls: the control tokens that the layout needs, in the order of our id space.
        image_side: if text and images have separate softmaxes, the first control on the image side; "" if all are on
            the text side.
        open: the mark that begins an image.
        size: how an image states its size; None means that all images have the same size.
        start: the controls after the size.
        rows: whether `row_end` follows no row, every row, or every row except the last.
        close: the marks that end an image.
        begin: the control that begins a document.
        end: the control that ends an answer and a document; a sampler stops at it. If `TurnMarks` end a question with
            the same control, turns are identified by counting.
        tail: the controls after the last `end` of a document; they are never sampled.
        turns: how turns are marked.
        unconditional: the ids before the image's `open` in the unconditional pass of classifier-free guidance.
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
    # Ours: all images have one size, or each image states its size and ends its rows. Sizes are tokens, so it does not
    # matter how a text tokenizer splits digits.
    "grid": Layout(),
    "rows": Layout(size=SizeTokens(), rows="after"),
    # A published language model: no images; turns are written as text.
    "plain": Layout(controls=("pad", "bos", "eos"), turns=TurnTemplate(), unconditional=("bos",)),
    # Chameleon and Anole: 32 x 32 codes.
    "chameleon": Layout(
        controls=("pad", "bos", "eos", "eot", "boi", "eoi"),
        unconditional=("bos",),
    ),
    # Lumina-mGPT: height and width in units of 32 pixels (two codes); a row end after every row; all turns end with the
    # same token; without a prompt, nothing comes before an image.
    "lumina_mgpt": Layout(size=SizeTokens(2), rows="after", end="eot", unconditional=()),
    # Lumina-mGPT 2.0: the same, but its tokenizer has 8 pixels per code.
    "lumina_mgpt_2": Layout(size=SizeTokens(4), rows="after", end="eot", unconditional=()),
    # Emu3's chat model, and its image generation models, which take the plain text as the prompt.
    "emu3": _EMU3_CHAT,
    "emu3_gen": replace(_EMU3_CHAT, turns=TurnTemplate()),
    # Emu3.5: the system's turn names the task: t2i, x2i, story or howto.
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
    # LWM: the text "<vision>" opens an image of 16 x 16 codes; an id of the vision table and "</vision>" close it.
    "lwm": Layout(
        controls=("pad", "bos", "eos", "eof", "eov"),
        image_side="eof",
        open=Text("<vision>"),
        close=("eov", Text("</vision>")),
        turns=TurnTemplate(),
        unconditional=("bos",),
    ),
    # Liquid, when it generates images.
    "liquid": Layout(
        controls=("pad", "bos", "eos", "boi", "eoi", "unconditional"),
        turns=TurnTemplate("{} Generate an image based on this description."),
        unconditional=("bos", "unconditional"),
    ),
    # SimpleAR: a prompt, then an image that no token closes. Dropping the prompt drops everything before the image.
    "simplear": Layout(
        controls=("pad", "bos", "eos", "boi"),
        close=(),
        turns=TurnTemplate(),
        unconditional=("bos",),
    ),
    # Tar, when it generates images: the scale says how many codes an image has. Here, all images of a model have the
    # same number.
    "tar": Layout(
        controls=("pad", "bos", "eos", "boi", "eoi", "scale", "turn"),
        start=("scale",),
        turns=TurnFrames(system="You are a helpful assistant."),
        unconditional=("bos",),
    ),
})  # fmt: skip

WITH_IMAGES = tuple(name for name in LAYOUTS if name != "plain")
