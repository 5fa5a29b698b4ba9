"""Image tokenizers: autoencoders that turn images into codes and back, their training, and their scores."""
