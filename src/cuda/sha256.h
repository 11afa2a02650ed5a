// SHA-256 (FIPS 180-4): cache keys and checksums of cached files.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace anymask::cuda {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
 public:
  void add(std::string_view bytes);
  // Adds the length as well, so that neighbouring fields cannot run into each other.
  void add_field(std::string_view bytes);
  Digest finish();

 private:
  void take_block(const uint8_t* block);

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> block_{};
  uint64_t length_ = 0;
};

std::string to_hex(const Digest& digest);

}  // namespace anymask::cuda
