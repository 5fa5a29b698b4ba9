"""Files of prompts from users: with additional columns, headers, lines without a prompt, and ids of any kind."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ar_unified.language.document import TextPart
from ar_unified.sampling.columns import ROW, Names, nearly, own_columns
from ar_unified.sampling.request import RequestError
from ar_unified.sampling.requests import read_requests
from tests.sampling.test_formats import png, tar


def read(path, warnings=None):
    cells = SimpleNamespace(factor=4, codes_per_position=1)
    warn = (lambda line: pytest.fail(line)) if warnings is None else warnings.append
    return read_requests(path, cells=cells, defaults={"context": "empty_prompt"}, warn=warn)


def prompts(lines):
    return [line.content[0].text for line in lines if not line.error]


def test_columns_of_its_own_travel_with_one_warning_and_slips_stay_errors(tmp_path):
    rows = [
        {"category": "colour", "split": "val", "prompt": "a green bench"},
        {"category": "colour", "prompt_en": "x", "model": "m", "step": 3, "prompt": "a bowl", "meta": {"of": 1}},
        {"category": "colour", "guidence": 3.0, "prompt": "a boat"},
        {"prompt": "a", "category": 1, "meta": {"category": 2}},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    warnings = []
    first, second, third, fourth = read(path, warnings)
    assert first.request.meta == {"category": "colour", "split": "val"}
    assert second.request.meta == {"category": "colour", "prompt_en": "x", "model": "m", "step": 3, "of": 1}
    assert "'guidence': did you mean 'guidance'?" in third.error and "remove one of them" in fourth.error
    (warning,) = warnings
    assert warning == f"{path}: columns that are no settings are kept in meta: category, split, prompt_en, model, step"


@pytest.mark.parametrize(
    "key, meant",
    [
        ("guidence", "'guidance'"), ("temprature", '"text": {"temperature": ...} or "image"'), ("Seed", "'seed'"),
        ("imageSize", "'image_size'"), ("mdoe", "'mode'"), ("max_token", "'max_tokens'"),
        ("temperature", '"text": {"temperature"'), ("guidance_scale", "'guidance'"), ("cfg", "'guidance'"),
        ("num_images", "'n'"), ("width", "'image_size'"), ("metta", "'meta'"), ("ID", "'id'"), ("promt_", "'prompt'"),
    ],
)  # fmt: skip
def test_what_may_have_been_meant_as_a_setting_is_an_error(key, meant):
    with pytest.raises(RequestError, match=re.escape(f"unknown key {key!r}: did you mean {meant}")):
        own_columns({key: 1} | ({} if key == "promt_" else {"prompt": "a"}))


def test_slips_are_found_wherever_a_letter_went_wrong():
    """Tries keys with a missing, doubled or swapped letter. Short keys are left out, because their slips may be other
    words ("mod", "nn")."""
    generator = random.Random(5)
    for key in (key for key in ROW if len(key) > 5):
        for _ in range(5):
            i = generator.randrange(len(key) - 1)
            for slip in (
                key[:i] + key[i + 1 :],
                key[:i] + key[i] + key[i:],
                key[:i] + key[i + 1] + key[i] + key[i + 2 :],
            ):
                assert slip == key or nearly(slip, ROW), (key, slip)
    for (
        word
    ) in "category split challenge note type name url source tags model step code node caption_id image_path".split():
        assert own_columns({word: 1, "prompt": "a"}) == {word: 1}, word


def test_beside_the_right_key_a_similar_one_is_no_slip_of_it():
    row = {"prompt": "a", "prompts": ["a", "b"], "Prompt": "A"}
    assert own_columns(row) == {"prompts": ["a", "b"], "Prompt": "A"}


def test_slips_inside_a_setting_are_errors_too(tmp_path):
    rows: list[dict] = [
        {"text": {"temprature": 1}},
        {"image": {"topk": 3}},
        {"canvas": {"image": "a.png", "msk": "b.png"}},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a"} | row) + "\n" for row in rows))
    for line, slip, meant in zip(
        read(path), ["temprature", "topk", "msk"], ["temperature", "top_k", "mask"], strict=True
    ):
        assert f"unknown key {slip!r}: did you mean {meant!r}?" in line.error


def test_tables_of_prompts(tmp_path):
    """The tables are like PartiPrompts.tsv and exports of pandas and of spreadsheets. The header is not a prompt."""
    rows = [("a green bench", "Colour"), ('"G I G" on a wall', "Writing, Symbols"), ("bond", "Abstract")]
    (tmp_path / "a.tsv").write_text("Prompt\tCategory\n" + "".join(f"{p}\t{c}\n" for p, c in rows))
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows]
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["prompt,Category", *quoted]).encode())
    (tmp_path / "c.csv").write_text("Category;caption\n" + "".join(f"{c};{p}\n" for p, c in rows[::2]))
    (tmp_path / "d.txt").write_text((tmp_path / "a.tsv").read_text())
    pq.write_table(pa.table({"text": [p for p, _ in rows], "Category": [c for _, c in rows]}), tmp_path / "e.parquet")
    for name in ("a.tsv", "b.csv", "c.csv", "d.txt", "e.parquet"):
        warnings = []
        lines = read(tmp_path / name, warnings)
        expected = rows[::2] if name == "c.csv" else rows
        assert [(line.content[0].text, line.request.meta) for line in lines] == [
            (prompt, {"Category": category}) for prompt, category in expected
        ], name
        assert warnings == [f"{tmp_path / name}: columns that are no settings are kept in meta: Category"]
        assert [line.id for line in lines] == [f"{i:06d}" for i in range(1, len(lines) + 1)]


def test_settings_of_a_table_and_what_other_systems_called_so(tmp_path):
    """DiffusionDB's metadata: seeds are used, but width and cfg are not, because they belong to other images. Bytes are
    not read."""
    path = tmp_path / "a.csv"
    path.write_text('prompt,seed,guidance,image_size,turn,image,cfg\na cat,7,2.5,"[8, 12]",True,x.png,7.0\nb,,,,,,\n')
    warnings = []
    first, second = read(path, warnings)
    request = first.request
    assert (request.seed, request.guidance, request.image_size, request.turn) == (7, 2.5, (2, 3), True)
    assert request.meta == {"image": "x.png", "cfg": "7.0"} and second.request.guidance == 1
    assert warnings[0].endswith("are kept in meta: image, cfg (settings have other names: cfg is guidance here)")
    path.write_text("prompt,seed\na cat,soon\na dog,1,2\na bird,3\n")
    assert [bool(line.error) for line in read(path)] == [True, True, False]

    path = tmp_path / "a.tsv"  # cells over two lines, as pandas writes them, and an incomplete line
    path.write_text('prompt\tseed\n"a\ncat"\t1\n"a ""big"" dog"\t2\n')
    assert [(line.content[0].text, line.request.seed) for line in read(path)] == [("a\ncat", 1), ('a "big" dog', 2)]
    path.write_text('prompt\tseed\n"a" cat\t1\na dog\n')
    assert prompts(read(path)) == ['"a" cat', "a dog"]

    table = pa.table({"prompt": ["a", "b"], "seed": [2**31, 5], "image": [b"1", b"2"], "nsfw": [0.5, float("nan")]})
    pq.write_table(table, tmp_path / "b.parquet")
    warnings = []
    first, second = read(tmp_path / "b.parquet", warnings)
    assert (first.request.seed, first.request.meta, second.request.meta) == (2**31, {"nsfw": 0.5}, {"nsfw": None})
    assert (
        "left out, because they are not prompts: column image" in warnings[0]
        and "are kept in meta: nsfw" in warnings[1]
    )


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.tsv", b"bond\telement\nb\tc\n", "one of them prompt, caption, text; found 'bond, element'"),
        ("a.csv", b"a cat\na dog\n", "If each line is a prompt, the file's name must end in .txt"),
        ("a.csv", b"prompt,prompt\na,b\n", "found 'prompt' twice"),
        ("a.csv", b'prompt\n"a\n', "expected a CSV file"),
        ("a.csv", "prompt\na\nHünd\n".encode("cp1252"), "a.csv, line 3: expected"),
        ("a.tsv", "prompt\tcategory\n".encode("utf-16"), "a.tsv: expected"),
        ("a.parquet", b"PAR1 broken", "expected a Parquet file"),
        ("a.txt.gz", b"\x1f\x8b", "unpack it first"),
        ("a.png", b"\x89PNG\r\n\x1a\n\x00\x00", "a.png: expected a file of requests, found a file that is not text"),
        ("a.xlsx", b"PK\x03\x04\x14\x00\x06\x00\x08", "a.xlsx: expected "),
        ("a.txt", b"\n\n", "expected at least one request, found none"),
    ],
)
def test_a_file_of_another_kind_is_an_error(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RequestError, match=re.escape(words)):
        read(tmp_path / name)


def test_what_is_no_prompt_never_becomes_one(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in ("a.txt", "._a.txt", ".hidden.txt", "README.txt", "license-plate.txt", "LICENSE", "b.png", ".DS_Store"):
        (folder / name).write_text(f"prompt of {name}")
    warnings = []
    assert prompts(read(folder, warnings)) == ["prompt of a.txt", "prompt of license-plate.txt"]
    assert warnings == [
        f"{folder}: left out, because they are not prompts: LICENSE (1), README.txt (1), files .png (1)"
    ]
    (folder / "._c.txt").write_text("new")  # after a Mac added its files, the job is the same

    shard = tar(tmp_path / "a.tar", {
        "./._0.txt": b"\0", "./0.txt": b"a cat", "__MACOSX/0.txt": b"no", "0.cls": b"7", ".DS_Store": b"\0",
        "1.txt": b"a dog", "1.jpg.npy": b"\0", "1.json": b'{"url": "u", "width": 8, "key": "1"}', "README.md": b"no",
        "2.cls": b"8", "sub/.cache/3.txt": b"no", "4.png": png(1), "4.txt": b"Which?",
    })  # fmt: skip
    warnings = []
    lines = read(shard, warnings)
    assert [line.id for line in lines] == ["0", "1", "4"] and prompts(lines[:2]) == ["a cat", "a dog"]
    assert lines[1].request.meta == {"url": "u", "width": 8, "key": "1"} and lines[2].content[1] == TextPart("Which?")
    assert "members .cls (2), members .jpg.npy (1), README.md (1)" in warnings[0]

    (tmp_path / "b.txt").write_text("prompt\na cat\n")  # a table of one column
    warnings = []
    assert prompts(read(tmp_path / "b.txt", warnings)) == ["a cat"] and "the header 'prompt'" in warnings[0]
    (tmp_path / "c.json").write_text('["a cat", {"prompt": "a dog", "n": 2}]')
    assert [line.request.n for line in read(tmp_path / "c.json")] == [1, 2]
    (folder / "a.txt").unlink(), (folder / "license-plate.txt").unlink()
    with pytest.raises(RequestError, match=r"expected a folder of \.txt files"):
        read(folder, [])


def test_an_id_that_cannot_name_a_folder_gets_a_name(tmp_path):
    ids = ["ok-1.a", "a/b", "../x", "x" * 300, "CON", "nul.txt", "a\x00b", "a:b", "Hünd", "ok.", " ", "Cat", "cat", 7,
           1.5, "\ud800", "日本"]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": id, "prompt": "a"}) + "\n" for id in [*ids, "", None, "a/b", [1]]))
    lines = read(path)
    good = lines[: len(ids)]
    assert [line.id for line in good] == list(map(str, ids)) and not any(line.error for line in good)
    names = [line.name for line in good]
    assert names[0] == "ok-1.a" and names[11] == "Cat" and names[13:15] == ["7", "1.5"]
    assert len({name.casefold() for name in names}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,98}[A-Za-z0-9_-]|[A-Za-z0-9]", name) for name in names)
    assert not {"con", "nul.txt"} & {name.casefold() for name in names}
    assert names == [line.name for line in read(path)][: len(ids)]
    *numbered, twice, wrong = lines[len(ids) :]
    assert [line.id for line in numbered] == ["000018", "000019"]
    assert "line 2 already has this id" in twice.error and "expected a text or a number" in wrong.error
    assert Names().add("a/b", 1) == names[1] != Names().add("a b", 1)  # the name depends only on the id
