// Finding NVRTC, reading its log, the sources that go into it. Needs neither GPU nor NVRTC.
#include "cuda/compiler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>

#include "anymask/error.hpp"
#include "cuda/driver.h"
#include "cuda/kernel.h"
#include "cuda/nvrtc.h"
#include "cuda/report.h"

namespace anymask::cuda {
namespace {

namespace fs = std::filesystem;

TEST(Nvrtc, SaysHowToInstallItAndWhereItLooked) {
  NvrtcSearch search;
  search.system = false;
  search.folders = {"/nowhere/site-packages"};
  search.roots = {"/nowhere/cuda"};
  Nvrtc nvrtc;
  const std::string problem = open_nvrtc(search, nvrtc);
  for (const char* part : {"pip install \"nvidia-cuda-nvrtc==13.*\"", "ANYMASK_NVRTC",
                           "/nowhere/site-packages/nvidia/cu13/lib/libnvrtc.so.13",
                           "/nowhere/site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
                           "/nowhere/cuda/lib64/libnvrtc.so.13"}) {
    EXPECT_NE(problem.find(part), std::string::npos) << part << " is not in: " << problem;
  }
}

TEST(Nvrtc, NeverOpensAMajorVersionThatTheDriverCannotLoad) {
  NvrtcSearch search;
  search.system = false;
  search.folders = {"/nowhere"};
  search.driver_version = 12040;
  Nvrtc nvrtc;
  const std::string problem = open_nvrtc(search, nvrtc);
  EXPECT_EQ(problem.find("libnvrtc.so.13"), std::string::npos) << problem;
  EXPECT_NE(problem.find("nvidia-cuda-nvrtc-cu12"), std::string::npos) << problem;
}

TEST(Nvrtc, NamesAFileThatIsNoLibrary) {
  const fs::path file = fs::temp_directory_path() / "anymask-no-library.so";
  { std::ofstream(file) << "text"; }
  NvrtcSearch search;
  search.file = file;
  Nvrtc nvrtc;
  const std::string problem = open_nvrtc(search, nvrtc);
  EXPECT_NE(problem.find(file.string()), std::string::npos) << problem;
  fs::remove(file);
}

TEST(CompileLog, IsRead) {
  const CompileReport report = read_compile_log(
      "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
      "serialized due to insufficient register resources for the wgmma pipeline in 'k'\n"
      "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
      "ptxas         .     272 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads\n"
      "ptxas info    : Used 168 registers, used 1 barriers, 14272 bytes smem\n");
  EXPECT_EQ(report.registers, 168);
  EXPECT_EQ(report.stack_bytes, 272);
  EXPECT_EQ(report.spill_store_bytes, 24);
  EXPECT_EQ(report.spill_load_bytes, 16);
  ASSERT_EQ(report.advisories.size(), 1u);
  EXPECT_NE(report.advisories[0].find("C7510"), std::string::npos);
}

TEST(CompileOptions, NameTheTarget) {
  const auto has = [](int capability, const std::string& option) {
    const std::vector<std::string> options = compile_options(capability);
    return std::find(options.begin(), options.end(), option) != options.end();
  };
  EXPECT_TRUE(has(90, "--gpu-architecture=sm_90a"));
  EXPECT_TRUE(has(80, "--gpu-architecture=sm_80"));
}

TEST(Sources, EveryIncludeOfEveryHeaderIsEmbedded) {
  EXPECT_GE(embedded_sources().size(), 5u);
  for (const SourceFile& file : embedded_sources()) {
    EXPECT_NO_THROW(source_closure(file.name)) << file.name;
  }
}

TEST(Sources, ClosureHoldsWhatIsIncludedAndNothingElse) {
  std::set<std::string> names;
  for (const SourceFile& file : source_closure("rules/evaluate.h")) names.insert(file.name);
  EXPECT_EQ(names, (std::set<std::string>{"rules/common.h", "rules/evaluate.h", "rules/leaves.h",
                                          "rules/program.h", "rules/tile_class.h"}));
  EXPECT_THROW(source_closure("no/such.h"), RuntimeFailure);
}

TEST(Kernels, AreDistinctAndWellFormed) {
  std::set<std::string> sources;
  for (const KernelConfig& config : registered_kernels()) {
    SCOPED_TRACE(kernel_title(config));
    EXPECT_NO_THROW(source_closure(config.family->header));
    EXPECT_GT(config.threads, 0);
    EXPECT_EQ(config.threads % 32, 0);
    EXPECT_LE(config.shared_bytes, 227 * 1024);
    EXPECT_TRUE(sources.insert(kernel_source(config)).second) << "registered twice";
  }
}

TEST(Kernels, SourceNamesTheVariant) {
  const KernelFamily family = {"f", "h.h", "Config", "Params", "run", 90, true, 64};
  KernelConfig config;
  config.family = &family;
  config.values = {128, -1, 1};
  config.count = 3;
  config.threads = 384;
  EXPECT_EQ(kernel_title(config), "f<128, -1, 1>");
  const std::string source = kernel_source(config);
  for (const char* part :
       {"#include \"h.h\"", "sizeof(Params) == 64", "constexpr Config kConfig{128, -1, 1};",
        "__launch_bounds__(384, 1)", "run<kConfig>(params);"}) {
    EXPECT_NE(source.find(part), std::string::npos) << part << " is not in:\n" << source;
  }
}

TEST(Report, IsCompleteWhateverIsMissing) {
  const std::string report = report_json();
  for (const char* part : {"\"driver\": {", "\"gpus\": [", "\"compiler\": {",
                           "\"package_cache\": {\"path\"", "\"user_cache\": {", "\"kernels\": "}) {
    EXPECT_NE(report.find(part), std::string::npos) << part << " is not in: " << report;
  }
}

TEST(Driver, SaysWhatIsMissing) {
  if (!driver_problem().empty()) {
    EXPECT_EQ(gpu_count(), 0);
    EXPECT_THROW(driver(), Unsupported);
  } else {
    EXPECT_THROW(gpu(1000), InvalidValue);
  }
}

}  // namespace
}  // namespace anymask::cuda
