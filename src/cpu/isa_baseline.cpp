// Kernels for any x86-64: SSE2.
#define ANYMASK_ISA isa_baseline
#define ANYMASK_ISA_NAME "baseline"
#define ANYMASK_VECTOR_BYTES 16
#include "cpu/isa_table.h"

namespace anymask::cpu {

const Kernels* baseline_kernels() { return &ANYMASK_ISA::kTable; }

}  // namespace anymask::cpu
