"""Image tokenizers: autoencoders that turn images into codes and back, what trains them, and what they are worth."""
