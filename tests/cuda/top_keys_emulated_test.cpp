// The kernels of top_keys, run on the CPU thread by thread. Needs no GPU.
#include "cuda/emulator.h"
//
#include "cuda/device/top_keys.h"
#include "cuda/top_keys.h"
#include "cuda/top_keys_cases.h"

namespace anymask::cuda {
namespace {

std::function<void()> body_of(const TopKeysStep& step) {
  const std::string name = step.config.family->name;
  const TopKeysParams* params = &step.params;
  if (name == "top_keys_count") return [params] { count_keys(*params); };
  if (name == "top_keys_place") return [params] { place_keys(*params); };
  return [params] { find_ends(*params); };
}

// `multiprocessors`: few of them make a warp walk several chunks.
std::vector<int32_t> select_emulated(const Selection& selection, const std::vector<float>& scores,
                                     int multiprocessors) {
  const Tensor view = selection.view(scores.data());
  std::vector<int32_t> ends(static_cast<size_t>(selection.keys()), -1);
  // Not a byte more than asked for: the address sanitizer watches.
  std::vector<char> memory(static_cast<size_t>(top_keys_workspace(view)), char(0xa5));
  for (const TopKeysStep& step :
       top_keys_steps(view, selection.keep, selection.q_len, selection.ends_view(ends.data()),
                      memory.data(), multiprocessors)) {
    emulate(step.grid.x, step.config.threads, body_of(step));
  }
  return ends;
}

TEST(TopKeysEmulated, MatchesTheCpu) {
  for (const Selection& selection : kSelections) {
    check_selection(selection, [](const Selection& s, const std::vector<float>& scores) {
      return select_emulated(s, scores, 132);
    });
  }
}

TEST(TopKeysEmulated, WarpsThatWalkSeveralChunksMatchTheCpu) {
  for (const Selection& selection : kSelections) {
    if (selection.kv_len < 5000) continue;
    check_selection(selection, [](const Selection& s, const std::vector<float>& scores) {
      return select_emulated(s, scores, 0);
    });
  }
}

}  // namespace
}  // namespace anymask::cuda
