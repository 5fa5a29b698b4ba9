"""Mistakes that somebody could make, and the tests that must notice each: `make mutate` makes them one by one.

Here: in what is trained. tests/mutations_of_use.py: in what is done with it, tokenizers and the command line.

`old` stands in its file exactly once; `tests` are arguments of pytest, as few as notice it, none of them slow.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]


MUTATIONS = (
    # ---- language: documents, vocabulary, grammar, automaton
    Mutation(
        "turn-border-joins-texts",
        "ar_unified/document.py",
        "if i and i != self.prompt and isinstance(self.parts[i - 1], TextPart):",
        "if i and isinstance(self.parts[i - 1], TextPart):",
        "a text answer to a text prompt is refused",
        ("tests/test_document.py",),
    ),
    Mutation(
        "one-code-too-many",
        "ar_unified/vocabulary.py",
        "(ids < self.image_offset + self.codebook_size)\n        roles",
        "(ids <= self.image_offset + self.codebook_size)\n        roles",
        "the first reserved id counts as an image code",
        ("tests/test_vocabulary.py",),
    ),
    Mutation(
        "foreign-ids-are-read",
        "ar_unified/vocabulary.py",
        'require_same(vocabulary.manifest(), found, expected_from=here, found_from="manifest")',
        "del found, here",
        "a manifest of another version's ids is taken for ours",
        ("tests/test_vocabulary.py",),
    ),
    Mutation(
        "height-and-width-swapped",
        "ar_unified/grammar.py",
        "header = [v.size_offset + h - 1, v.size_offset + w - 1]",
        "header = [v.size_offset + w - 1, v.size_offset + h - 1]",
        "images say their size the wrong way round",
        ("tests/test_grammar.py",),
    ),
    Mutation(
        "task-looks-anywhere-in-the-answer",
        "ar_unified/grammar.py",
        "if np.any(images == turn[0] + 1):",
        "if np.any(images > turn[0]):",
        "tokens and their document disagree on the task, and so on loss weights",
        ("tests/test_grammar.py",),
    ),
    Mutation(
        "a-word-for-the-last-token",
        "ar_unified/automaton.py",
        "words = parts & (state.mode != IMAGE) & (free > 0)",
        "words = parts & (state.mode != IMAGE) & (free >= 0)",
        "a word takes the place of <eos> or of an image that is owed",
        ("tests/test_automaton.py",),
    ),
    Mutation(
        "line-ends-cost-nothing",
        "ar_unified/automaton.py",
        "most_width = jnp.clip((free - 2) // jnp.maximum(state.height, 1) - 1, 1, layout.width)",
        "most_width = jnp.clip((free - 2) // jnp.maximum(state.height, 1), 1, layout.width)",
        "an image is begun that cannot be finished",
        ("tests/test_automaton.py",),
    ),
    # ---- data
    Mutation(
        "every-epoch-has-the-same-neighbours",
        "ar_unified/data/packing.py",
        'key(self.seed, self.name, epoch, "documents")',
        'key(self.seed, self.name, "documents")',
        "which documents share a row is not drawn anew",
        ("tests/data/test_packing.py",),
    ),
    Mutation(
        "a-source-repeats-its-rows",
        "ar_unified/data/packing.py",
        "row = self._taken[source] + cycle * self._counts[source] + self._rank[slot]",
        "row = self._taken[source] + cycle + self._rank[slot]",
        "after 1024 rows a source gives rows again that it gave before",
        ("tests/data/test_packing.py",),
    ),
    Mutation(
        "the-next-document-is-a-target",
        "ar_unified/data/loader.py",
        "    targets[ends - 1] = pad\n",
        "",
        "<eos> learns to say how the next document of the row begins",
        ("tests/data/test_loader.py",),
    ),
    Mutation(
        "positions-count-through-the-row",
        "ar_unified/data/loader.py",
        '"positions": positions,',
        '"positions": positions + np.repeat(start, lengths),',
        "RoPE does not begin anew with each document",
        ("tests/data/test_loader.py",),
    ),
    Mutation(
        "the-answer-begins-in-the-prompt",
        "ar_unified/data/loader.py",
        '"prompt": positions < np.repeat(border, lengths)',
        '"prompt": positions <= np.repeat(border, lengths)',
        "the first token of an answer weighs as a prompt's",
        ("tests/data/test_loader.py",),
    ),
    Mutation(
        "processes-read-the-same-rows",
        "ar_unified/data/loader.py",
        "start = step * batch_size + index * rows",
        "start = step * batch_size + index",
        "two processes train on nearly the same rows",
        ("tests/data/test_loader.py",),
    ),
    Mutation(
        "transparency-on-black",
        "ar_unified/data/images.py",
        'Image.new("RGBA", image.size, "white")',
        'Image.new("RGBA", image.size, "black")',
        "drawings on transparent ground turn black",
        ("tests/data/test_images.py",),
    ),
    Mutation(
        "every-pair-is-read-both-ways",
        "ar_unified/data/prepare.py",
        "pair=reversible and document.prompt == 1",
        "pair=document.prompt == 1",
        "pairs of a source that must not be turned round are",
        ("tests/data/test_prepare.py::test_what_is_on_disk_is_what_the_source_says",),
    ),
    # ---- model and loss
    Mutation(
        "rope-turns-too-fast",
        "ar_unified/model/transformer.py",
        "wavelengths = theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)",
        "wavelengths = theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / (head_dim // 2))",
        "published weights see other positions",
        ("tests/model/test_transformer.py::test_a_layer_equals_its_plain_reference",),
    ),
    Mutation(
        "the-residual-grows-with-depth",
        "ar_unified/model/transformer.py",
        '"down": normal(L, F, D, fan_in=F * 2 * L),',
        '"down": normal(L, F, D, fan_in=F),',
        "deep models begin with activations that are too large",
        ("tests/model/test_transformer.py::test_fresh_parameters_keep_the_size_of_what_they_read",),
    ),
    Mutation(
        "z-loss-has-no-gradient",
        "ar_unified/model/loss.py",
        "logits_bar = probabilities * (nll_bar + lse_bar)[..., None]",
        "logits_bar = probabilities * nll_bar[..., None]",
        "z-loss is reported and does nothing",
        ("tests/model/test_loss.py",),
    ),
    Mutation(
        "z-loss-has-the-wrong-sign",
        "ar_unified/training/tasks.py",
        "(nll + self.z_loss * jnp.square(lse))",
        "(nll - self.z_loss * jnp.square(lse))",
        "logits are driven apart",
        ("tests/training/test_step.py::test_metrics_are_what_they_are_called",),
    ),
    Mutation(
        "prompts-weigh-as-answers",
        "ar_unified/training/tasks.py",
        "task_weight[batch.tasks] * prompt",
        "task_weight[batch.tasks]",
        "loss.prompt does nothing",
        ("tests/training/test_step.py::test_metrics_are_what_they_are_called",),
    ),
    Mutation(
        "half-of-attention-counts",
        "ar_unified/training/tasks.py",
        "+ 12.0 * c.n_layers * c.n_heads * c.head_dim * totals",
        "+ 6.0 * c.n_layers * c.n_heads * c.head_dim * totals",
        "MFU is too low",
        ("tests/training/test_step.py::test_flops_of_one_document_are_the_textbook_formula",),
    ),
    # ---- kernels and parallel
    Mutation(
        "the-window-is-one-wider",
        "ar_unified/kernels/attention/bounds.py",
        "jnp.maximum(doc_start, positions - (window - 1))",
        "jnp.maximum(doc_start, positions - window)",
        "sliding windows see one key more",
        ("tests/kernels/test_bounds.py", "tests/kernels/test_attention.py"),
    ),
    Mutation(
        "gradient-of-queries-unscaled",
        "ar_unified/kernels/attention/xla.py",
        'dquery = jnp.einsum("BKGTS,BKSH->BKGTH", dscores, key) * scale',
        'dquery = jnp.einsum("BKGTS,BKSH->BKGTH", dscores, key)',
        "queries learn sqrt(head_dim) times too fast",
        ("tests/kernels/test_attention.py",),
    ),
    Mutation(
        "int8-overflows",
        "ar_unified/kernels/decode_attention/int8.py",
        "scale = jnp.abs(x).max(-1) / 127",
        "scale = jnp.abs(x).max(-1) / 129",
        "the largest value of each vector does not fit into 8 bits",
        ("tests/kernels/test_decode_attention.py::test_int8_restores_each_value_to_half_a_step_and_zeros_to_zeros",),
    ),
    Mutation(
        "merged-log-sum-exp-forgets-the-highest",
        "ar_unified/kernels/merge.py",
        "jnp.where(total > 0, highest + jnp.log(total), -jnp.inf)",
        "jnp.where(total > 0, jnp.log(total), -jnp.inf)",
        "ring attention weighs its second merge wrongly",
        ("tests/kernels/test_merge.py",),
    ),
    Mutation(
        "fsdp-devices-share-rows",
        "ar_unified/parallel/rules.py",
        '"batch": ("data", "fsdp"),',
        '"batch": ("data",),',
        "fsdp devices all compute the same rows",
        ("tests/parallel/test_mesh.py",),
    ),
    Mutation(
        "late-pieces-lie-elsewhere",
        "ar_unified/parallel/zigzag.py",
        "return device * width, (2 * ways - 1 - device) * width",
        "return device * width, (2 * ways - 2 - device) * width",
        "the ring looks for late pieces where they are not",
        ("tests/training/test_step.py", "-k", "neither and ring"),
    ),
    # ---- training
    Mutation(
        "dropout-repeats-every-step",
        "ar_unified/training/step.py",
        "key = jax.random.fold_in(jax.random.key(seed), state.step)",
        "key = jax.random.key(seed)",
        "the same neurons are dropped at every step",
        ("tests/training/test_step.py::test_dropout_is_keyed_by_step_and_repeats",),
    ),
    Mutation(
        "dropout-repeats-in-every-row",
        "ar_unified/training/step.py",
        "keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))",
        "keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.zeros(rows, jnp.int32))",
        "all rows of a batch drop the same neurons",
        ("tests/training/test_step.py::test_every_row_of_a_global_batch_has_a_key_of_its_own",),
    ),
    Mutation(
        "clipping-makes-gradients-longer",
        "ar_unified/training/step.py",
        "shrink = jnp.minimum(1.0, largest / jnp.maximum(norm, 1e-12))",
        "shrink = jnp.maximum(1.0, largest / jnp.maximum(norm, 1e-12))",
        "small gradients are blown up, large ones not clipped",
        ("tests/training/test_step.py::test_long_gradients_are_clipped_and_short_ones_left",),
    ),
    Mutation(
        "bad-gradients-are-taken",
        "ar_unified/training/step.py",
        "finite = jnp.isfinite(norm) & jnp.isfinite(total)",
        "finite = jnp.isfinite(total)",
        "a NaN in a gradient goes into the parameters",
        ("tests/training/test_loop.py::test_a_poisoned_batch_stops_the_run_and_costs_nothing",),
    ),
    Mutation(
        "no-warm-up",
        "ar_unified/training/optimizer.py",
        "rise = jnp.minimum(done / (warmup + 1), 1.0)",
        "rise = jnp.minimum(done / 1, 1.0)",
        "training begins at the full rate",
        ("tests/training/test_optimizer.py",),
    ),
    Mutation(
        "codebooks-decay",
        "ar_unified/training/optimizer.py",
        'for word in ("norm", "bias", "codebook"))',
        'for word in ("norm", "bias"))',
        "weight decay pulls codes to zero",
        ("tests/training/test_optimizer.py",),
    ),
    Mutation(
        "pauses-count-as-training",
        "ar_unified/training/telemetry.py",
        "self.started += time.perf_counter() - since",
        "self.started += 0.0 * since",
        "validation makes tokens per second look worse",
        ("tests/training/test_telemetry.py",),
    ),
    # ---- checkpoint and workdir
    Mutation(
        "checkpoints-of-any-vocabulary",
        "ar_unified/checkpoint.py",
        'require_same(manifest, found, expected_from="this run", found_from=where)',
        "del found",
        "weights of another tokenizer are restored",
        ("tests/test_checkpoint.py", "tests/training/test_loop.py::test_the_checkpoint_says_what_it_is"),
    ),
    Mutation(
        "one-checkpoint-too-few",
        "ar_unified/checkpoint.py",
        "for step in steps[: -self.keep]:",
        "for step in steps[: 1 - self.keep or None]:",
        "keep=1 deletes the only checkpoint",
        ("tests/test_checkpoint.py",),
    ),
    Mutation(
        "files-grow-in-their-place",
        "tokenizers/ar_tokenizers/files.py",
        'with open(written, "wb") as file:',
        'with open(path, "wb") as file:',
        "a kill leaves half a file under its name",
        ("tests/test_workdir.py",),
    ),
)
