"""Time and memory of a step of LoRA and of full tuning on this machine, measured in turns.

    PYTHONPATH=.:tokenizers python -m experiments.benchmarks.lora_step [PRESET]

Model, rows and optimizer are the same. Times are CPU seconds of all threads, on which other work on the machine has
less influence; ratios are medians of pairs. Two sizes are printed: the memory of the state, and the additional memory
of the compiled step.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from ar_unified.data.batch import PackedBatch
from ar_unified.language.vocabulary import Vocabulary
from ar_unified.model.config import config_from, parameter_count
from ar_unified.model.lora import LoraConfig
from ar_unified.parallel.mesh import make_mesh
from ar_unified.training.optimizer import OptimizerConfig, make_optimizer
from ar_unified.training.step import make_state, make_train_step
from ar_unified.training.tasks import TransformerTask

ROWS, LENGTH, PAIRS = 4, 256, 7
VOCABULARY = Vocabulary(text_size=4000, codebook_size=4000)
WAYS = {
    "full": None,
    "LoRA, rank 16": LoraConfig(rank=16),
    "LoRA, rank 16, base in bfloat16": LoraConfig(rank=16, base_dtype="bfloat16"),
    "LoRA, rank 16, base in int8": LoraConfig(rank=16, base_dtype="int8"),
    "LoRA, rank 16, query and value alone": LoraConfig(rank=16, targets=("attention.query", "attention.value")),
}


def packed() -> PackedBatch[np.ndarray]:
    """A batch of rows with one document each."""
    ids = np.random.default_rng(0).integers(0, 4000, (ROWS, LENGTH + 1)).astype(np.int32)
    batch = PackedBatch.padding(ROWS, LENGTH, VOCABULARY.pad)
    batch.tokens[:], batch.targets[:], batch.segment_ids[:] = ids[:, :-1], ids[:, 1:], 1
    batch.roles[:], batch.positions[:], batch.doc_start[:] = VOCABULARY.role(ids[:, 1:]), np.arange(LENGTH), 0
    return batch


class Way:
    """A compiled step and its state."""

    def __init__(self, preset: str, lora: LoraConfig | None):
        batch, mesh = packed(), make_mesh({}, jax.devices()[:1])
        config = config_from(preset, vocab_size=VOCABULARY.size)
        task: TransformerTask = TransformerTask(config, VOCABULARY, lambda *_: batch, lora=lora, attention_share=False)
        tx = make_optimizer(OptimizerConfig(), 1000)
        self.state: Any = jax.jit(lambda: make_state(task, tx, 0))()
        self.batch = jax.device_put(batch)
        self.step = make_train_step(task, tx, mesh, seed=0).lower(self.state, self.batch).compile()
        self.held = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        memory = self.step.memory_analysis()
        assert memory is not None, "the compiler did not say how much memory the step needs"
        self.besides = memory.temp_size_in_bytes

    def seconds(self) -> float:
        """CPU seconds of one step."""
        began = time.process_time()
        self.state, report = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, report))
        return time.process_time() - began


def main(preset: str) -> None:
    """Prints time and memory of each way to train."""
    ways = {name: Way(preset, lora) for name, lora in WAYS.items()}
    size = parameter_count(config_from(preset, vocab_size=VOCABULARY.size))
    print(f"{preset}: {size / 1e6:.1f}M parameters, {ROWS} rows of {LENGTH}, {jax.devices()[0].device_kind}")
    rounds = [{name: way.seconds() for name, way in ways.items()} for _ in range(PAIRS + 1)][1:]
    for name, way in ways.items():
        ratio = statistics.median(each[name] / each["full"] for each in rounds)
        seconds = statistics.median(each[name] for each in rounds)
        print(
            f"  {name:<38} {ratio:.2f} of full tuning's time ({seconds:.2f} s), "
            f"state {way.held / 2**20:.0f} MiB, a step {way.besides / 2**20:.0f} MiB more"
        )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "25m")
