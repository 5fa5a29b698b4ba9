"""Estimates the least time of a step. For each of five resources, it computes the time that the step needs at the data
sheet's rate.

  matmuls   executed matrix FLOPs (recomputation included) / bf16 peak
  memory     bytes of weights, operands of matmuls and optimizer state / HBM bandwidth
  ICI        bytes sent inside a slice / bandwidth of the links that each collective's group can use
  DCN        bytes sent between slices / a device's share of its host's network bandwidth
  host       bytes that a remat policy writes to the host's memory in forward and reads in backward / PCIe bandwidth

The lower bound of a step's time is the longest of the five, plus the time of the collectives that the compiled program
does not overlap with computation. The upper estimate is the sum of all five, with matmuls at ATTAINABLE times the peak.
The real time lies between. Nothing here was timed. Latency, small kernels, the host's work and stragglers are left out;
they matter more if steps are small.

Axes: B batch, T position, D model, N query heads, K KV heads, H head dim, F MLP, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ar_unified.model.attention import recomputed_products
from ar_unified.model.config import layer_matrices, matmul_parameters, offloaded_bytes
from ar_unified.model.remat import made_again
from ar_unified.parallel.hardware import Hardware
from ar_unified.planning.collectives import Collective
from ar_unified.planning.programs import Program, Run, gradient_bytes, local_bytes, make_task
from ar_unified.sampling.pace import Pace

ATTAINABLE = 0.7  # share of the peak in large matmuls; the best training runs published for v5p reach 65 to 69% MFU
_NEWTON_SCHULZ = 5  # the default `ns_steps` of optax's muon
ASSUMPTIONS = (
    "rates are from data sheets, for one direction of a network; nothing was timed",
    "in the fastest case, matmuls run at peak; memory traffic, and the collectives that the compiled program "
    "overlaps, run at the same time as the matmuls",
    f"in the slowest case, matmuls run at {ATTAINABLE:.0%} of peak, and nothing overlaps",
    "documents are as long as data.max_tokens or the row, whichever is less; rows are full",
    "matmuls include recomputation: of layers by remat, of logits by the chunked loss, of scores by attention's "
    "backward pass; they also include Muon's iterations, spread over all devices",
    "every matmul reads and writes its operands in memory once; gathered weights are written and read once in each "
    "pass, and the head's float32 gradient once for each chunk of the loss",
    "the optimizer reads and writes its state once",
    "what a remat policy sends to the host is written once and read once, at the PCIe bandwidth of one direction; in "
    "the fastest case, this runs at the same time as the matmuls",
    "a collective sends by the ring algorithm over every link that its group can use: in both directions of an axis "
    "that is a closed ring, in one direction of any other axis; collectives do not share links with each other",
    "data for other slices is summed inside a slice first, and then each of its devices sends a part",
)


class Roofline(NamedTuple):
    """Seconds of one step (in decode, of one token in each row) by resource, and the numbers that they come from.

    Attributes:
      seconds: seconds by resource: "matmuls", "memory", "ICI", "DCN", "host".
      model_flops: FLOPs of all devices, as MFU counts them; `executed` includes recomputation.
      exposed: seconds of the collectives that the compiled program does not overlap with computation.
      open_ici: seconds on ICI if no axis of the network formed a ring.
      sent: bytes that a device sends, by network.
      tokens: tokens per step on all devices.
    """

    seconds: dict[str, float]
    model_flops: float
    executed: float
    exposed: float
    open_ici: float
    sent: dict[str, float]
    tokens: float
    peak_flops: float

    @property
    def fastest(self) -> float:
        """Seconds of a step if the compiled module overlaps everything that it can."""
        hidden = self.seconds["ICI"] + self.seconds["DCN"] - self.exposed
        return max(self.seconds["matmuls"], self.seconds["memory"], self.seconds["host"], hidden) + self.exposed

    @property
    def slowest(self) -> float:
        """Seconds of a step if nothing overlaps and matmuls reach ATTAINABLE times the peak."""
        matmuls = self.seconds["matmuls"] / ATTAINABLE
        return matmuls + sum(s for name, s in self.seconds.items() if name != "matmuls")

    @property
    def bound(self) -> str:
        """The resource that takes longest: one of the names of `seconds`."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    def mfu(self, seconds: float) -> float:
        """The model FLOPs utilisation if a step takes this many seconds."""
        return self.model_flops / seconds / self.peak_flops


class Traffic(NamedTuple):
    """One collective on the machine's networks: the bytes that a device sends on each, and the seconds needed."""

    ici: float
    dcn: float
    seconds_ici: float
    open_ici: float
    seconds_dcn: float


def traffic(each: Collective, mesh: Mesh, hardware: Hardware) -> Traffic:
    """The traffic of a collective. A collective between slices is assumed to be hierarchical: first inside slices, then
    across them.
    """
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
    """The number of links on which a device can send to its group at once, and what this number would be if no axis
    formed a ring.
    """
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


def roofline(program: Program, run: Run, hardware: Hardware, found: Sequence[Collective]) -> Roofline:
    """The estimate for a program of programs.py."""
    mesh = program.mesh
    moves = [traffic(each, mesh, hardware) for each in found]
    work = {"train": _train, "prefill": _prefill, "decode": _decode}[program.name](run, program)
    peak = hardware.flops * mesh.size
    seconds = {
        "matmuls": work.executed / peak,
        "memory": work.moved / hardware.hbm_bandwidth,
        "ICI": sum(move.seconds_ici for move in moves),
        "DCN": sum(move.seconds_dcn for move in moves),
        "host": work.offloaded / hardware.pcie,
    }
    sent = {"ICI": sum(move.ici for move in moves), "DCN": sum(move.dcn for move in moves)}
    alone = [move for move, each in zip(moves, found, strict=True) if not each.overlapped]
    exposed = sum(move.seconds_ici + move.seconds_dcn for move in alone)
    open_ici = sum(move.open_ici for move in moves)
    return Roofline(seconds, work.model, work.executed, exposed, open_ici, sent, work.tokens, peak)


class _Work(NamedTuple):
    """
    Attributes:
      model, executed: FLOPs of all devices, as MFU counts them and as executed.
      moved: bytes that one device reads and writes in its memory.
      tokens: tokens on all devices.
      offloaded: bytes that one device writes to its host's memory and reads from it.
    """

    model: float
    executed: float
    moved: float
    tokens: float
    offloaded: float = 0.0


def _operands(run: Run, tensor: int) -> float:
    """Bytes that the matmuls of all layers read and write per token on one device, in the compute dtype."""
    c = run.model
    split = 2 * (c.n_heads * 2 + 2 * c.n_kv_heads) * c.head_dim + 4 * c.d_mlp
    return float(jnp.dtype(c.dtype).itemsize * c.n_layers * (7 * c.d_model + split / tensor))


def _train(run: Run, program: Program) -> _Work:
    c, mesh, tokens = run.model, program.mesh, float(run.batch_size * run.sequence_length * run.drawn_contexts)
    document = min(run.document, run.sequence_length)
    attended = tokens * (document + 1) / 2
    layers, head = matmul_parameters(run.model)
    task = make_task(run)
    model = task.flops({"tokens": tokens, "attended": attended})
    attention = 2.0 * c.n_layers * c.n_heads * c.head_dim * attended  # FLOPs of one attention matmul (scores or values)
    deep = task.through_layers
    sizes = layer_matrices(c)
    again = deep * c.n_layers * sum(math.prod(sizes[name]) for name in made_again(c.remat, c.norm_placement == "swin"))
    # CPUs stand in for GPUs, whose backward kernels compute scores twice and dP twice.
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    scores = deep * (recomputed_products(c, mesh, run.sequence_length) if on_tpu else 3)
    # The loss of documents multiplies with the head once in each pass; other losses compute logits again in backward.
    logits = 0.0 if run.preference is None and run.policy is None else head
    executed = model + 2.0 * (again + logits) * tokens + scores * attention + _orthogonal(run)
    if "reference" in program.arguments:
        executed += 2.0 * (layers + head) * tokens + 2.0 * attention
    # Everything below is per device.
    back = deep + task.trains("layers.")  # backward matmuls: for gradients of inputs, and of trained weights
    passes = 1 + back + again / layers  # forward, backward, perhaps forward again
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"]
    tensor = mesh.shape["tensor"]
    width = jnp.dtype(c.dtype).itemsize  # bytes of a gathered weight; the gather writes it, matmuls read it
    weights = 2.0 * width * passes * (layers + head) / tensor * run.accumulation
    chunks = run.accumulation * math.ceil(tokens / ways / run.accumulation / run.loss_chunk)
    if task.trains("head", "embedding"):
        weights += 8.0 * head / tensor * chunks  # the head's float32 gradient: each chunk reads and writes it
    held = program.local_bytes()
    # The trained parameters, their gradients (of the same size) and their moments are read and written.
    state = 4.0 * gradient_bytes(run, mesh) + 2.0 * held["optimizer"]
    offloaded = deep * 2.0 * offloaded_bytes(c) * tokens / ways  # once to the host and once back
    moved = weights + passes * _operands(run, tensor) * tokens / ways + state + offloaded
    return _Work(model, executed, moved, tokens, offloaded)


def _orthogonal(run: Run) -> float:
    """FLOPs of Muon's Newton-Schulz iterations: 4 m m n + 2 m m m for each matrix [m, n] of the layers, m <= n.

    It counts all matrices of the layers, even untrained ones.
    """
    if run.optimizer.optimizer != "muon" or not make_task(run).trains("layers."):
        return 0.0
    matrices = map(sorted, layer_matrices(run.model).values())
    return float(_NEWTON_SCHULZ * run.model.n_layers * sum(4 * m * m * n + 2 * m * m * m for m, n in matrices))


def _prefill(run: Run, program: Program) -> _Work:
    """The work of prefill for one batch of prompts, each half as long as the cache. Prefill computes no logits."""
    c, mesh = run.model, program.mesh
    rows, prompt = program.arguments["requests"][0].shape
    tokens = float(rows * prompt)
    layers, _ = matmul_parameters(run.model)
    flops = 2 * layers * tokens + 4.0 * c.n_layers * c.n_heads * c.head_dim * tokens * (prompt + 1) / 2
    operands = _operands(run, mesh.shape["tensor"]) * tokens / (mesh.shape["data"] * mesh.shape["fsdp"])
    return _Work(flops, flops, _read(program) + operands, tokens)


def _decode(run: Run, program: Program) -> _Work:
    """The work of one step of decode. It reads all weights and the whole cache. Every row gets one token, or with a
    window one or more tokens.
    """
    c, rows = run.model, float(run.requests * run.contexts * Pace(run.window).most)
    layers, head = matmul_parameters(run.model)
    flops = 2 * (layers + head) * rows + 4.0 * c.n_layers * c.n_heads * c.head_dim * rows * run.max_length
    return _Work(flops, flops, _read(program) + program.local_bytes()["cache"], float(run.requests))


def _read(program: Program) -> float:
    """Bytes of the weights that a device reads, as the sampler stores them. The embedding does not count, because only
    a few of its rows are read.
    """
    weights = program.arguments["parameters"]
    layers = weights.layers if program.name == "decode" else weights
    return float(program.local_bytes()["parameters"] - local_bytes(layers["embedding"]))
