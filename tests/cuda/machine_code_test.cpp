// The kernel check's reading of machine code, on files made up here.
#include "machine_code.h"

#include <elf.h>
#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>
#include <vector>

namespace anymask::tools {
namespace {

constexpr uint64_t kHgmma = 0x00200000081879f0, kUtmaldg = 0x00000008040075b4;
constexpr uint64_t kLdl = 0x0000000005037983, kStl = 0x0000001001007387;
constexpr uint64_t kOther = 0x0000000000007918;

// A branch that goes `count` instructions back from itself.
uint64_t back(int count) {
  const int64_t words = -4 * (count + 1);
  return static_cast<uint64_t>(words >> 8) << 34 | static_cast<uint64_t>(words & 0xff) << 16 |
         0x8947;
}

std::string cubin_of(const std::vector<uint64_t>& instructions) {
  const std::string names = std::string("\0.text.kernel\0", 14);
  std::string text;
  for (const uint64_t instruction : instructions) {
    const uint64_t both[2] = {instruction, 0};
    text.append(reinterpret_cast<const char*>(both), sizeof(both));
  }
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_shoff = sizeof(header) + names.size() + text.size();
  header.e_shentsize = sizeof(Elf64_Shdr);
  header.e_shnum = 2;
  Elf64_Shdr sections[2] = {};
  sections[0].sh_offset = sizeof(header);
  sections[1].sh_name = 1;
  sections[1].sh_offset = sizeof(header) + names.size();
  sections[1].sh_size = text.size();
  return std::string(reinterpret_cast<const char*>(&header), sizeof(header)) + names + text +
         std::string(reinterpret_cast<const char*>(sections), sizeof(sections));
}

TEST(MachineCode, CountsInstructions) {
  const InstructionCounts counts =
      count_instructions(cubin_of({kOther, kUtmaldg, kHgmma, kHgmma, kLdl, kOther}), "kernel");
  EXPECT_EQ(counts.all, 6);
  EXPECT_EQ(counts.matrix, 2);
  EXPECT_EQ(counts.tensor_load, 1);
  EXPECT_EQ(counts.local, 1);
  EXPECT_EQ(counts.local_in_matrix_loops, 0);
}

TEST(MachineCode, TellsMathLoopsFromOthers) {
  // An outer loop around a math loop (with one spill), a waiting loop and a loop that spills.
  const InstructionCounts counts =
      count_instructions(cubin_of({kStl, kOther, kHgmma, kOther, back(1), kLdl, back(4), kStl, kLdl,
                                   back(2), back(9)}),
                         "kernel");
  EXPECT_EQ(counts.local, 4);
  EXPECT_EQ(counts.local_in_matrix_loops, 1);
}

TEST(MachineCode, RefusesWhatItCannotRead) {
  const std::string good = cubin_of({kOther});
  EXPECT_THROW(count_instructions(good, "another"), std::runtime_error);
  EXPECT_THROW(count_instructions("no machine code", "kernel"), std::runtime_error);
  EXPECT_THROW(count_instructions(good.substr(0, good.size() - 10), "kernel"), std::runtime_error);
}

}  // namespace
}  // namespace anymask::tools
