// Which kernels this CPU gets.
#include <atomic>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

#include "layout.h"
#include "matgptq.h"

namespace matgptq {
namespace {

bool cpu_has_avx2() {
#if defined(__x86_64__) || defined(__i386__)
    unsigned a, b, c, d;  // older compilers do not know f16c by name
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
#else
    return false;
#endif
}

bool cpu_has_avx512() {
#if defined(__x86_64__) || defined(__i386__)
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
#else
    return false;
#endif
}

const Kernels* find(const char* name) {
    if (!std::strcmp(name, "avx512")) return cpu_has_avx512() ? avx512_kernels() : nullptr;
    if (!std::strcmp(name, "avx2")) return cpu_has_avx2() ? avx2_kernels() : nullptr;
    if (!std::strcmp(name, "neon")) return neon_kernels();
    if (!std::strcmp(name, "scalar")) return scalar_kernels();
    return nullptr;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* table = current.load(std::memory_order_acquire);
    if (!table) {
        for (const char* name : {"avx512", "avx2", "neon", "scalar"})
            if ((table = find(name))) break;
        current.store(table, std::memory_order_release);
    }
    return *table;
}

}  // namespace matgptq

extern "C" const char* matgptq_isa(void) { return matgptq::kernels().name; }

extern "C" int matgptq_set_isa(const char* name) {
    if (!name) return MATGPTQ_E_ARGUMENT;
    const matgptq::Kernels* table = matgptq::find(name);
    if (!table) return MATGPTQ_E_ISA;
    matgptq::current.store(table, std::memory_order_release);
    return MATGPTQ_OK;
}

extern "C" const char* matgptq_cpu_vendor(void) {
#if defined(__x86_64__) || defined(__i386__)
    if (__builtin_cpu_is("intel")) return "intel";
    if (__builtin_cpu_is("amd")) return "amd";
#endif
    return "other";
}

extern "C" int matgptq_abi_version(void) { return MATGPTQ_ABI_VERSION; }

extern "C" const char* matgptq_message(int status) {
    switch (status) {
        case MATGPTQ_OK: return "no error";
        case MATGPTQ_E_ARGUMENT: return "an argument is null, negative or not a known value";
        case MATGPTQ_E_BITS: return "the width is outside 2..8 or is not held by this weight";
        case MATGPTQ_E_GROUP: return "group_size must be in_features or a multiple of 32 that divides it";
        case MATGPTQ_E_SHAPE: return "in_features of a weight differs from that of x, or rows are out of range";
        case MATGPTQ_E_MEMORY: return "out of memory";
        case MATGPTQ_E_ISA: return "the instruction set is not compiled in or not on this CPU";
        default: return "unknown status";
    }
}
