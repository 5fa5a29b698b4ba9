"""Train and sample autoregressive image+text models. Importing it makes JAX's sums right on a CPU (`ar_tokenizers`)."""

import ar_tokenizers  # noqa: F401
