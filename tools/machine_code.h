// Counts the instructions that the kernel check asks for, in a compiled kernel's own machine code.
#pragma once

#include <string>

namespace anymask::tools {

struct InstructionCounts {
  int all = 0;
  int matrix = 0;                 // HGMMA: wgmma
  int tensor_load = 0;            // UTMALDG: bulk tensor copy into shared memory
  int local = 0;                  // LDL, STL: registers that went to memory
  int local_in_matrix_loops = 0;  // those inside an innermost loop around a wgmma
};

// `cubin`: an ELF file for compute capability 7.0 or newer. Throws std::runtime_error when it is no
// such file or has no function of that name.
InstructionCounts count_instructions(const std::string& cubin, const std::string& function);

}  // namespace anymask::tools
