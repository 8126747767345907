"""The CUDA run: the contract suite, then every stage against CuPy, cuCIM and the CPU backend.

python -m benchmarks.gpu

`command` runs each part in a process of its own, `suite` the tests, `stages` the verbs on the
batches that `work` makes, `kernels` each kernel alone, `files` everything from compressed files on;
`device` is what differs between a GPU and a rehearsal, `records` keeps what was measured, and
`verdict` says whether it suffices.
"""
