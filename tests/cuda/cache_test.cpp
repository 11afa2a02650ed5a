// The kernel cache on disk: layers, damage, many threads and processes at once.
#include "cuda/cache.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace anymask::cuda {
namespace {

namespace fs = std::filesystem;

class CacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
    char pattern[] = "/tmp/anymask-cache-XXXXXX";
    ASSERT_NE(mkdtemp(pattern), nullptr);
    root_ = pattern;
  }
  void TearDown() override { fs::remove_all(root_); }

  fs::path root_;
};

Digest key_of(const std::string& text) {
  Sha256 sum;
  sum.add(text);
  return sum.finish();
}

CachedKernel kernel_of(char letter, size_t bytes = 100000) {
  return {{std::string(bytes, letter), "log of " + std::string(1, letter)}, 13000};
}

void expect_kernel(const std::optional<CachedKernel>& found, const CachedKernel& wanted) {
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->code.cubin, wanted.code.cubin);
  EXPECT_EQ(found->code.log, wanted.code.log);
  EXPECT_EQ(found->compiler_version, wanted.compiler_version);
}

TEST(Sha256Test, KnownAnswers) {
  EXPECT_EQ(to_hex(key_of("")), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(to_hex(key_of("abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(to_hex(key_of(std::string(1000000, 'a'))),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_F(CacheTest, GivesBackWhatItTook) {
  const CacheFolder cache(root_ / "not" / "there" / "yet");
  EXPECT_FALSE(cache.load("kernel", key_of("k")).has_value());
  ASSERT_TRUE(cache.store("kernel", key_of("k"), kernel_of('a')));
  expect_kernel(cache.load("kernel", key_of("k")), kernel_of('a'));
  EXPECT_FALSE(cache.load("kernel", key_of("other")).has_value());
  EXPECT_EQ(cache.contents().files, 1);
  EXPECT_GT(cache.contents().bytes, 100000);
  EXPECT_TRUE(fs::is_empty(cache.path() / "tmp"));
}

TEST_F(CacheTest, StartsWithTheMachineCode) {
  const CacheFolder cache(root_);
  ASSERT_TRUE(cache.store("kernel", key_of("k"), kernel_of('a', 10)));
  std::ifstream file(cache.file("kernel", key_of("k")), std::ios::binary);
  std::string first(10, '\0');
  file.read(first.data(), 10);
  EXPECT_EQ(first, std::string(10, 'a'));
}

TEST_F(CacheTest, ADamagedFileCountsAsAbsentAndIsReplaced) {
  const CacheFolder cache(root_);
  const Digest key = key_of("k");
  const fs::path file = cache.file("kernel", key);
  ASSERT_TRUE(cache.store("kernel", key, kernel_of('a')));
  const auto size = static_cast<int64_t>(fs::file_size(file));
  // One flipped byte anywhere: code, log, lengths, version, key, checksum.
  for (const int64_t at : {int64_t{0}, int64_t{99999}, int64_t{100003}, size - 90, size - 75,
                           size - 60, size - 40, size - 1}) {
    SCOPED_TRACE(at);
    {
      std::fstream stream(file, std::ios::binary | std::ios::in | std::ios::out);
      stream.seekg(at);
      const int byte = stream.get();
      stream.seekp(at);
      stream.put(static_cast<char>(byte ^ 1));
    }
    EXPECT_FALSE(cache.load("kernel", key).has_value());
    ASSERT_TRUE(cache.store("kernel", key, kernel_of('a')));
    expect_kernel(cache.load("kernel", key), kernel_of('a'));
  }
  for (const int64_t bytes : {int64_t{0}, int64_t{50}, size / 2, size - 1}) {
    SCOPED_TRACE(bytes);
    fs::resize_file(file, static_cast<uintmax_t>(bytes));
    EXPECT_FALSE(cache.load("kernel", key).has_value());
    ASSERT_TRUE(cache.store("kernel", key, kernel_of('a')));
  }
  // A file of another kernel under this name.
  fs::copy_file(file, cache.file("kernel", key_of("other")));
  EXPECT_FALSE(cache.load("kernel", key_of("other")).has_value());
}

TEST_F(CacheTest, AFolderThatCannotBeWrittenIsNoError) {
  { std::ofstream(root_ / "file") << "not a folder"; }
  const CacheFolder cache(root_ / "file");
  EXPECT_FALSE(cache.store("kernel", key_of("k"), kernel_of('a')));
  EXPECT_FALSE(cache.load("kernel", key_of("k")).has_value());
  EXPECT_EQ(cache.contents().files, 0);
  EXPECT_FALSE(CacheFolder().store("kernel", key_of("k"), kernel_of('a')));
}

// Every reader sees nothing or one whole kernel, whoever wrote it last; writers replace each other.
bool hammer(const CacheFolder& cache, int writer) {
  bool good = true;
  for (int round = 0; round < 40; ++round) {
    const char letter = static_cast<char>('a' + (writer + round) % 26);
    good &= cache.store("kernel", key_of("shared"), kernel_of(letter, 20000));
    const auto found = cache.load("kernel", key_of("shared"));
    good &= found.has_value() && found->code.cubin.size() == 20000 &&
            found->code.cubin == std::string(20000, found->code.cubin[0]) &&
            found->code.log.back() == found->code.cubin[0];
  }
  return good;
}

TEST_F(CacheTest, ManyThreads) {
  const CacheFolder cache(root_);
  std::vector<int> good(8, 0);
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&cache, &good, i] { good[static_cast<size_t>(i)] = hammer(cache, i); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, std::vector<int>(8, 1));
  EXPECT_EQ(cache.contents().files, 1);
  EXPECT_TRUE(fs::is_empty(root_ / "tmp"));
}

TEST_F(CacheTest, ManyProcesses) {
  const CacheFolder cache(root_);
  std::vector<pid_t> children;
  for (int i = 0; i < 6; ++i) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) _exit(hammer(cache, i) ? 0 : 1);
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  EXPECT_EQ(cache.contents().files, 1);
  EXPECT_TRUE(fs::is_empty(root_ / "tmp"));
}

TEST(CacheKey, DependsOnEverythingThatGoesIn) {
  const SourceFile header{"a.h", "text"}, renamed{"b.h", "text"}, changed{"a.h", "texts"};
  const auto key = [](const std::string& source, std::vector<SourceFile> headers,
                      std::vector<std::string> options) {
    return to_hex(source_key(source, headers, options));
  };
  const std::vector<std::string> keys = {key("s", {header}, {"-a", "-b"}),
                                         key("t", {header}, {"-a", "-b"}),
                                         key("s", {renamed}, {"-a", "-b"}),
                                         key("s", {changed}, {"-a", "-b"}),
                                         key("s", {}, {"-a", "-b"}),
                                         key("s", {header}, {"-a"}),
                                         key("s", {header}, {"-a-b"}),
                                         key("s", {header}, {"-b", "-a"}),
                                         to_hex(with_compiler(key_of("s"), 13000)),
                                         to_hex(with_compiler(key_of("s"), 13001))};
  for (size_t i = 0; i < keys.size(); ++i) {
    for (size_t j = 0; j < i; ++j) EXPECT_NE(keys[i], keys[j]) << i << " and " << j;
  }
  EXPECT_EQ(keys[0], key("s", {header}, {"-a", "-b"}));
}

}  // namespace
}  // namespace anymask::cuda
