// What all kernels share: storage types, loads of up to 16 bytes at once, sums over a warp and over a block.
//
// One translation unit: this file first, then the others. NVRTC compiles it without any header; the tests compile it with
// emulator.h in front. Arithmetic is f32 whatever the storage. Blocks are whole warps along x. All reductions have a fixed
// order, so results depend on shapes alone. Tensor parameters point to contiguous tensors; integers are 64 bits wide.

typedef long long i64;
typedef unsigned int u32;

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

// bfloat16 as its bits, rounded as `Bf16::from_f32` does: to nearest, ties to even, NaN stays NaN.
struct bf16 {
    unsigned short bits;
};

__device__ __forceinline__ float get(float x) { return x; }
__device__ __forceinline__ float get(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

__device__ __forceinline__ u32 bf16_bits(float x) {
    const u32 bits = __float_as_uint(x);
    return (x != x ? bits | 0x00400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

__device__ __forceinline__ void put(float* at, float x) { *at = x; }
__device__ __forceinline__ void put(bf16* at, float x) { at->bits = (unsigned short)bf16_bits(x); }

__device__ __forceinline__ bool aligned(const void* at) { return ((unsigned long long)at & 15u) == 0; }

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// Elements of T in 16 bytes.
template <typename T> struct Lanes {
    static const int N = 16 / sizeof(T);
};

template <int WORDS> __device__ __forceinline__ void load_words(const void* at, u32 (&words)[WORDS]) {
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 4; i++) {
            const uint4 v = ((const uint4*)at)[i];
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
    } else if constexpr (WORDS == 2) {
        const uint2 v = *(const uint2*)at;
        words[0] = v.x, words[1] = v.y;
    } else {
        words[0] = *(const u32*)at;
    }
}

template <int WORDS> __device__ __forceinline__ void store_words(void* at, const u32 (&words)[WORDS]) {
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 4; i++) {
            uint4 v;
            v.x = words[4 * i], v.y = words[4 * i + 1], v.z = words[4 * i + 2], v.w = words[4 * i + 3];
            ((uint4*)at)[i] = v;
        }
    } else if constexpr (WORDS == 2) {
        uint2 v;
        v.x = words[0], v.y = words[1];
        *(uint2*)at = v;
    } else {
        *(u32*)at = words[0];
    }
}

// N elements from `at` on: one by one for N = 1, else at once, for which `at` is aligned to N elements or 16 bytes.
template <int N> __device__ __forceinline__ void load(const float* at, float (&out)[N]) {
    if constexpr (N == 1) {
        out[0] = *at;
    } else {
        u32 words[N];
        load_words(at, words);
#pragma unroll
        for (int i = 0; i < N; i++) out[i] = __uint_as_float(words[i]);
    }
}

template <int N> __device__ __forceinline__ void load(const bf16* at, float (&out)[N]) {
    if constexpr (N == 1) {
        out[0] = get(*at);
    } else {
        u32 words[N / 2];
        load_words(at, words);
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            out[2 * i] = __uint_as_float(words[i] << 16);
            out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
}

template <int N> __device__ __forceinline__ void store(float* at, const float (&x)[N]) {
    if constexpr (N == 1) {
        *at = x[0];
    } else {
        u32 words[N];
#pragma unroll
        for (int i = 0; i < N; i++) words[i] = __float_as_uint(x[i]);
        store_words(at, words);
    }
}

template <int N> __device__ __forceinline__ void store(bf16* at, const float (&x)[N]) {
    if constexpr (N == 1) {
        put(at, x[0]);
    } else {
        u32 words[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) words[i] = bf16_bits(x[2 * i]) | bf16_bits(x[2 * i + 1]) << 16;
        store_words(at, words);
    }
}

// Sum over the warp's lanes, the same bits on each.
template <typename V> __device__ __forceinline__ V warp_sum(V x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

// Sum over the block's threads, the same bits on each. All threads of the block call it.
template <typename V> __device__ __forceinline__ V block_sum(V x) {
    __shared__ V sums[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads(); // an earlier sum has been read
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? sums[lane] : V(0));
}
