"""The log-probability with which each token was drawn, for training on samples.

The log-probability is that of the final distribution: contexts are mixed, only ids that the grammar allows count, and
temperature and filters are applied. A token that the grammar forces has probability 1. This needs one more product with
the head for each step, so an engine computes it only on request.

Axes: R slots, C contexts, V vocabulary, W ids of text pieces, control tokens and size tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ar_unified.language.grammar import Grammar
from ar_unified.model.config import TransformerConfig
from ar_unified.sampling import decoding, guidance, steps
from ar_unified.sampling.head import Weights, code_logits, text_logits
from ar_unified.sampling.steps import CHUNK, State


def decode_chunk(
    config: TransformerConfig, grammar: Grammar, weights: Weights, state: State, halted: Array, count: Array
) -> tuple[State, Array]:
    """Like `steps.decode_chunk`, but the packed result begins with the log-probabilities, float32 [R, CHUNK]. Their
    bits are stored as int32.
    """
    state = state._replace(automaton=grammar.automaton.halt(state.automaton, halted))
    keys = decoding.row_keys(state.rows.seed, state.rows.sample)
    tokens = jnp.full((len(halted), CHUNK), grammar.vocabulary.pad, jnp.int32)

    def going(carry: Any) -> Array:
        i, state, _, _ = carry
        return (i < count) & ~jnp.all(grammar.automaton.done(state.automaton))

    def body(carry: Any) -> Any:
        i, before, tokens, found = carry
        token, state = steps.step(config, grammar, weights, before, keys)
        found = jax.lax.dynamic_update_slice(found, of_token(grammar, weights, before, token)[:, None], (0, i))
        return i + 1, state, jax.lax.dynamic_update_slice(tokens, token[:, None], (0, i)), found

    carry = (jnp.int32(0), state, tokens, jnp.zeros(tokens.shape, jnp.float32))
    _, state, tokens, found = jax.lax.while_loop(going, body, carry)
    packed = steps.packed(grammar, state, tokens, jnp.sum(tokens != grammar.vocabulary.pad, axis=1))
    return steps.placed(state), jnp.concatenate([jax.lax.bitcast_convert_type(found, jnp.int32), packed], axis=1)


def of_token(grammar: Grammar, weights: Weights, state: State, token: Array) -> Array:
    """The log-probability of `token`, int32 [R], as f32 [R]; 0 if the token was forced or given. `state` is the state
    before the token.
    """
    machine, vocabulary, rows = grammar.automaton, grammar.vocabulary, state.rows
    R, C = state.position.shape
    hidden = state.hidden.reshape(R, C, -1)
    image = machine.in_image(state.automaton)
    drawn = steps.known(grammar, state.automaton, rows.canvas) < 0

    logits = decoding.penalize(text_logits(weights, hidden[:, 0], rows.adapter), state.seen, rows.penalty)
    allowed = machine.allowed(state.automaton, logits.shape[1])
    found = decoding.log_probability(logits, allowed, rows.filters.at(image), token)
    if vocabulary.codebook_size:
        logits = guidance.mix(code_logits(grammar, weights, hidden, rows.adapter), rows.weights)
        code = decoding.log_probability(logits, None, rows.filters.at(image), token - vocabulary.image_offset)
        found = jnp.where(image, code, found)
    return jnp.where(drawn, found, 0.0)
