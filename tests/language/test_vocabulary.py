"""The id space has disjoint ranges with one role each, and manifests refuse artefacts that do not fit together."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_unified.language.vocabulary import CONTROLS, Role, Vocabulary
from ar_unified.manifests import ManifestMismatch, manifest_hash, require_same

V = Vocabulary(text_size=300, codebook_size=64, size_tokens=8, text_hash="t", image_hash="i")


def test_ranges_follow_each_other_and_the_size_is_aligned():
    controls = [V.control(name) for name in CONTROLS]
    assert controls == list(range(300, 307))
    assert (V.size_offset, V.image_offset, V.rest_offset, V.size) == (307, 315, 379, 384)
    assert Vocabulary(121 - 64, 64).size == 128 and Vocabulary(122 - 64, 64).size == 256


def test_the_width_that_has_a_probability_is_exact_where_a_rest_is_given():
    assert (V.used, V.size) == (384, 384)  # without a rest, the whole padded width
    for rest, used, size in ((0, 379, 384), (5, 384, 384), (6, 385, 512)):
        wide = replace(V, rest=rest)
        assert (wide.used, wide.size) == (used, size)
        assert Vocabulary.from_manifest(json.loads(json.dumps(wide.manifest()))).manifest() == wide.manifest()
        assert not wide.role(np.arange(wide.rest_offset, wide.size)).any()
    assert Vocabulary(151643, 32768, controls=CONTROLS[:3], rest=8).used == 184422  # not a multiple of 128


def test_controls_are_the_layout_s_own_and_asked_for_by_name():
    own = replace(V, controls=("pad", "bos", "eos", "img", "frame"))
    assert [own.control(name) for name in own.controls] == list(range(300, 305))
    assert (own.pad, own.bos, own.eos, own.size_offset) == (300, 301, 302, 305)
    with pytest.raises(ValueError, match="no control token 'eot', only pad, bos, eos, img, frame"):
        own.control("eot")
    assert Vocabulary.from_manifest(json.loads(json.dumps(own.manifest()))) == own
    for wrong in (("pad", "bos"), ("pad", "bos", "eos", "bos")):
        with pytest.raises(ValueError, match="controls: expected pad, bos and eos, and each control only once"):
            replace(V, controls=wrong)


def test_every_id_has_one_role_in_numpy_and_inside_jit():
    expected = [Role.TEXT] * 300 + [Role.PAD] + [Role.CONTROL] * 6 + [Role.SIZE] * 8 + [Role.IMAGE] * 64
    expected += [Role.PAD] * (V.size - len(expected))
    ids = np.arange(V.size)
    roles = V.role(ids)
    assert isinstance(roles, np.ndarray) and roles.dtype == np.int32
    np.testing.assert_array_equal(roles, expected)
    traced = jax.jit(V.role)(jnp.asarray(ids.reshape(2, -1), jnp.int32))
    assert traced.dtype == jnp.int32
    np.testing.assert_array_equal(traced.reshape(-1), expected)
    np.testing.assert_array_equal(V.role(np.array([-1, -100, 10**6])), Role.PAD)


def test_names_are_for_people():
    ids = (3, V.control("boi"), V.size_offset, V.image_offset + 5, V.size - 1, -1)
    says = "text piece 3|<boi>|size 1|image code 5|id 383, which no document contains|id -1, which no document contains"
    assert "|".join(map(V.name, ids)) == says


def test_sizes_must_make_sense():
    for wrong in (dict(text_size=0), dict(codebook_size=-1), dict(size_tokens=-1), dict(rest=-1)):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}: expected at least \d, found"):
            Vocabulary(**dict(text_size=1, codebook_size=1) | wrong)


def test_text_alone_has_no_image_codes():
    alone = Vocabulary(300, 0, text_hash="t")
    ids = np.arange(alone.size)
    assert set(alone.role(ids).tolist()) == {Role.PAD, Role.TEXT, Role.CONTROL}
    assert Vocabulary.from_manifest(alone.manifest()) == alone


def test_manifest_there_and_back_through_json():
    manifest = json.loads(json.dumps(V.manifest()))
    assert Vocabulary.from_manifest(manifest) == V
    shuffled = dict(reversed(manifest.items()))
    assert manifest_hash(shuffled) == manifest_hash(V.manifest())
    require_same(V.manifest(), shuffled, expected_from="a", found_from="b")


def test_mismatch_names_both_sides_and_the_first_field_that_differs():
    other = Vocabulary(300, 65, 8, "t", "other").manifest()
    assert manifest_hash(other) != manifest_hash(V.manifest())
    with pytest.raises(ManifestMismatch) as caught:
        require_same(V.manifest(), other, expected_from="checkpoint runs/a", found_from="data runs/b")
    assert caught.value.field == "codebook_size"
    for word in ("'codebook_size'", "checkpoint runs/a has 64", "data runs/b has 65"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "path, value, field",
    [
        (("controls", "boi"), 5, "controls.boi"),
        (("text_hash",), "other", "text_hash"),
        (("used",), 383, "used"),
        (("extra",), 1, "extra"),
        (("version",), 3, "version"),
    ],
)
def test_nested_extra_and_hash_fields_are_compared(path, value, field):
    other = json.loads(json.dumps(V.manifest()))
    inner = other if len(path) == 1 else other[path[0]]
    inner[path[-1]] = value
    with pytest.raises(ManifestMismatch) as caught:
        require_same(V.manifest(), other, expected_from="a", found_from="b")
    assert caught.value.field == field


def test_a_manifest_with_other_ids_or_without_a_field_is_not_read():
    moved = V.manifest() | {"offsets": {"text": 7, "control": 307, "size": 314, "image": 322}}
    with pytest.raises(ManifestMismatch, match="offsets.text"):
        Vocabulary.from_manifest(moved)
    with pytest.raises(ManifestMismatch, match="'size_tokens'"):
        Vocabulary.from_manifest({key: value for key, value in V.manifest().items() if key != "size_tokens"})
