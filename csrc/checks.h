// Checks whose messages carry the name of what was wrong and its actual value.  A failed check is a ValueError in Python.
#pragma once

#include <sstream>
#include <stdexcept>

namespace optmem {

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// std::invalid_argument arrives in Python as ValueError.
template <typename... Parts>
void check(bool holds, const Parts&... message) {
  if (!holds) throw std::invalid_argument(join(message...));
}

}  // namespace optmem
