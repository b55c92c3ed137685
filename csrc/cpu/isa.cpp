#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>

#include "checks.h"

namespace optmem {
namespace {

Isa machine_isa() {
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
  return Isa::plain;
}

Isa parse(const std::string& name) {
  if (name == "auto") return machine_isa();
  for (Isa isa : {Isa::plain, Isa::avx2, Isa::avx512}) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument(join("the instruction set must be auto, plain, avx2 or avx512, got '", name, "'"));
}

Isa capped(const std::string& name) {
  const Isa wanted = parse(name), have = machine_isa();
  check(wanted <= have, "this machine has no ", isa_name(wanted), ": its best is ", isa_name(have));
  return wanted;
}

std::atomic<Isa>& in_force() {
  static std::atomic<Isa> isa([] {
    const char* wanted = std::getenv("OPTMEM_ISA");
    return capped(wanted == nullptr || *wanted == '\0' ? "auto" : wanted);
  }());
  return isa;
}

}  // namespace

Isa current_isa() { return in_force().load(std::memory_order_relaxed); }

void force_isa(const std::string& name) { in_force().store(capped(name)); }

bool has_bf16() { return current_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16"); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::plain: break;
  }
  return "plain";
}

}  // namespace optmem
