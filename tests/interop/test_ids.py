"""Published tables of true size, by the names of their tokens: which id is what, and wrong names refused.

The ids are those of the published tokenizers (Chameleon's text_tokenizer.json, Emu3's tiktoken and vision tokens).
"""

from __future__ import annotations

import numpy as np
import pytest

from ar_unified.errors import UserError
from ar_unified.interop import chameleon, emu3
from ar_unified.interop.ids import Language, language
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


def test_names_that_are_wrong_are_refused_by_the_first() -> None:
    names = chameleon_names()
    text = [*range(len(names), 65536)]

    def refused(change: dict[str, int], without: str, match: str) -> None:
        changed = {name: id for name, id in (names | change).items() if name != without}
        with pytest.raises(UserError, match=match):
            chameleon.language_of(changed, text, 65536, "chameleon", "here", None)

    refused({}, "<racm3:break>", "expected a token '<racm3:break>', found none")
    refused({}, code_name(17), "none for code 17")
    refused({code_name(5): 10, code_name(6): 9}, "", "image code 5: expected id 9, as they are in order; found 10")
    refused({"<eoss>": 100}, "", "image code 96 and <eoi> are both id 100")
    with pytest.raises(UserError, match="expected a table of at least 65536 ids"):
        chameleon.language_of(names, text, 60000, "chameleon", "here", None)


def test_a_control_without_a_token_takes_a_free_id() -> None:
    found = language(10, [0, 1, 2, 3], {"bos": 4, "eos": 5})
    assert published(found, "pad") == 9 and found.vocabulary.rest == 3
    with pytest.raises(UserError, match="no token for pad, and no id that is free"):
        language(6, [0, 1, 2, 3], {"bos": 4, "eos": 5})
