// Host arrays that the leaves of a program point to.
#pragma once

#include <list>
#include <vector>

#include "rules/program.h"

namespace anymask::cuda {

class Arrays {
 public:
  template <typename T>
  const void* add(const std::vector<T>& values) {
    const char* first = reinterpret_cast<const char*>(values.data());
    return all_.emplace_back(first, first + values.size() * sizeof(T)).data();
  }

  // The program with every array replaced by where `copy(bytes)` says its copy is.
  template <typename Copy>
  rules::Program moved(rules::Program program, Copy copy) const {
    for (int i = 0; i < program.count; ++i) {
      for (rules::Array* array : {&program.nodes[i].rows, &program.nodes[i].columns}) {
        for (const std::vector<char>& bytes : all_) {
          if (!bytes.empty() && bytes.data() == array->data) array->data = copy(bytes);
        }
      }
    }
    return program;
  }

 private:
  std::list<std::vector<char>> all_;
};

}  // namespace anymask::cuda
