"""Records are compared: all fields that differ are found, and the first one is named."""

import pytest

from ar_unified.manifests import ABSENT, ManifestMismatch, differences, manifest_hash, require_same

OLD = {"version": 1, "ids": {"eot": 3, "eol": 4}, "sizes": [2, 3], "none": {}}


def test_what_differs_is_named_dotted_in_the_order_of_the_new_record():
    new = {"sizes": (2, 4), "ids": {"eol": 5, "eot": 3, "img": 6}, "none": {}}
    found = differences(OLD, new)
    assert found == {"sizes": [[2, 3], [2, 4]], "ids.eol": [4, 5], "ids.img": [ABSENT, 6], "version": [1, ABSENT]}
    assert list(found) == ["sizes", "ids.eol", "ids.img", "version"]
    assert differences(OLD, {**OLD, "sizes": (2, 3)}) == {}, "a tuple comes back from JSON as a list"
    assert differences(OLD, {**OLD, "none": {"a": 0}}) == {"none.a": [ABSENT, 0], "none": [{}, ABSENT]}


def test_records_that_differ_are_refused_with_both_sides_and_the_first_field():
    require_same(OLD, dict(reversed(OLD.items())), expected_from="a", found_from="b")
    assert manifest_hash(OLD) == manifest_hash(dict(reversed(OLD.items()))) != manifest_hash({**OLD, "version": 2})
    with pytest.raises(ManifestMismatch, match="'ids.eol': runs/a has 4, runs/b has 9") as caught:
        require_same(
            OLD, {**OLD, "ids": {"eot": 3, "eol": 9}, "sizes": []}, expected_from="runs/a", found_from="runs/b"
        )
    assert caught.value.field == "ids.eol"
