// Kernels for AVX-512 with bf16 dot products (Cooper Lake, Zen 4 and later).
#define ANYMASK_ISA isa_avx512bf16
#define ANYMASK_ISA_NAME "avx512bf16"
#define ANYMASK_VECTOR_BYTES 64
#include "cpu/isa_table.h"

namespace anymask::cpu {

const Kernels* avx512bf16_kernels() { return &ANYMASK_ISA::kTable; }

}  // namespace anymask::cpu
