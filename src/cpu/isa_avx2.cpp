// Kernels for AVX2, FMA and F16C (Haswell, Zen and later).
#define ANYMASK_ISA isa_avx2
#define ANYMASK_ISA_NAME "avx2"
#define ANYMASK_VECTOR_BYTES 32
#include "cpu/isa_table.h"

namespace anymask::cpu {

const Kernels* avx2_kernels() { return &ANYMASK_ISA::kTable; }

}  // namespace anymask::cpu
