"""The transcriptions are compared with transformers' own processors, and with handwritten ids.

Axes: `h` `w` height and width of an image in codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.language import transcriptions as published


def letters(text: str) -> list[int]:
    """A text tokenizer with one id per letter, in the order of GPT-2, Qwen and Emu3: "!" is 0, "0" is 15."""
    return [ord(letter) - ord("!") if letter > " " else {" ": 220, "\n": 198}[letter] for letter in text]


def late(text: str) -> list[int]:
    """The same, after the ids that Chameleon and others use for other things."""
    return [16384 + letter for letter in letters(text)]


def codes(h: int, w: int) -> np.ndarray:
    return np.arange(h * w, dtype=np.int32).reshape(h, w)


IMAGE = codes(2, 2)


def test_chameleon() -> None:
    a, b = late("ab")
    image = [8197, 4, 5, 6, 7, 8196]
    assert published.chameleon(late, [[IMAGE, "a"]]) == [0, *image, a, 8710]
    assert published.chameleon(late, [["a"], [IMAGE, "b"]]) == [0, a, 8710, *image, b, 2]
    assert published.chameleon(late, [["a", IMAGE]], chat=False) == [0, a, *image, 2]
    prompt = published.chameleon(late, [["a", IMAGE, "b"]])
    assert published.chameleon_contexts(prompt) == ([0, *image, 8197], [0, 8197])


def test_lumina() -> None:
    a, b = late("ab")
    image = [8197, 8805, 8806, 4, 5, 6, 7, 8803, 8, 9, 10, 11, 8803, 8196]
    turns = [["a", codes(2, 4)], ["b"]]
    assert published.lumina_mgpt(late, turns) == [0, a, *image, 8710, b, 8710]
    implied = published.implicit([codes(2, 4)], "b")
    assert published.lumina_mgpt(late, [implied]) == [0, *image, *late(" b"), 8710]
    with pytest.raises(ValueError, match="in units of 2 codes; found 2 x 3"):
        published.lumina_mgpt(late, [[codes(2, 3)]])
    row = [*range(155000, 155004), 151670, *range(155004, 155008), 151670]
    row += [*range(155008, 155012), 151670, *range(155012, 155016), 151670]
    found = published.lumina_mgpt_2(late, [["a"], [codes(4, 4)]], bos=7, eot=8)
    assert found == [7, a, 8, 151665, 151672, 151672, *row, 151666, 8]


def test_emu3() -> None:
    a, b = letters("ab")
    image = [151852, 17, 9, 18, 151851, 151854, 151855, 151856, 151846, 151857, 151858, 151859, 151846, 151847, 151853]
    assert published.emu3(letters, [["a", codes(2, 3)]]) == [151849, a, *image, 151850]
    assert published.emu3(letters, [["a", codes(2, 3)]], eos=False) == [151849, a, *image]
    assert published.emu3_prompt(letters, "a", 90, 16) == [151849, a, 151852, 24, 15, 9, 16, 21, 151851]
    asked = letters("You are a helpful assistant. USER: ")
    answered = [151849, *asked, *image, a, *letters(". ASSISTANT:"), b, 151850]
    assert published.emu3_chat(letters, [[codes(2, 3), "a"], ["b"]]) == answered
    assert published.emu3_chat(letters, [[codes(2, 3), "a"]]) == answered[:-2]


def test_ids_of_emu3_are_the_places_of_its_special_tokens() -> None:
    """tokenization_emu3.py: after 151643 pieces come the end of text, two chat tokens, 205 extras, then the vision
    file."""
    extras = [f"extra_{i}" for i in range(205)]
    names = ["pad", "im_start", "im_end", *extras, "img", "boi", "eoi", "code"]
    called = {
        "eol": "extra_200", "eof": "extra_201", "frame": "extra_202", "bos": "extra_203", "eos": "extra_204",
        "bss": "extra_100", "ess": "extra_101", "bog": "extra_60", "eog": "extra_61", "boc": "extra_50",
        "eoc": "extra_51",
    }  # fmt: skip
    assert published.EMU3_5 == {name: 151643 + names.index(called.get(name, name)) for name in published.EMU3_5}


def test_emu3_5() -> None:
    image = [151852, 17, 9, 17, 151851, 151854, 151855, 151846, 151856, 151857, 151853]
    begin = [151849, *letters("You are a helpful assistant for x2i task. USER: ")]
    turns = [[IMAGE, "a"], [IMAGE, "b"]]
    found = published.emu3_5(letters, turns, task="x2i")
    middle = [*letters("a ASSISTANT: "), 151746]
    assert found == [*begin, *image, *middle, *image, *letters("b"), 151747, 151850]
    assert published.emu3_5(letters, turns[:1], task="x2i") == [*begin, *image, *middle]
    nothing = [151849, *letters("You are a helpful assistant. USER:  ASSISTANT: "), 151746]
    assert published.emu3_5(letters, [[]], task=None) == nothing


def test_lwm() -> None:
    a, b = late("ab")
    start, end = late("<vision>"), late("</vision>")
    image = [32000, 32001, 32002, 32003]
    without = [1, a, *start, *image, 40193, *end, 2]
    assert published.lwm(late, [["a", IMAGE]], adds_bos=False) == without
    assert published.lwm(late, [["a", IMAGE]]) == [1, 1, a, 1, *start, *image, 40193, 1, *end, 2]
    asked = late("You are a helpful assistant. USER: b\n")
    frames = [*image, 40192, *image, 40193]
    chat = [1, *asked, *start, *frames, *end, *late(" ASSISTANT:")]
    assert published.lwm_chat(late, [IMAGE, IMAGE], "b", adds_bos=False) == chat
    drawn = [1, *late("You are a helpful assistant. USER: Generate an image of ab ASSISTANT: <vision>")]
    assert published.lwm_prompt(late, "ab", adds_bos=False) == (drawn, [1, *start])


def test_liquid() -> None:
    (a,) = late("a")
    image = [7, 256000, 256001, 256002, 256003, 8]
    asked = late("a Generate an image based on this description.")
    assert published.liquid(late, "a", IMAGE) == [2, *asked, *image, 1]
    assert published.liquid(late, "", IMAGE) == [2, 9, *image, 1]
    caption = published.liquid_caption(late, IMAGE, "a")
    assert caption == [2, *image, *late("The caption of this image is:"), a, 1]
    user, model, line = late("user\n"), late("model\n"), late("\n")
    prompt = [2, 106, *user, *image, *line, a, 107, *line, 106, *model]
    assert published.liquid_chat(late, [[IMAGE, "\na"]]) == prompt
    assert published.liquid_chat(late, [[IMAGE, "\na"], ["a"]]) == [*prompt, a, 107, *line, 1]


def test_texts_that_touch_are_one_run() -> None:
    asked: list[str] = []
    published.joined(lambda run: asked.append(run) or [], ["a", "b", 5, "c", "d"])
    assert asked == ["ab", "cd"]


# ---- transformers --------------------------------------------------------------------------------------------------


def tokenizer(specials: Mapping[str, int], merges: Iterable[tuple[str, str]], first: int, **names: Any) -> Any:
    """A byte-pair tokenizer in transformers: letters in GPT-2's order from `first` on, pairs, and special tokens."""
    from transformers import PreTrainedTokenizerFast

    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    vocabulary = {chr(byte): first + i for i, byte in enumerate(printed)}
    vocabulary |= {chr(256 + i): first + 188 + i for i in range(256 - 188)}  # the other bytes, in order
    vocabulary |= {"".join(pair): first + 256 + i for i, pair in enumerate(merges)}
    made = Tokenizer(models.BPE(vocab=vocabulary | dict(specials), merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def filled(ids: Sequence[int], place: int, images: Iterable[Sequence[int]]) -> list[int]:
    """ids with the images' tokens, in order, at the places that a processor leaves for them. Asserts that their numbers
    are equal."""
    tokens = iter([token for image in images for token in image])
    found = [next(tokens) if i == place else i for i in ids]
    assert next(tokens, None) is None
    return found


def image(h: int, w: int, factor: int) -> Any:
    from PIL import Image

    return Image.new("RGB", (w * factor, h * factor))


MERGES = [("a", "t"), ("Ġ", "a"), ("e", "d"), ("Ġ", "i"), ("Ġi", "s")]
DOCUMENTS: list[tuple[str, list[tuple[int, int]]]] = [
    ("<image>What is it?", [(2, 3)]),
    ("A cat at 12*3: <image>", [(13, 4)]),
    ("<image><image>", [(3, 3), (1, 12)]),
    ("First <image> then a red one,\n<image> and that is all.", [(2, 5), (10, 2)]),
]


def parts(text: str, images: Sequence[np.ndarray]) -> list[published.Part]:
    found: list[published.Part] = []
    for i, run in enumerate(text.split("<image>")):
        found += [images[i - 1]] * (i > 0) + [run] * bool(run)
    return found


@pytest.fixture(scope="module")
def emu3() -> Any:
    torch = pytest.importorskip("torch", reason="parity with Hugging Face needs torch (the [interop] extra)")
    transformers = pytest.importorskip("transformers", reason="parity with Hugging Face needs transformers")
    from transformers.models.emu3.modeling_emu3 import Emu3ImageVocabularyMapping

    specials = {
        "<|endoftext|>": 151643, "<image>": 151646, "<|extra_200|>": 151846, "<|extra_201|>": 151847,
        "<|extra_203|>": 151849, "<|extra_204|>": 151850, "<|image token|>": 151851, "<|image start|>": 151852,
        "<|image end|>": 151853,
    }  # fmt: skip
    text = tokenizer(
        specials, MERGES, 0, bos_token="<|extra_203|>", eos_token="<|extra_204|>", pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>",
        },
    )  # fmt: skip
    names = specials | {f"<|visual token {code:06d}|>": 151854 + code for code in range(64)}
    images = transformers.Emu3ImageProcessor(min_pixels=64, max_pixels=10**6, spatial_factor=8)
    return SimpleNamespace(
        processor=transformers.Emu3Processor(images, text),
        text=lambda run: text.encode(run, add_special_tokens=False),
        image=lambda codes: Emu3ImageVocabularyMapping(names).convert_img2bpe(torch.tensor(codes)).flatten().tolist(),
    )


@pytest.mark.interop
@pytest.mark.parametrize(("text", "sizes"), DOCUMENTS)
def test_emu3_is_what_its_processor_writes(emu3: Any, text: str, sizes: list[tuple[int, int]]) -> None:
    images = [codes(*size) for size in sizes]
    given = emu3.processor(images=[image(*size, factor=8) for size in sizes], text=text)
    assert [tuple(side // 8 for side in size) for size in given["image_sizes"]] == sizes
    ids = filled(given["input_ids"][0], 151646, map(emu3.image, images))
    assert published.emu3(emu3.text, [parts(text, images)], eos=False) == ids


@pytest.mark.interop
@pytest.mark.parametrize(("ratio", "height", "width"), [("1:1", 90, 90), ("4:3", 78, 104), ("1:100", 900, 9)])
def test_emu3_is_asked_for_an_image_as_its_processor_does(emu3: Any, ratio: str, height: int, width: int) -> None:
    given = emu3.processor(text="a red cat", return_for_image_generation=True, ratio=ratio)
    assert given["image_sizes"][0] == [height, width]
    assert given["input_ids"][0] == published.emu3_prompt(emu3.text, "a red cat", height, width)


@pytest.mark.interop
@pytest.mark.parametrize(("text", "sizes"), DOCUMENTS)
@pytest.mark.parametrize("h", [4, 7])
def test_chameleon_is_what_its_processor_writes(text: str, sizes: list[tuple[int, int]], h: int) -> None:
    torch = pytest.importorskip("torch", reason="parity with Hugging Face needs torch (the [interop] extra)")
    pytest.importorskip("transformers", reason="parity with Hugging Face needs transformers")
    from tokenizers.processors import TemplateProcessing
    from transformers import ChameleonProcessor
    from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
    from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping

    specials = {
        "<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 8196, "<racm3:break>": 8197, "<reserved08706>": 8710,
        "<image>": 8711,
    }  # fmt: skip
    made = tokenizer(
        specials, MERGES, 16384, bos_token="<s>", eos_token="</s>", pad_token="<pad>", sep_token="<reserved08706>"
    )
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    processor = ChameleonProcessor(ChameleonImageProcessorPil(), made, image_seq_length=h * h)

    digits = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = {f"IMGIMG{str(code).translate(digits)}Z": 4 + code for code in range(h * h)} | specials
    images = [(codes(h, h) + i) % (h * h) for i in range(len(sizes))]
    convert = ChameleonImageVocabularyMapping(names).convert_img2bpe
    tokens = [convert(torch.tensor(each).flatten()).tolist() for each in images]
    pixels = [image(*size, factor=8) for size in sizes]

    def text_ids(run: str) -> list[int]:
        return made.encode(run, add_special_tokens=False)

    for completion in (False, True):
        given = processor(images=pixels, text=text, return_for_text_completion=completion)
        ids = filled(np.ravel(given["input_ids"]).tolist(), 8711, tokens)
        found = published.chameleon(text_ids, [parts(text, images)], chat=not completion)
        assert (found[:-1] if completion else found) == ids  # a prompt has no end yet
