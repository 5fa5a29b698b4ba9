"""Published tables of full size, by the names of their tokens: each id has the right meaning, and wrong names are
refused.

The ids are those of the published tokenizers (Chameleon's text_tokenizer.json, Emu3's tiktoken and vision tokens).
"""

from __future__ import annotations

import numpy as np
import pytest

from ar_unified.errors import UserError
from ar_unified.interop import chameleon, emu3, emu3_5, liquid, lwm
from ar_unified.interop.ids import Language, language, same_codes
from tests.interop.tables import code_name


def chameleon_names() -> dict[str, int]:
    special = ["<s>", "<pad>", "</s>", "<unk>", *map(code_name, range(8192)), "<eoss>", "<racm3:break>"]
    special += [f"<reserved{n:05}>" for n in range(8194, 9000)]
    return {name: id for id, name in enumerate(special)}


def emu3_names() -> dict[str, int]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    special += ["<|image token|>", "<|image start|>", "<|image end|>"]
    special += [f"<|visual token {code:06}|>" for code in range(32768)]
    return {name: 151643 + id for id, name in enumerate(special)}


def published(found: Language, control: str) -> int:
    return int(found.border.theirs[found.vocabulary.control(control)])


def codes(found: Language) -> tuple[int, int]:
    vocabulary = found.vocabulary
    ids = found.border.theirs[vocabulary.image_offset : vocabulary.rest_offset]
    assert (np.diff(ids) == 1).all()
    return int(ids[0]), int(ids[-1])


def test_chameleons_table() -> None:
    names = chameleon_names()
    found = chameleon.language_of(names, [*range(len(names), 65536)], 65536, "chameleon", "here", None)
    assert found.vocabulary.used == found.border.size == 65536
    marks = {"bos": 0, "pad": 1, "eos": 2, "eoi": 8196, "boi": 8197, "eot": 8710}
    assert {name: published(found, name) for name in marks} == marks and codes(found) == (4, 8195)
    assert len(found.border.runs) < 12


def test_lumina_mgpts_sizes_and_row_ends() -> None:
    names = chameleon_names()
    found = chameleon.language_of(names, [*range(len(names), 65536)], 65536, "lumina_mgpt", "here", None)
    assert published(found, "eol") == 8803 and published(found, "eot") == 8710
    sizes = found.border.theirs[found.vocabulary.size_offset : found.vocabulary.image_offset]
    assert sizes.tolist() == [8804 + n for n in range(1, 65)] and found.layout.most == (64, 64)


def test_emu3s_table() -> None:
    found = emu3.language_of(emu3_names(), [*range(151643)], 184622, "here", (90, 90))
    marks = {"pad": 151643, "eol": 151846, "eof": 151847, "frame": 151848, "bos": 151849, "eos": 151850}
    marks |= {"img": 151851, "boi": 151852, "eoi": 151853}
    assert {name: published(found, name) for name in marks} == marks and codes(found) == (151854, 184621)
    assert found.vocabulary.used == 184622 and found.vocabulary.text_size == 151643
    assert found.layout.split(found.vocabulary, "by_side") == found.vocabulary.image_offset, "its marks are text's"


def emu3_5_names() -> dict[str, int]:
    special = {name: id for name, id in emu3_names().items() if "visual" not in name}
    return special | {f"<|visual token {code:06}|>": 151854 + code for code in range(131072)}


def test_emu3_5s_table() -> None:
    found = emu3_5.language_of(emu3_5_names(), [*range(151643)], 282926, "here", (128, 128))
    marks = {"pad": 151643, "eol": 151846, "frame": 151848, "bos": 151849, "eos": 151850, "img": 151851, "boi": 151852}
    marks |= {"eoi": 151853, "boc": 151696, "eoc": 151697, "bog": 151706, "eog": 151707, "bss": 151746, "ess": 151747}
    assert {name: published(found, name) for name in marks} == marks and codes(found) == (151854, 282925)
    assert found.vocabulary.used == 282926 and found.layout.row_ends == (1, 1)
    with pytest.raises(UserError, match="expected a token '<.extra_100.>', found none"):
        few = {name: id for name, id in emu3_names().items() if name != "<|extra_100|>"}
        emu3_5.language_of(few, [*range(151643)], 184622, "here", (128, 128))


def lumina_2_names() -> dict[str, int]:
    """Qwen's names, and Lumina-mGPT 2.0's from 151665 on; the place of <reserved08706> among them is a guess."""
    qwen = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    marks = {"<racm3:break>": 151665, "<eoss>": 151666, "<reserved08706>": 151668, "<reserved08799>": 151670}
    return qwen | marks | {f"<reserved{8800 + n:05}>": 151671 + n for n in range(1, 97)}


def test_lumina_mgpt_2s_table() -> None:
    def made(names: dict[str, int], told: dict[str, object]) -> Language:
        return chameleon.language_of(
            names, [*range(151643)], 171392, "lumina_mgpt_2", "here", None, told=told, count=16384
        )

    found = made(lumina_2_names(), {"eos_token": "<|endoftext|>", "bos_token": None})
    marks = {"boi": 151665, "eoi": 151666, "eol": 151670, "bos": 151643, "eos": 151645}
    assert {name: published(found, name) for name in marks} == marks and codes(found) == (155000, 171383)
    sizes = found.border.theirs[found.vocabulary.size_offset : found.vocabulary.image_offset]
    assert sizes.tolist() == [151671 + n for n in range(1, 49)], "192 codes in units of 4"
    other = made(lumina_2_names(), {"eos_token": {"content": "<|im_end|>"}})
    assert published(other, "bos") == 151645 and published(other, "eos") == 151643
    named = lumina_2_names() | {code_name(code): 150000 + code for code in range(3)}
    with pytest.raises(UserError, match="here: expected 16384 image codes, as the image tokenizer has; found 3"):
        same_codes(made(named, {}), 16384, "here")
    with pytest.raises(UserError, match="expected eos_token"):
        made(lumina_2_names(), {"eos_token": "</s>"})


def test_lwms_tables_are_one() -> None:
    names = {"<unk>": 0, "<s>": 1, "</s>": 2}
    found = lwm.language_of(names, [*range(3, 32000)], (32000, 8448), 8192, "here")
    assert found.vocabulary.used == found.border.size == 40448 and found.vocabulary.rest == 254
    marks = {"pad": 0, "bos": 1, "eos": 2, "eof": 32000 + 8192, "eov": 32000 + 8193}
    assert {name: published(found, name) for name in marks} == marks and codes(found) == (32000, 32000 + 8191)
    text = found.vocabulary.control("eof")  # text ids come first here too, so that each modality is one range
    assert (found.border.theirs[:text] < 32000).all() and (found.border.theirs[text:] >= 32000).all()
    assert (
        found.layout.split(found.vocabulary, "by_side") == text
        and found.layout.split(found.vocabulary, "joint") is None
    )
    with pytest.raises(UserError, match="expected at least 8192 [+] 2 ids in the table of images"):
        lwm.language_of(names, [*range(3, 32000)], (32000, 8193), 8192, "here")
    with pytest.raises(
        UserError, match="here: expected a piece for each of 32000 ids of text, found none for id 31990"
    ):
        lwm.language_of(names, [*range(3, 31990)], (32000, 8448), 8192, "here")
    alone = lwm.language_of(names, [*range(3, 32000)], (32000,), 0, "here")
    assert alone.vocabulary.used == 32000 and alone.vocabulary.codebook_size == 0
    assert alone.layout.split(alone.vocabulary, "by_side") is None


def test_liquids_table() -> None:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(99))]
    names = {name: id for id, name in enumerate(special)} | {"last": 255999}
    found = liquid.language_of(names, [*range(len(special), 256000)], 264192, "here", (32, 32))
    marks = {"pad": 0, "eos": 1, "bos": 2, "boi": 7, "eoi": 8, "unconditional": 9}
    assert {name: published(found, name) for name in marks} == marks and codes(found) == (256000, 264191)
    assert found.vocabulary.used == 264192
    with pytest.raises(UserError, match="expected image codes after id 255999"):
        liquid.language_of(names, [*range(len(special), 256000)], 256000, "here", (32, 32))


def test_names_that_are_wrong_are_refused_by_the_first() -> None:
    names = chameleon_names()
    text = [*range(len(names), 65536)]

    def refused(change: dict[str, int], without: str, match: str) -> None:
        changed = {name: id for name, id in (names | change).items() if name != without}
        with pytest.raises(UserError, match=match):
            chameleon.language_of(changed, text, 65536, "chameleon", "here", None)

    refused({}, "<racm3:break>", "expected a token '<racm3:break>', found none")
    refused({}, code_name(17), "none for code 17")
    refused(
        {code_name(5): 10, code_name(6): 9},
        "",
        "image code 5: expected id 9, because ids must be consecutive; found 10",
    )
    refused({"<eoss>": 100}, "", "image code 96 and <eoi> both have id 100")
    with pytest.raises(UserError, match="expected a table of at least 65536 ids"):
        chameleon.language_of(names, text, 60000, "chameleon", "here", None)


def test_a_control_without_a_token_takes_a_free_id() -> None:
    found = language(10, [0, 1, 2, 3], {"bos": 4, "eos": 5})
    assert published(found, "pad") == 9 and found.vocabulary.rest == 3
    with pytest.raises(UserError, match="no token for pad, and no free id"):
        language(6, [0, 1, 2, 3], {"bos": 4, "eos": 5})
