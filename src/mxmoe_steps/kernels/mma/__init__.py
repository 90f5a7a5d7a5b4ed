"""GPUs whose tensor cores are reached by ``mma.sync``: Ampere, Ada and consumer Blackwell."""
