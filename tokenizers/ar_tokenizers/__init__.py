"""Image and text tokenizers. Importing this package keeps JAX from computing wrong sums on a CPU
(`host.right_reductions`)."""

from ar_tokenizers.host import right_reductions

right_reductions()
