"""A fake CUDA device on the CPU: runs what otherwise runs only on CUDA, and checks CUDA's rules.

Tensors on it hold real data, computed by the CPU. Much that a GPU would silently get wrong is an error: tensors on
different devices, access from one stream while another may still be running, memory that is reused before its last use
is complete, operations that must not be captured in a graph, graphs that read freed memory. Memory is allocated as
torch's caching allocator does. Time, the rounding of a GPU, and the workspaces of libraries and of torch's kernels are
not simulated.
"""
