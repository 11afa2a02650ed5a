#include "machine_code.h"

#include <elf.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

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
constexpr uint32_t kBra = 0x147;

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

// Where a branch goes: words of four bytes from the next instruction on, in bits 16 to 23 (low) and
// 34 to 63.
int64_t branch_target(uint64_t word, int64_t at) {
  const int64_t high = static_cast<int64_t>(word) >> 34;
  const auto low = static_cast<int64_t>(word >> 16 & 0xff);
  return at + static_cast<int64_t>(kInstructionBytes) + 4 * (high * 256 + low);
}

struct Range {
  int64_t begin, end;
  bool holds(int64_t at) const { return begin <= at && at <= end; }
};

// What a branch back closes, as far as it is the smallest such range around one of `marks`.
std::vector<Range> innermost_loops(const std::vector<Range>& loops,
                                   const std::vector<int64_t>& marks) {
  std::vector<Range> found;
  for (const int64_t mark : marks) {
    const Range* best = nullptr;
    for (const Range& loop : loops) {
      const bool smaller = best == nullptr || loop.end - loop.begin < best->end - best->begin;
      if (loop.holds(mark) && smaller) best = &loop;
    }
    if (best != nullptr) found.push_back(*best);
  }
  return found;
}

}  // namespace

InstructionCounts count_instructions(const std::string& cubin, const std::string& function) {
  const std::string text = text_of(cubin, function);
  InstructionCounts counts;
  std::vector<int64_t> matrix, local;
  std::vector<Range> loops;
  for (size_t at = 0; at + kInstructionBytes <= text.size(); at += kInstructionBytes) {
    const auto word = read_at<uint64_t>(text, at);
    const auto address = static_cast<int64_t>(at);
    const uint32_t opcode = static_cast<uint32_t>(word) & kOpcodeMask;
    ++counts.all;
    counts.tensor_load += opcode == kUtmaldg;
    if (opcode == kHgmma) matrix.push_back(address);
    if (opcode == kLdl || opcode == kStl) local.push_back(address);
    if (opcode == kBra && branch_target(word, address) < address) {
      loops.push_back({branch_target(word, address), address});
    }
  }
  counts.matrix = static_cast<int>(matrix.size());
  counts.local = static_cast<int>(local.size());
  const std::vector<Range> around = innermost_loops(loops, matrix);
  counts.local_in_matrix_loops =
      static_cast<int>(std::count_if(local.begin(), local.end(), [&](int64_t at) {
        return std::any_of(around.begin(), around.end(),
                           [at](const Range& loop) { return loop.holds(at); });
      }));
  return counts;
}

}  // namespace anymask::tools
