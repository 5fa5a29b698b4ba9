"""How long a step takes at least: four resources, what a step asks of each, and data-sheet rates. An estimate.

  products   matrix FLOPs that run (recomputation included) / bf16 peak
  memory     weights, operands of products, optimizer state / HBM bandwidth
  ICI        bytes sent inside a slice / the links that the group of each collective can use
  DCN        bytes sent between slices / a device's share of its host's network

If everything overlapped, the step would take as long as the slowest of the four; if nothing did, as long as all of
them, with products at ATTAINABLE of their peak. The truth lies between, and nothing here was timed: latency, small
kernels, the host and stragglers are left out, and count more the smaller the step.

B batch, T position, D model, N query heads, K KV heads, H head dim, F MLP, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from ar_unified.parallel.hardware import Hardware
from ar_unified.planning.collectives import Collective
from ar_unified.planning.programs import Run, make_task

ATTAINABLE = 0.7  # of peak, in large products: the best training runs published for v5p reach 65 to 69% MFU
ASSUMPTIONS = (
    "rates are the data sheet's, one direction; nothing was timed",
    f"fastest: products at peak, all overlapped; slowest: products at {ATTAINABLE:.0%} of peak, nothing overlapped",
    "documents are as long as data.max_tokens or the row, whichever is less; rows are full",
    "products include what is computed again: layers by remat, logits by the chunked loss, scores by attention's "
    "backward",
    "memory traffic: every product reads and writes its operands once, gathered weights are written and read once a "
    "pass, AdamW reads and writes its state once",
    "a collective sends by the ring algorithm over every link its group can use: both directions of an axis that is a "
    "closed ring, one of an axis that is not; collectives do not share links with each other",
    "what crosses slices is sent in parts by all devices of a slice, each after summing inside it",
)


class Roofline(NamedTuple):
    """Seconds of one step (of one token of each row, for decode), by resource, and what they come from.

    Attributes:
      seconds: by resource: "products", "memory", "ICI", "DCN".
      model_flops: of all devices, as MFU counts them; `executed` with recomputation.
      open_ici: seconds on ICI if no axis of the network were closed to a ring.
      sent: bytes a device sends, by network.
      tokens: of a step, all devices.
    """

    seconds: dict[str, float]
    model_flops: float
    executed: float
    open_ici: float
    sent: dict[str, float]
    tokens: float
    peak_flops: float

    @property
    def fastest(self) -> float:
        return max(self.seconds.values())

    @property
    def slowest(self) -> float:
        products = self.seconds["products"] / ATTAINABLE
        return products + sum(s for name, s in self.seconds.items() if name != "products")

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    def mfu(self, seconds: float) -> float:
        return self.model_flops / seconds / self.peak_flops


class Traffic(NamedTuple):
    """One collective on the machine's networks: bytes a device sends on each, and seconds that takes."""

    ici: float
    dcn: float
    seconds_ici: float
    open_ici: float
    seconds_dcn: float


def traffic(each: Collective, mesh: Mesh, hardware: Hardware) -> Traffic:
    """Between slices a hierarchical algorithm is assumed: inside each slice first, the parts across."""
    devices = mesh.devices.flat
    group = [devices[i] for i in each.groups[0]]
    slices = len({_slice(device) for device in group})
    inside = len(group) // slices
    whole = each.bytes * each.times * (2 if each.kind == "all-reduce" else 1)
    if each.kind == "collective-permute":
        cut = sum(_slice(devices[a]) != _slice(devices[b]) for a, b in each.groups) / len(each.groups)
        ici, dcn = whole * (1 - cut), whole * cut
    else:
        ici = whole * (inside - 1) / inside
        dcn = whole / inside * (slices - 1) / slices
    links, axes = _links([device for device in group if _slice(device) == _slice(group[0])], mesh, hardware)
    return Traffic(ici, dcn, ici / (hardware.link * links), ici / (hardware.link * axes), dcn / hardware.dcn)


def _slice(device: object) -> int:
    return getattr(device, "slice_index", 0) or 0


def _links(group: Sequence[object], mesh: Mesh, hardware: Hardware) -> tuple[int, int]:
    """Links a device can send on at once to others of its group, and how many those were without closed rings."""
    if not hardware.torus:
        return 1, 1
    total = np.array([device.coords for device in mesh.devices.flat])
    sizes = total.max(0) - total.min(0) + 1
    spans = [len(set(axis)) for axis in np.array([device.coords for device in group]).T]  # type: ignore[attr-defined]
    links = 0
    for span, size in zip(spans, sizes, strict=True):
        if span > 1:
            links += 2 if span == size and size % hardware.ring == 0 else 1
    return max(links, 1), max(sum(span > 1 for span in spans), 1)


def roofline(name: str, run: Run, mesh: Mesh, hardware: Hardware, found: Sequence[Collective]) -> Roofline:
    """The estimate for a program of programs.py."""
    moves = [traffic(each, mesh, hardware) for each in found]
    counted = {"train": _train, "prefill": _prefill, "decode": _decode}[name](run, mesh)
    model, executed, moved, tokens = counted
    peak = hardware.flops * mesh.size
    seconds = {
        "products": executed / peak,
        "memory": moved / hardware.hbm_bandwidth,
        "ICI": sum(move.seconds_ici for move in moves),
        "DCN": sum(move.seconds_dcn for move in moves),
    }
    sent = {"ICI": sum(move.ici for move in moves), "DCN": sum(move.dcn for move in moves)}
    return Roofline(seconds, model, executed, sum(move.open_ici for move in moves), sent, tokens, peak)


def _weights(run: Run) -> tuple[float, float]:
    """Weights that a token is multiplied with: of all layers, and of the head."""
    c = run.model
    layer = 2 * c.d_model * c.head_dim * (c.n_heads + c.n_kv_heads) + 3 * c.d_model * c.d_mlp
    return float(c.n_layers * layer), float(c.vocab_size * c.d_model)


def _train(run: Run, mesh: Mesh) -> tuple[float, float, float, float]:
    c, tokens = run.model, float(run.batch_size * run.row_length)
    document = min(run.document, run.row_length)
    attended = tokens * (document + 1) / 2
    layers, head = _weights(run)
    model = make_task(run).flops({"tokens": tokens, "attended": attended})
    attention = 2.0 * c.n_layers * c.n_heads * c.head_dim * attended  # one product of scores or of values
    again = {"none": 0.0, "dots": 0.0, "full": 2.0 * layers * tokens}[c.remat]
    scores = 3.0 + (0.0 if c.remat == "none" else 2.0)  # the backward kernels make scores twice and dP twice
    executed = model + again + 2.0 * head * tokens + scores * attention
    # Per device from here on.
    passes = 4 if c.remat == "full" else 3  # forward, perhaps again, and two products of backward
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"]
    tensor = mesh.shape["tensor"]
    per_token = c.n_layers * (
        7 * c.d_model + (2 * (c.n_heads * 2 + 2 * c.n_kv_heads) * c.head_dim + 4 * c.d_mlp) / tensor
    )
    shards = mesh.shape["fsdp"] * tensor
    microbatches = run.accumulation
    weights = passes * 4.0 * (layers + head) / tensor * microbatches  # bfloat16, written by the gather and read
    state = 32.0 * (layers + 2 * head) / shards  # parameters and two moments in and out, gradients out and in
    return model, executed, weights + 2.0 * passes * per_token * tokens / ways + state, tokens


def _prefill(run: Run, mesh: Mesh) -> tuple[float, float, float, float]:
    prompt = run.max_length // 2
    tokens = float(run.requests * prompt)
    c = run.model
    layers, head = _weights(run)
    flops = 2 * layers * tokens + 2 * head * run.requests
    flops += 4.0 * c.n_layers * c.n_heads * c.head_dim * tokens * (prompt + 1) / 2
    return flops, flops, _stored(run, mesh), tokens


def _decode(run: Run, mesh: Mesh) -> tuple[float, float, float, float]:
    """Of one token for every row: all weights and the whole cache are read."""
    c, rows = run.model, float(run.requests * run.contexts)
    layers, head = _weights(run)
    flops = 2 * (layers + head) * rows + 4.0 * c.n_layers * c.n_heads * c.head_dim * rows * run.max_length
    cache = 2.0 * c.n_layers * c.n_kv_heads * c.head_dim * run.max_length * rows * 2
    held = mesh.shape["data"] * mesh.shape["fsdp"] * math.gcd(mesh.shape["tensor"], c.n_kv_heads)
    return flops, flops, _stored(run, mesh) + cache / held, float(run.requests)


def _stored(run: Run, mesh: Mesh) -> float:
    """Weights read on a device, in the float32 they are kept in; gathered over fsdp they are read whole."""
    layers, head = _weights(run)
    return 4.0 * (layers + head) / mesh.shape["tensor"]
