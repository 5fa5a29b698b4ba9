"""Image and text tokenizers. Importing the package prevents wrong sums by JAX on a CPU (`host.right_reductions`)."""

from ar_tokenizers.host import right_reductions

right_reductions()
