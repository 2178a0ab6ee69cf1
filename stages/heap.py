"""How glibc is told to keep what a training step frees, where a process that trains on CPU is started."""

# Large freed blocks otherwise go back to the kernel, to be faulted in again at every step; keeping them took 15% off
# a step of 4 x 256 tokens. Read once, when a process starts.
KEPT_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_TOP_PAD_": "67108864"}
