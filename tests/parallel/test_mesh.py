from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType

from ar_unified.parallel.mesh import make_mesh
from ar_unified.parallel.rules import place_batch, shardings, spec
from ar_unified.parallel.zigzag import unzigzag, zigzag
from tests.kernels.topologies import needs_libtpu


def test_axes_are_named_and_auto_and_one_takes_the_rest():
    mesh = make_mesh(dict(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == dict(data=2, fsdp=2, tensor=2, context=1)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(make_mesh().shape)["data"] == 8
    assert make_mesh({}, jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "shape, message",
    [
        (dict(data=-1, fsdp=3), "fsdp=3.*multiply to 3, but there are 8 devices"),
        (dict(data=2, fsdp=2), "multiply to 4, but there are 8 devices"),
        (dict(data=-1, fsdp=-1), "or -1 for one axis"),
        (dict(data=0), "expected positive sizes"),
        (dict(model=2), "unknown axes.*model.*data, fsdp, tensor, context"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


@needs_libtpu
@pytest.mark.parametrize("chips", ["v5e:4x4", "v5p:2x2x4"])
def test_slices_are_the_outer_part_of_data(chips):
    devices = get_topology_desc(platform="tpu", topology_name=chips, num_slices=2).devices
    mesh = make_mesh(dict(data=-1, fsdp=2, tensor=4), list(reversed(devices)))
    assert dict(mesh.shape) == dict(data=4, fsdp=2, tensor=4, context=1)
    index = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (index[:2] == 0).all() and (index[2:] == 1).all()
    # The chips of a tensor group are neighbours: four form a square, not a line with distant ends.
    for group in mesh.devices.reshape(8, 4):
        steps = [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in zip(group, group[1:], strict=False)]
        assert max(steps) <= 2
    with pytest.raises(ValueError, match="fsdp=32: .* product 32 .* 16 devices of each of the 2 slices"):
        make_mesh(dict(fsdp=32), devices)


def test_rules_place_axes_by_name():
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    shapes = {"w": jax.ShapeDtypeStruct((3, 8, 6), np.float32), "k": jax.ShapeDtypeStruct((8, 1), np.float32)}
    placement = shardings(mesh, {"w": ("layers", "embed", "mlp"), "k": ("embed", "kv_heads")}, shapes)
    assert placement["w"].spec == jax.P(None, "fsdp", "tensor")
    assert placement["k"].spec == jax.P("fsdp", None)  # one KV head on two tensor devices is kept whole, by our policy


@pytest.mark.parametrize(
    "axes, shape, message",
    [
        (("embed", "mlp"), (6, 8), "w: axis 'embed' has size 6, not a multiple of mesh fsdp = 4"),
        (("heads", "mlp"), (8, 8), "w: logical axes 'heads' and 'mlp' both need mesh axis 'tensor'"),
        (("embed", "width"), (8, 8), "w: unknown logical axis 'width'"),
        (("embed",), (8, 8), "w: expected one logical axis per dimension"),
    ],
)
def test_what_cannot_be_placed_is_refused_by_name(axes, shape, message):
    with pytest.raises(ValueError, match=message):
        spec(make_mesh(dict(fsdp=4, tensor=2)), axes, shape, "w")


def test_batches_are_split_over_data_and_fsdp():
    mesh = make_mesh(dict(data=2, fsdp=4))
    placed = place_batch(mesh, {"tokens": np.arange(16).reshape(8, 2), "pixels": np.zeros((8, 4, 4, 3), np.uint8)})
    assert placed["tokens"].addressable_shards[3].data.tolist() == [[6, 7]]
    assert placed["pixels"].addressable_shards[0].data.shape == (1, 4, 4, 3)
    with pytest.raises(ValueError, match=r"batch\['tokens'\].*size 6.*data x fsdp = 8"):
        place_batch(mesh, {"tokens": np.zeros((6, 2))})


@pytest.mark.parametrize("ways", [2, 3, 8])
def test_devices_hold_an_early_and_a_late_piece(ways):
    mesh = make_mesh(dict(context=ways), jax.devices()[:ways])
    row = np.arange(4 * ways)[None]  # becomes 2 x `ways` pieces of two numbers
    with jax.set_mesh(mesh):
        turned = jax.jit(zigzag)(row)
        assert jax.jit(unzigzag)(turned).tolist() == row.tolist()
    pieces = row.reshape(2 * ways, 2)
    for i, shard in enumerate(turned.addressable_shards):
        assert shard.data.ravel().tolist() == [*pieces[i], *pieces[2 * ways - 1 - i]]
