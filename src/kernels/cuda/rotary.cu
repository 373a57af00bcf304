// Rotary position embedding, half-split. A block for each row.

template <int N, typename T>
__device__ __forceinline__ void rotate_row(T* x, const float* cos, const float* sin, int heads, int head_dim, int half,
                                           float sign) {
    const int pairs = half / N;
    for (int i = threadIdx.x; i < heads * pairs; i += blockDim.x) {
        const int at = i % pairs * N;
        T* first = x + i / pairs * head_dim + at;
        T* second = first + half;
        float a[N], b[N], c[N], s[N], turned[N];
        load(first, a);
        load(second, b);
        load(cos + at, c);
        load(sin + at, s);
#pragma unroll
        for (int j = 0; j < N; j++) {
            s[j] *= sign;
            turned[j] = a[j] * c[j] - b[j] * s[j];
            b[j] = b[j] * c[j] + a[j] * s[j];
        }
        store(first, turned);
        store(second, b);
    }
}

// x: [rows, width] in place, its first `heads` heads; cos, sin: [rows, half]; sign: 1, or -1 to turn back.
template <typename T>
__global__ void rotary(T* x, const float* cos, const float* sin, i64 width, i64 heads, i64 head_dim, i64 half,
                       float sign) {
    const int N = Lanes<T>::N;
    const i64 row = blockIdx.x;
    x += row * width, cos += row * half, sin += row * half;
    if (half % N == 0 && head_dim % N == 0 && aligned(x) && aligned(cos) && aligned(sin))
        rotate_row<N>(x, cos, sin, heads, head_dim, half, sign);
    else
        rotate_row<1>(x, cos, sin, heads, head_dim, half, sign);
}
