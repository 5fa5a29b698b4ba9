"""One module per verb. Importing this package makes the process keep all memory that it has allocated
(`ar_tokenizers.host.keep_memory`)."""

from ar_tokenizers.host import keep_memory

keep_memory()
