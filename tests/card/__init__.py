"""A card that is pretended on the processor: what the engine runs on CUDA alone is run on it, and kept to its rules.

Tensors on it hold real numbers, computed by the processor. Much that a real card does not forgive is an error:
tensors on different devices, work on one stream that another may still be at, memory handed on before its last use is
over, what must not be captured in a graph, a graph that reads freed memory. Memory is handed out as torch's allocator
does. It knows no time, no rounding of a card's own, and nothing of what libraries and torch's kernels take to work in.
"""
