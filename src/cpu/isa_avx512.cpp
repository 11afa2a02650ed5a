// Kernels for AVX-512 F, BW, DQ and VL (Skylake server, Zen 4 and later).
#define ANYMASK_ISA isa_avx512
#define ANYMASK_ISA_NAME "avx512"
#define ANYMASK_VECTOR_BYTES 64
#include "cpu/isa_table.h"

namespace anymask::cpu {

const Kernels* avx512_kernels() { return &ANYMASK_ISA::kTable; }

}  // namespace anymask::cpu
