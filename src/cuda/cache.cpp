#include "cuda/cache.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>

namespace anymask::cuda {
namespace {

namespace fs = std::filesystem;

// A file is the machine code, the compiler's log and this. The code comes first, so that the file
// is a valid ELF file for a disassembler.
struct Footer {
  char magic[16];
  int64_t cubin_bytes;
  int64_t log_bytes;
  int64_t compiler_version;
  Digest key;
  Digest checksum;  // of everything before it
};
static_assert(sizeof(Footer) == 104);
constexpr char kMagic[16] = "anymask-cubin 1";

std::string_view bytes_of(const Footer& footer) {
  return {reinterpret_cast<const char*>(&footer), offsetof(Footer, checksum)};
}

Digest checksum_of(std::string_view body, const Footer& footer) {
  Sha256 sum;
  sum.add(body);
  sum.add(bytes_of(footer));
  return sum.finish();
}

// Writes, and makes sure that it is on the disk before the file gets its name.
bool write_file(const fs::path& path, std::string_view bytes) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (file < 0) return false;
  bool good = true;
  while (good && !bytes.empty()) {
    const ssize_t written = write(file, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    good = written > 0;
    if (good) bytes.remove_prefix(static_cast<size_t>(written));
  }
  good = good && fsync(file) == 0;
  return close(file) == 0 && good;
}

// Differs between threads, processes, forks of one process and machines that share a home.
std::string unique_name() {
  static std::atomic<int> serial{0};
  return std::to_string(getpid()) + "-" + std::to_string(serial++) + "-" +
         std::to_string(std::random_device{}());
}

fs::path user_folder() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return fs::path(value != nullptr ? value : "");
  };
  if (const fs::path folder = variable("ANYMASK_CACHE_DIR"); !folder.empty()) return folder;
  if (const fs::path cache = variable("XDG_CACHE_HOME"); cache.is_absolute()) {
    return cache / "anymask";
  }
  if (const fs::path home = variable("HOME"); !home.empty()) return home / ".cache" / "anymask";
  return {};
}

CacheFolder& package_storage() {
  static CacheFolder folder;
  return folder;
}

}  // namespace

fs::path CacheFolder::file(const std::string& name, const Digest& key) const {
  return folder_ / (name + "-" + to_hex(key).substr(0, 32) + ".cubin");
}

std::optional<CachedKernel> CacheFolder::load(const std::string& name, const Digest& key) const {
  if (folder_.empty()) return std::nullopt;
  std::ifstream stream(file(name, key), std::ios::binary);
  if (!stream) return std::nullopt;
  std::string all((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (all.size() < sizeof(Footer)) return std::nullopt;

  Footer footer;
  const size_t body = all.size() - sizeof(Footer);
  std::memcpy(&footer, all.data() + body, sizeof(Footer));
  const std::string_view content(all.data(), body);
  if (std::memcmp(footer.magic, kMagic, sizeof(kMagic)) != 0 || footer.key != key ||
      footer.cubin_bytes < 0 || footer.log_bytes < 0 ||
      static_cast<size_t>(footer.cubin_bytes) + static_cast<size_t>(footer.log_bytes) != body ||
      footer.checksum != checksum_of(content, footer)) {
    return std::nullopt;
  }
  const size_t cubin = static_cast<size_t>(footer.cubin_bytes);
  CachedKernel kernel;
  kernel.code.cubin = content.substr(0, cubin);
  kernel.code.log = content.substr(cubin);
  kernel.compiler_version = static_cast<int>(footer.compiler_version);
  return kernel;
}

bool CacheFolder::store(const std::string& name, const Digest& key,
                        const CachedKernel& kernel) const {
  if (folder_.empty()) return false;
  Footer footer{};
  std::memcpy(footer.magic, kMagic, sizeof(kMagic));
  footer.cubin_bytes = static_cast<int64_t>(kernel.code.cubin.size());
  footer.log_bytes = static_cast<int64_t>(kernel.code.log.size());
  footer.compiler_version = kernel.compiler_version;
  footer.key = key;
  std::string all = kernel.code.cubin + kernel.code.log;
  footer.checksum = checksum_of(all, footer);
  all.append(reinterpret_cast<const char*>(&footer), sizeof(Footer));

  const fs::path folder = folder_ / "tmp";
  const fs::path temporary = folder / unique_name();
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) return false;
  if (!write_file(temporary, all)) {
    fs::remove(temporary, error);
    return false;
  }
  fs::rename(temporary, file(name, key), error);
  if (!error) return true;
  fs::remove(temporary, error);
  return false;
}

CacheFolder::Contents CacheFolder::contents() const {
  Contents contents;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder_, error)) {
    if (entry.path().extension() != ".cubin") continue;
    const auto bytes = entry.file_size(error);
    if (error) continue;  // replaced while we looked
    ++contents.files;
    contents.bytes += static_cast<int64_t>(bytes);
  }
  return contents;
}

Digest source_key(const std::string& source, std::span<const SourceFile> headers,
                  std::span<const std::string> options) {
  Sha256 sum;
  sum.add_field(source);
  sum.add_field(std::to_string(headers.size()));
  for (const SourceFile& header : headers) {
    sum.add_field(header.name);
    sum.add_field(header.text);
  }
  for (const std::string& option : options) sum.add_field(option);
  return sum.finish();
}

Digest with_compiler(const Digest& key, int compiler_version) {
  Sha256 sum;
  sum.add_field(std::string_view(reinterpret_cast<const char*>(key.data()), key.size()));
  sum.add_field(std::to_string(compiler_version));
  return sum.finish();
}

void set_package_cache(const std::string& folder) { package_storage() = CacheFolder(folder); }

const CacheFolder& package_cache() { return package_storage(); }

const CacheFolder& user_cache() {
  static const CacheFolder folder(user_folder());
  return folder;
}

}  // namespace anymask::cuda
