#include "machine_code.h"

#include <elf.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace anymask::tools {
namespace {

// Since Volta an instruction is 16 bytes; its lowest nine bits say what it does (the next three
// say where its operands come from). Values read off nvdisasm's listings of sm_90a.
constexpr size_t kInstructionBytes = 16;
constexpr uint32_t kOpcodeMask = 0x1ff;
constexpr uint32_t kHgmma = 0x1f0;
constexpr uint32_t kUtmaldg = 0x1b4;
constexpr uint32_t kLdl = 0x183;
constexpr uint32_t kStl = 0x187;

template <typename T>
T read_at(const std::string& file, uint64_t offset) {
  T value;
  if (offset > file.size() || sizeof(T) > file.size() - offset) {
    throw std::runtime_error("the machine code ends early");
  }
  std::memcpy(&value, file.data() + offset, sizeof(T));
  return value;
}

// The bytes of section ".text.<function>".
std::string text_of(const std::string& cubin, const std::string& function) {
  const auto header = read_at<Elf64_Ehdr>(cubin, 0);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) {
    throw std::runtime_error("the machine code is no ELF file");
  }
  const auto section = [&](unsigned index) {
    return read_at<Elf64_Shdr>(cubin, header.e_shoff + uint64_t{index} * header.e_shentsize);
  };
  const Elf64_Shdr names = section(header.e_shstrndx);
  for (unsigned i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr candidate = section(i);
    const std::string name = cubin.c_str() + names.sh_offset + candidate.sh_name;
    if (name == ".text." + function) return cubin.substr(candidate.sh_offset, candidate.sh_size);
  }
  throw std::runtime_error("the machine code has no function " + function);
}

}  // namespace

InstructionCounts count_instructions(const std::string& cubin, const std::string& function) {
  const std::string text = text_of(cubin, function);
  InstructionCounts counts;
  for (size_t at = 0; at + kInstructionBytes <= text.size(); at += kInstructionBytes) {
    const uint32_t opcode = read_at<uint32_t>(text, at) & kOpcodeMask;
    ++counts.all;
    counts.matrix += opcode == kHgmma;
    counts.tensor_load += opcode == kUtmaldg;
    counts.local += opcode == kLdl || opcode == kStl;
  }
  return counts;
}

}  // namespace anymask::tools
