"""Mixed-precision grouped GEMM: generated with CuTe DSL, compiled without a GPU, loaded by tvm_ffi.

`formats` registers the weight codes, a file each in `codes`; `architectures` the classes of GPUs, a room each, such as
`sm90` with the kernel. `layouts` arranges weights, `build` compiles ahead of time, `lint` reads the machine code,
`launch` checks arguments and runs, `reference` is the same mathematics in torch. Importing the package itself loads
neither torch nor cutlass.
"""
