"""One module per verb. Importing it makes this process keep its memory (`ar_tokenizers.host.keep_memory`)."""

from ar_tokenizers.host import keep_memory

keep_memory()
