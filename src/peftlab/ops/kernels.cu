// Between the matrix products of a pass: one kernel each. Compiled at run time with these defined:
//   T      what states are: float, or unsigned short (the bits of a bfloat16)
//   PARTS  3: what is made goes out as high, low and high part, each bfloat16 (split.py); 1: as one bfloat16
// A row that is made has `wide` numbers: PARTS times its width, then ones, by which a bias is multiplied.

typedef unsigned short half_t;

__device__ __forceinline__ float wider(float x) { return x; }
__device__ __forceinline__ float wider(half_t x) { return __uint_as_float((unsigned int)x << 16); }

// To the nearest, ties to even, as torch rounds.
__device__ __forceinline__ half_t rounded(float x) {
    unsigned int bits = __float_as_uint(x);
    return x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(half_t* to, float x) { *to = rounded(x); }

__device__ __forceinline__ void put(half_t* row, int column, int width, float x) {
    half_t high = rounded(x);
    row[column] = high;
    if (PARTS == 3) {
        row[column + width] = rounded(x - wider(high));
        row[column + 2 * width] = high;
    }
}

__device__ __forceinline__ void put_ones(half_t* row, int column, int width, int wide) {
    int at = PARTS * width + column;
    if (at < wide) row[at] = 0x3f80;
}

// Each column of a row by itself. made: 0 as it is, 1 gelu (tanh), 2 silu of the first half times the second.
// Grid (rows, ceil(width / threads)).
extern "C" __global__ void columns(const T* x, half_t* to, int stride, int width, int wide, int made) {
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    const T* own = x + (long long)blockIdx.x * stride;
    half_t* row = to + (long long)blockIdx.x * wide;
    if (blockIdx.y == 0) put_ones(row, threadIdx.x, width, wide);
    if (column >= width) return;
    float value = wider(own[column]);
    if (made == 1) {
        value = 0.5f * value * (1.0f + tanhf(0.7978845608028654f * (value + 0.044715f * value * value * value)));
    } else if (made == 2) {
        value = value / (1.0f + expf(-value)) * wider(own[column + width]);
    }
    put(row, column, width, value);
}

__device__ float summed(float x, float* shared) {
    for (int apart = 16; apart; apart >>= 1) x += __shfl_xor_sync(~0u, x, apart);
    __syncthreads();  // the last sum has been read
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) x += shared[warp];
    return x;
}

// The norm of rows that lie one behind the other: LayerNorm where there is a bias (centred), else RMSNorm. Grid (rows).
extern "C" __global__ void norms(const T* x, const T* weight, const T* bias, half_t* to, int width, int wide,
                                 int centred, double epsilon) {
    __shared__ float shared[32];
    const T* own = x + (long long)blockIdx.x * width;
    half_t* row = to + (long long)blockIdx.x * wide;
    float mean = 0, sum = 0;
    if (centred) {
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += wider(own[i]);
        mean = summed(sum, shared) / width;
        sum = 0;
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float off = wider(own[i]) - mean;
        sum += off * off;
    }
    float scale = 1.0f / sqrtf(summed(sum, shared) / width + (float)epsilon);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float value = (wider(own[i]) - mean) * scale * wider(weight[i]);
        put(row, i, width, centred ? value + wider(bias[i]) : value);
    }
    put_ones(row, threadIdx.x, width, wide);
}

// One token a row over what lies in the cache: queries and keys are rotated where `rotary`, keys and values written to
// slot `*slot`, and all slots up to it attended to. Grid (rows, groups); a block has the queries of one group.
//   x        (rows, heads + 2 groups, width): queries, keys, values
//   cosine, sine (rows, width), the first half of the sine negative
//   cache    (2, rows, groups, slots, width) keys and values
//   unseen   (rows, slots), added to the scores
// Shared: queries of a group, and a score for each of them and each slot.
extern "C" __global__ void attend(const T* x, const T* cosine, const T* sine, T* cache, const T* unseen,
                                  const long long* slot, half_t* to, int heads, int slots, int width, int wide,
                                  int rotary) {
    extern __shared__ float shared[];
    const int rows = gridDim.x, groups = gridDim.y, row = blockIdx.x, group = blockIdx.y, each = heads / groups;
    const int at = (int)*slot, seen = at + 1, threads = blockDim.x;
    float *queries = shared, *scores = shared + each * width;
    const T* own = x + (long long)row * (heads + 2 * groups) * width;
    T* keys = cache + ((long long)row * groups + group) * slots * width;
    T* values = keys + (long long)rows * groups * slots * width;
    const float scale = 1.0f / sqrtf((float)width);

    for (int i = threadIdx.x; i < (each + 2) * width; i += threads) {
        int which = i / width, d = i % width;
        const T* one = own + (which < each ? group * each + which : heads + (which - each) * groups + group) * width;
        float value = wider(one[d]);
        if (rotary && which <= each) {
            value = value * wider(cosine[row * width + d])
                  + wider(one[(d + width / 2) % width]) * wider(sine[row * width + d]);
        }
        if (which < each) queries[i] = value * scale;
        else store((which == each ? keys : values) + at * width + d, value);
    }
    __syncthreads();

    // Eight lanes to a key.
    const int lane = threadIdx.x % 8;
    const unsigned int lanes = 0xffu << (threadIdx.x % 32 / 8 * 8);
    for (int s = threadIdx.x / 8; s < seen; s += threads / 8) {
        float added = wider(unseen[(long long)row * slots + s]);
        for (int q = 0; q < each; ++q) {
            float score = 0;
            for (int d = lane; d < width; d += 8) score += queries[q * width + d] * wider(keys[s * width + d]);
            for (int apart = 4; apart; apart >>= 1) score += __shfl_xor_sync(lanes, score, apart);
            if (lane == 0) scores[q * slots + s] = score + added;
        }
    }
    __syncthreads();

    // A warp to a query.
    for (int q = threadIdx.x / 32; q < each; q += threads / 32) {
        float most = -3.0e38f, total = 0;
        float* own_scores = scores + q * slots;
        for (int s = threadIdx.x % 32; s < seen; s += 32) most = fmaxf(most, own_scores[s]);
        for (int apart = 16; apart; apart >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, apart));
        for (int s = threadIdx.x % 32; s < seen; s += 32) total += own_scores[s] = expf(own_scores[s] - most);
        for (int apart = 16; apart; apart >>= 1) total += __shfl_xor_sync(~0u, total, apart);
        for (int s = threadIdx.x % 32; s < seen; s += 32) own_scores[s] /= total;
    }
    __syncthreads();

    half_t* out = to + (long long)row * wide;
    for (int i = threadIdx.x; i < each * width; i += threads) {
        const float* own_scores = scores + i / width * slots;
        const T* value = values + i % width;
        float mixed = 0;
#pragma unroll 8
        for (int s = 0; s < seen; ++s) mixed += own_scores[s] * wider(value[s * width]);
        put(out, group * each * width + i, heads * width, mixed);
    }
    if (group == 0) put_ones(out, threadIdx.x, heads * width, wide);
}
