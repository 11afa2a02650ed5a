#include "machine_code.h"

#include <elf.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
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
constexpr uint32_t kExit = 0x14d;
constexpr uint64_t kTrue = 7;  // the predicate PT, not negated

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

// Instructions that can follow each instruction, and that can come before it.
struct Flow {
  std::vector<std::vector<int>> before;
  std::vector<std::pair<int, int>> back;  // branches to an earlier instruction: (from, to)

  explicit Flow(const std::string& text) : before(text.size() / kInstructionBytes) {
    const int count = static_cast<int>(before.size());
    for (int i = 0; i < count; ++i) {
      const int64_t at = i * static_cast<int64_t>(kInstructionBytes);
      const auto word = read_at<uint64_t>(text, static_cast<uint64_t>(at));
      const auto operands = read_at<uint64_t>(text, static_cast<uint64_t>(at) + 8);
      const uint32_t opcode = static_cast<uint32_t>(word) & kOpcodeMask;
      const bool always = (word >> 12 & 0xf) == kTrue;
      if (opcode == kBra) {
        const int64_t to = branch_target(word, at) / static_cast<int64_t>(kInstructionBytes);
        if (to >= 0 && to < count) {
          before[to].push_back(i);
          if (to <= i) back.emplace_back(i, static_cast<int>(to));
        }
        // A branch may have a condition among its operands too.
        if (always && (operands >> 23 & 0xf) == kTrue) continue;
      }
      if (opcode == kExit && always) continue;
      if (i + 1 < count) before[i + 1].push_back(i);
    }
  }

  // The loop that a branch back closes: what leads to the branch without passing its target.
  std::vector<bool> loop(std::pair<int, int> branch) const {
    std::vector<bool> inside(before.size(), false);
    inside[branch.second] = true;
    std::vector<int> open = {branch.first};
    while (!open.empty()) {
      const int at = open.back();
      open.pop_back();
      if (inside[at]) continue;
      inside[at] = true;
      open.insert(open.end(), before[at].begin(), before[at].end());
    }
    return inside;
  }
};

// Which instructions are in an innermost loop around one of `marks`.
std::vector<bool> in_loops_around(const std::vector<int>& marks, const Flow& flow) {
  struct Loop {
    std::vector<bool> inside;
    int64_t size;
  };
  std::vector<Loop> loops;
  for (const auto& branch : flow.back) {
    Loop loop{flow.loop(branch), 0};
    loop.size = std::count(loop.inside.begin(), loop.inside.end(), true);
    loops.push_back(std::move(loop));
  }
  std::vector<bool> found(flow.before.size(), false);
  for (const int mark : marks) {
    const Loop* best = nullptr;
    for (const Loop& loop : loops) {
      if (loop.inside[mark] && (best == nullptr || loop.size < best->size)) best = &loop;
    }
    if (best == nullptr) continue;
    for (size_t i = 0; i < found.size(); ++i) found[i] = found[i] || best->inside[i];
  }
  return found;
}

}  // namespace

InstructionCounts count_instructions(const std::string& cubin, const std::string& function) {
  const std::string text = text_of(cubin, function);
  InstructionCounts counts;
  std::vector<int> matrix, local;
  const int count = static_cast<int>(text.size() / kInstructionBytes);
  for (int i = 0; i < count; ++i) {
    const uint32_t opcode = read_at<uint32_t>(text, i * kInstructionBytes) & kOpcodeMask;
    counts.tensor_load += opcode == kUtmaldg;
    if (opcode == kHgmma) matrix.push_back(i);
    if (opcode == kLdl || opcode == kStl) local.push_back(i);
  }
  counts.all = count;
  counts.matrix = static_cast<int>(matrix.size());
  counts.local = static_cast<int>(local.size());
  const std::vector<bool> inside = in_loops_around(matrix, Flow(text));
  counts.local_in_matrix_loops = static_cast<int>(
      std::count_if(local.begin(), local.end(), [&](int at) { return inside[at]; }));
  return counts;
}

}  // namespace anymask::tools
