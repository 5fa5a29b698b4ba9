"""The quantizers. `make` builds one by name, from one flat set of settings.

fsq     a grid of any size, no codebook that could collapse                     arXiv:2309.15505, 2601.17124
vq      a learned codebook, by default on the unit sphere                       arXiv:1711.00937, 2110.04627
simvq   a frozen codebook and one linear layer                                  arXiv:2411.02038
lfq     signs                                                                   arXiv:2310.05737
bsq     signs on the unit sphere                                                arXiv:2406.07548
ibq     a learned codebook; every code gets a gradient                          arXiv:2412.02692
rq      D codes per position, each for what the previous codes left over        arXiv:2203.01941
"""

from __future__ import annotations

import inspect
from typing import Any

from flax import nnx

from ar_tokenizers.image.quantizers.base import Quantized as Quantized
from ar_tokenizers.image.quantizers.base import Quantizer as Quantizer
from ar_tokenizers.image.quantizers.fsq import FSQ as FSQ
from ar_tokenizers.image.quantizers.ibq import IBQ as IBQ
from ar_tokenizers.image.quantizers.lfq import BSQ as BSQ
from ar_tokenizers.image.quantizers.lfq import LFQ as LFQ
from ar_tokenizers.image.quantizers.rq import RQ as RQ
from ar_tokenizers.image.quantizers.simvq import SimVQ as SimVQ
from ar_tokenizers.image.quantizers.vq import VQ as VQ

NAMES = ("fsq", "vq", "simvq", "lfq", "bsq", "ibq", "rq")
USUAL_DIM = {"vq": 8, "simvq": 8, "ibq": 32, "rq": 8}
# Without the entropy penalty, these quantizers' codebooks collapse. The usual weight of all others is 0.
USUAL_ENTROPY = {"lfq": 0.1, "bsq": 0.1, "ibq": 0.1}


def make(
    *,
    quantizer: str,
    levels: tuple[int, ...] = (8, 5, 5, 5),
    activation: str = "tanh",
    codes: int = 1024,
    space: str = "sphere",
    code_dim: int = 0,
    depth: int = 4,
    codebook_update: str = "gradient",
    gradient: str = "straight_through",
    beta: float = 0.25,
    entropy: float = -1.0,
    restart: float = 0.1,
    rngs: nnx.Rngs,
) -> Quantizer:
    """Makes the quantizer of that name. Under nnx.eval_shape, it makes no arrays, but the sizes of the result (`dim`,
    `codebook_size`, `depth`) are still numbers.

    Args:
      levels, activation: for fsq.
      codes: the codebook size, for all others.
      space: for vq, where the codes are: "sphere" or "euclidean".
      code_dim: for vq, simvq, ibq and rq, the dimensions of a code vector; 0: the quantizer's usual number.
      depth: for rq, the codes per position.
      codebook_update, restart: for vq and rq (codebook.py).
      gradient: for vq, simvq and rq.
      beta: the weight of the commitment loss.
      entropy: for vq, lfq, bsq and ibq, the weight of the entropy penalty; negative: the quantizer's usual weight.

    Raises:
      ValueError: the name is unknown, a size is impossible for the quantizer, or a setting is not for it.
    """
    if quantizer not in NAMES:
        raise ValueError(f"quantizer must be one of {', '.join(NAMES)}, got {quantizer!r}")
    for name, value, plain, heeded_by in (
        ("activation", activation, "tanh", ("fsq",)),
        ("codebook_update", codebook_update, "gradient", ("vq", "rq")),
        ("gradient", gradient, "straight_through", ("vq", "simvq", "rq")),
        ("entropy", max(entropy, 0.0), 0.0, ("vq", "lfq", "bsq", "ibq")),
        ("space", space, "sphere", ("vq",)),
        ("code_dim", code_dim, 0, tuple(USUAL_DIM)),
    ):
        if value != plain and quantizer not in heeded_by:
            raise ValueError(
                f"{name}={value!r} is only for {' or '.join(heeded_by)}; for quantizer {quantizer} it must be {plain!r}"
            )
    dim = code_dim or USUAL_DIM.get(quantizer, 0)
    entropy = entropy if entropy >= 0 else USUAL_ENTROPY.get(quantizer, 0.0)
    if quantizer == "fsq":
        return FSQ(levels, activation)
    if quantizer == "simvq":
        return SimVQ(codes, dim, gradient=gradient, beta=beta, rngs=rngs)
    if quantizer in ("lfq", "bsq"):
        return (LFQ if quantizer == "lfq" else BSQ)(codes, beta=beta, entropy=entropy)
    if quantizer == "ibq":
        return IBQ(codes, dim, beta=beta, entropy=entropy, rngs=rngs)
    table: dict[str, Any] = dict(codebook_update=codebook_update, gradient=gradient, restart=restart, rngs=rngs)
    if quantizer == "rq":
        return RQ(codes, dim, depth=depth, beta=beta, **table)
    return VQ(codes, dim, space=space, beta=beta, entropy=entropy, **table)


SETTINGS = tuple(name for name in inspect.signature(make).parameters if name != "rngs")
