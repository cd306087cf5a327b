// Bit planes to the bytes of codes: a butterfly. Planes are paired into 2-bit fields, those into nibbles, those into bytes.
// It needs no shuffles, so the ports that shuffle stay free and the same layout serves every vector length; and up to the
// last masks it only exchanges bits, so that a packed slice is stored as fields and has that work behind it.
//
// S provides Bytes and the operations used below: mask<M>(v) = v & M, shift_mask<K, M>(v) = v >> K & M, both byte by byte,
// and interleave<K, M>(high, low, first, second): first = M ? low : high << K, second = M ? low >> K : high.
#pragma once

#include "layout.h"

namespace matgptq {
namespace {

// Of `Count` planes, most significant first. One stays as it is. Two: fields of 2 bits of the even, then of the odd k. Three:
// the first plane, then the fields of the others. Four: nibbles; register j holds k = j (low nibble) and k = j + 4.
template <class S, int Count>
MATGPTQ_INLINE void pair_planes(typename S::Bytes* v) {
    typename S::Bytes even[2], odd[2];
    if constexpr (Count >= 2) S::template interleave<1, 0x55>(v[Count - 2], v[Count - 1], even[1], odd[1]);
    if constexpr (Count == 4) {
        S::template interleave<1, 0x55>(v[0], v[1], even[0], odd[0]);
        S::template interleave<2, 0x33>(even[0], even[1], v[0], v[2]);
        S::template interleave<2, 0x33>(odd[0], odd[1], v[1], v[3]);
    } else if constexpr (Count >= 2) {
        v[Count - 2] = even[1];
        v[Count - 1] = odd[1];
    }
}

// What pair_planes gave, as nibbles.
template <class S, int Count>
MATGPTQ_INLINE void fields_to_nibbles(const typename S::Bytes* v, typename S::Bytes* nibbles) {
    if constexpr (Count == 1) {
        nibbles[0] = S::template mask<0x11>(v[0]);
        nibbles[1] = S::template shift_mask<1, 0x11>(v[0]);
        nibbles[2] = S::template shift_mask<2, 0x11>(v[0]);
        nibbles[3] = S::template shift_mask<3, 0x11>(v[0]);
    } else if constexpr (Count == 2) {
        nibbles[0] = S::template mask<0x33>(v[0]);
        nibbles[2] = S::template shift_mask<2, 0x33>(v[0]);
        nibbles[1] = S::template mask<0x33>(v[1]);
        nibbles[3] = S::template shift_mask<2, 0x33>(v[1]);
    } else if constexpr (Count == 3) {
        S::template interleave<2, 0x33>(S::template mask<0x55>(v[0]), v[1], nibbles[0], nibbles[2]);
        S::template interleave<2, 0x33>(S::template shift_mask<1, 0x55>(v[0]), v[2], nibbles[1], nibbles[3]);
    } else {
        for (int j = 0; j < 4; ++j) nibbles[j] = v[j];
    }
}

// Planes beside the last four.
template <int Bits>
constexpr int high_planes() {
    return Bits > 4 ? Bits - 4 : 0;
}

// The planes of a code to its fields, in place. Eight of them become bytes: register k holds columns 4k..4k+3.
template <class S, int Bits>
MATGPTQ_INLINE void planes_to_fields(typename S::Bytes* v) {
    constexpr int high = high_planes<Bits>();
    if constexpr (high > 0) pair_planes<S, high>(v);
    pair_planes<S, Bits - high>(v + high);
    if constexpr (Bits == 8) {
        typename S::Bytes bytes[8];
        for (int j = 0; j < 4; ++j) S::template interleave<4, 0x0F>(v[j], v[j + 4], bytes[j], bytes[j + 4]);
        for (int k = 0; k < 8; ++k) v[k] = bytes[k];
    }
}

// bytes[k]: u_r of columns 4k..4k+3.
template <class S, int Bits>
MATGPTQ_INLINE void fields_to_bytes(const typename S::Bytes* v, typename S::Bytes* bytes) {
    constexpr int high = high_planes<Bits>();
    if constexpr (Bits == 8) {
        for (int k = 0; k < 8; ++k) bytes[k] = v[k];
    } else if constexpr (Bits == 2) {
        // Straight from fields of 2 bits.
        each<4>([&](auto i) MATGPTQ_LAMBDA_INLINE {
            for (int odd = 0; odd < 2; ++odd) bytes[2 * i + odd] = S::template shift_mask<2 * i, 0x03>(v[odd]);
        });
    } else {
        typename S::Bytes low[4];
        fields_to_nibbles<S, Bits - high>(v + high, low);
        if constexpr (high == 0) {
            for (int j = 0; j < 4; ++j) {
                bytes[j] = S::template mask<0x0F>(low[j]);
                bytes[j + 4] = S::template shift_mask<4, 0x0F>(low[j]);
            }
        } else {
            typename S::Bytes top[4];
            fields_to_nibbles<S, high>(v, top);
            for (int j = 0; j < 4; ++j) S::template interleave<4, 0x0F>(top[j], low[j], bytes[j], bytes[j + 4]);
        }
    }
}

}  // namespace
}  // namespace matgptq
