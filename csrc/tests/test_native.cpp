// Every kernel of every instruction set this machine has, against plain loops written from the formulas in matgptq.h.
// Prints one line per group of checks; exit status 1 on any failure. Built with -DMATGPTQ_TESTS=ON, and under the
// sanitizers with -DMATGPTQ_SANITIZE=ON.
#include <chrono>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "matgptq.h"
#include "row_steps.h"
#include "threads.h"

namespace {

int failures = 0;
std::string where;

void check(bool ok, const char* what) {
    if (ok) return;
    if (++failures <= 20) std::printf("FAILED: %s [%s]\n", what, where.c_str());
}

std::mt19937 random_bits(7);

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(random_bits); }
int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

int slice(int q, int bits) {
    if (bits == 8) return q;
    return std::min((q + (1 << (7 - bits))) >> (8 - bits), (1 << bits) - 1);
}
float level(int q, int bits) { return static_cast<float>((slice(q, bits) << (8 - bits)) - 128); }

float bfloat16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    word = (word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000u;
    std::memcpy(&value, &word, 4);
    return value;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
    for (const char* name : {"scalar", "avx2", "avx_vnni", "avx512", "amx", "neon", "neon_dot"})
        if (matgptq_set_isa(name) == MATGPTQ_OK) found.push_back(name);
    return found;
}

struct Case {
    int64_t out, in, group;
    std::vector<uint8_t> codes;
    std::vector<std::vector<float>> scales;  // per width 2..8

    Case(int64_t out_, int64_t in_, int64_t group_, bool half_scales) : out(out_), in(in_), group(group_) {
        codes.resize(static_cast<size_t>(out * in));
        for (auto& q : codes) q = static_cast<uint8_t>(integer(0, 255));
        // Saturated and rounding-edge codes must not depend on luck.
        for (size_t i = 0; i < codes.size() && i < 256; ++i) codes[i] = static_cast<uint8_t>(i);
        for (int bits = 2; bits <= 8; ++bits) {
            std::vector<float> set(static_cast<size_t>(out * (in / group)));
            for (auto& s : set) s = half_scales ? static_cast<float>(integer(-40, 40)) / 1024.0f : uniform(-0.04f, 0.04f);
            set[0] = 0.0f;
            scales.push_back(set);
        }
    }
    float scale(int bits, int64_t row, int64_t column) const {
        return scales[static_cast<size_t>(bits - 2)][static_cast<size_t>(row * (in / group) + column / group)];
    }
    float weight(int bits, int64_t row, int64_t column) const {
        return scale(bits, row, column) * level(codes[static_cast<size_t>(row * in + column)], bits);
    }
    matgptq_weight* pack(int slice_bits, matgptq_arena* arena = nullptr) const {
        int widths[7];
        const float* sets[7];
        int count = 0;
        for (int bits = 2; bits <= 8; ++bits)
            if (!slice_bits || bits == slice_bits) {
                widths[count] = bits;
                sets[count++] = scales[static_cast<size_t>(bits - 2)].data();
            }
        matgptq_weight* packed = nullptr;
        check(matgptq_pack(codes.data(), in, out, in, group, slice_bits, count, widths, sets, arena, 2, &packed) ==
                  MATGPTQ_OK,
              "pack");
        return packed;
    }
};

std::vector<float> multiply(const matgptq_weight* weight, int bits, const std::vector<float>& x, int64_t batch,
                            int64_t in, int64_t out, const float* bias, int activations, int threads) {
    std::vector<float> y(static_cast<size_t>(batch * out), -77.0f);
    const matgptq_product product{weight, bits, bias, y.data(), out};
    check(matgptq_matmul(x.data(), MATGPTQ_FLOAT32, in, batch, in, &product, 1, MATGPTQ_FLOAT32, activations,
                         threads) == MATGPTQ_OK,
          "matmul status");
    return y;
}

void test_products(const std::vector<std::string>& sets) {
    struct Shape {
        int64_t out, in, group;
    };
    for (const Shape& shape : {Shape{16, 32, 32}, Shape{33, 96, 32}, Shape{40, 192, 64}, Shape{17, 256, 128},
                               Shape{1, 1, 1}, Shape{19, 45, 45}, Shape{50, 301, 301}, Shape{7, 576, 192}})
        for (int form = 0; form < 2; ++form)
            for (int bits = 2; bits <= 8; ++bits) {
                const Case data(shape.out, shape.in, shape.group, bits % 2 == 0);
                matgptq_weight* const weight = data.pack(form ? 0 : bits);
                for (int64_t batch : {0, 1, 2, 3, 5, 8, 9, 17}) {
                    std::vector<float> x(static_cast<size_t>(batch * shape.in)), bias(static_cast<size_t>(shape.out));
                    for (auto& v : x) v = uniform(-2, 2);
                    for (auto& v : bias) v = uniform(-1, 1);
                    std::vector<float> int8_first, exact_first;
                    for (const std::string& set : sets) {
                        matgptq_set_isa(set.c_str());
                        where = set + " out " + std::to_string(shape.out) + " in " + std::to_string(shape.in) +
                                " group " + std::to_string(shape.group) + " bits " + std::to_string(bits) + " batch " +
                                std::to_string(batch) + (form ? " resident" : " packed");
                        const auto exact = multiply(weight, bits, x, batch, shape.in, shape.out, bias.data(),
                                                    MATGPTQ_EXACT, 2);
                        const auto int8 =
                            multiply(weight, bits, x, batch, shape.in, shape.out, nullptr, MATGPTQ_INT8, 1);
                        bool close = true, rounded = true;
                        for (int64_t b = 0; b < batch; ++b)
                            for (int64_t o = 0; o < shape.out; ++o) {
                                double sum = 0, magnitude = 0;
                                for (int64_t i = 0; i < shape.in; ++i) {
                                    const double term = static_cast<double>(x[static_cast<size_t>(b * shape.in + i)]) *
                                                        data.weight(bits, o, i);
                                    sum += term;
                                    magnitude += std::abs(term);
                                }
                                const size_t at = static_cast<size_t>(b * shape.out + o);
                                close &= std::abs(exact[at] - (sum + bias[static_cast<size_t>(o)])) <=
                                         2e-6 * magnitude + 1e-6;
                                // Each activation is off by at most half a step of 2/127.
                                double bound = 0;
                                for (int64_t i = 0; i < shape.in; ++i)
                                    bound += std::abs(data.weight(bits, o, i)) * (2.0 / 127 * 0.501);
                                rounded &= std::abs(int8[at] - sum) <= bound + 1e-5;
                            }
                        check(close, "exact product");
                        check(rounded, "int8 product within its rounding");
                        if (int8_first.empty()) int8_first = int8;
                        if (exact_first.empty()) exact_first = exact;
                        check(int8 == int8_first && exact == exact_first, "equal to the bit on every instruction set");
                    }
                }
                matgptq_weight_free(weight);
            }
    std::printf("products: exact and int8, both forms, all widths\n");
}

// More rows, columns and tiles than are multiplied before others begin, none of them a multiple of anything, for layers
// that share x in blocks of three lengths: what one instruction set does otherwise for many rows must not be seen.
void test_many_rows(const std::vector<std::string>& sets) {
    constexpr int64_t in = 576, batch = 275;
    const Case a(83, in, 64, true), b(30, in, 192, false), c(17, in, 576, true), d(70, in, 96, false);
    const Case* const cases[4] = {&a, &b, &c, &d};
    std::vector<float> x(batch * in), bias(83);
    for (auto& v : x) v = uniform(-2, 2);
    for (auto& v : bias) v = uniform(-1, 1);
    x[20 * in + 5] = std::numeric_limits<float>::infinity();
    x[21 * in + 6] = std::numeric_limits<float>::quiet_NaN();
    for (int bits = 2; bits <= 8; ++bits)
        for (int form = 0; form < 2; ++form) {
            matgptq_weight* weights[4];
            for (int i = 0; i < 4; ++i) weights[i] = cases[i]->pack(form ? 0 : bits);
            for (int activations : {MATGPTQ_EXACT, MATGPTQ_INT8})
                for (int64_t rows : {5, 9, 16, 23, 27, 275}) {
                    std::vector<std::vector<float>> first;
                    for (const std::string& set : sets) {
                        matgptq_set_isa(set.c_str());
                        where = set + " bits " + std::to_string(bits) + " rows " + std::to_string(rows);
                        std::vector<std::vector<float>> y;
                        matgptq_product products[4];
                        for (int i = 0; i < 4; ++i) {
                            const int64_t stride = cases[i]->out + i;  // what lies between rows is not ours
                            y.emplace_back(static_cast<size_t>(rows * stride), -77.0f);
                            products[i] = {weights[i], bits, i ? nullptr : bias.data(), y.back().data(), stride};
                        }
                        check(!matgptq_matmul(x.data(), MATGPTQ_FLOAT32, in, rows, in, products, 4, MATGPTQ_FLOAT32,
                                              activations, 2),
                              "many rows status");
                        if (first.empty()) first = y;
                        bool same = true;
                        for (size_t i = 0; i < 4; ++i)
                            for (size_t k = 0; k < y[i].size(); ++k)
                                same &= y[i][k] == first[i][k] || (std::isnan(y[i][k]) && std::isnan(first[i][k]));
                        check(same, "many rows are equal to the bit on every instruction set");
                        check(std::count(y[1].begin(), y[1].end(), -77.0f) == rows, "what lies between rows stays");
                    }
                }
            for (auto* weight : weights) matgptq_weight_free(weight);
        }
    std::printf("many rows: all widths, both forms, shared input\n");
}

void test_same_bits_in_both_forms(const std::vector<std::string>& sets) {
    const Case data(48, 256, 64, true);
    matgptq_weight* const parent = data.pack(0);
    std::vector<float> x(4 * 256);
    for (auto& v : x) v = uniform(-1, 1);
    for (int bits = 2; bits <= 8; ++bits) {
        matgptq_weight* const packed = data.pack(bits);
        for (const std::string& set : sets) {
            matgptq_set_isa(set.c_str());
            where = set + " bits " + std::to_string(bits);
            for (int activations : {MATGPTQ_INT8, MATGPTQ_EXACT})
                for (int64_t batch : {1, 4}) {
                    const auto a = multiply(parent, bits, x, batch, 256, 48, nullptr, activations, 1);
                    const auto b = multiply(packed, bits, x, batch, 256, 48, nullptr, activations, 2);
                    check(a == b, "resident parent and packed slice agree");
                }
        }
        check(matgptq_weight_bytes_read(packed, bits) < matgptq_weight_bytes_read(parent, bits) || bits == 8,
              "a packed slice reads less");
        matgptq_weight_free(packed);
    }
    matgptq_weight_free(parent);
    std::printf("products: resident parent and packed slice agree\n");
}

void test_dequantize(const std::vector<std::string>& sets) {
    for (int64_t in : {64, 45, 320})
        for (int form = 0; form < 2; ++form)
            for (int bits = 2; bits <= 8; ++bits) {
                const Case data(37, in, in == 320 ? 32 : in, bits % 2 == 1);
                matgptq_weight* const weight = data.pack(form ? 0 : bits);
                for (const std::string& set : sets) {
                    matgptq_set_isa(set.c_str());
                    where = set + " in " + std::to_string(in) + " bits " + std::to_string(bits);
                    for (auto range : {std::pair<int64_t, int64_t>{0, 37}, {3, 4}, {15, 33}, {5, 5}}) {
                        const int64_t rows = range.second - range.first, stride = in + 3;
                        std::vector<float> full(static_cast<size_t>(rows * stride), 5.0f);
                        std::vector<uint16_t> half(static_cast<size_t>(rows * stride), 7);
                        check(!matgptq_dequantize(weight, bits, range.first, range.second, full.data(), MATGPTQ_FLOAT32,
                                                  stride, 2),
                              "dequantize status");
                        check(!matgptq_dequantize(weight, bits, range.first, range.second, half.data(),
                                                  MATGPTQ_BFLOAT16, stride, 1),
                              "dequantize status");
                        bool same = true, untouched = true;
                        for (int64_t r = 0; r < rows; ++r)
                            for (int64_t c = 0; c < stride; ++c) {
                                const size_t at = static_cast<size_t>(r * stride + c);
                                if (c >= in) {
                                    untouched &= full[at] == 5.0f && half[at] == 7;
                                    continue;
                                }
                                const float expected = data.weight(bits, range.first + r, c);
                                const uint32_t word = static_cast<uint32_t>(half[at]) << 16;
                                float narrow;
                                std::memcpy(&narrow, &word, 4);
                                same &= full[at] == expected && narrow == bfloat16(expected);
                            }
                        check(same, "dequantize equal to the bit");
                        check(untouched, "dequantize stays in its rows");
                    }
                }
                matgptq_weight_free(weight);
            }
    std::printf("dequantize: equal to the bit, float32 and bfloat16, ranges of rows\n");
}

void test_activations(const std::vector<std::string>& sets) {
    const Case data(35, 128, 64, false);
    matgptq_weight* const weight = data.pack(0);
    const float inf = std::numeric_limits<float>::infinity();
    for (const std::string& set : sets) {
        matgptq_set_isa(set.c_str());
        where = set;
        for (int activations : {MATGPTQ_EXACT, MATGPTQ_INT8})
            for (float bad : {std::nanf(""), inf, -inf}) {
                std::vector<float> x(3 * 128, 0.5f);
                x[128 + 70] = bad;
                const auto y = multiply(weight, 4, x, 3, 128, 35, nullptr, activations, 1);
                bool ok = true;
                for (int64_t o = 0; o < 35; ++o) {
                    const float w = data.weight(4, o, 70);
                    const float got = y[static_cast<size_t>(35 + o)];
                    ok &= std::isfinite(y[static_cast<size_t>(o)]) && std::isfinite(y[static_cast<size_t>(70 + o)]);
                    if (std::isnan(bad) || w == 0.0f)
                        ok &= std::isnan(got);
                    else
                        ok &= got == bad * w;
                }
                check(ok, "non-finite activations reach their row and no other");
                // One row alone may take another path.
                for (int bits = 2; bits <= 8; ++bits) {
                    x.assign(128, 0.5f);
                    x[70] = bad;
                    const auto alone = multiply(weight, bits, x, 1, 128, 35, nullptr, activations, 1);
                    ok = true;
                    for (int64_t o = 0; o < 35; ++o) {
                        const float w = data.weight(bits, o, 70), got = alone[static_cast<size_t>(o)];
                        ok &= std::isnan(bad) || w == 0.0f ? std::isnan(got) : got == bad * w;
                    }
                    check(ok, "non-finite activations in a row alone");
                }
            }
        // Finite as long as the sums of x * (u_r - 2^(r-1)) are.
        for (int bits = 2; bits <= 8; ++bits) {
            std::vector<float> x(128, 0.0f);
            x[3] = x[7] = x[11] = 8e37f / static_cast<float>(1 << (bits - 1));
            x[15] = -x[3];
            const auto y = multiply(weight, bits, x, 1, 128, 35, nullptr, MATGPTQ_EXACT, 1);
            bool close = true;
            for (int64_t o = 0; o < 35; ++o) {
                double sum = 0, magnitude = 0;
                for (int64_t i : {3, 7, 11, 15}) {
                    const double term = static_cast<double>(x[static_cast<size_t>(i)]) * data.weight(bits, o, i);
                    sum += term;
                    magnitude += std::abs(term);
                }
                const float got = y[static_cast<size_t>(o)];
                // Times its scale a sum may be more than a float can be.
                const bool fits = std::abs(sum) <= static_cast<double>(std::numeric_limits<float>::max());
                close &= fits ? std::abs(got - sum) <= 2e-6 * magnitude : std::isinf(got) && (got > 0) == (sum > 0);
            }
            check(close, "large activations");
        }
        // A bfloat16 is not rounded beside one that is 2^14 times as large, of either sign.
        for (int bits = 2; bits <= 8; ++bits)
            for (const float large : {32768.0f, 65024.0f, 65280.0f, -32768.0f, -65280.0f}) {
                Case one(16, 64, 64, true);
                std::fill(one.codes.begin(), one.codes.end(), static_cast<uint8_t>(128));  // of weights that are zero
                for (int64_t o = 0; o < 16; ++o) one.codes[static_cast<size_t>(o * 64 + 41)] = static_cast<uint8_t>(16 * o);
                for (auto& set : one.scales) std::fill(set.begin(), set.end(), 0.5f);
                std::vector<float> far(64, 0.0f);
                far[7] = large;
                far[41] = std::fabs(large) == 65280.0f ? 3.984375f : 1.0078125f;
                matgptq_weight* const sparse = one.pack(bits);
                const auto y = multiply(sparse, bits, far, 1, 64, 16, nullptr, MATGPTQ_EXACT, 1);
                bool same = true;
                for (int64_t o = 0; o < 16; ++o) same &= y[static_cast<size_t>(o)] == far[41] * one.weight(bits, o, 41);
                check(same, "a small bfloat16 beside a large one is exact");
                matgptq_weight_free(sparse);
            }
        // bfloat16 in and out, rows with gaps, and pointers of odd alignment.
        std::vector<unsigned char> x_bytes(5 * 131 * 2 + 1), y_bytes(5 * 37 * 2 + 1), wide(5 * 131 * 4 + 1),
            y_wide(5 * 37 * 4 + 1);
        std::vector<float> x(5 * 128);
        for (int b = 0; b < 5; ++b)
            for (int i = 0; i < 128; ++i) {
                const float v = bfloat16(uniform(-1, 1));
                uint32_t word;
                std::memcpy(&word, &v, 4);
                const uint16_t half = static_cast<uint16_t>(word >> 16);
                std::memcpy(&x_bytes[1 + static_cast<size_t>(b * 131 + i) * 2], &half, 2);
                std::memcpy(&wide[1 + static_cast<size_t>(b * 131 + i) * 4], &v, 4);
                x[static_cast<size_t>(b * 128 + i)] = v;
            }
        for (int activations : {MATGPTQ_EXACT, MATGPTQ_INT8}) {
            const auto expected = multiply(weight, 3, x, 5, 128, 35, nullptr, activations, 1);
            const matgptq_product narrow{weight, 3, nullptr, y_bytes.data() + 1, 37};
            const matgptq_product full{weight, 3, nullptr, y_wide.data() + 1, 37};
            check(!matgptq_matmul(x_bytes.data() + 1, MATGPTQ_BFLOAT16, 131, 5, 128, &narrow, 1, MATGPTQ_BFLOAT16,
                                  activations, 1),
                  "bfloat16 status");
            check(!matgptq_matmul(wide.data() + 1, MATGPTQ_FLOAT32, 131, 5, 128, &full, 1, MATGPTQ_FLOAT32, activations,
                                  1),
                  "unaligned status");
            bool same = true;
            for (int b = 0; b < 5; ++b)
                for (int o = 0; o < 35; ++o) {
                    uint16_t half;
                    std::memcpy(&half, &y_bytes[1 + static_cast<size_t>(b * 37 + o) * 2], 2);
                    const uint32_t word = static_cast<uint32_t>(half) << 16;
                    float value, unaligned;
                    std::memcpy(&value, &word, 4);
                    std::memcpy(&unaligned, &y_wide[1 + static_cast<size_t>(b * 37 + o) * 4], 4);
                    const float e = expected[static_cast<size_t>(b * 35 + o)];
                    same &= value == bfloat16(e) && unaligned == e;
                }
            check(same, "bfloat16 and unaligned memory give the same results");
        }
        // Magnitudes whose reciprocal overflows, and the largest there are.
        for (float magnitude : {1e-45f, 1e-38f, 1e-30f, 1e30f}) {
            std::vector<float> tiny(128, magnitude);
            const auto y = multiply(weight, 8, tiny, 1, 128, 35, nullptr, MATGPTQ_INT8, 1);
            bool finite = true;
            for (float v : y) finite &= std::isfinite(v);
            check(finite, "extreme magnitudes stay finite");
        }
    }
    matgptq_weight_free(weight);
    std::printf("activations: NaN, infinity, bfloat16, unaligned, extreme magnitudes\n");
}

unsigned lent_threads = 0;  // of the last call of lent_team

// What OpenMP does: every thread of the team calls work once.
void lent_team(void (*work)(void*), void* data, unsigned num_threads, unsigned) {
    lent_threads = num_threads;
    std::vector<std::thread> others;
    for (unsigned i = 1; i < num_threads; ++i) others.emplace_back(work, data);
    work(data);
    for (auto& other : others) other.join();
}

// One whose threads come back late, as on a processor that another program holds: late in units of the work, however
// long that takes here.
void late_team(void (*work)(void*), void* data, unsigned num_threads, unsigned) {
    lent_threads = num_threads;
    const auto started = std::chrono::steady_clock::now();
    work(data);
    std::this_thread::sleep_for(10 * (std::chrono::steady_clock::now() - started));
}

void test_shared_input(const std::vector<std::string>& sets) {
    matgptq_arena* const arena = matgptq_arena_create(0);
    const Case a(33, 384, 64, true), b(16, 384, 128, false), c(100, 384, 384, true), d(20, 384, 32, true);
    const Case* const cases[4] = {&a, &b, &c, &d};
    const int bits[4] = {2, 8, 5, 3};
    matgptq_weight* weights[4];
    for (int i = 0; i < 4; ++i) weights[i] = cases[i]->pack(i % 2 ? bits[i] : 0, arena);
    check(matgptq_arena_bytes(arena) > 0, "arena counts");
    matgptq_arena_free(arena);  // the weights keep its memory
    std::vector<float> x(3 * 384);
    for (auto& v : x) v = uniform(-1, 1);
    for (const std::string& set : sets) {
        matgptq_set_isa(set.c_str());
        where = set;
        for (int activations : {MATGPTQ_EXACT, MATGPTQ_INT8})
            for (int threads : {0, 1, 2, 5})
                for (int64_t batch : {1, 3}) {
                    std::vector<float> y[4];
                    matgptq_product products[4];
                    for (int i = 0; i < 4; ++i) {
                        y[i].resize(static_cast<size_t>(batch * cases[i]->out));
                        products[i] = {weights[i], bits[i], nullptr, y[i].data(), cases[i]->out};
                    }
                    check(!matgptq_matmul(x.data(), MATGPTQ_FLOAT32, 384, batch, 384, products, 4, MATGPTQ_FLOAT32,
                                          activations, threads),
                          "shared input status");
                    for (int i = 0; i < 4; ++i)
                        check(y[i] == multiply(weights[i], bits[i], x, batch, 384, cases[i]->out, nullptr, activations,
                                               1),
                              "products that share x equal products alone");
                }
    }
    // Callers from several threads: one has the pool, the others work alone.
    const auto expected = multiply(weights[2], 5, x, 3, 384, 100, nullptr, MATGPTQ_EXACT, 1);
    std::vector<std::thread> callers;
    bool same[4] = {};
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([&, i] {
            same[i] = true;
            for (int repeat = 0; repeat < 50; ++repeat)
                same[i] &= multiply(weights[2], 5, x, 3, 384, 100, nullptr, MATGPTQ_EXACT, 3) == expected;
        });
    for (auto& caller : callers) caller.join();
    for (bool ok : same) check(ok, "concurrent callers");
    // A team that was lent does the work instead, where there is enough of it to share.
    const Case large(2048, 384, 64, true);
    matgptq_weight* const shared_out = large.pack(0);
    const auto alone = multiply(shared_out, 5, x, 3, 384, 2048, nullptr, MATGPTQ_EXACT, 1);
    matgptq_set_team(lent_team);
    const auto lent = multiply(shared_out, 5, x, 3, 384, 2048, nullptr, MATGPTQ_EXACT, 3);
    check(lent == alone && lent_threads == 3, "a team that was lent");
    matgptq_set_team(late_team);
    int used = 0;
    for (int call = 0; call < 64; ++call) {
        lent_threads = 0;
        check(multiply(shared_out, 5, x, 3, 384, 2048, nullptr, MATGPTQ_EXACT, 3) == alone, "a late team's product");
        used += lent_threads > 0;
    }
    check(used == 32, "a team that is late rests");
    matgptq_set_team(nullptr);
    lent_threads = 0;
    check(multiply(shared_out, 5, x, 3, 384, 2048, nullptr, MATGPTQ_EXACT, 3) == alone && !lent_threads,
          "the pool of the library's own again");
    matgptq_weight_free(shared_out);
    for (auto* weight : weights) matgptq_weight_free(weight);
    std::printf("shared input, arena, threads\n");
}

// Many short tasks, one after the other, while threads stand by: each piece is done once.
void test_standing_by() {
    const auto tasks = [](int threads) {
        bool once = true;
        matgptq::with_threads(threads, [&] {
            for (int64_t count = 1; count < 200; ++count) {
                std::vector<std::atomic<int>> done(static_cast<size_t>(count));
                matgptq::with_threads(threads, [&] {  // those that stand by already
                    matgptq::parallel_for(count, 1 + count % 7, threads, [&](int64_t begin, int64_t end) {
                        for (int64_t i = begin; i < end; ++i) ++done[static_cast<size_t>(i)];
                    });
                });
                for (auto& times : done) once &= times == 1;
            }
        });
        return once;
    };
    for (const matgptq_team team : {static_cast<matgptq_team>(nullptr), static_cast<matgptq_team>(lent_team)}) {
        where = team ? "standing by, a team that was lent" : "standing by, the pool";
        matgptq_set_team(team);
        for (int threads : {0, 1, 2, 5}) check(tasks(threads), "every piece once");
        std::vector<std::thread> callers;
        bool same[4] = {};
        for (bool& one : same) callers.emplace_back([&] { one = tasks(3); });
        for (auto& caller : callers) caller.join();
        for (bool one : same) check(one, "concurrent callers");
    }
    matgptq_set_team(nullptr);
    std::printf("standing by: tasks for threads that wait\n");
}

void test_read(const std::vector<std::string>& sets) {
    std::vector<uint64_t> words(70000);
    uint64_t sum = 0;
    for (auto& word : words) sum += word = random_bits();
    for (const std::string& set : sets) {
        matgptq_set_isa(set.c_str());
        where = set;
        check(matgptq_read(words.data(), 70000 * 8, 2) == sum, "sum of words");
    }
    std::printf("read\n");
}

void test_refusals() {
    where = "refusals";
    const Case data(8, 64, 64, true);
    matgptq_weight* weight = data.pack(4);
    float x[64] = {}, y[8];
    matgptq_product product{weight, 4, nullptr, y, 8};
    check(matgptq_matmul(x, 0, 64, 1, 65, &product, 1, 0, 0, 1) == MATGPTQ_E_SHAPE, "in_features differ");
    product.bits = 5;
    check(matgptq_matmul(x, 0, 64, 1, 64, &product, 1, 0, 0, 1) == MATGPTQ_E_BITS, "width not cache");
    product.bits = 4;
    check(matgptq_matmul(x, 7, 64, 1, 64, &product, 1, 0, 0, 1) == MATGPTQ_E_ARGUMENT, "unknown dtype");
    check(matgptq_dequantize(weight, 4, 0, 9, y, 0, 64, 1) == MATGPTQ_E_SHAPE, "rows out of range");
    matgptq_weight_free(weight);
    const int bits = 4, nine = 9;
    const float* scales = data.scales[0].data();
    check(matgptq_pack(data.codes.data(), 64, 8, 64, 48, 4, 1, &bits, &scales, nullptr, 1, &weight) == MATGPTQ_E_GROUP,
          "group size");
    check(matgptq_pack(data.codes.data(), 64, 8, 64, 64, 9, 1, &nine, &scales, nullptr, 1, &weight) == MATGPTQ_E_BITS,
          "width 9");
    check(matgptq_set_isa("mmx") == MATGPTQ_E_ISA, "unknown instruction set");
    for (int status = 0; status >= -6; --status) check(std::strlen(matgptq_message(status)) > 3, "message");
    std::printf("refusals\n");
}

// The sweep in double precision with all 256 candidates, following the kernel's codes: rounding may tip a near tie, so
// the kernel's choice has to be as cheap as the best one, not the same.
void test_sweep(const std::vector<std::string>& sets) {
    const std::vector<std::vector<int>> width_sets = {{8},       {2},          {4},          {2, 8},
                                                      {3, 4, 8}, {2, 3, 4, 8}, {2, 3, 4},    {7, 8},
                                                      {5, 6},    {2, 4, 6, 8}, {3, 5, 7, 8}, {2, 3, 4, 5, 6, 7, 8}};
    for (const auto& widths : width_sets)
        for (int mode = 0; mode < 3; ++mode)
            for (int shape = 0; shape < 2; ++shape) {
                const int64_t rows = shape ? 70 : 5, in = shape ? 131 : 47, groups = shape ? 4 : 1;
                const int count = static_cast<int>(widths.size());
                const int copies = mode == MATGPTQ_SWEEP_MEAN ? 1 : count;
                std::vector<float> weights, base(static_cast<size_t>(copies * rows * in)), trail(base.size()),
                    coupling(static_cast<size_t>(in * in)), scales(static_cast<size_t>(count * rows * groups));
                for (int bits : widths) weights.push_back(static_cast<float>(1 << bits));
                for (auto& v : base) v = uniform(-1.2f, 1.2f);
                for (auto& v : trail) v = uniform(-0.1f, 0.1f);
                for (auto& v : coupling) v = uniform(-0.2f, 0.2f);
                for (auto& v : scales) v = (integer(0, 1) ? 1.0f : -1.0f) * uniform(0.006f, 0.012f);
                std::vector<int32_t> group_of(static_cast<size_t>(in));
                for (auto& g : group_of) g = integer(0, static_cast<int>(groups) - 1);
                for (const std::string& set : sets) {
                    matgptq_set_isa(set.c_str());
                    where = set + " sweep mode " + std::to_string(mode) + " widths";
                    for (int bits : widths) where += " " + std::to_string(bits);
                    std::vector<uint8_t> codes(static_cast<size_t>(rows * in), 99);
                    matgptq_sweep_job job{rows, in, groups, count, widths.data(), weights.data(), base.data(),
                                          shape ? trail.data() : nullptr, coupling.data(), scales.data(),
                                          group_of.data(), codes.data(), mode, 2};
                    check(matgptq_sweep(&job) == MATGPTQ_OK, "sweep status");
                    bool best = true;
                    int different = 0;
                    for (int64_t row = 0; row < rows; ++row) {
                        std::vector<double> sums(static_cast<size_t>(copies * in));
                        for (int r = 0; r < copies; ++r)
                            for (int64_t k = 0; k < in; ++k)
                                sums[static_cast<size_t>(r * in + k)] =
                                    shape ? trail[static_cast<size_t>((r * rows + row) * in + k)] : 0.0f;
                        for (int64_t j = 0; j < in; ++j) {
                            double x[7], s[7];
                            for (int r = 0; r < count; ++r) {
                                const int copy = r < copies ? r : 0;
                                x[r] = base[static_cast<size_t>((copy * rows + row) * in + j)] +
                                       sums[static_cast<size_t>(copy * in + j)];
                                s[r] = scales[static_cast<size_t>((r * rows + row) * groups +
                                                                  group_of[static_cast<size_t>(j)])];
                            }
                            double least = 1e300;
                            int least_code = 0;
                            const int code = codes[static_cast<size_t>(row * in + j)];
                            double chosen = 0;
                            for (int q = 0; q < 256; ++q) {
                                double cost = 0;
                                for (int r = 0; r < count; ++r) {
                                    const double e = x[r] - s[r] * level(q, widths[static_cast<size_t>(r)]);
                                    cost += weights[static_cast<size_t>(r)] * e * e;
                                }
                                if (cost < least) {
                                    least = cost;
                                    least_code = q;
                                }
                                if (q == code) chosen = cost;
                            }
                            different += code != least_code;
                            best &= chosen <= least * (1 + 1e-3) + 1e-6;
                            double mean = 0;
                            for (int r = 0; r < count; ++r)
                                mean += s[r] * level(code, widths[static_cast<size_t>(r)]) / count;
                            for (int r = 0; r < copies; ++r) {
                                const double w = s[r] * level(code, widths[static_cast<size_t>(r)]);
                                const double c = mode == MATGPTQ_SWEEP_MEAN ? x[0] - mean
                                                 : mode == MATGPTQ_SWEEP_RESIDUAL
                                                     ? x[r] - w
                                                     : w - base[static_cast<size_t>((r * rows + row) * in + j)];
                                for (int64_t k = j + 1; k < in; ++k)
                                    sums[static_cast<size_t>(r * in + k)] -=
                                        c * coupling[static_cast<size_t>(j * in + k)];
                            }
                        }
                    }
                    check(best, "sweep picks a cheapest code");
                    check(different <= rows * in / 100 + 1, "sweep differs from the full scan only at near ties");
                }
            }
    std::printf("sweep: twelve sets of widths, three modes\n");
}

// A vector of either dtype, and what it holds.
struct Vector {
    bool half;
    std::vector<float> values;
    std::vector<uint16_t> words;

    Vector(int64_t size, bool half_, float low, float high) : half(half_), values(static_cast<size_t>(size)) {
        for (float& value : values) value = half ? bfloat16(uniform(low, high)) : uniform(low, high);
        write();
    }
    void write() {
        words.resize(values.size());
        for (size_t i = 0; i < values.size(); ++i) {
            uint32_t word;
            std::memcpy(&word, &values[i], 4);
            words[i] = static_cast<uint16_t>(word >> 16);
        }
    }
    void read() {
        if (!half) return;
        for (size_t i = 0; i < values.size(); ++i) {
            const uint32_t word = static_cast<uint32_t>(words[i]) << 16;
            std::memcpy(&values[i], &word, 4);
        }
    }
    void* data() { return half ? static_cast<void*>(words.data()) : static_cast<void*>(values.data()); }
    int dtype() const { return half ? MATGPTQ_BFLOAT16 : MATGPTQ_FLOAT32; }
    // Whether a result is the expected one; one of bfloat16 may have gone the other way at a tie that float32 sees.
    bool is(size_t i, double expected) const {
        const double allowed = (half ? 0.009 : 3e-6) * std::fabs(expected) + 1e-6;
        return std::fabs(static_cast<double>(values[i]) - expected) <= allowed;
    }
};

// Of a value that float16 holds, and not a subnormal one.
uint16_t float16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (!(word & 0x7FFFFFFF)) return 0;
    return static_cast<uint16_t>((word >> 16 & 0x8000) | (((word >> 23 & 255) - 112) << 10) | (word >> 13 & 1023));
}

void test_dense(const std::vector<std::string>& sets) {
    for (const int weight_dtype : {MATGPTQ_FLOAT32, MATGPTQ_BFLOAT16, MATGPTQ_FLOAT16})
        for (const bool half_x : {false, true})
            for (const int64_t in : {1, 31, 32, 33, 100, 352})
                for (const int64_t out : {1, 3, 4, 6, 133})
                    for (const int64_t batch : {0, 1, 2, 3, 4, 5, 7, 9}) {
                        const int64_t x_stride = in + 3, stride = in + 2, y_stride = out + 1;
                        Vector x(batch * x_stride, half_x, -1, 1);
                        Vector weight(out * stride, weight_dtype != MATGPTQ_FLOAT32, -1, 1);
                        if (weight_dtype == MATGPTQ_FLOAT16)
                            for (size_t i = 0; i < weight.values.size(); ++i) {
                                weight.values[i] = std::round(uniform(-1, 1) * 2048) / 2048;
                                weight.words[i] = float16(weight.values[i]);
                            }
                        std::vector<float> bias(static_cast<size_t>(out)), first;
                        for (float& value : bias) value = uniform(-1, 1);
                        for (const std::string& set : sets) {
                            matgptq_set_isa(set.c_str());
                            where = set + ", dense, in " + std::to_string(in) + " out " + std::to_string(out) + " batch " +
                                    std::to_string(batch) + " dtype " + std::to_string(weight_dtype) + (half_x ? " x" : "");
                            Vector y(batch * y_stride, half_x, 5, 5);
                            check(!matgptq_dense(x.data(), x.dtype(), x_stride, batch, in, weight.data(), weight_dtype,
                                                 stride, out, batch % 2 ? bias.data() : nullptr, y.data(), y.dtype(),
                                                 y_stride, batch % 3 ? 1 : 2),
                                  "dense runs");
                            y.read();
                            bool near = true, untouched = true;
                            for (int64_t b = 0; b < batch; ++b) {
                                for (int64_t o = 0; o < out; ++o) {
                                    double sum = batch % 2 ? bias[static_cast<size_t>(o)] : 0, size = std::fabs(sum);
                                    for (int64_t c = 0; c < in; ++c) {
                                        const double product =
                                            static_cast<double>(x.values[static_cast<size_t>(b * x_stride + c)]) *
                                            weight.values[static_cast<size_t>(o * stride + c)];
                                        sum += product;
                                        size += std::fabs(product);
                                    }
                                    const double value = y.values[static_cast<size_t>(b * y_stride + o)];
                                    near &= std::fabs(value - sum) <= 2e-6 * size + (half_x ? 0.004 * std::fabs(sum) : 0);
                                }
                                untouched &= y.values[static_cast<size_t>(b * y_stride + out)] == 5;
                            }
                            check(near, "dense is its formula");
                            check(untouched, "dense stays in its rows");
                            if (set == "scalar") continue;  // which does not fuse
                            if (first.empty()) first = y.values;
                            check(first == y.values, "dense equal to the bit");
                        }
                    }
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    for (const std::string& set : sets) {
        matgptq_set_isa(set.c_str());
        where = set + ", dense, values that are not finite";
        for (const float bad : {nan, infinity}) {
            std::vector<float> x(40, 1.0f), weight(2 * 40, 1.0f), y(2);
            x[37] = bad;
            check(!matgptq_dense(x.data(), 0, 40, 1, 40, weight.data(), 0, 40, 2, nullptr, y.data(), 0, 2, 1), "runs");
            check(std::isnan(bad) ? std::isnan(y[0]) && std::isnan(y[1]) : std::isinf(y[0]) && std::isinf(y[1]),
                  "x propagates");
            x[37] = 1;
            weight[40 + 3] = bad;
            check(!matgptq_dense(x.data(), 0, 40, 1, 40, weight.data(), 0, 40, 2, nullptr, y.data(), 0, 2, 1), "runs");
            check(y[0] == 40 && !std::isfinite(y[1]), "weights propagate");
        }
        // 2^-24, the largest subnormal, the largest number, infinity, NaN; every one in a row of its own
        const uint16_t words[] = {1, 0x83FF, 0x7BFF, 0xFC00, 0x7E01};
        const float numbers[] = {5.9604644775390625e-8f, -1023 * 5.9604644775390625e-8f, 65504, -infinity, nan};
        for (const int64_t column : {0, 17, 39}) {
            std::vector<uint16_t> weight(5 * 40);
            for (int row = 0; row < 5; ++row) weight[static_cast<size_t>(row * 40 + column)] = words[row];
            const std::vector<float> x(40, 1.0f);
            std::vector<float> y(5);
            check(!matgptq_dense(x.data(), 0, 40, 1, 40, weight.data(), MATGPTQ_FLOAT16, 40, 5, nullptr, y.data(), 0, 5, 1),
                  "runs");
            for (size_t row = 0; row < 5; ++row)
                check(std::isnan(numbers[row]) ? std::isnan(y[row]) : y[row] == numbers[row], "any float16");
        }
    }
    float one = 1, y = 0;
    where = "dense, refusals";
    check(matgptq_dense(&one, 7, 1, 1, 1, &one, 0, 1, 1, nullptr, &y, 0, 1, 1) == MATGPTQ_E_ARGUMENT, "unknown dtype");
    check(matgptq_dense(&one, 0, 1, 1, 1, &one, 3, 1, 1, nullptr, &y, 0, 1, 1) == MATGPTQ_E_ARGUMENT, "unknown dtype");
    check(matgptq_dense(&one, 2, 1, 1, 1, &one, 2, 1, 1, nullptr, &y, 0, 1, 1) == MATGPTQ_E_ARGUMENT, "float16 x");
    check(matgptq_dense(&one, 0, 1, -1, 1, &one, 0, 1, 1, nullptr, &y, 0, 1, 1) == MATGPTQ_E_ARGUMENT, "rows below 0");
    check(matgptq_dense(&one, 0, 1, 1, 1, nullptr, 0, 1, 1, nullptr, &y, 0, 1, 1) == MATGPTQ_E_ARGUMENT, "no weight");
    check(matgptq_dense(&one, 0, 1, 1, 1, &one, 0, 1, 1, nullptr, nullptr, 0, 1, 1) == MATGPTQ_E_ARGUMENT, "no y");
    check(matgptq_dense(nullptr, 0, 0, 1, 0, nullptr, 0, 0, 1, &one, &y, 0, 1, 1) == MATGPTQ_OK && y == 1, "no columns");
    std::printf("dense: 1440 shapes and dtypes\n");
}

// What a query sees of so many positions, whose keys and values are `stride` apart.
void attend_in_double(const float* query, const float* keys, const float* values, int64_t seen, int64_t stride, int64_t size,
                      double scale, double* out) {
    std::vector<double> weights(static_cast<size_t>(seen));
    double top = -1e300, total = 0;
    for (int64_t t = 0; t < seen; ++t) {
        double& score = weights[static_cast<size_t>(t)];
        for (int64_t i = 0; i < size; ++i) score += static_cast<double>(query[i]) * keys[t * stride + i];
        score *= scale;
        top = std::max(top, score);
    }
    for (double& weight : weights) total += weight = std::exp(weight - top);
    for (int64_t i = 0; i < size; ++i) {
        out[i] = 0;
        for (int64_t t = 0; t < seen; ++t) out[i] += weights[static_cast<size_t>(t)] / total * values[t * stride + i];
    }
}

// Neighbouring tokens of a sequence, behind and before tokens of others.
void test_attend_tokens(const std::vector<std::string>& sets) {
    const auto at = [](int64_t i) { return static_cast<size_t>(i); };
    int shapes = 0;
    for (const bool half : {false, true})
        for (const auto& shape : {std::pair<int64_t, int64_t>{1, 1}, {4, 2}, {9, 3}, {8, 1}})
            for (const int64_t size : {32, 64, 96})
                for (const int64_t before : {0, 1, 15, 31, 64})
                    for (const int64_t tokens : {2, 3, 5, 16, 17, 33}) {
                        const int64_t heads = shape.first, key_heads = shape.second, stride = size + 3;
                        const int64_t capacity = before + tokens, head_stride = capacity * stride + 1;
                        const int64_t query_stride = heads * size + 7, rows = tokens + 2;
                        Vector query(rows * query_stride, half, -2, 2), keys(2 * key_heads * head_stride, half, -2, 2);
                        Vector values(2 * key_heads * head_stride, half, -1, 1);
                        matgptq_kv_cache layers[2];
                        for (int64_t i = 0; i < 2; ++i) {
                            const int64_t bytes = i * key_heads * head_stride * (half ? 2 : 4);
                            layers[i] = {static_cast<char*>(keys.data()) + bytes, static_cast<char*>(values.data()) + bytes,
                                         head_stride, stride, head_stride, stride};
                        }
                        std::vector<const matgptq_kv_cache*> caches(at(rows), &layers[0]);
                        std::vector<int64_t> lengths(at(rows));
                        caches.front() = caches.back() = &layers[1];
                        for (int64_t i = 0; i < tokens; ++i) lengths[at(i + 1)] = before + 1 + i;
                        lengths.front() = before + 1;
                        lengths.back() = capacity;
                        const float scale = 1 / std::sqrt(static_cast<float>(size));
                        std::vector<double> expected(at(rows * heads * size));
                        for (int64_t h = 0; h < rows * heads; ++h) {
                            const int64_t row = h / heads, head = h % heads, other = row == 0 || row == rows - 1;
                            const int64_t from = (other * key_heads + head / (heads / key_heads)) * head_stride;
                            attend_in_double(&query.values[at(row * query_stride + head * size)], &keys.values[at(from)],
                                             &values.values[at(from)], lengths[at(row)], stride, size, scale,
                                             &expected[at(h * size)]);
                        }
                        ++shapes;
                        for (const std::string& set : sets) {
                            matgptq_set_isa(set.c_str());
                            where = set + ", attend, " + std::to_string(tokens) + " tokens behind " + std::to_string(before) +
                                    ", heads " + std::to_string(heads) + " size " + std::to_string(size) +
                                    (half ? ", bfloat16" : "");
                            Vector out(rows * heads * size, half, 7, 7);
                            check(!matgptq_attend(query.data(), query_stride, rows, caches.data(), 0, lengths.data(),
                                                  out.data(), heads, key_heads, size, scale, out.dtype(),
                                                  static_cast<int>(tokens % 3 + 1)),
                                  "attend runs");
                            out.read();
                            bool near = true;
                            for (size_t i = 0; i < expected.size(); ++i)
                                near &= std::fabs(out.values[i] - expected[i]) <=
                                        (half ? 1e-5 + 0.004 * std::fabs(expected[i]) : 3e-6);
                            check(near, "attend is its formula");
                        }
                    }
    // Keys and values that are not finite reach those who see them.
    for (const std::string& set : sets) {
        matgptq_set_isa(set.c_str());
        where = set + ", attend, tokens, values that are not finite";
        for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
            for (const bool of_key : {false, true}) {
                Vector query(4 * 32, true, 1, 1), keys(20 * 32, true, 1, 1), values(20 * 32, true, 1, 1), out(4 * 32, true, 0, 0);
                Vector& changed = of_key ? keys : values;
                changed.values[3 * 32 + 5] = bad;
                changed.write();
                const matgptq_kv_cache cache{keys.data(), values.data(), 0, 32, 0, 32};
                const matgptq_kv_cache* const caches[4] = {&cache, &cache, &cache, &cache};
                const int64_t lengths[4] = {17, 18, 19, 20};
                check(!matgptq_attend(query.data(), 32, 4, caches, 0, lengths, out.data(), 1, 1, 32, 1.0f, out.dtype(), 1),
                      "attend runs");
                out.read();
                for (size_t token = 0; token < 4; ++token) {
                    check(!std::isfinite(out.values[token * 32 + 5]), "what is not finite propagates");
                    if (!of_key) check(std::fabs(out.values[token * 32 + 6] - 1) < 1e-6f, "to where it belongs");
                }
            }
    }
    std::printf("attend: %d shapes and dtypes of several tokens\n", shapes);
}

void test_attend(const std::vector<std::string>& sets) {
    const auto at = [](int64_t i) { return static_cast<size_t>(i); };
    for (const bool half : {false, true})
        for (const auto& shape : {std::pair<int64_t, int64_t>{1, 1}, {4, 2}, {9, 3}, {8, 1}})
            for (const int64_t size : {32, 64, 96, 128})
                for (const int64_t length : {1, 2, 15, 16, 17, 33, 100}) {
                    const int64_t heads = shape.first, key_heads = shape.second, stride = size + 3;
                    const int64_t head_stride = (length + 2) * stride, sequence_stride = key_heads * head_stride + 5;
                    const int64_t sequences = 1 + (length + size / 32) % 3, query_stride = heads * size + 7;
                    Vector query(sequences * query_stride, half, -2, 2), keys(sequences * sequence_stride, half, -2, 2);
                    Vector values(sequences * sequence_stride, half, -1, 1);
                    // Sequences of their own lengths; the layer that counts is the second.
                    const int64_t lengths[3] = {length, 1 + length / 2, 1};
                    matgptq_kv_cache layers[3][2]{};
                    const matgptq_kv_cache* caches[3];
                    for (int64_t i = 0; i < sequences; ++i) {
                        const int64_t at_bytes = i * sequence_stride * (half ? 2 : 4);
                        layers[i][1] = {static_cast<char*>(keys.data()) + at_bytes, static_cast<char*>(values.data()) + at_bytes,
                                        head_stride, stride, head_stride, stride};
                        caches[i] = layers[i];
                    }
                    const float scale = 1 / std::sqrt(static_cast<float>(size));
                    std::vector<double> expected(at(sequences * heads * size));
                    for (int64_t h = 0; h < sequences * heads; ++h) {
                        const int64_t sequence = h / heads, head = h % heads;
                        const int64_t from = sequence * sequence_stride + head / (heads / key_heads) * head_stride;
                        attend_in_double(&query.values[at(sequence * query_stride + head * size)], &keys.values[at(from)],
                                         &values.values[at(from)], lengths[sequence], stride, size, scale,
                                         &expected[at(h * size)]);
                    }
                    for (const std::string& set : sets) {
                        matgptq_set_isa(set.c_str());
                        where = set + ", attend, heads " + std::to_string(heads) + " size " + std::to_string(size) +
                                " length " + std::to_string(length) + (half ? ", bfloat16" : "");
                        Vector out(sequences * heads * size, half, 7, 7);
                        check(!matgptq_attend(query.data(), query_stride, sequences, caches, 1, lengths, out.data(), heads,
                                              key_heads, size, scale, out.dtype(), static_cast<int>(length % 3 + 1)),
                              "attend runs");
                        out.read();
                        bool near = true;
                        for (size_t i = 0; i < expected.size(); ++i)
                            near &= std::fabs(out.values[i] - expected[i]) <=
                                    3e-6 + (half ? 0.004 * std::fabs(expected[i]) : 0);
                        check(near, "attend is its formula");
                    }
                }
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> query(32, 1.0f), keys(20 * 32, 1.0f), values(20 * 32, 1.0f), out(32);
    const matgptq_kv_cache cache{keys.data(), values.data(), 0, 32, 0, 32};
    const matgptq_kv_cache* caches[1] = {&cache};
    const auto attend = [&](const void* from, int64_t heads, int64_t key_heads, int64_t size, int64_t length) {
        return matgptq_attend(from, 0, 1, caches, 0, &length, out.data(), heads, key_heads, size, 1.0f, 0, 1);
    };
    const auto run = [&](int64_t size) { return attend(query.data(), 1, 1, size, 20); };
    for (const std::string& set : sets) {
        matgptq_set_isa(set.c_str());
        where = set + ", attend, values that are not finite";
        for (const float bad : {nan, infinity})
            for (const size_t place : {0, 18}) {
                keys[place * 32 + 5] = bad;
                check(!run(32) && std::isnan(out[0]) && std::isnan(out[31]), "keys propagate");
                keys[place * 32 + 5] = 1;
                values[place * 32 + 5] = bad;
                check(!run(32) && !std::isfinite(out[5]) && std::fabs(out[6] - 1) < 1e-6f, "values propagate");
                values[place * 32 + 5] = 1;
            }
        keys[19 * 32 + 5] = values[19 * 32 + 6] = nan;
        check(!attend(query.data(), 1, 1, 32, 19) && std::fabs(out[5] - 1) < 1e-6f && std::fabs(out[6] - 1) < 1e-6f,
              "what is not seen does not count");
        keys[19 * 32 + 5] = values[19 * 32 + 6] = 1;
        where = set + ", attend, scores far apart";
        keys.assign(keys.size(), -300.0f);
        for (size_t i = 0; i < 32; ++i) keys[7 * 32 + i] = 300;
        values[7 * 32 + 1] = 5;
        check(!run(32) && std::fabs(out[1] - 5) < 1e-5f && std::fabs(out[0] - 1) < 1e-6f, "the largest counts alone");
        keys.assign(keys.size(), 1.0f);
        values.assign(values.size(), 1.0f);
    }
    where = "attend, refusals";
    check(run(16) == MATGPTQ_E_ARGUMENT && run(0) == MATGPTQ_E_ARGUMENT, "size");
    check(attend(query.data(), 3, 2, 32, 20) == MATGPTQ_E_ARGUMENT, "heads");
    check(attend(nullptr, 1, 1, 32, 20) == MATGPTQ_E_ARGUMENT, "no query");
    check(attend(query.data(), 1, 1, 32, 0) == MATGPTQ_E_ARGUMENT, "no positions");
    const int64_t one = 1;
    check(matgptq_attend(query.data(), 0, 0, caches, 0, &one, out.data(), 1, 1, 32, 1.0f, 0, 1) == MATGPTQ_E_ARGUMENT,
          "no sequences");
    caches[0] = nullptr;
    check(run(32) == MATGPTQ_E_ARGUMENT, "no cache");
    std::printf("attend: 224 shapes and dtypes\n");
}

// Against double precision, in units of what a sum of so many products may be off; sets that fuse give the same bits.
void test_refit(const std::vector<std::string>& sets) {
    const int64_t shapes[][3] = {{1, 1, 1}, {3, 8, 8}, {17, 15, 5}, {33, 60, 20}, {98, 64, 32}, {200, 42, 7}};
    for (const auto& shape : shapes) {
        const int64_t rows = shape[0], in = shape[1], size = shape[2], groups = in / size;
        std::vector<float> fused;  // what the first set that fuses gave
        std::vector<float> current(static_cast<size_t>(rows * in)), difference(current.size()),
            hessian(static_cast<size_t>(in * in));
        for (auto& v : current) v = uniform(-1, 1);
        for (auto& v : difference) v = uniform(-0.01f, 0.01f);
        for (int64_t i = 0; i < in; ++i)
            for (int64_t j = 0; j <= i; ++j)
                hessian[static_cast<size_t>(i * in + j)] = hessian[static_cast<size_t>(j * in + i)] = uniform(-1, 1);
        for (const std::string& set : sets) {
            matgptq_set_isa(set.c_str());
            where = set + " refit " + std::to_string(rows) + " x " + std::to_string(in) + " / " + std::to_string(size);
            std::vector<float> system(static_cast<size_t>(rows * groups * groups), 9),
                slope(static_cast<size_t>(rows * groups), 9), errors(static_cast<size_t>(rows), 9);
            const matgptq_refit_job job{rows,          in,           size,         difference.data(), current.data(),
                                        hessian.data(), system.data(), slope.data(), errors.data(),     2};
            check(matgptq_refit(&job) == MATGPTQ_OK, "refit status");
            bool close = true;
            for (int64_t row = 0; row < rows; ++row) {
                const float* c = current.data() + row * in;
                const float* d = difference.data() + row * in;
                std::vector<double> a(static_cast<size_t>(groups * groups)), b(static_cast<size_t>(groups));
                double e = 0;
                for (int64_t i = 0; i < in; ++i)
                    for (int64_t j = 0; j < in; ++j) {
                        const double h = hessian[static_cast<size_t>(i * in + j)];
                        a[static_cast<size_t>(i / size * groups + j / size)] += c[i] * h * c[j];
                        b[static_cast<size_t>(j / size)] += d[i] * h * c[j];
                        e += d[i] * h * d[j];
                    }
                const double unit = 1e-6 * static_cast<double>(in);
                for (int64_t g = 0; g < groups; ++g) {
                    close &= std::fabs(slope[static_cast<size_t>(row * groups + g)] - b[static_cast<size_t>(g)]) <
                             0.01 * unit * static_cast<double>(size);
                    for (int64_t h = 0; h < groups; ++h)
                        close &= std::fabs(system[static_cast<size_t>((row * groups + g) * groups + h)] -
                                           a[static_cast<size_t>(g * groups + h)]) <
                                 unit * static_cast<double>(size);
                }
                close &= std::fabs(errors[static_cast<size_t>(row)] - e) < 1e-4 * unit * static_cast<double>(in);
            }
            check(close, "refit sums");
            std::vector<float> alone(errors.size(), 9);
            matgptq_refit_job only = job;
            only.current = nullptr;
            only.errors = alone.data();
            check(matgptq_refit(&only) == MATGPTQ_OK, "errors alone");
            for (size_t r = 0; r < alone.size(); ++r)
                close &= std::fabs(alone[r] - errors[r]) < 1e-10f * static_cast<float>(in * in);
            check(close, "errors alone are the same");
            if (set == "scalar") continue;
            std::vector<float> all;
            for (const auto* some : {&slope, &errors, &alone, &system}) all.insert(all.end(), some->begin(), some->end());
            if (fused.empty()) fused = all;
            check(std::memcmp(fused.data(), all.data(), all.size() * sizeof(float)) == 0, "equal to the bit");
        }
    }
    where = "refit, refusals";
    float one = 1;
    matgptq_refit_job job{1, 6, 4, &one, &one, &one, &one, &one, &one, 1};
    check(matgptq_refit(&job) == MATGPTQ_E_GROUP, "group size");
    job.group_size = 0;
    check(matgptq_refit(&job) == MATGPTQ_E_ARGUMENT, "no group size");
    job = {1, 1, 1, &one, &one, &one, nullptr, &one, &one, 1};
    check(matgptq_refit(&job) == MATGPTQ_E_ARGUMENT, "no system");
    job.rows = 0;
    check(matgptq_refit(&job) == MATGPTQ_OK && matgptq_refit(nullptr) == MATGPTQ_E_ARGUMENT, "nothing to do");
    std::printf("refit: six shapes\n");
}

void test_row_steps() {
    for (const bool half : {false, true})
        for (const int64_t size : {1, 2, 3, 15, 16, 17, 31, 64, 70, 577}) {
            where = "row steps, size " + std::to_string(size) + (half ? ", bfloat16" : ", float32");
            const auto at = [](int64_t i) { return static_cast<size_t>(i); };
            for (const int kind : {0, 1, 2, 3}) {
                const bool updates = kind % 2, from_one = kind >= 2;
                const int64_t rows = 3;
                Vector x(rows * size, half, -2, 2), update(rows * size, half, -2, 2), weight(size, half, 0.5f, 2);
                Vector out(rows * size, half, 0, 0);
                std::vector<double> sum(at(rows * size));
                for (size_t i = 0; i < sum.size(); ++i) {
                    const float added = x.values[i] + (updates ? update.values[i] : 0.0f);
                    sum[i] = half ? bfloat16(added) : added;
                }
                matgptq::rms_norm(x.data(), updates ? update.data() : nullptr, weight.data(), 1e-5f, out.data(), rows, size,
                                  from_one, x.dtype());
                x.read();
                out.read();
                bool same = true;
                for (int64_t row = 0; row < rows; ++row) {
                    double mean = 0;
                    for (int64_t i = 0; i < size; ++i) mean += sum[at(row * size + i)] * sum[at(row * size + i)];
                    const double factor = 1 / std::sqrt(mean / static_cast<double>(size) + 1e-5);
                    for (int64_t i = 0; i < size; ++i) {
                        const size_t place = at(row * size + i);
                        same &= x.values[place] == static_cast<float>(sum[place]);
                        same &= out.is(place, ((from_one ? 1.0 : 0.0) + weight.values[at(i)]) * sum[place] * factor);
                    }
                }
                check(same, "rms_norm is its formula");
            }
            Vector gate(size, half, -20, 20), up(size, half, -2, 2), product(size, half, 0, 0);
            bool same = true;
            for (const int activation : {MATGPTQ_SILU, MATGPTQ_GELU_TANH}) {
                matgptq::gated_product(gate.data(), up.data(), product.data(), size, activation, gate.dtype());
                product.read();
                for (int64_t i = 0; i < size; ++i) {
                    const double g = gate.values[at(i)];
                    const double tanh = std::tanh(std::sqrt(2 / std::acos(-1.0)) * (g + 0.044715 * g * g * g));
                    const double activated = activation == MATGPTQ_SILU ? g / (1 + std::exp(-g)) : g / 2 * (1 + tanh);
                    same &= product.is(at(i), activated * up.values[at(i)]);
                }
            }
            check(same, "gated_product is its formula");
            Vector sum = gate;
            matgptq::add(sum.data(), up.data(), size, sum.dtype());
            sum.read();
            same = true;
            for (int64_t i = 0; i < size; ++i) {
                const float added = gate.values[at(i)] + up.values[at(i)];
                same &= sum.values[at(i)] == (half ? bfloat16(added) : added);
            }
            check(same, "add is exact");
            if (size % 2) continue;
            const int64_t heads = 3, half_size = size / 2;
            Vector turned(heads * size, half, -2, 2), cosine(size, half, -1, 1), sine(size, half, -1, 1);
            const Vector before = turned;
            matgptq::rotate(turned.data(), cosine.data(), sine.data(), heads, size, turned.dtype());
            turned.read();
            same = true;
            for (int64_t i = 0; i < heads * size; ++i) {
                const int64_t place = i % size, first = i - place;
                const double partner = place < half_size ? -before.values[at(first + place + half_size)]
                                                         : before.values[at(first + place - half_size)];
                const double kept = before.values[at(i)] * cosine.values[at(place)];
                const double other = partner * sine.values[at(place)];
                // Both terms are rounded before they are added, and may cancel.
                const double allowed = (half ? 0.012 : 1e-6) * (std::fabs(kept) + std::fabs(other)) + 1e-7;
                same &= std::fabs(turned.values[at(i)] - (kept + other)) <= allowed;
            }
            check(same, "rotate is its formula");
        }
    where = "row steps, values that are not finite";
    const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> gate = {nan, infinity, 1.0f, 88.0f, -200.0f}, up = {1, 1, nan, 1, 1}, out(5), ones(5, 1.0f);
    for (const int activation : {MATGPTQ_SILU, MATGPTQ_GELU_TANH}) {
        matgptq::gated_product(gate.data(), up.data(), out.data(), 5, activation, MATGPTQ_FLOAT32);
        check(std::isnan(out[0]) && std::isinf(out[1]) && std::isnan(out[2]), "gated_product propagates them");
        check(out[3] == 88.0f && std::fabs(out[4]) < 1e-30f, "gated_product does not overflow");
    }
    gate = {1e25f, -1e25f, -20.0f, 0.0f, -0.0f};
    up[2] = 1;
    matgptq::gated_product(gate.data(), up.data(), out.data(), 5, MATGPTQ_GELU_TANH, MATGPTQ_FLOAT32);
    check(out[0] == 1e25f && out[1] == 0 && out[2] == 0 && out[3] == 0 && out[4] == 0, "nor where its cube would");
    std::vector<float> row = {1, nan, 1, 1, 1};
    for (const bool from_one : {false, true}) {
        matgptq::rms_norm(row.data(), nullptr, ones.data(), 1e-5f, out.data(), 1, 5, from_one, MATGPTQ_FLOAT32);
        check(std::isnan(out[0]) && std::isnan(out[4]), "rms_norm propagates them");
    }
    uint16_t quiet = 0x7fc1, word = 0x3f80;
    matgptq::add(&quiet, &word, 1, MATGPTQ_BFLOAT16);
    check((quiet & 0x7fff) > 0x7f80, "a NaN stays one");
    std::printf("row steps: ten sizes, two dtypes\n");
}

// A block is its parts, to the bit.
void test_block(const std::vector<std::string>& sets) {
    const int64_t hidden = 96, size = 32, heads = 4, key_heads = 2, mlp = 160, length = 5;
    const int64_t shapes[7][2] = {{heads * size, hidden}, {key_heads * size, hidden}, {key_heads * size, hidden},
                                  {hidden, heads * size}, {mlp, hidden},              {mlp, hidden},
                                  {hidden, mlp}};
    matgptq_weight* weights[7];
    for (int i = 0; i < 7; ++i) weights[i] = Case(shapes[i][0], shapes[i][1], 32, true).pack(i % 2 ? 0 : 4);
    std::vector<float> bias(static_cast<size_t>(heads * size));
    for (auto& v : bias) v = uniform(-1, 1);
    for (const std::string& set : sets)
        for (const int kind : {0, 1, 2, 3, 4, 5, 6, 7}) {
            // Of Llama's kind, or of Gemma's.
            const bool half = kind & 1, gemma = kind & 4;
            const int activations = kind & 2 ? MATGPTQ_INT8 : MATGPTQ_EXACT;
            matgptq_set_isa(set.c_str());
            where = set + ", block" + (half ? ", bfloat16" : ", float32") + (activations ? ", int8" : "") +
                    (gemma ? ", four norms" : "");
            Vector x(hidden, half, -1, 1), first(hidden, half, 0.5f, 2), second(hidden, half, 0.5f, 2);
            Vector query_norm(size, half, 0.5f, 2), key_norm(size, half, 0.5f, 2);
            Vector attention_norm(hidden, half, -0.5f, 1), mlp_norm(hidden, half, -0.5f, 1);
            Vector cosine(size, half, -1, 1), sine(size, half, -1, 1);
            Vector keys(key_heads * length * size, half, -1, 1), values(key_heads * length * size, half, -1, 1);
            const int dtype = x.dtype();
            matgptq_block block{};
            block.dtype = dtype;
            block.activations = activations;
            block.hidden = hidden;
            block.size = size;
            block.scale = 0.2f;
            block.first_eps = block.second_eps = block.query_eps = block.key_eps = 1e-5f;
            if (gemma) {
                block.gate = MATGPTQ_GELU_TANH;
                block.norms_from_one = 1;
                block.attention_norm = attention_norm.data();
                block.mlp_norm = mlp_norm.data();
                block.attention_eps = 1e-3f;
                block.mlp_eps = 1e-2f;
            }
            block.first_norm = first.data();
            block.second_norm = second.data();
            block.query_norm = query_norm.data();
            block.key_norm = key_norm.data();
            for (int i = 0; i < 7; ++i) block.products[i] = {weights[i], 4, i ? nullptr : bias.data(), nullptr, 0};
            const int64_t total = (heads + 2 * key_heads) * size, key_at = heads * size;
            Vector normed(hidden, half, 0, 0), expected(total, half, 0, 0), found(total, half, 0, 0);
            const auto part = [&](Vector& v, int64_t at) { return static_cast<char*>(v.data()) + at * (half ? 2 : 4); };
            const auto multiply = [&](int i, const void* from, void* to) {
                matgptq_product product = block.products[i];
                product.y = to;
                check(matgptq_matmul(from, dtype, shapes[i][1], 1, shapes[i][1], &product, 1, dtype, activations, 1) ==
                          MATGPTQ_OK, "a product runs");
            };
            matgptq::rms_norm(x.data(), nullptr, first.data(), 1e-5f, normed.data(), 1, hidden, gemma, dtype);
            multiply(0, normed.data(), expected.data());
            multiply(1, normed.data(), part(expected, key_at));
            multiply(2, normed.data(), part(expected, key_at + key_heads * size));
            matgptq::rms_norm(expected.data(), nullptr, query_norm.data(), 1e-5f, expected.data(), heads, size, gemma,
                              dtype);
            matgptq::rms_norm(part(expected, key_at), nullptr, key_norm.data(), 1e-5f, part(expected, key_at), key_heads,
                              size, gemma, dtype);
            matgptq::rotate(expected.data(), cosine.data(), sine.data(), heads + key_heads, size, dtype);
            check(matgptq_block_start(&block, x.data(), 1, cosine.data(), sine.data(), found.data(), 2) == MATGPTQ_OK,
                  "start runs");
            expected.read();
            found.read();
            check(found.values == expected.values, "start is its parts");

            Vector attended(heads * size, half, 0, 0), update(hidden, half, 0, 0), gate(mlp, half, 0, 0);
            Vector up(mlp, half, 0, 0), product(mlp, half, 0, 0), wanted = x;
            const matgptq_kv_cache cache{keys.data(), values.data(), length * size, size, length * size, size};
            const matgptq_kv_cache* const of_one = &cache;
            check(matgptq_attend(found.data(), 0, 1, &of_one, 0, &length, attended.data(), heads, key_heads, size,
                                 0.2f, dtype, 1) == MATGPTQ_OK,
                  "attend runs");
            const auto norm_update = [&](Vector& weight, float eps) {
                if (gemma)
                    matgptq::rms_norm(update.data(), nullptr, weight.data(), eps, update.data(), 1, hidden, true, dtype);
            };
            multiply(3, attended.data(), update.data());
            norm_update(attention_norm, 1e-3f);
            matgptq::rms_norm(wanted.data(), update.data(), second.data(), 1e-5f, normed.data(), 1, hidden, gemma, dtype);
            multiply(4, normed.data(), gate.data());
            multiply(5, normed.data(), up.data());
            matgptq::gated_product(gate.data(), up.data(), product.data(), mlp, block.gate, dtype);
            multiply(6, product.data(), update.data());
            norm_update(mlp_norm, 1e-2f);
            matgptq::add(wanted.data(), update.data(), hidden, dtype);
            wanted.read();
            Vector again = x;
            const Vector given = x;
            check(matgptq_block_finish(&block, x.data(), 1, found.data(), 0, &of_one, 0, &length, 2) == MATGPTQ_OK,
                  "finish runs");
            check(matgptq_block_finish(&block, again.data(), 1, attended.data(), 0, nullptr, 0, nullptr, 1) ==
                      MATGPTQ_OK, "finish after another attention runs");
            x.read();
            again.read();
            check(x.values == wanted.values && again.values == wanted.values, "finish is its parts");
            // The last position comes from elsewhere: positions before heads, and gaps between them.
            const int64_t gap = size + 3, row = key_heads * gap;
            const auto key = [&](int64_t h) { return part(found, key_at + h * size); };
            const auto value = [&](int64_t h) { return key(key_heads + h); };
            Vector apart(length * row, half, -1, 1), values_apart(length * row, half, -1, 1);
            Vector appended = again, before = again;
            for (int64_t h = 0; h < key_heads; ++h) {
                std::memcpy(part(keys, (h * length + length - 1) * size), key(h), size * (half ? 2 : 4));
                std::memcpy(part(values, (h * length + length - 1) * size), value(h), size * (half ? 2 : 4));
                for (int64_t t = 0; t + 1 < length; ++t) {
                    std::memcpy(part(apart, t * row + h * gap), part(keys, (h * length + t) * size), size * (half ? 2 : 4));
                    std::memcpy(part(values_apart, t * row + h * gap), part(values, (h * length + t) * size),
                                size * (half ? 2 : 4));
                }
            }
            const matgptq_kv_cache caches[2] = {cache, {apart.data(), values_apart.data(), gap, row, gap, row}};
            const matgptq_kv_cache* const of_both = caches;
            check(matgptq_block_finish(&block, before.data(), 1, found.data(), 0, &of_both, 0, &length, 1) ==
                          MATGPTQ_OK &&
                      matgptq_block_finish(&block, appended.data(), 1, found.data(), 1, &of_both, 1, &length, 1) ==
                          MATGPTQ_OK,
                  "finish appends");
            before.read();
            appended.read();
            check(before.values == appended.values, "key and value are appended");

            // Two blocks one after the other, as two calls each and as one for all.
            matgptq_block other = block;
            other.query_norm = other.key_norm = nullptr;
            const matgptq_block* const both[2] = {&block, &other};
            Vector stepped = given, together = given;
            for (int i = 0; i < 2; ++i) {
                check(matgptq_block_start(both[i], stepped.data(), 1, cosine.data(), sine.data(), found.data(), 1) ==
                              MATGPTQ_OK &&
                          matgptq_block_finish(both[i], stepped.data(), 1, found.data(), 1, &of_both, i, &length, 1) ==
                              MATGPTQ_OK,
                      "a block runs");
            }
            keys.read();
            apart.read();
            const Vector keys_before = keys, apart_before = apart;
            check(matgptq_blocks(both, 2, together.data(), 1, cosine.data(), sine.data(), &of_both, &length, 2) ==
                      MATGPTQ_OK, "blocks run");
            for (Vector* v : {&stepped, &together, &keys, &apart}) v->read();
            check(stepped.values == together.values, "blocks are one after the other");
            check(keys.values == keys_before.values && apart.values == apart_before.values, "blocks append");

            // Several sequences at once are each of them by itself, whatever they see.
            for (const int64_t sequences : {2, 3, 9, 17}) {
                const int64_t each = key_heads * length * size, bytes = half ? 2 : 4;
                Vector rows(sequences * hidden, half, -1, 1), cosines(sequences * size, half, -1, 1);
                Vector sines(sequences * size, half, -1, 1), all_keys(2 * sequences * each, half, -1, 1);
                Vector all_values(2 * sequences * each, half, -1, 1);
                std::vector<int64_t> seen(static_cast<size_t>(sequences));
                for (size_t i = 0; i < seen.size(); ++i) seen[i] = 1 + static_cast<int64_t>(i) % length;
                const auto caches_of = [&](Vector& k, Vector& v) {
                    std::vector<std::vector<matgptq_kv_cache>> of_sequences(seen.size());
                    for (int64_t i = 0; i < 2 * sequences; ++i)
                        of_sequences[static_cast<size_t>(i / 2)].push_back(
                            {part(k, i * each), part(v, i * each), length * size, size, length * size, size});
                    return of_sequences;
                };
                const auto pointers = [](const std::vector<std::vector<matgptq_kv_cache>>& of_sequences) {
                    std::vector<const matgptq_kv_cache*> found_pointers;
                    for (const auto& layers : of_sequences) found_pointers.push_back(layers.data());
                    return found_pointers;
                };
                Vector single = rows, single_keys = all_keys, single_values = all_values;
                const auto single_caches = caches_of(single_keys, single_values), all_caches = caches_of(all_keys, all_values);
                const auto single_pointers = pointers(single_caches), all_pointers = pointers(all_caches);
                bool runs = true;
                for (int64_t i = 0; i < sequences; ++i)
                    runs &= matgptq_blocks(both, 2, part(single, i * hidden), 1, part(cosines, i * size),
                                           part(sines, i * size), &single_pointers[static_cast<size_t>(i)],
                                           &seen[static_cast<size_t>(i)], 1) == MATGPTQ_OK;
                check(runs && matgptq_blocks(both, 2, rows.data(), sequences, cosines.data(), sines.data(),
                                             all_pointers.data(), seen.data(), 2) == MATGPTQ_OK,
                      "blocks of several sequences run");
                const auto same = [&](Vector& one, Vector& two, int64_t count) {
                    return !std::memcmp(one.data(), two.data(), static_cast<size_t>(count * bytes));
                };
                check(same(rows, single, sequences * hidden), "sequences are independent");
                check(same(all_keys, single_keys, 2 * sequences * each) &&
                          same(all_values, single_values, 2 * sequences * each),
                      "each sequence has keys and values of its own");
            }
            if (kind) continue;

            where = "block, refusals";
            const auto start = [&](const matgptq_block& with) {
                return matgptq_block_start(&with, x.data(), 1, cosine.data(), sine.data(), found.data(), 1);
            };
            matgptq_block bad = block;
            bad.dtype = 2;
            check(start(bad) == MATGPTQ_E_ARGUMENT, "unknown dtype");
            bad = block;
            bad.size = 31;
            check(start(bad) == MATGPTQ_E_ARGUMENT, "odd heads");
            bad.size = 24;
            check(start(bad) == MATGPTQ_E_SHAPE, "heads that do not fill the keys");
            bad = block;
            bad.products[MATGPTQ_DOWN].weight = nullptr;
            check(start(bad) == MATGPTQ_E_ARGUMENT, "no weight");
            bad.products[MATGPTQ_DOWN].weight = weights[MATGPTQ_UP];
            check(start(bad) == MATGPTQ_E_SHAPE, "a weight of another shape");
            bad = block;
            bad.products[MATGPTQ_KEY].bits = 9;
            check(start(bad) == MATGPTQ_E_BITS, "a width that there is not");
            bad = block;
            bad.second_norm = nullptr;
            check(start(bad) == MATGPTQ_E_ARGUMENT, "no norm");
            bad = block;
            bad.gate = 2;
            check(start(bad) == MATGPTQ_E_ARGUMENT, "an activation that there is not");
            check(matgptq_block_start(nullptr, x.data(), 1, cosine.data(), sine.data(), found.data(), 1) ==
                      MATGPTQ_E_ARGUMENT, "no block");
            check(matgptq_block_start(&block, x.data(), 1, nullptr, sine.data(), found.data(), 1) == MATGPTQ_E_ARGUMENT,
                  "no cosine");
            check(matgptq_block_start(&block, x.data(), 0, cosine.data(), sine.data(), found.data(), 1) ==
                      MATGPTQ_E_ARGUMENT, "no sequences");
            const auto finish = [&](const void* from, const matgptq_kv_cache* with, int64_t positions) {
                return matgptq_block_finish(&block, x.data(), 1, from, 1, with ? &with : nullptr, 0, &positions, 1);
            };
            check(finish(nullptr, &cache, length) == MATGPTQ_E_ARGUMENT, "no query");
            check(finish(found.data(), nullptr, 1) == MATGPTQ_E_ARGUMENT, "nowhere to append to");
            check(finish(found.data(), &cache, 0) == MATGPTQ_E_ARGUMENT, "no position");
            matgptq_kv_cache missing = cache;
            missing.values = nullptr;
            check(finish(found.data(), &missing, length) == MATGPTQ_E_ARGUMENT, "no values");
            const auto run = [&](const matgptq_block& second, int count) {
                const matgptq_block* const two[2] = {&block, &second};
                return matgptq_blocks(two, count, x.data(), 1, cosine.data(), sine.data(), &of_both, &length, 1);
            };
            x.read();
            const Vector untouched = x;
            bad = block;
            bad.dtype = MATGPTQ_BFLOAT16;
            check(run(bad, 2) == MATGPTQ_E_ARGUMENT, "blocks of two dtypes");
            bad = block;
            bad.hidden = 2 * hidden;
            check(run(bad, 2) == MATGPTQ_E_SHAPE, "blocks of two sizes");
            check(run(block, -1) == MATGPTQ_E_ARGUMENT && run(block, 0) == MATGPTQ_OK, "how many blocks");
            check(matgptq_blocks(nullptr, 1, x.data(), 1, cosine.data(), sine.data(), &of_both, &length, 1) ==
                      MATGPTQ_E_ARGUMENT, "no blocks");
            check(matgptq_blocks(both, 2, x.data(), 1, cosine.data(), sine.data(), nullptr, &length, 1) ==
                      MATGPTQ_E_ARGUMENT, "no caches");
            x.read();
            check(x.values == untouched.values, "refused calls write nothing");
        }
    for (matgptq_weight* weight : weights) matgptq_weight_free(weight);
    std::printf("block: two kinds, two dtypes, two precisions of activations\n");
}

}  // namespace

// Where a thread that is not the caller's has no memory, the caller hears of it, and the process lives on.
void test_out_of_memory() {
    const std::thread::id caller = std::this_thread::get_id();
    for (const bool standing : {false, true}) {
        where = standing ? "threads that stand by" : "threads that are called";
        std::atomic<int> thrown{0};
        bool caught = false;
        const auto run = [&] {
            try {
                matgptq::parallel_for(64, 1, 3, [&](int64_t, int64_t) {
                    if (std::this_thread::get_id() != caller) {
                        ++thrown;
                        throw std::bad_alloc();
                    }
                    while (!thrown) std::this_thread::yield();
                });
            } catch (const std::bad_alloc&) {
                caught = true;
            }
        };
        if (standing) matgptq::with_threads(3, run);
        else run();
        check(caught && thrown > 0, "the caller hears of it");
        std::atomic<int64_t> sum{0};
        matgptq::parallel_for(64, 1, 3, [&](int64_t begin, int64_t end) { sum += end - begin; });
        check(sum == 64, "the threads go on");
    }
    std::printf("out of memory\n");
}

int main() {
    check(matgptq_abi_version() == MATGPTQ_ABI_VERSION, "abi version");
    std::printf("default instruction set: %s\n", matgptq_isa());
    const std::vector<std::string> sets = instruction_sets();
    std::printf("compared:");
    for (const std::string& set : sets) std::printf(" %s", set.c_str());
    std::printf("\n");
    test_products(sets);
    test_many_rows(sets);
    test_same_bits_in_both_forms(sets);
    test_dequantize(sets);
    test_activations(sets);
    test_shared_input(sets);
    test_standing_by();
    test_out_of_memory();
    test_sweep(sets);
    test_refit(sets);
    test_read(sets);
    test_dense(sets);
    test_attend(sets);
    test_attend_tokens(sets);
    test_row_steps();
    test_block(sets);
    test_refusals();
    if (failures) std::printf("%d checks failed\n", failures);
    return failures ? 1 : 0;
}
