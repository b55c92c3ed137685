// Which instruction set the CPU kernels run with.
//
// A kernel is written once, as a plain loop in an always-inline function, and instantiated under three target attributes; the
// compiler vectorises each copy for its own target.  `OPTMEM_DISPATCH` calls the copy for the instruction set in force.
#pragma once

#include <string>

namespace optmem {

enum class Isa { plain = 0, avx2 = 1, avx512 = 2 };

// The best this machine has, capped by the environment variable OPTMEM_ISA (plain, avx2, avx512) and by force_isa.
Isa current_isa();

// Caps the instruction set: a name above, or "auto" to lift the cap.  For tests; throws if the machine lacks it.
void force_isa(const std::string& name);

const char* isa_name(Isa isa);

// Whether instructions that multiply bf16 are there and in force.
bool has_bf16();

}  // namespace optmem

#define OPTMEM_INLINE __attribute__((always_inline)) inline
#define OPTMEM_AVX2 __attribute__((target("avx2,fma")))
#define OPTMEM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define OPTMEM_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")))
#define OPTMEM_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")))

// Defines name_plain, name_avx2 and name_avx512 with the same parameters, each calling body_name.
#define OPTMEM_VARIANTS(name, body_name, parameters, arguments) \
  static void name##_plain parameters { body_name arguments; }  \
  OPTMEM_AVX2 static void name##_avx2 parameters { body_name arguments; } \
  OPTMEM_AVX512 static void name##_avx512 parameters { body_name arguments; }

#define OPTMEM_DISPATCH(name)                                  \
  (::optmem::current_isa() == ::optmem::Isa::avx512 ? name##_avx512 \
   : ::optmem::current_isa() == ::optmem::Isa::avx2 ? name##_avx2   \
                                                    : name##_plain)
