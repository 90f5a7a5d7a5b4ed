"""Mixed-precision grouped GEMM for Hopper: generated with CuTe DSL, compiled without a GPU, loaded by tvm_ffi.

`formats` names the weight formats and the kernel configurations (stdlib only), `layouts` arranges
weights for them, `group_gemm` is the kernel, `build` compiles it ahead of time, `lint` reads the machine
code, `launch` checks arguments and runs it, `reference` is the same mathematics in torch. Importing the
package itself loads neither torch nor cutlass.
"""
