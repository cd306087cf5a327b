// Which kernels this CPU gets.
#include <atomic>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "layout.h"
#include "matgptq.h"

namespace matgptq {
namespace {

#if defined(__x86_64__) || defined(__i386__)

// Bit of a register (0 = eax) that cpuid gives for a leaf: older compilers do not know some features by name. Those named
// so need registers that the system saves for AVX2, which is asked for with them.
bool cpuid_bit(unsigned leaf, unsigned subleaf, int which, int bit) {
    unsigned word[4];
    return __get_cpuid_count(leaf, subleaf, word, word + 1, word + 2, word + 3) && (word[which] >> bit & 1);
}

bool cpu_has_avx2() {
    const bool f16c = cpuid_bit(1, 0, 2, 29);
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
}

bool cpu_has_avx512() {
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni");
}

// Linux gives the tile registers to processes that ask for them, to all their threads.
bool cpu_has_amx() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr long ask = 0x1023, tiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return cpu_has_avx512() && cpuid_bit(7, 0, 3, 22) && cpuid_bit(7, 0, 3, 24) && cpuid_bit(7, 0, 3, 25) &&
           syscall(SYS_arch_prctl, ask, tiles) == 0;
#else
    return false;
#endif
}

bool cpu_has_avx_vnni() {
#if defined(MATGPTQ_EVEX)
    return cpu_has_avx512();
#else
    return cpu_has_avx2() && __builtin_cpu_supports("gfni") && cpuid_bit(7, 1, 0, 4);
#endif
}

#elif defined(__aarch64__)

bool cpu_has_dot_products() {
#if defined(__ARM_FEATURE_DOTPROD)
    return true;
#elif defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
    return false;
#endif
}

#endif

struct InstructionSet {
    const char* name;
    const Kernels* (*compiled)();
    bool (*on_this_cpu)();
};

// The best ones first.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__) || defined(__i386__)
    {"amx", amx_kernels, cpu_has_amx},
    {"avx512", avx512_kernels, cpu_has_avx512},
    {"avx_vnni", avx_vnni_kernels, cpu_has_avx_vnni},
    {"avx2", avx2_kernels, cpu_has_avx2},
#elif defined(__aarch64__)
    {"neon_dot", neon_dot_kernels, cpu_has_dot_products},
    {"neon", neon_kernels, [] { return true; }},
#endif
    {"scalar", scalar_kernels, [] { return true; }},
};

// The one of that name; of a null name the best.
const Kernels* find(const char* name) {
    for (const InstructionSet& set : kInstructionSets)
        if ((!name || !std::strcmp(name, set.name)) && set.on_this_cpu())
            if (const Kernels* table = set.compiled()) return table;
    return nullptr;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* table = current.load(std::memory_order_acquire);
    if (!table) {
        table = find(nullptr);
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
