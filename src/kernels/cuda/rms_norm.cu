// RMS normalisation of rows. A row belongs to a warp where rows are narrow, else to a block.

struct Group {
    int lanes, lane, index, count; // threads of a row, this thread among them, its row among the block's, rows at a time
    bool narrow;

    __device__ __forceinline__ explicit Group(i64 narrow)
        : lanes(narrow ? 32 : blockDim.x), lane(threadIdx.x % lanes), index(threadIdx.x / lanes),
          count(blockDim.x / lanes), narrow(narrow != 0) {}

    __device__ __forceinline__ float sum(float x) const { return narrow ? warp_sum(x) : block_sum(x); }
};

template <int N, typename T>
__device__ __forceinline__ void scale_row(const T* x, const T* weight, float rstd, T* y, int width, Group group) {
    for (int i = group.lane * N; i < width; i += group.lanes * N) {
        float a[N], w[N];
        load(x + i, a);
        load(weight + i, w);
#pragma unroll
        for (int j = 0; j < N; j++) a[j] = a[j] * rstd * w[j];
        store(y + i, a);
    }
}

template <int N, typename T>
__device__ __forceinline__ float rstd_row(const T* x, int width, float eps, Group group) {
    float squares = 0;
    for (int i = group.lane * N; i < width; i += group.lanes * N) {
        float a[N];
        load(x + i, a);
#pragma unroll
        for (int j = 0; j < N; j++) squares += a[j] * a[j];
    }
    return 1.0f / sqrtf(group.sum(squares) / (float)width + eps);
}

// y = x * rstd * weight with rstd = 1 / sqrt(mean of x^2 + eps), written too.
template <typename T>
__global__ void rms_norm_forward(const T* x, const T* weight, T* y, float* rstd, i64 rows, i64 width, float eps,
                                 i64 narrow) {
    const int N = Lanes<T>::N;
    const Group group(narrow);
    const i64 row = (i64)blockIdx.x * group.count + group.index;
    if (row >= rows) return; // whole warps of a narrow block
    x += row * width, y += row * width;
    const bool vector = width % N == 0 && aligned(x) && aligned(y) && aligned(weight);
    const float r = vector ? rstd_row<N>(x, width, eps, group) : rstd_row<1>(x, width, eps, group);
    if (group.lane == 0) rstd[row] = r;
    if (vector) scale_row<N>(x, weight, r, y, width, group);
    else scale_row<1>(x, weight, r, y, width, group);
}

// y = x * rstd * weight.
template <typename T>
__global__ void rms_norm_apply(const T* x, const T* weight, T* y, const float* rstd, i64 rows, i64 width, i64 narrow) {
    const int N = Lanes<T>::N;
    const Group group(narrow);
    const i64 row = (i64)blockIdx.x * group.count + group.index;
    if (row >= rows) return;
    x += row * width, y += row * width;
    if (width % N == 0 && aligned(x) && aligned(y) && aligned(weight))
        scale_row<N>(x, weight, rstd[row], y, width, group);
    else
        scale_row<1>(x, weight, rstd[row], y, width, group);
}

template <int N, typename T>
__device__ __forceinline__ void backward_rows(T* grad, const T* dy, const T* x, const T* weight, const float* rstd,
                                              float* sums, i64 begin, i64 end, int width, Group group) {
    // a thread adds to its own columns only
    for (int i = group.lane * N; i < width; i += group.lanes * N)
        for (int j = 0; j < N; j++) sums[i + j] = 0;
    for (i64 row = begin + group.index; row < end; row += group.count) {
        const i64 at = row * width;
        const float r = rstd[row];
        float dot = 0;
        for (int i = group.lane * N; i < width; i += group.lanes * N) {
            float a[N], g[N], w[N];
            load(x + at + i, a);
            load(dy + at + i, g);
            load(weight + i, w);
#pragma unroll
            for (int j = 0; j < N; j++) dot += g[j] * w[j] * a[j];
        }
        dot = group.sum(dot) * r / (float)width;
        for (int i = group.lane * N; i < width; i += group.lanes * N) {
            float a[N], g[N], w[N], out[N];
            load(x + at + i, a);
            load(dy + at + i, g);
            load(weight + i, w);
            load(grad + at + i, out);
#pragma unroll
            for (int j = 0; j < N; j++) {
                const float n = a[j] * r;
                out[j] += r * (g[j] * w[j] - n * dot);
                sums[i + j] += g[j] * n;
            }
            store(grad + at + i, out);
        }
    }
}

// grad += rstd * (dy * weight - n * mean(dy * weight * n)) with n = x * rstd, and for each block's rows
// partial[block] = sum of dy * n. Dynamic shared memory: `width` floats for each row at a time.
template <typename T>
__global__ void rms_norm_backward(T* grad, const T* dy, const T* x, const T* weight, const float* rstd, float* partial,
                                  i64 rows, i64 width, i64 block_rows, i64 narrow) {
    DYNAMIC_SHARED(shared);
    const int N = Lanes<T>::N;
    const Group group(narrow);
    float* sums = (float*)shared;
    float* own = sums + group.index * width;
    const i64 begin = blockIdx.x * block_rows, end = begin + block_rows < rows ? begin + block_rows : rows;
    if (width % N == 0 && aligned(grad) && aligned(dy) && aligned(x) && aligned(weight))
        backward_rows<N>(grad, dy, x, weight, rstd, own, begin, end, width, group);
    else
        backward_rows<1>(grad, dy, x, weight, rstd, own, begin, end, width, group);
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0;
        for (int g = 0; g < group.count; g++) sum += sums[g * width + i];
        partial[blockIdx.x * width + i] = sum;
    }
}

// out[column] = sum over rows of `parts: [rows, width]`. 32 columns a block, 1024 threads.
__global__ void column_sums(const float* parts, float* out, i64 rows, i64 width) {
    __shared__ float sums[32][33];
    const int x = threadIdx.x % 32, y = threadIdx.x / 32;
    const i64 column = (i64)blockIdx.x * 32 + x;
    float sum = 0;
    if (column < width)
        for (i64 row = y; row < rows; row += 32) sum += parts[row * width + column];
    sums[y][x] = sum;
    __syncthreads();
    if (y == 0 && column < width) {
        for (int i = 1; i < 32; i++) sum += sums[i][x];
        out[column] = sum;
    }
}
