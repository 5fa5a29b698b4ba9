"""Image and text tokenizers. Importing it makes JAX's sums right on a CPU (`host.right_reductions`)."""

from ar_tokenizers.host import right_reductions

right_reductions()
