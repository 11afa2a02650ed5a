// Compiles every registered GPU kernel as the library does at run time, without a GPU, and fails
// when the machine code is not what it must be: registers spilled in a math loop, compiler
// advisories that cost speed, or a matrix kernel without wgmma and bulk tensor copies. Also
// compiles each embedded header by itself.
//
//   kernel_check [--libraries FOLDER]... [--ship FOLDER] [--only TEXT] [--verbose]
//   kernel_check --shipped FOLDER
//
// --libraries: a folder to find NVRTC in, such as site-packages (also: ANYMASK_NVRTC).
// --ship: put the compiled kernels there, as the cache layer that goes into the package.
// --only: no headers, and of the kernels those whose title begins with this: "backward<1, 128".
// --shipped: compile nothing; ask for every kernel as a call does, and fail unless each is there.
#include <cstdio>
#include <exception>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/kernel.h"
#include "machine_code.h"

namespace {

using namespace anymask::cuda;
using anymask::tools::count_instructions;
using anymask::tools::InstructionCounts;

constexpr int kCapability = 90;

struct Options {
  std::string ship;
  std::string shipped;
  std::string only;
  bool verbose = false;
};

std::vector<std::string> faults_of(const KernelConfig& config, const CompileReport& report,
                                   const InstructionCounts& counts) {
  std::vector<std::string> faults = report.advisories;
  // Warps that only serve the math warps may keep a few registers in memory; math loops may not.
  const int harmful = config.family->matrix ? counts.local_in_matrix_loops : counts.local;
  if (harmful > 0) {
    faults.push_back(std::to_string(harmful) + " accesses to local memory" +
                     (config.family->matrix ? " in a loop around wgmma" : ""));
  }
  if (config.family->matrix && counts.matrix == 0) faults.push_back("no wgmma (HGMMA)");
  if (config.family->matrix && counts.tensor_load == 0) {
    faults.push_back("no bulk tensor copy (UTMALDG)");
  }
  return faults;
}

// Each header must compile without what another one happened to include before it.
int check_headers() {
  int failures = 0;
  for (const SourceFile& header : embedded_sources()) {
    try {
      compile(std::string("check of ") + header.name,
              std::string("#include \"") + header.name + "\"\n", source_closure(header.name),
              compile_options(kCapability));
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", header.name, error.what());
      ++failures;
    }
  }
  std::printf("%zu headers compiled by themselves, %d failed\n", embedded_sources().size(),
              failures);
  return failures;
}

int check_kernels(const Options& options) {
  int failures = 0;
  std::mutex mutex;
  std::printf("%-64s %9s %6s %6s %6s %6s %6s %7s\n", "kernel", "registers", "spills", "bytes",
              "wgmma", "copies", "local", "in loop");
  const auto check_one = [&](const KernelConfig& config) {
    if (!kernel_title(config).starts_with(options.only)) return;
    std::vector<std::string> faults;
    CompileReport report;
    InstructionCounts counts;
    CachedKernel built;
    try {
      built = options.ship.empty() ? build_kernel(config, kCapability)
                                   : ship_kernel(config, kCapability, CacheFolder(options.ship));
      report = read_compile_log(built.code.log);
      counts = count_instructions(built.code.cubin, kernel_entry(*config.family));
      faults = faults_of(config, report, counts);
    } catch (const std::exception& error) {
      faults.push_back(error.what());
    }
    const std::lock_guard lock(mutex);
    std::printf("%-64s %9d %6d %6d %6d %6d %6d %7d\n", kernel_title(config).c_str(),
                report.registers, report.spill_store_bytes, 16 * counts.all, counts.matrix,
                counts.tensor_load, counts.local, counts.local_in_matrix_loops);
    for (const std::string& fault : faults) std::printf("  FAILS: %s\n", fault.c_str());
    if (options.verbose) std::printf("%s\n", built.code.log.c_str());
    failures += faults.empty() ? 0 : 1;
  };
  for_each_kernel(check_one);
  return failures;
}

// A kernel that the layer lacks would be compiled: where no NVRTC can be found, that is an error.
int check_shipped(const std::string& folder) {
  set_package_cache(folder);
  if (compiler_problem().empty()) {
    std::printf("--shipped: NVRTC was found; set ANYMASK_NVRTC to a path that does not exist\n");
    return 1;
  }
  int failures = 0;
  size_t bytes = 0;
  const std::vector<KernelConfig> all = registered_kernels();
  for (const KernelConfig& config : all) {
    try {
      bytes += kernel_code(config, kCapability).code.cubin.size();
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", kernel_title(config).c_str(), error.what());
      ++failures;
    }
  }
  std::printf("%zu kernels, %zu bytes of machine code, %d missing from %s\n", all.size(), bytes,
              failures, folder.c_str());
  return failures == 0 ? 0 : 1;
}

int run(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--verbose") {
      options.verbose = true;
    } else if (argument == "--libraries" && i + 1 < argc) {
      add_library_folder(argv[++i]);
    } else if (argument == "--ship" && i + 1 < argc) {
      options.ship = argv[++i];
    } else if (argument == "--shipped" && i + 1 < argc) {
      options.shipped = argv[++i];
    } else if (argument == "--only" && i + 1 < argc) {
      options.only = argv[++i];
    } else {
      std::fprintf(stderr,
                   "usage: kernel_check [--libraries FOLDER]... [--ship FOLDER] [--only TEXT] "
                   "[--verbose]\n"
                   "       kernel_check --shipped FOLDER\n");
      return 2;
    }
  }
  if (!options.shipped.empty()) return check_shipped(options.shipped);
  const CompilerInfo compiler = compiler_info();
  std::printf("NVRTC %d.%d, %s\n", compiler.version / 1000, compiler.version % 1000,
              compiler.path.c_str());
  const int failures = (options.only.empty() ? check_headers() : 0) + check_kernels(options);
  std::printf(failures == 0 ? "all good\n" : "%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
